"""Boolean masks of the tensor-core kernels, as bits in temporary memory. A kernel packs them before the attention.

A line is a query row and its columns are keys; of kernels that own keys (BY_KEYS) a line is a key and its columns are queries. Columns
come in blocks, those of the attention kernel's steps. A thread of a quad holds columns 8 j + 2 t and 8 j + 2 t + 1 of a block (t: its
number in the quad), and finds them as bits 2 j and 2 j + 1 of one word:

    plane of a (batch, head)    bounds of groups of GROUP lines | words [block][line][t]

Bounds are two numbers for each group: the first block in which one of its lines attends anything, and the end of the last one. They stand
in front of the words in reverse order, the first group's last. Kernels skip the blocks outside.

A mask that is the same for all heads, batch entries, lines or columns is packed once: that axis has stride 0. In blocks of 128
columns words take an eighth of the mask's bytes, in the narrowest, of 16, as many. Large masks have no other path.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from ...arrays.view import View
from ..config import GROUP
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import PROGRAMS, Launcher
from ..spec import OneCall
from .config import MASK_WARPS

PACK_MASK = ("mask:l mask_batch:q mask_head:q mask_line:q mask_column:q words:l plane:q heads:i lines:i columns:i blocks:i groups:i "
             "repeats:i")
make_pack_mask = late("rows.pack_mask", "make_pack_mask")


@cache
def pack_mask(width: int, warps: int, across: bool, whole: bool) -> Source:
    """The kernel that packs a mask for blocks of `width` columns: see make_pack_mask."""
    assert width % 16 == 0 and 16 <= width <= 128, "a word has two bits for each 8 columns"
    return Source(f"pack_mask {width} warps {warps}" + " across" * across + " whole" * whole,
                  lambda: (make_pack_mask(width, warps, across, whole), 0), fields_of(PACK_MASK), 32 * warps)


class _Axis(NamedTuple):
    """Length and stride of an axis of the mask, 1 and 0 where it is broadcast."""

    length: int
    stride: int


class Plan(NamedTuple):
    """How masks of one shape are packed.

    Parameters
    ----------
    source, grid
        The kernel and its thread blocks.
    size, bounds
        Bytes of memory, and where in it the words of the first plane begin.
    strides
        Of the words: what kernels get in place of the mask's.
    before, after
        Values of the kernel's fields between the two addresses, and behind them.
    """

    source: Source
    grid: int
    size: int
    bounds: int
    strides: tuple[int, int, int, int]
    before: tuple[int, ...]
    after: tuple[int, ...]


@lru_cache(maxsize=PROGRAMS)
def plan(shape: tuple[int, ...], by: tuple[int, ...], aligned: bool, width: int, by_keys: bool, packed: bool) -> Plan:
    """The Plan of a mask with this shape and these strides. aligned: its address is a multiple of 4. packed: the problem is."""
    batch, heads, rows, keys = (_Axis(1, 0) if stride == 0 or n == 1 else _Axis(n, stride) for n, stride in zip(shape, by, strict=True))
    lines, columns = (keys, rows) if by_keys else (rows, keys)
    # lengths of packed sequences on the device may exceed the mask, so keys behind its end must be seen to be there
    repeats = by[2 if by_keys else 3] == 0 and not packed
    columns = _Axis(width, 0) if repeats else _Axis(shape[2 if by_keys else 3], columns.stride)
    blocks, groups, planes = -(-columns.length // width), -(-lines.length // GROUP), batch.length * heads.length
    bounds = -(-8 * groups // 16) * 16
    plane = bounds + 16 * blocks * lines.length

    across = columns.stride == 0 or 0 < abs(lines.stride) < abs(columns.stride)
    inner, outer = (lines, columns) if across else (columns, lines)
    whole = aligned and inner.stride == 1 and inner.length % 4 == 0 and all(axis.stride % 4 == 0 for axis in (batch, heads, outer))
    of_group = min(lines.length, GROUP)
    pieces = blocks * -(-of_group // 64) if across else of_group * -(-blocks // 8)      # what a warp packs at a time
    source = pack_mask(width, MASK_WARPS[pieces > 2 * MASK_WARPS[0]], across, whole)

    by_line, by_block = 16 * (lines.stride != 0), 16 * lines.length * (not repeats)
    by_row, by_col = (by_block, by_line) if by_keys else (by_line, by_block)
    strides = plane * heads.length * (batch.stride != 0), plane * (heads.stride != 0), by_row, by_col
    return Plan(source, 0 if 0 in shape else planes * groups, planes * plane, bounds, strides,
                (batch.stride, heads.stride, lines.stride, columns.stride),
                (plane, heads.length, lines.length, columns.length, blocks, groups, int(repeats)))


@contextmanager
def _packed(call: OneCall, width: int, launcher: Launcher, stream: int, by_keys: bool) -> Iterator[OneCall]:
    x = call.operands.mask
    assert x is not None
    how: Plan = plan(x.shape, x.strides, x.ptr % 4 == 0, width, by_keys, call.problem.packed)
    with launcher.temporary(how.size, stream) as memory:
        words = memory + how.bounds
        launcher.load(how.source).launch(how.grid, [x.ptr, *how.before, words, *how.after], stream)
        yield replace(call, operands=replace(call.operands, mask=View(words, x.shape, how.strides, "int32", x.device)))


def mask_words(call: OneCall, width: int, launcher: Launcher, stream: int, by_keys: bool = False) -> AbstractContextManager[OneCall]:
    """The call with words in place of its mask, valid for work enqueued inside the `with`; the call itself if it has no mask.

    Strides of the mask are then bytes between planes, between lines, and between blocks of `width` columns.
    """
    return nullcontext(call) if call.operands.mask is None else _packed(call, width, launcher, stream, by_keys)
