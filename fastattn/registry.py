"""Which engine runs a call: the built-in engines, those that other packages register, and the one order in which they
are tried.

An engine has a name, reads one kind of memory and accepts some calls. Built in are "cpu" and "reference" for host
memory and, for CUDA memory, the kernel families "sm90", "sm80" and "simt" of the GPU engine; "gpu" stands for the
three. A call goes to the first engine that accepts it, of

1. the one that its `engine=` names; else
2. those that the innermost `use_engine` around it names, in that order; else
3. those that the environment variable FASTATTN_ENGINES names ("cudnn,gpu,cpu"), read when a call first needs it; else
4. registered engines that are activated, in the order of their registration, then "cpu" or "sm90", "sm80", "simt".

Engines that read other memory than q's are left out. UnsupportedError quotes why each one refused; `explain` reports it
without a call.

Packages offer engines through an entry point of the group "fastattn.engines": a callable without arguments that calls
`register_engine`. It is called when `engines()` lists engines or a call names an unknown one. Registering an engine
changes no call; naming or activating it does.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Self

from .arrays.view import Device
from .engine import BUILT_IN, FAMILIES, Chain, Engine, Supports, families, load
from .errors import message
from .memo import Recent

GROUP = "fastattn.engines"
Names = tuple[str, ...]


# ---------------------------------------------------------------- those of other packages
_lock, _loading = threading.Lock(), threading.RLock()
_registered: dict[str, Engine] = {}     # this and _active are replaced, never changed, so they are read without the lock
_active: frozenset[str] = frozenset()
_runs: Recent[Any, Any] = Recent()      # what `choose` found
_broken: dict[str, str] | None = None   # entry points that failed, and how; None before they were called


def _change(registered: dict[str, Engine], active: frozenset[str]) -> None:
    global _registered, _active, _runs
    _registered, _active, _runs = registered, active, Recent()


class Registration:
    """A registered engine, as `register_engine` returns it.

    As a context manager it removes the engine at the end of the block.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def active(self) -> bool:
        return _registered.get(self.engine.name) is self.engine and self.engine.name in _active

    def activate(self) -> Self:
        """Try it before the built-in engines, in every call of the process that names no engine.

        ValueError once it is removed.
        """
        with _lock:
            if _registered.get(self.engine.name) is not self.engine:
                raise ValueError(f"activate(): engine {self.engine.name!r} was removed; register_engine makes it known again.")
            _change(_registered, _active | {self.engine.name})
        return self

    def restore(self) -> None:
        """Undo `activate`. The engine stays registered and runs where it is named."""
        with _lock:
            if _registered.get(self.engine.name) is self.engine:
                _change(_registered, _active - {self.engine.name})

    def remove(self) -> None:
        """Unregister the engine. Idempotent."""
        name = self.engine.name
        with _lock:
            if _registered.get(name) is self.engine:
                _change({other: engine for other, engine in _registered.items() if other != name}, _active - {name})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_engine(name: str, forward: Callable[..., None], backward: Callable[..., None] | None, supports: Supports,
                    device: str = "cuda") -> Registration:
    """Make an engine of another package known by a name.

    Calls use it where `engine=` or `use_engine` names it, or everywhere once the returned handle is activated.

    Parameters
    ----------
    name : str
        A new name of letters, digits, "-" and "_".
    forward : callable
        ``forward(problem, operands, out, lse, stream)`` writes the View `out`, and `lse` if it is not None, as
        `attention` documents them.
    backward : callable or None
        ``backward(problem, operands, dout, out, lse, dlse, grads, stream, deterministic)`` writes the Views of `grads`,
        a Grads. None for an engine without a backward.
    supports : callable
        ``supports(problem)`` returns None, or the reason why the engine does not accept a Problem (fastattn.problem).
        Errors quote it.
    device : {"cuda", "cpu"}, default "cuda"
        The memory that the engine reads.

    Returns
    -------
    Registration
        The handle: `activate`, `restore`, `remove`, and `active`. As a context manager it removes the engine at the end
        of the block.

    Raises
    ------
    ValueError
        The name is taken or not valid, or the device is unknown.
    TypeError
        `forward`, `backward` or `supports` is not callable.

    Notes
    -----
    Arrays are Views, (batch, seqlen, num_heads, head_dim) or packed (total, num_heads, head_dim), whatever the caller's layout. They
    speak DLPack, so ``torch.from_dlpack(view)`` shares their memory; ``view.numpy()`` does on the host. Sizes may be 0.

    CUDA: all work goes on `stream`, a CUstream handle (None on the host). Reading a View orders no streams, so make
    that one current first: ``torch.cuda.ExternalStream(stream)``; 1 is the legacy default stream. The device,
    ``operands.q.device``, need not be current. Free the engine's own memory in the order of that stream.

    An engine that cannot accept a call because of its Views raises UnsupportedError with the reason before it
    writes anything; the next engine is tried. Calls of `attention_with_kvcache`, and calls with 8-bit operands,
    `score_mod`, `mask_mod` or `block_mask`, go to the built-in engines only. An engine that calls fastattn passes an
    `engine=`, so that it does not call itself.

    Examples
    --------
    An engine for host memory that accepts calls without dropout:

    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn import reference
    >>> def supports(problem):
    ...     return "it has no dropout" if problem.dropout else None
    >>> def forward(problem, operands, out, lse, stream):
    ...     reference.forward(problem, operands, out, lse)
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> with fastattn.register_engine("mine", forward, None, supports, "cpu").activate():
    ...     fastattn.explain(fastattn.attention, x, x, x).engine
    'mine'
    """
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ValueError(message("register_engine", "name", f"is {name!r}", "a name of letters, digits, '-' and '_'"))
    if device not in ("cpu", "cuda"):
        raise ValueError(message("register_engine", "device", f"is {device!r}", "'cpu' or 'cuda', the memory that the engine reads"))
    for argument, x in (("forward", forward), ("backward", backward), ("supports", supports)):
        if not callable(x) and (x is not None or argument != "backward"):
            raise TypeError(message("register_engine", argument, f"is {x!r}", "a function"))
    engine = Engine(name, device, forward, backward, supports)
    with _lock:
        if name == "gpu" or name in BUILT_IN or name in _registered:
            raise ValueError(message("register_engine", "name", f"is {name!r}, which is taken", "a new one",
                                     "remove() of its handle frees it" if name in _registered else ""))
        _change({**_registered, name: engine}, _active)
    return Registration(engine)


def _load_entry_points() -> None:
    """Call the entry points, once in a process. The errors of those that fail are kept for messages."""
    global _broken
    with _loading:
        if _broken is None:
            from importlib import metadata  # here: it costs more than the rest of the package's import

            _broken = {}
            for point in metadata.entry_points(group=GROUP):
                try:
                    point.load()()
                except Exception as error:      # of another package, whose engines are then missing
                    _broken[point.name] = f"{type(error).__name__}: {error}"


def engines() -> tuple[Engine, ...]:
    """All engines. Calls the entry points of packages that offer engines.

    Returns
    -------
    tuple of Engine
        Registered engines in the order of their registration, then the built-in ones. Each has `name` and `device`,
        "cpu" or "cuda".

    Examples
    --------
    >>> import fastattn
    >>> [engine.name for engine in fastattn.engines() if engine.built_in]
    ['cpu', 'reference', 'sm90', 'sm80', 'simt']
    """
    _load_entry_points()
    return (*_registered.values(), *BUILT_IN.values())


def report() -> str:
    """Engines and FASTATTN_ENGINES, in one line for show_config."""
    names = [engine.name + " (active)" * (engine.name in _active) for engine in engines()]
    names += [f"entry point {name} failed ({error})" for name, error in (_broken or {}).items()]
    setting = os.environ.get("FASTATTN_ENGINES")
    return ", ".join(names) + (f"; FASTATTN_ENGINES={setting}" if setting else "")


# ---------------------------------------------------------------- the choice
_used: ContextVar[Names | Callable[[str | None], Engine] | None] = ContextVar("fastattn_engines", default=None)


# What explain adds to its notes about the call that it explains; None outside of explain.
remarks: ContextVar[list[str] | None] = ContextVar("fastattn_remarks", default=None)


@contextlib.contextmanager
def scope(names: Names | Callable[[str | None], Engine]) -> Iterator[None]:
    """use_engine without its checks.

    In place of names, explain passes a function: `engine` of a call -> the Engine that runs it.
    """
    token = _used.set(names)
    try:
        yield
    finally:
        _used.reset(token)


def use_engine(*names: str) -> contextlib.AbstractContextManager[None]:
    """A context in which calls without `engine=` use these engines only.

    Parameters
    ----------
    *names : str
        "cpu", "gpu", "reference", "sm90", "sm80", "simt" or names of registered engines. A call goes to the first that
        accepts it.

    Returns
    -------
    context manager
        The innermost one counts. It holds for this thread, or asyncio task, alone.

    Raises
    ------
    ValueError
        No name, or an unknown one. Also from a call inside, if none of the engines reads the memory of its arrays;
        engines for other memory are left out.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.ones((1, 4, 2, 8), np.float32)
    >>> with fastattn.use_engine("reference"):
    ...     out = fastattn.attention(x, x, x)
    """
    if not names:
        raise ValueError(message("use_engine", "names", "are none", f"some of {_known()}"))
    _find(names, "use_engine", "name", "is")
    return scope(names)


def in_use() -> Names | None:
    """What the innermost use_engine names."""
    names = _used.get()
    return None if callable(names) else names


def families_in_use() -> Names:
    """The kernel families that the innermost use_engine names, all where it names none."""
    found = _find(in_use() or (), "use_engine", "name", "is")
    return tuple([engine.name for engine in found if engine.name in FAMILIES]) or FAMILIES


def _known() -> str:
    return ", ".join(map(repr, (*_registered, *BUILT_IN, "gpu")))


def _find(names: Names, call: str, argument: str, verb: str) -> tuple[Engine, ...]:
    """The engines of these names; "gpu" is three.

    ValueError for a name that is unknown even after the entry points were called.
    """
    found: dict[str, Engine] = {}
    for name in names:
        for single in FAMILIES if name == "gpu" else (name,):
            engine = _lookup(single)
            if engine is None:
                _load_entry_points()
                engine = _lookup(single)
            if engine is None:
                broken = "; ".join(f"entry point {point!r} failed with {error}" for point, error in (_broken or {}).items())
                raise ValueError(message(call, argument, f"{verb} {name!r}", f"None or one of {_known()}" if argument == "engine" else
                                         f"one of {_known()}", broken))
            found[single] = engine
    return tuple(found.values())


def _lookup(name: object) -> Engine | None:
    return BUILT_IN.get(name) or _registered.get(name) if isinstance(name, str) else None


def order(call: str, engine: str | None, names: Names | None, device: Device) -> tuple[tuple[Engine, ...], str]:
    """The engines that a call tries, first choice first, and what named them ("" for nothing).

    `engine` is the call's, `names` are those of use_engine. ValueError for unknown ones and where none reads the memory
    of `device`.
    """
    setting = os.environ.get("FASTATTN_ENGINES", "")
    if engine is not None:
        found, by = _find((engine,), call, "engine", "is"), f"engine={engine!r}"
    elif names is not None:
        found, by = _find(names, call, "use_engine", "names"), f"use_engine({', '.join(map(repr, names))})"
    elif setting:
        found, by = _find(tuple(setting.replace(",", " ").split()), call, "FASTATTN_ENGINES", "names"), f"FASTATTN_ENGINES={setting}"
    else:
        active = [engine for name, engine in _registered.items() if name in _active]
        found, by = (*active, BUILT_IN["cpu"], *[BUILT_IN[name] for name in FAMILIES]), ""
    here = tuple([one for one in found if one.device == device[0]])
    if not here:
        what, hint = f"is {engine!r}", "engine=None chooses it, and arrays are never copied between devices"
        if engine is None:
            what, hint = f"is chosen by {by}", f"{by} allows no other, and arrays are never copied between devices"
        raise ValueError(message(call, "engine", f"{what} but q is on device {device}", "an engine that reads that memory", hint))
    return here, by


def choose(call: str, engine: str | None, device: Device) -> Any:
    """The object whose forward and backward run a call of the public functions, with the arguments of register_engine.

    ImportError where a lone built-in engine is missing; errors of `order`. UnsupportedError comes from the returned
    object.
    """
    names: Any = _used.get()
    if engine is not None and not callable(names):
        names = engine
    try:
        found = _runs.get((names, device[0]))
    except TypeError:       # an engine that has no hash
        found = None
    return _resolve(call, engine, names, device) if found is None else found


def _resolve(call: str, engine: str | None, names: Any, device: Device) -> Any:
    if callable(names):
        return names(engine)
    runs = _runs            # if engines change meanwhile, the result goes into this dictionary, which has been replaced then
    here, by = order(call, engine, None if engine is not None else names, device)
    asked: list[Engine] = []
    for of_gpu, group in itertools.groupby(here, lambda one: one.name in FAMILIES):
        together = tuple(group)
        asked += [families(*[one.name for one in together])] if of_gpu else together
    found: Any = Chain(tuple(asked), f"{by} allows no other" if by else "")
    if len(asked) == 1 and asked[0].built_in:
        load("gpu" if device[0] == "cuda" else asked[0].name, call)     # so that an ImportError comes before memory is allocated
        found = asked[0]            # it raises UnsupportedError itself
    runs[names, device[0]] = found
    return found
