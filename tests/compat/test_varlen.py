"""varlen_attn and its backward: each sequence against the formula, gradients
against finite differences, and torch's names."""
from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from fastattn.compat.varlen import AuxRequest, varlen_attn, varlen_attn_backward
from tests.tools.formulas import CU_K, CU_Q, LENGTHS_K, LENGTHS_Q, Array, check_gradients, expected, normal, visible

LSE = AuxRequest(lse=True)


def arguments() -> tuple[Array, Array, Array]:
    q, k, v = normal((16, 4, 7), (20, 2, 7), (20, 2, 5))
    return q, k, v


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({"is_causal": True}, {"right": 0}),
    "window": ({"window_size": (2, 1)}, {"left": 2, "right": 1}),
    "causal window": ({"window_size": (2, -1), "is_causal": True}, {"left": 2, "right": 0}),
    "causal by window": ({"window_size": (-1, 0)}, {"right": 0}),
    "scale": ({"scale": -0.3}, {"scale": -0.3}),
    "seqused_k": ({"seqused_k": np.array((4, 1, 3, 0, 6), np.int32), "window_size": [3, 0]},
                  {"used": (4, 1, 3, 0, 6), "left": 3, "right": 0}),
    "bias and alibi": ({"attn_bias": normal((5, 4, 7, 9), seed=3)[0], "alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0]), "is_causal": True},
                       {"bias": normal((5, 4, 7, 9), seed=3)[0], "slopes": np.array([0.5, 0.25, 0.1, 0.0]), "right": 0}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_and_its_gradients(name: str) -> None:
    ours, theirs = OPTIONS[name]
    q, k, v = arguments()
    lengths = (CU_Q, CU_K, 7, 9)
    out, lse = varlen_attn(q, k, v, *lengths, return_aux=LSE, enable_gqa=True, **ours)
    np.testing.assert_allclose(out, expected(q, k, v, **theirs), rtol=1e-12, atol=1e-12)
    assert lse.shape == (4, 16) and (lse[:, 10] == -np.inf).all(), "sequence 3 has no keys"
    np.testing.assert_array_equal(varlen_attn(q, k, v, *lengths, enable_gqa=True, **ours), out)
    weight = np.random.default_rng(1).standard_normal(out.shape)
    need = "attn_bias" in ours
    grads = varlen_attn_backward(weight, q, k, v, out, lse, *lengths, enable_gqa=True, need_dbias=need, **ours)
    assert len(grads) == 3 + need
    if not need:
        check_gradients(lambda *x: float((weight * expected(*x, **theirs)).sum()), [q, k, v], list(grads))
        return
    rest = {name: x for name, x in theirs.items() if name != "bias"}
    inputs = [q, k, v, theirs["bias"]]
    check_gradients(lambda q, k, v, bias: float((weight * expected(q, k, v, bias=bias, **rest)).sum()), inputs, list(grads))


def test_grad_lse_is_counted() -> None:
    q, k, v = arguments()
    q, k, v, cu = q[:5], k[:5], v[:5], np.array([0, 5], np.int32)
    out, lse = varlen_attn(q, k, v, cu, cu, 5, 5, return_aux=LSE, enable_gqa=True)
    weight = np.random.default_rng(1).standard_normal(lse.shape)
    grads = varlen_attn_backward(np.zeros_like(out), q, k, v, out, lse, cu, cu, 5, 5, enable_gqa=True, grad_lse=weight)

    def loss(q: Array, k: Array, v: Array) -> float:
        scores = q.swapaxes(0, 1) @ k.repeat(2, axis=1).transpose(1, 2, 0) / np.sqrt(7)
        return float((weight * np.log(np.exp(scores).sum(axis=2))).sum())
    check_gradients(loss, [q, k, v], list(grads))


def test_signature_is_torchs() -> None:
    names = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in names][:9] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "return_aux"]
    assert {p.name for p in names if p.kind is p.KEYWORD_ONLY} >= {"scale", "window_size", "enable_gqa", "seqused_k"}


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, arguments())
    cu_q, cu_k = map(torch.from_numpy, (CU_Q, CU_K))
    out, lse = varlen_attn(q, k, v, cu_q, cu_k, 7, 9, True, LSE, enable_gqa=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    np.testing.assert_allclose(out, expected(*arguments(), right=0), rtol=1e-12, atol=1e-12)
    for n, (L, S) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):      # torch's own, one sequence at a time
        rows, keys = slice(int(CU_Q[n]), int(CU_Q[n + 1])), slice(int(CU_K[n]), int(CU_K[n + 1]))
        mask = torch.from_numpy(visible(L, S, right=0))
        own = torch.nn.functional.scaled_dot_product_attention(q[rows].transpose(0, 1), k[keys].transpose(0, 1), v[keys].transpose(0, 1),
                                                               attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[rows], own.transpose(0, 1))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("key has 2 heads; expected query's 4; enable_gqa=True", {"enable_gqa": False}),
    ("cu_seq_k is None; expected cumulative lengths", {"cu_seq_k": None}),
    (r"window_size is \(-2, 0\); expected counts of keys, -1 for no limit", {"window_size": (-2, 0)}),
    ("window_size is 3; expected a pair", {"window_size": 3}),
    ("max_k is 8; expected at least the longest sequence of cu_seq_k, 9", {"max_k": 8}),
    ("cu_seq_q starts", {"cu_seq_q": CU_Q[::-1].copy()}),
    ("attn_bias has shape", {"attn_bias": np.zeros((3, 4, 7, 9))}),
    ("query has 4 axes", {"query": np.zeros((1, 16, 4, 7))}),
]


@pytest.mark.parametrize(("text", "changes"), WRONG, ids=[text[:30] for text, _ in WRONG])
def test_errors_use_torchs_names(text: str, changes: dict[str, Any]) -> None:
    q, k, v = arguments()
    given = {"query": q, "key": k, "value": v, "cu_seq_q": CU_Q, "cu_seq_k": CU_K, "max_q": 7, "max_k": 9, "enable_gqa": True, **changes}
    with pytest.raises(ValueError, match=r"^varlen_attn\(\): " + text):
        varlen_attn(**given)
    out = np.zeros((16, 4, 5))
    with pytest.raises(ValueError, match=r"^varlen_attn_backward\(\): "):
        varlen_attn_backward(out, out=out, lse=np.zeros((4, 16)), **given)
