"""Attention and its gradients by plain float64 formulas, which the tests of compat compare with."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Array = np.ndarray[Any, Any]


def formula(q: Array, k: Array, v: Array, visible: Any = True, bias: Any = 0.0, scale: float | None = None, softcap: float = 0.0,
            keep: Any = 1.0) -> Array:
    """softmax(softcap(scale * q @ k.T) + bias, over the visible keys) * keep @ v
    in float64, (..., L, E); 0 for fully masked rows."""
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * np.tanh(scores / softcap) + bias if softcap else scores + bias
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    P = np.exp(scores - np.where(np.isinf(peak), 0, peak))
    total = P.sum(axis=-1, keepdims=True)
    out: Array = P / np.where(total == 0, 1, total) * keep @ v
    return out


def check_gradients(loss: Callable[..., float], arrays: list[Array], grads: list[Any]) -> None:
    """The gradients of a scalar function of float64 arrays against its central differences along random directions."""
    draw, step = np.random.default_rng(0), 1e-5
    for n, (x, grad) in enumerate(zip(arrays, grads, strict=True)):
        assert grad.shape == x.shape
        for _ in range(3):
            direction = draw.standard_normal(x.shape)
            ahead, behind = ([*arrays[:n], x + sign * step * direction, *arrays[n + 1:]] for sign in (1, -1))
            slope = (loss(*ahead) - loss(*behind)) / (2 * step)
            assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-6, abs=1e-7), f"argument {n}"


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape) for shape in shapes]


LENGTHS_Q, LENGTHS_K = (3, 0, 7, 1, 5), (4, 2, 5, 0, 9)
CU_Q, CU_K = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (LENGTHS_Q, LENGTHS_K))


def visible(L: int, S: int, left: int = -1, right: int = -1) -> Array:
    """The bottom-right aligned window, (L, S), written as FlashAttention's documentation does."""
    i, j = np.arange(L)[:, None], np.arange(S)
    attended: Array = np.ones((L, S), bool)
    if left >= 0:
        attended &= j >= i + S - L - left
    if right >= 0:
        attended &= j <= i + S - L + right
    return attended


def expected(q: Array, k: Array, v: Array, left: int = -1, right: int = -1, bias: Array | None = None, slopes: Array | None = None,
             used: tuple[int, ...] = LENGTHS_K, scale: float | None = None, softcap: float = 0.0, keep: Array | None = None) -> Array:
    """Sequence by sequence. bias (N, H, L, S), slopes (H,), keep as dropout_mask gives it, already scaled."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    group = q.shape[1] // k.shape[1]
    for n, S in enumerate(used):
        rows, keys = slice(CU_Q[n], CU_Q[n + 1]), slice(CU_K[n], CU_K[n] + S)
        L = LENGTHS_Q[n]
        added: Any = 0.0 if bias is None else bias[n, :, :L, :S]
        if slopes is not None:
            added = added - slopes[:, None, None] * np.abs(np.arange(L)[:, None] + S - L - np.arange(S))
        q_n, k_n, v_n = (x.swapaxes(0, 1) for x in (q[rows], k[keys].repeat(group, axis=1), v[keys].repeat(group, axis=1)))
        kept = 1.0 if keep is None else keep[n, :, :L, :S]
        out[rows] = formula(q_n, k_n, v_n, visible(L, S, left, right), added, scale, softcap, kept).swapaxes(0, 1)
    return out


def dense(q: Array, k: Array, v: Array, left: int = -1, right: int = -1, bias: Any = 0.0, slopes: Array | None = None,
          scale: float | None = None, softcap: float = 0.0, keep: Any = 1.0) -> Array:
    """The formula for (batch, seqlen, heads, dim); slopes (heads,) or (batch, heads)."""
    L, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if slopes is not None:
        bias = bias - slopes[..., None, None] * np.abs(np.arange(L)[:, None] + S - L - np.arange(S))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k.repeat(group, axis=2), v.repeat(group, axis=2)))
    return formula(q, k, v, visible(L, S, left, right), bias, scale, softcap, keep).swapaxes(1, 2)
