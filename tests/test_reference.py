"""The reference against finite differences in float64, against plain formulas, and its rules for empty rows."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.masks import block_bounds, row_bounds
from tests.tools.problems import Case, Inputs

Array = np.ndarray[Any, Any]
BASE = Case("fd", "float64", batch=2, num_heads=2, seqlen_q=5, seqlen_k=7, head_dim=3, head_dim_v=4, dlse=True)
VARIANTS = {
    "plain": BASE,
    "gqa": replace(BASE, num_heads=4, num_heads_k=2),
    "causal": replace(BASE, causal=True),
    "empty_rows": replace(BASE, seqlen_q=7, seqlen_k=4, causal=True),
    "window": replace(BASE, window=(2, 1)),
    "scale": replace(BASE, softmax_scale=1.3),
    "softcap": replace(BASE, softcap=0.8),
    "alibi": replace(BASE, alibi="batch"),
    "bias": replace(BASE, bias=(2, 2, 5, 7)),
    "bias_broadcast": replace(BASE, bias=(2, 1, 7)),
    "bias_inf": replace(BASE, bias=(2, 1, 5, 7), bias_inf=True),
    "mask": replace(BASE, mask=(2, 1, 5, 7)),
    "sinks": replace(BASE, sinks=True),
    "sinks_empty_rows": replace(BASE, seqlen_q=7, seqlen_k=4, causal=True, sinks=True),
    "dropout": replace(BASE, dropout_p=0.4),
    "dropout_1": replace(BASE, dropout_p=1.0),
    "bhsd": replace(BASE, layout="bhsd", bias=(1, 2, 5, 7)),
    "packed": replace(BASE, lengths_q=(3, 0, 4), lengths_k=(5, 2, 4), causal=True, bias=(3, 1, 4, 5)),
    "packed_seqused": replace(BASE, lengths_q=(3, 2), lengths_k=(5, 4), used_k=(2, 4), spare=2),
    "everything": replace(BASE, num_heads=4, num_heads_k=2, causal=True, window=(4, None), softcap=1.5, alibi="heads", bias=(5, 7),
                          mask=(2, 1, 1, 7), sinks=True, dropout_p=0.2),
}


def _loss(inputs: Inputs) -> float:
    """sum(dout * out) + sum(dlse * lse) over the rows that attend to some key: the backward returns its gradients."""
    out, lse = inputs.forward("reference")
    assert inputs.dlse is not None
    used = np.isfinite(lse)
    return float(np.sum(np.nan_to_num(inputs.dout) * out) + np.sum((inputs.dlse * np.where(used, lse, 0))[used]))


def _difference(x: Array, f: Callable[[], float], step: float = 1e-5) -> Array:
    """Central differences of f in each element of x, in place and restored."""
    slope = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        old = x[index]
        if np.isfinite(old):
            x[index] = old + step
            above = f()
            x[index] = old - step
            slope[index] = (above - f()) / (2 * step)
            x[index] = old
    return slope


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_finite_differences(name: str) -> None:
    inputs = replace(VARIANTS[name], name=f"fd_{name}").make()
    grads = inputs.backward(*inputs.forward("reference"), "reference")
    arguments = {"dq": inputs.args[0], "dk": inputs.args[1], "dv": inputs.args[2], "dbias": inputs.kwargs.get("bias"),
                 "dsinks": inputs.kwargs.get("sinks")}
    for grad, x in arguments.items():
        got = getattr(grads, grad)
        assert (got is None) == (x is None)
        if x is not None:
            assert got.shape == x.shape and got.dtype == x.dtype
            np.testing.assert_allclose(got, _difference(x, lambda: _loss(inputs)), rtol=1e-6, atol=1e-8, err_msg=grad)


def test_plain_formula() -> None:
    inputs = Case("formula", "float64", seqlen_q=6, seqlen_k=8, head_dim=5, head_dim_v=3).make()
    q, k, v = (x.swapaxes(1, 2) for x in inputs.args)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(5)
    P = np.exp(scores)
    out, lse = inputs.forward("reference")
    np.testing.assert_allclose(out.swapaxes(1, 2), P / P.sum(axis=3, keepdims=True) @ v, rtol=1e-12)
    np.testing.assert_allclose(lse, np.log(P.sum(axis=3)), rtol=1e-12)


def test_order_of_the_score() -> None:
    """softcap(scale * q.k), then alibi, then bias; bottom-right distances."""
    q, k = np.full((1, 2, 1, 1), 3.0), np.full((1, 3, 1, 1), 2.0)
    bias, slope = np.arange(6.0).reshape(2, 3), 0.25
    _, lse = fastattn.attention(q, k, k, softmax_scale=0.5, softcap=1.5, alibi_slopes=[slope], bias=bias, return_lse=True,
                                engine="reference")
    distance = np.array([[1, 0, 1], [2, 1, 0]])
    expected = np.log(np.exp(1.5 * np.tanh(0.5 * 6 / 1.5) - slope * distance + bias).sum(axis=1))
    np.testing.assert_allclose(lse[0, 0], expected, rtol=1e-12)


def test_empty_rows() -> None:
    inputs = Case("empty", "float64", seqlen_q=6, seqlen_k=2, causal=True, bias=(6, 2), dlse=True).make()
    out, lse = inputs.forward("reference")
    grads = inputs.backward(out, lse, "reference")
    assert (out[:, :4] == 0).all() and (lse[:, :, :4] == -np.inf).all() and np.isfinite(lse[:, :, 4:]).all()
    assert (grads.dq[:, :4] == 0).all() and (grads.dbias[:4] == 0).all()
    assert all(np.isfinite(g).all() for g in grads if g is not None)
    sinks = np.array([0.5, -2.0])
    out, lse = fastattn.attention(*inputs.args, causal=True, sinks=sinks, return_lse=True, engine="reference")
    assert (out[:, :4] == 0).all() and (lse[:, :, :4] == sinks[:, None]).all()


def test_rows_of_no_sequence_and_unused_keys() -> None:
    inputs = Case("spare", "float64", lengths_q=(3, 4), lengths_k=(5, 6), used_k=(2, 0), spare=3).make()
    out, lse = inputs.forward("reference")
    grads = inputs.backward(out, lse, "reference")
    assert (out[3:] == 0).all() and (lse[:, 3:] == -np.inf).all()
    assert (grads.dq[3:] == 0).all() and (grads.dk[2:] == 0).all() and (grads.dv[2:] == 0).all()
    assert np.isfinite(grads.dk).all()


def test_seqused_k_equals_a_shorter_sequence() -> None:
    inputs = Case("used", "float64", lengths_q=(4, 5), lengths_k=(9, 8), used_k=(6, 8), causal=True, alibi="heads").make()
    q, k, v, cu_q, _ = inputs.args
    cut, cu = np.r_[0:6, 9:17], np.array([0, 6, 14])
    kwargs = {name: x for name, x in inputs.kwargs.items() if name != "seqused_k"}
    expected = fastattn.attention_varlen(q, k[cut], v[cut], cu_q, cu, **kwargs, engine="reference")
    np.testing.assert_array_equal(inputs.forward("reference")[0], expected)


def test_merge_states() -> None:
    inputs = Case("merge", "float64", seqlen_q=9, seqlen_k=20, causal=True).make()
    q, k, v = inputs.args
    whole_out, whole_lse = fastattn.attention(q, k, v, return_lse=True, engine="reference")
    parts = [fastattn.attention(q, k[:, a:b], v[:, a:b], return_lse=True, engine="reference") for a, b in ((0, 3), (3, 3), (3, 20))]
    parts[1][0][...] = np.nan                                   # saw nothing: what it holds does not matter
    out, lse = fastattn.merge_states([p[0] for p in parts], [p[1] for p in parts])
    np.testing.assert_allclose(out, whole_out, rtol=1e-12)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-12)
    out, lse = fastattn.merge_states([parts[1][0]] * 2, [parts[1][1]] * 2)
    assert (out == 0).all() and (lse == -np.inf).all()
    swapped = fastattn.merge_states([p[0].swapaxes(1, 2) for p in parts], [p[1] for p in parts], layout="bhsd")[0]
    np.testing.assert_allclose(swapped.swapaxes(1, 2), whole_out, rtol=1e-12)
    thd, thd_lse = fastattn.merge_states([p[0][0] for p in parts], [p[1][0] for p in parts], layout="thd")
    np.testing.assert_allclose(thd, whole_out[0], rtol=1e-12)
    np.testing.assert_allclose(thd_lse, whole_lse[0], rtol=1e-12)


@pytest.mark.parametrize("left, right", [(None, None), (None, 0), (3, None), (0, 0), (5, 2), (40, 1)])
@pytest.mark.parametrize("top_left", [False, True])
def test_block_bounds_follow_row_bounds(left: int | None, right: int | None, top_left: bool) -> None:
    """Skipped blocks hold no unmasked pair, full blocks no masked one."""
    for seqlen_q, seqlen_k in ((20, 20), (7, 33), (33, 7), (16, 1), (5, 0)):
        for first in range(0, seqlen_q, 6):
            last = min(first + 6, seqlen_q)
            visible = np.zeros((last - first, -(-seqlen_k // 8) * 8), bool)
            for row in range(first, last):
                lo, hi = row_bounds(row, seqlen_q, seqlen_k, left, right, top_left)
                visible[row - first, lo:hi] = True
            n_min, full_min, full_max, n_max = block_bounds(first, last, 8, seqlen_q, seqlen_k, left, right, top_left)
            assert n_min <= full_min <= full_max <= n_max
            for n in range(visible.shape[1] // 8):
                block = visible[:, n * 8:n * 8 + 8]
                assert n_min <= n < n_max or not block.any()
                assert not full_min <= n < full_max or block.all()
