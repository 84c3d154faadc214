"""The structural mask on the device: row_bounds of a query row, block_bounds of a tile of rows, query_bounds of a tile of keys.

They are masks.py's functions of the same names, with the same half-open ranges [first, last). tests/gpu/test_backward_plan.py compares
the two.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32
from ..spec import FAR, Spec
from .fragments import keep_below, keep_from, keep_interval


class TwoIntervals(NamedTuple):
    """The unmasked columns [lo, hi) of each of a thread's two rows."""

    lo0: Any
    hi0: Any
    lo1: Any
    hi1: Any


@inline
def diagonal_of(a, seqlen_q, seqlen_k):
    """The key on the diagonal of row 0, from which the limits count. One that the call gives is part of the limits (spec._limit)."""
    return int32(0) if a.top_left != 0 else int32(seqlen_k - seqlen_q)


@inline
def alibi_from(a, seqlen_q, seqlen_k):
    """The key on the diagonal of row 0, from which ALiBi counts: one that the call gives is here."""
    return int32(a.alibi_diagonal) if a.top_left != 0 else int32(seqlen_k - seqlen_q)


def make_diagonals(spec: Spec) -> tuple[Any, Any]:
    """(diagonal_of, alibi_from) with the batch entry: packed sequences may each have a diagonal of their own. Without ALiBi, alibi_from's
    result is not used."""
    ALIBI = spec.alibi is not None

    @inline
    def of_call(a, batch, seqlen_q, seqlen_k):
        return diagonal_of(a, seqlen_q, seqlen_k)

    @inline
    def alibi_of_call(a, batch, seqlen_q, seqlen_k):
        if ALIBI:
            return alibi_from(a, seqlen_q, seqlen_k)
        else:
            return int32(0)

    @inline
    def of_sequence(a, batch, seqlen_q, seqlen_k):
        """Rows of no sequence have the last one's. The low word of an integer is at its address."""
        given = load_b32(uint64(a.diagonals + min(batch, a.batch - 1) * a.diagonals_step))
        return int32(min(max(given, -FAR), FAR))
    return (of_sequence, of_sequence) if spec.diagonals else (of_call, alibi_of_call)


def make_row_bounds(spec: Spec) -> Any:
    """row_bounds(a, row, diagonal, seqlen_k) -> (lo, hi), with the limits that the Spec has."""
    LEFT, RIGHT = spec.left, spec.right

    @inline
    def row_bounds(a, row, diagonal, seqlen_k):
        """Query row `row` attends keys [lo, hi). Its diagonal is key row + diagonal. Rows past the end get bounds that are never used."""
        lo = int32(0)
        hi = int32(seqlen_k)
        if LEFT:
            lo = int32(min(max(row + diagonal - a.left, 0), seqlen_k))
        if RIGHT:
            hi = int32(min(max(row + diagonal + a.right + 1, 0), seqlen_k))
        return lo, int32(max(lo, hi))
    return row_bounds


def make_intervals(spec: Spec) -> Any:
    """intervals(a, row, diagonal, seqlen_k) -> TwoIntervals of a thread's rows, `row` and row + 8."""
    row_bounds = make_row_bounds(spec)

    @inline
    def intervals(a, row, diagonal, seqlen_k):
        lo0, hi0 = row_bounds(a, row, diagonal, seqlen_k)
        lo1, hi1 = row_bounds(a, int32(row + 8), diagonal, seqlen_k)
        return TwoIntervals(lo0, hi0, lo1, hi1)
    return intervals


def make_bounds(spec: Spec, BLOCK_N: int) -> tuple[Any, Any]:
    """(row_bounds, block_bounds) with the limits that the Spec has."""
    row_bounds, LIMITED = make_row_bounds(spec), spec.left or spec.right

    @inline
    def block_bounds(a, first_row, last_row, diagonal, seqlen_k):
        """(n_min, full_min, full_max, n_max) for query rows [first_row, last_row): see masks.block_bounds.

        There is always at least one block, so that kernels have no empty loop. If the mask leaves none of its keys, the block gives
        out 0 and lse -inf.
        """
        lo_first, hi_first = row_bounds(a, first_row, diagonal, seqlen_k)
        if LIMITED:
            lo_last, hi_last = row_bounds(a, int32(last_row - 1), diagonal, seqlen_k)
        else:       # all rows are alike
            lo_last, hi_last = lo_first, hi_first
        n_max = int32(max(divide(int32(hi_last + BLOCK_N - 1), BLOCK_N), 1))
        n_min = int32(min(divide(lo_first, BLOCK_N), n_max - 1))
        full_min = int32(min(max(divide(int32(lo_last + BLOCK_N - 1), BLOCK_N), n_min), n_max))
        full_max = int32(min(max(divide(hi_first, BLOCK_N), full_min), n_max))
        return n_min, full_min, full_max, n_max

    return row_bounds, block_bounds


def make_keep(spec: Spec) -> Any:
    """keep(acc_s, intervals, column): scores inside the TwoIntervals of the thread's rows, others -inf. `column` is its first column."""
    LEFT = spec.left

    @inline
    def keep(acc_s, intervals, column):
        lo0, hi0, lo1, hi1 = intervals
        if LEFT:
            return keep_interval(acc_s, lo0 - column, hi0 - column, lo1 - column, hi1 - column)
        else:
            return keep_below(acc_s, hi0 - column, hi1 - column)
    return keep


def make_query_bounds(spec: Spec, BLOCK_M: int) -> Any:
    """query_bounds(a, first_key, last_key, diagonal, seqlen_q) -> (m_min, full_min, full_max, m_max).

    For keys [first_key, last_key), all below seqlen_k: see masks.query_bounds. If no row attends any of the keys, all four are equal:
    the kernel's loop is empty.
    """
    LEFT, RIGHT = spec.left, spec.right

    @inline
    def query_bounds(a, first_key, last_key, diagonal, seqlen_q):
        last, first, full_first, end, full_end = int32(last_key - 1), int32(0), int32(0), int32(seqlen_q), int32(seqlen_q)
        if RIGHT:
            first = int32(min(max(first_key - diagonal - a.right, 0), seqlen_q))
            full_first = int32(min(max(last - diagonal - a.right, 0), seqlen_q))
        if LEFT:
            end = int32(min(max(last + 1 - diagonal + a.left, 0), seqlen_q))
            full_end = int32(min(max(first_key + 1 - diagonal + a.left, 0), seqlen_q))
        m_min = divide(first, BLOCK_M)
        m_max = int32(max(divide(int32(end + BLOCK_M - 1), BLOCK_M), m_min)) if first < end else m_min
        full_min = int32(min(max(divide(int32(full_first + BLOCK_M - 1), BLOCK_M), m_min), m_max))
        full_max = int32(min(max(divide(full_end, BLOCK_M), full_min), m_max))
        return m_min, full_min, full_max, m_max

    return query_bounds


def make_key_bounds(spec: Spec, BLOCK_M: int) -> tuple[Any, Any, Any, Any]:
    """(key_bounds, limits_of, keep, alibi_from): the mask of kernels that own keys and loop over blocks of BLOCK_M queries, with transposed
    scores."""
    LEFT, RIGHT = spec.left, spec.right
    query_bounds, (diagonal_of, alibi_from) = make_query_bounds(spec, BLOCK_M), make_diagonals(spec)

    @inline
    def key_bounds(a, batch, first, count, seqlen_q, seqlen_k):
        """query_bounds of `count` keys from `first`, some of which may not exist: then no block is full. If none exists, the loop is
        empty."""
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        m_min, full_min, full_max, m_max = query_bounds(a, first, min(first + count, seqlen_k), diagonal, seqlen_q)
        if first + count > seqlen_k:
            full_max = full_min
        if first >= seqlen_k:
            m_max = m_min
        return m_min, full_min, full_max, m_max

    @inline
    def interval(a, key, diagonal, seqlen_k):
        """The queries [lo, hi) that attend a key. For a key past the end the interval is empty."""
        lo, hi = int32(-FAR), int32(FAR)
        if RIGHT:
            lo = int32(key - diagonal - a.right)
        if LEFT:
            hi = int32(key - diagonal + a.left + 1)
        return int32(FAR) if key >= seqlen_k else lo, hi

    @inline
    def limits_of(a, batch, key, seqlen_q, seqlen_k):
        """TwoIntervals of a thread's keys, `key` and key + 8."""
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        lo0, hi0 = interval(a, key, diagonal, seqlen_k)
        lo1, hi1 = interval(a, int32(key + 8), diagonal, seqlen_k)
        return TwoIntervals(lo0, hi0, lo1, hi1)

    @inline
    def keep(acc_s, limits, query):
        """Transposed scores inside the limits, others -inf. `query` is the thread's first query."""
        lo0, hi0, lo1, hi1 = limits
        if LEFT:
            return keep_interval(acc_s, int32(lo0 - query), int32(hi0 - query), int32(lo1 - query), int32(hi1 - query))
        else:
            return keep_from(acc_s, int32(lo0 - query), int32(lo1 - query))

    return key_bounds, limits_of, keep, alibi_from
