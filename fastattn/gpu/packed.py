"""Packed problems on the device: the table of their sequences (schedule.py), written before the kernel that reads it."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .compile import load
from .schedule import plan_packed, table_bytes
from .spec import Call
from .workspace import temporary


@contextmanager
def table(call: Call, block_m: int, ordinal: int, stream: int) -> Iterator[int]:
    """Address of the table for tiles of `block_m` rows, valid for work enqueued inside the block; 0 for a dense problem."""
    p, o = call.problem, call.operands
    if not p.packed:
        yield 0
        return
    assert o.cu_seqlens_q is not None and o.cu_seqlens_k is not None
    source, blocks = plan_packed(p.seqused_k, block_m), most_blocks(call, block_m)
    lengths = [word for x in (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k) for word in ((x.ptr, x.strides[0]) if x else (0, 0))]
    with temporary(table_bytes(p.batch, blocks), ordinal, stream) as memory:
        load(source, ordinal).launch(1, [memory, *lengths, p.batch, p.num_heads, p.total_q, p.total_k, blocks], stream)
        yield memory


def most_blocks(call: Call, block_m: int) -> int:
    """Blocks of rows of a packed problem, at most: only the device knows its lengths."""
    total = call.problem.total_q or 0
    return total // block_m + min(call.problem.batch + 1, total)


def most_tiles(call: Call, block_m: int) -> int:
    """Tiles of a dense problem; an upper bound for a packed one."""
    p = call.problem
    if p.total_q is None:
        return p.batch * p.num_heads * -(-p.seqlen_q // block_m)
    return p.num_heads * most_blocks(call, block_m)


L2_BYTES = 32 << 20        # of K and V that heads in flight together may take


def head_group(call: Call) -> int:
    """Heads whose tiles are taken together (schedule.py): under a mask, so that long tiles of all of them start first."""
    p = call.problem
    if p.mask.left is None and p.mask.right is None and not p.packed:
        return 1
    kv_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2
    return max(1, min(L2_BYTES // max(kv_bytes, 1) * p.group, 16 * p.group, p.num_heads * (1 if p.packed else p.batch)))
