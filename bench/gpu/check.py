"""Are the results right: float64 attention of some of the heads, written out, and the error of each implementation.

A part is one sequence and one key head with its group of query heads. With dropout only the first rows are checked,
because the mask comes from the library's slow NumPy definition.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..case import Case
from .rivals import SEED, Inputs, Tensors, distances, structural

DROPOUT_ROWS = 128
CHUNK = 1 << 27     # scores of a part that are in memory at a time
LSE_LIMIT = 2e-6  # relative
Errors = dict[str, float]


class Part(NamedTuple):
    sequence: int
    head_k: int


def parts(case: Case) -> list[Part]:
    """The first and the last sequence and head; with dropout only the first. dbias is not checked: it sums over all sequences."""
    last = Part(case.batch - 1, case.shape_k[1] - 1)
    return [Part(0, 0)] if case.dropout_p or last == (0, 0) else [Part(0, 0), last]


def cut(case: Case, x: Tensors, part: Part) -> Tensors:
    """A part of named results or inputs: (heads, rows, head_dim), lse (heads, rows)."""
    group = case.num_heads // case.shape_k[1]
    queries, keys = slice(part.head_k * group, (part.head_k + 1) * group), slice(part.head_k, part.head_k + 1)
    ends = (sum(case.lengths[:part.sequence]), sum(case.lengths[:part.sequence + 1])) if case.lengths else (0, 0)
    found: Tensors = {}
    for name, tensor in x.items():
        heads = keys if name in ("k", "v", "dk", "dv") else queries
        if name == "lse":
            rows = tensor[:, slice(*ends)] if case.lengths else tensor[part.sequence]
            found[name] = rows[heads]
        else:
            rows = tensor[slice(*ends)] if case.lengths else tensor[part.sequence]
            found[name] = rows[:, heads].transpose(0, 1)
    return found


def reference(case: Case, x: Inputs, part: Part, emulated: bool = False) -> Tensors:
    """out and lse of a part, or dq, dk, dv, in float64.

    emulated: as a 16-bit kernel computes, for cases that torch's flash backend lacks. Scores are float32, P and dS
    are rounded to the input's dtype before the GEMMs that read them, sums are float32, results are rounded.
    """
    import torch

    piece = cut(case, {"q": x.q, "k": x.k, "v": x.v, "dout": x.dout}, part)
    group, length = piece["q"].shape[:2]
    end = min(length, DROPOUT_ROWS) if case.dropout_p else length
    step = end if case.dropout_p else max(1, CHUNK // max(1, group * piece["k"].shape[1]))
    found = [_rows(case, x, part, piece, slice(start, min(start + step, end)), emulated) for start in range(0, end, max(1, step))]
    whole = {name: sum(chunk[name] for chunk in found) if name in ("dk", "dv") else torch.cat([chunk[name] for chunk in found], 1)
             for name in found[0]}
    return {name: value.to(x.q.dtype) if emulated and name != "lse" else value for name, value in whole.items()}


def _rows(case: Case, x: Inputs, part: Part, piece: Tensors, rows: slice, emulated: bool) -> Tensors:
    """out and lse of some query rows of a part, or their dq and what they add to dk and dv."""
    import torch

    kind = torch.float32 if emulated else torch.float64
    q, k, v = (tensor.to(kind).requires_grad_(case.alone) for tensor in (piece["q"][:, rows], piece["k"], piece["v"]))
    with torch.set_grad_enabled(case.alone):
        scores = _scores(case, x, part, _product(q, k, x.q.dtype if emulated else None), rows)
        row_max = scores.amax(-1, keepdim=True)
        if x.sinks is not None:
            sink = x.sinks[_heads(case, part)].to(kind).reshape(-1, 1, 1)
            row_max = torch.maximum(row_max, sink)
        exps = torch.exp(scores - row_max)
        row_sum = exps.sum(-1, keepdim=True) + (torch.exp(sink - row_max) if x.sinks is not None else 0)
        if case.dropout_p:
            exps = exps * _keep(case, part, exps)
        if emulated:
            exps = exps + (exps.to(x.q.dtype).to(kind) - exps).detach()  # rounds the value but not its gradient
        out = exps @ v / row_sum
        if not case.alone:
            return {"out": out, "lse": (row_max + row_sum.log()).squeeze(-1)}
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), piece["dout"][:, rows].to(kind))
    return {"dq": dq} if case.dropout_p else {"dq": dq, "dk": dk, "dv": dv}


def _product(q: Any, k: Any, dtype: Any) -> Any:
    """q @ k.T. With a dtype, its incoming gradient is rounded to it."""
    product = q @ k.transpose(1, 2)
    if dtype is not None and product.requires_grad:
        product.register_hook(lambda gradient: gradient.to(dtype).to(gradient.dtype))
    return product


def _heads(case: Case, part: Part) -> slice:
    group = case.num_heads // case.shape_k[1]
    return slice(part.head_k * group, (part.head_k + 1) * group)


def _scores(case: Case, x: Inputs, part: Part, product: Any, chunk: slice) -> Any:
    """softcap(scale * q.k) + alibi + bias of some rows of a part, masked pairs -inf."""
    import torch

    scores = product / math.sqrt(case.head_dim)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    keys = product.shape[2]
    length = case.lengths[part.sequence] if case.lengths else case.seqlen
    distance = distances(chunk, length, keys, product.device)
    if x.slopes is not None:
        scores = scores - x.slopes[_heads(case, part)].to(scores.dtype).reshape(-1, 1, 1) * distance.abs()
    if x.bias is not None:
        scores = scores + _plane(x.bias, part)[_heads(case, part), chunk].to(scores.dtype)
    seen = structural(case, distance)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if x.mask is None:
        return scores
    mask = _plane(x.mask, part)[0]
    return scores.masked_fill(~(mask if mask.shape[0] == 1 else mask[chunk]), -math.inf)


def _plane(x: Any, part: Part) -> Any:
    """The part's sequence of a bias or mask that may be one for all."""
    return x[part.sequence if x.shape[0] > 1 else 0]


def _keep(case: Case, part: Part, like: Any) -> Any:
    """The scaled dropout mask of the first rows of a part of sequence 0."""
    import torch

    import fastattn

    keep = fastattn.dropout_mask(1, case.num_heads, like.shape[1], like.shape[2], dropout_p=case.dropout_p, seed=SEED)
    scale = 1 / (1 - round(case.dropout_p * 65536) / 65536)
    return torch.from_numpy(keep[0, _heads(case, part)]).to(like.device, like.dtype) * scale


class Reference:
    """The references of a case's parts, computed once."""

    def __init__(self, case: Case, x: Inputs) -> None:
        self.case, self.x = case, x
        self.parts = parts(case)
        self.right = [reference(case, x, part) for part in self.parts]

    def errors(self, found: Tensors) -> Errors:
        """Relative error (Frobenius, all parts together) of each named result that the reference has. NaN if a result has NaN."""
        names = [name for name in self.right[0] if name in found]
        pieces = [cut(self.case, {name: found[name] for name in names}, part) for part in self.parts]
        return {name: relative((piece[name], right[name]) for piece, right in zip(pieces, self.right, strict=True)) for name in names}

    def emulated_errors(self) -> Errors:
        """The errors of a 16-bit kernel's arithmetic."""
        found = [reference(self.case, self.x, part, emulated=True) for part in self.parts]
        return {name: relative((piece[name], right[name]) for piece, right in zip(found, self.right, strict=True)) for name in found[0]}


def relative(pairs: Iterable[tuple[Any, Any]]) -> float:
    distance = size = 0.0
    for found, right in pairs:
        found = found[:, :right.shape[1]].to(right.dtype)
        distance += float(((found - right) ** 2).sum())
        size += float((right ** 2).sum())
    return math.sqrt(distance / size)


def ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """The worst of our errors over theirs, without lse. NaN stays NaN. None if there is nothing to compare."""
    common = [ours[name] / theirs[name] for name in ours if name in theirs and name != "lse" and theirs[name] > 0]
    if any(math.isnan(value) for value in common):
        return math.nan
    return max(common, default=None)
