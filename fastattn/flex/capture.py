"""What a function holds: arrays and numbers in its closure, defaults, partials, globals and bound objects, and in functions that it calls.

An array's own indexing cannot be intercepted (`table[head, q]` asks the array, not `head`), so the function is made again
around stand-ins. `Held` finds what it holds; `Held.rebuilt` makes it again. The user's own objects are never changed.
"""
from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from ..arrays import words

MOST = 20_000                           # parts of what a function holds
_SIMPLE = (str, bytes, bool, type(None), types.EllipsisType, complex, slice, range)
_WHOLE = (type, types.BuiltinFunctionType, np.ufunc, np.dtype, Enum)           # holds nothing of the user's
_STAYING = (*_WHOLE, types.ModuleType, types.FunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_LIBRARIES = frozenset(["numpy", "torch", "jax", "jaxlib", "cupy", "numba", "ml_dtypes", "fastattn", "scipy", "builtins", "enum"])


class Leaf(NamedTuple):
    """An array or a number, and what it is called."""

    value: Any
    name: str
    number: bool


PROTOCOLS = frozenset({"__dlpack__", "__cuda_array_interface__", "__array_interface__"})


def is_array(x: Any) -> bool:
    """Whether x is an array of any library. NumPy's scalars are numbers.

    `arrays.readers.is_array` asks the object. Here all that a function holds is looked through, and nothing of it may run: only its type
    and its own entries count.
    """
    if _holds_elements(type(x)):  # type: ignore[arg-type]     # a type is hashable
        return True
    return not isinstance(x, type | types.ModuleType) and not PROTOCOLS.isdisjoint(getattr(x, "__dict__", ()))


@functools.lru_cache(1000)
def _holds_elements(kind: type) -> bool:
    if issubclass(kind, type | types.ModuleType | np.generic):
        return False
    return issubclass(kind, np.ndarray) or any(hasattr(kind, name) for name in PROTOCOLS) or words.is_tracer(kind)


def is_number(x: Any) -> bool:
    return type(x) in (int, float) or (isinstance(x, np.generic) and x.dtype.kind in "iuf")


def _ours(module: str | None) -> bool:
    """Whether code of this module may hold arrays of the user's: no library's does, but in closures."""
    root = (module or "").partition(".")[0]
    return root not in _LIBRARIES and root not in sys.stdlib_module_names


def _own_code(x: types.FunctionType) -> bool:
    """Whether a function's globals may be the user's: also where it was typed into a prompt or a docstring."""
    return _ours(x.__module__) or x.__code__.co_filename.startswith("<")


@functools.lru_cache(1000)
def names_of(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes in a function and those inside it."""
    inside = [names_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inside)


def _is_network(x: Any) -> bool:
    """Whether x is a torch.nn.Module, which may hold a whole model."""
    inside = getattr(x, "__dict__", {})
    return "_parameters" in inside and "_modules" in inside


def _depends_on_names(x: Any) -> bool:
    """Whether only those parts of x count whose names the code around it has: all of a module or a model is too much."""
    return isinstance(x, types.ModuleType) or _is_network(x)


def _reached(kind: type, names: frozenset[str]) -> frozenset[str]:
    """Names in the code that runs where something calls `names` of a class: methods, and methods that these call."""
    found, new = set(names), set(names)
    while new:
        methods = [getattr(kind, name, None) for name in new]
        codes = [m.__code__ for m in (getattr(m, "fget", m) for m in methods) if isinstance(m, types.FunctionType)]
        new = set[str]().union(*map(names_of, codes)) - found
        found |= new
    return frozenset(found)


def _changes_unseen(x: Any, names: frozenset[str]) -> bool:
    """Whether a class of the user's, or x's, has what is not walked and may change: its attributes, and what its methods read."""
    kind = x if isinstance(x, type) else type(x)
    reached, own = _reached(kind, names | {"__call__", "forward"}), {} if isinstance(x, type) else getattr(x, "__dict__", {})
    for base in kind.__mro__:
        for name, value in vars(base).items() if _ours(base.__module__) else ():
            if name not in reached or name in own:
                continue
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                if not _reads_nothing(function, set()):
                    return True
            elif isinstance(x, type) or not (is_array(value) or is_number(value) or _stays(value)):     # numbers of x's class: _state
                return True
    return False


def _reads_nothing(function: types.FunctionType, seen: set[types.FunctionType]) -> bool:
    """Whether a function reads no global, closure or default of the user's that may change."""
    found = _function(function)
    if found is None or function in seen:
        return True
    seen.add(function)
    for name, x in found[1]:
        if isinstance(x, types.FunctionType):
            if not _reads_nothing(x, seen):
                return False
        elif name != "__class__" and not (_stays(x) and not (isinstance(x, types.ModuleType) and _ours(x.__name__))
                                          and not (isinstance(x, type) and _ours(x.__module__))):
            return False
    return True


_IN_NETWORKS = ("_parameters", "_buffers", "_modules")


def _named_in(x: Any, names: frozenset[str]) -> frozenset[str]:
    return _reached(type(x), names | {"__call__", "forward"})


def _network(x: Any, names: frozenset[str]) -> list[tuple[str, Any]]:
    """A torch.nn.Module's own attributes, and those of its parameters, buffers and modules that are named."""
    reached = _named_in(x, names)
    found = [(k, v) for k, v in vars(x).items() if not k.startswith("_")]
    return found + [(k, v) for kind in _IN_NETWORKS for k, v in vars(x).get(kind, {}).items()
                    if k in reached or (k.isdigit() and kind != "_modules")]        # of a ParameterList


def _state(x: Any) -> dict[str, Any]:
    """What an object of a class of the user's holds, with arrays and numbers of the class."""
    found: dict[str, Any] = {}
    for base in reversed(type(x).__mro__):
        if _ours(base.__module__):
            found |= {k: v for k, v in vars(base).items() if is_array(v) or is_number(v)}
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(x, name):
                found[name] = getattr(x, name)
    return found | getattr(x, "__dict__", {})


def _parts(x: Any, names: frozenset[str]) -> tuple[str, list[tuple[str, Any]]] | None:
    """(what kind of thing x is, its named parts) where parts may be arrays or numbers; None where x stays as it is."""
    if isinstance(x, functools.partial):
        return "partial", [("func", x.func), *((f"{n}", a) for n, a in enumerate(x.args)), *x.keywords.items()]
    if isinstance(x, types.MethodType):
        return "method", [("self", x.__self__), ("func", x.__func__)]
    if isinstance(x, types.FunctionType):
        return _function(x)
    if isinstance(x, list | tuple):
        return type(x).__name__, [(str(n), a) for n, a in enumerate(x)]
    if isinstance(x, Mapping):
        return "dict", [(repr(k), v) for k, v in x.items()]
    if isinstance(x, types.ModuleType):
        used = sorted(names & vars(x).keys()) if _ours(x.__name__) else []
        return ("module", [(k, vars(x)[k]) for k in used]) if used else None
    if _is_network(x):
        return "network", _network(x, names)
    if isinstance(x, types.SimpleNamespace):
        return "object", list(vars(x).items())
    if isinstance(x, _WHOLE) or not _ours(type(x).__module__):
        return None
    state = _state(x)
    return ("object", list(state.items())) if state else None


def _function(x: types.FunctionType) -> tuple[str, list[tuple[str, Any]]] | None:
    cells = list(zip(x.__code__.co_freevars, x.__closure__ or (), strict=True))
    parts = [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    if _own_code(x):
        parts += [(f"default {n}", a) for n, a in enumerate(x.__defaults__ or ())]
        parts += list((x.__kwdefaults__ or {}).items())
        used = sorted(names_of(x.__code__) & x.__globals__.keys())
        parts += [(name, x.__globals__[name]) for name in used if not name.startswith("__")]
    return ("function", parts) if parts else None


class Held:
    """What a function holds. `leaves` are its arrays and numbers, each once; `shape` says all else, None where that may change unseen."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.leaves: list[Leaf] = []
        self._leaf: dict[int, int] = {}                     # by id; numbers by where they are
        self._seen: dict[tuple[int, frozenset[str]], int] = {}
        self._known: dict[tuple[int, frozenset[str]], bool] = {}    # parts -> whether a leaf is in them
        tokens: list[Any] = []
        self.fixed = True
        self._walk(function, "", frozenset(), tokens)
        self.shape: tuple[Any, ...] | None = tuple(tokens) if self.fixed else None

    def _walk(self, x: Any, name: str, names: frozenset[str], tokens: list[Any]) -> bool:
        """Note x and what it holds. True if there is an array or a number in it."""
        if is_array(x) or is_number(x):
            tokens.append(("leaf", self._note(x, name)))
            return True
        if isinstance(x, _SIMPLE):
            tokens.append((type(x).__name__, repr(x) if isinstance(x, slice) else x))
            return False
        if isinstance(x, set | frozenset):                  # its numbers stay constants
            tokens.append(frozenset(x))
            return False
        key = id(x), names if _depends_on_names(x) else frozenset[str]()
        if key in self._seen:
            tokens.append(("seen", self._seen[key]))
            return self._known.get(key, True)
        self._seen[key] = len(self._seen)
        if len(self._seen) > MOST:
            raise OverflowError
        if isinstance(x, types.FunctionType):
            tokens.append(x.__code__)
            names = names_of(x.__code__)
        elif isinstance(x, types.MethodType):
            names = _reached(type(x.__self__), names_of(x.__func__.__code__))
        elif _is_network(x):
            names = _named_in(x, names)
        found = _parts(x, names)
        of_class = x if isinstance(x, type) else type(x) if found is not None and found[0] in ("object", "network") else None
        if of_class is not None and _ours(of_class.__module__) and _changes_unseen(x, names):
            self.fixed = False                              # it is traced in each call
        if found is None:
            if not (isinstance(x, types.FunctionType) and _own_code(x)):       # its code says all: it may be made anew for each call
                tokens.append(x if _stays(x) else ("object", id(x)))
                self.fixed = self.fixed and _stays(x)
            self._known[key] = False
            return False
        kind, parts = found
        tokens.append((kind, type(x), len(parts), tuple([n for n, _ in parts]) if kind in ("dict", "object", "module", "network") else ()))
        inside = [self._walk(part, _named(kind, name, label), names, tokens) for label, part in parts]
        self._known[key] = any(inside)
        return any(inside)

    def _note(self, x: Any, name: str) -> int:
        number = not is_array(x)
        if not number and id(x) in self._leaf:
            return self._leaf[id(x)]
        self.leaves.append(Leaf(x, name, number))
        self._leaf[id(x) if not number else -len(self.leaves)] = len(self.leaves) - 1
        return len(self.leaves) - 1

    def rebuilt(self, stand_ins: list[Any]) -> Callable[..., Any]:
        """The function around stand-ins for its leaves."""
        result: Callable[..., Any] = _Rebuild(self, stand_ins).of(self.function, frozenset())
        return result


def _stays(x: Any) -> bool:
    """Whether an object without parts is the same as long as it is itself: code, types, modules of libraries, dtypes."""
    return isinstance(x, _STAYING) or words.root(x) in _LIBRARIES - {"builtins"}


def _named(kind: str, name: str, label: str) -> str:
    """What a user calls a part: `table`, `self.table`, `tables[0]`."""
    if kind in ("function", "method", "partial"):
        return f"argument {label}" if label.isdigit() else label.replace("default ", "default value ")
    if kind in ("object", "module", "network"):
        return f"{name}.{label}" if name else label
    return f"{name}[{label}]"


class _Rebuild:
    """Walks as `Held` does, in the same order, and makes what holds leaves again."""

    def __init__(self, held: Held, stand_ins: list[Any]) -> None:
        self.held, self.numbers = held, iter([n for n, x in enumerate(held.leaves) if x.number])
        self.stand_ins, self.made = stand_ins, dict[tuple[int, frozenset[str]], Any]()

    def of(self, x: Any, names: frozenset[str]) -> Any:
        if is_array(x):
            return self.stand_ins[self.held._leaf[id(x)]]
        if is_number(x):
            return self.stand_ins[next(self.numbers)]
        key = id(x), names if _depends_on_names(x) else frozenset[str]()
        if isinstance(x, (*_SIMPLE, set, frozenset)) or not self.held._known.get(key, True):
            return x
        if key in self.made:
            return self.made[key]
        if isinstance(x, types.FunctionType):
            names = names_of(x.__code__)
        elif isinstance(x, types.MethodType):
            names = _reached(type(x.__self__), names_of(x.__func__.__code__))
        elif _is_network(x):
            names = _named_in(x, names)
        found = _parts(x, names)
        if found is None:
            self.made[key] = x
            return x
        return self._make(x, key, found[1], names)

    def _make(self, x: Any, key: tuple[int, frozenset[str]], parts: list[tuple[str, Any]], names: frozenset[str]) -> Any:
        if isinstance(x, types.FunctionType):
            return self._function(x, key, parts, names)
        if isinstance(x, types.ModuleType) or not isinstance(x, functools.partial | types.MethodType | list | tuple | Mapping):
            new = types.ModuleType(x.__name__) if isinstance(x, types.ModuleType) else \
                types.SimpleNamespace() if isinstance(x, types.SimpleNamespace) else object.__new__(type(x))
            self.made[key] = new
            if _depends_on_names(x):
                vars(new).update(vars(x))
            if _is_network(x):
                self._fill(new, x, parts, names)
                return new
            for name, part in parts:
                object.__setattr__(new, name, self.of(part, names))
            return new
        if isinstance(x, list | Mapping):
            made: Any = [] if isinstance(x, list) else {}
            self.made[key] = made
            for label, (_, part) in zip(x, parts, strict=True):
                if isinstance(x, list):
                    made.append(self.of(part, names))
                else:
                    made[label] = self.of(part, names)
            return made
        self.made[key] = None                               # what holds itself through a tuple finds this
        new = [self.of(part, names) for _, part in parts]
        if isinstance(x, functools.partial):
            result: Any = functools.partial(new[0], *new[1:1 + len(x.args)], **dict(zip(x.keywords, new[1 + len(x.args):], strict=True)))
        elif isinstance(x, types.MethodType):
            result = types.MethodType(new[1], new[0])
        elif isinstance(x, tuple) and hasattr(x, "_make"):
            result = type(x)._make(new)
        else:
            result = tuple(new)
        self.made[key] = result
        return result

    def _fill(self, new: Any, x: Any, parts: list[tuple[str, Any]], names: frozenset[str]) -> None:
        """Give the copy of a torch.nn.Module what holds leaves."""
        for kind in _IN_NETWORKS:
            vars(new)[kind] = dict(vars(x).get(kind, {}))
        for name, part in parts:
            where = next((vars(new)[kind] for kind in _IN_NETWORKS if name in vars(new)[kind]), vars(new))
            where[name] = self.of(part, names)

    def _function(self, x: types.FunctionType, key: Any, parts: list[tuple[str, Any]], names: frozenset[str]) -> Any:
        cells = [types.CellType() for _ in x.__closure__ or ()]
        space = dict(x.__globals__) if _own_code(x) else x.__globals__
        new = types.FunctionType(x.__code__, space, x.__name__, x.__defaults__, tuple(cells))
        new.__kwdefaults__, new.__dict__, new.__module__ = x.__kwdefaults__, x.__dict__, x.__module__
        self.made[key] = new
        made: Iterator[Any] = iter([self.of(part, names) for _, part in parts])
        for cell, old in zip(cells, x.__closure__ or (), strict=True):
            if old != types.CellType():
                cell.cell_contents = next(made)
        if _own_code(x):
            new.__defaults__ = None if x.__defaults__ is None else tuple([next(made) for _ in x.__defaults__])
            new.__kwdefaults__ = None if x.__kwdefaults__ is None else {name: next(made) for name in x.__kwdefaults__}
            for name in [n for n, _ in parts[-_count(x):]] if _count(x) else []:
                space[name] = next(made)
        return new


def _count(x: types.FunctionType) -> int:
    """How many of a function's parts are globals."""
    return len([name for name in names_of(x.__code__) & x.__globals__.keys() if not name.startswith("__")])


