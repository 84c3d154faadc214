"""The structural mask on the device: problem.py's row_bounds, block_bounds of a tile of query rows, query_bounds of a tile of keys."""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import divide, inline
from ..spec import FAR, Spec
from .fragments import keep_below, keep_from, keep_interval


@inline
def diagonal_of(a, seqlen_q, seqlen_k):
    """The key that row 0 has on its diagonal."""
    return int32(0) if a.top_left != 0 else int32(seqlen_k - seqlen_q)


def make_bounds(spec: Spec, BLOCK_N: int) -> tuple[Any, Any]:
    """(row_bounds, block_bounds) for the limits that the Spec has."""
    LEFT, RIGHT = spec.left, spec.right

    @inline
    def row_bounds(a, row, diagonal, seqlen_k):
        """Keys [lo, hi) of a query row, whose diagonal is key row + diagonal. Rows past the end have bounds too; nobody asks."""
        lo = int32(0)
        hi = int32(seqlen_k)
        if LEFT:
            lo = int32(min(max(row + diagonal - a.left, 0), seqlen_k))
        if RIGHT:
            hi = int32(min(max(row + diagonal + a.right + 1, 0), seqlen_k))
        return lo, int32(max(lo, hi))

    @inline
    def block_bounds(a, first, last, diagonal, seqlen_k):
        """(n_min, full_min, full_max, n_max) of the rows first to last, inclusive: see problem.block_bounds.

        At least one block, so that kernels have no empty loop: one whose mask keeps nothing gives out 0 and lse -inf.
        """
        lo_first, hi_first = row_bounds(a, first, diagonal, seqlen_k)
        lo_last, hi_last = row_bounds(a, last, diagonal, seqlen_k)
        n_max = int32(max(divide(int32(hi_last + BLOCK_N - 1), BLOCK_N), 1))
        n_min = int32(min(divide(lo_first, BLOCK_N), n_max - 1))
        full_min = int32(min(max(divide(int32(lo_last + BLOCK_N - 1), BLOCK_N), n_min), n_max))
        full_max = int32(min(max(divide(hi_first, BLOCK_N), full_min), n_max))
        return n_min, full_min, full_max, n_max

    return row_bounds, block_bounds


def make_keep(spec: Spec) -> Any:
    """keep(acc_s, rows, column): scores inside the intervals rows = (lo0, hi0, lo1, hi1) of the thread's two rows, others -inf; `column`
    is its first."""
    LEFT = spec.left

    @inline
    def keep(acc_s, rows, column):
        if LEFT:
            return keep_interval(acc_s, rows[0] - column, rows[1] - column, rows[2] - column, rows[3] - column)
        else:
            return keep_below(acc_s, rows[1] - column, rows[3] - column)
    return keep


def make_query_bounds(spec: Spec, BLOCK_M: int) -> Any:
    """query_bounds(a, first_key, last_key, diagonal, seqlen_q) -> (m_min, full_min, full_max, m_max) of the keys first_key to last_key,
    inclusive and below seqlen_k: see problem.query_bounds. All four are equal where no row sees any of them: an empty loop."""
    LEFT, RIGHT = spec.left, spec.right

    @inline
    def query_bounds(a, first_key, last_key, diagonal, seqlen_q):
        first, full_first, end, full_end = int32(0), int32(0), int32(seqlen_q), int32(seqlen_q)
        if RIGHT:
            first = int32(min(max(first_key - diagonal - a.right, 0), seqlen_q))
            full_first = int32(min(max(last_key - diagonal - a.right, 0), seqlen_q))
        if LEFT:
            end = int32(min(max(last_key + 1 - diagonal + a.left, 0), seqlen_q))
            full_end = int32(min(max(first_key + 1 - diagonal + a.left, 0), seqlen_q))
        m_min = divide(first, BLOCK_M)
        m_max = int32(max(divide(int32(end + BLOCK_M - 1), BLOCK_M), m_min)) if first < end else m_min
        full_min = int32(min(max(divide(int32(full_first + BLOCK_M - 1), BLOCK_M), m_min), m_max))
        full_max = int32(min(max(divide(full_end, BLOCK_M), full_min), m_max))
        return m_min, full_min, full_max, m_max

    return query_bounds


def make_key_bounds(spec: Spec, BLOCK_M: int) -> tuple[Any, Any, Any]:
    """(key_bounds, limits_of, keep): the mask of kernels that own keys and go through blocks of BLOCK_M queries, scores transposed."""
    LEFT, RIGHT = spec.left, spec.right
    query_bounds = make_query_bounds(spec, BLOCK_M)

    @inline
    def key_bounds(a, first, count, seqlen_q, seqlen_k):
        """query_bounds of `count` keys from `first`; no block is full where some of them do not exist, none is there where none do."""
        last, diagonal = int32(min(first + count, seqlen_k) - 1), diagonal_of(a, seqlen_q, seqlen_k)
        m_min, full_min, full_max, m_max = query_bounds(a, first, last, diagonal, seqlen_q)
        if first + count > seqlen_k:
            full_max = full_min
        if first >= seqlen_k:
            m_max = m_min
        return m_min, full_min, full_max, m_max

    @inline
    def interval(a, key, diagonal, seqlen_k):
        """Queries [lo, hi) that may see a key; lo is far off where there is no such key."""
        lo, hi = int32(-FAR), int32(FAR)
        if RIGHT:
            lo = int32(key - diagonal - a.right)
        if LEFT:
            hi = int32(key - diagonal + a.left + 1)
        return int32(FAR) if key >= seqlen_k else lo, hi

    @inline
    def limits_of(a, key, seqlen_q, seqlen_k):
        """The intervals of a thread's two keys, `key` and the one 8 after it."""
        diagonal = diagonal_of(a, seqlen_q, seqlen_k)
        lo0, hi0 = interval(a, key, diagonal, seqlen_k)
        lo1, hi1 = interval(a, int32(key + 8), diagonal, seqlen_k)
        return lo0, hi0, lo1, hi1

    @inline
    def keep(acc_s, limits, query):
        """Transposed scores inside the limits, others -inf; `query` is the thread's first."""
        lo0, hi0, lo1, hi1 = limits
        if LEFT:
            return keep_interval(acc_s, int32(lo0 - query), int32(hi0 - query), int32(lo1 - query), int32(hi1 - query))
        else:
            return keep_from(acc_s, int32(lo0 - query), int32(lo1 - query))

    return key_bounds, limits_of, keep
