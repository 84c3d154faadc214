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
from .launch import starts_early

make_split, make_split_keys = late("rows.split", "make_split"), late("rows.split", "make_split_keys")
SPLIT = "{0}:l {0}_batch:q {0}_row:q {0}_head:q {0}_dim:q {0}_to:l {0}_lines:i {0}_rows:i {0}_heads:i {0}_columns:i {0}_end:i"
PANEL, PARTS = 64, 3
ALIGN = 256                 # of the parts of an operand in the temporary memory


@cache
def split_source(names: tuple[str, ...], panels: tuple[int, ...], whole: tuple[bool, ...], early: bool) -> Source:
    """The kernel for operands of so many panels. whole: see make_pieces."""
    which = " ".join(f"{name} {n}" + " whole" * x for name, n, x in zip(names, panels, whole, strict=True))
    return Source(f"split {which}" + " early" * early, lambda: ((make_split if "q" in names else make_split_keys)(panels, whole, early), 0),
                  fields_of(" ".join(SPLIT.format(name) for name in names)), SPLIT_THREADS)


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


def parts_of(call: OneCall, address: int, whole_q: bool = False) -> tuple[OneCall, int]:
    """The call with the parts of its float32 operands from an address on instead of them, and the address behind them. whole_q: q stays
    as it is."""
    views = {}
    for name, x in _operands(call, whole_q).items():
        views[name] = parts_view(x, address)
        address += -(-math.prod(views[name].shape) * 2 // ALIGN) * ALIGN
    operands = replace(call.operands, q=views.get("q", call.operands.q), k=views["k"], v=views["v"])
    if isinstance(call, BackwardCall):
        return replace(call, operands=operands, dout=views["dout"]), address
    return replace(call, operands=operands), address


@contextmanager
def as_parts(call: OneCall, launcher: Launcher, stream: int, whole_q: bool = False) -> Iterator[OneCall]:
    """The call with q, k, v, and of a backward dout, as tensor-core kernels take them, for work enqueued inside the `with`. whole_q: with
    q as it is."""
    if call.problem.dtype != "float32":
        yield call
        return
    with launcher.temporary(parts_of(call, 0, whole_q)[1], stream) as memory:
        split, _ = parts_of(call, memory, whole_q)
        _split(_operands(call, whole_q), _operands(split, whole_q), launcher, stream)
        yield split


def _operands(call: AnyCall, whole_q: bool = False) -> dict[str, View]:
    """What is split."""
    o = call.operands
    keys = {"k": o.k, "v": o.v}
    return keys if whole_q else {"q": o.q, **keys} | ({"dout": call.dout} if isinstance(call, BackwardCall) else {})


def _split(operands: dict[str, View], parts: dict[str, View], launcher: Launcher, stream: int) -> None:
    """Enqueue writing the parts of all operands."""
    panels = tuple([to.shape[-1] // (PARTS * PANEL) for to in parts.values()])
    end, values = 0, list[int]()
    for (name, x), n in zip(operands.items(), panels, strict=True):
        lines, strides = math.prod(x.shape[:-1]), x.strides if len(x.shape) == 4 else (0, *x.strides)
        end += -(-lines // (SPLIT_THREADS // (n * PANEL // SPLIT_COLUMNS)))
        values += [x.ptr, *strides, parts[name].ptr, lines, *x.shape[-3:], end]
    whole = tuple([whole_chunks(x) for x in operands.values()])
    kernel = launcher.load(split_source(tuple(operands), panels, whole, starts_early(launcher)))
    kernel.launch(end, values, stream)
