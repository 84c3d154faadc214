"""Config of the CPU engine: how a Problem is divided into tasks.

Whatever can change a rounding (key tiles, splits) depends on the Problem alone. So results are bitwise the same for any
number of threads.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..problem import Operands, Problem

# Rows of a task: few enough that float32 Q and O stay in L2 and that there are TASKS_PER_THREAD tasks. Many, because each
# task packs K and V again.
BLOCK_BYTES = 1 << 21
BLOCK_M = 96         # but at least so many, and a multiple of it: whole panels of 6 and of 32 rows, the same in any block
TASKS_PER_THREAD = 4
SHORT_M = 192        # a GQA group of at most so many rows (rows times heads) is one task; splits count tasks of so many rows
# Up to so many rows scores are dot products with rows of K, and K is not transposed. If these are all rows of a group, K
# and V are read in place where possible.
FEW_ROWS = 8
MIN_TASKS = 32       # with fewer tasks, long key ranges are split into parts of at least SPLIT_KEYS
SPLIT_KEYS = 1024
SHARE_FLOPS = 2.5e5  # about 5 us on one core: less is not worth another thread that is awake (1 to 2 us)
BRIEF_FLOPS = 2e6    # about 40 us on one core: less is not worth waking a thread (30 to 50 us until it comes; tasks.h)
# Longest keys whose float16 products AMX leaves to FMAs: splitting operands would cost more than its tiles win.
PARTS_KEYS = 96
PAIRS = 32           # elements of a vector of bfloat16 pairs; with them packed products beat dot products for a panel of rows
HALF = ("float16", "bfloat16")


class Lengths(NamedTuple):
    """Where the sequences are. Arrays are None for a dense problem.

    Read once for the whole call, because the caller's arrays may change while it runs. longest_q and longest_k are the
    lengths that occur, whatever max_seqlen_q and max_seqlen_k say: neither work nor memory grows with these.
    """

    longest_q: int
    longest_k: int
    cu_q: NDArray[np.int64] | None = None
    cu_k: NDArray[np.int64] | None = None
    used_k: NDArray[np.int64] | None = None
    table: NDArray[np.int64] | None = None      # of caches: the pages of each request
    page_size: int = 0                          # 0: each request's keys are all in its first page
    diagonals: NDArray[np.int64] | None = None


_dense_lengths = lru_cache(maxsize=256)(Lengths)


def read_lengths(p: Problem, o: Operands) -> Lengths:
    if p.cache is not None:
        assert o.cache is not None and o.seqused_k is not None
        cu, keys = None if o.cu_seqlens_q is None else o.cu_seqlens_q.numpy(), o.seqused_k.numpy()
        longest_q, longest_k = p.seqlen_q if cu is None else int(np.diff(cu).max(initial=0)), int(keys.max(initial=0))
        in_pages = longest_k > p.cache.page_size
        return Lengths(longest_q, longest_k, cu, None, keys, o.cache.block_table.numpy(), p.cache.page_size if in_pages else 0)
    if p.total_q is None:
        return _dense_lengths(p.seqlen_q, p.seqlen_k)
    assert o.cu_seqlens_q is not None and o.cu_seqlens_k is not None
    cu_q, cu_k = np.array(o.cu_seqlens_q.numpy(), np.int64), np.array(o.cu_seqlens_k.numpy(), np.int64)
    used = None if o.seqused_k is None else np.array(o.seqused_k.numpy(), np.int64)
    keys = np.diff(cu_k) if used is None else used
    diagonals = None if o.diagonals is None else np.array(o.diagonals.numpy(), np.int64)
    return Lengths(int(np.diff(cu_q).max(initial=0)), int(keys.max(initial=0)), cu_q, cu_k, used, diagonals=diagonals)


@dataclass(frozen=True, slots=True)
class Plan:
    """The forward's plan.

    order: sequences with query rows, longest first. first_block: number of blocks of block_m rows before each of
    them, and in total.
    """

    order: NDArray[np.int64]
    first_block: NDArray[np.int64]
    block_m: int
    splits: int
    split_keys: int
    folded: bool
    all_heads: bool
    few: bool
    direct: bool
    in_parts: bool


@lru_cache(maxsize=256)
def _dense_blocks(batch: int, seqlen_q: int, block_m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return _blocks(np.full(batch, seqlen_q, np.int64), block_m)


def _blocks(lengths: NDArray[np.int64], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(-lengths, kind="stable")[:np.count_nonzero(lengths)]
    return order.astype(np.int64), np.concatenate([[0], np.cumsum(-(-lengths[order] // block))]).astype(np.int64)


def _block_rows(seqlen_q: int, limit: int) -> int:
    """Rows of a block: a sequence is divided into equal parts, none much over the limit."""
    blocks = -(-seqlen_q // limit)
    return min(_round_up(-(-seqlen_q // blocks), BLOCK_M), _round_up(seqlen_q, 32))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _folded(p: Problem, seqlen_q: int) -> bool:
    """Whether a task has the query rows of a whole GQA group."""
    return p.group > 1 and seqlen_q * p.group <= SHORT_M


def _task_rows(p: Problem, seqlen_q: int) -> int:
    return seqlen_q * (p.group if _folded(p, seqlen_q) else 1)


def in_parts(p: Problem, lengths: Lengths) -> bool:
    """Whether AMX, where it is, multiplies float16 in parts. One rule for the forward and the backward, for the same reason as in
    `few_rows`; with caches always, because a request has the same bits in any batch.

    Never float32, whose six products of three parts take 0.8 to 1.5 times as long as FMAs, as other work on the core leaves room for tiles.
    """
    return p.dtype == "float16" and (p.cache is not None or lengths.longest_k > PARTS_KEYS)


def few_rows(p: Problem, seqlen_q: int, vector: int) -> bool:
    """Whether scores are dot products with rows of K.

    One rule for the forward and the backward: P = exp(S - lse) needs the same S as lse, to the bit if scores are huge.
    """
    return seqlen_q <= FEW_ROWS and (_task_rows(p, seqlen_q) <= FEW_ROWS or vector < PAIRS)


def plan_forward(p: Problem, o: Operands, lengths: Lengths, vector: int, reads_half: bool, threads: int) -> Plan:
    """The forward's plan. `vector`: elements per vector. `reads_half`: this level reads 16-bit and 8-bit floats in place.

    A row's result does not depend on its block, so block_m may depend on the number of threads. The splits may not.
    """
    seqlen_q, seqlen_k = lengths.longest_q, lengths.longest_k
    folded = _folded(p, seqlen_q)
    heads = p.num_heads_k if folded else p.num_heads
    rows = p.total_q if p.total_q is not None else p.batch * p.seqlen_q
    block_m = _block_m(p, rows, seqlen_q, heads, threads)
    if lengths.cu_q is None:
        order, first_block = _dense_blocks(p.batch, seqlen_q, block_m)
    else:
        order, first_block = _blocks(np.diff(lengths.cu_q), block_m)
    few, direct = few_rows(p, seqlen_q, vector), _direct(p, o, seqlen_q, vector, reads_half)
    all_heads = o.mask is None and o.flex is None and p.total_q is None and _reads_all_heads(p, o, direct, seqlen_k)
    if all_heads:
        heads, block_m = 1, max(seqlen_q, 1)
    splits = _splits(p.batch * -(-seqlen_q // SHORT_M) * heads, seqlen_k)
    splits, split_keys = _split(seqlen_k, splits)
    return Plan(order, first_block, block_m, splits, split_keys, folded, all_heads, few, direct, in_parts(p, lengths))


def _block_m(p: Problem, rows: int, longest: int, heads: int, threads: int) -> int:
    balanced, fitting = rows * heads // (threads * TASKS_PER_THREAD), BLOCK_BYTES // (4 * (p.head_dim + p.head_dim_v))
    return _block_rows(max(longest, 1), max(min(balanced, fitting), BLOCK_M))


def _direct(p: Problem, o: Operands, seqlen_q: int, vector: int, reads_half: bool) -> bool:
    """Whether K and V are read in place."""
    item = o.k.itemsize
    return (_task_rows(p, seqlen_q) <= FEW_ROWS and p.head_dim % vector == 0 and p.head_dim_v % vector == 0
            and o.k.strides[-1] == item and o.v.strides[-1] == item and (reads_half or (item > 1 and p.dtype not in HALF)))


def _reads_all_heads(p: Problem, o: Operands, direct: bool, seqlen_k: int) -> bool:
    """If a row of K holds all heads, a task with all heads reads one stream of memory; a task with one head reads pieces."""
    return direct and p.num_heads_k > 1 and seqlen_k >= 2 * SPLIT_KEYS and o.k.strides[2] < o.k.strides[1]


def _splits(tasks: int, seqlen_k: int) -> int:
    if 0 < tasks < MIN_TASKS and seqlen_k >= 2 * SPLIT_KEYS:
        return min(-(-MIN_TASKS // tasks), seqlen_k // SPLIT_KEYS)
    return 1


def _split(seqlen_k: int, splits: int) -> tuple[int, int]:
    """At most so many splits, and the keys of one: whole tiles."""
    if splits == 1 or seqlen_k == 0:
        return 1, max(seqlen_k, 1)
    split_keys = -(-seqlen_k // splits // 256) * 256
    return -(-seqlen_k // split_keys), split_keys


def plan_with_cache(p: Problem, o: Operands, lengths: Lengths, vector: int, reads_half: bool, threads: int) -> Iterator[Plan]:
    """Plans of the requests of a call with caches, which together are all of them.

    How a request is computed follows from its own query rows and from num_splits, because with one split it has the same
    bits in any batch. Requests that are computed alike share a plan.
    """
    assert p.cache is not None and lengths.used_k is not None
    keys, given = lengths.used_k.tolist(), p.cache.num_splits
    rows = [lengths.longest_q] * p.batch if lengths.cu_q is None else np.diff(lengths.cu_q).tolist()
    ways = {n: (_folded(p, n), few_rows(p, n, vector), _direct(p, o, n, vector, reads_half)) for n in set(rows)}
    alike: dict[tuple[bool, bool, bool], list[int]] = {}
    for b, n in enumerate(rows):
        if n:
            alike.setdefault(ways[n], []).append(b)
    for (folded, few, direct), requests in alike.items():
        requests.sort(key=lambda b: -rows[b] * (keys[b] + 1))
        lengths_q = [rows[b] for b in requests]
        heads, longest, longest_k = p.num_heads_k if folded else p.num_heads, max(lengths_q), max([keys[b] for b in requests])
        block_m = _block_m(p, sum(lengths_q), longest, heads, threads)
        all_heads = given is None and _reads_all_heads(p, o, direct, longest_k)
        if all_heads:
            heads, block_m = 1, longest
        splits = _splits(len(requests) * -(-longest // SHORT_M) * heads, longest_k) if given is None else given
        first_block = np.array([0, *itertools.accumulate(-(-n // block_m) for n in lengths_q)], np.int64)
        yield Plan(np.array(requests, np.int64), first_block, block_m, *_split(longest_k, splits), folded, all_heads, few, direct,
                   in_parts(p, lengths))


class Team(NamedTuple):
    """How many threads a call may use, and whether it is so brief that they should not be woken for it."""

    threads: int
    brief: bool


def team_for(p: Problem, threads: int, backward: bool = False) -> Team:
    """At most so many threads, and no more than have SHARE_FLOPS each."""
    flops = (5.0 if backward else 2.0) * p.batch * p.num_heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v)
    return Team(max(1, int(min(threads, flops / SHARE_FLOPS))), flops < BRIEF_FLOPS)


WAVE_BYTES = 32 << 20   # dQ sums in memory at a time


Wave = tuple[int, int, int, int, int]


def plan_backward(p: Problem, lengths: Lengths, padded_head_dim: int) -> Sequence[Wave]:
    """Waves (b0, b1, head_k0, head_k1, rows): sequences and key heads whose dQ sums fit WAVE_BYTES together.

    `rows` is the number of dQ rows per head in the wave.
    """
    row_bytes = max(p.group, 1) * padded_head_dim * (8 if p.dtype == "float64" else 4)
    if lengths.cu_q is None:
        return _dense_waves(p.batch, lengths.longest_q, p.num_heads_k, row_bytes)
    return _waves(np.diff(lengths.cu_q), p.num_heads_k, row_bytes)


@lru_cache(maxsize=256)
def _dense_waves(batch: int, seqlen_q: int, heads_k: int, row_bytes: int) -> Sequence[Wave]:
    return _waves(np.full(batch, seqlen_q, np.int64), heads_k, row_bytes)


def _waves(lengths: NDArray[np.int64], heads_k: int, row_bytes: int) -> Sequence[Wave]:
    """A sequence's rows start and end at multiples of 32, and the first one of a wave may start up to 31 rows late."""
    ends = np.concatenate([[0], np.cumsum(lengths + 32)])
    waves, b0 = [], 0
    while b0 < len(lengths):
        b1 = max(b0 + 1, int(np.searchsorted(ends, ends[b0] + WAVE_BYTES // row_bytes, side="right")) - 1)
        rows = int(ends[b1] - ends[b0]) + 32
        heads = max(1, WAVE_BYTES // (rows * row_bytes))
        waves += [(b0, b1, h, min(h + heads, heads_k), rows) for h in range(0, heads_k, heads)]
        b0 = b1
    return waves
