"""Multi-head attention by float64 formulas, and its arguments drawn at random."""
from __future__ import annotations

from typing import Any

import numpy as np

from fastattn.compat.multi_head import (
    multi_head_attention,
)
from tests.tools.formulas import Array, normal
from tests.tools.problems import NUMPY

LENGTHS = (3, 0, 7, 1, 17)
CU = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
MASKS = {0: lambda B, H, T: (T, T), 1: lambda B, H, T: (B, T), 2: lambda B, H, T: (B, H, T, T)}


def drawn(dtype: str, *shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    return [x.astype(NUMPY[dtype]) for x in normal(*shapes, seed=seed)]


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def split(x: Array, num_heads: int) -> Array:
    """(B, T, 3 * D) -> (3, B, num_heads, T, head_dim)."""
    return x.reshape(*x.shape[:2], 3, num_heads, x.shape[-1] // (3 * num_heads)).transpose(2, 0, 3, 1, 4)


def factors(head_dim: int) -> Array:
    return np.array([head_dim**-0.5, 1.0, 1.0]).reshape(3, 1, 1, 1, 1)


class Drawn:
    """Arguments of one call as float64 arrays: `inputs` are query, key, value, of which `same` are one array."""

    def __init__(self, seed: int, B: int, T: int, heads: int, dim: int, same: int, kind: int | None) -> None:
        D = heads * dim
        x = normal(*[(B, T, D)] * 3, (3 * D, D), (3 * D,), (D, D), (D,), seed=seed)
        self.inputs = {3: [x[0]] * 3, 2: [x[0], x[1], x[1]], 1: x[:3]}[same]
        self.weights = [x[3] / np.sqrt(D), x[4], x[5] / np.sqrt(D), x[6]]
        self.heads, self.width, self.kind, self.mask = heads, D, kind, None
        if kind is not None:
            self.mask = np.random.default_rng(seed).random(MASKS[kind](B, heads, T)) < 0.3
            if kind == 1:
                self.mask[:, 0] = False
            else:                                           # each query attends itself
                self.mask[..., np.arange(T), np.arange(T)] = False

    def arrays(self, convert: Any) -> tuple[list[Any], list[Any]]:
        """(inputs, weights) converted, one array as one array."""
        inputs = [convert(self.inputs[0])]
        for before, x in zip(self.inputs, self.inputs[1:], strict=False):
            inputs.append(inputs[-1] if x is before else convert(x))
        return inputs, [convert(x) for x in self.weights]

    def call(self, convert: Any = lambda x: x, **options: Any) -> Any:
        inputs, weights = self.arrays(convert)
        options = {"need_weights": True, "average_attn_weights": True, **options}
        return multi_head_attention(*inputs, self.width, self.heads, *weights, self.mask, options.pop("need_weights"),
                                    options.pop("average_attn_weights"), self.kind, **options)


def formula(query: Array, key: Array, value: Array, W: Array, b: Array, P: Array, pb: Array, heads: int,
            hidden: Any = False) -> tuple[Array, Array]:
    """(out, weights (B, heads, T, T)); hidden broadcasts to the weights, True = may not attend."""
    D = query.shape[-1]
    q, k, v = ((x @ W[n * D:(n + 1) * D].T + b[n * D:(n + 1) * D]).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
               for n, x in enumerate((query, key, value)))
    scores = np.where(hidden, -np.inf, q @ k.swapaxes(-1, -2) / np.sqrt(D // heads))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e300))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    return (weights @ v).swapaxes(1, 2).reshape(query.shape) @ P.T + pb, weights


def hidden_of(d: Drawn) -> Any:
    return False if d.mask is None else d.mask[:, None, None] if d.kind == 1 else d.mask
