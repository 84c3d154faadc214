"""transform_bias_rescale_qkv and multi_head_attention with their backwards.

Against ATen's own on the CPU where torch is installed, and against float64 formulas and finite differences everywhere.
"""
from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat.multi_head import (
    MultiHeadGrads,
    multi_head_attention,
    multi_head_attention_backward,
    transform_bias_rescale_qkv,
    transform_bias_rescale_qkv_backward,
)
from fastattn.cpu import levels
from fastattn.cpu import transform as cpu_transform
from tests.tools.compare import EPS
from tests.tools.formulas import Array, check_gradients, normal
from tests.tools.multi_head import CU, LENGTHS, MASKS, Drawn, drawn, factors, formula, hidden_of, split, wide
from tests.tools.problems import NUMPY

# ---------------------------------------------------------------- transform_bias_rescale_qkv: the formula, and rounding once


def holds(got: Any, exact: Array, terms: Array, dtype: str) -> None:
    """Each element differs from the exact one by at most half a unit of its dtype plus two units of the arithmetic on
    the terms of its sum."""
    compute = EPS["float64" if dtype == "float64" else "float32"]
    got = np.asarray(got)
    assert got.dtype == NUMPY[dtype] and got.shape == exact.shape
    tiny = 2.0**-24 if dtype == "float16" else 0.0
    np.testing.assert_array_less(abs(wide(got) - exact), EPS[dtype] / 2 * abs(exact) * 1.001 + 2 * compute * terms + tiny + 1e-300)


def padded_rows(qkv: Array, cu: Array, T: int) -> tuple[Array, Array]:
    """Packed rows -> (sequences, T, 3 * D) with NaN where there is no row, and which rows there are."""
    rows = np.full((len(cu) - 1, T, qkv.shape[-1]), np.nan)
    for b, (start, end) in enumerate(itertools.pairwise(cu)):
        rows[b, :end - start] = wide(qkv[start:end])
    return rows, ~np.isnan(rows[..., :1])


def check_transform(qkv: Array, bias: Array, num_heads: int, cu: Array | None = None, **options: Any) -> tuple[Any, Any, Any]:
    got = transform_bias_rescale_qkv(qkv, bias, num_heads, **({} if cu is None else {"cu_seqlens": cu}), **options)
    rows, there = (wide(qkv), np.ones(1, bool)) if cu is None else padded_rows(qkv, cu, got[0].shape[2])
    head_dim = qkv.shape[-1] // 3 // num_heads
    exact = split(np.where(there, rows + wide(bias), 0.0), num_heads) * factors(head_dim)
    terms = split(np.where(there, abs(rows) + abs(wide(bias)), 0.0), num_heads) * factors(head_dim)
    for x, e, t in zip(got, exact, terms, strict=True):
        holds(x, e, t, qkv.dtype.name)
    return got


SHAPES = [(2, 5, 3, 8), (1, 33, 2, 64), (3, 17, 1, 7), (2, 1, 4, 1), (0, 5, 2, 4), (2, 0, 2, 4), (2, 40, 3, 24), (1, 16, 2, 600)]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("stream", [False, True], ids=["through", "past the caches"])
def test_transform(dtype: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream:
        monkeypatch.setattr(cpu_transform, "STREAM_BYTES", 0)
    for B, T, heads, dim in SHAPES:
        qkv, bias = drawn(dtype, (B, T, 3 * heads * dim), (3 * heads * dim,))
        check_transform(qkv, bias, heads)
        strange = np.asfortranarray(qkv), np.repeat(bias, 2)[::2]
        check_transform(*strange, heads)
        check_transform(qkv[::-1, ::-1], bias, heads)


@pytest.mark.parametrize("dtype", NUMPY)
def test_transform_of_ragged_rows_pads_with_zeros_to_a_multiple_of_8(dtype: str) -> None:
    qkv, bias = drawn(dtype, (30, 3 * 2 * 12), (3 * 2 * 12,))
    qkv[28:] = np.nan                                       # of no sequence
    bias[0] = np.inf                                        # times nothing is nothing in the padding
    q, k, v = transform_bias_rescale_qkv(qkv, bias, 2, cu_seqlens=CU)
    assert q.shape == k.shape == v.shape == (5, 2, 24, 12)
    assert (wide(q)[1] == 0).all() and (wide(q)[3, :, 1:] == 0).all() and np.isinf(wide(q)[0, 0, :3, 0]).all()
    bias[0] = 1
    for cu in (CU, CU.astype(np.int64), CU.tolist()):
        check_transform(qkv, bias, 2, cu)
    assert transform_bias_rescale_qkv(qkv, bias, 2, cu_seqlens=CU, max_seqlen=25)[0].shape == (5, 2, 32, 12)
    check_transform(qkv, bias, 2, CU, max_seqlen=25)


def test_transform_is_the_same_on_every_level_and_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of roundings is fixed, except for fused sums of the bias's gradient."""
    before = fastattn.get_num_threads()
    monkeypatch.setattr(cpu_transform, "SERIAL_BYTES", 0)
    try:
        for dtype in NUMPY:
            qkv, bias = drawn(dtype, (3, 150, 3 * 2 * 20), (3 * 2 * 20,))
            fastattn.set_num_threads(1)
            heads = check_transform(qkv, bias, 2)
            grads = transform_bias_rescale_qkv_backward(*heads)
            for level in levels.available():
                try:
                    monkeypatch.setattr(cpu_transform, "_engine", importlib.import_module(f"fastattn.cpu.isa.{level}"))
                except ModuleNotFoundError:                 # FASTATTN_LEVELS
                    continue
                own = None
                for threads in (1, 2, 3):
                    fastattn.set_num_threads(threads)
                    for x, y in zip(heads, transform_bias_rescale_qkv(qkv, bias, 2), strict=True):
                        np.testing.assert_array_equal(x, y, err_msg=level)
                    again = transform_bias_rescale_qkv_backward(*heads)
                    np.testing.assert_array_equal(grads[0], again[0], err_msg=level)
                    np.testing.assert_allclose(wide(grads[1]), wide(again[1]), rtol=2 * EPS[dtype], atol=1e-5)
                    own = own or again
                    np.testing.assert_array_equal(own[1], again[1], err_msg=f"{level}: {threads} threads")
    finally:
        fastattn.set_num_threads(before)


@pytest.mark.parametrize("dtype", NUMPY)
def test_transform_backward(dtype: str) -> None:
    for B, T, heads, dim in (*SHAPES, (1, 70, 5, 48)):
        dq, dk, dv = drawn(dtype, *[(B, heads, T, dim)] * 3, seed=T)
        dk = np.ascontiguousarray(dk.swapaxes(1, 2)).swapaxes(1, 2)
        dv = np.asfortranarray(dv)
        dqkv, dbias = transform_bias_rescale_qkv_backward(dq, dk, dv)
        exact = np.stack([wide(x) for x in (dq, dk, dv)]) * factors(dim)
        exact = exact.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * heads * dim)
        holds(dqkv, exact, abs(exact), dtype)
        holds(dbias, exact.sum(axis=(0, 1)), 32 * abs(exact).sum(axis=(0, 1)), dtype)


def test_transform_backward_of_ragged_rows() -> None:
    dq, dk, dv = normal(*[(5, 2, 24, 6)] * 3)
    for b, n in enumerate(LENGTHS):
        for x in (dq, dk, dv):
            x[b, :, n:] = np.nan                            # gradients of padding count for nothing
    dqkv, dbias = transform_bias_rescale_qkv_backward(dq, dk, dv, cu_seqlens=CU, total=31)
    assert dqkv.shape == (31, 36) and (dqkv[28:] == 0).all()
    exact = (np.stack([dq, dk, dv]) * factors(6)).transpose(1, 3, 0, 2, 4).reshape(5, 24, 36)
    exact = np.concatenate([exact[b, :n] for b, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(dqkv[:28], exact, rtol=1e-15)
    np.testing.assert_allclose(dbias, exact.sum(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(transform_bias_rescale_qkv_backward(dq, dk, dv, cu_seqlens=CU)[0], dqkv[:28])


def test_transform_equals_torchs(torch: Any) -> None:
    """400 random calls on torch's tensors."""
    r = np.random.default_rng(0)
    for seed in range(400):
        dtype = str(r.choice(["float64", "float32", "float16", "bfloat16"]))
        B, T, heads, dim = (int(r.choice(x)) for x in ((1, 2, 3), (1, 2, 5, 16, 33), (1, 2, 3, 8), (1, 3, 8, 16, 32, 64, 65)))
        generator = torch.Generator().manual_seed(seed)
        kind = getattr(torch, dtype)
        qkv, bias = (torch.randn(shape, generator=generator).to(kind) for shape in ((B, T, 3 * heads * dim), (3 * heads * dim,)))
        got = transform_bias_rescale_qkv(qkv, bias, heads)
        exact = split((qkv.double() + bias.double()).numpy(), heads) * factors(dim)
        for x, y, e in zip(got, torch._transform_bias_rescale_qkv(qkv, bias, heads), exact, strict=True):
            assert isinstance(x, torch.Tensor) and x.dtype == kind and x.shape == y.shape and x.is_contiguous()
            ours, theirs = (float(np.linalg.norm(z.double().numpy() - e)) for z in (x, y))
            assert ours <= 1.01 * theirs + EPS["float64" if dtype == "float64" else "float32"] * float(np.linalg.norm(e)), (seed, dtype)


# ---------------------------------------------------------------- multi_head_attention


@pytest.mark.parametrize("same", [1, 2, 3])
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
def test_multi_head_and_its_gradients(kind: int | None, same: int) -> None:
    d = Drawn(1, 2, 6, 3, 5, same, kind)
    out, weights, saved = d.call(average_attn_weights=False, return_saved=True)
    exact, exact_weights = formula(*d.inputs, *d.weights, d.heads, hidden_of(d))
    np.testing.assert_allclose(out, exact, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(weights, exact_weights, rtol=1e-11, atol=1e-12)
    plain, mean = d.call()
    np.testing.assert_array_equal(plain, out)
    np.testing.assert_allclose(mean, exact_weights.mean(axis=1), rtol=1e-11, atol=1e-12)
    assert d.call(need_weights=False)[1] is None
    w = np.random.default_rng(2).standard_normal(out.shape)
    grads = multi_head_attention_backward(w, saved, *d.inputs, d.width, d.heads, d.weights[0], d.weights[2], d.mask, d.kind)
    inputs = [d.inputs[0], *d.inputs[1:3 if same == 1 else 2 if same == 2 else 1]]

    def loss(*arrays: Array) -> float:
        given, own = list(arrays[:len(inputs)]), arrays[len(inputs):]
        given += [given[-1]] * (3 - len(given))
        return float((w * formula(*given, *own, d.heads, hidden_of(d))[0]).sum())
    assert [x is None for x in grads[:3]] == [n >= len(inputs) for n in range(3)]
    check_gradients(loss, [*inputs, *d.weights], [x for x in grads if x is not None])


@pytest.mark.parametrize("dtype", NUMPY)
def test_multi_head_in_every_dtype(dtype: str) -> None:
    d = Drawn(3, 2, 40, 2, 32, 3, 1)
    out, weights, saved = d.call(lambda x: x.astype(NUMPY[dtype]), return_saved=True)
    low = Drawn(3, 2, 40, 2, 32, 3, 1)
    low.inputs = [wide(d.inputs[0].astype(NUMPY[dtype]))] * 3
    low.weights = [wide(x.astype(NUMPY[dtype])) for x in d.weights]
    exact, exact_weights = formula(*low.inputs, *low.weights, low.heads, hidden_of(low))
    for got, e in ((out, exact), (weights, exact_weights.mean(axis=1))):
        assert got.dtype == NUMPY[dtype] and got.shape == e.shape
        assert np.linalg.norm(wide(got) - e) <= 4 * EPS[dtype] * np.linalg.norm(e)
    x, (W, _, P, _) = d.inputs[0].astype(NUMPY[dtype]), [y.astype(NUMPY[dtype]) for y in d.weights]
    grads = multi_head_attention_backward(out, saved, x, x, x, d.width, d.heads, W, P, d.mask, d.kind)
    reference = multi_head_attention_backward(wide(out), low.call(return_saved=True)[2], *low.inputs, d.width, d.heads, low.weights[0],
                                              low.weights[2], d.mask, d.kind)
    for name, g, e in zip(MultiHeadGrads._fields, grads, reference, strict=True):
        if e is not None:
            assert g.dtype == NUMPY[dtype], name
            assert np.linalg.norm(wide(g) - e) <= 8 * EPS[dtype] * np.linalg.norm(e), name


def test_multi_head_equals_torchs(torch: Any) -> None:
    """200 random calls on torch's tensors: mask types, shared inputs, weights averaged or not."""
    r = np.random.default_rng(0)
    for seed in range(200):
        B, T, heads, dim = (int(r.choice(x)) for x in ((1, 2, 3), (1, 2, 5, 16, 33), (1, 2, 3), (1, 4, 8, 16, 33)))
        kind, same, dtype = r.choice([None, 0, 1, 2]), int(r.choice([1, 2, 3])), str(r.choice(["float64", "float32"]))
        need, average = bool(r.random() < 0.6), bool(r.random() < 0.5)
        d = Drawn(seed, B, T, heads, dim, same, kind)
        d.mask = None if d.mask is None else torch.from_numpy(d.mask)
        named = None if kind == 2 and r.random() < 0.5 else kind
        d.kind = named
        x, weights = d.arrays(lambda x, dtype=dtype: torch.from_numpy(x).to(getattr(torch, dtype)))
        arguments = (*x, d.width, heads, *weights, d.mask, need, average, named)
        got, expected = multi_head_attention(*arguments), torch._native_multi_head_attention(*arguments)
        tolerance = 1e-11 if dtype == "float64" else 2e-5
        for g, e in zip(got, expected, strict=True):
            assert (g is None) == (e is None), seed
            if e is not None:
                torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance, msg=lambda text, seed=seed: f"call {seed}: {text}")


def test_ragged_multi_head_is_each_sequence_by_itself() -> None:
    d, total = Drawn(4, 1, 30, 2, 6, 1, None), 28
    query, key, value = (x[0] for x in d.inputs)
    for kind in (None, 0, 1, 2):
        hidden = None if kind is None else np.random.default_rng(5).random(MASKS[kind](5, 2, 17)) < 0.3
        arguments = (query, key, value, d.width, d.heads)
        out, weights, saved = multi_head_attention(*arguments, *d.weights, hidden, True, False, kind, cu_seqlens=CU, return_saved=True)
        assert weights.shape == (5, 2, 24, 24)
        w = np.random.default_rng(6).standard_normal(out.shape)
        w[total:] = 0
        grads = multi_head_attention_backward(w, saved, *arguments, d.weights[0], d.weights[2], hidden, kind, cu_seqlens=CU)
        sums = [np.zeros_like(x) for x in d.weights]
        for b, n in enumerate(LENGTHS):
            rows = slice(CU[b], CU[b + 1])
            x = [y[None, rows] for y in (query, key, value)]
            here = None if hidden is None else hidden[None, None, :n, :n] if kind == 0 else \
                hidden[b:b + 1, :n] if kind == 1 else hidden[b:b + 1, :, :n, :n]
            own = kind if kind != 0 else 2
            alone = multi_head_attention(*x, *arguments[3:], *d.weights, here, True, False, own, return_saved=True)
            np.testing.assert_allclose(out[rows], alone[0][0], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(weights[b, :, :n, :n], alone[1][0], rtol=1e-12, atol=1e-13)
            assert (weights[b, :, n:] == 0).all() and (weights[b, :, :, n:] == 0).all()
            own_grads = multi_head_attention_backward(w[None, rows], alone[2], *x, *arguments[3:], d.weights[0], d.weights[2], here, own)
            for g, e in zip(grads[:3], own_grads[:3], strict=True):
                np.testing.assert_allclose(g[rows], e[0], rtol=1e-11, atol=1e-12)
            sums = [s + g for s, g in zip(sums, own_grads[3:], strict=True)]
        for g, e in zip(grads[3:], sums, strict=True):
            np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-11)
        np.testing.assert_array_equal(out[total:], np.broadcast_to(d.weights[3], (2, d.width)))
    mean = multi_head_attention(*arguments, *d.weights, cu_seqlens=CU, max_seqlen=20)[1]
    assert mean.shape == (5, 24, 24)


def test_a_fully_masked_query_has_weights_0() -> None:
    d = Drawn(7, 2, 5, 2, 4, 3, 1)
    assert d.mask is not None
    d.mask[1] = True
    out, weights, saved = d.call(return_saved=True)
    np.testing.assert_array_equal(weights[1], 0)
    np.testing.assert_array_equal(out[1], np.broadcast_to(d.weights[3], (5, 8)))
    grads = multi_head_attention_backward(np.ones_like(out), saved, *d.inputs, 8, 2, d.weights[0], d.weights[2], d.mask, 1)
    assert (grads.dquery[1] == 0).all() and all(np.isfinite(x).all() for x in grads if x is not None)


def test_projections_are_the_callers() -> None:
    d, shapes = Drawn(8, 2, 6, 2, 4, 3, None), []

    def matmul(a: Array, b: Array) -> Array:
        shapes.append((a.shape, b.shape))
        return a @ b
    np.testing.assert_array_equal(d.call(matmul=matmul, need_weights=False)[0], d.call()[0])
    assert shapes == [((12, 8), (8, 24)), ((12, 8), (8, 8))], "one product for q, k and v, one for out"


def test_empty() -> None:
    for B, T in ((0, 5), (3, 0)):
        d = Drawn(9, B, T, 2, 4, 3, None)
        out, weights, saved = d.call(return_saved=True)
        assert out.shape == (B, T, 8) and weights.shape == (B, T, T)
        grads = multi_head_attention_backward(out, saved, *d.inputs, 8, 2, d.weights[0], d.weights[2])
        assert grads.dquery.shape == out.shape and (grads.dqkv_weight == 0).all() and (grads.dqkv_bias == 0).all()


# ---------------------------------------------------------------- errors
def _bad() -> Iterator[tuple[str, Any, type, str]]:
    qkv, bias = normal((2, 5, 24), (24,))
    packed, d = qkv.reshape(10, 24), normal(*[(2, 2, 5, 4)] * 3)
    T, B = transform_bias_rescale_qkv, transform_bias_rescale_qkv_backward
    yield "rank", lambda: T(packed, bias, 2), ValueError, r"qkv has 2 axes.*cu_seqlens"
    yield "nothing", lambda: T(qkv[..., :0], bias[:0], 2), ValueError, "qkv's last axis is 0"
    yield "heads", lambda: T(qkv, bias, 3), ValueError, r"num_heads is 3; expected a divisor of D = 8"
    yield "no heads", lambda: T(qkv, bias, 0), ValueError, "num_heads is 0"
    yield "bias", lambda: T(qkv, bias[:-1], 2), ValueError, r"qkv_bias has shape \(23,\)"
    yield "dtype", lambda: T(qkv, bias.astype(np.float32), 2), TypeError, "qkv_bias has dtype float32"
    yield "integers", lambda: T(qkv.astype(np.int32), bias, 2), TypeError, "qkv has dtype int32"
    yield "no array", lambda: T([1.0], bias, 2), TypeError, "qkv is a list"
    yield "stream", lambda: T(qkv, bias, 2, stream=5), ValueError, "stream"
    yield "dense", lambda: T(qkv, bias, 2, max_seqlen=5), ValueError, "max_seqlen is 5.*dense"
    yield "lengths", lambda: T(packed, bias, 2, cu_seqlens=[0, 11]), ValueError, "cu_seqlens ends at 11"
    yield "order", lambda: T(packed, bias, 2, cu_seqlens=[0, 6, 4]), ValueError, "never decreasing"
    yield "longest", lambda: T(packed, bias, 2, cu_seqlens=[0, 6, 10], max_seqlen=5), ValueError, "max_seqlen is 5"
    yield "shapes", lambda: B(d[0], d[1][:1], d[2]), ValueError, r"dk has shape \(1, 2, 5, 4\)"
    yield "sequences", lambda: B(*d, cu_seqlens=[0, 3]), ValueError, "cu_seqlens describes 1 sequences"
    yield "total", lambda: B(*d, cu_seqlens=[0, 3, 5], total=4), ValueError, "cu_seqlens ends at 5"
    yield "total, dense", lambda: B(*d, total=4), ValueError, "total is 4"
    m = Drawn(0, 2, 5, 2, 4, 3, None)

    def change(mask: Any = None, kind: Any = None, **options: Any) -> Any:
        m.mask, m.kind = mask, kind
        return m.call(**options)
    yes = np.zeros((5, 5), bool)
    yield "mask type", lambda: change(yes), ValueError, r"mask has shape \(5, 5\).*mask_type says"
    yield "mask shape", lambda: change(yes, 1), ValueError, r"mask has shape \(5, 5\); expected \(B, T\) = \(2, 5\)"
    yield "mask type 3", lambda: change(yes, 3), ValueError, "mask_type is 3"
    yield "mask dtype", lambda: change(yes.astype(np.float64), 0), TypeError, "mask has dtype float64; expected bool"
    yield "no mask", lambda: change(None, 1), ValueError, "mask_type is 1"
    yield "max_seqlen", lambda: change(max_seqlen=5), ValueError, "max_seqlen is 5"
    x, w = m.inputs[0], m.weights

    def mha(*inputs: Any, D: int = 8, heads: int = 2, weights: Any = w, **options: Any) -> Any:
        return multi_head_attention(*inputs, D, heads, *weights, **options)
    yield "embed_dim", lambda: mha(x, x, x, D=9), ValueError, r"query has shape \(2, 5, 8\); expected embed_dim = 9"
    yield "num_head", lambda: mha(x, x, x, heads=3), ValueError, "num_head is 3"
    yield "key", lambda: mha(x, x[:1], x), ValueError, r"key has shape \(1, 5, 8\)"
    yield "weight", lambda: mha(x, x, x, weights=[w[0].T, *w[1:]]), ValueError, "qkv_weight has shape"
    yield "weight's dtype", lambda: mha(x, x, x, weights=[w[0].astype(np.float32), *w[1:]]), TypeError, "qkv_weight has dtype"
    yield "ragged rank", lambda: mha(x, x, x, cu_seqlens=[0, 5]), ValueError, r"query has shape.*\(total, D\)"
    yield "saved", lambda: multi_head_attention_backward(x, (x,), x, x, x, 8, 2, w[0], w[2]), TypeError, "saved is a tuple"


BAD = list(_bad())


@pytest.mark.parametrize("name", [name for name, *_ in BAD])
def test_errors(name: str) -> None:
    _, function, kind, text = next(bad for bad in BAD if bad[0] == name)
    with pytest.raises(kind, match=text) as caught:
        function()
    assert str(caught.value).startswith(("transform_bias_rescale_qkv", "multi_head_attention")), caught.value


def test_a_tensor_that_requires_grad_is_named(torch: Any) -> None:
    x, w, b = torch.randn(2, 5, 8, requires_grad=True), torch.randn(24, 8), torch.randn(24)
    with pytest.raises(TypeError, match=r"multi_head_attention\(\): query requires grad"):
        multi_head_attention(x, x, x, 8, 2, w, b, w[:8], b[:8])


def test_a_plain_array_is_told_what_is_missing() -> None:
    x = SimpleNamespace(shape=(2, 5, 8))
    with pytest.raises(TypeError, match="query is a SimpleNamespace, whose library has no array operations"):
        multi_head_attention(x, x, x, 8, 2, None, None, None, None)
