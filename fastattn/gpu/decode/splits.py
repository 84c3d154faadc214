"""Sums over the results of splits: each has a row's maximum, its sum and its columns (Milakov and Gimelshein 2018)."""
from __future__ import annotations

from typing import Any

from numba import float32, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.memory import load_f32
from ..ptx.scalar import load_chunk
from ..spec import Spec
from ..tile.softmax import make_decay


def make_add_splits(spec: Spec, AT_ONCE: int) -> Any:
    """values, maximum, total = add_splits(a, values, maximum, total, rows_at, by_row, at, by_split, splits): four columns of a row, its
    maximum and its sum, with those of `splits` splits in their order.

    rows_at, by_row: address of the first split's maximum and sum, and bytes from one split to the next
    at, by_split: the same of its four columns

    All that a thread reads of AT_ONCE splits, 8 or 16, is in flight together: a merge is a chain of latencies.
    """
    decay, load = make_decay(spec), load_chunk("float32")

    @inline
    def one(rows_at, by_row, at, by_split, n, left):
        """(maximum, sum, four columns) of split n, or of the last one."""
        n = int64(min(n, left - 1))
        rows_at, at = uint64(rows_at + uint64(n * by_row)), uint64(at + uint64(n * by_split))
        return load_f32(rows_at), load_f32(uint64(rows_at + uint64(4))), load(at, int32(1))

    @inline
    def four(rows_at, by_row, at, by_split, n, left):
        return (one(rows_at, by_row, at, by_split, n, left), one(rows_at, by_row, at, by_split, int32(n + 1), left),
                one(rows_at, by_row, at, by_split, int32(n + 2), left), one(rows_at, by_row, at, by_split, int32(n + 3), left))

    @inline
    def top_of(x):
        return max(max(x[0][0], x[1][0]), max(x[2][0], x[3][0]))

    @inline
    def add(a, sums, x, n, left, top):
        weight, c = (decay(a, x[0], top) if n < left else float32(0)), x[2]
        return (sums[0] + weight * x[1], sums[1] + weight * c[0], sums[2] + weight * c[1], sums[3] + weight * c[2], sums[4] + weight * c[3])

    @inline
    def add_four(a, sums, x, n, left, top):
        sums = add(a, add(a, sums, x[0], n, left, top), x[1], int32(n + 1), left, top)
        return add(a, add(a, sums, x[2], int32(n + 2), left, top), x[3], int32(n + 3), left, top)

    @inline
    def add_splits(a, values, maximum, total, rows_at, by_row, at, by_split, splits):
        top, left, sums = maximum, int32(splits), (total, values[0], values[1], values[2], values[3])
        while left > 0:
            w, x = four(rows_at, by_row, at, by_split, int32(0), left), four(rows_at, by_row, at, by_split, int32(4), left)
            if AT_ONCE == 16:
                y, z = four(rows_at, by_row, at, by_split, int32(8), left), four(rows_at, by_row, at, by_split, int32(12), left)
                new = max(top, max(max(top_of(w), top_of(x)), max(top_of(y), top_of(z))))
            else:
                new = max(top, max(top_of(w), top_of(x)))
            kept = decay(a, top, new)
            sums = sums[0] * kept, sums[1] * kept, sums[2] * kept, sums[3] * kept, sums[4] * kept
            sums = add_four(a, add_four(a, sums, w, int32(0), left, new), x, int32(4), left, new)
            if AT_ONCE == 16:
                sums = add_four(a, add_four(a, sums, y, int32(8), left, new), z, int32(12), left, new)
            top, left = new, int32(left - AT_ONCE)
            rows_at, at = uint64(rows_at + uint64(AT_ONCE * by_row)), uint64(at + uint64(AT_ONCE * by_split))
        return (sums[1], sums[2], sums[3], sums[4]), top, sums[0]
    return add_splits
