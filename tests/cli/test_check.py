"""`python -m fastattn check`: right engines pass, wrong, failing and crashing ones do not, and what cannot run says why."""
from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import reference, report, tolerance
from fastattn.cli import check, checks
from fastattn.cli.check import Engine
from fastattn.cli.checks import CALLS, Call, Result
from fastattn.cli.main import main
from fastattn.cpu import levels
from tests.tools.devices import requires_gpu
from tests.tools.fake_cuda import Driver
from tests.tools.processes import run

TINY = Call("float32", 9, 12, 2, 8)


def no_device() -> list[Engine]:
    return [Engine("gpu", "gpu", why_not="no CUDA device")]


def test_every_level_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were built and that the processor has are checked. The others say which of the two is missing."""
    known = list(levels.levels())
    monkeypatch.setattr(levels, "available", lambda: known[:2])
    found = list(check.cpu_engines())
    assert [engine.level for engine in found] == known and [engine.name for engine in found] == [f"cpu {level}" for level in known]
    assert [engine.why_not for engine in found] == ["" if level in known[:2] else "this processor lacks it" for level in known]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert {engine.why_not for engine in check.cpu_engines()} == {"it was not built"}


def test_the_callers_level_does_not_count() -> None:
    """Nor does it change."""
    code = ("import os; from fastattn.cli.check import cpu_engines\n"
            "print(*[engine.level for engine in cpu_engines()], os.environ['FASTATTN_ISA'])")
    done = run(code, FASTATTN_ISA="mmx")
    assert done.stdout.split() == [*levels.levels(), "mmx"], done.stderr


def test_without_a_cpu_engine_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "fastattn.cpu", None)
    monkeypatch.setattr(check, "gpu_engines", no_device)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "not run: import of fastattn.cpu" in out and out.endswith("\nNothing ran.\n")


def test_the_kernel_families_are_checked_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: dict[str, Any] = {"error": None, "devices": [{"name": "A card"}]}
    monkeypatch.setattr(report, "cuda_facts", lambda: cuda)
    monkeypatch.setattr(report, "gpu_engine_facts", lambda: {"error": None})
    found = list(check.gpu_engines())
    assert [engine.argument for engine in found] == ["simt", "sm80", "sm90", "decode"] and not any(engine.why_not for engine in found)
    assert {engine.argument for engine in found} | {"cpu"} == set(CALLS)
    monkeypatch.setattr(report, "gpu_engine_facts", lambda: {"error": "No module named 'numba'"})
    [engine] = check.gpu_engines()
    assert engine.why_not.startswith("No module named 'numba'; pip install 'fastattn[gpu]'")
    cuda["devices"] = []
    assert [engine.why_not for engine in check.gpu_engines()] == ["no CUDA device"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One level in a process of its own, as FASTATTN_ISA names it, and engines that are not there."""
    level = levels.available()[0]
    there, absent = Engine(f"cpu {level}", "cpu", level), Engine("cpu best", "cpu", "best", "it was not built")
    monkeypatch.setattr(check, "cpu_engines", lambda: [there, absent])
    monkeypatch.setattr(check, "gpu_engines", no_device)
    monkeypatch.setenv("FASTATTN_ISA", "nonsense")      # of the caller: a level's own process has another
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Everything that ran is right."
    rows = [line.split() for line in lines if line.startswith(f"cpu {level}")]
    assert [(row[2], row[4], row[-1]) for row in rows] == [(dtype, direction, "ok") for dtype in ("float32", "bfloat16")
                                                           for direction in ("forward", "backward")]
    assert all(0 < float(row[6]) <= float(row[7]) for row in rows)
    assert any(line.startswith("cpu best") and line.endswith("not run: it was not built") for line in lines)
    assert any(line.startswith("gpu") and line.endswith("not run: no CUDA device") for line in lines)


def test_a_wrong_result_and_a_crash_are_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"one": [Result("float32 1x1", "forward", "out", 1e-3, 1e-6)], "two": [Result("", "", note="KeyError: 'x'", failed=True)],
             "three": [Result("float32 1x1", "forward", "out", 1e-7, 1e-6)]}
    monkeypatch.setattr(check, "cpu_engines", lambda: [Engine(name, name) for name in given])
    monkeypatch.setattr(check, "gpu_engines", no_device)
    monkeypatch.setattr(check, "results", lambda engine: given[engine.name])
    assert main(["check"]) == 1
    _, _, one, two, three, *_, last = capsys.readouterr().out.splitlines()
    assert one.endswith("WRONG") and two.endswith("FAILED: KeyError: 'x'") and three.endswith("ok")
    assert last == "2 of these are wrong or failed."


def test_a_child_that_ends_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    [result] = check.results(Engine("x", "no such engine"))
    assert result.failed and not result.right and "KeyError: 'no such engine'" in result.note
    monkeypatch.setattr(check, "PATIENCE", 0.01)
    [result] = check.results(Engine("x", "cpu"))
    assert result.failed and "no answer" in result.note


@pytest.mark.parametrize("spoil", ["out", "lse", "dq", "dk", "dv", "nan"])
def test_each_tensor_is_judged(spoil: str) -> None:
    forward, backward = checks.on_host(TINY)
    assert all(result.right and result.error > 0 for result in checks.judged(TINY, forward, backward))
    names = ["out", "lse", "dq", "dk", "dv"]
    arrays = [*forward, *backward]
    arrays[names.index("out" if spoil == "nan" else spoil)] *= np.float32(np.nan if spoil == "nan" else 1.0001)
    results = list(checks.judged(TINY, arrays[:2], arrays[2:]))
    assert [result.right for result in results] == ([False, True] if spoil in ("out", "lse", "nan") else [True, False])
    assert [result.tensor for result in results if not result.right] == ["out" if spoil == "nan" else spoil]


def test_an_engine_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(call: Call) -> Any:
        raise MemoryError("no\nroom")
    monkeypatch.setattr(checks, "on_host", raises)
    results = list(checks.run("cpu"))
    assert len(results) == 2 and all(result.failed and result.note == "MemoryError: no" for result in results)
    assert checks.NAIVE not in {engine.name for engine in fastattn.engines()}


# ---------------------------------------------------------------- the GPU's part, on memory of the host
@pytest.fixture
def device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The fake driver copies too."""
    def copy(to: int, source: int, size: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)
    monkeypatch.setattr(driver, "cuMemcpyHtoD", copy, raising=False)
    monkeypatch.setattr(driver, "cuMemcpyDtoH", copy, raising=False)
    return driver


def host(x: Any) -> Any:
    return x if x is None else replace(x, device=("cpu", 0)) if hasattr(x, "strides") else x


def test_arrays_go_to_the_device_and_back(device: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on the fake device that runs the reference in float32."""
    def operands(o: Any) -> Any:
        return type(o)(*(host(getattr(o, name)) for name in o.__slots__))

    def forward(problem: Any, o: Any, out: Any, lse: Any, stream: int) -> None:
        reference.forward(problem, operands(o), host(out), host(lse), reference.Precision("float32"))

    def backward(problem: Any, o: Any, dout: Any, out: Any, lse: Any, dlse: Any, grads: Any, *_: Any) -> None:
        reference.backward(problem, operands(o), host(dout), host(out), host(lse), host(dlse), type(grads)(*map(host, grads)),
                           reference.Precision("float32"))

    monkeypatch.setitem(CALLS, "fake", (TINY, replace(TINY, dtype="bfloat16")))
    with fastattn.register_engine("fake", forward, backward, lambda problem: None, "cuda"):
        results = list(checks.run("fake"))
    assert [(result.call, result.direction) for result in results] == [("float32 9x12", "forward"), ("float32 9x12", "backward"),
                                                                      ("bfloat16 9x12", "forward"), ("bfloat16 9x12", "backward")]
    assert all(result.right and result.error > 0 for result in results), results


def test_a_family_that_refuses_is_no_failure(device: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CALLS, "fake", (TINY,))
    with fastattn.register_engine("fake", lambda *_: None, None, lambda problem: "it needs sm_90a", "cuda"):
        [result] = checks.run("fake")
    assert result.note == "it needs sm_90a" and not result.failed and result.right


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["simt", "sm80", "sm90", "decode"])
def test_on_a_gpu(engine: str) -> None:
    results = list(checks.run(engine))
    assert results and all(result.right for result in results), results


def test_the_rule() -> None:
    """Twice the rival's error, and a rounding of the result."""
    assert tolerance.allowed(1.0, "float32", 0.0) == 2.0
    assert tolerance.allowed(0.0, "bfloat16", 1.0) == pytest.approx(2.0**-7 + 2 * 2.0**-23)
    assert tolerance.allowed(0.0, "float32", 1.0, "float16") == pytest.approx(2.0**-10 + 2 * 2.0**-23)
    assert tolerance.naive_precision("float16").operand == "float16" and tolerance.naive_precision("float32").operand is None
