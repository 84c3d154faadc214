"""The GPU engine: Numba kernels in three families, and the choice between them.

Reading order: spec.py (what is compiled), forward_simt.py (threads), forward_sm80.py (tensor cores), forward_sm90.py (asynchrony),
forward_decode.py (few queries, whose keys are split); each meets the same helpers: mask, scores, softmax, dropout, schedule. Then
preprocess.py and backward_*.py, in the same order. launch_*.py say what each forward takes and launch it; compile.py makes machine code,
cache.py keeps it.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager
from functools import reduce
from operator import or_
from typing import Any

from ..arrays.view import View
from ..engine import FAMILIES
from ..errors import refused
from ..memo import Recent
from ..problem import Grads, Operands, Problem
from ..registry import families_in_use, use_engine
from .runtime.compile import late
from .runtime.device import Device, current, device
from .runtime.packed import most_tiles
from .spec import AnyCall, BackwardCall, Call, Launch, Spec, make_backward_spec, make_spec

# looked for, not imported: a kernel in the cache needs neither. The api says what to install where one is missing.
for _package in ("numba", "numba_cuda", "cuda.core"):
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}")

__all__ = ["FAMILIES", "backward", "choose", "family", "forward", "merge_states", "prepare", "refuses", "use"]


def use(*families: str) -> AbstractContextManager[None]:
    """fastattn.use_engine for kernel families alone: `with use("sm80", "simt"):`. Calls in host memory stay as they are."""
    unknown = [f for f in families if f not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"use(): {', '.join(map(repr, unknown)) or 'nothing'} given, the kernel families are {', '.join(FAMILIES)}")
    return use_engine(*families, "cpu")


@functools.cache
def family(which: str, direction: str = "forward") -> Any:
    """The module that launches a kernel family in one direction. It has refuses(call, device) -> reason or None. Forward, prepare(call,
    spec, device) gives a launch(call, stream); backward, there is launch(call, spec, device, stream)."""
    try:
        return importlib.import_module(f".{which}.{'launch' if direction == 'forward' else direction}", __name__)
    except ImportError as error:        # Numba is there and does not load, say beside a newer NumPy
        raise ImportError(f"the {direction} of {which} cannot be loaded ({error}); it needs numba-cuda and cuda-core: "
                          "pip install 'fastattn[gpu]'.") from error


def refuses(which: str, call: AnyCall, d: Device) -> str | None:
    """None, or why a kernel family does not take the call."""
    tiles = most_tiles(call, 64)
    if tiles >= 2**31:
        return f"it has {tiles} tiles of 64 query rows, over 2**31 - 1"
    return family(which, _direction(call)).refuses(call, d)  # type: ignore[no-any-return]


def _direction(call: AnyCall) -> str:
    return "backward" if isinstance(call, BackwardCall) else "forward"


def choose(call: AnyCall, d: Device, families: tuple[str, ...] | None = None) -> Any:
    """The module of the first of `families` (None: those of use_engine) that takes the call; UnsupportedError says why none does."""
    reasons = {}
    for which in families or families_in_use():
        reason = refuses(which, call, d)
        if reason is None:
            return family(which, _direction(call))
        reasons[which] = reason
    raise refused(call.problem.call, reasons, f" on {d.name} ({d.arch})")


def forward(problem: Problem, operands: Operands, out: View, lse: View | None, stream: int, families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueues writing out, and lse where wanted, on `stream`. Rows of a packed output that belong to no sequence become 0 and -inf."""
    d = device(out.device[1])
    if 0 in out.shape and (lse is None or 0 in lse.shape):
        return
    call = Call(problem, operands, out, lse)
    with current(d):
        _prepared(call, d, families)(call, stream)


def prepare(problem: Problem, operands: Operands, out: View, lse: View | None, families: tuple[str, ...] = FAMILIES) -> Any:
    """What `forward` does with such operands at any addresses of their alignment: a function of operands, out, lse and stream."""
    d = device(out.device[1])
    if 0 in out.shape:
        return None
    launch = _prepared(Call(problem, operands, out, lse), d, families)

    def run(operands: Operands, out: View, lse: View | None, stream: int) -> None:
        with current(d):
            launch(Call(problem, operands, out, lse), stream)
    return run


_launches: Recent[Any, tuple[Problem, Launch]] = Recent()


def _prepared(call: Call, d: Device, families: tuple[str, ...]) -> Launch:
    """The chosen family's launch, remembered for a Problem that the api knows again, where only addresses may differ: 25 us."""
    p, o, out = call.problem, call.operands, call.out
    if not o.plain:
        return _prepare(call, d, families)
    key = (id(p), d.ordinal, o.q.strides, o.k.strides, o.v.strides, out.strides, (o.q.ptr | o.k.ptr | o.v.ptr) % 16, out.ptr % 16,
           call.lse is None, families)
    found = _launches.get(key)
    if found is None or found[0] is not p:
        found = _launches[key] = p, _prepare(call, d, families)
    return found[1]


def _prepare(call: Call, d: Device, families: tuple[str, ...]) -> Launch:
    spec = make_spec(call.problem, call.operands, call.lse is not None)
    return choose(call, d, families).prepare(call, spec, d)  # type: ignore[no-any-return]


merge_states = late("rows.merge", "merge_states")     # outs, lses, out, lse, stream


_choices: Recent[Any, tuple[Problem, Any, Spec]] = Recent()


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads, stream: int,
             deterministic: bool, families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueues writing the gradients on `stream`. Rows of no sequence and keys past seqused_k get gradients 0."""
    d = device(dout.device[1])
    call = BackwardCall(problem, operands, dout, out, lse, dlse, grads, deterministic)
    with current(d):
        module, spec = _chosen_backward(call, d, families)
        module.launch(call, spec, d, stream)


def _chosen_backward(call: BackwardCall, d: Device, families: tuple[str, ...]) -> tuple[Any, Spec]:
    """choose and make_backward_spec, remembered as in _prepared."""
    p, o, g = call.problem, call.operands, call.grads
    if not o.plain:
        return choose(call, d, families), make_backward_spec(call)
    views = o.q, o.k, o.v, call.dout, g.dq, g.dk, g.dv
    pointers = reduce(or_, (x.ptr for x in views))
    key = (id(p), d.ordinal, *(x.strides for x in views), pointers % 16, call.deterministic, families)
    found = _choices.get(key)
    if found is None or found[0] is not p:
        found = _choices[key] = p, choose(call, d, families), make_backward_spec(call)
    return found[1], found[2]
