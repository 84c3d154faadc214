"""Packed problems on the device: the table of sequences that tile/schedule.py reads, written by a kernel of its own
before each launch."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

from ..config import SHORT
from ..spec import AnyCall
from .compile import Source, fields_of, late
from .launcher import Launcher

ENTRY = 32          # bytes of a table entry: q_start, seqlen_q, k_start, seqlen_k, batch, first tile, keys with unused ones, one spare
PLAN_THREADS = 1024
MOST_BLOCKS = 2**31 - 1     # of a one-dimensional grid, and the largest int32
LENGTHS = "cu_seqlens_q:l q_step:q cu_seqlens_k:l k_step:q seqused_k:l used_step:q total_k:i "   # fields of make_sequence_at


def table_bytes(batch: int, blocks: int) -> int:
    """Size of a table for at most `blocks` blocks of rows (keys)."""
    return (batch + 2 + blocks) * ENTRY


make_plan = late("tile.schedule", "make_plan")


@cache
def plan_packed(used: bool, block: int, by_keys: bool = False, cached: bool = False) -> Source:
    """The kernel that writes the table for blocks of `block` rows (keys). `used`: the problem has seqused_k. `cached`: keys are in
    caches."""
    fields = f"table:l {LENGTHS} batch:i num_heads:i total_q:i blocks:i" + " append:i" * cached
    return Source(f"plan_packed {'BLOCK_N' if by_keys else 'BLOCK_M'} {block}" + " seqused_k" * used + " cached" * cached,
                  lambda: (make_plan(used, block, by_keys, cached), 0),
                  fields_of(fields), PLAN_THREADS)


def lengths(call: AnyCall) -> list[Any]:
    """Values of the fields LENGTHS: where a packed problem's lengths are. Zeros for a dense one. Of caches total_k is the room of a
    request."""
    o, p = call.operands, call.problem
    words = [word for x in (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k) for word in ((x.ptr, x.strides[0]) if x else (0, 0))]
    return [*words, (p.total_k or 0) if p.cache is None else p.seqlen_k]


def table(call: AnyCall, block: int, launcher: Launcher, stream: int, by_keys: bool = False) -> AbstractContextManager[int]:
    """Address of the table for tiles of `block` rows (keys), valid for work enqueued inside the `with`; 0 for a dense
    problem."""
    return _packed_table(call, block, launcher, stream, by_keys) if call.problem.packed else _NO_TABLE


_NO_TABLE = nullcontext(0)


@contextmanager
def _packed_table(call: AnyCall, block: int, launcher: Launcher, stream: int, by_keys: bool) -> Iterator[int]:
    p = call.problem
    cached, blocks = p.cache is not None, most_blocks(call, block, by_keys)
    source, append = plan_packed(p.seqused_k, block, by_keys, cached), [int(p.cache.append)] if p.cache is not None else []
    heads = p.num_heads_k if by_keys else p.num_heads
    with launcher.temporary(table_bytes(p.batch, blocks), stream) as memory:
        launcher.load(source).launch(1, [memory, *lengths(call), p.batch, heads, p.total_q, blocks, *append], stream)
        yield memory


def most_blocks(call: AnyCall, block: int, by_keys: bool = False) -> int:
    """Upper bound of the blocks of rows (keys) of a packed problem: only the device knows its lengths."""
    total = (call.problem.total_k if by_keys else call.problem.total_q) or 0
    return total // block + min(call.problem.batch + 1, total)


def most_tiles(call: AnyCall, block: int, by_keys: bool = False) -> int:
    """Tiles of a dense problem; an upper bound for a packed one."""
    p = call.problem
    heads, length = (p.num_heads_k, p.seqlen_k) if by_keys else (p.num_heads, p.seqlen_q)
    return heads * (most_blocks(call, block, by_keys) if p.packed else p.batch * -(-length // block))


L2_BYTES = 32 << 20        # of K and V of all heads in flight: what stays in the L2 cache


def head_group(call: AnyCall, by_keys: bool = False) -> int:
    """Number of heads scheduled together (tile/schedule.py). Under a mask, the longest tiles of the whole group then
    start first.

    Tiles of keys move much more memory for a head, and the schedule starts long sequences first anyway: for packed
    problems two heads measured better than more (docs/performance.md). Where the keys of one head fill the cache alone, up to eight
    heads of two groups come together: of 32 over 8 heads, at 65536 keys, one head 51.6 ms, two and four 50.8, eight 50.5.
    """
    p = call.problem
    hides = p.flex is not None and (p.flex.mask_mod is not None or p.flex.block is not None) and not (by_keys and p.packed)  # not measured
    masked = hides or p.mask.left is not None or p.mask.right is not None
    if not masked and (by_keys or not p.packed):
        return 1
    if by_keys and p.packed:
        return 2
    kv_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2
    heads, share = (p.num_heads_k, 1) if by_keys else (p.num_heads, p.group)      # share: query heads that read the same K and V
    if kv_bytes >= L2_BYTES and not (by_keys or p.packed):
        return min(2 * share, 8) if share > 1 else 1
    most = 32 if p.seqlen_k < SHORT and not by_keys else 16     # a larger group leaves more short tiles for the end (docs/performance.md)
    return max(1, min(L2_BYTES // max(kv_bytes, 1) * share, most * share, heads * (1 if p.packed else p.batch)))
