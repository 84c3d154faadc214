"""The fuzzer's problems through the public functions, their kernels run from their PTX: each number judged, each access checked.

Inside `on_ptx` the host's engine is the GPU's: a call's arrays are copied into interpreter_memory.py, the launches of a kernel family run
there, and results are copied back. `Interpreted` is a Device of tests/fuzz that does so.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import fastattn.cpu
from fastattn import gpu
from fastattn.arrays.view import View
from fastattn.gpu.spec import AnyCall, BackwardCall, Call
from fastattn.problem import Grads, Operands, Problem
from tests.fuzz.device import Device
from tests.fuzz.spec import Spec
from tests.tools.gpu import interpreter_tiles
from tests.tools.gpu.interpreter_memory import BASE, Memory

EMPTY = 0               # the address of arrays without elements, as torch's and CuPy's


class Placed:
    """Views of host memory, copied to where kernels run; one of the same bytes is the same copy."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.back = memory, list[tuple[View, View]]()

    def __call__(self, x: View | None) -> View | None:
        if x is None:
            return None
        if 0 in x.shape:
            return replace(x, ptr=EMPTY, device=("cuda", 0))
        return self.memory.place(x, x)  # type: ignore[arg-type]

    def result(self, x: View | None) -> View | None:
        there = self(x)
        if x is not None and there is not None and 0 not in x.shape:
            self.back.append((x, there))
        return there

    def operands(self, o: Operands) -> Operands:
        found = {field.name: self(x) for field in fields(o) if isinstance(x := getattr(o, field.name), View)}
        if o.flex is not None:
            found["flex"] = replace(o.flex, score_arrays=tuple(map(self, o.flex.score_arrays)),
                                    mask_arrays=tuple(map(self, o.flex.mask_arrays)), blocks=self(o.flex.blocks))
        return replace(o, **found)

    def finish(self) -> None:
        """Copy results back, and what lies between their elements."""
        for host, there in self.back:
            low, high = host.bytes_range()
            at = there.ptr - (host.ptr - low) - BASE
            ctypes.memmove(low, self.memory.bytes[at:at + high - low].ctypes.data, high - low)


class Engine:
    """The host's engine of `on_ptx`. `launched`: keys of the kernels of all calls. deterministic: of the next backward, because no engine
    of the host is told."""

    def __init__(self, families: tuple[str, ...], arch: str, run: Callable[[Memory, str], Any]) -> None:
        self.families, self.arch, self.run, self.launched, self.deterministic = families, arch, run, list[str](), False

    def _go(self, placed: Placed, call: AnyCall) -> None:
        launcher = self.run(placed.memory, self.arch)
        try:
            gpu._launch(call, launcher, self.families, 0)
        finally:
            self.launched += launcher.launched
        placed.finish()

    def forward(self, problem: Problem, operands: Operands, out: View, lse: View | None) -> None:
        if 0 in out.shape and (lse is None or 0 in lse.shape):          # as gpu.forward
            return
        placed = Placed(interpreter_tiles.Memory())
        self._go(placed, Call(problem, placed.operands(operands), placed.result(out), placed.result(lse)))  # type: ignore[arg-type]

    def backward(self, problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, 
                 grads: Grads[View]) -> None:
        placed = Placed(interpreter_tiles.Memory())
        captured = None if grads.dcaptured is None else tuple(map(placed.result, grads.dcaptured))
        there = Grads(*(placed.result(x) for x in grads), captured)
        self._go(placed, BackwardCall(problem, placed.operands(operands), placed(dout), placed(out), placed(lse),  # type: ignore[arg-type]
                                      placed(dlse), there, self.deterministic))


@contextmanager
def on_ptx(*families: str, arch: str = "sm_90a", run: Callable[[Memory, str], Any] = interpreter_tiles.Launcher) -> Iterator[Engine]:
    """Inside, calls on host memory run on these kernel families. run(memory, arch): a Launcher."""
    engine, held = Engine(families, arch, run), fastattn.cpu
    own = {name: getattr(held, name) for name in ("forward", "backward", "supports", "prepare", "prepare_backward")}
    held.forward, held.backward, held.supports = engine.forward, engine.backward, lambda problem: None  # type: ignore[assignment]
    held.prepare = held.prepare_backward = lambda *_: None
    try:
        yield engine
    finally:
        for name, function in own.items():
            setattr(held, name, function)


class Interpreted(Device):
    """Of problems whose `engine` is None."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def call(self, s: Spec, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.engine.deterministic = options.get("deterministic", False)
        return function(*arguments, **options)
