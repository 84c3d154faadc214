"""The one definition of every structural mask: an interval of keys per query row."""
from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

Rows = TypeVar("Rows", int, np.ndarray[Any, Any])


def diagonal_of(row: Rows, seqlen_q: int, seqlen_k: int, top_left: bool = False, first: int | None = None) -> Rows:
    """The key on the diagonal of a query row. Masks, windows and ALiBi count from it. `first` is that of row 0, where a call gives it."""
    if first is not None:
        return row + first
    return row if top_left else row + (seqlen_k - seqlen_q)


def row_bounds(row: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None,
               top_left: bool = False, first: int | None = None) -> tuple[int, int]:
    """Keys [lo, hi) that query `row` attends. Every structural mask (causal, window, padding, tail) is this interval.

    `left` and `right` count keys from the diagonal, inclusive; None is no limit. The diagonal of row i is key
    i + seqlen_k - seqlen_q (bottom-right aligned), i when `top_left`, i + first where that is given. An empty interval
    has lo == hi.
    """
    diagonal = diagonal_of(row, seqlen_q, seqlen_k, top_left, first)
    lo = 0 if left is None else min(max(diagonal - left, 0), seqlen_k)
    hi = seqlen_k if right is None else min(max(diagonal + right + 1, 0), seqlen_k)
    return lo, max(lo, hi)


def block_bounds(first_row: int, last_row: int, block_n: int, seqlen_q: int, seqlen_k: int, left: int | None,
                 right: int | None, top_left: bool = False) -> tuple[int, int, int, int]:
    """Key blocks of `block_n` for query rows [first_row, last_row): (n_min, full_min, full_max, n_max).

    Blocks outside [n_min, n_max) are skipped, blocks in [full_min, full_max) need no mask, the others are partial.
    Holds because lo and hi of `row_bounds` never decrease with the row.
    """
    lo_first, hi_first = row_bounds(first_row, seqlen_q, seqlen_k, left, right, top_left)
    lo_last, hi_last = row_bounds(last_row - 1, seqlen_q, seqlen_k, left, right, top_left)
    n_min, n_max = lo_first // block_n, -(-hi_last // block_n)
    if lo_first >= hi_last:
        return n_min, n_min, n_min, n_min
    full_min, full_max = -(-lo_last // block_n), hi_first // block_n
    full_min = min(max(full_min, n_min), n_max)
    return n_min, full_min, min(max(full_max, full_min), n_max), n_max


def query_bounds(first_key: int, last_key: int, block_m: int, seqlen_q: int, seqlen_k: int, left: int | None,
                 right: int | None, top_left: bool = False) -> tuple[int, int, int, int]:
    """Blocks of `block_m` query rows for keys [first_key, last_key), at least one: (m_min, full_min, full_max, m_max).

    The twin of `block_bounds`: in blocks outside [m_min, m_max) no row attends any of the keys, in [full_min, full_max)
    every row attends all of them. The rows from j - right to j + left, counted from the diagonal, attend key j.
    """
    diagonal = 0 if top_left else seqlen_k - seqlen_q

    def clip(row: int) -> int:
        return min(max(row, 0), seqlen_q)
    first = 0 if right is None else clip(first_key - diagonal - right)
    end = seqlen_q if left is None else clip(last_key - diagonal + left)
    full_first = 0 if right is None else clip(last_key - 1 - diagonal - right)
    full_end = seqlen_q if left is None else clip(first_key + 1 - diagonal + left)
    m_min, m_max = first // block_m, -(-end // block_m)
    if first >= end:
        return m_min, m_min, m_min, m_min
    full_min = min(max(-(-full_first // block_m), m_min), m_max)
    return m_min, full_min, min(max(full_end // block_m, full_min), m_max), m_max
