"""The schedule: from a tile's number to its block, head, batch, and where its rows and keys are.

Tiles are blocks of query rows, or BY_KEYS blocks of keys. Dense problems compute a tile from its number. Packed ones look it up in a
table that the kernel of `make_plan` writes on the device (packed.py), so that the host never reads cumulative lengths. The table has:

    one entry per sequence, most work first
    one entry for rows (keys) that belong to no sequence
    the number of tiles
    for each block of rows (keys) a copy of its sequence's entry, so that a tile needs one memory access
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32, store_b32
from ..runtime.packed import ENTRY, PLAN_THREADS
from ..spec import Spec

SORTED = 4096       # up to so many sequences the table is sorted; a rank is found by counting, n * n / 1024 steps
# 32-bit fields of a table entry (packed.ENTRY bytes): the number of the field, and its byte
FIELDS = range(7)
Q_START, SEQLEN_Q, K_START, SEQLEN_K, BATCH, FIRST_TILE, KEYS = FIELDS
SEQLEN_Q_BYTE, K_START_BYTE, SEQLEN_K_BYTE, BATCH_BYTE, FIRST_TILE_BYTE, KEYS_BYTE = (4 * field for field in FIELDS[1:])
OWNED, UNOWNED = 1, 2       # what `unowned` says of a tile


class Tile(NamedTuple):
    """A tile of query rows of one head. Its sequence has rows q_start to q_start + seqlen_q and keys k_start to k_start + seqlen_k."""

    m_block: Any
    head: Any
    batch: Any
    q_start: Any
    seqlen_q: Any
    k_start: Any
    seqlen_k: Any


class KeyTile(NamedTuple):
    """A tile of keys of one key head. `keys` counts all keys of the sequence, with those past seqused_k, whose gradients are 0."""

    n_block: Any
    head_k: Any
    batch: Any
    q_start: Any
    seqlen_q: Any
    k_start: Any
    seqlen_k: Any
    keys: Any


def make_length_of(spec: Spec) -> Any:
    """length_of(a, batch, seqlen_q): keys of a dense batch entry. With spec.lengths its own, and as many new ones as rows where a.append
    is 1; never more than a.seqlen_k."""
    if not spec.lengths:
        @inline
        def same(a, batch, seqlen_q):
            return a.seqlen_k
        return same

    @inline
    def length_of(a, batch, seqlen_q):
        return int32(min(length_at(a.lengths, batch, a.lengths_batch, a.seqlen_k) + a.append * seqlen_q, a.seqlen_k))
    return length_of


def make_tile_at(spec: Spec, BLOCK: int, BY_KEYS: bool = False) -> Any:
    """tile_at(a, t) -> Tile, or BY_KEYS KeyTile, for 0 <= t < num_tiles(a).

    Heads are scheduled in groups of a.head_group, whose K and V fit the L2 cache. Inside a group the last rows come first: under a
    causal mask they attend most keys. BY_KEYS the first keys come first: most rows attend them.

    With a bias, the batch entries of a head are neighbours. Most often they share the bias, which then stays in the L2
    cache from one to the next. The same holds for the sums of dbias.
    """
    PACKED, BIAS, length_of = spec.packed, spec.bias is not None, make_length_of(spec)

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
        """(head, batch) of a flattened index below heads * a.batch."""
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
            q_start, seqlen_q = load_b32(at), load_b32(at + SEQLEN_Q_BYTE)
            k_start, seqlen_k = load_b32(at + K_START_BYTE), load_b32(at + SEQLEN_K_BYTE)
            batch, first, keys = load_b32(at + BATCH_BYTE), load_b32(at + FIRST_TILE_BYTE), load_b32(at + KEYS_BYTE)
            length = keys if BY_KEYS else seqlen_q
            block, head = in_group(int32(t - first), divide(int32(length + BLOCK - 1), BLOCK), heads, a.head_group)
        else:
            heads, length = heads_of(a), a.seqlen_k if BY_KEYS else a.seqlen_q
            block, plane = in_group(t, divide(int32(length + BLOCK - 1), BLOCK), int32(heads * a.batch), a.head_group)
            head, batch = split(a, plane, heads)
            q_start, seqlen_q, k_start, keys = int32(0), a.seqlen_q, int32(0), a.seqlen_k
            seqlen_k = length_of(a, batch, seqlen_q)
        if BY_KEYS:
            return KeyTile(block, head, batch, q_start, seqlen_q, k_start, seqlen_k, keys)
        else:
            return Tile(block, head, batch, q_start, seqlen_q, k_start, seqlen_k)
    return tile_at


def make_num_tiles(spec: Spec) -> Any:
    """num_tiles(a). For packed problems it follows the entries of the sequences in the table."""
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

    Kernels that loop over key blocks find them in memory through this function.
    """
    @inline
    def key_row(a, k_start, n_block):
        return int32(k_start + n_block * BLOCK_N)
    return key_row


def make_unowned(spec: Spec) -> Any:
    """unowned(a, t): UNOWNED if the rows of tile t belong to no sequence, else OWNED."""
    if not spec.packed:
        @inline
        def never(a, t):
            return int32(OWNED)
        return never

    @inline
    def in_last_entry(a, t):
        first = load_b32(uint64(a.table + uint64(a.batch * ENTRY + FIRST_TILE_BYTE)))
        return int32(UNOWNED) if t >= first else int32(OWNED)
    return in_last_entry


@inline
def length_at(pointer, i, step, total):
    """Element i of cumulative lengths, which are `step` bytes apart.

    The low 32 bits of an int64 are its first, little-endian. Wrong lengths are clamped to [0, total], so that no kernel reads outside
    the arrays.
    """
    return int32(min(max(load_b32(uint64(pointer + uint64(i * step))), 0), total))


def make_sequence_at(USED: bool, CACHED: bool = False) -> Any:
    """sequence_at(a, i) -> (q_start, seqlen_q, k_start, seqlen_k, keys) of sequence i; `keys` counts those past seqused_k too.

    USED: there is a seqused_k. Arguments: LENGTHS and total_q. Steps are bytes between lengths, int32 or int64. CACHED: it counts the keys
    of each request in a cache, at most total_k, and a.append is 1 where its rows bring new ones.
    """
    @inline
    def request_at(a, i):
        q_start = length_at(a.cu_seqlens_q, i, a.q_step, a.total_q)
        seqlen_q = int32(max(length_at(a.cu_seqlens_q, i + 1, a.q_step, a.total_q) - q_start, 0))
        keys = int32(min(length_at(a.seqused_k, i, a.used_step, a.total_k) + a.append * seqlen_q, a.total_k))
        return q_start, seqlen_q, int32(0), keys, keys
    if CACHED:
        return request_at

    @inline
    def sequence_at(a, i):
        q_start = length_at(a.cu_seqlens_q, i, a.q_step, a.total_q)
        seqlen_q = int32(max(length_at(a.cu_seqlens_q, i + 1, a.q_step, a.total_q) - q_start, 0))
        k_start = length_at(a.cu_seqlens_k, i, a.k_step, a.total_k)
        keys = int32(max(length_at(a.cu_seqlens_k, i + 1, a.k_step, a.total_k) - k_start, 0))
        used = length_at(a.seqused_k, i, a.used_step, keys) if USED else keys
        return q_start, seqlen_q, k_start, used, keys
    return sequence_at


def make_plan(USED: bool, BLOCK: int, BY_KEYS: bool = False, CACHED: bool = False) -> Any:
    """The kernel that writes the table: a grid of one block. USED, CACHED: see make_sequence_at. a.num_heads: heads that have tiles."""
    THREADS = PLAN_THREADS
    sequence_at = make_sequence_at(USED, CACHED)

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
        length = load_b32(uint64(a.table + uint64(i * ENTRY + (KEYS_BYTE if BY_KEYS else SEQLEN_Q_BYTE))))
        return divide(int32(length + BLOCK - 1), BLOCK)

    @inline
    def added(a, total, blocks):
        """total + blocks, at most what the table has room for: with wrong lengths, too, sums stay inside 32 bits."""
        return int32(min(int64(total) + int64(blocks), int64(a.blocks)))

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        sums = cuda.shared.array(THREADS, int32)
        works = cuda.shared.array(SORTED, int64)        # computed once: in the loop below they took all registers of a thread
        if a.batch <= SORTED:
            for i in range(thread, a.batch, THREADS):
                works[i] = work(a, i)
        cuda.syncthreads()
        for i in range(thread, a.batch, THREADS):
            rank = i
            if a.batch <= SORTED:
                mine, rank = works[i], 0
                for j in range(a.batch):
                    if works[j] > mine - int64(j < i):    # of equal ones the first comes first
                        rank += 1
            q_start, seqlen_q, k_start, seqlen_k, all_keys = sequence_at(a, i)
            put(a, rank, Q_START, q_start)
            put(a, rank, SEQLEN_Q, seqlen_q)
            put(a, rank, K_START, k_start)
            put(a, rank, SEQLEN_K, seqlen_k)
            put(a, rank, BATCH, i)
            put(a, rank, KEYS, all_keys)
        if thread == 0:     # rows and keys of no sequence
            end_q = length_at(a.cu_seqlens_q, a.batch, a.q_step, a.total_q)
            end_k = int32(0) if CACHED else length_at(a.cu_seqlens_k, a.batch, a.k_step, a.total_k)
            put(a, a.batch, Q_START, end_q)
            put(a, a.batch, SEQLEN_Q, 0 if BY_KEYS else a.total_q - end_q)
            put(a, a.batch, K_START, end_k if BY_KEYS else 0)
            put(a, a.batch, SEQLEN_K, 0)
            put(a, a.batch, BATCH, 0)
            put(a, a.batch, KEYS, a.total_k - end_k)
        cuda.syncthreads()
        # the prefix sum of blocks: each thread sums a range of entries, then adds the sums of the ranges before
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
            put(a, i, FIRST_TILE, first * a.num_heads)
            first = added(a, first, blocks_of(a, i))
        cuda.syncthreads()
        word = thread & 7
        for i in range(thread >> 5, a.batch + 1, THREADS >> 5):     # a warp copies an entry for its blocks, a lane one word
            value = load_b32(uint64(a.table + uint64(i * ENTRY + 4 * word)))
            block = divide(load_b32(uint64(a.table + uint64(i * ENTRY + FIRST_TILE_BYTE))), a.num_heads)
            end = added(a, block, blocks_of(a, i))
            for j in range(block + ((thread & 31) >> 3), end, 4):
                put(a, a.batch + 2 + j, word, value)
    return kernel
