"""Scores of any finite size, forward and backward; memory that no row attends to;
a saturated softcap. Run on every instruction set."""
from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn.masks import row_bounds
from tests.tools.compare import EPS, Judge
from tests.tools.problems import NUMPY, Case, Inputs

Array = np.ndarray[Any, Any]
SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"seqlen_q": 14, "seqlen_k": 600, "head_dim": 64},
    "dropout": {"seqlen_q": 20, "seqlen_k": 300, "head_dim": 32, "dropout_p": 0.2},
    "decode": {"seqlen_q": 1, "seqlen_k": 300, "head_dim": 64, "num_heads": 8, "num_heads_k": 1},
    "splits": {"batch": 1, "seqlen_q": 1, "seqlen_k": 5003, "head_dim": 64},
    "gqa_few": {"batch": 1, "seqlen_q": 5, "seqlen_k": 300, "head_dim": 64, "num_heads": 8, "num_heads_k": 2},
}


def largest(dtype: str) -> float:
    finfo: Any = ml_dtypes.finfo
    return float(finfo(NUMPY[dtype]).max)


def lse_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def softmax_of_bias(inputs: Inputs) -> tuple[Array, Array, Array]:
    """(P, lse - row_max, row_max) of a problem whose q is 0, from its bias alone, in float64: differences are exact."""
    assert not inputs.args[0].any()
    bias = inputs.kwargs["bias"].astype(np.float64)
    top = bias.max(axis=-1, keepdims=True)
    weights = np.exp(bias - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total, np.log(total)[..., 0], top[..., 0]


def with_bias(shape: str, dtype: str, bias_dtype: str | None = None) -> Inputs:
    """A problem whose scores are its bias: q is 0."""
    sizes = SHAPES[shape]
    case = Case(f"bias_{shape}", dtype, bias=(sizes["seqlen_q"], sizes["seqlen_k"]), bias_dtype=bias_dtype or lse_dtype(dtype), **sizes)
    inputs = case.make()
    inputs.args[0][...] = 0
    inputs.kwargs.pop("dropout_p", None)
    return inputs


def check_forward(inputs: Inputs, out: Any, lse: Any) -> None:
    P, log_sum, top = softmax_of_bias(inputs)
    v = inputs.args[2].astype(np.float64)
    expected = np.einsum("qk,bkhd->bqhd", P, np.repeat(v, inputs.args[0].shape[2] // v.shape[2], axis=2))
    unit = EPS[lse_dtype(inputs.dtype)]
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=2 * EPS[inputs.dtype] + 64 * unit)
    log_sum = np.broadcast_to(log_sum, lse.shape)
    np.testing.assert_allclose(lse.astype(np.float64) - top, log_sum, rtol=0, atol=unit * (np.abs(top).max() + 8))


# ---------------------------------------------------------------- forward
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [-1e5, -1e10, -1e12, -1.4e19, -1e30, -1e36, 1e10, 1e30])
def test_rows_of_one_huge_bias(value: float, shape: str, dtype: str) -> None:
    """Left padding with -1e10 and a causal mask with -1e10 give rows of equal
    scores: out is the mean of v, and lse is that bias."""
    inputs = with_bias(shape, dtype)
    inputs.kwargs["bias"][...] = value
    out, lse = inputs.forward("cpu")
    check_forward(inputs, out, lse)
    for x in inputs.backward(out, lse, "cpu"):
        assert x is None or np.isfinite(x.astype(np.float64)).all()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [4, 10, 14, 16, 17, 19, 21, 22, 23])
@pytest.mark.parametrize("sign", [-1, 1])
def test_differences_of_large_scores_are_exact(sign: int, exponent: int, shape: str, dtype: str) -> None:
    """Integers around 2^exponent are exact in float32, so the result is the softmax of their differences, below and
    above the size from which
    the maximum is subtracted first."""
    exponent += 29 * (dtype == "float64")
    inputs = with_bias(shape, dtype)
    bias = inputs.kwargs["bias"]
    bias[...] = sign * 0.75 * 2.0**exponent + np.random.default_rng(exponent).integers(-6, 7, bias.shape)
    check_forward(inputs, *inputs.forward("cpu"))


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", ["tiles", "splits"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_maxima_that_cross_the_threshold(sign: int, shape: str, dtype: str) -> None:
    """Maxima that rise past 2^16 bits from tile to tile: earlier sums are
    rescaled by the maximum that was subtracted from them."""
    inputs = with_bias(shape, dtype)
    bias = inputs.kwargs["bias"]
    rise = np.floor(np.linspace(-4, 4, bias.shape[1])) + np.arange(bias.shape[0])[:, None] % 3
    bias[...] = sign * np.round(65536 / np.log2(np.e)) + rise
    check_forward(inputs, *inputs.forward("cpu"))


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e6, 1e12, 1e20])
@pytest.mark.parametrize("bits", [False, True])
def test_huge_products(bits: bool, size: float, shape: str, dtype: str) -> None:
    """Scores of about `size`: one key has all weight of a row, and the backward's P is 1 there, because its scores
    equal the forward's bits.

    From large q and k, or (`bits`: with ALiBi too) from a large scale."""
    inputs = replace(Case(f"products_{size}", dtype, **SHAPES[shape]), sinks=bits, alibi="heads" if bits else None).make()
    q, k, _ = inputs.args
    if bits or dtype == "float16":
        inputs.kwargs["softmax_scale"] = size / 8
    else:
        q[...], k[...] = q * q.dtype.type(np.sqrt(size)), k * k.dtype.type(np.sqrt(size))
    judge = Judge(inputs)
    out, lse = inputs.forward("cpu")
    judge.forward(out, lse)
    if dtype != "float16":                                      # whose dq overflows: a rounding of dP - delta times the scale
        judge.backward(inputs.backward(out, lse, "cpu"))


@pytest.mark.parametrize(("dtype", "value", "scale"), [
    ("float32", 5e4, 1.0), ("float16", 6e4, 1.0), ("bfloat16", 3e5, 1.0), ("float64", 3e9, 1.0), ("float32", 1.0, 10**8.5),
    ("bfloat16", 1.0, 10**8.5), ("float64", 1.0, 1e19), ("float32", 1e15, 1e5), ("float32", 1.0, -1e12)])
def test_one_key(dtype: str, value: float, scale: float) -> None:
    q = np.full((1, 3, 2, 8), value).astype(NUMPY[dtype])
    v = np.ones_like(q[:, :1])
    out, lse = fastattn.attention(q, q[:, :1], v, softmax_scale=scale, return_lse=True)
    grads = fastattn.attention_backward(np.ones_like(out), q, q[:, :1], v, out, lse, softmax_scale=scale)
    assert (out == 1).all() and np.isfinite(lse).all()
    np.testing.assert_allclose(lse, (q[0, 0, 0].astype(np.float64)**2).sum() * scale, rtol=4 * EPS[lse_dtype(dtype)])
    assert (grads.dv == 3).all() and not grads.dq.any() and not grads.dk.any()


@pytest.mark.parametrize("scale", [1e-46, 1e-40, 1e-38, 1e-30, 0.0])
def test_zero_and_tiny_scales(scale: float) -> None:
    inputs = Case("tiny", mask=(37, 37), softmax_scale=scale).make()
    out, lse = inputs.forward("cpu")
    expected, expected_lse = inputs.forward("reference")
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    assert np.isfinite(inputs.backward(out, lse, "cpu").dq).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_largest_scale(softcap: float | None) -> None:
    """Half of float32's range, of products that are 1e-38."""
    inputs = Case("large", softmax_scale=1.7e38, softcap=softcap).make()
    for x in inputs.args[:2]:
        x *= np.float32(1e-19)
    Judge(inputs).forward(*inputs.forward("cpu"))


def test_the_largest_scale_over_a_small_softcap() -> None:
    """Their quotient is half of float32's range."""
    inputs = Case("large", softmax_scale=1.7e37, softcap=0.1).make()
    inputs.args[0][:, 3] = 0
    Judge(inputs).forward(*inputs.forward("cpu"))


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("value", [-1e10, -1e30, 1e10, 1e30])
def test_sinks_with_huge_maxima(value: float, dtype: str) -> None:
    """A sink of the scores' size counts as one more key; a much larger one has all weight, a much smaller one none."""
    inputs = Case("sinks", dtype, batch=1, num_heads=3, seqlen_q=4, seqlen_k=9, bias=(4, 9), bias_dtype=lse_dtype(dtype), sinks=True).make()
    q, _, v = inputs.args
    q[...] = 0
    inputs.kwargs["bias"][...] = value
    sinks = inputs.kwargs["sinks"]
    sinks[:] = value, 0, -3e30
    out, lse = inputs.forward("cpu")
    mean = v.astype(np.float64).mean(axis=1)[0]
    share = np.array([0.9, float(value > 0), float(value > -3e30)])
    np.testing.assert_allclose(out[0].astype(np.float64), np.broadcast_to(share[:, None] * mean, out[0].shape), atol=4 * EPS[dtype])
    np.testing.assert_allclose(lse[0], np.broadcast_to(np.maximum(value, sinks)[:, None], lse[0].shape), rtol=2 * EPS["float32"])
    grads = inputs.backward(out, lse, "cpu")
    assert all(x is None or np.isfinite(x.astype(np.float64)).all() for x in grads)


@pytest.mark.parametrize("dtype", NUMPY)
def test_huge_alibi_slopes(dtype: str) -> None:
    inputs = Case("slopes", dtype, seqlen_q=30, seqlen_k=300, alibi="heads", softcap=4.0).make()
    inputs.kwargs["alibi_slopes"][:] = 3e8, 1e35
    judge = Judge(inputs)
    out, lse = inputs.forward("cpu")
    judge.forward(out, lse)
    judge.backward(inputs.backward(out, lse, "cpu"))


# ---------------------------------------------------------------- backward
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("size", [1e10, 1e20])
def test_lse_of_another_engine(size: float, dtype: str) -> None:
    """Its scores differ by roundings of several hundred. P is still at most 1 in the backward of every engine."""
    inputs = Case("another", dtype, seqlen_k=300, head_dim=64, softmax_scale=size).make()
    for first, second in (("reference", "cpu"), ("cpu", "reference")):
        grads = inputs.backward(*inputs.forward(first), second)
        finite = [grads.dv] if dtype == "float16" else [x for x in grads if x is not None]  # dq, dk times the scale are no float16
        assert all(np.isfinite(x.astype(np.float64)).all() for x in finite)
        rows = np.abs(inputs.dout.astype(np.float64)).sum(axis=1, keepdims=True)
        assert (np.abs(grads.dv.astype(np.float64)) <= 1.01 * rows).all()


@pytest.mark.parametrize("dtype", NUMPY)
def test_equal_keys_where_lse_has_no_bits_for_their_number(dtype: str) -> None:
    """Each key has P = 1, as docs/contracts.md says; the reference has 1 / n."""
    inputs = with_bias("tiles", dtype)
    inputs.kwargs["bias"][...] = -largest("bfloat16")
    inputs.dout[...] = 1
    out, lse = inputs.forward("cpu")
    grads = inputs.backward(out, lse, "cpu")
    assert all(x is None or np.isfinite(x.astype(np.float64)).all() for x in grads)
    np.testing.assert_array_equal(grads.dv.astype(np.float64), 14)
    exact = inputs.backward(out, lse, "reference")
    np.testing.assert_allclose(exact.dv.astype(np.float64), 14 / 600, rtol=8 * EPS[dtype])


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("size", [1e10, 1e25])
def test_reference_backward_of_huge_scores(size: float, dtype: str) -> None:
    """The gradients of the softmax itself, though lse is given in float32."""
    inputs = Case("reference", dtype, seqlen_q=5, seqlen_k=9, softmax_scale=size, sinks=True).make()
    inputs.args[1][:, 1] = inputs.args[1][:, 0]                 # P = 1/2 twice where these take all
    grads = inputs.backward(*inputs.forward("reference"), "reference")
    q, k, dout = (x.astype(np.float64).swapaxes(1, 2) for x in (*inputs.args[:2], inputs.dout))
    S = size * q @ k.swapaxes(2, 3)
    P = np.exp(S - S.max(axis=3, keepdims=True))
    sinks = np.exp(np.minimum(inputs.kwargs["sinks"][:, None, None].astype(np.float64) - S.max(axis=3, keepdims=True), 0))
    P = np.where(S.max(axis=3, keepdims=True) < 0, 0, P / (P.sum(axis=3, keepdims=True) + sinks))
    np.testing.assert_allclose(grads.dv.astype(np.float64).swapaxes(1, 2), P.swapaxes(2, 3) @ dout, rtol=EPS[dtype], atol=1e-5)
    assert ((P > 0.1) & (P < 0.9)).any()


@pytest.mark.parametrize("base", [0.0, 1e4, 1e8])
def test_reference_honours_an_lse_of_more_keys(base: float) -> None:
    """An lse that is larger than a part's own by log 4 leaves its keys a
    quarter of their P; its own lse leaves all of it."""
    inputs = Case("parts", batch=1, num_heads=1, seqlen_q=1, seqlen_k=9, bias=(1, 1)).make()
    inputs.kwargs["bias"][...] = base
    out, lse = inputs.forward("reference")
    own = inputs.float64().forward("reference")[1]
    whole = inputs.backward(0 * out, lse, "reference")
    larger = lse + np.float32(np.log(4) if base < 1e8 else 16)
    part = inputs.backward(0 * out, larger, "reference")
    expected = np.exp(own - larger)
    assert (expected < 0.3).all()
    np.testing.assert_allclose(part.dv, whole.dv * expected.item(), rtol=1e-6)


# ---------------------------------------------------------------- NaN where no row attends
def visible_pairs(inputs: Inputs, b: int, seqlen_q: int, seqlen_k: int, total_k: int) -> Array:
    """(num_heads, seqlen_q, total_k) bool: the pairs of sequence b that masks leave; seqlen_k keys of total_k are used."""
    options = inputs.kwargs
    left, right = options.get("window") or (None, None)
    if options.get("causal"):
        right = 0 if right is None else min(right, 0)
    pairs = np.zeros((inputs.args[0].shape[-2], seqlen_q, total_k), bool)
    for row in range(seqlen_q):
        lo, hi = row_bounds(row, seqlen_q, seqlen_k, left, right, options.get("causal") == "top_left")
        pairs[:, row, lo:hi] = True
    if "mask" in options:
        mask = options["mask"]
        pairs[:, :, :seqlen_k] &= mask[b % mask.shape[0], :, :seqlen_q, :seqlen_k]
    return pairs


def plant(inputs: Inputs, values: list[float]) -> None:
    """Writes `values`, repeated, into all of q, k, v and dout that no row attends to."""
    q, k, v = inputs.args[:3]
    heads_k = k.shape[-2]

    def fill(x: Array, where: Array) -> None:
        x[where] = np.resize(np.array(values, np.float64), x[where].shape).astype(x.dtype)

    for b in range(len(inputs.args[3]) - 1 if inputs.packed else q.shape[0]):
        rows: Any = b
        keys: Any = b
        if inputs.packed:
            rows, keys = (slice(cu[b], cu[b + 1]) for cu in inputs.args[3:])
        q_b, dout_b, k_b, v_b = q[rows], inputs.dout[rows], k[keys], v[keys]
        used = int(inputs.kwargs["seqused_k"][b]) if "seqused_k" in inputs.kwargs else len(k_b)
        pairs = visible_pairs(inputs, b, len(q_b), used, len(k_b))
        idle_rows = ~pairs.any(axis=2).T                        # (rows, heads)
        idle_keys = ~pairs.reshape(heads_k, -1, *pairs.shape[1:]).any(axis=(1, 2)).T
        for x in (q_b, dout_b):
            fill(x, idle_rows)
        for x in (k_b, v_b):
            fill(x, idle_keys)


def sparse(seed: int) -> Case:
    """A random problem in which no row attends to some of the memory."""
    draw = random.Random(seed)
    group, heads_k, dtype = draw.choice((1, 1, 3)), draw.choice((1, 2)), draw.choice(list(NUMPY))
    lengths = [draw.choice((1, 3, 8, 16, 17, 40, 100, 191, 200)) for _ in range(4)]
    dims = [draw.choice((8, 16, 40, 64)) for _ in range(2)]
    window = draw.choice((None, None, (3, 2), (None, 5), (10, None), (0, 0)))
    case = Case(f"sparse_{seed}", dtype, batch=1, num_heads=group * heads_k, num_heads_k=heads_k, seqlen_q=lengths[0], seqlen_k=lengths[1],
                head_dim=dims[0], head_dim_v=dims[1], causal=draw.choice((False, True, "top_left")), window=window,
                sinks=draw.random() < 0.3, softcap=draw.choice((None, None, 2.0)), dropout_p=draw.choice((0.0, 0.0, 0.3)),
                dlse=draw.random() < 0.3)
    if draw.random() < 0.4:
        case = replace(case, lengths_q=(lengths[0], lengths[2]), lengths_k=(lengths[1], lengths[3]))
        if draw.random() < 0.6:
            case = replace(case, used_k=tuple(draw.randint(0, n) for n in lengths[1::2]))
    if draw.random() < 0.5:
        full_q, full_k = (max(case.lengths_q or (lengths[0],)), max(case.lengths_k or (lengths[1],)))
        case = replace(case, mask=(1, 1, draw.choice((1, full_q)), full_k))
    return case


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("block", range(8))
def test_memory_that_no_row_attends_to_does_not_matter(block: int, engine: str) -> None:
    """NaN and infinities there give the same bits as zeros, forward and backward, dsinks too."""
    for seed in range(block * 40, block * 40 + (40 if engine == "cpu" else 10)):
        inputs = sparse(seed).make()
        mask = inputs.kwargs.get("mask")
        if mask is not None:                                    # whole keys and rows
            chosen = np.random.default_rng(seed)
            mask[..., chosen.random(mask.shape[-1]) < 0.3] = False
            mask[:, :, chosen.random(mask.shape[2]) < 0.2] = False
        plant(inputs, [0])
        out, lse = inputs.forward(engine)
        expected = (out, lse, *inputs.backward(out, lse, engine))
        plant(inputs, [np.nan, np.inf, -np.inf])
        out, lse = inputs.forward(engine)
        names = ("out", "lse", *fastattn.Grads._fields)
        for name, x, y in zip(names, (out, lse, *inputs.backward(out, lse, engine)), expected, strict=True):
            if x is not None:
                assert np.array_equal(x, y), f"{name} of {sparse(seed)}"


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_key_past_the_diagonal(dtype: str) -> None:
    inputs = Case("past", dtype, batch=1, num_heads=1, seqlen_q=16, seqlen_k=17, causal="top_left").make()
    out, lse = inputs.forward("cpu")
    expected = inputs.backward(out, lse, "cpu")
    inputs.args[1][:, 16] = inputs.args[2][:, 16] = np.nan
    for x, y in zip(inputs.backward(*inputs.forward("cpu"), "cpu"), expected, strict=True):
        assert x is y is None or np.array_equal(x, y)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_key_that_no_query_head_of_its_group_attends(engine: str) -> None:
    """Each query head has a mask of its own; what decides is whether one that shares the key head attends the key."""
    inputs = Case("group", batch=1, num_heads=4, num_heads_k=2, seqlen_q=40, seqlen_k=90, mask=(1, 4, 40, 90)).make()
    inputs.kwargs["mask"][:, :2, :, 30:50] = False
    inputs.kwargs["mask"][:, 2, :, 35] = False
    out, lse = inputs.forward(engine)
    expected = out, lse, *inputs.backward(out, lse, engine)[:3]
    for x in inputs.args[1:3]:
        x[:, 30:50, 0] = np.nan
    out, lse = inputs.forward(engine)
    for x, y in zip((out, lse, *inputs.backward(out, lse, engine)[:3]), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_dsinks_of_a_fully_masked_row(engine: str) -> None:
    """Its dout may be NaN; its lse is the sink, whose gradient is dlse."""
    inputs = Case("dsinks", mask=(2, 1, 37, 37), sinks=True, dlse=True).make()
    inputs.kwargs["mask"][:, :, [0, 20]] = False
    inputs.dout[:, [0, 20]] = 0
    out, lse = inputs.forward(engine)
    expected = inputs.backward(out, lse, engine).dsinks
    inputs.dout[:, [0, 20]] = np.nan
    np.testing.assert_array_equal(inputs.backward(out, lse, engine).dsinks, expected)
    assert np.isfinite(expected).all()


# ---------------------------------------------------------------- the slope of a softcap
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slope_of_the_softcap(dtype: str) -> None:
    """d out / d q through softcap(q k) over a range of dot products, with two keys whose v differ; from 1 on the slope
    has a relative error only."""
    x = np.concatenate([np.linspace(-30, 30, 2001), [-1e30, -1e3, 0, 45, 200, 1e4, 1e30]]).astype(dtype)
    q, k = x.reshape(1, -1, 1, 1), np.zeros((1, 2, 1, 1), dtype)
    k[0, 0] = 1
    v = np.array([1, 0], dtype).reshape(1, 2, 1, 1)
    options: dict[str, Any] = {"softmax_scale": 1.0, "softcap": 1.0}
    out, lse = fastattn.attention(q, k, v, **options, return_lse=True)
    dq = fastattn.attention_backward(np.ones_like(q), q, k, v, out, lse, **options).dq.ravel().astype(np.float64)
    with np.errstate(over="ignore"):
        slope = 1 / np.cosh(x.astype(np.float64))**2
    P = 1 / (1 + np.exp(-np.tanh(x.astype(np.float64))))
    unit = EPS[dtype]
    np.testing.assert_allclose(dq, slope * P * (1 - P), rtol=100 * unit, atol=1e-28)


def test_a_saturated_softcap_has_no_slope() -> None:
    for size in (1.0, 20.0, 1e3, 1e30):
        q, k = np.full((1, 1, 1, 1), size, np.float32), np.array([1e3, 2e3], np.float32).reshape(1, 2, 1, 1)
        out, lse = fastattn.attention(q, k, k, softcap=10.0, return_lse=True)
        grads = fastattn.attention_backward(np.ones_like(out), q, k, k, out, lse, softcap=10.0)
        assert not grads.dq.any() and not grads.dk.any()
