"""What an engine is, and the built-in ones. The first call that runs on one imports its module."""
from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import UnsupportedError, refused
from .problem import Problem

FAMILIES = ("sm90", "sm80", "simt")        # kernel families of the GPU engine, fastest first; each has both directions
Supports = Callable[[Problem], str | None]
_MODULES = {"cpu": ".cpu", "reference": ".reference", "gpu": ".gpu"}


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: its name, the memory it reads, "cpu" or "cuda", and the functions of `register_engine`.

    `supports` of a GPU kernel family returns None for any problem, because its answer depends on the arrays too;
    `explain` knows.
    """

    name: str
    device: str
    forward: Callable[..., None] = field(repr=False)
    backward: Callable[..., None] | None = field(repr=False)
    supports: Supports = field(repr=False)
    built_in: bool = False
    # What `forward` and `backward` take but for the stream -> a repeat.Launch for any addresses of such arrays, or None.
    prepare: Callable[..., Any] | None = field(default=None, repr=False)
    prepare_backward: Callable[..., Any] | None = field(default=None, repr=False)
    # Whether `forward` knows Problems whose k and v are caches. Another package's engine would read them as arrays.
    caches: bool = field(default=False, repr=False)

    def refuses(self, problem: Problem, direction: str) -> str | None:
        """None, or why it does not accept the problem in a direction, "forward" or "backward"."""
        if direction == "backward" and self.backward is None:
            return "it has no backward"
        if problem.cache is not None and not self.caches:
            return "it takes no key and value caches"
        if problem.eight_bit is not None and not self.built_in:
            return "8-bit operands are for the built-in engines"
        if problem.flex is not None and not self.built_in:
            return "score_mod, mask_mod and block_mask are for the built-in engines"
        reason = self.supports(problem)
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"engine {self.name!r}: supports(problem) gave {reason!r}; expected None, or a str with the reason.")
        return reason


@dataclass(frozen=True, slots=True)
class Chain:
    """Several engines as one: the first that accepts a call runs it."""

    engines: tuple[Engine, ...]
    hint: str

    def forward(self, problem: Problem, *where: Any) -> None:
        self._first("forward", problem, where)

    def backward(self, problem: Problem, *where: Any) -> None:
        self._first("backward", problem, where)

    def _first(self, direction: str, problem: Problem, where: tuple[Any, ...]) -> None:
        reasons: dict[str, str] = {}
        for engine in self.engines:
            reason = engine.refuses(problem, direction)
            if reason is not None:
                reasons[engine.name] = reason
                continue
            try:
                getattr(engine, direction)(problem, *where)
            except UnsupportedError as error:
                reasons |= (engine.built_in and error.reasons) or {engine.name: str(error).removesuffix(".")}
            else:
                return
        raise refused(problem.call, reasons, hint=self.hint)


# ---------------------------------------------------------------- the built-in ones
_loaded: dict[str, Any] = {}


def load(name: str, call: str) -> Any:
    """The module of "cpu", "reference" or "gpu". ImportError says what is missing."""
    module = _loaded.get(name)
    if module is not None:
        return module
    try:
        module = _loaded[name] = importlib.import_module(_MODULES[name], __package__)
    except ImportError as error:
        if name == "gpu":
            raise ImportError(f"{call}(): CUDA arrays need the GPU engine, which cannot be loaded ({error}); it needs numba-cuda, "
                              "cuda-core and cuda-bindings: pip install 'fastattn[gpu]'.") from error
        raise ImportError(f"{call}(): the compiled {name} engine cannot be loaded ({error}); `pip install .` in the source folder "
                          "builds it and needs gcc; engine='reference' works without it, slowly.") from error
    return module


def _host(name: str) -> Engine:
    def accepting(problem: Problem) -> Any:
        """The engine's module. UnsupportedError where it refuses the problem, because it may be the only one that is asked."""
        module = load(name, problem.call)
        reason = module.supports(problem)
        if reason is not None:
            raise refused(problem.call, {name: reason})
        return module

    def forward(problem: Problem, operands: Any, out: Any, lse: Any, stream: None) -> None:
        accepting(problem).forward(problem, operands, out, lse)

    def backward(problem: Problem, operands: Any, dout: Any, out: Any, lse: Any, dlse: Any, grads: Any, stream: None,
                 deterministic: bool) -> None:
        accepting(problem).backward(problem, operands, dout, out, lse, dlse, grads)

    def supports(problem: Problem) -> str | None:
        return load(name, problem.call).supports(problem)  # type: ignore[no-any-return]

    def prepare(problem: Problem, *where: Any) -> Any:
        return load(name, problem.call).prepare(problem, *where)

    def prepare_backward(problem: Problem, *where: Any) -> Any:
        return load(name, problem.call).prepare_backward(problem, *where)
    tells = name == "cpu"
    return Engine(name, "cpu", forward, backward, supports, True, prepare if tells else None, prepare_backward if tells else None,
                  caches=True)


def families(*names: str) -> Engine:
    """Kernel families as one engine, because the GPU engine caches its choice between them."""
    def forward(problem: Problem, operands: Any, out: Any, lse: Any, stream: int) -> None:
        load("gpu", problem.call).forward(problem, operands, out, lse, stream, names)

    def backward(problem: Problem, *where: Any) -> None:
        load("gpu", problem.call).backward(problem, *where, names)

    def prepare(problem: Problem, *where: Any) -> Any:
        return load("gpu", problem.call).prepare(problem, *where, names)

    def prepare_backward(problem: Problem, *where: Any) -> Any:
        return load("gpu", problem.call).prepare_backward(problem, *where, names)
    return Engine(names[0] if len(names) == 1 else "gpu", "cuda", forward, backward, lambda problem: None, True, prepare, prepare_backward,
                  caches=True)


BUILT_IN = {"cpu": _host("cpu"), "reference": _host("reference")} | {name: families(name) for name in FAMILIES}
