"""The exact result of some parts of a problem, and the error of a result.

A part is one key head of one sequence with its group of query heads: the first and the last. Small parts are computed
by fastattn's reference, in float64. For large ones that would take minutes: they are computed by the plain formula in
float32, which is enough to judge 16-bit results, and finds gross faults in float32 ones. Of the largest problems only
the first and the last rows of the forward are computed.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastattn

from .arrays import Array
from .implementations import Inputs, Results
from .shape import Shape, visible

FLOAT64_PAIRS = 1 << 22         # scored pairs of all parts: the reference takes 0.3 us each forward, 0.9 us backward
FLOAT32_PAIRS = 1 << 29         # 30 ns each; beyond: only the first and the last rows of the forward
CHUNK = 1 << 21                 # scores that are in memory at a time


class Part(NamedTuple):
    sequence: int
    head_k: int


@dataclass(frozen=True, slots=True)
class Exact:
    """Results of the parts; `rows` are those of out that were computed. precision: "float64", "float32", or "" where nothing was."""

    precision: str
    rows: Array
    found: list[Results]

    def error(self, shape: Shape, results: Results) -> float | None:
        """Largest difference of any result, relative to the largest element of that result. NaN counts as infinite."""
        if not self.precision:
            return None
        worst = 0.0
        for part, right in zip(parts(shape), self.found, strict=True):
            for name, exact in right.items():
                got = cut(shape, part, name, results[name]).astype(np.float64)
                difference = np.abs((got[self.rows] if name == "out" else got) - exact)
                worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max() / np.abs(exact).max()))
        return worst

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"{name} {n}": array for n, right in enumerate(self.found) for name, array in right.items()}
        np.savez(path, precision=np.array(self.precision), rows=self.rows, **arrays)

    @classmethod
    def load(cls, path: Path) -> Exact:
        with np.load(path) as file:
            found: list[Results] = []
            for key in (key for key in file.files if " " in key):
                name, _, n = key.partition(" ")
                found += [{} for _ in range(int(n) + 1 - len(found))]
                found[int(n)][name] = file[key]
            return cls(str(file["precision"]), file["rows"], found)


def parts(shape: Shape) -> list[Part]:
    return list(dict.fromkeys([Part(0, 0), Part(shape.batch - 1, shape.num_heads_k - 1)]))


def cut(shape: Shape, part: Part, name: str, x: Array) -> Array:
    """A part of an array of the whole problem: (rows, heads, head_dim)."""
    group = shape.num_heads // shape.num_heads_k
    heads = slice(part.head_k, part.head_k + 1) if name in ("k", "v", "dk", "dv") else slice(part.head_k * group, (part.head_k + 1) * group)
    return x[part.sequence, :, heads]


def exact(shape: Shape, x: Inputs) -> Exact:
    pairs = len(parts(shape)) * (shape.num_heads // shape.num_heads_k) * visible(shape.seqlen_q, shape.seqlen_k, shape.causal)
    rows = np.arange(shape.seqlen_q)
    if pairs <= FLOAT64_PAIRS:
        return Exact("float64", rows, [_part(shape, x, part, rows, "float64", reference) for part in parts(shape)])
    if pairs > FLOAT32_PAIRS:
        if shape.backward:
            return Exact("", rows, [])
        few = max(1, CHUNK // shape.seqlen_k)
        rows = np.unique([*rows[:few], *rows[-few:]])
    return Exact("float32", rows, [_part(shape, x, part, rows, "float32", formula) for part in parts(shape)])


# ---------------------------------------------------------------- some rows of a part: (q, k, v, dout, causal) -> out, dq, dk, dv
Rows = Callable[[Array, Array, Array, Array | None, bool], tuple[Array, ...]]


def reference(q: Array, k: Array, v: Array, dout: Array | None, causal: bool) -> tuple[Array, ...]:
    """By fastattn's reference. Arrays are (rows, heads, head_dim). Without dout only out."""
    options: Any = {"causal": causal, "engine": "reference"}
    out, lse = fastattn.attention(q[None], k[None], v[None], return_lse=True, **options)
    if dout is None:
        return (out[0],)
    grads = fastattn.attention_backward(dout[None], q[None], k[None], v[None], out, lse, **options)
    return out[0], grads.dq[0], grads.dk[0], grads.dv[0]


def formula(q: Array, k: Array, v: Array, dout: Array | None, causal: bool) -> tuple[Array, ...]:
    """By matrix products and a softmax in the precision of the arrays, which have one key head."""
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    scale = q.dtype.type(1 / math.sqrt(q.shape[2]))
    S = (q * scale) @ k.swapaxes(1, 2)
    if causal:
        last = np.arange(S.shape[1])[:, None] + S.shape[2] - S.shape[1]
        np.copyto(S, -np.inf, where=np.arange(S.shape[2]) > last)
    row_max = S.max(axis=2, keepdims=True, initial=-np.inf)
    P = np.exp(S - np.where(np.isinf(row_max), 0, row_max))
    row_sum = P.sum(axis=2, keepdims=True)
    P /= np.where(row_sum == 0, 1, row_sum)
    out = P @ v
    if dout is None:
        return (out.swapaxes(0, 1),)
    dout = dout.swapaxes(0, 1)
    delta = (dout * out).sum(axis=2, keepdims=True)
    dS = P * (dout @ v.swapaxes(1, 2) - delta) * scale
    dk, dv = ((left.swapaxes(1, 2) @ right).sum(axis=0, keepdims=True) for left, right in ((dS, q), (P, dout)))
    return tuple(x.swapaxes(0, 1) for x in (out, dS @ k, dk, dv))


def _chunks(shape: Shape, rows: Array) -> Iterator[tuple[slice, int]]:
    """Rows that are computed together, and how many keys they are given.

    Under a causal mask these end with the key of the last row, so that the diagonal, which is bottom-right, is where it was.
    """
    group = shape.num_heads // shape.num_heads_k
    step = max(1, CHUNK // (group * shape.seqlen_k))
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        for start in range(int(run[0]), int(run[-1]) + 1, step):
            stop = min(start + step, int(run[-1]) + 1)
            yield slice(start, stop), max(0, stop + shape.seqlen_k - shape.seqlen_q) if shape.causal else shape.seqlen_k


def _part(shape: Shape, x: Inputs, part: Part, rows: Array, dtype: str, compute: Rows) -> Results:
    q, k, v, dout = (cut(shape, part, name, getattr(x, name)).astype(dtype) for name in ("q", "k", "v", "dout"))
    outs, dqs, dk, dv = [], [], np.zeros_like(k), np.zeros_like(v)
    for chunk, keys in _chunks(shape, rows):
        out, *grads = compute(q[chunk], k[:keys], v[:keys], dout[chunk] if shape.backward else None, shape.causal)
        outs.append(out)
        if shape.backward:
            dqs.append(grads[0])
            dk[:keys] += grads[1]
            dv[:keys] += grads[2]
    return {"dq": np.concatenate(dqs), "dk": dk, "dv": dv} if shape.backward else {"out": np.concatenate(outs)}
