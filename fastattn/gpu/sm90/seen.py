"""The Hopper forward under a mask_mod: its tiles go through the key blocks that the bitmap of the mask shows, and through no others.

The producer looks for the next block (flex/bitmap.py) and writes its number beside K: consumers read it when K has arrived. A tile whose
rows see nothing has one block all the same, which the mask hides.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from numba import cuda, int32, uint64

from ..dsl.inline import divide, inline
from ..flex.bitmap import line_of, next_down, until, walk_down
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, load_shared_b32, store_b32, store_shared_b32
from ..ptx.sync import uniform
from ..spec import Spec
from ..tile.schedule import make_key_row, make_num_tiles
from ..tile.smem import Smem
from ..tile.traced import make_hide
from .records import TILE


@inline
def stays(acc_s, intervals, column):
    """In place of tile/mask.py's keep: the scores as they are."""
    return acc_s


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
    """Which blocks a tile goes through under a mask_mod: those of its bitmap, from last to first. `after` is the block after the one at
    hand, times 2, plus 1 where it is full; -1: there is none.

    Without a mask_mod there are only `hide`, which leaves scores as they are, and a function `after`, whose result is not used: a choice
    in the kernel would move its instructions.

    tell(base, it, found, after)    the producer, when the slot of K is empty: the block `found` (see last_seen), and the one after it
    first(base, it) -> (n_max, after)       consumers: n_max - 1 is the tile's first block, the it-th
    after(base, it)                 consumers, between the arrival of K and its release
    following(after, fast_min, fast_max) -> (n_block, fast, full)
        The next block; fast: whether it needs no mask and no slow step; full: 1 if it needs no mask_mod. The structural mask lets
        [fast_min, fast_max) go without.
    prepare(a, batch, head), hide(acc_s, a, tile, column)                see make_hide
    hide_partial(acc_s, a, tile, column, full)      the same, of a block that may be full
    """

    tell: Any
    first: Any
    after: Any
    following: Any
    prepare: Any
    hide: Any
    hide_partial: Any


def make_seen(spec: Spec, STAGES: int, OPTIMISTIC: bool, smem: Smem, k_ring: Any) -> Seen:
    """Shared memory for the numbers of blocks is taken from `smem`."""
    seen, (prepare, hide_acc) = Seen("seen"), make_hide(spec.mask_mod)

    @inline
    def hide(acc_s, a, tile, column):
        return hide_acc(acc_s, a, tile.hidden, tile.batch, tile.head, tile.row, column)

    @inline
    def hide_all(acc_s, a, tile, column, full):
        return hide(acc_s, a, tile, column)

    @inline
    def hide_partial(acc_s, a, tile, column, full):
        if full == 0:
            acc_s = hide(acc_s, a, tile, column)
        return acc_s

    @inline
    def none(base, it):
        return int32(0)
    seen.prepare, seen.hide, seen.hide_partial, seen.after = prepare, hide, hide_all if spec.mask_mod is None else hide_partial, none
    if spec.mask_mod is None:
        return seen
    STRUCTURAL, BLOCKS = spec.left or spec.right, smem.take(8 * STAGES, 16)       # of each stage: its block, the one after it
    LEAST = 2 if OPTIMISTIC else 0      # the first keys are most often a tile's last, which would release Q's slot a softmax later

    @inline
    def tell(base, it, found, after):
        stage, phase = k_ring.use(it)
        k_ring.wait_empty(base, stage, int32(phase ^ 1))
        store_shared_b32(int32(base + BLOCKS + 8 * stage), found)
        store_shared_b32(int32(base + BLOCKS + 8 * stage + 4), after)

    @inline
    def after(base, it):
        stage, _ = k_ring.use(it)
        return uniform(load_shared_b32(int32(base + BLOCKS + 8 * stage + 4)))

    @inline
    def first(base, it):
        stage, phase = k_ring.use(it)
        k_ring.wait_full(base, stage, phase)
        found = uniform(load_shared_b32(int32(base + BLOCKS + 8 * stage)))
        return int32((found >> 1) + 1), after(base, it)

    @inline
    def following(after, fast_min, fast_max):
        n_block, full = int32(after >> 1), int32(after & 1)
        if STRUCTURAL:
            return n_block, (full != 0) & (n_block >= fast_min) & (n_block < fast_max), full
        else:       # only a tile's first block may reach over the last key
            return n_block, (full != 0) & (after >= LEAST), full

    seen.tell, seen.first, seen.after, seen.following = tell, first, after, following
    return seen


def make_load_seen(spec: Spec, BLOCK_N: int, records: Any, seen: Seen, loads: tuple[Any, Any, Any, Any]) -> Any:
    """The producer's `load` under a mask_mod. loads: its prefetch_q, load_q, load_k and load_v."""
    prefetch_q, load_q, load_k, load_v = loads
    PACKED, num_tiles, key_row = spec.packed, make_num_tiles(spec), make_key_row(BLOCK_N)

    @inline
    def load(a, base):
        """Tile after tile: its record, K of its first block, Q, V of that block; then K and V of the other blocks."""
        it, i, t, tiles = int32(0), int32(0), int32(cuda.blockIdx.x), num_tiles(a)
        found, line, n_min, k_start = int32(-1), walk_down(line_of(a, int32(0), int32(0), int32(0)), int32(1)), int32(0), int32(0)
        head_k, map_batch, m_block, head, going = int32(0), int32(0), int32(0), int32(0), True
        while going:
            records.put(a, base, i, t, tiles)
            going = t < tiles
            ahead, ahead_min, ahead_max = line, int32(0), int32(0)
            if going:                   # words of the next tile's line, which arrive while this one's blocks are loaded
                ahead_min, ahead_max = records.blocks(a, base, i)
                batch, head_after = records.word(base, i, TILE.BATCH), records.word(base, i, TILE.HEAD)
                ahead = walk_down(line_of(a, batch, head_after, records.word(base, i, TILE.M_BLOCK)), ahead_max)
            while found >= 0:           # the other blocks of the tile before
                row = key_row(a, k_start, int32(found >> 1))
                after, line = next_down(line, n_min)
                seen.tell(base, it, found, after)
                load_k(a, base, it, row, head_k, map_batch, m_block, head)
                load_v(a, base, it, row, head_k, map_batch)
                it, found = int32(it + 1), after
            if going:
                prefetch_q(a, base, i)
                t = int32(atomic_add_b32(a.counter, int32(1)) + int32(cuda.gridDim.x))     # the tile after this one
                m_block, head = records.word(base, i, TILE.M_BLOCK), records.word(base, i, TILE.HEAD)
                batch = records.word(base, i, TILE.BATCH)
                q_start, k_start = records.word(base, i, TILE.Q_START), records.word(base, i, TILE.K_START)
                head_k, map_batch, n_min = divide(head, a.group), int32(0) if PACKED else batch, ahead_min
                found, line = next_down(until(ahead, ahead_max), n_min)
                found = int32(2 * (ahead_max - 1)) if found < 0 else found
                row = key_row(a, k_start, int32(found >> 1))
                after, line = next_down(line, n_min)
                seen.tell(base, it, found, after)
                load_k(a, base, it, row, head_k, map_batch, m_block, head)
                load_q(a, base, i, q_start, m_block, head, map_batch)
                load_v(a, base, it, row, head_k, map_batch)
                it, i, found = int32(it + 1), int32(i + 1), after
        fence_gpu()     # the last thread block to end leaves the counter as it was found
        if atomic_inc_wrap(uint64(a.counter + uint64(4)), int32(cuda.gridDim.x) - 1) == int32(cuda.gridDim.x) - 1:
            store_b32(a.counter, int32(0))
    return load
