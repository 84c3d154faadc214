"""The flash_attn functions: their conventions against a float64 formula, packed forms, dropout, probabilities and gradients."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import flash_attn as fa
from tests.tools.formulas import CU_K, CU_Q, Array, check_gradients, dense, expected, normal, visible

P, SEED, OFFSET = 0.3, 11, 2
KEPT = 1 / (1 - round(P * 65536) / 65536)
SLOPES = np.array([0.5, 0.25, 0.1, 0.0])


def test_the_masks_of_the_documentation() -> None:
    """Causal for seqlens (2, 5) and (5, 2), as FlashAttention's docstrings draw them: out's columns are probabilities where v is 1."""
    for L, S, drawn in ((2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])):
        q, k = np.ones((1, L, 1, 4)), np.ones((1, S, 1, 4))
        out = fa.flash_attn_func(q, k, np.eye(S)[None, :, None], causal=True)[0, :, 0]
        assert ["".join(str(int(x > 0)) for x in row) for row in out] == drawn


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"right": 0}),
    "window": ({"window_size": (2, 1)}, {"left": 2, "right": 1}),
    "causal window": ({"causal": True, "window_size": (3, 4)}, {"left": 3, "right": 0}),
    "scale and softcap": ({"softmax_scale": 0.7, "softcap": 1.5}, {"scale": 0.7, "softcap": 1.5}),
    "alibi": ({"alibi_slopes": SLOPES, "causal": True}, {"slopes": SLOPES, "right": 0}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(6, 9), (9, 6)], ids=str)
def test_dense_and_its_gradients(name: str, lengths: tuple[int, int]) -> None:
    ours, theirs = OPTIONS[name]
    q, k, v = normal((2, lengths[0], 4, 7), (2, lengths[1], 2, 7), (2, lengths[1], 2, 5))
    out, lse, none = fa.flash_attn_func(q, k, v, return_attn_probs=True, **ours)
    assert none is None and lse.shape == (2, 4, lengths[0])
    np.testing.assert_allclose(out, dense(q, k, v, **theirs), rtol=1e-12, atol=1e-12)
    weight = np.random.default_rng(1).standard_normal(out.shape)
    grads = fa.flash_attn_backward(weight, q, k, v, out, lse, deterministic=True, **ours)
    check_gradients(lambda *x: float((weight * dense(*x, **theirs)).sum()), [q, k, v], list(grads))


def test_alibi_of_a_batch_with_bias_and_dropout() -> None:
    q, k, v, slopes, bias = normal((2, 6, 4, 7), (2, 9, 4, 7), (2, 9, 4, 7), (2, 4), (4, 6, 9))
    options = {"dropout_p": P, "seed": SEED, "offset": OFFSET, "alibi_slopes": np.abs(slopes), "bias": bias, "softcap": 2.0}
    keep = fastattn.dropout_mask(2, 4, 6, 9, dropout_p=P, seed=SEED, offset=OFFSET) * KEPT

    def loss(q: Array, k: Array, v: Array, bias: Array) -> Array:
        return dense(q, k, v, bias=bias, slopes=np.abs(slopes), softcap=2.0, keep=keep)
    out, lse, probabilities = fa.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    np.testing.assert_allclose(out, loss(q, k, v, bias), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(np.signbit(probabilities), keep == 0)
    np.testing.assert_allclose(np.where(keep == 0, 0, probabilities * KEPT) @ v.swapaxes(1, 2), out.swapaxes(1, 2), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.abs(probabilities).sum(axis=3), 1, rtol=1e-12)
    weight = np.random.default_rng(1).standard_normal(out.shape)
    grads = fa.flash_attn_backward(weight, q, k, v, out, lse, need_dbias=True, **options)
    check_gradients(lambda *x: float((weight * loss(*x)).sum()), [q, k, v, bias], list(grads))


VARLEN = {**OPTIONS, "dropout": ({"dropout_p": P, "seed": SEED, "offset": OFFSET, "causal": True},
                                 {"keep": fastattn.dropout_mask(5, 4, 7, 9, dropout_p=P, seed=SEED, offset=OFFSET) * KEPT, "right": 0})}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_and_its_gradients(name: str) -> None:
    ours, theirs = VARLEN[name]
    q, k, v = normal((16, 4, 7), (20, 2, 7), (20, 2, 5))
    lengths = (CU_Q, CU_K, 7, 9)
    out, lse, probabilities = fa.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **ours)
    np.testing.assert_allclose(out, expected(q, k, v, **theirs), rtol=1e-12, atol=1e-12)
    if name == "dropout":
        assert probabilities.shape == (5, 4, 7, 9)
        inside = np.zeros((5, 1, 7, 9), bool)
        for n, (L, S) in enumerate(zip(np.diff(CU_Q), np.diff(CU_K), strict=True)):
            inside[n, 0, :L, :S] = visible(L, S, right=0)
        np.testing.assert_array_equal((probabilities != 0), np.broadcast_to(inside, probabilities.shape))
        np.testing.assert_array_equal(np.signbit(probabilities)[np.broadcast_to(inside, probabilities.shape)],
                                      (theirs["keep"] == 0)[np.broadcast_to(inside, probabilities.shape)])
    else:
        assert probabilities is None
    weight = np.random.default_rng(1).standard_normal(out.shape)
    grads = fa.flash_attn_varlen_backward(weight, q, k, v, out, lse, *lengths, **ours)
    check_gradients(lambda *x: float((weight * expected(*x, **theirs)).sum()), [q, k, v], list(grads))


def tensors(x: Array) -> Any:
    return pytest.importorskip("torch").from_numpy(x)


@pytest.mark.parametrize("kind", [lambda x: x, tensors], ids=["numpy", "torch"])
def test_packed_forms_are_the_same_arrays(kind: Callable[[Array], Any]) -> None:
    qkv, kv, q = map(kind, normal((2, 6, 3, 4, 8), (2, 9, 2, 2, 8), (2, 6, 4, 8)))
    options = {"causal": True, "window_size": (4, -1), "dropout_p": P, "seed": SEED}
    want = fa.flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], return_attn_probs=True, **options)
    got = fa.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(qkv)
        np.testing.assert_array_equal(a, b)
    dq, dk, dv = fa.flash_attn_backward(want[0], qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], *want[:2], **options)
    (dqkv,) = fa.flash_attn_qkvpacked_backward(want[0], qkv, *want[:2], **options)
    for part, grad in enumerate((dq, dk, dv)):
        np.testing.assert_array_equal(dqkv[:, :, part], grad)

    want = fa.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], return_attn_probs=True, **options)
    np.testing.assert_array_equal(fa.flash_attn_kvpacked_func(q, kv, **options), want[0])
    dq, dk, dv = fa.flash_attn_backward(want[0], q, kv[:, :, 0], kv[:, :, 1], *want[:2], **options)
    packed_dq, dkv = fa.flash_attn_kvpacked_backward(want[0], q, kv, *want[:2], **options)
    for a, b in ((packed_dq, dq), (dkv[:, :, 0], dk), (dkv[:, :, 1], dv)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [lambda x: x, tensors], ids=["numpy", "torch"])
def test_packed_varlen_forms_are_the_same_arrays(kind: Callable[[Array], Any]) -> None:
    qkv, kv, q = map(kind, normal((16, 3, 4, 8), (20, 2, 2, 8), (16, 4, 8)))
    cu_q, cu_k, options = kind(CU_Q), kind(CU_K), {"causal": True, "dropout_p": P, "seed": SEED}
    want = fa.flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_q, cu_q, 7, 7, return_attn_probs=True, **options)
    for a, b in zip(fa.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 7, return_attn_probs=True, **options), want, strict=True):
        np.testing.assert_array_equal(a, b)
    grads = fa.flash_attn_varlen_backward(want[0], qkv[:, 0], qkv[:, 1], qkv[:, 2], *want[:2], cu_q, cu_q, 7, 7, **options)
    (dqkv,) = fa.flash_attn_varlen_qkvpacked_backward(want[0], qkv, *want[:2], cu_q, 7, **options)
    for part, grad in enumerate(grads):
        np.testing.assert_array_equal(dqkv[:, part], grad)

    want = fa.flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], cu_q, cu_k, 7, 9, return_attn_probs=True, **options)
    np.testing.assert_array_equal(fa.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 7, 9, **options), want[0])
    grads = fa.flash_attn_varlen_backward(want[0], q, kv[:, 0], kv[:, 1], *want[:2], cu_q, cu_k, 7, 9, **options)
    dq, dkv = fa.flash_attn_varlen_kvpacked_backward(want[0], q, kv, *want[:2], cu_q, cu_k, 7, 9, **options)
    for a, b in zip((dq, dkv[:, 0], dkv[:, 1]), grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_signatures_are_flash_attns() -> None:
    tail = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs"]
    cu = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for function, head, last in ((fa.flash_attn_func, ["q", "k", "v"], []), (fa.flash_attn_kvpacked_func, ["q", "kv"], []),
                                 (fa.flash_attn_qkvpacked_func, ["qkv"], []),
                                 (fa.flash_attn_varlen_func, ["q", "k", "v", *cu], ["block_table"]),
                                 (fa.flash_attn_varlen_kvpacked_func, ["q", "kv", *cu], []),
                                 (fa.flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen"], [])):
        assert [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY] == [*head, *tail, *last]


X = np.zeros((2, 5, 4, 8), np.float32)
WRONG: list[tuple[str, str, Callable[[], Any]]] = [
    ("flash_attn_func", "k has 3 heads", lambda: fa.flash_attn_func(X, X[:, :, :3], X[:, :, :3])),
    ("flash_attn_func", r"window_size is \(-3, 0\)", lambda: fa.flash_attn_func(X, X, X, window_size=(-3, 0))),
    ("flash_attn_func", "softcap is -1.0; expected a positive number", lambda: fa.flash_attn_func(X, X, X, softcap=-1.0)),
    ("flash_attn_func", "alibi_slopes has shape", lambda: fa.flash_attn_func(X, X, X, alibi_slopes=np.zeros(3, np.float32))),
    ("flash_attn_kvpacked_func", r"kv has shape \(2, 5, 4, 8\); expected 5 axes", lambda: fa.flash_attn_kvpacked_func(X, X)),
    ("flash_attn_qkvpacked_func", r"qkv has shape", lambda: fa.flash_attn_qkvpacked_func(np.zeros((2, 5, 2, 4, 8), np.float32))),
    ("flash_attn_varlen_func", "k has 3 axes",
     lambda: fa.flash_attn_varlen_func(X[0], X[0], X[0], [0, 5], [0, 5], 5, 5, block_table=np.zeros((1, 1), np.int32))),
    ("flash_attn_varlen_func", "max_seqlen_k is 4", lambda: fa.flash_attn_varlen_func(X[0], X[0], X[0], [0, 5], [0, 5], 5, 4)),
    ("flash_attn_backward", "softmax_lse has shape", lambda: fa.flash_attn_backward(X, X, X, X, X, X[..., 0])),
    ("flash_attn_backward", "seed is None", lambda: fa.flash_attn_backward(X, X, X, X, X, X[..., 0], dropout_p=0.5)),
]


@pytest.mark.parametrize(("call", "text", "function"), WRONG, ids=[text[:30] for _, text, _ in WRONG])
def test_errors(call: str, text: str, function: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{call}\(\): {text}"):
        function()
