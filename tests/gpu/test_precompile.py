"""`python -m fastattn precompile` and `cache`, and the names of architectures. Nothing here needs a GPU."""
from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")


import fastattn
from fastattn import __main__ as command
from fastattn import gpu
from fastattn.arrays import streams
from fastattn.gpu import precompile
from fastattn.gpu.runtime import cache
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.arch import ARCHITECTURES, arch_of, arch_of_number, parse_arch
from tests.tools.gpu.cache import KEY, ME, Owners, aged, entries, kept
from tests.tools.processes import ROOT

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_show_config_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["show-config"]):
        assert command.main(arguments) == 0
        assert "cache folder" in capsys.readouterr().out


@pytest.fixture
def plain_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of the simplest family instead of the command's default lists, compiled in a child of this process."""
    monkeypatch.setattr(precompile, "wants_of", lambda dims, dtypes, features: [precompile.Want(dtypes[0], dims[0], packed=True)])


@pytest.mark.slow
def test_precompile_without_a_gpu(folder: Path, plain_want: None, capsys: pytest.CaptureFixture[str], builds: list[str]) -> None:
    """A call of the same kind finds in the cache what the command put there."""
    arguments = ["precompile", "--arch", "8.0", "--head-dim", "64", "--dtype", "float16", "--processes", "1"]
    assert command.main(arguments) == 0, capsys.readouterr().out
    said = capsys.readouterr()
    assert re.search(rf"2 kernels for sm_80 in {folder}", said.out)
    d = precompile.absent_device("sm_80")
    for source in precompile.sources(*precompile.Want("float16", 64, packed=True).call(), d):
        compiler.binary(source, "sm_80")
    assert builds == [] and len(entries(folder)) == 2


def test_precompile_lists_every_kernel() -> None:
    wants = precompile.wants_of([64, 128], ["float16"], ["causal", "alibi+softcap"])
    assert len(wants) == len(set(wants)) == 96
    assert precompile.Want("float16", 128, alibi="float32", softcap=True, packed=True, lse=True) in wants


@pytest.mark.parametrize(("arguments", "said"), [
    (["--arch", "sm_70"], "sm_80, sm_86, sm_89, sm_90a, sm_120"), (["--arch", "hopper"], "sm_90a"),
    (["--arch", "sm_80", "--dtype", "int8"], "bfloat16"),
    (["--arch", "sm_80", "--head-dim", "wide"], "sizes from 1 to 576"), (["--arch", "sm_80", "--features", "flash"], "not one of full"),
    (["--arch", "sm_80", "--processes", "0"], "1 or more")])
def test_precompile_says_what_is_wrong(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        command.main(["precompile", *arguments])


def test_precompile_needs_a_device_or_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = importlib.import_module("fastattn.gpu.runtime.device")

    def absent(ordinal: int) -> Any:
        raise streams.CudaError("cuInit failed: no device")
    monkeypatch.setattr(device, "device", absent)
    with pytest.raises(SystemExit, match=r"no CUDA device here .* --arch sm_90a"):
        command.main(["precompile"])


def test_precompile_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = [precompile.Built("one", "sm_80", 1.0), precompile.Built("two", "sm_80", 1.0, "BuildError: 8 bytes of stack")]
    monkeypatch.setattr(precompile, "build_all", lambda *_, **__: iter(results))
    assert command.main(["precompile", "--arch", "sm_80"]) == 1
    out = capsys.readouterr().out
    assert "1 kernels for sm_80" in out and "failed: two for sm_80: BuildError: 8 bytes of stack" in out


def test_precompile_says_where_it_cannot_write(folder: Path, plain_want: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that was compiled and could not be stored counts as failed."""
    arguments = ["precompile", "--arch", "8.0", "--head-dim", "64", "--dtype", "float16", "--processes", "1"]
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SystemExit, match=r"not used as a kernel cache: .* can be written by others .*chmod go-w"):
        command.main(arguments)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SystemExit, match="Not a directory"):
        command.main(arguments)
    monkeypatch.setattr(cache, "read", lambda key: None)
    monkeypatch.setattr(compiler, "binary", lambda *_, **__: None)
    jobs, _ = precompile.jobs_of([precompile.Want("float16", 64)], ["sm_80"], ("simt",))
    assert "the log says why" in str(precompile._build(jobs[0], ("simt",)).error)


def test_cache_shows_and_clears(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cache"]) == 0 and capsys.readouterr().out == f"{folder}: 0 entries, 0.0 MB\n"
    cache._make(folder, 0o755)
    gone = [aged(folder, f"{digit * 64}.cubin", 400_000, 1) for digit in "123"] + [aged(folder, f"{KEY}.cubin.{'0' * 16}", 10, 0)]
    notes, target = aged(folder, "notes.cubin", 10, 1), aged(tmp_path, "f" * 64 + ".cubin", 10, 9)
    link = folder / target.name
    link.symlink_to(target)
    assert command.main(["cache"]) == 0 and capsys.readouterr().out == f"{folder}: 3 entries, 1.2 MB\n"
    assert command.main(["cache", "--clear"]) == 0 and capsys.readouterr().out == f"{folder}: 3 entries, 1.2 MB removed\n"
    assert not any(path.exists() for path in gone) and notes.exists() and target.exists() and link.is_symlink()
    folder.chmod(0o777)
    assert command.main(["cache", "--clear"]) == 1 and "not used" in capsys.readouterr().out


def test_only_the_users_own_folder_is_cleared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    entry, own = kept(folder), tmp_path / "caches" / "fastattn"
    mine = kept(own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))
    Owners(monkeypatch).give(own, ME)
    assert command.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{folder}: 1 entries, 0.0 MB\n{own}: 1 entries, 0.0 MB removed\n"
    assert entry.exists() and not mine.exists()


@pytest.mark.parametrize("given", ["sm_90a", "sm_90", "90", "9.0", " SM_90A "])
def test_arch_names(given: str) -> None:
    assert parse_arch(given).name == "sm_90a"


def test_an_unknown_arch_names_all_that_are_known() -> None:
    with pytest.raises(ValueError, match="sm_75: kernels are compiled for sm_80, sm_86, sm_89, sm_90a, sm_120"):
        parse_arch("sm_75")
    with pytest.raises(ValueError, match="new: kernels"):
        parse_arch("new")
    with pytest.raises(SystemExit, match=r"--arch 7\.5: kernels are compiled for"):
        command.main(["precompile", "--arch", "7.5"])


def test_other_architectures_are_what_their_name_says() -> None:
    known = [arch_of(name) for name in ARCHITECTURES]
    assert [(arch.name, arch_of_number(arch.number)) for arch in known] == list(zip(ARCHITECTURES, known, strict=True))
    newer = arch_of_number(103)
    assert (newer.name, newer.capability, arch_of("sm_103"), newer.shared_memory) == ("sm_103", (10, 3), newer, 99)


def test_a_call_whose_kernels_are_kept_needs_no_numba() -> None:
    """A second process's first call would spend most of its time importing it."""
    script = ("import contextlib, sys; from fastattn import gpu; from fastattn.gpu import precompile\n"
              "for family in gpu.FAMILIES:\n"
              "    with gpu.use(family):\n"
              "        found = precompile.sources(*precompile.Want('float16', causal=True).call(), precompile.absent_device('sm_90a'))\n"
              "        want = precompile.Want('float16', causal=True, packed=True)\n"
              "        found += precompile.sources(*want.call(), precompile.absent_device('sm_90a'))\n"
              "        for more in ({}, {'bias': 'float16', 'sinks': 'float32'}, {'deterministic': True},\n"
              "                     {'packed': True, 'head_dim': 256}):\n"
              "            want = precompile.Want('float16', backward=True, **more)\n"
              "            with contextlib.suppress(NotImplementedError):\n"
              "                assert len(precompile.sources(*want.call(), precompile.absent_device('sm_90a'))) >= 3\n"
              "        print(*(source.key.split()[0] for source in found), {'numba', 'llvmlite'} & set(sys.modules))")
    said = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert said.stdout.splitlines() == [f"forward_{family} forward_{family} plan_packed set()" for family in gpu.FAMILIES], said.stderr


def test_a_want_lists_the_kernels_of_its_family() -> None:
    call, spec = precompile.Want("float16", 104, packed=True, causal=True, lengths="int64").call()
    with gpu.use("sm90"):
        keys = [source.key for source in precompile.sources(call, spec, precompile.absent_device("sm_90a"))]
        with pytest.raises(fastattn.UnsupportedError, match="sm90"):
            precompile.sources(call, spec, precompile.absent_device("sm_80"))
    assert sorted(key.split()[0] for key in keys) == ["forward_sm90", "plan_packed"] and any("plan_packed BLOCK_M" in key for key in keys)
