"""The tool that compares two trees' machine code (tools/gpu/machine_code.py): equal trees are equal, and a changed kernel is found."""
from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu.precompile import Want
from tests.tools.gpu import machine_code
from tests.tools.gpu.machine_code import Kernel, differences, run, sections

ROOT = Path(__file__).parents[2]
JOB = SimpleNamespace(id="simt-sm_80-small", family="simt", arch="sm_80", want=Want("float32", 16, lse=False))
KERNEL = Kernel("forward_simt x", b"a" * 32, b"c", 40, 128, 1000, Path("x.cubin"))


def test_differences_are_named() -> None:
    assert differences(KERNEL, replace(KERNEL, key="another name", cubin=Path("y"))) == []
    assert differences(replace(KERNEL, instructions=b"a" * 48), KERNEL) == ["instructions (2 -> 3)"]
    assert differences(replace(KERNEL, instructions=b"b" * 32), KERNEL) == ["instructions (2 in both)"]
    other = replace(KERNEL, constants=b"", registers=41, shared=8)
    assert differences(other, KERNEL) == ["constants", "registers 40 -> 41", "shared 1000 -> 8"]


def test_kernels_are_paired() -> None:
    """By name where both trees have the same names, else by position."""
    one, two, plan = replace(KERNEL, key="dq 1"), replace(KERNEL, key="dq 2", registers=50), replace(KERNEL, key="plan", threads=32)
    pairs = [(c.new.key, c.old and c.old.key, c.found) for c in machine_code.compare(JOB, [plan, one, two], [one, two, plan])]
    assert pairs == [("dq 1", "dq 1", ()), ("dq 2", "dq 2", ()), ("plan", "plan", ())]
    renamed = replace(plan, key="table")
    assert [c.found for c in machine_code.compare(JOB, [one, renamed], [one, plan])] == [(), ()]
    [alone] = machine_code.compare(JOB, [one], [one, plan])
    assert alone.old is None and alone.found == ("the call launches 2 -> 1 kernels",)


def test_sections_of_an_elf_file() -> None:
    names = b"\0.text.kernel\0.bss\0.names\0"
    bodies = [(1, 1, b"code"), (14, 8, b""), (19, 3, names)]
    head = 64
    offsets = [head, head + 4, head + 4]
    table = head + 4 + len(names)
    elf = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", table) + b"\0" * 10 + struct.pack("<3H", 64, 3, 2)
    elf += b"code" + names
    elf += b"".join(struct.pack("<IIQQQQ", name, kind, 0, 0, offset, 100 if kind == 8 else len(body)).ljust(64, b"\0")
                    for (name, kind, body), offset in zip(bodies, offsets, strict=True))
    assert sections(elf) == {".text.kernel": b"code", ".bss": b"", ".names": names}
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        sections(b"MZ" + elf)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of this tree's package, with another text of Specs: another name, no other code."""
    shutil.copytree(ROOT / "fastattn", tmp_path / "old" / "fastattn", ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
    edit(tmp_path / "old" / "fastattn/gpu/spec.py", 'f"head_dim {dims}"', 'f"dims {dims}"')
    return tmp_path / "old"


def edit(path: Path, text: str, by: str) -> None:
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, by))


@pytest.mark.slow
def test_trees_are_compared(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names do not count, one more multiplication does."""
    assert run([JOB], ROOT, old, tmp_path / "equal", None) == 0
    assert capsys.readouterr().out == "forward_simt: 1 equal\n"
    edit(old / "fastattn/gpu/simt/forward.py", "row_sum[i] * alpha + total", "row_sum[i] * alpha * alpha + total")
    assert run([JOB], ROOT, old, tmp_path / "changed", None) == 1
    text = capsys.readouterr().out
    assert text.startswith("simt-sm_80-small: instructions (") and text.endswith("forward_simt: 1 different\n") and "dims 16" in text


def test_what_an_older_tree_lacks(old: Path, tmp_path: Path) -> None:
    edit(old / "fastattn/gpu/precompile.py", "seqused", "older")
    tree = machine_code.Tree(old, tmp_path)
    with pytest.raises(LookupError, match="this tree has no seqused"):
        tree.kernels(SimpleNamespace(**{**vars(JOB), "want": replace(JOB.want, packed=True, seqused=True)}))
    edit(old / "fastattn/gpu/precompile.py", "class Want", "class Wishes")      # longer: bytecode is told apart by seconds and sizes
    tree.close()
    tree = machine_code.Tree(old, tmp_path)
    with pytest.raises(RuntimeError, match="the compiling process ended with status 1"):
        tree.kernels(JOB)
    tree.close()


def test_old_tree_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no fastattn/gpu: OLD_TREE is the root of a checkout"):
        machine_code.Tree(tmp_path, tmp_path / "cubins")
