"""Launches of `merge_into`. Without Numba: a kernel that is in the cache is launched without it."""
from __future__ import annotations

import math
from functools import cache

from ...arrays.view import View
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import Launcher
from .config import MERGE_WARPS

make_merge_into = late("rows.merge_into", "make_merge_into")
MERGE_INTO = ("part:l part_batch:q part_row:q part_head:q part_dim:q part_lse:l part_lse_batch:q part_lse_head:q part_lse_row:q "
              "out:l out_batch:q out_row:q out_head:q out_dim:q lse:l lse_batch:q lse_head:q lse_row:q rows:i heads:i columns:i lines:i")


@cache
def merge_into_source(dtype: str, target: str, whole: bool) -> Source:
    key = f"merge_into {dtype} {target}" + " whole" * whole
    return Source(key, lambda: (make_merge_into(dtype, target, whole), 0), fields_of(MERGE_INTO), 32 * MERGE_WARPS)


def in_place(outs: list[View], lses: list[View], out: View, lse: View) -> bool:
    """Whether merge_states is asked to add one part to a running result in the dtype of the arithmetic."""
    def same(x: View, y: View) -> bool:
        return (x.ptr, x.strides, x.dtype) == (y.ptr, y.strides, y.dtype)
    return len(outs) == 2 and out.dtype == lse.dtype and same(outs[0], out) and same(lses[0], lse)


def merge_into(part: View, part_lse: View, out: View, lse: View, launcher: Launcher, stream: int) -> None:
    """Enqueue merging a part into out (batch, rows, heads, dim) and lse (batch, heads, rows), or all without the batch axis."""
    def strides(x: View, axes: int) -> tuple[int, ...]:
        return (0,) * (axes - len(x.strides)) + x.strides
    shape = (1,) * (4 - len(out.shape)) + out.shape
    whole = part.dtype == out.dtype and all(_whole(x) for x in (part, out))
    step, lines = 16 // out.itemsize if whole else 1, math.prod(shape[:3])
    if not lines:
        return
    values = [part.ptr, *strides(part, 4)[:3], part.strides[-1] * step, part_lse.ptr, *strides(part_lse, 3),
              out.ptr, *strides(out, 4)[:3], out.strides[-1] * step, lse.ptr, *strides(lse, 3), shape[1], shape[2], shape[3] // step, lines]
    launcher.load(merge_into_source(part.dtype, out.dtype, whole)).launch(-(-lines // MERGE_WARPS), values, stream)


def _whole(x: View) -> bool:
    """Whether rows are vectors of 16 bytes."""
    return (x.ptr % 16 == 0 and x.strides[-1] == x.itemsize and x.shape[-1] * x.itemsize % 16 == 0
            and all(stride % 16 == 0 for stride in x.strides[:-1]))
