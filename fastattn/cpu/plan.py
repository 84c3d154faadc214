"""Config of the CPU engine: how a Problem is cut into tasks.

Whatever can change a rounding (the key tiles and splits) depends on the Problem alone, so that results are bitwise the same for any number
of threads."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..problem import Operands, Problem

BLOCK_BYTES = 1 << 21  # float32 Q and O of a task's rows, to stay in L2; as many as leave TASKS_PER_THREAD: each packs K and V
BLOCK_M = 96         # but at least so many rows, and a multiple of it: whole panels of 6 and of 32 rows, the same ones in any block
TASKS_PER_THREAD = 4
SHORT_M = 192        # query rows times heads of a group that are one task, and rows that count as one where keys are split
FEW_ROWS = 8         # up to this many rows scores are dot products: no transposed K; and of a whole group, K and V in place if they can be
MIN_TASKS = 32       # below it, long key ranges are split, at least SPLIT_KEYS each
SPLIT_KEYS = 1024
SERIAL_FLOPS = 2e6   # about 20 us on one core: not worth waking threads
PAIRS = 32           # elements of a vector of bfloat16 pairs, whose products are cheaper than dot products from a panel of rows on
HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Plan:
    """order: sequences with rows, longest first; first_block: blocks of block_m rows before each of them, and in all."""

    order: NDArray[np.int64]
    first_block: NDArray[np.int64]
    block_m: int
    splits: int
    split_keys: int
    folded: bool
    all_heads: bool
    few: bool
    direct: bool


@lru_cache(maxsize=256)
def _dense_blocks(batch: int, seqlen_q: int, block_m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return _blocks(np.full(batch, seqlen_q, np.int64), block_m)


def _blocks(lengths: NDArray[np.int64], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(-lengths, kind="stable")[:np.count_nonzero(lengths)]
    return order.astype(np.int64), np.concatenate([[0], np.cumsum(-(-lengths[order] // block))]).astype(np.int64)


def _block_rows(seqlen_q: int, limit: int) -> int:
    """Rows of a block: a sequence in equal parts, none much over the limit."""
    blocks = -(-seqlen_q // limit)
    return min(_round_up(-(-seqlen_q // blocks), BLOCK_M), _round_up(seqlen_q, 32))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _folded(p: Problem) -> bool:
    """Whether a task has the query rows of a whole group."""
    return p.group > 1 and p.seqlen_q * p.group <= SHORT_M


def _task_rows(p: Problem) -> int:
    return p.seqlen_q * (p.group if _folded(p) else 1)


def few_rows(p: Problem, vector: int) -> bool:
    """Whether scores are dot products with rows of K. One rule for the forward and the backward: P = exp(S - lse) needs the S of which
    lse is, to the bit where scores are huge."""
    return p.seqlen_q <= FEW_ROWS and (_task_rows(p) <= FEW_ROWS or vector < PAIRS)


def plan_forward(p: Problem, o: Operands, vector: int, reads_half: bool, threads: int) -> Plan:
    """`vector`: elements of a vector; `reads_half`: this instruction set widens 16-bit floats in place.

    A row's result does not depend on the block it is in, so block_m may follow the number of threads; the splits may not.
    """
    folded = _folded(p)
    heads = p.num_heads_k if folded else p.num_heads
    rows = p.total_q if p.total_q is not None else p.batch * p.seqlen_q
    balanced, fitting = rows * heads // (threads * TASKS_PER_THREAD), BLOCK_BYTES // (4 * (p.head_dim + p.head_dim_v))
    block_m = _block_rows(max(p.seqlen_q, 1), max(min(balanced, fitting), BLOCK_M))
    if p.total_q is None:
        order, first_block = _dense_blocks(p.batch, p.seqlen_q, block_m)
    else:
        assert o.cu_seqlens_q is not None
        order, first_block = _blocks(np.diff(o.cu_seqlens_q.numpy().astype(np.int64)), block_m)
    item = o.k.itemsize
    task_rows, few = _task_rows(p), few_rows(p, vector)
    direct = (task_rows <= FEW_ROWS and p.head_dim % vector == 0 and p.head_dim_v % vector == 0
              and o.k.strides[-1] == item and o.v.strides[-1] == item and (p.dtype not in HALF or reads_half))
    # rows of K and V lie head by head: one stream of memory for a task that has all heads, pieces of it for one that has one
    all_heads = (direct and p.num_heads_k > 1 and o.mask is None and p.total_q is None and p.seqlen_k >= 2 * SPLIT_KEYS
                 and o.k.strides[2] < o.k.strides[1])
    if all_heads:
        heads, block_m = 1, max(p.seqlen_q, 1)
    tasks = p.batch * -(-p.seqlen_q // SHORT_M) * heads
    splits = 1
    if 0 < tasks < MIN_TASKS and p.seqlen_k >= 2 * SPLIT_KEYS:
        splits = min(-(-MIN_TASKS // tasks), p.seqlen_k // SPLIT_KEYS)
    split_keys = -(-p.seqlen_k // splits // 256) * 256 if splits > 1 else max(p.seqlen_k, 1)
    splits = -(-p.seqlen_k // split_keys) if splits > 1 else 1
    return Plan(order, first_block, block_m, splits, split_keys, folded, all_heads, few, direct)


def threads_for(p: Problem, threads: int) -> int:
    """1 for work too small to share."""
    flops = 2.0 * p.batch * p.num_heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v)
    return 1 if flops < SERIAL_FLOPS else threads


WAVE_BYTES = 32 << 20   # float sums of dQ held at once


def plan_backward(p: Problem, o: Operands, padded_head_dim: int) -> list[tuple[int, int, int, int, int]]:
    """Waves (b0, b1, head_k0, head_k1, rows): sequences and key heads whose dQ sums fit WAVE_BYTES, `rows` query rows per head."""
    if p.total_q is None:
        lengths = np.full(p.batch, p.seqlen_q, np.int64)
    else:
        assert o.cu_seqlens_q is not None
        lengths = np.diff(o.cu_seqlens_q.numpy().astype(np.int64))
    row_bytes = p.group * padded_head_dim * (8 if p.dtype == "float64" else 4)
    waves, b0 = [], 0
    while b0 < p.batch:
        ends = np.cumsum(lengths[b0:])
        b1 = b0 + max(1, int(np.searchsorted(ends, WAVE_BYTES // row_bytes, side="right")))
        rows = int(ends[b1 - b0 - 1])
        heads = max(1, WAVE_BYTES // max(rows * row_bytes, 1))
        waves += [(b0, b1, h, min(h + heads, p.num_heads_k), rows) for h in range(0, p.num_heads_k, heads)]
        b0 = b1
    return waves
