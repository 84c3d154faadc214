"""Which tiles of scores a mask_mod leaves empty, partial or full: two bits a tile, made on the device, never a mask of all pairs.

A warp has one tile. First interval arithmetic on the function's lines (interval.py): what is the same for a row or a column is computed for
each row and column of the tile, and their smallest and largest values say most often what the tile is. If they do not, pairs are asked for,
32 columns at a time, until one is seen and another is not.

A line of tiles has `words` pairs of 32-bit words: bit n of the first says that some pair of tile n is seen, of the second that all are.
Lines are tiles of query rows, or BY_KEYS tiles of keys. A function that does not ask for the batch or the head has one plane for all.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint64

from ...flex.program import Program
from ..dsl.inline import divide, inline
from ..ptx.arith import shift_left
from ..ptx.memory import load_b32
from ..ptx.sync import any_lane
from ..ptx.traced import highest_bit, lowest_bit, or_b32
from ..traced import MASK
from .config import ROWS_APART, ROWS_BETWEEN
from .interval import Bounds, ranges_of
from .staged import COLUMN, ROW, STAGES, Staged

WARP = 0xFFFFFFFF


def _make_ranges(indices: list[int]) -> Any:
    """The intervals of some values of a tuple over a warp's lanes, each of which has seen the values `low` to `high`: a tuple."""
    text = ["def ranges(low, high):"]
    text += [f"    x{i} = over_lanes(low[{i}], high[{i}])" for i in range(len(indices))]
    text.append(f"    return ({''.join(f'x{i}, ' for i in range(len(indices))) or 'int32(0),'})")
    space: dict[str, Any] = {"over_lanes": over_lanes, "int32": int32}
    exec("\n".join(text), space)
    return inline(space["ranges"])


def _make_pick(indices: list[int], wanted: list[int]) -> Any:
    """The values at these indices of what a stage hands on, as int32."""
    items = "".join(f"int32(values[{wanted.index(n)}]), " for n in indices)
    space: dict[str, Any] = {"int32": int32}
    exec(f"def pick(values):\n    return ({items or 'int32(0),'})\n", space)
    return inline(space["pick"])


def _make_widen(count: int) -> Any:
    """(low, high) tuples that take in `count` new values."""
    low = "".join(f"min(low[{i}], new[{i}]), " for i in range(count))
    high = "".join(f"max(high[{i}], new[{i}]), " for i in range(count))
    space: dict[str, Any] = {}
    exec(f"def widen(low, high, new):\n    return ({low or 'new[0],'}), ({high or 'new[0],'})\n", space)
    return inline(space["widen"])


@inline
def over_lanes(low, high):
    """The interval of all lanes' [low, high]."""
    for step in (16, 8, 4, 2, 1):
        low = int32(min(low, cuda.shfl_xor_sync(WARP, low, step)))
        high = int32(max(high, cuda.shfl_xor_sync(WARP, high, step)))
    return int64(low), int64(high)


def make_bitmap(program: Program, BLOCK_M: int, BLOCK_N: int, BY_KEYS: bool) -> Any:
    """The kernel. Fields: bitmap (zeros at first), words, lines, columns, heads, seqlen_q, seqlen_k, and the program's."""
    staged = Staged(program, MASK)
    tile_values, row_values, column_values, sees = (inline(staged.functions[stage]) for stage in STAGES)
    bounds = Bounds(program, staged.stage, staged.wanted).function
    of_rows, of_columns = ranges_of(program, staged.wanted[ROW]), ranges_of(program, staged.wanted[COLUMN])
    pick_row, pick_column = _make_pick(of_rows, staged.wanted[ROW]), _make_pick(of_columns, staged.wanted[COLUMN])
    row_ranges, column_ranges = _make_ranges(of_rows), _make_ranges(of_columns)
    widen_row, widen_column = _make_widen(len(of_rows)), _make_widen(len(of_columns))
    ONE, ROWS, COLUMNS = float32(1), -(-BLOCK_M // 32), -(-BLOCK_N // 32)
    assert BLOCK_M % ROWS_BETWEEN == 0 and math.gcd(BLOCK_M, ROWS_APART) == 1

    @inline
    def place(first, end, n, lane):
        """A lane's n-th row or column of the tile; past the end the last one again."""
        return int32(min(first + n * 32 + lane, end - 1))

    @inline
    def rows_of(a, tile, batch, head, row0, row_end, lane):
        low = pick_row(row_values(a, tile, batch, head, place(row0, row_end, 0, lane), ONE))
        high = low
        for n in range(1, ROWS):
            low, high = widen_row(low, high, pick_row(row_values(a, tile, batch, head, place(row0, row_end, n, lane), ONE)))
        return row_ranges(low, high)

    @inline
    def columns_of(a, tile, batch, head, col0, col_end, lane):
        low = pick_column(column_values(a, tile, batch, head, place(col0, col_end, 0, lane), ONE))
        high = low
        for n in range(1, COLUMNS):
            low, high = widen_column(low, high, pick_column(column_values(a, tile, batch, head, place(col0, col_end, n, lane), ONE)))
        return column_ranges(low, high)

    @inline
    def ask(a, tile, batch, head, row0, row_end, col0, col_end, lane):
        """(1 if some pair of the tile is seen, 1 if some is not), pair by pair. Rows come from all over the tile: most often they are like
        their neighbours, and the one that differs is at the other end."""
        seen, hidden, n_row = int32(0), int32(0), int32(0)
        while n_row < BLOCK_M:
            for j in range(ROWS_BETWEEN):       # their loads run at the same time
                at = int32((n_row + j) * ROWS_APART)
                row = int32(min(row0 + (at - divide(at, int32(BLOCK_M)) * BLOCK_M), row_end - 1))
                rows = row_values(a, tile, batch, head, row, ONE)
                for n in range(COLUMNS):
                    col = place(col0, col_end, n, lane)
                    columns = column_values(a, tile, batch, head, col, ONE)
                    one = int32(1) if sees(a, tile, rows, columns, batch, head, row, col, ONE, ONE)[0] else int32(0)
                    seen, hidden = int32(seen | one), int32(hidden | (one ^ 1))
            n_row = int32(n_row + ROWS_BETWEEN)
            if (any_lane(seen) & any_lane(hidden)) != 0:
                n_row = int32(BLOCK_M)
        return any_lane(seen), any_lane(hidden)

    @inline
    def kind_of(a, batch, head, row0, row_end, col0, col_end, lane):
        """(1 if some pair of the tile is seen, 1 if some is not)."""
        tile = tile_values(a, batch, head, ONE)
        always, ever = bounds(a, tile, rows_of(a, tile, batch, head, row0, row_end, lane),
                              columns_of(a, tile, batch, head, col0, col_end, lane), batch, head,
                              (int64(row0), int64(row_end - 1)), (int64(col0), int64(col_end - 1)))
        seen, hidden = int32(ever), int32(1 - always)
        if (seen & hidden) != 0:
            seen, hidden = ask(a, tile, batch, head, row0, row_end, col0, col_end, lane)
        return seen, hidden

    def kernel(a):
        lane, t = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        of_line = divide(t, a.columns)
        column = int32(t - of_line * a.columns)
        plane = divide(of_line, a.lines)
        line, batch = int32(of_line - plane * a.lines), divide(plane, a.heads)
        head = int32(plane - batch * a.heads)
        m_block, n_block = (column, line) if BY_KEYS else (line, column)
        row0, col0 = int32(m_block * BLOCK_M), int32(n_block * BLOCK_N)
        row_end, col_end = int32(min(row0 + BLOCK_M, a.seqlen_q)), int32(min(col0 + BLOCK_N, a.seqlen_k))
        seen, hidden = kind_of(a, batch, head, row0, row_end, col0, col_end, lane)
        if (lane == 0) & (seen != 0):
            at = uint64(a.bitmap + (uint64(of_line) * uint64(a.words) + uint64(column >> 5)) * uint64(8))
            bit = shift_left(int32(1), int32(column & 31))
            or_b32(at, bit)
            if hidden == 0:
                or_b32(uint64(at + uint64(4)), bit)
    return kernel


# ---------------------------------------------------------------- in kernels
EMPTY, PARTIAL, FULL = 0, 1, 2


def make_kind(mask_mod: Program | None) -> Any:
    """kind(a, batch, head, line, n): EMPTY, PARTIAL or FULL, of a tile; FULL without a mask_mod."""
    @inline
    def full(a, batch, head, line, n):
        return int32(FULL)

    @inline
    def kind(a, batch, head, line, n):
        return kind_at(a, line_of(a, batch, head, line), n)
    return full if mask_mod is None else kind


@inline
def line_of(a, batch, head, line):
    """Address of the words of a line of tiles. What a batch or a line past the end reads belongs to another one."""
    batch, line = int32(min(batch, a.bitmap_last_batch)), int32(min(line, a.bitmap_lines - 1))
    number = int32((batch * a.bitmap_batch + head * a.bitmap_head) + line)
    return uint64(a.bitmap + uint64(number) * uint64(8 * a.bitmap_words))


@inline
def kind_at(a, at, n):
    """EMPTY, PARTIAL or FULL: tile n of the line at `at`."""
    word = uint64(at + uint64(8 * min(n >> 5, a.bitmap_words - 1)))
    seen, full = load_b32(word), load_b32(uint64(word + uint64(4)))
    return int32(((seen >> (n & 31)) & 1) + ((full >> (n & 31)) & 1))


@inline
def last_seen(at, n_min, n):
    """The last tile of [n_min, n) of a line that is not empty, times 2, plus 1 where it is full; -1: there is none."""
    found, word = int32(-1), int32((n - 1) >> 5)
    below = int32(n - word * 32)            # bits of this word that count, 1 to 32
    keep = int32(~shift_left(int32(-1), below))         # shl by 32 gives 0
    while word * 32 + 31 >= n_min and word >= 0:
        pair = uint64(at + uint64(word) * uint64(8))
        bit = highest_bit(int32(load_b32(pair) & keep))
        keep = int32(-1)
        if bit >= 0:
            found = int32((word * 32 + bit) * 2 + ((load_b32(uint64(pair + uint64(4))) >> bit) & 1))
            word = int32(-1)
        word = int32(word - 1)
    found = found if (found >> 1) >= n_min else int32(-1)
    return found


class Line(NamedTuple):
    """A walk down a line of tiles, in registers: its address, the number of a pair of words, the tiles of that pair that are seen and
    still to come, and those that are full. A step within 32 tiles reads no memory."""

    at: Any
    word: Any
    seen: Any
    full: Any


@inline
def walk_down(at, n):
    """The Line of tile n - 1. Its loads are waited for where `until` or next_down use them."""
    word = int32((n - 1) >> 5)
    pair = uint64(at + uint64(word) * uint64(8))
    return Line(at, word, load_b32(pair), load_b32(uint64(pair + uint64(4))))


@inline
def until(line, n):
    """The Line that walk_down(at, n) has begun, from tile n - 1 down."""
    return Line(line.at, line.word, int32(line.seen & ~shift_left(int32(-1), int32(n - line.word * 32))), line.full)    # shl by 32 gives 0


@inline
def next_down(line, n_min):
    """(found, Line): the next tile, from n_min on, that is not empty, as last_seen gives it."""
    word, seen, full = line.word, line.seen, line.full
    while seen == 0 and word * 32 > n_min:
        word = int32(word - 1)
        pair = uint64(line.at + uint64(word) * uint64(8))
        seen, full = load_b32(pair), load_b32(uint64(pair + uint64(4)))
    bit = highest_bit(seen)
    n, at_bit = int32(word * 32 + bit), int32(max(bit, 0))
    found = int32(2 * n + ((full >> at_bit) & 1)) if bit >= 0 and n >= n_min else int32(-1)
    return found, Line(line.at, word, int32(seen & ~shift_left(int32(1), at_bit)), full)


@inline
def first_seen(at, m, m_max):
    """The first tile of [m, m_max) of a line that is not empty, times 2, plus 1 where it is full; -1: there is none."""
    found, word = int32(-1), int32(m >> 5)
    keep = shift_left(int32(-1), int32(m & 31))
    while word * 32 < m_max:
        pair = uint64(at + uint64(word) * uint64(8))
        bit = lowest_bit(int32(load_b32(pair) & keep))
        keep = int32(-1)
        if bit >= 0:
            found = int32((word * 32 + bit) * 2 + ((load_b32(uint64(pair + uint64(4))) >> bit) & 1))
            word = int32(m_max)
        word = int32(word + 1)
    found = found if (found >> 1) < m_max else int32(-1)
    return found


__all__ = ["EMPTY", "FULL", "PARTIAL", "Line", "first_seen", "kind_at", "last_seen", "line_of", "make_bitmap", "make_kind", "next_down",
           "until", "walk_down"]
