"""Requests that share the first pages of their caches: those keys are read once for all of them (cascade attention, Ye et al. 2024).

The query rows of a group of such requests are one request of many rows over the shared keys, and each request has its other keys alone. So
decoding over a long prompt becomes a product of matrices instead of one pass over the prompt for each request. The two results are merged
as in merging.py. An lse is float64 here: of large scores the log of the sum would be lost in float32.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.dlpack import address
from ..arrays.view import View, numpy_dtype
from ..merging import merge_views
from ..problem import CacheOperands, Operands, Problem
from .plan import SHORT_M, Lengths

Integers = NDArray[np.int64]
Run = Callable[[Problem, Operands, Lengths, View, View], None]      # a call over caches, into its out and lse
# Bytes of K and V that a group need not read again, at least. Two parts and their merge cost some 1.2 ms besides. Measured, one thread, 8
# query and 2 key heads of 128, float32, without and with: 8 x 512 keys (7 MB) 1.3 and 3.0 ms, 2 x 4096 (8 MB) 4.4 and 3.9, 16 x 2048
# (63 MB) 8.3 and 5.3
LEAST_SAVED = 64 << 20


class Group(NamedTuple):
    """Requests whose first `keys` keys are in the same pages."""

    requests: Integers
    keys: int


def groups(p: Problem, o: Operands, lengths: Lengths) -> list[Group]:
    """The groups of requests that are to be computed together.

    None where a request's bits must not depend on the others (num_splits), where rows see different parts of the prefix (a limit to the
    left), where their scores depend on the distance to it (ALiBi) or on the request (scales), and where a request's rows alone are enough
    for products of matrices.
    """
    assert p.cache is not None
    given, table, used = p.cache.shared_prefix, lengths.table, lengths.used_k
    if (given == 0 or p.cache.num_splits is not None or p.batch < 2 or not lengths.page_size or p.mask.left is not None or p.score.alibi
            or any(x is not None and _differ(x.numpy()) for x in (o.q_scale, o.k_scale, o.v_scale))):
        return []
    assert table is not None and used is not None
    rows = _rows(p, lengths)
    seen = used if p.mask.right is None else np.minimum(used, used - rows + 1 + p.mask.right)       # keys of the first row
    pages = np.where((rows > 0) & (rows * p.group <= SHORT_M), np.maximum(seen, 0) // lengths.page_size, 0)
    if given is not None:
        pages = np.minimum(pages, given // lengths.page_size)
    key_bytes = p.num_heads_k * (p.head_dim + p.head_dim_v) * o.k.itemsize
    return [x for x in _alike(table, pages, lengths.page_size) if x.keys and (len(x.requests) - 1) * x.keys * key_bytes >= LEAST_SAVED]


def _differ(scale: Any) -> bool:
    """Whether requests have different scales."""
    return bool((scale != scale[:1]).any())


def _rows(p: Problem, lengths: Lengths) -> Integers:
    """Query rows of each request."""
    return np.full(p.batch, p.seqlen_q, np.int64) if lengths.cu_q is None else np.diff(lengths.cu_q)


def _alike(table: Integers, pages: Integers, page_size: int) -> list[Group]:
    """Requests with the same first page, and the pages that all of those share. pages: those of each request that may be."""
    some = np.flatnonzero(pages)
    first = table[some, 0]
    found = []
    for page in np.unique(first):
        requests = some[first == page]
        if len(requests) > 1:
            most = int(pages[requests].min())
            same = (table[requests, :most] == table[requests[0], :most]).all(axis=0)
            found.append(Group(requests, page_size * (most if same.all() else int(np.argmin(same)))))
    return found


def attend(p: Problem, o: Operands, lengths: Lengths, out: View, lse: View | None, shared: list[Group], run: Run) -> None:
    """Write the rows of all requests, with the keys of these groups computed once for all rows of a group."""
    owned = p.batch if lengths.cu_q is None else int(lengths.cu_q[-1])
    real = numpy_dtype(p.compute_dtype)
    total, top = np.zeros(p.out_shape, real), np.full(p.lse_shape, -np.inf)
    run(*_behind(p, o, lengths, shared), _view(total), _view(top))
    for group in shared:
        rows = _rows_of(p, lengths, group)
        part, part_lse = np.empty((1, len(rows[-1]), *p.out_shape[-2:]), real), np.empty((1, p.num_heads, len(rows[-1])))
        run(*_prefix(p, o, lengths, group, rows), _view(part), _view(part_lse))
        _merge(total, np.moveaxis(top, -2, -1), rows, part[0], part_lse[0])
    out.numpy()[:owned] = total[:owned]
    if lse is not None:
        lse.numpy()[...] = top


def _merge(out: Any, lse: Any, rows: tuple[Integers, ...], part: Any, part_lse: Any) -> None:
    """Merge a part (rows, heads, dim) and its lse (heads, rows) into these rows of out and of lse (..., rows, heads)."""
    merged, merged_lse = np.empty(part.shape, part.dtype), np.empty_like(part_lse)
    merge_views([_view(out[rows]), _view(part)], [_view(lse[rows].T), _view(part_lse)], _view(merged), _view(merged_lse))
    out[rows], lse[rows] = merged, merged_lse.T


def _rows_of(p: Problem, lengths: Lengths, group: Group) -> tuple[Integers, ...]:
    """The index of a group's rows in arrays like q."""
    if lengths.cu_q is None:
        return np.repeat(group.requests, p.seqlen_q), np.tile(np.arange(p.seqlen_q), len(group.requests))
    return (np.concatenate([np.arange(lengths.cu_q[b], lengths.cu_q[b + 1]) for b in group.requests]),)


def _behind(p: Problem, o: Operands, lengths: Lengths, shared: list[Group]) -> tuple[Problem, Operands, Lengths]:
    """The call over the keys behind the shared ones. Sinks are counted there."""
    assert lengths.table is not None and lengths.used_k is not None
    skipped = np.zeros(p.batch, np.int64)
    for group in shared:
        skipped[group.requests] = group.keys
    width = lengths.table.shape[1]
    columns = np.minimum(np.arange(width) + (skipped // lengths.page_size)[:, None], width - 1)
    return _of_keys(p, o, lengths, np.take_along_axis(lengths.table, columns, axis=1), lengths.used_k - skipped)


def _prefix(p: Problem, o: Operands, lengths: Lengths, group: Group, rows: tuple[Integers, ...]) -> tuple[Problem, Operands, Lengths]:
    """The call over the shared keys, which every row of the group sees."""
    assert lengths.table is not None
    q = o.q.numpy()[rows][None]
    score, mask = replace(p.score, sinks=False), replace(p.mask, left=None, right=None)
    p = replace(p, batch=1, seqlen_q=q.shape[1], total_q=None, score=score, mask=mask)
    o = replace(o, q=_view(q, o.q.dtype), sinks=None, cu_seqlens_q=None, q_scale=_one(o.q_scale), k_scale=_one(o.k_scale),
                v_scale=_one(o.v_scale))
    keys = np.array([group.keys], np.int64)
    return _of_keys(p, o, lengths._replace(longest_q=q.shape[1], cu_q=None), lengths.table[group.requests[:1]].copy(), keys)


def _of_keys(p: Problem, o: Operands, lengths: Lengths, table: Integers, keys: Integers) -> tuple[Problem, Operands, Lengths]:
    """The call with other pages, and so many keys of each request in them."""
    assert o.cache is not None
    longest = int(keys.max(initial=0))
    o = replace(o, seqused_k=_view(keys), cache=CacheOperands(_view(table)))
    page_size = lengths.page_size if longest > lengths.page_size else 0
    return replace(p, seqlen_k=longest), o, lengths._replace(longest_k=longest, used_k=keys, table=table, page_size=page_size)


def _view(x: Any, dtype: str | None = None) -> View:
    return View(address(x), x.shape, x.strides, dtype or x.dtype.name, owner=x)


def _one(scale: View | None) -> View | None:
    """A scale of all requests, as that of one."""
    return scale and replace(scale, shape=(1, *scale.shape[1:]))
