"""The fuzzer: 3000 random problems with the seed of the day, the problems
that it found before, and tests of the fuzzer itself.

The random ones run on all instruction sets of this machine. FASTATTN_FUZZ_SEED sets the seed, FASTATTN_FUZZ=10 runs ten times as many.
"""
from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.options import Options, read_position
from tests.fuzz import formula, functions, judge, memory, run, shrink, values
from tests.fuzz.__main__ import today
from tests.fuzz.device import Device
from tests.fuzz.draw import draw
from tests.fuzz.found import FOUND
from tests.fuzz.inputs import arguments, make
from tests.fuzz.spec import Spec
from tests.tools import fake_cuda
from tests.tools.problems import NUMPY
from tests.tools.processes import levels_here

TIMES = float(os.environ.get("FASTATTN_FUZZ", "1"))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")      # numbers that overflow are what is drawn


def complaints(spec: Spec, device: Device | None = None) -> list[str]:
    before = fastattn.get_num_threads()
    try:
        with judge.poisoned_results():
            return judge.complaints(spec, device or Device())
    finally:
        fastattn.set_num_threads(before)


def test_problems_of_the_day() -> None:
    seed = today()
    print(f"FASTATTN_FUZZ_SEED={seed}")
    report = run.run(seed, "cpu", levels_here(), problems=int(3000 * TIMES), processes=2)
    print(report.last_line())
    assert not report.findings, "\n".join(run.show(finding, seed, "cpu") for finding in report.findings[:20]) + "\n" + report.last_line()


@pytest.mark.parametrize("spec", FOUND, ids=str)
def test_found(spec: Spec) -> None:
    assert complaints(spec) == []


def test_reference() -> None:
    """The reference is held to the same formula as the engines."""
    wrong = []
    for index in range(int(250 * TIMES)):
        spec = replace(draw(today(), index), engine="reference")
        wrong += [f"{spec}: {complaint}" for complaint in complaints(spec)]
    assert not wrong, "\n".join([f"seed {today()}", *wrong[:20]])


# ---------------------------------------------------------------- the GPU's problems, without one
def test_problems_drawn_for_a_gpu() -> None:
    """Problems drawn as for a GPU, run on the host."""
    for index in range(0, 1000, 25):
        spec = replace(draw(3, index, "cuda"), engine=None, library="numpy", hidden=None)
        if spec.num_heads * max(spec.full[2] * spec.full[3], 1) < 50_000:
            assert complaints(spec) == [], spec


def test_other_libraries_arrays() -> None:
    """The GPU's device with torch's tensors in host memory."""
    pytest.importorskip("torch")
    from tests.fuzz.gpu import Gpu

    there = Gpu("cpu")
    for index in range(0, 1000, 50):
        spec = replace(draw(4, index, "cuda"), engine=None, values="normal", softmax_scale=None, bias_values="normal", causal=False)
        if spec.num_heads * max(spec.full[2] * spec.full[3], 1) < 20_000 and spec.call != "merge":
            assert complaints(spec, there) == [], spec


def test_diagonals_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagonal is a number in host memory, or an array on the device, which options take whatever protocol it speaks."""
    pytest.importorskip("torch")
    from tests.fuzz.gpu import Gpu

    there, seen = Gpu("cpu"), set()
    there.where = "cuda"
    with fake_cuda.installed(monkeypatch):
        monkeypatch.setattr("fastattn.arrays.streams.driver", lambda: _Driver())
        for index in range(1500):
            spec = replace(draw(5, index, "cuda"), library=("dlpack", "interface")[index % 2])
            if spec.diagonal is None or spec.packed != isinstance(spec.diagonal, tuple):
                continue
            given = there.put(spec, arguments(make(spec))).options
            options, each = read_position("attention", Options(), given["diagonal"], None, None, spec.packed)
            assert (each is given["diagonal"]) if spec.packed else (each is None and options.position.diagonal == spec.diagonal)
            seen.add((spec.packed, spec.library))
    assert len(seen) == 4


class _Driver(fake_cuda.Driver):
    """With the calls that copy."""

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        return self.cuMemAllocAsync(size, 0)

    def cuMemFree(self, pointer: int) -> tuple[int]:
        return self.cuMemFreeAsync(pointer, 0)

    def cuMemcpyHtoD(self, to: int, source: int, size: int) -> tuple[int]:
        ctypes.memmove(to, source, size)
        return (0,)

    cuMemcpyDtoH = cuMemcpyHtoD

    def cuCtxSynchronize(self) -> tuple[int]:
        return (0,)


@pytest.mark.parametrize("library", ["dlpack", "interface"])
@pytest.mark.parametrize("kind", memory.KINDS)
def test_arrays_of_no_library(kind: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies on a fake device: values, strides and the bytes between are the host's, and are read back."""
    pytest.importorskip("torch")
    from tests.fuzz.gpu import Gpu

    there = Gpu("cpu")
    there.where = "cuda"
    with fake_cuda.installed(monkeypatch) as driver:
        monkeypatch.setattr("fastattn.arrays.streams.driver", lambda: _Driver())
        for dtype in ("float32", "bfloat16"):
            spec = Spec(dtype=dtype, library=library, memory=kind)
            x = memory.laid(np.random.default_rng(1), np.arange(24).reshape(2, 3, 4).astype(NUMPY[dtype]), kind)
            array = there._copy(spec, x)
            assert there.get(array).tobytes() == x.tobytes()
            found = getattr(array, "bare", array)
            assert found.strides == x.strides
            for index in ((..., slice(1, 3)), (slice(None), slice(2, 3)), (slice(1, 1),)):
                np.testing.assert_array_equal(there.get(array[index]), x[index])
            place = there.place(spec, (2, 3, 4), dtype, kind)
            assert np.isnan(there.get(place.array).astype(np.float32)).all() and place.untouched()
        for name in ("bool", "int32", "int64", "bfloat16"):
            empty = there._copy(Spec(library=library), np.empty((2, 0, 3), NUMPY.get(name, name)))
            assert there.get(empty).shape == (2, 0, 3)
        assert driver is not None


# ---------------------------------------------------------------- the fuzzer itself
def test_a_spec_determines_its_arguments() -> None:
    for index in range(50):
        spec = draw(1, index)
        assert draw(1, index) == spec
        assert Spec.of(spec.json()) == spec
        assert eval(str(spec)) == spec
        for x, y in zip(vars(make(spec)).values(), vars(make(spec)).values(), strict=True):
            assert not isinstance(x, np.ndarray) or x.tobytes() == y.tobytes()


@pytest.mark.parametrize("kind", memory.KINDS)
def test_strange_memory(kind: str) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        np.testing.assert_array_equal(memory.laid(random, x, kind), x)
        same = np.broadcast_to(x[:, :1], x.shape)
        np.testing.assert_array_equal(memory.laid(random, same, kind, (1,)), same)
        whole, view = memory.place(random, x.shape, x.dtype, kind)
        assert np.isnan(view).all()
        view[...] = x
        assert memory.untouched(whole, view)
        np.testing.assert_array_equal(view, x)
        if kind in ("gaps", "strange") and whole.size > view.nbytes:
            view.view(np.uint32)[...] = 0
            whole[np.flatnonzero(whole == memory.POISON)[0]] = 0
            assert not memory.untouched(whole, view)


def test_formula_by_hand() -> None:
    """Two keys with weights 1/4 and 3/4; a tie of huge exact scores has one
    right answer, a near tie of inexact ones has not."""
    x = make(Spec(seqlen_k=2, head_dim=1, head_dim_v=1, softmax_scale=1.0))
    x.q[...], x.k[...], x.v[...] = 1, np.log([1.0, 3.0]).reshape(1, 2, 1, 1), np.array([0.0, 4.0]).reshape(1, 2, 1, 1)
    right = formula.forward(x)
    np.testing.assert_allclose([right["out"].exact.item(), right["lse"].exact.item()], [3.0, np.log(4)], rtol=1e-6)
    x.k[...] = 2.0**60
    right = formula.forward(x)
    assert right["out"].exact.item() == 2 and right["out"].allowed.item() < 1e-5
    x.q[...], x.k[...] = 1.1, np.array([1e9, 1.0000001e9]).reshape(1, 2, 1, 1)
    assert formula.forward(x)["out"].allowed.item() > 1


class Faulty:
    """An engine with a fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(self, problem: Any, operands: Any, out: Any, lse: Any, stream: Any) -> None:
        fastattn.reference.forward(problem, operands, out, lse)
        y = out.numpy()
        if self.fault == "leaves out a row":
            y.reshape(-1)[-1:].view(np.uint32)[...] = 2**32 - 1
        elif self.fault == "half a percent":
            y[..., -1] *= 1.005
        elif self.fault == "writes to q":
            operands.q.numpy()[...] = 0
        elif self.fault == "raises":
            raise ZeroDivisionError
        elif self.fault == "lse":
            lse.numpy()[...] += 1e-4


@pytest.mark.parametrize("fault", ["none", "leaves out a row", "half a percent", "writes to q", "raises", "lse"])
def test_faults_are_found(fault: str) -> None:
    from fastattn import reference  # noqa: F401  (an attribute of the package then)

    spec = Spec(batch=2, num_heads=2, num_heads_k=2, seqlen_q=5, seqlen_k=7, engine="faulty")
    with fastattn.register_engine("faulty", Faulty(fault).forward, None, lambda problem: None, device="cpu"):
        assert bool(complaints(spec)) == (fault != "none")


FUNCTION = Spec(batch=2, num_heads=4, num_heads_k=2, seqlen_q=13, seqlen_k=45, hidden="nan", backward=True)


@pytest.mark.parametrize("name", functions.SCORES)
def test_another_score_mod_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores without the function are wrong, and gradients of its arrays that are off by a percent."""
    spec, right = replace(FUNCTION, score_mod=name, need_dcaptured=functions.has_arrays(name)), functions.SCORES[name]
    assert complaints(spec) == []

    def off(*given: Any) -> functions.Changed:
        found = right.formula(*given)
        return found._replace(parts=tuple((index, slope * 1.01, error) for index, slope, error in found.parts))
    if functions.has_arrays(name):
        monkeypatch.setitem(functions.SCORES, name, right._replace(formula=off))
        assert any(line.startswith("dcaptured") for line in complaints(spec))
    monkeypatch.setitem(functions.SCORES, name, right._replace(make=lambda spec, held: lambda score, *places: score))
    assert any(line.startswith("out") for line in complaints(replace(spec, need_dcaptured=False)))


@pytest.mark.parametrize("name", functions.MASKS)
def test_another_mask_mod_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key more or less: masks that let that key through are told from those that do not."""
    spec, right = replace(FUNCTION, mask_mod=name), functions.MASKS[name]
    for block_mask in (None, "function", "blocks"):
        assert complaints(replace(spec, block_mask=block_mask)) == []

    def make(spec: Spec, held: Any) -> Any:
        mask = right.make(spec, held)
        return lambda b, h, q, k: mask(b, h, q, k) ^ (k == 20)
    monkeypatch.setitem(functions.MASKS, name, right._replace(make=make))
    assert any(line.startswith("out") for line in complaints(spec))


def test_shrinking() -> None:
    """The smallest problem keeps what causes the complaint and nothing else."""
    spec = Spec(seed=5, batch=2, num_heads=6, num_heads_k=3, seqlen_q=50, seqlen_k=40, head_dim=64, head_dim_v=64, causal=True,
                softcap=3.0, bias=(2, 6, 50, 40), mask=(50, 40), sinks="normal", memory="strange", repeats=("k3",), backward=True)

    def wrong(spec: Spec) -> list[str]:
        make(spec)
        return ["wrong"] if spec.softcap and spec.bias and spec.seqlen_k >= 7 else []
    smallest, found = shrink.shrink(spec, wrong, 20)
    assert found == ["wrong"]
    assert smallest == Spec(seed=5, seqlen_q=1, seqlen_k=7, head_dim=1, head_dim_v=1, softcap=3.0, bias=(1, 1, 1, 7))
    spec = replace(spec, score_mod="relative", mask_mod="document", block_mask="function", need_dcaptured=True)
    smallest, found = shrink.shrink(spec, lambda spec: [*wrong(spec), *["too"] * (spec.mask_mod == "document")], 20)
    assert smallest == Spec(seed=5, seqlen_q=1, seqlen_k=1, head_dim=1, head_dim_v=1, mask_mod="document") and found == ["too"]


WORKER = """
import os, sys, time, json, faulthandler, signal
def waits_for_ever():
    time.sleep(60)
faulthandler.register(signal.SIGUSR1, sys.stdout)
for line in sys.stdin:
    first, last = map(int, line.split())
    for index in range(first, last):
        print(json.dumps({"at": index}), flush=True)
        if index == 3: os.abort()
        if index == 5: waits_for_ever()
        if index == 7: print(json.dumps({"wrong": 7, "spec": "Spec()", "complaints": ["bad"]}), flush=True)
    print(json.dumps({"done": last}), flush=True)
"""


def test_crashes_and_hangs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COMMAND", [sys.executable, "-c", WORKER])
    monkeypatch.setattr(run, "TIMEOUT", {"cpu": 2.0})
    monkeypatch.setattr(run, "shrink", lambda spec, wrong, seconds: (spec, ["smaller"]))
    report = run.run(1, "cpu", ["baseline"], problems=10, processes=1)
    found = [(finding.index, finding.complaints[0].split(",")[0]) for finding in report.findings]
    assert found == [(3, "ended its process"), (5, "hangs for 2 s"), (7, "bad")]
    hung = report.findings[1].complaints
    assert hung[1:] == ["in waits_for_ever (<string>:4) < <module> (<string>:11)"]
    assert hung[1] in run.show(report.findings[1], 1, "cpu")
    assert report.count == 10


def test_a_worker_tells_where_it_is() -> None:
    worker = run.Worker(1, "cpu", "")
    try:
        assert "ready" in (worker.lines.get(timeout=60) or "")
        [here] = [line for line in worker.where() if " work (run.py:" in line]
        assert here.startswith("in ") and " < main (__main__.py:" in here
    finally:
        worker.stop()


def test_drawn_values_are_in_range() -> None:
    """Scores and their sums of products are finite in float32; a bias is finite or -inf."""
    for seed in range(200):
        random = np.random.default_rng(seed)
        for dtype in values.LARGEST:
            for kind in values.SCORES:
                scale = 2.0 ** random.integers(-10, 3)
                q, k = values.query_and_key(random, kind, dtype, (1, 3, 1, 64), (1, 4, 1, 64), scale)
                size = np.abs(q[0, :, 0].astype(np.float64)) @ np.abs(k[0, :, 0].astype(np.float64)).T
                assert (size * max(scale, 1) < (1e38 if dtype != "float64" else 1e307)).all(), (kind, dtype)
            for kind in values.BIAS:
                bias = values.bias_of(random, kind, (3, 4), dtype).astype(np.float64)
                assert (np.isfinite(bias) | (bias == -np.inf)).all(), (kind, dtype)
