"""The GPU engine: Numba kernels in three families, and the choice between them.

Reading order: spec.py (what is compiled), forward_simt.py (threads), forward_sm80.py (tensor cores), forward_sm90.py (asynchrony);
each meets the same helpers: mask, scores, softmax, dropout, schedule. compile.py makes machine code of them.
"""
from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import cuda.core  # noqa: F401
import numba.cuda  # noqa: F401  both here, so that where one is missing the api says what to install

from ..buffers import Grads, View
from ..errors import UnsupportedError
from ..problem import Operands, Problem
from .device import current, device
from .packed import most_tiles
from .spec import Call, make_spec

__all__ = ["FAMILIES", "backward", "choose", "forward", "name", "supports", "use"]

name = "gpu"
FAMILIES = ("sm90", "sm80", "simt")        # fastest first
_wanted: ContextVar[tuple[str, ...]] = ContextVar("fastattn_gpu_families", default=FAMILIES)


@contextlib.contextmanager
def use(*families: str) -> Iterator[None]:
    """Only these kernel families, in this order, inside the block: `with use("sm80", "simt"):`."""
    unknown = [f for f in families if f not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"use(): {', '.join(map(repr, unknown)) or 'nothing'} given, the kernel families are {', '.join(FAMILIES)}")
    token = _wanted.set(families)
    try:
        yield
    finally:
        _wanted.reset(token)


@cache
def family(which: str, direction: str = "forward") -> Any:
    """The module of a kernel family. It has refuses(call, device) -> reason or None, and launch(call, spec, device, stream)."""
    return importlib.import_module(f".{direction}_{which}", __name__)


def supports(problem: Problem) -> str | None:
    """None: forward_simt takes every valid Problem."""
    return None


def choose(call: Call, d: Any) -> Any:
    """The first wanted family that takes the call; UnsupportedError says why none does."""
    reasons = []
    if most_tiles(call, 64) >= 2**31:
        raise UnsupportedError(f"{call.problem.call}(): {most_tiles(call, 64)} tiles of 64 query rows, more than 2**31 - 1.")
    for which in _wanted.get():
        module = family(which)
        reason = module.refuses(call, d)
        if reason is None:
            return module
        reasons.append(f"{which}: {reason}")
    raise UnsupportedError(f"{call.problem.call}(): no kernel takes this call on {d.name} ({d.arch}): {'; '.join(reasons)}.")


def forward(problem: Problem, operands: Operands, out: View, lse: View | None, stream: int) -> None:
    """Enqueues writing out, and lse where wanted, on `stream`. Rows of a packed output that belong to no sequence become 0 and -inf."""
    d = device(out.device[1])
    if 0 in out.shape and (lse is None or 0 in lse.shape):
        return
    call = Call(problem, operands, out, lse)
    with current(d):
        choose(call, d).launch(call, make_spec(problem, operands, lse is not None), d, stream)


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads, stream: int,
             deterministic: bool) -> None:
    raise UnsupportedError(f"{problem.call}(): the GPU engine has no backward kernels yet; engine='cpu' takes host arrays.")
