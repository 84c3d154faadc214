"""FASTATTN_LOG, and the line that tells a terminal what a first call waits for. Nothing is compiled: `build` only waits."""
from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime import notice
from tests.tools.processes import not_sanitized, run

LINE = "fastattn: compiling test for sm_80. A first call waits for this; `python -m fastattn precompile` does it in advance.\n"
FAKE = """
import os, sys, threading, time
from fastattn.gpu.runtime import compile as compiler, notice
waits = {}
def build(source, arch, output="cubin", overlapped=()):
    time.sleep(waits.get(source.key, 0))
    return b"\\x7fELF", "Used 10 registers"
compiler.build = build
def source(key):
    return compiler.Source(key, lambda: (None, 48), (("n", "i"),), 32)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def source(key: str = "test") -> compiler.Source:
    return compiler.Source(key, lambda: (None, 48), (("n", "i"),), 32)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Terminal]:
    """A terminal, a process that has compiled nothing, a short patience, and a compiler that takes 0.3 s."""
    def build(source: compiler.Source, arch: str, output: str = "cubin", overlapped: Any = ()) -> Any:
        time.sleep(0.3)
        return b"\x7fELF", ""
    terminal = Terminal()
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(notice, "sys", SimpleNamespace(stderr=terminal))     # pytest sets the real one anew for each phase
    monkeypatch.setattr(notice, "notice", notice._Notice())
    monkeypatch.setattr(notice, "PATIENCE", 0.1)
    monkeypatch.setattr(compiler, "build", build)
    before = set(threading.enumerate())
    yield terminal
    assert set(threading.enumerate()) <= before, "a thread is left"


def test_a_terminal_is_told_once(stderr: Terminal) -> None:
    for key in ("test one", "test two"):
        compiler.binary(source(key), "sm_80")
    assert stderr.getvalue() == LINE


def test_quick_kernels_are_counted_together(stderr: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call waits for all of them."""
    monkeypatch.setattr(notice, "PATIENCE", 0.45)
    compiler.binary(source("first"), "sm_80")
    assert stderr.getvalue() == ""
    compiler.binary(source(), "sm_80")
    assert stderr.getvalue() == LINE


@pytest.mark.parametrize("silent", ["quick", "no terminal", "closed", "logged", "precompile", "cached"])
def test_nothing_is_said(silent: str, stderr: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if silent == "quick":
        monkeypatch.setattr(notice, "PATIENCE", 9)
    if silent == "no terminal":
        monkeypatch.setattr(stderr, "isatty", lambda: False)
    if silent == "closed":
        monkeypatch.setattr(notice, "sys", SimpleNamespace(stderr=None))
    if silent == "logged":
        caplog.set_level(logging.INFO, "fastattn")
    if silent == "cached":
        compiler.binary(source(), "sm_80", announce=False)
    (compiler.cached if silent == "precompile" else compiler.binary)(source(), "sm_80")
    assert stderr.getvalue() == ""


def test_a_compiler_that_fails_leaves_no_thread(stderr: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **more: Any) -> Any:
        raise KeyboardInterrupt
    monkeypatch.setattr(compiler, "build", build)
    with pytest.raises(KeyboardInterrupt):
        compiler.binary(source(), "sm_80")


def test_without_a_thread_to_be_had(stderr: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Timer, "start", start)
    assert compiler.binary(source(), "sm_80").code == b"\x7fELF" and stderr.getvalue() == ""


def test_several_threads(stderr: Terminal) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: compiler.binary(source(f"test {n % 2}"), "sm_80"), range(4)))
    assert stderr.getvalue() == LINE


@not_sanitized
def test_a_fork_while_another_thread_compiles(tmp_path: Path) -> None:
    """The child has neither the thread nor its lock: it compiles at once, and its notice comes from a thread of its own."""
    done = run(FAKE + """
waits["slow"] = waits["mine"] = 1.0
notice.PATIENCE = 0.2
sys.stderr.isatty = lambda: True
threading.Thread(target=compiler.binary, args=(source("slow"), "sm_80")).start()
time.sleep(0.5)
child = os.fork()
if child == 0:
    import signal
    signal.alarm(20)
    notice.notice.said = False
    compiler.binary(source("mine"), "sm_80")
    os.write(1, b"%d threads" % len(threading.enumerate()))
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""", FASTATTN_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 threads" and "compiling slow" in done.stderr and "compiling mine" in done.stderr


def test_a_real_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    code = FAKE + "waits['test'] = 0.6\nnotice.PATIENCE = 0.2\ncompiler.binary(source('test'), 'sm_80')\n"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FASTATTN_CACHE": str(tmp_path)}, stderr=theirs, timeout=60,
                          cwd=Path(__file__).parents[2])
    os.close(theirs)
    assert done.returncode == 0 and os.read(ours, 1000).decode().replace("\r\n", "\n") == LINE
    os.close(ours)


# ---------------------------------------------------------------- FASTATTN_LOG
COMPILED = FAKE + "compiler.binary(source('test'), 'sm_80'); compiler.binary(source('test'), 'sm_80')"


@pytest.mark.parametrize(("level", "lines"), [("", 0), ("info", 2), ("DEBUG", 3)])
def test_the_log_goes_to_stderr(level: str, lines: int, tmp_path: Path) -> None:
    done = run(COMPILED, FASTATTN_LOG=level, FASTATTN_CACHE=str(tmp_path))
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == lines, done.stderr
    expected = ("INFO fastattn: compiling test for sm_80", "INFO fastattn: compiled in 0.0 s, 10 registers",
                "DEBUG fastattn: test for sm_80 is in the kernel cache, entry ")
    assert all(words in line for line, words in zip(said, expected, strict=False))


def test_an_unknown_level_is_one_warning(tmp_path: Path) -> None:
    code = "import fastattn; import fastattn.log; import logging; print(logging.getLogger('fastattn').handlers)"
    done = run(code, FASTATTN_LOG="verbose")
    assert done.returncode == 0 and done.stdout == "[]\n"
    assert done.stderr.count("FASTATTN_LOG is 'verbose'; expected info or debug. Nothing is logged.") == 1
    assert "RuntimeWarning" in done.stderr
