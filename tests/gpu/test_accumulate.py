"""Copies, rounding and sums of strided arrays: compiled for every architecture, and run in Python (tools/gpu/emulator.py)."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays import convert
from fastattn.gpu.rows import accumulate_launch as launches
from fastattn.gpu.runtime import compile as compiler
from tests.tools.gpu.emulator import Memory, emulated

PAIRS = [("float32", "float32", True), ("float32", "float32", False), ("bfloat16", "float32", True), ("float16", "float32", True),
         ("float32", "bfloat16", False), ("float32", "float16", False), ("bfloat16", "bfloat16", False), ("float64", "float64", True)]


VECTORS = [pair for pair in PAIRS if pair[0] == pair[1] or pair[:2] in (("float32", "bfloat16"), ("float32", "float16"))]
KINDS = [launches.Kind(*pair, whole) for pair in PAIRS for whole in (False, True) if not whole or pair in VECTORS]


@pytest.mark.parametrize(("arch", "kinds"), [("sm_80", KINDS[:2]), ("sm_90a", KINDS), ("sm_120", KINDS[-2:])])
def test_compiled(arch: str, kinds: list[launches.Kind]) -> None:
    for n, kind in enumerate(kinds):
        source = launches.accumulate_source(kind._replace(gather=n % 2 == 1, scatter=n % 3 == 1))
        assert compiler.complaints(compiler.build(source, arch)[1]) == [], source.key


def arrays(kind: str, dtype: str, target: str, rng: Any) -> tuple[Any, Any]:
    """(out, x) of one shape, with the strides of a way in which they occur."""
    def draw(*shape: int, of: str = dtype) -> Any:
        return rng.standard_normal(shape).astype(NUMPY[of])
    if kind == "contiguous":
        return draw(2, 5, 3, 8, of=target), draw(2, 5, 3, 8)
    if kind == "rows first":
        return draw(5, 2, 3, 8, of=target), draw(2, 5, 3, 8).transpose(1, 0, 2, 3)
    if kind == "heads of rows":
        return draw(5, 2, 6, 8, of=target)[1:4, :, 2:4], draw(2, 6, 4, 8)[:, 4:, 1:].transpose(2, 0, 1, 3)
    if kind == "odd":
        return draw(3, 7, of=target)[:, 1:6], draw(5, 3).T
    if kind == "two chunks":                # of heads of rows, in the other order
        return draw(8, 2, 3, 8, of=target).reshape(2, 4, 2, 3, 8)[:, :3, :, :2], draw(9, 2, 3, 8).reshape(3, 3, 2, 3, 8)[::-2, :, :, 1:]
    if kind == "broadcast":
        return draw(2, 3, 8, of=target), np.broadcast_to(draw(3, 1), (2, 3, 8))
    return draw(2, 3, 2, 3, 2, of=target)[..., ::-1], draw(2, 3, 4, 3, 2)[:, :, ::2]


@pytest.mark.parametrize("kind", ["contiguous", "rows first", "heads of rows", "odd", "two chunks", "broadcast", "five axes"])
@pytest.mark.parametrize(("dtype", "target", "add"), PAIRS)
def test_in_python(dtype: str, target: str, add: bool, kind: str) -> None:
    out, x = arrays(kind, dtype, target, np.random.default_rng(0))
    before = out.astype(np.float64)
    expected = (before + x.astype(np.float64)).astype(np.float32) if add else x
    memory, views = Memory(), [convert.view(out, "test", "out"), convert.view(x, "test", "x")]
    for view in views:
        memory.allow(view)
    with emulated(memory) as machine:
        launches.accumulate(*views, add, machine.launcher(), 0)
    tolerance = 2e-2 if target == "bfloat16" or (dtype == "bfloat16" and add) else 2e-3 if "float16" in (dtype, target) else 1e-6
    np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=1e-6)
    if kind in ("contiguous", "rows first", "heads of rows") and (dtype, target, add) in VECTORS and "64" not in dtype:
        assert machine.launched == [f"accumulate {dtype} {target}" + " add" * add + " whole"]


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64"])
def test_other_dtypes_are_copied(dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
    out = np.zeros((5, 3), dtype)
    memory, views = Memory(), [convert.view(out, "test", "out"), convert.view(x.T, "test", "x")]
    for view in views:
        memory.allow(view)
    with emulated(memory) as machine:
        launches.accumulate(*views, False, machine.launcher(), 0)
    np.testing.assert_array_equal(out, x.T)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("gather", "scatter"), [(True, False), (False, True), (True, True)])
def test_rows_by_number(gather: bool, scatter: bool, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((9, 3, 8)).astype(np.float32)[:, :2], rng.standard_normal((7, 2, 8)).astype(np.float32)
    count = 5
    x_rows, out_rows = [rng.permutation(n)[:count].astype(np.int32) for n in (9, 7)]
    x, out = x if gather else x[:count], out if scatter else out[:count]
    expected = out.copy()
    to = out_rows if scatter else np.arange(count)
    expected[to] = x[x_rows if gather else np.arange(count)] + (expected[to] if add else 0)
    for most in (1 << 30, 32):
        monkeypatch.setattr(launches, "MOST", most)
        memory, mine = Memory(), out.copy()
        views = [convert.view(array, "test", "x") for array in (mine, x, x_rows, out_rows)]
        for view in views:
            memory.allow(view)
        rows = launches.Rows(views[2].ptr if gather else 0, views[3].ptr if scatter else 0)
        with emulated(memory) as machine:
            launches.accumulate_rows(*views[:2], count, rows, add, machine.launcher(), 0)
        np.testing.assert_allclose(mine, expected, rtol=1e-6)
        assert (len(machine.launched) > 1) == (most == 32)


def test_many_elements_are_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MOST", 64)
    rng = np.random.default_rng(0)
    for shape in ((300,), (7, 40), (9, 2, 3, 5)):
        x = rng.standard_normal(tuple(2 * n for n in shape)).astype(np.float32)[tuple(slice(0, None, 2) for _ in shape)]
        out = np.zeros(shape, np.float32)
        memory, views = Memory(), [convert.view(out, "test", "out"), convert.view(x, "test", "x")]
        for view in views:
            memory.allow(view)
        with emulated(memory) as machine:
            launches.accumulate(*views, False, machine.launcher(), 0)
        np.testing.assert_array_equal(out, x)
        assert len(machine.launched) > 1
