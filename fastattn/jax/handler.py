"""What XLA calls when a compiled program reaches an attention call: its buffers -> Views -> the engine, in place.

Results are written into XLA's own buffers, on XLA's stream; nothing is copied. XLA may call from any of its threads.
No exception leaves the handler: it becomes XLA's error, with the text that the eager functions raise.
"""
from __future__ import annotations

import _thread
import contextlib
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import jax

from ..arrays import streams
from ..arrays.view import CPU, Device, View
from ..errors import UnsupportedError
from ..memo import Recent
from ..options import Options
from ..problem import Grads, Operands, Problem
from ..registry import choose, scope
from . import ffi, flex, problems, record
from .record import Record

TARGET = "fastattn"
_problems: Recent[Any, Problem] = Recent()
_refused: list[str] = []                # how XLA's structures differ from those of ffi.py


# ---------------------------------------------------------------- the call
def run(r: Record, operands: Mapping[str, View], results: Mapping[str, View], stream: int | None) -> None:
    """Compute the results of a call from its operands, all of them named Views in the caller's layout."""
    options = _options(r, operands)
    x = {name: problems.canonical(r, name, view) for name, view in (*operands.items(), *results.items())}
    problem, ready = _problem(r, options, problems.operands_of(r, operands))
    with contextlib.nullcontext() if r.engines is None else scope(r.engines):
        chosen = choose(r.call, r.engine, ready.q.device)
        if not r.backward:
            chosen.forward(problem, ready, x["out"], x.get("lse"), stream)
            return
        dbias = x.get("dbias")
        if dbias is not None:
            dbias = dbias.broadcast_to((1,) * (4 - len(dbias.shape)) + dbias.shape)
        grads = Grads(x["dq"], x["dk"], x["dv"], dbias, x.get("dsinks"), flex.gradients(r.flex, x))
        chosen.backward(problem, ready, x["dout"], x["out"], x["lse"], x.get("dlse"), grads, stream, r.deterministic)


def _options(r: Record, operands: Mapping[str, View]) -> Options:
    """The record's options, with the numbers that came as arrays."""
    numbers: dict[str, Any] = {}
    for name in problems.NUMBERS:
        if name not in operands:
            continue
        if operands[name].device != CPU:
            raise UnsupportedError(f"{r.call}(): {name} is an array in device memory; expected an int, because the host never waits for a "
                                   "device; an int is part of the compiled program, so a new one compiles again.")
        numbers[name] = ffi.integer(operands[name])
    return r.options._replace(**numbers)


def _problem(r: Record, options: Options, o: Operands) -> tuple[Problem, Operands]:
    """The call's Problem. It is kept where shapes and options describe it completely; then engines keep their choices too."""
    if not o.plain or (o.packed and o.q.device == CPU):     # operands to broadcast, lengths whose values are checked
        return problems.problem(r, options, o)
    key = r, options, o.q.shape, o.k.shape, o.v.shape, o.q.dtype, o.q.device
    found = _problems.get(key)
    if found is None:
        found = _problems[key] = problems.problem(r, options, o)[0]
    return found, o


# ---------------------------------------------------------------- the handler
def _handle(frame: ffi.Frame, cuda: bool) -> None:
    """Run the call of a frame. Anything that goes wrong is raised."""
    wrong = ffi.fits(frame)
    if wrong is not None:
        raise RuntimeError(wrong)
    if frame.stage != ffi.EXECUTE:
        return
    r = record.read(ffi.attribute(frame, "record"))
    device, handle = CPU, None
    if cuda:
        device, handle = _device(frame), streams.normal(ffi.stream(frame))
    operands, results = ffi.views(frame.operands, device), ffi.views(frame.results, device)
    run(r, dict(zip(r.operands, operands, strict=True)), dict(zip(r.results, results, strict=True)), handle)


def _device(frame: ffi.Frame) -> Device:
    """The CUDA device of the call's arrays: of the first that has memory, else the current one."""
    for buffers in (frame.operands, frame.results):
        for i in range(buffers.count):
            pointer = buffers.items[i].contents.data
            if pointer:
                return "cuda", streams.device_of(pointer)
    return "cuda", int(streams.check(streams.driver().cuCtxGetDevice(), "cuCtxGetDevice"))


def _answer(frame: ffi.Frame, cuda: bool) -> Any:
    """The handler: NULL, or XLA's error."""
    try:
        asked = ffi.metadata(frame)
        if asked is None:
            _handle(frame, cuda)
            return None
        wrong = ffi.fits(frame)
        if wrong is not None:               # version 0.0 in the answer: XLA refuses the handler, and `register` says why
            _refused.append(wrong)
            return None
        asked.version.major, asked.version.minor = ffi.MAJOR, min(ffi.MINOR, frame.api.contents.version.minor)
        asked.traits = 0
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            _interrupt_later()
        return ffi.error(frame, *_described(error))


def _interrupt_later() -> None:
    """Give the main thread the signal that was taken here, once it has left the handler, through which no exception may pass."""
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _described(error: BaseException) -> tuple[int, str]:
    """XLA's code and text of an exception."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, UnsupportedError):
        return ffi.UNIMPLEMENTED, text
    if isinstance(error, (TypeError, ValueError)):
        return ffi.INVALID_ARGUMENT, text
    if isinstance(error, MemoryError):
        return ffi.RESOURCE_EXHAUSTED, f"fastattn: no memory ({text})" if text else "fastattn: no memory"
    if isinstance(error, KeyboardInterrupt):
        return ffi.CANCELLED, "fastattn: interrupted"
    return ffi.INTERNAL, "".join(traceback.format_exception(error)).rstrip()


on_cpu: Any = ffi.Handler(lambda frame: _answer(frame.contents, False))     # global, because XLA keeps their addresses for ever
on_cuda: Any = ffi.Handler(lambda frame: _answer(frame.contents, True))


def register() -> None:
    """Make the handlers known to XLA, once in a process. ImportError where XLA's structures are not those of ffi.py."""
    _refused.clear()
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(on_cpu), platform="cpu")
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(on_cuda), platform="CUDA")     # kept for a plugin that is loaded later
    except Exception as error:
        if not _refused:
            raise
        raise ImportError(f"fastattn.jax does not know this jaxlib: {_refused[0]}.") from error
    if _refused:
        raise ImportError(f"fastattn.jax does not know this jaxlib: {_refused[0]}.")
