"""Backwards of 16-bit operands whose dout is float32: a kernel in front of any family's rounds it to 16 bits, which tensor cores multiply.

out stays float32: delta is computed from it before anything else (rows/preprocess.py). Without Numba.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..arrays.view import View, contiguous
from .eight_bit import ALIGN, refuses_pieces, rescale
from .runtime.launcher import Launcher
from .spec import AnyCall, BackwardCall, Call, Launch, Spec


def narrowed(call: BackwardCall, address: int) -> BackwardCall:
    """The call with a dout of q's dtype at that address."""
    shape, q = call.dout.shape, call.operands.q
    return replace(call, dout=View(address, shape, contiguous(shape, q.itemsize), q.dtype, q.device))


class Narrowing:
    """A kernel family for such backwards, over one for a dout of q's dtype."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def refuses(self, call: AnyCall, d: Any) -> str | None:
        assert isinstance(call, BackwardCall)
        return refuses_pieces(call.dout) or self.family.refuses(narrowed(call, ALIGN), d)

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        raise AssertionError("a forward has no dout")

    def backward(self, call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
        size = math.prod(call.dout.shape) * call.operands.q.itemsize
        with launcher.temporary(size, stream) as memory:
            narrow = narrowed(call, memory)
            rescale(call, call.dout, narrow.dout, (None, None), launcher, stream, 1)
            self.family.backward(narrow, spec, launcher, stream)
