"""Wide float32 heads with few tiles of query rows: the keys are split among batch entries, or heads (sm90/launch_float.py)."""
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import attention, merge_states
from fastattn.arrays.view import View
from fastattn.gpu.sm90.launch_float import _axes, _entry, split_call, splits_of
from fastattn.gpu.spec import Call, make_spec
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import host_view


def call_of(batch: int, rows: int, keys: int, heads: int, dim: int, **options: Any) -> tuple[Call, list[Any]]:
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal((batch, n, heads, dim)).astype(np.float32) for n in (rows, keys, keys)]
    problem, o = make_problem("test", Operands(*map(host_view, arrays)), packed=False, **options)
    return Call(problem, o, host_view(arrays[0]), None), arrays


def array_of(x: View) -> Any:
    """The array at a view's address."""
    size = sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) // 4 + 1
    flat = np.frombuffer((ctypes.c_float * size).from_address(x.ptr), np.float32)
    return np.lib.stride_tricks.as_strided(flat, x.shape, x.strides)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1)])
def test_results_of_splits_are_merged(batch: int, heads: int) -> None:
    """Each split as the kernel would compute it, by the CPU engine."""
    call, arrays = call_of(batch, 5, 24, heads, 40)
    splits, p = 3, call.problem
    out, lse = np.zeros((splits * batch * heads * 5 * 40,), np.float32), np.zeros((splits * batch * heads * 5,), np.float32)
    split = split_call(call, splits, out.ctypes.data, lse.ctypes.data)
    assert split.problem.batch * split.problem.num_heads == splits * batch * heads and split.lse is not None
    one = attention(*(array_of(x) for x in (split.operands.q, split.operands.k, split.operands.v)), return_lse=True)
    array_of(split.out)[...], array_of(split.lse)[...] = one
    axis, lse_axis = _axes(p)
    parts = [_entry(split.out, axis, n) for n in range(splits)], [_entry(split.lse, lse_axis, n) for n in range(splits)]
    assert all(x.shape == call.out.shape for x in parts[0])
    merged, _ = merge_states([array_of(x) for x in parts[0]], [array_of(x) for x in parts[1]])
    np.testing.assert_allclose(merged, attention(*arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "options", "expected"), [
    ((1, 4096, 4096, 1, 512), {}, 2), ((1, 4096, 4097, 1, 512), {}, 1), ((1, 4096, 4096, 1, 512), {"causal": True}, 1),
    ((2, 64, 2048, 3, 512), {}, 1), ((3, 64, 1024, 1, 512), {}, 2), ((1, 16384, 16384, 1, 512), {}, 1)])
def test_how_many(shape: tuple[int, int, int, int, int], options: dict[str, Any], expected: int) -> None:
    """As many as keep all multiprocessors busy, of 512 keys at least, all alike; not of a masked call."""
    batch, rows, keys, heads, dim = shape
    row = 4 * heads * dim
    q, k = (View(0, (batch, n, heads, dim), (n * row, row, 4 * dim, 4), "float32", ("cpu", 0)) for n in (rows, keys))
    problem, o = make_problem("test", Operands(q, k, k), packed=False, **options)
    assert splits_of(problem, make_spec(problem, o, False), batch * heads * -(-rows // 64), 132) == expected
