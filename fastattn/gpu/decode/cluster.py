"""Merge the results of key splits where those of a key head are a cluster of thread blocks: through shared memory, without a counter.

Each block owns every CLUSTER-th piece of four columns. The others send it theirs, which it merges in the order of the splits. So nothing
goes through global memory, no temporary memory is needed, and sums have the same order in every run.
"""
from __future__ import annotations

from typing import Any

from numba import float32, int32

from ..dsl.inline import divide, inline
from ..ptx import cluster
from ..ptx.scalar import load_shared
from ..spec import Spec
from ..tile.softmax import NEG_INF, make_decay
from .config import PIECE, WARP, DecodeConfig


def received_bytes(spec: Spec, config: DecodeConfig) -> int:
    """Bytes of shared memory for what a block receives."""
    return PIECE * config.cluster * _owned(spec, config) if config.cluster > 1 else 0


def _owned(spec: Spec, config: DecodeConfig) -> int:
    """Pieces that a block owns."""
    return -(-config.rows * (spec.head_dim_v // 4) // config.cluster)


def make_merge(spec: Spec, config: DecodeConfig, RECEIVED: int, fours: Any, result: Any, put: Any) -> Any:
    """merge(a, base, thread, place): by all threads, behind a barrier of the block and one cluster.arrive.

    fours(a): how many times four columns a row of the output has
    result(a, base, row, column): four columns of a row over this block's keys, its maximum and its sum
    put(a, place, row, column, values, maximum, total): finish and store four columns
    """
    CLUSTER, OWNED, THREADS = config.cluster, _owned(spec, config), WARP * config.warps
    decay, read, read4 = make_decay(spec), load_shared("float32", 1), load_shared("float32", 4)

    @inline
    def piece(base, split, n):
        """Shared address of piece n of those that a block owns, of a split."""
        return int32(base + RECEIVED + (split * OWNED + n) * PIECE)

    @inline
    def send(a, base, thread, place):
        i = thread
        while i < place.rows * fours(a):
            r, n = divide(i, fours(a)), divide(i, int32(CLUSTER))
            values, maximum, total = result(a, base, r, int32((i - r * fours(a)) * 4))
            to = cluster.address_in(piece(base, place.split, n), int32(i - n * CLUSTER))
            cluster.store_four(to, values[0], values[1], values[2], values[3])
            cluster.store_two(int32(to + 16), maximum, total)
            i = int32(i + THREADS)

    @inline
    def merged(a, base, n):
        """Four columns of an owned piece, its row's maximum and sum."""
        top, total = NEG_INF, float32(0)
        out0, out1, out2, out3 = float32(0), float32(0), float32(0), float32(0)
        for split in range(CLUSTER):
            top = max(top, read(int32(piece(base, int32(split), n) + 16))[0])
        for split in range(CLUSTER):
            at = piece(base, int32(split), n)
            part, x = decay(a, read(int32(at + 16))[0], top), read4(at)
            total += read(int32(at + 20))[0] * part
            out0, out1, out2, out3 = out0 + part * x[0], out1 + part * x[1], out2 + part * x[2], out3 + part * x[3]
        return (out0, out1, out2, out3), top, total

    @inline
    def merge(a, base, thread, place):
        cluster.wait()                          # all blocks have begun
        send(a, base, thread, place)
        cluster.arrive()
        cluster.wait()
        n = thread
        while n * CLUSTER + place.split < place.rows * fours(a):
            i = int32(n * CLUSTER + place.split)
            r = divide(i, fours(a))
            values, maximum, total = merged(a, base, n)
            put(a, place, r, int32((i - r * fours(a)) * 4), values, maximum, total)
            n = int32(n + THREADS)
    return merge
