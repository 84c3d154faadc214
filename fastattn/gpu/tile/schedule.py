"""Which tile of query rows, or BY_KEYS of keys, a block works on next: number -> (block, head, batch, where its rows and keys are).

Dense problems compute it. Packed ones look it up in a table that the kernel of `make_plan` writes on the device (packed.py), so that
cumulative lengths are never read back: one entry per sequence, most work first, a last one for rows (keys) that belong to no sequence, the
number of tiles, and for each block of rows (keys) a copy of its entry, which a tile finds with one wait for memory.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32, store_b32
from ..runtime.packed import ENTRY, PLAN_THREADS
from ..spec import Spec

SORTED = 4096       # sequences up to which the table is sorted: ranks are counted, n * n / 1024 steps


def make_tile_at(spec: Spec, BLOCK: int, BY_KEYS: bool = False) -> Any:
    """tile_at(a, t) -> m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k for 0 <= t < num_tiles(a).

    Heads go in groups of a.head_group whose K and V fit the L2 cache; inside a group the last rows, which have most keys under
    a causal mask, come first. BY_KEYS: n_block, a key head of a.num_heads_k, the same, and last how many keys the sequence has with
    those past seqused_k, whose gradients are 0; the first keys, which most rows see, come first.

    Where there is a bias, batch entries of a head are neighbours: most often they share it, and what is read (or summed, in dbias) for
    one is still in the L2 cache for the others.
    """
    PACKED, BIAS = spec.packed, spec.bias is not None

    @inline
    def in_group(r, blocks, heads, head_group):
        """Tile r of `heads` heads with `blocks` each -> (block, head)."""
        g = divide(r, int32(head_group * blocks))
        r = int32(r - g * (head_group * blocks))
        size = int32(min(head_group, heads - g * head_group))
        n = divide(r, size)
        block = n if BY_KEYS else int32(blocks - 1 - n)
        return block, int32(g * head_group + r - n * size)

    @inline
    def heads_of(a):
        if BY_KEYS:
            return a.num_heads_k
        else:
            return a.num_heads

    @inline
    def split(a, plane, heads):
        """(head, batch) of one of heads * a.batch."""
        if BIAS:
            head = divide(plane, a.batch)
            return head, int32(plane - head * a.batch)
        else:
            batch = divide(plane, heads)
            return int32(plane - batch * heads), batch

    @inline
    def tile_at(a, t):
        if PACKED:
            heads = heads_of(a)
            at = uint64(a.table + uint64((a.batch + 2 + divide(t, heads)) * ENTRY))
            q_start, seqlen_q, k_start, seqlen_k = load_b32(at), load_b32(at + 4), load_b32(at + 8), load_b32(at + 12)
            batch, first, keys = load_b32(at + 16), load_b32(at + 20), load_b32(at + 24)
            length = keys if BY_KEYS else seqlen_q
            block, head = in_group(int32(t - first), divide(int32(length + BLOCK - 1), BLOCK), heads, a.head_group)
        else:
            heads, length = heads_of(a), a.seqlen_k if BY_KEYS else a.seqlen_q
            block, plane = in_group(t, divide(int32(length + BLOCK - 1), BLOCK), int32(heads * a.batch), a.head_group)
            head, batch = split(a, plane, heads)
            q_start, seqlen_q, k_start, seqlen_k, keys = int32(0), a.seqlen_q, int32(0), a.seqlen_k, a.seqlen_k
        if BY_KEYS:
            return block, head, batch, q_start, seqlen_q, k_start, seqlen_k, keys
        else:
            return block, head, batch, q_start, seqlen_q, k_start, seqlen_k
    return tile_at


def make_num_tiles(spec: Spec) -> Any:
    """num_tiles(a): for packed problems the word behind the table's entries."""
    if not spec.packed:
        @inline
        def given(a):
            return a.tiles
        return given

    @inline
    def from_table(a):
        return load_b32(uint64(a.table + uint64((a.batch + 1) * ENTRY)))
    return from_table


def make_key_row(BLOCK_N: int) -> Any:
    """key_row(a, k_start, n_block): the row of K and V where key block n_block of a tile starts; k_start is the sequence's first row.

    The one place that knows where a tile's keys are in memory.
    """
    @inline
    def key_row(a, k_start, n_block):
        return int32(k_start + n_block * BLOCK_N)
    return key_row


def make_unowned(spec: Spec) -> Any:
    """unowned(a, t): 2 where tile t has rows that belong to no sequence, else 1."""
    if not spec.packed:
        @inline
        def never(a, t):
            return int32(1)
        return never

    @inline
    def in_last_entry(a, t):
        return int32(2) if t >= load_b32(uint64(a.table + uint64(a.batch * ENTRY + 20))) else int32(1)
    return in_last_entry


@inline
def length_at(pointer, i, step, total):
    """Element i of cumulative lengths `step` bytes apart, little-endian, so that its low half will do for an int64; lengths that lie are
    cut to what there is."""
    return int32(min(max(load_b32(uint64(pointer + uint64(i * step))), 0), total))


def make_sequence_at(USED: bool) -> Any:
    """sequence_at(a, i) -> q_start, seqlen_q, k_start, seqlen_k, keys with unused ones, of sequence i. USED: there is a seqused_k.

    Fields: LENGTHS and total_q. Steps are bytes between lengths, int32 or int64.
    """
    @inline
    def sequence_at(a, i):
        q_start = length_at(a.cu_seqlens_q, i, a.q_step, a.total_q)
        seqlen_q = int32(max(length_at(a.cu_seqlens_q, i + 1, a.q_step, a.total_q) - q_start, 0))
        k_start = length_at(a.cu_seqlens_k, i, a.k_step, a.total_k)
        keys = int32(max(length_at(a.cu_seqlens_k, i + 1, a.k_step, a.total_k) - k_start, 0))
        used = length_at(a.seqused_k, i, a.used_step, keys) if USED else keys
        return q_start, seqlen_q, k_start, used, keys
    return sequence_at


def make_plan(USED: bool, BLOCK: int, BY_KEYS: bool = False) -> Any:
    """The kernel that writes the table: one block. USED: there is a seqused_k. num_heads: the heads that have tiles."""
    THREADS = PLAN_THREADS
    sequence_at = make_sequence_at(USED)

    @inline
    def work(a, i):
        _, seqlen_q, _, seqlen_k, _ = sequence_at(a, i)
        if BY_KEYS:
            return int64(seqlen_k) * int64(seqlen_q + BLOCK)
        else:
            return int64(seqlen_q) * int64(seqlen_k + BLOCK)

    @inline
    def put(a, i, field, value):
        store_b32(uint64(a.table + uint64(i * ENTRY + field * 4)), int32(value))

    @inline
    def blocks_of(a, i):
        length = load_b32(uint64(a.table + uint64(i * ENTRY + (24 if BY_KEYS else 4))))
        return divide(int32(length + BLOCK - 1), BLOCK)

    @inline
    def added(a, total, blocks):
        """Never beyond what the table has room for, where lengths that lie say so: sums stay inside 32 bits."""
        return int32(min(int64(total) + int64(blocks), int64(a.blocks)))

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        sums = cuda.shared.array(THREADS, int32)
        for i in range(thread, a.batch, THREADS):
            place = i
            if a.batch <= SORTED:
                mine, place = work(a, i), 0
                for j in range(a.batch):
                    other = work(a, j)
                    if other > mine or (other == mine and j < i):
                        place += 1
            q_start, seqlen_q, k_start, seqlen_k, all_keys = sequence_at(a, i)
            put(a, place, 0, q_start)
            put(a, place, 1, seqlen_q)
            put(a, place, 2, k_start)
            put(a, place, 3, seqlen_k)
            put(a, place, 4, i)
            put(a, place, 6, all_keys)
        if thread == 0:     # rows and keys of no sequence
            end_q = length_at(a.cu_seqlens_q, a.batch, a.q_step, a.total_q)
            end_k = length_at(a.cu_seqlens_k, a.batch, a.k_step, a.total_k)
            put(a, a.batch, 0, end_q)
            put(a, a.batch, 1, 0 if BY_KEYS else a.total_q - end_q)
            put(a, a.batch, 2, end_k if BY_KEYS else 0)
            put(a, a.batch, 3, 0)
            put(a, a.batch, 4, 0)
            put(a, a.batch, 6, a.total_k - end_k)
        cuda.syncthreads()
        # first blocks: each thread sums a stretch of entries, then they are shifted by the stretches before
        share = (a.batch + 1 + THREADS - 1) // THREADS
        begin, end = min(thread * share, a.batch + 1), min((thread + 1) * share, a.batch + 1)
        total = int32(0)
        for i in range(begin, end):
            total = added(a, total, blocks_of(a, i))
        sums[thread] = total
        cuda.syncthreads()
        if thread == 0:
            before = int32(0)
            for i in range(min(THREADS, a.batch + 1)):      # the rest have no entries
                mine = sums[i]
                sums[i] = before
                before = added(a, before, mine)
            put(a, a.batch + 1, 0, before * a.num_heads)
        cuda.syncthreads()
        first = sums[thread]
        for i in range(begin, end):
            put(a, i, 5, first * a.num_heads)
            first = added(a, first, blocks_of(a, i))
        cuda.syncthreads()
        word = thread & 7
        for i in range(thread >> 5, a.batch + 1, THREADS >> 5):     # a warp copies an entry for its blocks, a lane one of its words
            value = load_b32(uint64(a.table + uint64(i * ENTRY + 4 * word)))
            block = divide(load_b32(uint64(a.table + uint64(i * ENTRY + 20))), a.num_heads)
            end = added(a, block, blocks_of(a, i))
            for j in range(block + ((thread & 31) >> 3), end, 4):
                put(a, a.batch + 2 + j, word, value)
    return kernel
