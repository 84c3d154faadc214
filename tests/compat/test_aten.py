"""PyTorch's ATen level: each operator against the formula, its backward
against finite differences, and the encoded softmax.

The seeds that a forward returns give the same dropout in its backward.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import aten, probabilities
from tests.tools.formulas import CU_K, CU_Q, LENGTHS_K, LENGTHS_Q, Array, check_gradients, dense, expected, formula, normal, visible

P = 0.4
KEPT = 1 / (1 - round(P * 65536) / 65536)
SLOPES = np.array([0.5, 0.25, 0.1, 0.0])


def keep_of(result: Any, *shape: int) -> Array:
    """The factors of dropout for a result's seed and offset."""
    mask: Array = aten.dropout_mask(*shape, dropout_p=P, seed=result.philox_seed, offset=result.philox_offset) * KEPT
    return mask


def weights(out: Array) -> Array:
    return np.random.default_rng(5).standard_normal(out.shape)


# ---------------------------------------------------------------- flash
def test_flash_dense() -> None:
    q, k, v = normal((2, 6, 4, 7), (2, 9, 2, 7), (2, 9, 2, 7))
    r = aten.flash_attention_forward(q, k, v, None, None, 6, 9, P, True, True, window_size_left=4, alibi_slopes=SLOPES)
    keep = keep_of(r, 2, 4, 6, 9)

    def loss(q: Array, k: Array, v: Array) -> Array:
        return dense(q, k, v, 4, 0, slopes=SLOPES, keep=keep)
    np.testing.assert_allclose(r.out, loss(q, k, v), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(np.signbit(r.debug_attn_mask), keep == 0)
    w = weights(r.out)
    grads = aten.flash_attention_backward(w, q, k, v, r.out, r.logsumexp, None, None, 6, 9, P, True, r.philox_seed, r.philox_offset,
                                          window_size_left=4, alibi_slopes=SLOPES)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v], list(grads))
    again = aten.flash_attention_forward(q, k, v, None, None, 6, 9, P, True, False, window_size_left=4, alibi_slopes=SLOPES)
    assert again.philox_seed != r.philox_seed and again.debug_attn_mask is None


def test_flash_packed_with_bias_and_used_keys() -> None:
    q, k, v, bias = normal((16, 4, 7), (20, 2, 7), (20, 2, 7), (5, 1, 7, 9))
    used = np.array((4, 1, 3, 0, 6), np.int32)
    options = {"scale": 0.3, "window_size_right": 2, "seqused_k": used, "attn_bias": bias}
    r = aten.flash_attention_forward(q, k, v, CU_Q, CU_K, 7, 9, P, False, True, **options)
    keep = keep_of(r, 5, 4, 7, 9)

    def loss(q: Array, k: Array, v: Array, bias: Array) -> Array:
        return expected(q, k, v, right=2, bias=bias, used=tuple(used), scale=0.3, keep=keep)
    np.testing.assert_allclose(r.out, loss(q, k, v, bias), rtol=1e-12, atol=1e-12)
    assert r.logsumexp.shape == (4, 16) and r.debug_attn_mask.shape == (5, 4, 7, 9)
    np.testing.assert_array_equal(r.debug_attn_mask[1], 0)
    w = weights(r.out)
    grads = aten.flash_attention_backward(w, q, k, v, r.out, r.logsumexp, CU_Q, CU_K, 7, 9, P, False, r.philox_seed, r.philox_offset,
                                          need_dbias=True, **options)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v, bias], list(grads))


def test_scaled_dot_product_flash() -> None:
    q, k, v = normal((2, 4, 6, 7), (2, 2, 9, 7), (2, 2, 9, 7))
    r = aten.scaled_dot_product_flash_attention(q, k, v, P, True, True)
    keep = keep_of(r, 2, 4, 6, 9)

    def loss(q: Array, k: Array, v: Array) -> Array:
        return formula(q, k.repeat(2, axis=1), v.repeat(2, axis=1), visible(6, 9, right=0), keep=keep)
    np.testing.assert_allclose(r.out, loss(q, k, v), rtol=1e-12, atol=1e-12)
    assert (r.cum_seq_q, r.cum_seq_k, r.max_q, r.max_k) == (None, None, 6, 9) and r.debug_attn_mask.shape == (2, 4, 6, 9)
    w = weights(r.out)
    grads = aten.scaled_dot_product_flash_attention_backward(w, q, k, v, *r[:6], P, True, r.philox_seed, r.philox_offset)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v], list(grads))


# ---------------------------------------------------------------- memory-efficient
@pytest.mark.parametrize("lengths", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", list(aten.CustomMaskType))
def test_efficient_mask_types(kind: aten.CustomMaskType, window: int | None, lengths: tuple[int, int]) -> None:
    (L, S), none = lengths, kind == aten.CustomMaskType.NoCustomMask
    q, k, v = normal((2, L, 4, 7), (2, S, 4, 7), (2, S, 4, 5))
    arguments = (q, k, v, None, None, None, L, S, 0.0, int(kind), True)
    if none and window is not None:
        with pytest.raises(ValueError, match=r"^efficient_attention_forward\(\): window_size is 3 with custom_mask_type 0"):
            aten.efficient_attention_forward(*arguments, window_size=window)
        return
    r = aten.efficient_attention_forward(*arguments, window_size=window)
    i, j = np.arange(L)[:, None], np.arange(S)
    diagonal = i + (S - L if kind == aten.CustomMaskType.CausalFromBottomRight else 0)
    seen = np.ones((L, S), bool) if none else (j <= diagonal) & (True if window is None else j > diagonal - window)

    def loss(q: Array, k: Array, v: Array) -> Array:
        return formula(*(x.swapaxes(1, 2) for x in (q, k, v)), seen).swapaxes(1, 2)
    np.testing.assert_allclose(r.out, loss(q, k, v), rtol=1e-12, atol=1e-12)
    assert r[4:] == (L, S)
    w = weights(r.out)
    grads = aten.efficient_attention_backward(w, q, k, v, None, r.out, None, None, L, S, r.logsumexp, 0.0, r.philox_seed, r.philox_offset,
                                              int(kind), False, window_size=window)
    assert grads[3] is None
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v], list(grads[:3]))


@pytest.mark.parametrize("shape", [(6, 9), (8, 6, 9), (2, 4, 6, 9), (1, 4, 6, 9), (2, 1, 1, 9)], ids=str)
def test_efficient_bias_of_2_3_and_4_axes(shape: tuple[int, ...]) -> None:
    q, k, v, bias = normal((2, 6, 4, 7), (2, 9, 4, 7), (2, 9, 4, 5), shape)
    r = aten.efficient_attention_forward(q, k, v, bias, None, None, 6, 9, P, 0, True)
    keep = keep_of(r, 2, 4, 6, 9)

    def loss(q: Array, k: Array, v: Array, bias: Array) -> Array:
        return dense(q, k, v, bias=bias.reshape(2, 4, 6, 9) if len(shape) == 3 else bias, keep=keep)
    np.testing.assert_allclose(r.out, loss(q, k, v, bias), rtol=1e-12, atol=1e-12)
    w = weights(r.out)
    grads = aten.efficient_attention_backward(w, q, k, v, bias, r.out, None, None, 6, 9, r.logsumexp, P, r.philox_seed, r.philox_offset,
                                              0, True)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v, bias], list(grads))


@pytest.mark.parametrize("axes", [3, 4])
def test_efficient_packed(axes: int) -> None:
    q, k, v = (x if axes == 3 else x[None] for x in normal((16, 4, 7), (20, 2, 7), (20, 2, 5)))
    used = np.array((4, 1, 3, 0, 6), np.int32)
    r = aten.efficient_attention_forward(q, k, v, None, CU_Q, CU_K, 7, 9, 0.0, 2, True, seqlen_k=used)
    assert r.out.shape == (*q.shape[:-1], 5) and r.logsumexp.shape == (4, 16) and r[4:] == (7, 9)

    def loss(q: Array, k: Array, v: Array) -> Array:
        return expected(*(x.reshape(x.shape[-3:]) for x in (q, k, v)), right=0, used=tuple(used)).reshape(r.out.shape)
    np.testing.assert_allclose(r.out, loss(q, k, v), rtol=1e-12, atol=1e-12)
    w = weights(r.out)
    grads = aten.efficient_attention_backward(w, q, k, v, None, r.out, CU_Q, CU_K, 7, 9, r.logsumexp, 0.0, 0, 0, 2, False, seqlen_k=used)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v], list(grads[:3]))


def test_scaled_dot_product_efficient() -> None:
    q, k, v, bias = normal((2, 4, 6, 7), (2, 4, 9, 7), (2, 4, 9, 5), (4, 6, 9))
    r = aten.scaled_dot_product_efficient_attention(q, k, v, bias, True, P, True)
    keep = keep_of(r, 2, 4, 6, 9)

    def loss(q: Array, k: Array, v: Array, bias: Array) -> Array:
        return formula(q, k, v, np.tril(np.ones((6, 9), bool)), bias, keep=keep)
    np.testing.assert_allclose(r.out, loss(q, k, v, bias), rtol=1e-12, atol=1e-12)
    w = weights(r.out)
    arguments = (w, q, k, v, bias, r.out, r.logsumexp, r.philox_seed, r.philox_offset, P)
    grads = aten.scaled_dot_product_efficient_attention_backward(*arguments, [True] * 4, True)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v, bias], list(grads))
    some = aten.scaled_dot_product_efficient_attention_backward(*arguments, [True, False, True, False], True)
    assert some[1] is None and some[3] is None
    np.testing.assert_array_equal(some[0], grads[0])
    assert aten.scaled_dot_product_efficient_attention(q, k, v, bias, False, P).logsumexp is None


def test_a_batch_above_65535_with_dropout() -> None:
    """The original raises here: it cannot return one seed and offset for several launches."""
    batch = 70_001
    q, k, v = (x.astype(np.float32) for x in normal((batch, 1, 2, 4), (batch, 1, 3, 4), (batch, 1, 3, 4)))
    r = aten.scaled_dot_product_efficient_attention(q, k, v, None, True, P)
    keep = keep_of(r, batch, 1, 2, 3)
    assert (keep[:-65536] != keep[65536:]).any(), "the batch counts on, it does not start again"
    np.testing.assert_allclose(r.out, formula(q.astype(float), k.astype(float), v.astype(float), keep=keep), atol=1e-5)
    _, _, dv, _ = aten.scaled_dot_product_efficient_attention_backward(q, q, k, v, None, r.out, r.logsumexp, r.philox_seed,
                                                                       r.philox_offset, P, [False, False, True, False])
    kept = np.exp(q @ k.swapaxes(2, 3) / 2 - r.logsumexp[..., None]) * keep
    np.testing.assert_allclose(dv, kept.swapaxes(2, 3) @ q, atol=1e-4)


# ---------------------------------------------------------------- cuDNN
@pytest.mark.parametrize("shape", [None, (6, 9), (4, 6, 9), (1, 6, 9), (2, 4, 6, 9), (2, 1, 1, 9)], ids=str)
def test_cudnn_dense_with_an_expanded_bias(shape: tuple[int, ...] | None) -> None:
    q, k, v = normal((2, 4, 6, 7), (2, 2, 9, 7), (2, 2, 9, 5))
    bias = None if shape is None else normal(shape, seed=1)[0]
    r = aten.cudnn_attention_forward(q, k, v, bias, None, None, 6, 9, True, P, True, True)
    keep = keep_of(r, 2, 4, 6, 9)

    def loss(q: Array, k: Array, v: Array, bias: Any = 0.0) -> Array:
        return formula(q, k.repeat(2, axis=1), v.repeat(2, axis=1), np.tril(np.ones((6, 9), bool)), bias, keep=keep)
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    np.testing.assert_allclose(r.out, loss(*inputs), rtol=1e-12, atol=1e-12)
    assert r[2:6] == (None, None, 6, 9)
    np.testing.assert_array_equal(np.signbit(r.debug_attn_mask), keep == 0)
    same = aten.scaled_dot_product_cudnn_attention(q, k, v, bias, False, P, True, seed=r.philox_seed)
    np.testing.assert_array_equal(same.out, r.out)
    assert same.logsumexp is None and same.debug_attn_mask is None
    w = weights(r.out)
    grads = aten.cudnn_attention_backward(w, q, k, v, r.out, r.logsumexp, r.philox_seed, r.philox_offset, bias, None, None, 6, 9, P, True,
                                          need_dbias=bias is not None)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), inputs, list(grads))


def test_cudnn_ragged_is_top_left_in_each_sequence() -> None:
    q, k, v, bias = normal((16, 4, 7), (20, 2, 7), (20, 2, 5), (7, 9))
    r = aten.cudnn_attention_forward(q, k, v, bias, CU_Q, CU_K, 7, 9, True, 0.0, True)

    def loss(q: Array, k: Array, v: Array, bias: Array) -> Array:
        out = np.zeros((16, 4, 5))
        for n, (L, S) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
            rows, keys = slice(CU_Q[n], CU_Q[n + 1]), slice(CU_K[n], CU_K[n + 1])
            q_n, k_n, v_n = (x.swapaxes(0, 1) for x in (q[rows], k[keys].repeat(2, axis=1), v[keys].repeat(2, axis=1)))
            out[rows] = formula(q_n, k_n, v_n, np.tril(np.ones((L, S), bool)), bias[:L, :S]).swapaxes(0, 1)
        return out
    np.testing.assert_allclose(r.out, loss(q, k, v, bias), rtol=1e-12, atol=1e-12)
    assert r.cum_seq_q is CU_Q and r.cum_seq_k is CU_K and r[4:6] == (7, 9) and r.logsumexp.shape == (4, 16)
    w = weights(r.out)
    grads = aten.scaled_dot_product_cudnn_attention_backward(w, q, k, v, r.out, r.logsumexp, 0, 0, bias, CU_Q, CU_K, 7, 9, 0.0, True,
                                                             need_dbias=True)
    check_gradients(lambda *x: float((w * loss(*x)).sum()), [q, k, v, bias], list(grads))


# ---------------------------------------------------------------- the encoded softmax
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_encoded_softmax_in_every_layout(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities, "BLOCK", 4)          # 9 keys: two blocks and a rest
    kind = np.asarray if library == "numpy" else pytest.importorskip("torch").from_numpy
    q, k, bias = normal((2, 6, 4, 7), (2, 9, 2, 7), (4, 6, 9))
    options = {"window": (4, 2), "softcap": 2.0, "alibi_slopes": kind(SLOPES), "bias": kind(bias), "sinks": kind(SLOPES)}
    dropout = {"dropout_p": P, "seed": 3, "offset": 1}
    encoded = aten.encoded_softmax(kind(q), kind(k), **options, **dropout)
    assert type(encoded) is type(kind(q)) and tuple(encoded.shape) == (2, 4, 6, 9)
    got, keep = np.asarray(encoded), aten.dropout_mask(2, 4, 6, 9, **dropout)
    np.testing.assert_array_equal(np.signbit(got), ~keep)
    total = fastattn.attention(kind(q), kind(k), kind(np.ones((2, 9, 2, 1))), **options)[..., 0].swapaxes(1, 2)
    np.testing.assert_allclose(np.abs(got).sum(axis=3), total)                         # the sink takes a part of every row
    seen = dense(q, k, np.broadcast_to(np.eye(9)[None, :, None], (2, 9, 2, 9)), 4, 2, bias, SLOPES, softcap=2.0).swapaxes(1, 2)
    np.testing.assert_allclose(np.abs(got) / np.abs(got).sum(axis=3, keepdims=True), seen, rtol=1e-12, atol=1e-12)
    heads_first = aten.encoded_softmax(kind(q.swapaxes(1, 2)), kind(k.swapaxes(1, 2)), layout="bhsd", **options, **dropout)
    np.testing.assert_array_equal(heads_first, got)
    cu_q, cu_k = (kind(np.arange(3, dtype=np.int32) * n) for n in (6, 9))
    packed = aten.encoded_softmax(kind(q.reshape(12, 4, 7)), kind(k.reshape(18, 2, 7)), layout="thd", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                                  max_seqlen_q=6, max_seqlen_k=9, **options, **dropout)
    np.testing.assert_allclose(packed, got, rtol=1e-14)
    np.testing.assert_array_equal(np.signbit(np.asarray(packed)), ~keep)


def test_encoded_softmax_of_many_keys_and_of_none() -> None:
    q, k = (x.astype(np.float32) for x in normal((1, 3, 2, 16), (1, 600, 2, 16)))
    got = aten.encoded_softmax(q, k, causal="top_left")
    assert got.dtype == np.float32 and not got[..., 3:].any()
    np.testing.assert_allclose(got.sum(axis=3), 1, rtol=1e-6)
    scores = np.einsum("blhe,bshe->bhls", q, k) / 4
    np.testing.assert_allclose(aten.encoded_softmax(q, k), np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True), rtol=2e-5)
    assert aten.encoded_softmax(q, k[:, :0]).shape == (1, 2, 3, 0)
    assert aten.encoded_softmax(q[:, :0], k).shape == (1, 2, 0, 600)
    nothing = np.zeros(3, np.int32)
    empty = aten.encoded_softmax(q[0, :0], k[0, :0], layout="thd", cu_seqlens_q=nothing, cu_seqlens_k=nothing, max_seqlen_q=2,
                                 max_seqlen_k=1)
    assert empty.shape == (2, 2, 2, 1) and not empty.any()
    assert (np.signbit(aten.encoded_softmax(q, k, dropout_p=1.0, seed=0))).all()


# ---------------------------------------------------------------- errors
X, T = np.zeros((2, 5, 4, 8), np.float32), np.zeros((10, 4, 8), np.float32)
WRONG: list[tuple[str, Any]] = [
    (r"flash_attention_forward\(\): max_q is 6; expected query's length 5, or None",
     lambda: aten.flash_attention_forward(X, X, X, None, None, 6, 5, 0.0, False, False)),
    (r"flash_attention_forward\(\): cum_seq_k is None; expected cumulative lengths, because cum_seq_q is given",
     lambda: aten.flash_attention_forward(T, T, T, [0, 10], None, 10, 10, 0.0, False, False)),
    (r"flash_attention_forward\(\): seqused_k is given without cumulative lengths",
     lambda: aten.flash_attention_forward(X, X, X, None, None, 5, 5, 0.0, False, False, seqused_k=[5, 5])),
    (r"flash_attention_forward\(\): window_size_left, window_size_right is \(-7, None\)",
     lambda: aten.flash_attention_forward(X, X, X, None, None, 5, 5, 0.0, False, False, window_size_left=-7)),
    (r"flash_attention_backward\(\): logsumexp has shape",
     lambda: aten.flash_attention_backward(X, X, X, X, X, X[..., 0], None, None, 5, 5, 0.0, False, 0, 0)),
    (r"scaled_dot_product_flash_attention_backward\(\): cum_seq_q is given",
     lambda: aten.scaled_dot_product_flash_attention_backward(T, T, T, T, T, T, [0, 10], [0, 10], 10, 10, 0.0, False, 0, 0)),
    (r"efficient_attention_forward\(\): custom_mask_type is 3",
     lambda: aten.efficient_attention_forward(X, X, X, None, None, None, 5, 5, 0.0, 3)),
    (r"efficient_attention_forward\(\): bias has shape \(2, 4, 5, 6\)",
     lambda: aten.efficient_attention_forward(X, X, X, np.zeros((2, 4, 5, 6), np.float32), None, None, 5, 5, 0.0, 0)),
    (r"scaled_dot_product_efficient_attention_backward\(\): grad_input_mask is \[True\]",
     lambda: aten.scaled_dot_product_efficient_attention_backward(X, X, X, X, None, X, X[..., 0], 0, 0, 0.0, [True])),
    (r"cudnn_attention_forward\(\): attn_bias has shape \(3, 2, 5, 4, 4\)",
     lambda: aten.cudnn_attention_forward(X, X, X, np.zeros((3, 2, 5, 4, 4), np.float32), None, None, 4, 4, False)),
    (r"encoded_softmax\(\): layout is 'thd'", lambda: aten.encoded_softmax(T, T, layout="thd")),
    (r"encoded_softmax\(\): max_seqlen_k is None",
     lambda: aten.encoded_softmax(T, T, layout="thd", cu_seqlens_q=[0, 10], cu_seqlens_k=[0, 10], max_seqlen_q=10)),
    (r"encoded_softmax\(\): k has shape \(10, 4, 8\); expected 4 axes for layout 'bshd'", lambda: aten.encoded_softmax(T, T)),
]


@pytest.mark.parametrize(("text", "function"), WRONG, ids=[text[:50] for text, _ in WRONG])
def test_errors(text: str, function: Any) -> None:
    with pytest.raises(ValueError, match="^" + text):
        function()


# ---------------------------------------------------------------- size
def test_a_bias_of_more_than_2_to_the_31_elements() -> None:
    """4.3 GB of address space, of which only a band around the diagonal is touched. Elements beyond 2**31 are read."""
    n = 46_400
    assert n * n > 2**31
    try:
        bias = np.zeros((n, n), np.float16)
    except MemoryError:
        pytest.skip("no 4.3 GB of address space")
    bias[-1, -3:] = (0, 5, -3)
    q = np.zeros((1, 1, n, 8), np.float16)
    v = np.zeros((1, 1, n, 8), np.float16)
    v[0, 0, -3:] = np.eye(3, 8)
    out = fastattn.attention(q, q, v, bias=bias, window=(2, 0), layout="bhsd")
    want = np.exp([0.0, 5.0, -3.0]) / np.exp([0.0, 5.0, -3.0]).sum()
    np.testing.assert_allclose(out[0, 0, -1, :3].astype(float), want, atol=1e-3)
