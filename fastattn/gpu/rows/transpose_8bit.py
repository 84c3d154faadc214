"""V of 8-bit floats transposed for wgmma, which wants what it sums over side by side: one pass over memory. And the tiles' scales.

    v (batch, key, head, dim)   ->   (batch, head, panel, dim, PANEL keys), contiguous

The keys of each 32 are in the order that probabilities have in registers (ptx/wgmma_8bit.KEY_OF); behind the last key are zeros. A block
turns KEYS keys of one head: a thread reads words of four columns of four keys and turns 4 x 4 bytes.

Packed: sequence i begins at block k_start / KEYS + i, so that each has blocks of its own. The block that follows its last is another's.

CACHED: keys are in a cache, as append.py has it, and how many a request has is found on the device. K is copied beside it, for TMA, to
(batch, room, key heads, dim). Blocks behind a request's last key are not written, but for the first.

scales has, for each (batch, key head), the factor from q.k to exponents of 2 and that of the output.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import (
    copy_bytes,
    load_b32,
    load_b32_if,
    load_f32,
    load_shared_b32,
    shared_address,
    store_f32,
    store_shared_b32,
    store_words,
)
from ..ptx.sync import let_next_start
from ..ptx.wgmma_8bit import transpose_bytes
from ..tile.requests import PLACE, make_places, make_request_at
from ..tile.schedule import make_sequence_at
from .config import TRANSPOSE_THREADS as THREADS


def make_transpose(HEAD_DIM: int, KEYS: int, PANEL: int, PACKED: bool, USED: bool, CACHED: bool = False,
                   PAGED: bool = False) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    WORDS, PITCH, PIECES = HEAD_DIM // 4, KEYS + 4, PANEL // 16     # a pitch that is no multiple of 128: no bank conflicts
    VECTORS = HEAD_DIM // 16
    sequence_at, request_at, copy, PLACES = make_sequence_at(USED), make_request_at(PACKED), copy_bytes(16), HEAD_DIM * PITCH
    find, get = make_places(KEYS, THREADS, PAGED)

    @inline
    def key_of(place):
        """The key at a place, KEY_OF. At the next three places are key + 1, key + 8 and key + 9."""
        p = place & 31
        return int32((place - p) + 8 * (2 * (p >> 4) + ((p >> 1) & 1)) + 2 * ((p >> 2) & 3) + (p & 1))

    @inline
    def first_block(a, i):
        return int32(divide(sequence_at(a, i)[2], int32(KEYS)) + i)

    @inline
    def sequence_of(a, block):
        """The last sequence whose first block is at or before this one."""
        low, high = int32(0), int32(a.batch)
        while high - low > 1:
            middle = int32((low + high) >> 1)
            if first_block(a, middle) <= block:
                low = middle
            else:
                high = middle
        return low

    @inline
    def rows_of(a, block, batch):
        """(first row of v, keys that are left from there)."""
        if PACKED:
            if a.batch == 0:
                return int32(0), int32(0)
            else:
                i = sequence_of(a, block)
                _, _, k_start, seqlen_k, _ = sequence_at(a, i)
                first = int32((block - first_block(a, i)) * KEYS)
                return int32(k_start + first), int32(seqlen_k - first)
        elif CACHED:
            return int32(block * KEYS), int32(request_at(a, batch).keys - block * KEYS)
        else:
            return int32(block * KEYS), int32(a.seqlen_k - block * KEYS)

    @inline
    def load_v(a, base, batch, head, row, key, left, word):
        """Four columns of a key that is `key` behind `row`; 0 where there is none."""
        if CACHED:
            value = int32(0)
            if key < left:
                page, line = get(int32(base + PLACES), key)
                value = load_b32(uint64(int64(a.v) + page * a.v_batch + line * a.v_row + head * a.v_head + word * 4))
            return value
        else:
            at = int64(a.v) + batch * a.v_batch + row * a.v_row + head * a.v_head + key * a.v_row + word * 4
            return load_b32_if(uint64(at), int32(key < left))

    @inline
    def copy_k(a, base, batch, head, row, left, thread):
        for n in range(thread, min(left, KEYS) * VECTORS, THREADS):
            key, column = int32(n // VECTORS), int32((n % VECTORS) * 16)
            page, line = get(int32(base + PLACES), key)
            to = a.k_to + ((int64(batch) * a.seqlen_k + row + key) * a.heads + head) * HEAD_DIM + column
            copy(uint64(to), uint64(int64(a.k) + page * a.k_batch + line * a.k_row + head * a.k_head + column))

    @inline
    def scale_at(pointer, by_batch, by_head, batch, head):
        if pointer != 0:
            return load_f32(uint64(int64(pointer) + batch * by_batch + head * by_head))
        else:
            return float32(1)

    @inline
    def put_scales(a, batch, head):
        score = (a.log2_scale * scale_at(a.q_scale, a.q_scale_batch, a.q_scale_head, batch, head)
                 * scale_at(a.k_scale, a.k_scale_batch, a.k_scale_head, batch, head))
        out = a.factor * scale_at(a.v_scale, a.v_scale_batch, a.v_scale_head, batch, head) / scale_at(a.out_scale, 0, 0, batch, head)
        to = uint64(int64(a.scales) + 8 * (int64(batch) * a.heads + head))
        store_f32(to, score)
        store_f32(to + uint64(4), out)

    @inline
    def turn_v(a, base, plane, block, batch, head, row, left, thread):
        for n in range(thread, WORDS * (KEYS // 4), THREADS):
            place, word = int32(n // WORDS * 4), int32(n % WORDS)
            key = key_of(place)
            w0, w1 = load_v(a, base, batch, head, row, key, left, word), load_v(a, base, batch, head, row, int32(key + 1), left, word)
            w2 = load_v(a, base, batch, head, row, int32(key + 8), left, word)
            w3 = load_v(a, base, batch, head, row, int32(key + 9), left, word)
            turned = transpose_bytes(w0, w1, w2, w3)
            to = int32(base + word * 4 * PITCH + place)
            store_shared_b32(to, turned[0])
            store_shared_b32(int32(to + PITCH), turned[1])
            store_shared_b32(int32(to + 2 * PITCH), turned[2])
            store_shared_b32(int32(to + 3 * PITCH), turned[3])
        cuda.syncthreads()
        result = int64(a.vt) + (int64(plane) * a.blocks + block) * (HEAD_DIM * KEYS)
        for n in range(thread, HEAD_DIM * (KEYS // 16), THREADS):
            dim, piece = int32(n // PIECES % HEAD_DIM), int32(n // (PIECES * HEAD_DIM) * PIECES + n % PIECES)
            at = int32(base + dim * PITCH + piece * 16)
            store_words(uint64(result + int64(n) * 16), load_shared_b32(at), load_shared_b32(int32(at + 4)), load_shared_b32(int32(at + 8)),
                        load_shared_b32(int32(at + 12)))

    def kernel(a):
        let_next_start()        # the forward, which waits for the end of this kernel
        base = int32(shared_address(cuda.shared.array(0, uint8)))
        t, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        plane = divide(t, a.blocks)
        block, batch = int32(t - plane * a.blocks), divide(plane, a.heads)
        head = int32(plane - batch * a.heads)
        row, left = rows_of(a, block, batch)
        if CACHED:
            find(a, int32(base + PLACES), batch, row, left, thread)
            cuda.syncthreads()
            copy_k(a, base, batch, head, row, left, thread)
        if not CACHED or left > 0 or block == 0:
            turn_v(a, base, plane, block, batch, head, row, left, thread)
        if PACKED:      # scales of all sequences: by the blocks of each head together
            for i in range(block * THREADS + thread, a.batch, a.blocks * THREADS):
                put_scales(a, int32(i), head)
        elif block == 0 and thread == 0:
            put_scales(a, batch, head)
    return kernel, PLACES + PLACE * KEYS * CACHED
