"""The kernels of transform_bias_rescale_qkv: compiled for every architecture and run in Python (tools/gpu/emulator.py).

With a GPU their results equal the CPU's bit for bit, and multi_head_attention runs on torch's tensors.
"""
from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu
from tests.tools.multi_head import CU, Drawn, drawn, factors, formula, hidden_of, split, wide
from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays import convert
from fastattn.compat.multi_head import (
    MultiHeadGrads,
    multi_head_attention,
    multi_head_attention_backward,
    transform_bias_rescale_qkv,
    transform_bias_rescale_qkv_backward,
)
from fastattn.cpu import transform as cpu_transform
from fastattn.gpu import transform
from fastattn.gpu.rows import launch as rows_launch
from fastattn.gpu.runtime import compile as compiler
from tests.tools.gpu.builds import build
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.gpu.emulator import Memory, emulated

Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------- without a GPU: machine code
COMPILED = [("bfloat16", True, False, "sm_90a"), ("bfloat16", True, True, "sm_90a"), ("float16", True, False, "sm_90a"),
            ("float32", True, False, "sm_90a"), ("float64", True, True, "sm_90a"), ("bfloat16", False, True, "sm_90a"),
            ("float64", False, False, "sm_90a"), ("bfloat16", True, False, "sm_80"), ("float32", False, True, "sm_80"),
            ("float16", True, True, "sm_89"), ("bfloat16", True, False, "sm_120")]


@pytest.mark.parametrize(("dtype", "whole", "packed", "arch"), COMPILED)
def test_compiled(dtype: str, whole: bool, packed: bool, arch: str) -> None:
    """No spill, no local memory, 16 bytes at a time where rows allow it, no float64 arithmetic but on float64."""
    for source in (rows_launch.transform_source(dtype, whole, packed), rows_launch.transform_backward_source(dtype, whole, packed)):
        _, report = build(source, arch)
        assert compiler.complaints(report) == [], source.key
        text = build(source, arch, "ptx")[0].decode()
        wide_loads, wide_stores = (len(re.findall(rf"{op}\.global\.v[24]\.[bf]\d+", text)) for op in ("ld", "st"))
        assert (wide_loads >= 4, wide_stores >= 4) == (whole, whole), source.key
        assert dtype == "float64" or ".f64" not in text, source.key


@pytest.mark.parametrize("dtype", NUMPY)
def test_the_sum_of_the_bias_is_compiled(dtype: str) -> None:
    assert compiler.complaints(compiler.build(rows_launch.sum_rows_source(dtype), "sm_90a")[1]) == []


# ---------------------------------------------------------------- without a GPU: the kernels in Python
@contextlib.contextmanager
def in_python(*arrays: Array) -> Any:
    memory = Memory()
    for x in arrays:
        memory.allow(convert.view(x, "test", "x"))
    with emulated(memory) as machine:
        yield machine


def aligned(shape: tuple[int, ...], dtype: Any, by: int = 0) -> Array:
    """An array of NaN at an address that is `by` bytes past a multiple of 16."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(size + 32, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16 + by
    return memory[start:start + size].view(dtype).reshape(shape)


def copy_of(x: Array, by: int = 0) -> Array:
    y = aligned(x.shape, x.dtype, by)
    y[...] = x
    return y


def views(*arrays: Array) -> list[Any]:
    return [convert.view(x, "test", "x") for x in arrays]


EMULATED = {        # (dtype, heads, head_dim, bytes off a multiple of 16, whether vectors are possible)
    "bfloat16": ("bfloat16", 2, 8, 0, True), "float16": ("float16", 1, 24, 0, True), "float32": ("float32", 3, 4, 0, True),
    "float64": ("float64", 1, 2, 0, True), "misaligned": ("bfloat16", 1, 8, 2, False), "head_dim 3": ("float32", 2, 3, 0, False),
}


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_in_python(name: str, packed: bool) -> None:
    dtype, heads, dim, by, vectors = EMULATED[name]
    D, T = heads * dim, 24 if packed else 7
    qkv, bias = (copy_of(x, by) for x in drawn(dtype, (31, 3 * D) if packed else (5, T, 3 * D), (3 * D,)))
    cu = CU.astype(np.int64) if name == "bfloat16" else CU
    lengths = cu if packed else None
    real = [transform_bias_rescale_qkv(qkv, bias, heads, cu_seqlens=lengths),
            transform_bias_rescale_qkv_backward(*drawn(dtype, *[(5, heads, T, dim)] * 3), cu_seqlens=lengths, total=31 if packed else None)]
    heads_ = [aligned((5, heads, T, dim), NUMPY[dtype]) for _ in range(3)]
    grads = [copy_of(x, by) for x in drawn(dtype, *[(5, heads, T, dim)] * 3)]
    grads[1] = copy_of(grads[1].swapaxes(1, 2), by).swapaxes(1, 2)
    if packed:
        for b, n in enumerate(np.diff(cu)):
            for x in grads:
                x[b, :, n:] = np.nan
        qkv[28:] = np.nan
    dqkv, dbias = aligned(qkv.shape, NUMPY[dtype]), aligned((3 * D,), NUMPY[dtype])
    scale = dim**-0.5
    with in_python(qkv, bias, cu, *heads_, *grads, dqkv, dbias) as machine:
        length_view = views(cu)[0] if packed else None
        rows_launch.transform(*views(qkv, bias), length_view, *views(*heads_), scale, machine.launcher(), 0)
        rows_launch.transform_backward(*views(*grads), length_view, *views(dqkv, dbias), scale, machine.launcher(), 0)
    assert [key.split()[0] for key in machine.launched] == ["transform", "transform_backward", "sum_rows"]
    assert all(("whole" in key) == vectors for key in machine.launched[:2]), machine.launched
    for got, expected in zip((*heads_, dqkv, dbias), (*real[0], *real[1]), strict=True):
        eps = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(wide(got), wide(expected), rtol=eps, atol=eps)


def test_many_rows_in_python() -> None:
    """Several blocks of rows and of columns, whose sums are added."""
    heads, dim, T = 3, 16, 90
    qkv, bias = (copy_of(x) for x in drawn("float32", (2, T, 3 * heads * dim), (3 * heads * dim,)))
    out = [aligned((2, heads, T, dim), np.float32) for _ in range(3)]
    dqkv, dbias = aligned(qkv.shape, np.float32), aligned(bias.shape, np.float32)
    with in_python(qkv, bias, *out, dqkv, dbias) as machine:
        rows_launch.transform(*views(qkv, bias), None, *views(*out), 0.25, machine.launcher(), 0)
        rows_launch.transform_backward(*views(*out), None, *views(dqkv, dbias), 0.25, machine.launcher(), 0)
    exact = split(wide(qkv) + wide(bias), heads) * factors(dim)
    for x, e in zip(out, exact, strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-6, atol=1e-6)
    back = (exact * factors(dim)).transpose(1, 3, 0, 2, 4).reshape(qkv.shape)
    np.testing.assert_allclose(dqkv, back, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dbias, back.sum(axis=(0, 1)), rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- on a GPU
gpu = pytest.mark.gpu
SHAPES = [(2, 300, 4, 64), (3, 17, 1, 7), (1, 1, 3, 128), (2, 5, 2, 1), (5, 33, 2, 20), (0, 4, 2, 8), (2, 0, 2, 8), (1000, 1, 4, 32)]


@gpu
@requires_gpu
@pytest.mark.parametrize("dtype", NUMPY)
def test_equals_the_cpu(dtype: str) -> None:
    for B, T, heads, dim in SHAPES:
        qkv, bias = drawn(dtype, (B, T, 3 * heads * dim), (3 * heads * dim,))
        for x in (qkv, np.ascontiguousarray(qkv.swapaxes(0, 1)).swapaxes(0, 1), qkv[..., ::-1], qkv[:, ::-1]):
            got = transform_bias_rescale_qkv(on_device(x), on_device(bias), heads)
            expected = transform_bias_rescale_qkv(x, bias, heads)
            for g, e in zip(got, expected, strict=True):
                np.testing.assert_array_equal(to_host(g), e)
        for grads in (expected, [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in expected]):
            first, again = (transform_bias_rescale_qkv_backward(*(on_device(x) for x in grads)) for _ in range(2))
            dqkv, dbias = transform_bias_rescale_qkv_backward(*grads)
            np.testing.assert_array_equal(to_host(first[0]), dqkv)
            np.testing.assert_array_equal(to_host(first[1]), to_host(again[1]))
            np.testing.assert_allclose(wide(to_host(first[1])), wide(dbias), rtol=2e-2 if dtype == "bfloat16" else 2e-3, atol=1e-4)


@gpu
@requires_gpu
@pytest.mark.parametrize("dtype", NUMPY)
def test_ragged_equals_the_cpu(dtype: str) -> None:
    for heads, dim in ((2, 64), (3, 5)):
        qkv, bias = drawn(dtype, (31, 3 * heads * dim), (3 * heads * dim,))
        for cu in (CU, CU.astype(np.int64)):
            on = on_device(cu)
            got = transform_bias_rescale_qkv(on_device(qkv), on_device(bias), heads, cu_seqlens=on, max_seqlen=17)
            expected = transform_bias_rescale_qkv(qkv, bias, heads, cu_seqlens=cu)
            for g, e in zip(got, expected, strict=True):
                np.testing.assert_array_equal(to_host(g), e)
            back = transform_bias_rescale_qkv_backward(*(on_device(x) for x in expected), cu_seqlens=on, total=31)
            dqkv, dbias = transform_bias_rescale_qkv_backward(*expected, cu_seqlens=cu, total=31)
            np.testing.assert_array_equal(to_host(back[0]), dqkv)
            np.testing.assert_allclose(wide(to_host(back[1])), wide(dbias), rtol=2e-2 if dtype == "bfloat16" else 2e-3, atol=1e-4)


@gpu
@requires_gpu
def test_lengths_on_the_device_need_their_maximum() -> None:
    qkv, bias = (on_device(x) for x in drawn("float32", (31, 24), (24,)))
    with pytest.raises(ValueError, match=r"transform_bias_rescale_qkv\(\): max_seqlen is None"):
        transform_bias_rescale_qkv(qkv, bias, 1, cu_seqlens=on_device(CU))
    with pytest.raises(ValueError, match="cu_seqlens is on device"):
        transform_bias_rescale_qkv(np.zeros((31, 24), np.float32), np.zeros(24, np.float32), 1, cu_seqlens=on_device(CU), max_seqlen=17)


@gpu
@requires_gpu
def test_offsets_are_64_bit() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs torch and 16 GB")
    qkv = torch.zeros(2, 50_000, 3 * 8192, dtype=torch.bfloat16, device="cuda")      # 2.5e9 elements
    qkv[-1, -1] = 3
    q, k, v = transform_bias_rescale_qkv(qkv, torch.ones(3 * 8192, dtype=torch.bfloat16, device="cuda"), 64)
    assert float(v[-1, -1, -1, -1]) == 4 and float(v[-1, -1, -2, -1]) == 1
    assert float(q[-1, 0, -1, 0]) == float(torch.tensor(4 * 128**-0.5).bfloat16())
    del q, k, qkv
    dqkv, dbias = transform_bias_rescale_qkv_backward(v, v, v)
    assert float(dqkv[-1, -1, -1]) == 4 and float(dqkv[-1, -2, -1]) == 1 and float(dbias[-1]) == float(torch.tensor(100_003.0).bfloat16())


@gpu
@requires_gpu
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
def test_multi_head(kind: int | None) -> None:
    """Dense on torch's tensors, against the formula in float64; ragged against dense."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    d = Drawn(3, 2, 130, 4, 64, 3, kind)

    def convert(x: Array) -> Any:
        return torch.from_numpy(x).to("cuda", torch.bfloat16)
    inputs, weights = d.arrays(convert)
    mask = None if d.mask is None else torch.from_numpy(d.mask).cuda()
    out, mean, saved = multi_head_attention(*inputs, d.width, d.heads, *weights, mask, mask_type=kind, return_saved=True)
    grads = multi_head_attention_backward(out, saved, *inputs, d.width, d.heads, weights[0], weights[2], mask, kind)
    low = [x.double().cpu().numpy() for x in (*inputs, *weights)]
    exact, exact_weights = formula(*low, d.heads, hidden_of(d))
    ours = multi_head_attention(low[0], low[0], low[0], d.width, d.heads, *low[3:], d.mask, mask_type=kind, return_saved=True)
    expected = multi_head_attention_backward(out.double().cpu().numpy(), ours[2], low[0], low[0], low[0], d.width, d.heads, low[3],
                                             low[5], d.mask, kind)
    names = ("out", "weights", *MultiHeadGrads._fields)
    for name, g, e in zip(names, (out, mean, *grads), (exact, exact_weights.mean(axis=1), *expected), strict=True):
        if e is not None:
            assert g.dtype == torch.bfloat16 and g.is_cuda, name
            error = float(np.linalg.norm(g.double().cpu().numpy() - e))
            assert error <= 8 * 2.0**-8 * float(np.linalg.norm(e)), f"{name}: {error / float(np.linalg.norm(e)):.2e}"
    if kind is None:
        flat, cu = inputs[0].reshape(-1, d.width), torch.tensor([0, 130, 260], dtype=torch.int32, device="cuda")
        ragged, padded = multi_head_attention(flat, flat, flat, d.width, d.heads, *weights, cu_seqlens=cu, max_seqlen=130)
        torch.testing.assert_close(ragged.reshape(out.shape), out, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(padded[:, :130, :130], mean, rtol=2e-2, atol=1e-3)
        assert padded.shape == (2, 136, 136) and not padded[:, 130:].any()


def test_both_engines_have_the_same_functions() -> None:
    for name in ("forward", "backward"):
        mine, other = (getattr(module, name).__code__ for module in (transform, cpu_transform))
        assert mine.co_varnames[:mine.co_argcount] == (*other.co_varnames[:other.co_argcount], "stream")
