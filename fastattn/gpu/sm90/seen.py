"""The Hopper forward under a mask_mod: its tiles go through the key blocks that the bitmap of the mask shows, and through no others.

The producer looks for the next block (flex/bitmap.py) and writes its number beside K: consumers read it when K has arrived. A tile whose
rows see nothing has one block all the same, which the mask hides.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from numba import cuda, int32, uint64

from ..dsl.inline import divide, inline
from ..flex.bitmap import last_seen, line_of
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, load_shared_b32, store_b32, store_shared_b32
from ..ptx.sync import uniform
from ..spec import Spec
from ..tile.schedule import make_key_row, make_num_tiles
from ..tile.smem import Smem
from ..tile.traced import make_hide
from .records import TILE


class Tile(NamedTuple):
    """What a consumer keeps of its tile. `row` is the thread's first row, `intervals` the keys that its two rows attend, `shared` what all
    rows of the head share (prepare), n_min the tile's last key block in the order of the loop, `hidden` what a mask_mod shares."""

    head: Any
    batch: Any
    seqlen_q: Any
    seqlen_k: Any
    row: Any
    intervals: Any
    shared: Any
    n_min: Any
    hidden: Any


class Seen(ModuleType):
    """Which blocks a tile goes through. Without a mask_mod there is only `hide`, which leaves scores as they are.

    tell(base, it, found, after)    the producer, when the slot of K is empty: the block `found` (see last_seen), and whether it is the last
    first(base, it, tile) -> (n_max, tile)          consumers: n_max - 1 is the tile's first block, the it-th
    following(base, it, tile, fast_min, fast_max) -> (n_block, tile, fast)
        Its next one; fast: whether it needs no mask. The structural mask lets [fast_min, fast_max) go without.
    prepare(a, batch, head), hide(acc_s, a, tile, column)                see make_hide
    """

    tell: Any
    first: Any
    following: Any
    prepare: Any
    hide: Any


def make_seen(spec: Spec, STAGES: int, smem: Smem, k_ring: Any) -> Seen:
    """Shared memory for the numbers of blocks is taken from `smem`."""
    seen, (prepare, hide_acc) = Seen("seen"), make_hide(spec.mask_mod)

    @inline
    def hide(acc_s, a, tile, column):
        return hide_acc(acc_s, a, tile.hidden, tile.batch, tile.head, tile.row, column)
    seen.prepare, seen.hide = prepare, hide
    if spec.mask_mod is None:
        return seen
    BLOCKS = smem.take(4 * STAGES, 16)      # of each stage: 4 * block + 2 where it is full + 1 where it is the tile's last

    @inline
    def tell(base, it, found, after):
        stage, phase = k_ring.use(it)
        k_ring.wait_empty(base, stage, int32(phase ^ 1))
        last = int32(1) if after < 0 else int32(0)
        store_shared_b32(int32(base + BLOCKS + 4 * stage), int32(found * 2 + last))

    @inline
    def told(base, it, tile):
        """(block, the Tile with its n_min, full). n_min is the block if it is the last one, else -1."""
        stage, phase = k_ring.use(it)
        k_ring.wait_full(base, stage, phase)
        word = uniform(load_shared_b32(int32(base + BLOCKS + 4 * stage)))
        n_block = int32(word >> 2)
        n_min = n_block if (word & 1) != 0 else int32(-1)
        tile = Tile(tile.head, tile.batch, tile.seqlen_q, tile.seqlen_k, tile.row, tile.intervals, tile.shared, n_min, tile.hidden)
        return n_block, tile, (word & 2) != 0

    @inline
    def first(base, it, tile):
        n_block, tile, _ = told(base, it, tile)
        return int32(n_block + 1), tile

    @inline
    def following(base, it, tile, fast_min, fast_max):
        n_block, tile, full = told(base, it, tile)
        return n_block, tile, full & (n_block >= fast_min) & (n_block < fast_max)
    seen.tell, seen.first, seen.following = tell, first, following
    return seen


def make_load_seen(spec: Spec, BLOCK_N: int, records: Any, seen: Seen, loads: tuple[Any, Any, Any, Any]) -> Any:
    """The producer's `load` under a mask_mod. loads: its prefetch_q, load_q, load_k and load_v."""
    prefetch_q, load_q, load_k, load_v = loads
    PACKED, num_tiles, key_row = spec.packed, make_num_tiles(spec), make_key_row(BLOCK_N)

    @inline
    def load(a, base):
        """Tile after tile: its record, K of its first block, Q, V of that block; then K and V of the other blocks."""
        it, i, t, tiles = int32(0), int32(0), int32(cuda.blockIdx.x), num_tiles(a)
        found, line, n_min, k_start = int32(-1), uint64(0), int32(0), int32(0)
        head_k, map_batch, m_block, head, going = int32(0), int32(0), int32(0), int32(0), True
        while going:
            records.put(a, base, i, t, tiles)
            while found >= 0:           # the other blocks of the tile before
                after, row = last_seen(line, n_min, int32(found >> 1)), key_row(a, k_start, int32(found >> 1))
                seen.tell(base, it, found, after)
                load_k(a, base, it, row, head_k, map_batch, m_block, head)
                load_v(a, base, it, row, head_k, map_batch)
                it, found = int32(it + 1), after
            going = t < tiles
            if going:
                prefetch_q(a, base, i)
                t = int32(atomic_add_b32(a.counter, int32(1)) + int32(cuda.gridDim.x))     # the tile after this one
                m_block, head = records.word(base, i, TILE.M_BLOCK), records.word(base, i, TILE.HEAD)
                batch = records.word(base, i, TILE.BATCH)
                q_start, k_start = records.word(base, i, TILE.Q_START), records.word(base, i, TILE.K_START)
                n_min, n_max = records.blocks(a, base, i)
                head_k, map_batch = divide(head, a.group), int32(0) if PACKED else batch
                line = line_of(a, batch, head, m_block)
                found = last_seen(line, n_min, n_max)
                found = int32(2 * (n_max - 1)) if found < 0 else found
                after, row = last_seen(line, n_min, int32(found >> 1)), key_row(a, k_start, int32(found >> 1))
                seen.tell(base, it, found, after)
                load_k(a, base, it, row, head_k, map_batch, m_block, head)
                load_q(a, base, i, q_start, m_block, head, map_batch)
                load_v(a, base, it, row, head_k, map_batch)
                it, i, found = int32(it + 1), int32(i + 1), after
        fence_gpu()     # the last thread block to end leaves the counter as it was found
        if atomic_inc_wrap(uint64(a.counter + uint64(4)), int32(cuda.gridDim.x) - 1) == int32(cuda.gridDim.x) - 1:
            store_b32(a.counter, int32(0))
    return load
