"""The fuzzer's problems through the public functions without a GPU: each number judged, each access checked.

Inside `on_ptx` and `on_threads` the host's engine is the GPU's. `on_ptx` copies a call's arrays into interpreter_memory.py, runs the
launches of kernel families from their PTX, and copies results back. `on_threads` runs the text of kernels on plain threads (emulator.py),
compiling nothing. `Interpreted` is the Device of tests/fuzz for both.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import fastattn.cpu
from fastattn import gpu
from fastattn.arrays.view import View
from fastattn.gpu.spec import AnyCall, BackwardCall, Call
from fastattn.problem import Grads, Operands, Problem
from tests.fuzz.device import Device
from tests.fuzz.spec import Spec
from tests.tools.gpu import emulator, interpreter_tiles
from tests.tools.gpu.interpreter_memory import BASE, Memory

EMPTY = 0               # the address of arrays without elements, as torch's and CuPy's
CUDA = "cuda", 0


class Kept:
    """Views of host memory, where the emulator finds them."""

    def __init__(self, memory: emulator.Memory) -> None:
        self.memory = memory

    def __call__(self, x: View | None) -> View | None:
        self.memory.allow(x)
        return x and replace(x, ptr=EMPTY if 0 in x.shape else x.ptr, device=CUDA)

    result = __call__


class Placed:
    """Views of host memory, copied to where kernels run from their PTX."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.back = memory, list[tuple[View, View]]()

    def __call__(self, x: View | None) -> View | None:
        if x is None or 0 in x.shape:
            return x and replace(x, ptr=EMPTY, device=CUDA)
        return self.memory.place(x, x)  # type: ignore[arg-type]

    def result(self, x: View | None) -> View | None:
        there = self(x)
        if x is not None and there is not None and 0 not in x.shape:
            self.back.append((x, there))
        return there

    def finish(self) -> None:
        """Copy results back, and what lies between their elements."""
        for host, there in self.back:
            low, high = host.bytes_range()
            at = there.ptr - (host.ptr - low) - BASE
            ctypes.memmove(low, self.memory.bytes[at:at + high - low].ctypes.data, high - low)


class Machine(NamedTuple):
    """Where a call runs. `launched`: the keys of its kernels."""

    placed: Any
    launcher: Any
    launched: list[str]


@contextmanager
def ptx(arch: str) -> Iterator[Machine]:
    placed = Placed(interpreter_tiles.Memory())
    launcher = interpreter_tiles.Launcher(placed.memory, arch)
    yield Machine(placed, launcher, launcher.launched)
    placed.finish()


@contextmanager
def threads(arch: str) -> Iterator[Machine]:
    memory = emulator.Memory()
    with emulator.emulated(memory) as machine:
        yield Machine(Kept(memory), machine.launcher(arch), machine.launched)


def _operands(o: Operands, placed: Any) -> Operands:
    found = {field.name: placed(x) for field in fields(o) if isinstance(x := getattr(o, field.name), View)}
    if o.flex is not None:
        arrays = {name: tuple(map(placed, getattr(o.flex, name))) for name in ("score_arrays", "mask_arrays")}
        found["flex"] = replace(o.flex, **arrays, blocks=placed(o.flex.blocks))
    return replace(o, **found)


class Engine:
    """The host's engine inside. `launched`: keys of the kernels of all calls. deterministic: of the next backward, because no engine of the
    host is told."""

    def __init__(self, machine: Callable[[], AbstractContextManager[Machine]], families: tuple[str, ...]) -> None:
        self.machine, self.families, self.launched, self.deterministic = machine, families, list[str](), False

    def _go(self, make: Callable[[Any], AnyCall]) -> None:
        with self.machine() as (placed, launcher, launched):
            try:
                gpu._launch(make(placed), launcher, self.families, 0)
            finally:
                self.launched += launched

    def forward(self, problem: Problem, operands: Operands, out: View, lse: View | None) -> None:
        if 0 not in out.shape or (lse is not None and 0 not in lse.shape):          # as gpu.forward
            self._go(lambda placed: Call(problem, _operands(operands, placed), placed.result(out), placed.result(lse)))

    def backward(self, problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None,
                 grads: Grads[View]) -> None:
        def make(placed: Any) -> BackwardCall:
            captured = None if grads.dcaptured is None else tuple(map(placed.result, grads.dcaptured))
            return BackwardCall(problem, _operands(operands, placed), placed(dout), placed(out), placed(lse), placed(dlse),
                                Grads(*(placed.result(x) for x in grads), captured), self.deterministic)
        self._go(make)


@contextmanager
def _engine(engine: Engine) -> Iterator[Engine]:
    host: Any = fastattn.cpu
    own = {name: getattr(host, name) for name in ("forward", "backward", "supports", "prepare", "prepare_backward")}
    host.forward, host.backward, host.supports = engine.forward, engine.backward, lambda problem: None
    host.prepare = host.prepare_backward = lambda *_: None
    try:
        yield engine
    finally:
        for name, function in own.items():
            setattr(host, name, function)


def on_ptx(*families: str, arch: str = "sm_90a") -> AbstractContextManager[Engine]:
    """Inside, calls on host memory run on these kernel families, but none that has wgmma."""
    return _engine(Engine(lambda: ptx(arch), families))


def on_threads(arch: str = "sm_90a") -> AbstractContextManager[Engine]:
    """Inside, calls on host memory run on the family simt."""
    return _engine(Engine(lambda: threads(arch), ("simt",)))


class Interpreted(Device):
    """Of problems whose `engine` is None."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def call(self, s: Spec, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.engine.deterministic = options.get("deterministic", False)
        return function(*arguments, **options)
