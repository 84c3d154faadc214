"""`python -m bench busy`: a tiny case through its processes, and the table."""
from __future__ import annotations

import os
import signal

import pytest

from bench import busy
from bench.__main__ import main
from bench.busy import PLACES, Times
from bench.case import Case

TINY = Case("busy", 1, 2, 8, 16)


def test_a_tiny_case_is_measured_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(busy, "TURN", 0.01)
    [(case, found)] = busy.run([TINY], threads=1, processes=1, seconds=0)
    assert case == TINY and set(found) == {(name, place) for name in busy.IMPLEMENTATIONS for place in PLACES}
    assert all(0 < times.median < 1000 and times.mean > 0 for times in found.values())


def test_others_compute_only_when_they_are_asked_to() -> None:
    others = busy.Others(1)
    [process] = others._processes
    try:
        os.waitpid(process.pid, os.WUNTRACED)                       # it stops itself
        with others.working():
            assert os.waitpid(process.pid, os.WCONTINUED | os.WNOHANG) == (process.pid, 0xffff)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    finally:
        process.kill()
        process.wait()


def test_the_table_compares_with_torch_and_with_the_idle_call() -> None:
    found = {(name, place): Times(1 + n + 4 * (name == "torch"), 9) for n, place in enumerate(PLACES) for name in busy.IMPLEMENTATIONS}
    lines = busy.lines(TINY, found).splitlines()
    assert lines[1] == "| forward (1,2,8,16) | alone, busy | 2 | 9 | 6 | 9 | 3.00 | 2.00 |"
    assert len(lines) == 4 and all(line.count("|") == busy.HEAD.splitlines()[0].count("|") for line in lines)


def test_the_list_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    main(["busy", "--list", "--only", "backward"])
    assert capsys.readouterr().out.splitlines() == ["busy forward+backward float32 full (1,8,512,64)",
                                                    "busy forward+backward float32 full (1,8,2048,64)"]
