"""Operands of tensor-core kernels: 16-bit ones as they are, float32 ones as their parts in temporary memory. Without Numba."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from ...arrays.view import View, contiguous
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import Launcher
from ..runtime.packed import MOST_BLOCKS
from ..spec import AnyCall, BackwardCall, OneCall, whole_chunks
from .config import SPLIT_COLUMNS, SPLIT_THREADS

make_split = late("rows.split", "make_split")
SPLIT = "x:l x_batch:q x_row:q x_head:q x_dim:q to:l lines:i rows:i heads:i dim:i"
PANEL, PARTS = 64, 3
ALIGN = 256                 # of the parts of an operand in the temporary memory


@cache
def split_source(panels: int, whole: bool) -> Source:
    return Source(f"split {panels} panels" + " whole" * whole, lambda: (make_split(panels, whole), 0), fields_of(SPLIT), SPLIT_THREADS)


def refuses_parts(call: AnyCall) -> str | None:
    """None, or why the float32 operands of a call cannot be split: there is nothing to split, or int32 cannot count their rows."""
    if any(0 in x.shape for x in _operands(call).values()):
        return "an operand is empty"
    lines = max(math.prod(x.shape[:-1]) for x in _operands(call).values())
    return None if lines <= MOST_BLOCKS - SPLIT_THREADS else f"it has {lines} rows in all heads, over 2**31 - 1"


def parts_view(x: View, address: int) -> View:
    """The parts of `x` at an address."""
    shape = (*x.shape[:-1], PARTS * PANEL * -(-x.shape[-1] // PANEL))
    return View(address, shape, contiguous(shape, 2), "bfloat16", x.device)


def parts_of(call: OneCall, address: int) -> tuple[OneCall, int]:
    """The call with the parts of its float32 operands from an address on instead of them, and the address behind them."""
    views = {}
    for name, x in _operands(call).items():
        views[name] = parts_view(x, address)
        address += -(-math.prod(views[name].shape) * 2 // ALIGN) * ALIGN
    operands = replace(call.operands, q=views["q"], k=views["k"], v=views["v"])
    if isinstance(call, BackwardCall):
        return replace(call, operands=operands, dout=views["dout"]), address
    return replace(call, operands=operands), address


@contextmanager
def as_parts(call: OneCall, launcher: Launcher, stream: int) -> Iterator[OneCall]:
    """The call with q, k, v, and of a backward dout, as tensor-core kernels take them, for work enqueued inside the `with`."""
    if call.problem.dtype != "float32":
        yield call
        return
    with launcher.temporary(parts_of(call, 0)[1], stream) as memory:
        split, _ = parts_of(call, memory)
        for x, to in zip(_operands(call).values(), _operands(split).values(), strict=True):
            _split(x, to, launcher, stream)
        yield split


def _operands(call: AnyCall) -> dict[str, View]:
    o = call.operands
    return {"q": o.q, "k": o.k, "v": o.v} | ({"dout": call.dout} if isinstance(call, BackwardCall) else {})


def _split(x: View, to: View, launcher: Launcher, stream: int) -> None:
    """Enqueue writing the parts of `x`."""
    rows, heads, dim = x.shape[-3:]
    lines, panels = math.prod(x.shape[:-1]), to.shape[-1] // (PARTS * PANEL)
    strides = x.strides if len(x.shape) == 4 else (0, *x.strides)
    kernel = launcher.load(split_source(panels, whole_chunks(x)))
    at_once = SPLIT_THREADS // (panels * PANEL // SPLIT_COLUMNS)
    kernel.launch(-(-lines // at_once), [x.ptr, *strides, to.ptr, lines, rows, heads, dim], stream)
