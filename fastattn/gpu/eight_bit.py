"""Forwards with 8-bit operands through the kernels of 16 (or more) bits: copies in front of them widen operands, one behind them scales the
output.

An 8-bit number is exactly a float16 and a bfloat16. The scales of q and k that are arrays are multiplied into q, which is rounded once
more: to float16 for an 8-bit q, else to q's dtype. Calls that have a kernel of their own for 8 bits do not come here. Without Numba.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from ..arrays.view import EIGHT_BIT, View, contiguous
from ..problem import Problem
from .rows.config import QUANTIZE_ROWS, QUANTIZE_THREADS
from .rows.quantize_launch import four_axes
from .runtime.compile import Source, fields_of, late
from .runtime.launcher import Launcher
from .runtime.packed import MOST_BLOCKS
from .spec import AnyCall, BackwardCall, Call, Launch, Spec, make_spec

make_rescale = late("rows.rescale", "make_rescale")
RESCALE = ("x:l x_batch:q x_row:q x_head:q x_dim:q out:l out_batch:q out_row:q out_head:q out_dim:q factor:f "
           "scale0:l scale0_batch:q scale0_head:q scale1:l scale1_batch:q scale1_head:q divisor:l group:i "
           "cu_seqlens:l cu_step:q sequences:i heads:i rows:i dim:i pieces:i")
ALIGN = 256                 # of each array in the temporary memory


@cache
def rescale_source(dtype: str, target: str, packed: bool) -> Source:
    return Source(f"rescale {dtype} {target}" + " packed" * packed, lambda: (make_rescale(dtype, target, packed), 0), fields_of(RESCALE),
                  QUANTIZE_THREADS)


@dataclass(frozen=True, slots=True)
class Wide:
    """A forward without 8 bits: `copied` are the names of operands that are written first; `out_apart`: its output is not the call's."""

    call: Call
    copied: tuple[str, ...]
    out_apart: bool
    end: int                # of the temporary memory


def wide_dtype(p: Problem) -> str:
    """The dtype of q, k and v in the kernels."""
    return "float16" if p.dtype in EIGHT_BIT else p.dtype


def widened(call: Call, address: int) -> Wide:
    """The call in wider dtypes, with its temporary memory from an address on."""
    p, o, e, views = call.problem, call.operands, call.problem.eight_bit, dict[str, Any]()
    assert e is not None
    dtype = wide_dtype(p)

    def temporary(like: View, shape: tuple[int, ...]) -> View:
        nonlocal address
        made = View(address, shape, contiguous(shape, like.itemsize), like.dtype, like.device)
        address += -(-math.prod(shape) * made.itemsize // ALIGN) * ALIGN
        return made

    def typed(x: View) -> View:
        return View(0, x.shape, x.strides, dtype, x.device)
    scaled_q = o.q_scale is not None or o.k_scale is not None
    for name, x in (("q", o.q), ("k", o.k), ("v", o.v)):
        if x.dtype != dtype or (name == "q" and scaled_q):
            views[name] = temporary(typed(x), x.shape)
    apart = e.out_dtype != dtype or e.factor != 1.0 or o.v_scale is not None or o.out_scale is not None
    out = temporary(typed(call.out), call.out.shape) if apart else call.out
    operands = replace(o, **views, q_scale=None, k_scale=None, v_scale=None, out_scale=None)
    return Wide(Call(replace(p, dtype=dtype, eight_bit=None), operands, out, call.lse), tuple(views), apart, address)


def refuses_pieces(*views: View) -> str | None:
    """None, or that int32 cannot count the pieces of an array that is converted."""
    most = max(math.prod(x.shape[:-3]) * x.shape[-2] * (x.shape[-3] // QUANTIZE_ROWS + 1) for x in views)
    return None if most <= MOST_BLOCKS else f"it has {most} pieces of {QUANTIZE_ROWS} rows, over 2**31 - 1"


class Products(Protocol):
    """Launches of a kernel on 8-bit products."""

    def refuses(self, call: AnyCall, d: Any) -> str | None:
        """None, or why it does not run the call."""

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        """As a kernel family's."""


class Widening:
    """A kernel family for forwards with 8-bit operands, over one without. `products` runs the calls that it takes."""

    def __init__(self, family: Any, products: Products | None = None) -> None:
        self.family, self.products = family, products

    def refuses(self, call: AnyCall, d: Any) -> str | None:
        if isinstance(call, BackwardCall):
            return "8-bit operands have no backward"
        if self.products is not None and self.products.refuses(call, d) is None:
            return None
        return refuses_pieces(call.operands.q, call.operands.k, call.out) or self.family.refuses(widened(call, ALIGN).call, d)

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        if self.products is not None and self.products.refuses(call, launcher.device) is None:
            return self.products.prepare(call, spec, launcher)
        size = widened(call, 0).end

        def launch(call: Call, stream: int) -> None:
            with launcher.temporary(size, stream) as memory:
                wide = widened(call, memory)
                o, w, p = call.operands, wide.call.operands, call.problem
                for name in wide.copied:
                    scales = (o.q_scale, o.k_scale) if name == "q" else (None, None)
                    rescale(call, getattr(o, name), getattr(w, name), scales, launcher, stream, p.group)
                inner = make_spec(wide.call.problem, w, call.lse is not None)
                self.family.prepare(wide.call, inner, launcher)(wide.call, stream)
                if wide.out_apart:
                    assert p.eight_bit is not None
                    rescale(call, wide.call.out, call.out, (o.v_scale, None), launcher, stream, p.group, p.eight_bit.factor, o.out_scale)
        return launch

    def backward(self, call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
        raise AssertionError("problem.py refuses backwards of 8-bit operands")


def rescale(call: AnyCall, x: View, out: View, scales: tuple[View | None, View | None], launcher: Launcher, stream: int, group: int,
            factor: float = 1.0, divisor: View | None = None) -> None:
    """Enqueue writing x times scales to out."""
    x, out = four_axes(x), four_axes(out)
    batches, rows, heads, dim = x.shape
    pieces = -(-rows // QUANTIZE_ROWS)
    grid = batches * heads * pieces if dim else 0
    if not grid:
        return
    cu = call.operands.cu_seqlens_q if any(scales) else None
    values = [x.ptr, *x.strides, out.ptr, *out.strides, factor]
    for scale in scales:
        values += [0, 0, 0] if scale is None else [scale.ptr, *scale.strides]
    values += [divisor.ptr if divisor else 0, group]
    values += [0, 0, 0] if cu is None else [cu.ptr, cu.strides[0], call.problem.batch]
    launcher.load(rescale_source(x.dtype, out.dtype, cu is not None)).launch(grid, [*values, heads, rows, dim, pieces], stream)
