"""latent.py's producers for 8-bit caches: a warpgroup widens keys on their way to shared memory, which is exact.

A thread loads 16 numbers at a time to registers, before the slot is empty, and stores them as q's dtype where TMA would have put them. Keys
of the next block are prefetched into the L2 cache meanwhile. Behind the request's keys there are zeros. A block is in one page.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.sync import fence_async, opaque
from ..ptx.widened import load_chunk_if, make_store_chunk, prefetch
from ..spec import Spec
from ..tile.pages import make_key_loads, make_page_of
from ..tile.ring import Ring
from ..tile.smem import PANEL, ROW_BYTES, WARPGROUP
from .config_latent import LatentConfig

CHUNK = 16                  # numbers of a load
LINE = 128                  # bytes of a prefetch
WIDE, NARROW = 256, 64      # columns of a piece: 16 threads a row, 8 rows at a time; or 4 threads, 32 rows


def make_load_8bit(spec: Spec, config: LatentConfig, low: Ring, high: Ring, LOW: int, HIGH: int) -> Any:
    """load(a, base, place, thread), by a warpgroup: both halves of each block of keys. LOW, HIGH: offsets of the rings' slots."""
    BLOCK_N, HEAD_DIM, PAGED = config.block_n, spec.head_dim, spec.paged
    K_PANEL, store_chunk = BLOCK_N * ROW_BYTES, make_store_chunk(spec.dtype, spec.cache_dtype or "")
    (_, page_of), (_, keys_at) = make_page_of(config.box, config.whole), make_key_loads(spec, config.box, config.whole)
    LOW_BYTES, HIGH_BYTES = WIDE // PANEL * K_PANEL, (HEAD_DIM - WIDE) // PANEL * K_PANEL
    assert BLOCK_N == config.box == 64 and HEAD_DIM == 2 * WIDE + NARROW

    @inline
    def first_of(a, place, keys, row):
        """Address of a block's first key."""
        page, within = keys, row
        if PAGED:
            page, within = page_of(keys, row)
        return uint64(a.k + uint64(int64(page) * a.k_batch + int64(within) * a.k_row + int64(place.head_k) * a.k_head))

    def make_piece(COLUMNS: int) -> tuple[Any, Any, Any, int, int]:
        """(two, put_two, place_in, LANES, STEP) of pieces of so many columns, of which a thread has every STEP-th row."""
        LANES = COLUMNS // CHUNK            # threads of a row
        STEP = WARPGROUP // LANES           # rows between those of a thread: a multiple of 8, so that all have the same swizzle

        @inline
        def two(a, at, row, left):
            """The thread's chunk of rows `row` and row + STEP of those that are `left`. at: address of the thread's chunk of row 0."""
            at = uint64(at + uint64(int64(row) * a.k_row))
            inside0, inside1 = int32(1) if row < left else int32(0), int32(1) if row + STEP < left else int32(0)
            return load_chunk_if(at, inside0), load_chunk_if(uint64(at + uint64(STEP * a.k_row)), inside1)

        @inline
        def put_two(first, second, row, words):
            store_chunk(int32(first + row * ROW_BYTES), int32(second + row * ROW_BYTES), words[0])
            store_chunk(int32(first + (row + STEP) * ROW_BYTES), int32(second + (row + STEP) * ROW_BYTES), words[1])

        @inline
        def place_in(slot, thread):
            """Addresses of the thread's chunk of row 0 of those with its swizzle, as two of 16-bit numbers; its row, its column."""
            row, chunk = int32(thread // LANES), int32(2 * (thread & (LANES - 1)))
            at, swizzle = int32(slot + (chunk >> 3) * K_PANEL), int32(row & 7)
            return int32(at + (((chunk & 7) ^ swizzle) << 4)), int32(at + (((chunk & 7) + 1 ^ swizzle) << 4))
        return two, put_two, place_in, LANES, STEP

    two, put_two, place_in, LANES, STEP = make_piece(WIDE)
    two_narrow, put_narrow, place_narrow, NARROW_LANES, _ = make_piece(NARROW)

    @inline
    def fetch(a, at, thread, left):
        """A wide piece: eight chunks."""
        row, at = int32(thread // LANES), uint64(at + uint64(CHUNK * (thread & (LANES - 1))))
        return (two(a, at, row, left), two(a, at, int32(row + 2 * STEP), left), two(a, at, int32(row + 4 * STEP), left),
                two(a, at, int32(row + 6 * STEP), left))

    @inline
    def put(slot, thread, words):
        first, second = place_in(slot, thread)
        row = int32(thread // LANES)
        put_two(first, second, row, words[0])
        put_two(first, second, int32(row + 2 * STEP), words[1])
        put_two(first, second, int32(row + 4 * STEP), words[2])
        put_two(first, second, int32(row + 6 * STEP), words[3])

    @inline
    def fill_low(a, base, at, left, thread, stage, phase):
        words = fetch(a, at, thread, left)
        low.wait_empty(base, stage, phase)
        put(int32(base + LOW + stage * LOW_BYTES), thread, words)
        fence_async()
        cuda.syncwarp()
        if (thread & 31) == 0:
            low.arrive_full(base, stage)

    @inline
    def fill_high(a, base, at, left, thread, stage, phase):
        row = int32(thread // NARROW_LANES)
        rotary = two_narrow(a, uint64(at + uint64(2 * WIDE + CHUNK * (thread & (NARROW_LANES - 1)))), row, left)
        words = fetch(a, uint64(at + uint64(WIDE)), thread, left)
        high.wait_empty(base, stage, phase)
        slot = int32(base + HIGH + stage * HIGH_BYTES)
        first, second = place_narrow(int32(slot + WIDE // PANEL * K_PANEL), thread)
        put_narrow(first, second, row, rotary)
        put(slot, thread, words)
        fence_async()
        cuda.syncwarp()
        if (thread & 31) == 0:
            high.arrive_full(base, stage)

    @inline
    def prefetch_block(a, place, keys, row, thread):
        """The lines of a block: two threads for each key."""
        r = int32(thread >> 1)
        if row + r < place.end:
            at, line = uint64(first_of(a, place, keys, row) + uint64(int64(r) * a.k_row)), int32((thread & 1) * LINE)
            while line < HEAD_DIM:
                prefetch(uint64(at + uint64(line)))
                line = int32(line + 2 * LINE)

    @inline
    def load(a, base, place, thread):
        keys, n, row = keys_at(a, place.batch, place.seqlen_k), int32(0), int32(place.first)
        while row < place.end:
            stage, phase = low.use(n)
            prefetch_block(a, place, keys, int32(row + BLOCK_N), thread)
            at, left = first_of(a, place, keys, row), int32(place.seqlen_k - row)
            fill_high(a, base, at, left, thread, stage, int32(phase ^ 1))
            fill_low(a, base, at, left, thread, stage, int32(phase ^ 1))
            row, n = opaque(int32(row + BLOCK_N)), int32(n + 1)
    return load
