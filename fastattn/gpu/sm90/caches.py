"""The Hopper forward over caches: which calls it runs, its tiling, and what its kernel has to know. Without Numba: see runtime/compile.py.

A block of K or V is loaded in boxes of rows that lie in one page each. So a page's size and the block's have a common divisor, the rows of
a box. Where a request has one page alone, a box is the block: TMA reads rows behind the page as zeros.
"""
from __future__ import annotations

import math
from dataclasses import replace

from ...arrays.view import View
from ..decode import launch as decode
from ..decode.config import FEW_QUERIES, few_rows, page_division
from ..runtime.device import Device
from ..runtime.tensormap import PANEL
from ..spec import Call, Spec
from .config import ForwardSm90Config, choose_forward, panel_columns

LENGTHS = " lengths:l lengths_batch:q append:i"
LEAST_BOX = 16              # rows: more boxes than eight of a block of 128 keys take longer to issue than the block's MMAs
MOST_LOADS = 16             # of K and V of a block by one producer, which take it half as long as the MMAs of 128 keys at head_dim 128
# Queries of a request over 8-bit caches. A query and key of 32 heads of 128, 8 with keys, takes the split-key kernel 1.2e-10 s at 140
# TFLOP/s; a key's rewriting 1.5e-9 s (widened) or 1e-9, and its products with a tile of 128 rows 3.5e-9 or 2.3e-9. 128 queries run at 435
# and 515 TFLOP/s; 32 is predicted, to be measured
FEW_EIGHT = 32
MOST_KEYS = 2**31 - 1024    # of a request: positions behind a block of keys are int32, too
PAGES = " pages:l pages_batch:q pages_entry:q last_page:i page_size:i page_magic:I page_shift:i"


def pages_of(call: Call) -> View | None:
    """The block table (batch, pages of a request), or (batch,) for one page each. None: request b has row b of its caches."""
    extra = call.operands.cache
    assert extra is not None
    return None if extra.block_table.device != call.operands.k.device else extra.block_table        # else the host made it


def spec_of(call: Call, spec: Spec) -> Spec:
    """The Spec of the kernel."""
    return replace(spec, lengths=True, paged=pages_of(call) is not None)


def tiling(call: Call, spec: Spec) -> ForwardSm90Config:
    """The kernel's tiling.

    Nothing that differs between batches changes what is added to what: with num_splits=1 a request has the same bits in all of them. So
    lengths are taken for long, and the widest heads for packed. Blocks have a power of two of keys, because pages do.
    """
    wide = max(spec.head_dim, spec.head_dim_v) > 192
    config = choose_forward(replace(spec, packed=spec.packed or wide), seqlen_q=call.problem.seqlen_q)
    block_n = 1 << (config.block_n.bit_length() - 1)
    if not spec.paged:
        return replace(config, block_n=block_n)
    box = _box(call, block_n)
    whole = box == call.operands.k.shape[1]
    # parts of pages: 8 to 16 bytes of the producer's registers would spill beside three consumers
    block_m = 128 if config.consumers == 3 and box < block_n and not whole else config.block_m
    late = config.consumers == 2 and _is_late(spec, block_n, box)
    return replace(config, block_m=block_m, block_n=block_n, box=box, whole=whole, wide_producer=late)


def _is_late(spec: Spec, block_n: int, box: int) -> bool:
    """Whether one producer is late with so many boxes: then V has another one, and both have more registers."""
    return block_n // box * (panel_columns(spec.head_dim) + panel_columns(spec.head_dim_v)) // PANEL > MOST_LOADS


def _box(call: Call, block_n: int) -> int:
    """Rows of a box."""
    table = pages_of(call)
    alone = table is None or len(table.shape) == 1 or table.shape[1] == 1
    return block_n if alone else math.gcd(call.operands.k.shape[1], block_n)


def refuses(call: Call, spec: Spec) -> str | None:
    """None, or why this kernel does not run a call of attention_with_kvcache that `sm90.launch.refuses` finds nothing else against."""
    p, k = call.problem, call.operands.k
    assert p.cache is not None
    if p.dtype == "float32" or p.cache.dtype != p.dtype:
        return f"its products are of 16 bits, q is {call.operands.q.dtype} and the caches are {p.cache.dtype}"
    if p.seqlen_k > MOST_KEYS:
        return f"a request has room for {p.seqlen_k} keys, over {MOST_KEYS}"
    if p.packed and p.cache.num_splits == 1:
        return "packed requests of few rows would have other bits than alone, and num_splits=1 promises the same ones: pack without it"
    spec = spec_of(call, spec)
    if _box(call, tiling(call, spec).block_n) < LEAST_BOX:
        return f"pages have {k.shape[1]} keys, not a multiple of {LEAST_BOX}"
    return None


def by_splits(call: Call, d: Device, tiled: str | None) -> bool:
    """Whether the split-key kernel runs the call, and not the tiled one. tiled: why that does not run it.

    The split-key kernel takes up to MOST_ROWS query rows of a key head, where the tiled one would read K and V for every query head, and up
    to FEW_QUERIES queries of any number of heads, where its tiles would be padding. Of 8-bit caches, which are rewritten in front of a
    tiled kernel, up to FEW_EIGHT. With num_splits=1 it takes all: a request has the same bits in any batch.
    """
    p = call.problem
    assert p.cache is not None
    if decode.refuses_caches(call) is not None:
        return False
    few = FEW_QUERIES if p.eight_bit is None else FEW_EIGHT
    return tiled is not None or p.cache.num_splits == 1 or p.seqlen_q <= few or few_rows(p, d.num_sms)


def lengths(call: Call) -> tuple[int, ...]:
    """Values of LENGTHS."""
    used, cache = call.operands.seqused_k, call.problem.cache
    assert cache is not None and used is not None
    return used.ptr, used.strides[0], int(cache.append)


def values(call: Call) -> tuple[int, ...]:
    """Values of LENGTHS and, with pages, of PAGES."""
    p, table, found = call.problem, pages_of(call), lengths(call)
    assert p.cache is not None
    if table is not None:
        entry = table.strides[1] if len(table.shape) == 2 else 0
        found += (table.ptr, table.strides[0], entry, p.cache.pages - 1, p.cache.page_size, *page_division(p.cache.page_size))
    return found
