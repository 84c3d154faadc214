"""The kernel cache and `python -m fastattn precompile`: a hit compiles nothing, a bad folder or a damaged entry costs time only, and
whatever changes machine code changes the key. Nothing here needs a GPU.
"""
from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from numba import cuda, int32, uint64

import fastattn
from fastattn import __main__ as command
from fastattn import gpu, streams
from fastattn.gpu import compile as compiler
from fastattn.gpu import precompile
from fastattn.gpu.ptx.memory import store_b32

ROOT = Path(__file__).parents[1]
ARCH = "sm_80"


def _kernel(a):
    store_b32(uint64(a.dst + uint64(4 * cuda.threadIdx.x)), int32(a.n))


SOURCE = compiler.Source("test cache", lambda: (_kernel, 48), (("dst", "l"), ("n", "i")), 32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that were really compiled."""
    seen, build = list[str](), compiler.build

    def counted(source: compiler.Source, arch: str, output: str = "cubin") -> Any:
        seen.append(source.key)
        return build(source, arch, output)
    monkeypatch.setattr(compiler, "build", counted)
    yield seen


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def test_a_hit_compiles_nothing(folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastattn"):
        first = compiler.binary(SOURCE, ARCH).code
    assert first[:4] == b"\x7fELF" and builds == [SOURCE.key] and len(entries(folder)) == 1
    assert re.search(rf"compiling {SOURCE.key} for {ARCH}", caplog.text) and re.search(r"compiled in [\d.]+ s, \d+ registers", caplog.text)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastattn"):
        assert compiler.binary(SOURCE, ARCH).code == first
    assert len(builds) == 1 and not caplog.records


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data[:-1] + b"?",
                                    lambda data: b"\0" * len(data)], ids=["empty", "short", "truncated", "changed", "zeros"])
def test_a_damaged_entry_is_compiled_again(damage: Any, folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    compiler.binary(SOURCE, ARCH)
    [entry] = entries(folder)
    entry.write_bytes(damage(entry.read_bytes()))
    again = compiler.binary(SOURCE, ARCH).code
    assert again[:4] == b"\x7fELF" and len(builds) == 2
    assert "damaged" in caplog.text and str(entry) in caplog.text
    assert compiler.binary(SOURCE, ARCH).code == again and len(builds) == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str],
                                      caplog: pytest.LogCaptureFixture) -> None:
    """A file stands where the folder should be: as good as read-only, also for root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file" / "cache"))
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF"
    assert "cannot write the kernel cache" in caplog.text and len(builds) == 1


def test_a_read_only_folder(folder: Path, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root writes anywhere")
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF" and "cannot write" in caplog.text


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    assert compiler.binary(SOURCE, ARCH).code[:4] == b"\x7fELF" and "No space left" in caplog.text
    assert not list(folder.glob("*.cubin"))


def test_entries_appear_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever written under an entry's own name: it is renamed into place when it is complete."""
    renamed, replace_file = list[tuple[bytes, str]](), os.replace

    def noted(a: Any, b: Any) -> None:
        assert not Path(b).exists()
        renamed.append((Path(a).read_bytes(), str(b)))
        replace_file(a, b)
    monkeypatch.setattr(os, "replace", noted)
    code = compiler.binary(SOURCE, ARCH).code
    [(data, path)] = renamed
    assert data[36:] == code and int.from_bytes(data[32:36], "little") == 48 and entries(folder) == [Path(path)]


def test_eight_at_once(folder: Path) -> None:
    """Threads here and processes beside: all get the same code."""
    script = ("import hashlib, test_gpu_cache as t; from fastattn.gpu import compile as c; "
              "print(hashlib.sha256(c.binary(t.SOURCE, t.ARCH).code).hexdigest())")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    others = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    with ThreadPoolExecutor(5) as pool:
        assert len(set(pool.map(lambda _: compiler.binary(SOURCE, ARCH).code, range(5)))) == 1
    said = [other.communicate(timeout=120)[0] for other in others]
    assert len(set(said)) == 1 and len(said[0].strip()) == 64
    assert len(entries(folder)) == 1


# ---------------------------------------------------------------- the key
def test_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [compiler._cache_path(SOURCE, ARCH), compiler._cache_path(SOURCE, "sm_89"),
             compiler._cache_path(replace(SOURCE, key="other"), ARCH),
             compiler._cache_path(replace(SOURCE, fields=(("dst", "l"), ("n", "q"))), ARCH),
             compiler._cache_path(replace(SOURCE, fields=(("n", "i"), ("dst", "l"))), ARCH)]
    compiler._fingerprint.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(compiler.importlib.metadata, "version", lambda package: "99")
            paths.append(compiler._cache_path(SOURCE, ARCH))
        for text in ("a = 1\n", "a = 2\n"):
            (tmp_path / "gpu" / "ptx").mkdir(parents=True, exist_ok=True)
            (tmp_path / "gpu" / "compile.py").write_text("")
            (tmp_path / "gpu" / "ptx" / "mma.py").write_text(text)
            with monkeypatch.context() as patch:
                patch.setattr(compiler, "__file__", str(tmp_path / "gpu" / "compile.py"))
                compiler._fingerprint.cache_clear()
                paths.append(compiler._cache_path(SOURCE, ARCH))
    finally:
        compiler._fingerprint.cache_clear()
    assert len(set(paths)) == len(paths) == 8
    assert compiler._cache_path(SOURCE, ARCH) == paths[0]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FASTATTN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "fastattn"
    assert fastattn.show_config()["cache folder"] == str(compiler.cache_folder())
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "own"))
    assert compiler.cache_folder() == tmp_path / "own" == Path(fastattn.show_config()["cache folder"])


# ---------------------------------------------------------------- the command
def test_show_config_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["show-config"]):
        assert command.main(arguments) == 0
        assert "cache folder" in capsys.readouterr().out


@pytest.fixture
def plain_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel instead of the command's default lists: the simplest family, in this process's child."""
    monkeypatch.setattr(precompile, "wants_of", lambda dims, dtypes, features: [precompile.Want(dtypes[0], dims[0], packed=True)])


def test_precompile_without_a_gpu(folder: Path, plain_want: None, capsys: pytest.CaptureFixture[str], builds: list[str]) -> None:
    """What it puts into the cache is what a call of the same kind finds there."""
    arguments = ["precompile", "--arch", "8.0", "--head-dim", "64", "--dtype", "float16", "--processes", "1"]
    assert command.main(arguments) == 0, capsys.readouterr().out
    said = capsys.readouterr()
    assert re.search(rf"2 kernels for sm_80 in {folder}", said.out)
    d = precompile.absent_device("sm_80")
    for source in precompile.sources(*precompile.Want("float16", 64, packed=True).call(), d):
        compiler.binary(source, "sm_80")
    assert builds == [] and len(entries(folder)) == 2


def test_precompile_lists_every_wish() -> None:
    wants = precompile.wants_of([64, 128], ["float16"], ["causal", "alibi+softcap"])
    assert len(wants) == len(set(wants)) == 48
    assert precompile.Want("float16", 128, alibi="float32", softcap=True, packed=True, lse=True) in wants


@pytest.mark.parametrize(("arguments", "said"), [
    (["--arch", "sm_70"], "sm_80, sm_89, sm_90a, sm_120"), (["--arch", "hopper"], "sm_90a"),
    (["--arch", "sm_80", "--dtype", "int8"], "bfloat16"),
    (["--arch", "sm_80", "--head-dim", "wide"], "sizes from 1 to 512"), (["--arch", "sm_80", "--features", "flash"], "not one of full"),
    (["--arch", "sm_80", "--processes", "0"], "1 or more")])
def test_precompile_says_what_is_wrong(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        command.main(["precompile", *arguments])


def test_precompile_needs_a_device_or_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = importlib.import_module("fastattn.gpu.device")

    def absent(ordinal: int) -> Any:
        raise streams.CudaError("cuInit failed: no device")
    monkeypatch.setattr(device, "device", absent)
    with pytest.raises(SystemExit, match=r"no CUDA device here .* --arch sm_90a"):
        command.main(["precompile"])


def test_precompile_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = [[precompile.Built("one", "sm_80", 1.0)], [precompile.Built("two", "sm_80", 1.0, "BuildError: 8 bytes of stack")]]
    monkeypatch.setattr(precompile, "build_all", lambda *_, **__: iter(results))
    assert command.main(["precompile", "--arch", "sm_80"]) == 1
    out = capsys.readouterr().out
    assert "1 kernels for sm_80" in out and "failed: two for sm_80: BuildError: 8 bytes of stack" in out


@pytest.mark.parametrize("given", ["sm_90a", "sm_90", "90", "9.0", " SM_90A "])
def test_arch_names(given: str) -> None:
    assert precompile.parse_arch(given) == "sm_90a"


def test_a_forward_whose_kernel_is_kept_needs_no_numba() -> None:
    """A second process's first call would spend most of its time importing it."""
    script = ("import sys; from fastattn import gpu; from fastattn.gpu import precompile\n"
              "for family in gpu.FAMILIES:\n"
              "    with gpu.use(family):\n"
              "        found = precompile.sources(*precompile.Want('float16', causal=True).call(), precompile.absent_device('sm_90a'))\n"
              "        want = precompile.Want('float16', causal=True, packed=True)\n"
              "        found += precompile.sources(*want.call(), precompile.absent_device('sm_90a'))\n"
              "        print(*(source.key.split()[0] for source in found), {'numba', 'llvmlite'} & set(sys.modules))")
    said = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert said.stdout.splitlines() == [f"forward_{family} forward_{family} plan_packed set()" for family in gpu.FAMILIES], said.stderr


def test_a_want_finds_the_kernels_of_its_family() -> None:
    call, spec = precompile.Want("float16", 104, packed=True, causal=True, lengths="int64").call()
    with gpu.use("sm90"):
        keys = [source.key for source in precompile.sources(call, spec, precompile.absent_device("sm_90a"))]
        with pytest.raises(fastattn.UnsupportedError, match="sm90"):
            precompile.sources(call, spec, precompile.absent_device("sm_80"))
    assert sorted(key.split()[0] for key in keys) == ["forward_sm90", "plan_packed"] and any("plan_packed BLOCK_M" in key for key in keys)


def test_a_launch_is_kept_for_the_same_alignments_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """forward_sm80's tiling depends on q, k and v being aligned, and on out: not on which of the two is not."""
    made: list[object] = []
    monkeypatch.setattr(gpu, "_prepare", lambda *call: made.append(call))
    call, _ = precompile.Want("float16", 64).call()
    d, o, aligned = precompile.absent_device("sm_80"), call.operands, 1 << 20
    for q, out, expected in ((aligned, aligned, 1), (aligned + 16, aligned, 1), (aligned + 8, aligned, 2), (aligned, aligned + 8, 3)):
        moved = replace(call, operands=replace(o, q=replace(o.q, ptr=q)), out=replace(call.out, ptr=out))
        gpu._prepared(moved, d, ("sm80",))
        assert len(made) == expected
