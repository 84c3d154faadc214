"""Launches of quantize_fp8's kernels. Without Numba: a kernel that is in the cache is launched without it."""
from __future__ import annotations

from functools import cache

from ...arrays.view import View
from ...errors import UnsupportedError
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import Launcher
from ..runtime.packed import MOST_BLOCKS
from .config import QUANTIZE_ROWS, QUANTIZE_THREADS

make_magnitude, make_scale = late("rows.quantize", "make_magnitude"), late("rows.quantize", "make_scale")
make_quantize = late("rows.quantize", "make_quantize")
_PIECES = "heads:i rows:i dim:i pieces:i"
_X = "x:l x_batch:q x_row:q x_head:q x_dim:q "
MAGNITUDE = _X + "tops:l " + _PIECES
SCALE = "tops:l scale:l batches:i heads:i pieces:i by_batch:i by_head:i"
QUANTIZE = _X + "out:l out_batch:q out_row:q out_head:q out_dim:q scale:l by_batch:i by_head:i " + _PIECES


@cache
def magnitude_source(dtype: str) -> Source:
    return Source(f"magnitude {dtype}", lambda: (make_magnitude(dtype), 0), fields_of(MAGNITUDE), QUANTIZE_THREADS)


@cache
def scale_source(dtype: str, target: str) -> Source:
    return Source(f"scale {dtype} {target}", lambda: (make_scale(dtype, target), 0), fields_of(SCALE), QUANTIZE_THREADS)


@cache
def quantize_source(dtype: str, target: str) -> Source:
    return Source(f"quantize {dtype} {target}", lambda: (make_quantize(dtype, target), 0), fields_of(QUANTIZE), QUANTIZE_THREADS)


def four_axes(x: View) -> View:
    """A packed (total, num_heads, head_dim) view as that of one batch entry."""
    return x if len(x.shape) == 4 else View(x.ptr, (1, *x.shape), (0, *x.strides), x.dtype, x.device, x.owner, x.readonly)


def quantize(x: View, out: View, scale: View, launcher: Launcher, stream: int) -> None:
    """Enqueue writing out and scale, contiguous float32 (1,), (num_heads,) or (batch, num_heads)."""
    x, out = four_axes(x), four_axes(out)
    batches, rows, heads, dim = x.shape
    by_head, by_batch = int(scale.shape != (1,)), int(len(scale.shape) == 2)
    sizes, groups = (heads, rows, dim), (heads if by_head else 1) * (batches if by_batch else 1)
    pieces = -(-rows // QUANTIZE_ROWS) if dim else 0
    grid = batches * heads * pieces
    if grid > MOST_BLOCKS:
        raise UnsupportedError(f"quantize_fp8(): {grid} pieces of {QUANTIZE_ROWS} rows, more than 2**31 - 1.")
    with launcher.temporary(grid * (8 if x.dtype == "float64" else 4), stream) as tops:
        if grid:
            launcher.load(magnitude_source(x.dtype)).launch(grid, [x.ptr, *x.strides, tops, *sizes, pieces], stream)
        if groups:
            launcher.load(scale_source(x.dtype, out.dtype)).launch(
                groups, [tops, scale.ptr, batches, heads, pieces, by_batch, by_head], stream)
        if grid:
            values = [x.ptr, *x.strides, out.ptr, *out.strides, scale.ptr, by_batch, by_head, *sizes, pieces]
            launcher.load(quantize_source(x.dtype, out.dtype)).launch(grid, values, stream)
