"""The boolean mask on the device, as words of bits (rows/mask_words.py): those of a thread's scores, and the blocks that it needs."""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..config import GROUP
from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32_if
from ..spec import FAR, Spec

GROUP_BITS = GROUP.bit_length() - 1


def make_word_tile(WIDTH: int) -> Any:
    """words = tile(pointer, by_batch, by_head, by_line, by_column, batch, head, line, column, lines, columns): those of a thread's lines.

    `line` and `column` are the thread's first; its other line is line + 8. by_column: bytes between blocks of WIDTH columns. Lines and
    blocks outside of the mask have words of 0.
    """
    @inline
    def tile(pointer, by_batch, by_head, by_line, by_column, batch, head, line, column, lines, columns):
        block = divide(int32(column), int32(WIDTH))
        at = uint64(pointer + batch * by_batch + head * by_head + line * by_line + block * by_column + 2 * (column & 6))
        inside = block * WIDTH < columns
        return (load_b32_if(at, int32(inside & (line < lines))),
                load_b32_if(uint64(at + uint64(8 * by_line)), int32(inside & (line + 8 < lines))))
    return tile


def make_needed(LINES: int, BY_KEYS: bool = False) -> Any:
    """first, end, ends = needed(a, batch, head, line, lines): the blocks in which any of LINES lines from `line` on attends anything.

    `line` is a multiple of GROUP; only the lines below `lines` exist. If no line attends anything, first >= end. ends: `end` of each
    group of lines, a tuple.
    """
    GROUPS = LINES // GROUP

    @inline
    def bounds(at, inside):
        """Of a group; nothing if it is not there."""
        return int32(load_b32_if(at, inside)) if inside != 0 else int32(FAR), load_b32_if(uint64(at + uint64(4)), inside)

    @inline
    def needed(a, batch, head, line, lines):
        by_line = int64(a.mask_col if BY_KEYS else a.mask_row)       # 16, or 0
        at = uint64(int64(a.mask) + batch * a.mask_batch + head * a.mask_head - 8 - int64(line >> GROUP_BITS) * (by_line >> 1))
        first, end = bounds(at, int32(line < lines))
        if GROUPS == 1:
            return first, end, (end,)
        first1, end1 = bounds(uint64(at - uint64(by_line >> 1)), int32(line + GROUP < lines))
        if GROUPS == 2:
            return int32(min(first, first1)), int32(max(end, end1)), (end, end1)
        first2, end2 = bounds(uint64(at - uint64(by_line)), int32(line + 2 * GROUP < lines))
        return int32(min(min(first, first1), first2)), int32(max(max(end, end1), end2)), (end, end1, end2)
    assert LINES % GROUP == 0 and GROUPS in (1, 2, 3)
    return needed


def make_kept_queries(spec: Spec, BLOCK_N: int, NARROWER: int = 1, ONE_HEAD: bool = False) -> Any:
    """m_min, m_max = kept_queries(a, batch, head_k, first, seqlen_k, m_min, m_max): without the blocks of queries before and after all of
    which any, in any head of the group, attends any of BLOCK_N keys from `first` on. If there are none, m_min >= m_max.

    NARROWER: the blocks of the mask's words are so many times narrower than those of queries, a power of two. ONE_HEAD: without a loop over
    the group. Where its heads have masks of their own, no block is left out.
    """
    PACKED, needed, BITS = spec.packed, make_needed(BLOCK_N, BY_KEYS=True), NARROWER.bit_length() - 1
    if not spec.mask:
        @inline
        def all_queries(a, batch, head_k, first, seqlen_k, m_min, m_max):
            return m_min, m_max
        return all_queries

    @inline
    def kept_queries(a, batch, head_k, first, seqlen_k, m_min, m_max):
        if PACKED:
            seqlen_k = int32(min(seqlen_k, a.seqlen_k))
        if ONE_HEAD:
            lo, hi, _ = needed(a, batch, int32(head_k * a.group), first, seqlen_k)
            if (a.mask_head != 0) & (a.group > 1):
                lo, hi = int32(0), int32(FAR)
        else:
            heads, lo, hi = int32(1) if a.mask_head == 0 else a.group, int32(FAR), int32(0)
            for head in range(int32(head_k * a.group), int32(head_k * a.group + heads)):
                first_kept, end_kept, _ = needed(a, batch, int32(head), first, seqlen_k)
                lo, hi = int32(min(lo, first_kept)), int32(max(hi, end_kept))
        return int32(max(m_min, int32(lo >> BITS))), int32(min(m_max, int32((hi + NARROWER - 1) >> BITS)))
    return kept_queries
