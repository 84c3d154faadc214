"""Requests that share their first keys (cascade attention, Ye et al. 2024): the split-key kernel runs twice, first over those keys.

Its blocks have rows of all requests, so a key of the prefix is loaded once for as many rows as a block has, and not once for each request.
The keys are split over blocks, which store a row's results with its maximum and its sum. The second launch merges those of all splits with
what it has of the row: the keys behind the prefix are one more split, and sinks, the log of the sum and scales of values are its own. So
the many blocks of the second launch share the merge. A last block of the first one would read all splits of its 64 rows alone.
"""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import store_f32
from ..spec import Spec
from ..tile.requests import make_request_at, make_request_of_row
from .splits import make_add_splits


def of_shared(spec: Spec) -> tuple[bool, bool]:
    """Whether a kernel has the keys that requests share, and whether it has those behind them."""
    return spec.shared == "prefix", spec.shared == "behind"


def make_shared_keys(spec: Spec) -> Any:
    """shared_keys(a): how many keys are shared, whole pages that the first request has. They are where its pages are."""
    request_at = make_request_at(spec.packed)

    @inline
    def shared_keys(a):
        keys = int32(min(request_at(a, int32(0)).keys, a.shared))
        return int32(divide(keys, a.page_size) * a.page_size)
    return shared_keys


def make_shared(spec: Spec) -> tuple[Any, Any]:
    """(put_prefix, with_prefix) of four columns of a row, its maximum and its sum.

    put_prefix(a, place, row, head, column, values, maximum, total): store them, of a split. row: of all requests' rows
    values, maximum, total = with_prefix(a, place, row, head, column, values, maximum, total): merge them with those of all splits of the
        prefix, of which eight are in flight. row: of the request's
    """
    HEAD_DIM_V, PACKED, add_splits = spec.head_dim_v, spec.packed, make_add_splits(spec, 8)

    @inline
    def lines_of(a):
        """Rows of all requests and heads."""
        return int64(a.total_q if PACKED else a.batch * a.seqlen_q) * a.num_heads

    @inline
    def rows_at(a, line):
        return uint64(a.shared_rows + uint64(line * 8))

    @inline
    def values_at(a, line, column):
        return uint64(a.shared_part + uint64((line * HEAD_DIM_V + column) * 4))

    @inline
    def put_prefix(a, place, row, head, column, values, maximum, total):
        line = int64(place.split) * lines_of(a) + int64(row) * a.num_heads + head
        at = values_at(a, line, column)
        for n in range(4):
            store_f32(uint64(at + uint64(4 * n)), values[n])
        if column == 0:
            store_f32(rows_at(a, line), maximum)
            store_f32(uint64(rows_at(a, line) + uint64(4)), total)

    @inline
    def with_prefix(a, place, row, head, column, values, maximum, total):
        first = int64(place.q_start) if PACKED else int64(place.batch) * a.seqlen_q
        line = int64((first + row) * a.num_heads + head)
        return add_splits(a, values, maximum, total, rows_at(a, line), lines_of(a) * 8, values_at(a, line, column),
                          lines_of(a) * (HEAD_DIM_V * 4), a.shared_splits)
    return put_prefix, with_prefix


def make_owner_of(spec: Spec) -> Any:
    """owner_of(a, i) -> (request, row, rows, keys) of row i of all requests' rows. Of a row of none: request a.batch, and no keys."""
    PACKED, request_at, request_of_row = spec.packed, make_request_at(spec.packed), make_request_of_row(spec.packed)

    @inline
    def owner_of(a, i):
        batch = request_of_row(a, i)
        q_start, rows, _, keys = request_at(a, batch)
        if not PACKED:
            q_start = int32(batch * a.seqlen_q)
        return batch, int32(i - q_start), rows, keys
    return owner_of
