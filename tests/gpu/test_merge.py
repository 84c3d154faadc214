"""merge_states on the GPU: its kernel is compiled for every architecture and run in Python (tools/gpu/emulator.py).

With a GPU it also merges torch's tensors.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu
from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn.arrays import convert
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.rows import launch as rows_launch
from fastattn.gpu.rows import merge_launch
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.gpu.emulator import Memory, emulated

Array = np.ndarray[Any, Any]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
EPS = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype: str, arch: str) -> None:
    _, report = compiler.build(rows_launch.merge_source(dtype), arch)
    assert compiler.complaints(report) == []


@pytest.mark.parametrize(("dtype", "target"), [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"),
                                               ("float64", "float64")])
def test_in_place(dtype: str, target: str) -> None:
    """Vectors and single numbers, transposed, with rows that are empty in one or in both."""
    for arch in ("sm_80", "sm_90a") if dtype == "float32" else ("sm_90a",):
        for whole in {False, dtype == target}:
            assert compiler.complaints(compiler.build(merge_launch.merge_into_source(dtype, target, whole), arch)[1]) == []
    for shape in ((2, 3, 2, 8), (3, 5, 4), (1, 9, 1, 132)):
        (running, _), lses = parts_of(target, shape, 2)
        (_, part), _ = parts_of(dtype, shape, 2)
        lses[1][lses[0] == -np.inf] = [-np.inf, np.inf][dtype == "float16"]
        out = np.ascontiguousarray(running.swapaxes(-2, -3)).swapaxes(-2, -3)
        lse, expected = lses[0].copy(), fastattn.merge_states([running, part], lses, layout="thd" if len(shape) == 3 else "bshd")
        memory = Memory()
        views = [convert.view(x, "test", "x") for x in (out, part, lse, lses[1])]
        for x in views:
            memory.allow(x)
        assert merge_launch.in_place([views[0], views[1]], [views[2], views[3]], views[0], views[2])
        with emulated(memory) as machine:
            merge_launch.merge_into(views[1], views[3], views[0], views[2], machine.launcher(), 0)
        assert machine.launched == [f"merge_into {dtype} {target}" + " whole" * (dtype == target and shape[-1] * out.itemsize % 16 == 0)]
        np.testing.assert_allclose(out, expected[0], rtol=EPS[target], atol=EPS[target])
        np.testing.assert_allclose(lse, expected[1], rtol=1e-6)
    assert not merge_launch.in_place([views[0], views[1]], [views[2], views[3]], views[1], views[2])


def parts_of(dtype: str, shape: tuple[int, ...], count: int) -> tuple[list[Array], list[Array]]:
    """outs and lses with rows that are empty in one part, in all, and in all but
    one. Empty rows hold NaN in out; lses are far apart."""
    draw, compute = np.random.default_rng(count), np.float64 if dtype == "float64" else np.float32
    outs = [draw.standard_normal(shape).astype(np.float32).astype(NUMPY[dtype]) for _ in range(count)]
    lses = [(20 * draw.standard_normal((*shape[:-3], shape[-2], shape[-3]))).astype(compute) for _ in range(count)]
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        rows = lse.shape[-1]
        unseen = [np.s_[..., 0, 0]] + [np.s_[..., -1, 1 % rows]] * (n % 2) + [np.s_[..., 0, 2 % rows]] * (n > 0)
        for at in unseen:
            lse[at] = -np.inf
            out.swapaxes(-2, -3)[(*at, slice(None))] = np.nan
    return outs, lses


@pytest.mark.parametrize(("dtype", "count"), [("float16", 2), ("bfloat16", 3), ("float32", 1), ("float32", 3), ("float64", 2)])
def test_in_python(dtype: str, count: int) -> None:
    """Rows with gaps, transposed parts, with and without the batch, more columns than threads."""
    for shape in ((2, 3, 2, 5), (3, 2, 3), *([(1, 3, 1, 130)] if (dtype, count) == ("float32", 3) else ())):
        outs, lses = parts_of(dtype, shape, count)
        outs[-1] = np.ascontiguousarray(outs[-1].swapaxes(-2, -3)).swapaxes(-2, -3)
        wide = np.full((*shape[:-1], 2 * shape[-1]), np.nan, NUMPY[dtype])
        out, lse = wide[..., ::2], np.full_like(lses[0], np.nan)
        memory = Memory()
        views = [convert.view(x, "test", "x") for x in (*outs, *lses, out, lse)]
        for x in views:
            memory.allow(x)
        with emulated(memory) as machine:
            rows_launch.merge_states(views[:count], views[count:2 * count], views[-2], views[-1], machine.launcher(), 0)
        assert machine.launched == [f"merge {dtype}"] * count
        expected, expected_lse = fastattn.merge_states(outs, lses, layout="thd" if len(shape) == 3 else "bshd")
        np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), rtol=EPS[dtype], atol=EPS[dtype])
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
        assert np.isnan(wide[..., 1::2].astype(np.float64)).all()


def test_large_lse() -> None:
    """Equal and unequal lse that have no room for the log of a sum: three equal parts count a third each, in any order."""
    draw = np.random.default_rng(0)
    for size in (1e5, 1e9, 1e30, -1e30):
        outs = [draw.standard_normal((3, 2, 4)).astype(np.float32) for _ in range(3)]
        lses = [np.full((2, 3), size, np.float32) for _ in range(3)]
        lses[1][1] -= abs(size) / 1e5                # 1 at least
        out, lse, memory = np.full((3, 2, 4), np.nan, np.float32), np.full((2, 3), np.nan, np.float32), Memory()
        views = [convert.view(x, "test", "x") for x in (*outs, *lses, out, lse)]
        for x in views:
            memory.allow(x)
        with emulated(memory) as machine:
            rows_launch.merge_states(views[:3], views[3:6], views[6], views[7], machine.launcher(), 0)
        expected, expected_lse = fastattn.merge_states(outs, lses, layout="thd")
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_nothing_to_do() -> None:
    empty = convert.view(np.zeros((2, 0, 3, 4), np.float32), "test", "x")
    lse = convert.view(np.zeros((2, 3, 0), np.float32), "test", "x")
    launcher = Listing(absent_device("sm_90a"))
    rows_launch.merge_states([empty], [lse], empty, lse, launcher, 0)
    assert not launcher.sources


def check_on_device(outs: list[Array], lses: list[Array], dtype: str) -> None:
    """A merge on the GPU gives what one on the host gives."""
    out, lse = fastattn.merge_states([on_device(x) for x in outs], [on_device(x) for x in lses])
    expected, expected_lse = fastattn.merge_states(outs, lses)
    np.testing.assert_allclose(to_host(out).astype(np.float64), expected.astype(np.float64), rtol=EPS[dtype], atol=EPS[dtype])
    np.testing.assert_allclose(to_host(lse), expected_lse, rtol=1e-6)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: str) -> None:
    for shape, count in (((2, 130, 3, 64), 2), ((1, 5, 2, 7), 4), ((3, 1, 8, 512), 3)):
        outs, lses = parts_of(dtype, shape, count)
        check_on_device(outs, lses, dtype)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_lse_on_a_gpu(dtype: str) -> None:
    for size in (1.0, 1e5, 1e9, 1e30):
        outs, lses = parts_of(dtype, (2, 30, 3, 16), 4)
        lses = [np.where(np.isinf(x), x, x.dtype.type(size)) if n % 2 else x * x.dtype.type(size / 20) for n, x in enumerate(lses)]
        check_on_device(outs, lses, dtype)


@requires_gpu
@pytest.mark.gpu
def test_parts_of_attention_on_a_gpu() -> None:
    draw = np.random.default_rng(0)
    q, k, v = (on_device(draw.standard_normal(shape).astype(np.float16)) for shape in ((2, 64, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64)))
    whole, whole_lse = fastattn.attention(q, k, v, return_lse=True)
    parts = [fastattn.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 100), (100, 101), (101, 300))]
    out, lse = fastattn.merge_states([part[0] for part in parts], [part[1] for part in parts])
    np.testing.assert_allclose(to_host(out).astype(np.float32), to_host(whole).astype(np.float32), atol=2e-3)
    np.testing.assert_allclose(to_host(lse), to_host(whole_lse), rtol=1e-5)
