"""Is the machine code of the kernels what an older tree makes? `python -m tests.tools.gpu.machine_code OLD_TREE`, without a GPU.

The kernels are those of jobs.py: its list, and random ones (FASTATTN_SAMPLES, FASTATTN_SEED). Each tree compiles its own
kernels for the same calls, in a process of its own, because two packages of one name do not fit into one. Compared are the instructions
(sections .text), constants, registers, threads and shared memory. Names are not: kernels and modules may be renamed.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


# ---------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `instructions` and `constants` are the bytes of its sections; `shared` is dynamic shared memory in bytes."""

    key: str
    instructions: bytes
    constants: bytes
    registers: int
    threads: int
    shared: int
    cubin: Path

    @property
    def name(self) -> str:
        return self.key.split()[0]


def sections(elf: bytes) -> dict[str, bytes]:
    """Name -> bytes of the sections of a 64-bit little-endian ELF file, which a cubin is."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"not a 64-bit little-endian ELF file: it starts with {elf[:6]!r}")
    [start], (size, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + n * size) for n in range(count)]       # name, type, flags, address, offset, size
    table = headers[names][4]
    bodies = {}
    for name, kind, _, _, offset, length in headers:
        text = elf[table + name:elf.index(b"\0", table + name)].decode()
        bodies[text] = b"" if kind == 8 else elf[offset:offset + length]        # 8: SHT_NOBITS, no bytes in the file
    return bodies


def code_of(elf: bytes) -> tuple[bytes, bytes]:
    """Instructions and constants of a cubin, its sections in order of their names. Bank 0 of the constants holds the arguments."""
    found = sorted(sections(elf).items())
    text = b"".join(body for name, body in found if name.startswith(".text"))
    if not text:
        raise ValueError("the cubin has no section .text")
    return text, b"".join(body for name, body in found if re.match(r"\.nv\.constant[1-9]", name))


def differences(new: Kernel, old: Kernel) -> list[str]:
    """What differs between two kernels, in words. Empty: the machine is told the same."""
    found = []
    if new.instructions != old.instructions:
        counts = [len(kernel.instructions) // 16 for kernel in (old, new)]
        found.append(f"instructions ({counts[0]} -> {counts[1]})" if counts[0] != counts[1] else f"instructions ({counts[0]} in both)")
    if new.constants != old.constants:
        found.append("constants")
    return found + [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in ("registers", "threads", "shared")
                    if getattr(old, name) != getattr(new, name)]


def opcodes(kernel: Kernel, nvdisasm: str) -> collections.Counter[str]:
    """How often each instruction occurs, as nvdisasm prints them."""
    text = subprocess.run([nvdisasm, "-c", str(kernel.cubin)], check=True, capture_output=True, text=True).stdout
    return collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE))


def changed_opcodes(new: Kernel, old: Kernel, nvdisasm: str, most: int = 8) -> str:
    """The opcodes whose number changed most: "+3 FMUL, -3 FFMA"."""
    after, before = opcodes(new, nvdisasm), opcodes(old, nvdisasm)
    change = {name: after[name] - before[name] for name in after.keys() | before.keys() if after[name] != before[name]}
    largest = sorted(change, key=lambda name: (-abs(change[name]), name))[:most]
    return ", ".join(f"{change[name]:+d} {name}" for name in largest) or "the same opcodes, in another order or with other registers"


# ---------------------------------------------------------------- one tree: a process that compiles
def compile_jobs(folder: Path) -> None:
    """Read jobs from stdin, a JSON line each; write their cubins into the folder and a JSON line about each job to stdout.

    Runs in the tree that is on PYTHONPATH. Its gpu/ may be older than gpu/runtime/.
    """
    import fastattn
    from fastattn import gpu
    from fastattn.gpu import precompile

    if not Path(fastattn.__file__).is_relative_to(Path.cwd()):
        raise RuntimeError(f"{fastattn.__file__} was imported, not the package of {Path.cwd()}")
    compiler = precompile.compiler
    done: dict[tuple[str, str], dict[str, Any]] = {}
    known = {field.name for field in fields(precompile.Want)}
    for line in sys.stdin:
        job = json.loads(line)
        missing = sorted(job["want"].keys() - known)
        if missing:
            print(json.dumps({"error": f"this tree has no {', '.join(missing)}"}), flush=True)
            continue
        try:
            settings = {name: tuple(value) if isinstance(value, list) else value for name, value in job["want"].items()}
            call = precompile.Want(**settings).call()
        except (KeyError, ValueError) as error:     # a dtype or head_dim that came later
            print(json.dumps({"error": f"this tree has no such call: {error}"}), flush=True)
            continue
        try:
            with gpu.use(job["family"]):
                found = precompile.sources(*call, precompile.absent_device(job["arch"]))
            kernels = []
            for source in found:
                at = (source.key, job["arch"])
                if at not in done:
                    code, report = compiler.build(source, job["arch"])
                    path = folder / f"{len(done)}.cubin"
                    path.write_bytes(code)
                    registers = re.search(r"Used (\d+) registers", report)
                    done[at] = {"key": source.key, "cubin": str(path), "registers": int(registers.group(1)) if registers else -1,
                                "threads": source.threads, "shared": source.make()[1]}
                kernels.append(done[at])
            print(json.dumps({"kernels": kernels}), flush=True)
        except NotImplementedError as error:
            print(json.dumps({"error": str(error)}), flush=True)


class Tree:
    """A process that compiles with the package of one tree.

    Parameters
    ----------
    root
        The tree: a folder with `fastattn/` in it.
    folder
        Where cubins are written.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (root / "fastattn" / "gpu").is_dir():
            raise ValueError(f"{root} has no fastattn/gpu: OLD_TREE is the root of a checkout of this repository")
        # -P: the folder of this file is not searched for modules. The tree is searched before what the caller's environment names.
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen([sys.executable, "-P", str(HERE), "--compile-into", str(folder)], cwd=root, text=True,
                                         env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def kernels(self, job: Any) -> list[Kernel]:
        """The kernels of a call of test_compile's list. LookupError: the tree does not run it. RuntimeError: the process ended."""
        assert self._process.stdin and self._process.stdout
        standard = type(job.want)()
        want = {name: value for name, value in asdict(job.want).items() if value != getattr(standard, name)}
        self._process.stdin.write(json.dumps({"family": job.family, "arch": job.arch, "want": want}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the compiling process ended with status {self._process.wait()}; its message is above")
        answer = json.loads(line)
        if "error" in answer:
            raise LookupError(answer["error"])
        return [Kernel(k["key"], *code_of(Path(k["cubin"]).read_bytes()), k["registers"], k["threads"], k["shared"], Path(k["cubin"]))
                for k in answer["kernels"]]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):      # it has ended, and said why
            if self._process.stdin:
                self._process.stdin.close()
        self._process.wait()


# ---------------------------------------------------------------- two trees
@dataclass(frozen=True)
class Compared:
    """One kernel of a call in both trees. `found` is what differs; `old` is None where only this tree has it."""

    job: str
    new: Kernel
    old: Kernel | None
    found: tuple[str, ...]


def compare(job: Any, new: list[Kernel], old: list[Kernel]) -> Iterator[Compared]:
    """The kernels of a call. A call that launches another number of kernels differs in all of them.

    Kernels of one name are paired in the order of their launches, which are not always those of the other names. If a name is new, all
    are paired in the order of their launches.
    """
    if len(new) != len(old):
        yield from (Compared(job.id, kernel, None, (f"the call launches {len(old)} -> {len(new)} kernels",)) for kernel in new)
        return
    if sorted(kernel.name for kernel in new) == sorted(kernel.name for kernel in old):      # sorting keeps the order of equals
        new, old = (sorted(kernels, key=lambda kernel: kernel.name) for kernels in (new, old))
    for one, other in zip(new, old, strict=True):
        yield Compared(job.id, one, other, tuple(differences(one, other)))


def run(jobs: list[Any], new_tree: Path, old_tree: Path, keep: Path, nvdisasm: str | None) -> int:
    """Compare all kernels of the jobs, print each that differs and the counts. The exit status: 1 if any differs."""
    seen: set[tuple[str, str]] = set()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    trees = [Tree(new_tree, keep / "new"), Tree(old_tree, keep / "old")]
    try:
        for number, job in enumerate(jobs, 1):
            try:
                old, new = (tree.kernels(job) for tree in reversed(trees))      # what the old tree refuses is not compiled
            except LookupError as error:
                counts[job.family]["not in both trees"] += 1
                print(f"{job.id}: not compared: {error}", flush=True)
                continue
            for one in compare(job, new, old):
                if (one.new.key, job.arch) in seen:
                    continue
                seen.add((one.new.key, job.arch))
                counts[one.new.name]["different" if one.found else "equal"] += 1
                if one.found:
                    found = list(one.found)
                    if nvdisasm and one.old and one.new.instructions != one.old.instructions:
                        found.append(changed_opcodes(one.new, one.old, nvdisasm))
                    print(f"{one.job}: {'; '.join(found)}\n    new {one.new.key}", flush=True)
                    if one.old:
                        print(f"    old {one.old.key}", flush=True)
            print(f"{number}/{len(jobs)}", file=sys.stderr, flush=True)
    finally:
        for tree in trees:
            tree.close()
    for name, count in sorted(counts.items()):
        print(f"{name}: " + ", ".join(f"{number} {what}" for what, number in sorted(count.items())))
    return int(any(count["different"] or count["not in both trees"] for count in counts.values()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.gpu.machine_code", description=__doc__)
    parser.add_argument("old_tree", type=Path, help="the root of an older checkout: git worktree add --detach ../old main")
    parser.add_argument("-k", default="", help="only calls whose id contains this text, as in test_compile.py: sm90, backward, sample")
    parser.add_argument("--keep", type=Path, help="keep the cubins in this folder")
    parser.add_argument("--nvdisasm", help="the disassembler; kernels that differ are then printed with the opcodes whose number changed")
    given = parser.parse_args()
    from .jobs import JOBS  # here: a process that compiles an old tree has its own copy of them

    jobs = [job for job in JOBS if given.k in job.id]
    if not jobs:
        parser.error(f"-k {given.k}: no call's id contains it")
    with tempfile.TemporaryDirectory() as temporary:
        return run(jobs, HERE.parents[3], given.old_tree.resolve(), given.keep or Path(temporary), given.nvdisasm)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile-into"]:
        compile_jobs(Path(sys.argv[2]))
    else:
        sys.exit(main())
