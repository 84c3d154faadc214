"""The command line without its long commands: the report and its JSON, help, closed pipes, cache and precompile."""
from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastattn
from bench.__main__ import main as bench
from fastattn import report
from fastattn.arrays import streams
from fastattn.cli import pipes
from fastattn.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
KEYS = {"fastattn", "python", "packages", "cpu_engine", "cuda", "gpu_engine", "engines", "environment"}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastattn", *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True,
                          text=True, timeout=60)


# ---------------------------------------------------------------- the report
def test_the_report_and_the_version() -> None:
    done = command(FASTATTN_CACHE_MB="7")
    assert done.returncode == 0 and done.stdout.startswith("fastattn") and not done.stderr
    assert "cuda driver" in done.stdout and "FASTATTN_CACHE_MB 7" in " ".join(done.stdout.split())
    assert command("--version").stdout == f"fastattn {fastattn.__version__}\n"


@pytest.mark.parametrize("arguments", [["--json"], ["show-config", "--json"]])
def test_json_has_every_key(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CACHE_MB", "7")
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["fastattn"] == fastattn.__version__ and set(found["python"]) == {"version", "system", "machine"}
    assert found["packages"]["numpy"] and "cupy-cuda13x" in found["packages"]
    assert set(found["cpu_engine"]) == {"instruction_set", "threads", "error"} and found["cpu_engine"]["threads"] >= 1
    assert set(found["cuda"]) == {"driver", "version", "error", "devices"}
    assert set(found["gpu_engine"]) == {"error", "cache_folders"}
    assert {"name": "cpu", "device": "cpu", "built_in": True} in found["engines"]
    assert found["environment"]["FASTATTN_CACHE_MB"] == "7"


def test_json_goes_with_the_report_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--json", "cache"])
    assert ended.value.code == 2 and "--json goes with show-config" in capsys.readouterr().err


def broken_driver(error: Exception) -> Any:
    def driver() -> Any:
        raise error
    return driver


def test_a_missing_driver_is_a_short_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """cuda.bindings' own text, with what follows from it, has 200 characters."""
    monkeypatch.setattr(report, "_proc_driver", lambda: "")
    unloadable = streams.CudaError("CUDA arrays need the NVIDIA driver, which cannot be loaded: " + "because " * 30)
    unloadable.__cause__ = RuntimeError("because")
    for error, said in ((unloadable, "none (libcuda.so.1, the NVIDIA driver's library, cannot be loaded)"),
                        (ImportError("no cuda"), "none (the package cuda-bindings is not installed)"),
                        (streams.CudaError("CUDA arrays need the NVIDIA driver, whose cuInit says CUDA_ERROR_NO_DEVICE."),
                         "none (cuInit says CUDA_ERROR_NO_DEVICE)")):
        monkeypatch.setattr(streams, "driver", broken_driver(error))
        config = fastattn.show_config()
        assert config["cuda driver"] == said and len(said) < 80 and config["cuda devices"] == "none"
    monkeypatch.setattr(report, "_proc_driver", lambda: "580.95.05")        # in a container without libcuda
    assert fastattn.show_config()["cuda driver"] == "580.95.05 (cuInit says CUDA_ERROR_NO_DEVICE)"
    capsys.readouterr()


def test_a_level_that_this_processor_lacks_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--json", FASTATTN_ISA="mmx")
    assert done.returncode == 0 and "FASTATTN_ISA is 'mmx'" in json.loads(done.stdout)["cpu_engine"]["error"]


def test_the_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """pyproject.toml names a function that exists, and help speaks of the program that was called."""
    name, _, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["fastattn"].partition(":")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastattn"])
    with pytest.raises(SystemExit):
        getattr(importlib.import_module(name), function)(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: fastattn ") and "\n  fastattn check" in out and "python -m" not in out


# ---------------------------------------------------------------- help and pipes
def test_every_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for run, arguments in ((main, []), *((main, [name]) for name in COMMANDS), (bench, []), *((bench, [name]) for name in
                                                                                            ("cpu", "gpu", "paired"))):
        with pytest.raises(SystemExit) as ended:
            run([*arguments, "--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and "\nexample" in out and "\n  python -m " in out, arguments
    assert sorted(COMMANDS) == ["bench", "cache", "check", "precompile", "show-config"]


@pytest.mark.parametrize("arguments", [["fastattn", "--json"], ["bench", "cpu", "--list"]])
def test_a_reader_that_ends_early(arguments: list[str]) -> None:
    """The pipe is closed before anything is written, as by `head -0`: no traceback, and SIGPIPE's status."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == pipes.CLOSED == 141 and done.stderr == ""


def test_other_errors_pass_through_the_pipe() -> None:
    def fails() -> int:
        raise KeyError("x")
    with pytest.raises(KeyError):
        pipes.until_closed(fails)
    assert pipes.until_closed(lambda: 3) == 3 and pipes.until_closed(lambda: None) == 0


# ---------------------------------------------------------------- cache and precompile
def gpu_module(name: str) -> Any:
    pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
    return pytest.importorskip(f"fastattn.gpu.{name}")


def test_cache_lists_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cache = gpu_module("runtime.cache")
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTATTN_CACHE", str(folder))
    assert main(["cache", "--list"]) == 0 and capsys.readouterr().out == f"{folder}: 0 entries, 0.0 MB\n"
    cache.write("ab" * 32, cache.Binary(b"\x7fELF", 48, "sm_90a forward_sm90 bfloat16 head_dim 64"))
    (folder / f"{'cd' * 32}.cubin").write_bytes(b"fastattn of before")
    os.utime(folder / f"{'cd' * 32}.cubin", (1e9, 1e9))
    assert main(["cache", "--list"]) == 0
    head, newest, oldest = capsys.readouterr().out.splitlines()
    assert head == f"{folder}: 2 entries, 0.0 MB" and newest.endswith("sm_90a forward_sm90 bfloat16 head_dim 64")
    assert "2001-09-0" in oldest and oldest.endswith(f"of another version: {'cd' * 32}.cubin")
    assert cache.read("ab" * 32).label.startswith("sm_90a")
    with pytest.raises(SystemExit):
        main(["cache", "--list", "--clear"])
    assert main(["cache", "--clear"]) == 0 and not list(folder.iterdir())


def test_the_bar_and_the_sum_count_the_same_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels, each once for an architecture, although several calls launch one."""
    precompile = gpu_module("precompile")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(precompile, "build_all", lambda jobs, processes: (precompile.Built(job.key, job.arch, 0.1) for job in jobs))
    assert main(["precompile", "--arch", "sm_80,sm_90a", "--head-dim", "64", "--dtype", "bfloat16", "--features", "causal"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    kernels = {(line.split()[3], line.split("  ")[-1]) for line in lines}
    assert last.startswith(f"{len(lines)} kernels for sm_80, sm_90a in ") and len(kernels) == len(lines) > 10
    assert [line.split()[0] for line in lines] == [f"{n}/{len(lines)}" for n in range(1, len(lines) + 1)]


def test_precompile_takes_every_architecture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    precompile = gpu_module("precompile")
    asked = list[list[str]]()
    monkeypatch.setattr(precompile, "command", lambda archs, *_: asked.append(archs) or 0)
    names = list(gpu_module("runtime.arch").ARCHITECTURES)
    for name in names:
        assert main(["precompile", "--arch", name]) == 0
    assert asked == [[name] for name in names]
    with pytest.raises(SystemExit):
        main(["precompile", "--help"])
    assert ", ".join(names) in " ".join(capsys.readouterr().out.split())


def test_a_call_that_no_family_runs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    precompile = gpu_module("precompile")
    jobs, refused = precompile.jobs_of([precompile.Want("float64", 64)], ["sm_80"], ("sm80",))
    assert not jobs and len(refused) == 1 and "sm80" in refused[0].error


def test_without_the_gpu_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fastattn.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastattn.gpu", None)
    for arguments in (["cache"], ["precompile", "--arch", "sm_80"]):
        with pytest.raises(SystemExit, match=rf"{arguments[0]} needs the packages of the GPU engine .*pip install 'fastattn\[gpu\]'"):
            main(arguments)
