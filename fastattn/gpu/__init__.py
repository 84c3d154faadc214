"""The GPU engine: Numba kernels in three families, and the choice between them.

Reading order: spec.py (what is compiled), forward_simt.py (threads), forward_sm80.py (tensor cores), forward_sm90.py (asynchrony);
each meets the same helpers: mask, scores, softmax, dropout, schedule. Then preprocess.py and backward_*.py, in the same order.
compile.py makes machine code of them.
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
from .device import Device, current, device
from .packed import most_tiles
from .spec import AnyCall, BackwardCall, Call, Spec, make_backward_spec, make_spec

__all__ = ["FAMILIES", "backward", "choose", "forward", "name", "supports", "use"]

name = "gpu"
FAMILIES = ("sm90", "sm80", "simt")        # fastest first; each has both directions
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
    """The module of a kernel family for one direction. It has refuses(call, device) -> reason or None, and launch(call, spec, device,
    stream); calls are a Call forward, a BackwardCall backward."""
    return importlib.import_module(f".{direction}_{which}", __name__)


def supports(problem: Problem) -> str | None:
    """None: forward_simt and backward_simt take every valid Problem."""
    return None


def choose(call: AnyCall, d: Any) -> Any:
    """The module of the first wanted family that takes the call; UnsupportedError says why none does."""
    reasons = []
    direction = "backward" if isinstance(call, BackwardCall) else "forward"
    if most_tiles(call, 64) >= 2**31:
        raise UnsupportedError(f"{call.problem.call}(): {most_tiles(call, 64)} tiles of 64 query rows, more than 2**31 - 1.")
    for which in _wanted.get():
        module = family(which, direction)
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
        module, spec = _chosen(call, d)
        module.launch(call, spec, d, stream)


_choices: dict[Any, tuple[Problem, Any, Spec]] = {}


def _chosen(call: Call, d: Device) -> tuple[Any, Spec]:
    """choose and make_spec, remembered for a Problem that the api knows again, where only strides and alignment can differ: 20 us."""
    p, o, out = call.problem, call.operands, call.out
    if o.bias is not None or o.mask is not None or o.alibi_slopes is not None or o.sinks is not None:
        return choose(call, d), make_spec(p, o, call.lse is not None)
    key = (id(p), o.q.strides, o.k.strides, o.v.strides, out.strides, (o.q.ptr | o.k.ptr | o.v.ptr | out.ptr) % 16, call.lse is None,
           _wanted.get())
    found = _choices.get(key)
    if found is None or found[0] is not p:
        if len(_choices) >= 1000:
            _choices.clear()
        found = _choices[key] = p, choose(call, d), make_spec(p, o, call.lse is not None)
    return found[1], found[2]


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads, stream: int,
             deterministic: bool) -> None:
    """Enqueues writing the gradients on `stream`. Rows of no sequence and keys past seqused_k get gradients 0."""
    d = device(dout.device[1])
    call = BackwardCall(problem, operands, dout, out, lse, dlse, grads, deterministic)
    with current(d):
        choose(call, d).launch(call, make_backward_spec(call), d, stream)
