"""A boolean mask as bits: one word for each thread that will hold the scores, packed by a kernel before the attention.

mask_words.py says what is stored where. A thread block packs GROUP lines, a line being a query row, or of kernels that own keys a key.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..config import GROUP
from ..dsl.inline import divide, inline
from ..ptx.arith import shift_left
from ..ptx.memory import load_b32_if, store_b32
from ..ptx.scalar import load_flag
from ..ptx.sync import any_lane, ballot
from ..spec import FAR
from ..tile.bits import line_bits, lines_bits

AT_ONCE = 8                                 # blocks of a line whose loads are in flight together
EVEN, ODD = 0x55555555, -0x55555556         # every second bit


@inline
def word_of(bytes_, lane):
    """(The word of thread `lane` of a quad, whether any of the quad's has a bit.) Lane l holds columns 4 l to 4 l + 3 of the block.

    bytes_: a byte for each. An even lane's are those of threads 0 and 1, an odd lane's those of 2 and 3. So even bits of a ballot over
    first bytes are even bits of thread 0's word, odd bits those of thread 2's, and so on.
    """
    low0, low1 = ballot(int32(bytes_ & 0xFF)), ballot(int32(bytes_ & 0xFF0000))
    high0, high1 = ballot(int32(bytes_ & 0xFF00)), ballot(int32(bytes_ & -0x1000000))
    low, high = low1 if lane & 1 else low0, high1 if lane & 1 else high0
    if lane & 2:
        low = int32((low >> 1) & EVEN)
    else:
        high = shift_left(high, int32(1))
    return int32((low & EVEN) | (high & ODD)), int32(low0 | low1 | high0 | high1)


def make_pack_mask(WIDTH: int, WARPS: int, ACROSS: bool, WHOLE: bool) -> Any:
    """The kernel, for blocks of WIDTH columns, in thread blocks of so many warps.

    ACROSS: neighbouring lines are closer in memory than neighbouring columns, and a lane has lines of its own; otherwise a warp shares a
    line. WHOLE: what is contiguous consists of aligned pieces of four bytes.
    """
    ENDS, BITS, LINES = 2 * WARPS, WIDTH // 4, 64 if WHOLE else 32      # LINES: of a warp, ACROSS
    STEP, HALF = WIDTH * AT_ONCE // 2, AT_ONCE // 2

    @inline
    def load(a, at, left, lane):
        """A lane's four columns of a block, a byte each; columns from `left` on are 0."""
        left, step = int32(min(left, WIDTH - 4 * lane)), a.mask_column
        if WHOLE:
            return load_b32_if(uint64(at), int32(left > 0))
        else:
            return int32(load_flag(uint64(at), int32(left > 0)) | (load_flag(uint64(at + step), int32(left > 1)) << 8)
                         | (load_flag(uint64(at + 2 * step), int32(left > 2)) << 16)
                         | shift_left(load_flag(uint64(at + 3 * step), int32(left > 3)), int32(24)))

    @inline
    def load_four(a, at, left, lane):
        """`load` of four blocks."""
        step = int64(WIDTH) if WHOLE else int64(WIDTH * a.mask_column)
        return (load(a, at, left, lane), load(a, int64(at + step), int32(left - WIDTH), lane),
                load(a, int64(at + 2 * step), int32(left - 2 * WIDTH), lane),
                load(a, int64(at + 3 * step), int32(left - 3 * WIDTH), lane))

    @inline
    def put(a, bytes_, to, n, lane):
        """Store the words of block n of a line. Returns (first, end) of the blocks with a bit: n and n + 1, or nothing."""
        word, some = word_of(bytes_, lane)
        if (lane < 4) & (n < a.blocks):
            store_b32(uint64(to), word)
        return (n, int32(n + 1)) if some != 0 else (int32(FAR), int32(0))

    @inline
    def put_four(a, loaded, to, n, lane):
        step = int64(16 * a.lines)
        lo0, hi0 = put(a, loaded[0], to, n, lane)
        lo1, hi1 = put(a, loaded[1], int64(to + step), int32(n + 1), lane)
        lo2, hi2 = put(a, loaded[2], int64(to + 2 * step), int32(n + 2), lane)
        lo3, hi3 = put(a, loaded[3], int64(to + 3 * step), int32(n + 3), lane)
        return int32(min(min(lo0, lo1), min(lo2, lo3))), int32(max(max(hi0, hi1), max(hi2, hi3)))

    @inline
    def along(a, source, plane, first, count, warp, lane):
        """(first, end) of the blocks with a bit, of those that this warp packs: AT_ONCE blocks of a line at a time."""
        lo, hi, pieces = int32(FAR), int32(0), divide(int32(a.blocks + AT_ONCE - 1), AT_ONCE)
        unit = warp
        while unit < count * pieces:
            number = divide(unit, pieces)
            n, line = int32((unit - number * pieces) * AT_ONCE), int32(first + number)
            left = int32(a.columns - n * WIDTH - 4 * lane)
            at = int64(source + int64(line) * a.mask_line + int64(n * WIDTH + 4 * lane) * a.mask_column)
            to = int64(plane + (int64(n) * int64(a.lines) + int64(line)) * 16 + 4 * lane)
            ones = load_four(a, at, left, lane)
            others = load_four(a, int64(at + STEP * a.mask_column), int32(left - STEP), lane)
            lo0, hi0 = put_four(a, ones, to, n, lane)
            lo1, hi1 = put_four(a, others, int64(to + int64(16 * HALF) * int64(a.lines)), int32(n + HALF), lane)
            lo, hi = int32(min(lo, min(lo0, lo1))), int32(max(hi, max(hi0, hi1)))
            unit = int32(unit + WARPS)
        return lo, hi

    @inline
    def put_line(a, plane, n, line, thread, word):
        store_b32(uint64(plane + (int64(n) * int64(a.lines) + int64(line)) * 16 + 4 * thread), word)

    @inline
    def pack_lines(a, source, plane, n, first, number, count, thread):
        """The words of `thread` of the lane's lines, from the number-th of the group on. Returns a value that is 0 if they have no bit."""
        line, column = int32(first + number), int32(n * WIDTH + 2 * thread)
        at = uint64(source + int64(line) * a.mask_line + int64(column) * a.mask_column)
        left = int32(a.columns - column) if number < count else int32(0)
        if WHOLE:
            words = lines_bits(at, a.mask_column, left, BITS)
            if number < count:
                put_line(a, plane, n, line, thread, words[0])
                put_line(a, plane, n, int32(line + 1), thread, words[1])
                put_line(a, plane, n, int32(line + 2), thread, words[2])
                put_line(a, plane, n, int32(line + 3), thread, words[3])
            return int32(words[0] | words[1] | words[2] | words[3])
        else:
            word = line_bits(at, a.mask_column, left, BITS)
            if number < count:
                put_line(a, plane, n, line, thread, word)
            return word

    @inline
    def across(a, source, plane, first, count, warp, lane):
        """The same, LINES lines of a block at a time. WHOLE: four lines a lane, half of the threads' words each half of the warp."""
        lo, hi, parts = int32(FAR), int32(0), divide(int32(count + LINES - 1), LINES)
        unit = warp
        while unit < a.blocks * parts:
            n = divide(unit, parts)
            number = int32((unit - n * parts) * LINES + (4 * (lane & 15) if WHOLE else lane))
            thread, end, some = int32(lane >> 4) * 2 if WHOLE else int32(0), int32(2 * (lane >> 4) + 2) if WHOLE else int32(4), int32(0)
            while thread < end:
                some = int32(some | pack_lines(a, source, plane, n, first, number, count, int32(thread)))
                thread = int32(thread + 1)
            if any_lane(some) != 0:
                lo, hi = int32(min(lo, n)), int32(max(hi, n + 1))
            unit = int32(unit + WARPS)
        return lo, hi

    def kernel(a):
        ends = cuda.shared.array(ENDS, int32)
        warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        number = divide(int32(cuda.blockIdx.x), a.groups)
        group = int32(cuda.blockIdx.x - number * a.groups)
        batch = divide(number, a.heads)
        source = int64(int64(a.mask) + batch * a.mask_batch + int64(number - batch * a.heads) * a.mask_head)
        plane, first = int64(int64(a.words) + number * a.plane), int32(group * GROUP)
        count = int32(min(a.lines - first, GROUP))
        if ACROSS:
            lo, hi = across(a, source, plane, first, count, warp, lane)
        else:
            lo, hi = along(a, source, plane, first, count, warp, lane)
        if lane == 0:
            ends[2 * warp] = lo
            ends[2 * warp + 1] = hi
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            for other in range(1, WARPS):
                lo, hi = int32(min(lo, ends[2 * other])), int32(max(hi, ends[2 * other + 1]))
            at = uint64(plane - 8 * (group + 1))
            store_b32(at, lo)
            store_b32(uint64(at + uint64(4)), int32(FAR) if a.repeats != 0 and hi > 0 else hi)
    return kernel
