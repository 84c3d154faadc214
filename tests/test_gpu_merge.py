"""merge_states on the GPU: its kernel compiled for every architecture and run in Python (gpu_emulator.py); with a GPU, torch's tensors."""
from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from gpu import requires_gpu
from problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from gpu_cases import on_device, to_host
from gpu_emulator import Memory, emulated

import fastattn
from fastattn.arrays import convert
from fastattn.gpu.rows import merge
from fastattn.gpu.runtime import compile as compiler

Array = np.ndarray[Any, Any]
DTYPES = ["float16", "bfloat16", "float32", "float64"]
EPS = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype: str, arch: str) -> None:
    _, report = compiler.build(merge.source(dtype), arch)
    assert compiler.complaints(report) == []


def parts_of(dtype: str, shape: tuple[int, ...], count: int) -> tuple[list[Array], list[Array]]:
    """outs and lses with rows that saw nothing in one part, whose out is NaN, in all, and in all but one; lse far apart."""
    draw, compute = np.random.default_rng(count), np.float64 if dtype == "float64" else np.float32
    outs = [draw.standard_normal(shape).astype(np.float32).astype(NUMPY[dtype]) for _ in range(count)]
    lses = [(20 * draw.standard_normal((*shape[:-3], shape[-2], shape[-3]))).astype(compute) for _ in range(count)]
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        unseen = [np.s_[..., 0, 0]] + [np.s_[..., -1, 1]] * (n % 2) + [np.s_[..., 0, 2]] * (n > 0)
        for at in unseen:
            lse[at] = -np.inf
            out.swapaxes(-2, -3)[at] = np.nan
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
        with emulated(memory) as machine, mock.patch.object(merge, "device", lambda n: SimpleNamespace(ordinal=n)), \
                mock.patch.object(merge, "current", lambda d: contextlib.nullcontext()):
            merge.merge_states(views[:count], views[count:2 * count], views[-2], views[-1], 0)
        assert machine.launched == [f"merge {dtype}"] * count
        expected, expected_lse = fastattn.merge_states(outs, lses, layout="thd" if len(shape) == 3 else "bshd")
        np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), rtol=EPS[dtype], atol=EPS[dtype])
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
        assert np.isnan(wide[..., 1::2].astype(np.float64)).all()


def test_nothing_to_do() -> None:
    empty = convert.view(np.zeros((2, 0, 3, 4), np.float32), "test", "x")
    lse = convert.view(np.zeros((2, 3, 0), np.float32), "test", "x")
    merge.merge_states([empty], [lse], empty, lse, 0)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: str) -> None:
    for shape, count in (((2, 130, 3, 64), 2), ((1, 5, 2, 7), 4), ((3, 1, 8, 512), 3)):
        outs, lses = parts_of(dtype, shape, count)
        out, lse = fastattn.merge_states([on_device(x) for x in outs], [on_device(x) for x in lses])
        expected, expected_lse = fastattn.merge_states(outs, lses)
        np.testing.assert_allclose(to_host(out).astype(np.float64), expected.astype(np.float64), rtol=EPS[dtype], atol=EPS[dtype])
        np.testing.assert_allclose(to_host(lse), expected_lse, rtol=1e-6)


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
