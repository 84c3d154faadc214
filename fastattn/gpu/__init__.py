"""The GPU engine: Numba kernels in three families, and the choice between them. README.md is the map.

A call is a Problem and where its operands are (spec.Call, spec.BackwardCall). The first family in use that does not
refuse it runs it: its launch.py enqueues the kernels, which runtime/ compiles, keeps in the disk cache and loads.
"""
from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from functools import reduce
from operator import or_
from typing import Any, Protocol

from ..arrays.view import View
from ..engine import FAMILIES
from ..errors import refused
from ..memo import Recent
from ..problem import Grads, Operands, Problem
from ..registry import families_in_use, use_engine
from .rows import launch as rows
from .runtime.device import Device, current, device
from .runtime.launcher import Launcher, on_device
from .runtime.packed import MOST_BLOCKS, most_tiles
from .simt import launch as simt
from .sm80 import launch as sm80
from .sm90 import launch as sm90
from .spec import AnyCall, BackwardCall, Call, Launch, Spec, make_backward_spec, make_spec

# looked for, not imported: a kernel in the cache needs neither. The api says what to install where one is missing.
for _package in ("numba", "numba_cuda", "cuda.core"):
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}")

__all__ = ["FAMILIES", "Family", "backward", "choose", "device", "family", "forward", "merge_states", "prepare", "refuses",
           "use"]


class Family(Protocol):
    """What a family's launch.py has. None of it imports Numba where the kernels are in the cache."""

    def refuses(self, call: AnyCall, d: Device) -> str | None:
        """None, or why the family does not run the call."""

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        """What enqueues this forward, or one that differs in addresses of the same alignment only."""

    def backward(self, call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
        """Enqueue the kernels of this backward."""


_FAMILIES: dict[str, Family] = {"sm90": sm90, "sm80": sm80, "simt": simt}


def family(which: str) -> Family:
    """The kernel family of this name."""
    return _FAMILIES[which]


def use(*families: str) -> AbstractContextManager[None]:
    """fastattn.use_engine for kernel families alone: `with use("sm80", "simt"):`. Host memory keeps its engine."""
    unknown = [f for f in families if f not in FAMILIES]
    if unknown or not families:
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"use(): {given} given, the kernel families are {', '.join(FAMILIES)}")
    return use_engine(*families, "cpu")


def refuses(which: str, call: AnyCall, d: Device) -> str | None:
    """None, or why a kernel family does not run the call."""
    tiles = most_tiles(call, 64)
    if tiles > MOST_BLOCKS:
        return f"it has {tiles} tiles of 64 query rows, over 2**31 - 1"
    return _FAMILIES[which].refuses(call, d)


def choose(call: AnyCall, d: Device, families: tuple[str, ...] | None = None) -> Family:
    """The first of `families` (None: those of use_engine) that runs the call. UnsupportedError says why none does."""
    reasons = {}
    for which in families or families_in_use():
        reason = refuses(which, call, d)
        if reason is None:
            return _FAMILIES[which]
        reasons[which] = reason
    raise refused(call.problem.call, reasons, f" on {d.name} ({d.arch})")


# ---------------------------------------------------------------- calls
def forward(problem: Problem, operands: Operands, out: View, lse: View | None, stream: int,
            families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueue writing out, and lse if it is wanted. Packed rows that belong to no sequence become 0 and -inf."""
    if 0 in out.shape and (lse is None or 0 in lse.shape):
        return
    launcher, call = on_device(out.device[1]), Call(problem, operands, out, lse)
    with current(launcher.device):
        _launch_of(call, launcher, families)(call, stream)


def prepare(problem: Problem, operands: Operands, out: View, lse: View | None,
            families: tuple[str, ...] = FAMILIES) -> Any:
    """What `forward` does with dense operands of such shapes and strides, at any addresses of their alignment.

    Returns
    -------
    run(q, k, v, out, lse, stream)
        Of addresses; lse is 0 where this call has none. None for an empty output.
    """
    if 0 in out.shape:
        return None
    launcher = on_device(out.device[1])
    launch, d = _launch_of(Call(problem, operands, out, lse), launcher, families), launcher.device
    of_q, of_k, of_v, of_out, of_lse = (() if x is None else (x.shape, x.strides, x.dtype, x.device)
                                        for x in (operands.q, operands.k, operands.v, out, lse))

    def run(q: int, k: int, v: int, out: int, lse: int, stream: int) -> None:
        operands = Operands(View(q, *of_q), View(k, *of_k), View(v, *of_v))
        with current(d):
            launch(Call(problem, operands, View(out, *of_out), View(lse, *of_lse) if lse else None), stream)
    return run


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads[View],
             stream: int, deterministic: bool, families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueue writing the gradients. Rows of no sequence and keys past seqused_k get gradients 0."""
    launcher = on_device(dout.device[1])
    call = BackwardCall(problem, operands, dout, out, lse, dlse, grads, deterministic)
    with current(launcher.device):
        _launch_of(call, launcher, families)(call, stream)


def merge_states(outs: list[View], lses: list[View], out: View, lse: View, stream: int) -> None:
    """rows.launch.merge_states on the device of `out`."""
    launcher = on_device(out.device[1])
    with current(launcher.device):
        rows.merge_states(outs, lses, out, lse, launcher, stream)


# ---------------------------------------------------------------- what is remembered
_launches: Recent[Any, tuple[Problem, Launch]] = Recent()


def _launch_of(call: AnyCall, launcher: Launcher, families: tuple[str, ...]) -> Launch:
    """What enqueues the call. It is remembered for plain operands, where only addresses differ next time: saves 25 us.

    The key has the Problem's id, because hashing a Problem takes longer than all the rest. That is safe: an entry holds
    its Problem, so no other can have the same id while the entry is there, and `is` finds out when the entry is another
    Problem's.
    """
    p, o = call.problem, call.operands
    if not o.plain:
        return _prepare(call, launcher, families)
    key: tuple[Any, ...]
    if isinstance(call, Call):
        out = call.out
        key = (id(p), launcher, o.q.strides, o.k.strides, o.v.strides, out.strides, (o.q.ptr | o.k.ptr | o.v.ptr) % 16,
               out.ptr % 16, call.lse is None, families)
    else:
        g = call.grads
        views = o.q, o.k, o.v, call.dout, g.dq, g.dk, g.dv
        key = (id(p), launcher, *[x.strides for x in views], reduce(or_, [x.ptr for x in views]) % 16,
               call.deterministic, families)
    found = _launches.get(key)
    if found is None or found[0] is not p:
        found = _launches[key] = p, _prepare(call, launcher, families)
    return found[1]


def _prepare(call: AnyCall, launcher: Launcher, families: tuple[str, ...]) -> Launch:
    chosen = choose(call, launcher.device, families)
    if isinstance(call, Call):
        return chosen.prepare(call, make_spec(call.problem, call.operands, call.lse is not None), launcher)
    spec = make_backward_spec(call)

    def launch(call: BackwardCall, stream: int) -> None:
        chosen.backward(call, spec, launcher, stream)
    return launch
