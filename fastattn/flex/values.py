"""What a function gets while it is traced: `Value` for a number of each place, `Array` for a captured array.

Both note what is done with them as lines of a TraceBuilder. Python's operators are here; the functions of NumPy and torch, which
come in by __array_ufunc__, __array_function__ and __torch_function__, are in functions.py.
"""
from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .ops import BOOL, FLOAT, HIGH, INT, LOW
from .program import Builder
from .refusal import DecidesError, RefusalError, of_jax, torch_dtype

_BRANCH = "numpy.where(c, x, y) instead of `x if c else y`, &, | and ~ instead of and, or and not, numpy.minimum and numpy.maximum " \
    "instead of min and max work"

KNOWN = "where, minimum, maximum, clip, abs, sign, exp, exp2, log, log2, sqrt, sin, cos, tanh, sigmoid, erf, floor, round, power, " \
    "comparisons, &, |, ^, ~, <<, >>, // and %"


class TraceBuilder(Builder):
    """The lines of a function that is traced. `functions` is what it may call, by name: each takes the builder, then what the user gave."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions


class Value:
    """A number that may differ from place to place: line `n` of a TraceBuilder."""

    __slots__ = ("b", "n")
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000
    ndim, shape, device, is_cuda, requires_grad = 0, (), None, False, False

    def __init__(self, b: TraceBuilder, n: int) -> None:
        self.b, self.n = b, n

    @property
    def kind(self) -> str:
        return self.b.lines[self.n].kind

    @property
    def dtype(self) -> Any:
        return torch_dtype(self.kind)

    # ------------------------------------------------------------ functions and methods of other libraries
    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            raise RefusalError(f"calls numpy.{ufunc.__name__}.{method}", "only plain calls are traced, as numpy.minimum(x, y)")
        return called(self.b, ufunc.__name__, args, kwargs, "numpy.")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return called(self.b, function.__name__, args, kwargs, "numpy.")

    def __jax_array__(self) -> Any:
        raise of_jax()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        b = builder_of((args, kwargs))
        return called(b, getattr(function, "__name__", str(function)), args, kwargs or {}, "torch.")

    def __getattr__(self, name: str) -> Any:

        if name.startswith("__") or name not in self.b.functions:
            raise AttributeError(f"a traced value has no attribute {name!r}")
        return lambda *args, **kwargs: called(self.b, name, (self, *args), kwargs, ".")

    # ------------------------------------------------------------ what Python may not know
    def _decides(self, has: str, hint: str) -> DecidesError:
        lines, stack, found = self.b.lines, [self.n], set[int]()
        while stack:
            x = lines[stack.pop()]
            if x.op in ("input", "load", "length"):
                return DecidesError(has, hint, frozenset())
            if x.op == "number":
                found.add(x.value)
            stack += x.args
        return DecidesError(has, hint, frozenset(found))

    def _constant(self) -> Any:
        line = self.b.lines[self.n]
        return line.value if line.op == "const" else None

    def __bool__(self) -> bool:
        known = self._constant()
        if known is not None:
            return bool(known)
        raise self._decides("branches on a value that differs from place to place", _BRANCH)

    def __float__(self) -> float:
        known = self._constant()
        if known is not None:
            return float(known)
        raise self._decides("makes a Python number of a value that differs from place to place",
                            "numpy.tanh(x) instead of math.tanh(x) works, and x without float(), int() and .item()")

    def __int__(self) -> int:
        return int(float(self))

    def __index__(self) -> int:
        known = self._constant()
        if known is not None and self.kind == INT:
            return int(known)
        raise self._decides("indexes with a value that differs from place to place what is no captured array, or counts with it",
                            "pass the array in captured=, or let the function close over it; numpy.where instead of range and slices works")

    def item(self) -> Any:
        return float(self)

    tolist = item

    def __iter__(self) -> Any:
        raise RefusalError("iterates over a number", "the function gets one place at a time, without axes")

    def __len__(self) -> int:
        raise RefusalError("asks for len() of a number", "the function gets one place at a time, without axes")

    def __getitem__(self, index: Any) -> Any:
        if index is None or index is Ellipsis or index == ():
            return self
        raise RefusalError("indexes a number", "the function gets one place at a time, without axes")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RefusalError("assigns to an element", "numpy.where(c, x, y) works")

    # ------------------------------------------------------------ operators
    def __neg__(self) -> Any:
        return apply("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return apply("abs", self)

    def __invert__(self) -> Any:
        return apply("not", self)

    def __pow__(self, other: Any) -> Any:
        return called(self.b, "power", (self, other), {}, "")

    def __rpow__(self, other: Any) -> Any:
        return called(self.b, "power", (other, self), {}, "")

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __round__(self, digits: Any = None) -> Any:
        return called(self.b, "round", (self,), {}, "")

    def __gt__(self, other: Any) -> Any:
        return apply("lt", other, self)

    def __ge__(self, other: Any) -> Any:
        return apply("le", other, self)


def _operator(op: str, swapped: bool = False) -> Callable[[Value, Any], Value]:
    def apply_operator(self: Value, other: Any) -> Value:
        return apply(op, other, self) if swapped else apply(op, self, other)
    return apply_operator


for _name, _op in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "div"), ("floordiv", "floordiv"), ("mod", "mod"),
                   ("and", "and"), ("or", "or"), ("xor", "xor"), ("lshift", "shl"), ("rshift", "shr")):
    setattr(Value, f"__{_name}__", _operator(_op))
    setattr(Value, f"__r{_name}__", _operator(_op, True))
for _name in ("lt", "le", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(_name))


# ---------------------------------------------------------------- arrays
class Array:
    """A captured array, or what is left of one after its first indices: `array` is its number, once it is used."""

    __slots__ = ("at", "axes", "b", "key", "name", "register")
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 1000
    is_cuda, requires_grad, device = False, False, None

    def __init__(self, b: TraceBuilder, register: Callable[[int], int], key: int, name: str, axes: int, at: tuple[int, ...] = ()) -> None:
        self.b, self.register, self.key, self.name, self.axes, self.at = b, register, key, name, axes, at

    @property
    def ndim(self) -> int:
        return self.axes - len(self.at)

    @property
    def dtype(self) -> Any:
        from .ops import kind_of

        return torch_dtype(kind_of(self.b.arrays[self.register(self.key)].dtype))

    @property
    def shape(self) -> tuple[Value, ...]:
        number = self.register(self.key)
        return tuple([Value(self.b, self.b.add("length", (), INT, (number, axis))) for axis in range(len(self.at), self.axes)])

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def __getitem__(self, index: Any) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        given = tuple([i for i in given if i is not Ellipsis])
        if len(given) > self.ndim:
            raise RefusalError(f"gives {len(given)} indices to {self.name}, which has {self.ndim} axes", f"{self.ndim} indices work")
        at = self.at + tuple([self._index(i, len(self.at) + n) for n, i in enumerate(given)])
        return self.loaded(at) if len(at) == self.axes else Array(self.b, self.register, self.key, self.name, self.axes, at)

    def _index(self, i: Any, axis: int) -> int:
        if i is None or isinstance(i, slice):
            raise RefusalError(f"takes a slice of {self.name}", f"one index for each axis, as {self.name}[head, q] works")
        n = line(self.b, i)
        found = self.b.lines[n]
        if found.kind != INT:
            raise RefusalError(f"indexes {self.name} with {'a float' if found.kind == FLOAT else 'a condition'}",
                               "x.astype(int) or x.to(torch.int32) makes an index, numpy.where selects by a condition")
        if found.op == "const" and found.value < 0:         # from the end, as in Python
            return self.b.do("add", n, self.b.add("length", (), INT, (self.register(self.key), axis)))
        return n

    def loaded(self, at: tuple[int, ...] = ()) -> Value:
        return Value(self.b, self.b.load(self.register(self.key), at))

    def __len__(self) -> int:
        raise RefusalError(f"asks for len({self.name}), which would fix its length", f"{self.name}.shape[0] works")

    def __iter__(self) -> Any:
        raise RefusalError(f"iterates over {self.name}", f"an index for each axis, as {self.name}[head, q] works")

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        raise RefusalError(f"computes with all of {self.name}", f"its elements work, as {self.name}[{', '.join('hqkb'[:self.ndim])}]")

    __array_ufunc__ = __array_function__ = __bool__ = __float__ = __int__ = __index__ = __setitem__ = _whole

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = first((args, kwargs), Array)
        return found._whole() if found is not None else NotImplemented

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._whole()


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(Array, f"__{_name}__", Array._whole)
    setattr(Array, f"__r{_name}__", Array._whole)
for _name in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Array, f"__{_name}__", Array._whole)


# ---------------------------------------------------------------- lines of what Python gives
def apply(op: str, *args: Any) -> Value:
    """An operation of ops.py on Values and numbers; of floats also floordiv and mod."""
    b = builder_of(args)
    lines = [line(b, x) for x in args]
    if op in ("floordiv", "mod") and any(b.lines[n].kind == FLOAT for n in lines):
        floor = b.do("floor", b.do("div", *lines))
        return Value(b, floor if op == "floordiv" else b.do("sub", lines[0], b.do("mul", floor, lines[1])))
    try:
        return Value(b, b.do(op, *lines))
    except TypeError:
        raise RefusalError(f"applies `{op}` to a float", "of conditions and integers it works; x > 0 makes a condition") from None


def line(b: TraceBuilder, x: Any) -> int:
    """The line of a Value, of a Python or NumPy number, or of an array or tensor of one element that the function made."""
    if isinstance(x, Value):
        return x.n
    if isinstance(x, Array):
        if x.ndim:
            x._whole()
        return x.loaded(x.at).n
    if isinstance(x, np.ndarray) and x.ndim == 0:
        x = x[()]
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor) and x.ndim == 0 and x.device.type == "cpu":
        x = x.item()
    if isinstance(x, bool | np.bool_):
        return b.const(bool(x), BOOL)
    if isinstance(x, numbers.Integral):
        if not LOW <= int(x) <= HIGH:
            raise RefusalError(f"has the integer {x}", "integers are 32 bits; a float works")
        return b.const(int(x), INT)
    if isinstance(x, numbers.Real) or (isinstance(x, np.generic) and x.dtype.kind not in "mMOSUVc"):
        return b.const(float(x), FLOAT)
    if hasattr(x, "shape"):
        raise RefusalError(f"uses an array of shape {tuple(x.shape)} that it made itself or that cannot be seen from outside",
                           "pass it in captured=, or let the function close over it, and index it")
    raise RefusalError(f"computes with a {type(x).__name__}", "numbers, conditions and elements of captured arrays work")


def first(x: Any, kind: Any) -> Any:
    """The first of a kind in nested arguments; None without one."""
    if isinstance(x, kind):
        return x
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple | list) else ()
    return next((found for part in parts if (found := first(part, kind)) is not None), None)


def builder_of(args: Any) -> TraceBuilder:
    found: TraceBuilder = first(args, Value | Array).b
    return found


def called(b: TraceBuilder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: str) -> Any:
    """A function of NumPy or torch, or a method, by its name."""
    plain = name.strip("_")
    function = b.functions.get(plain)
    if plain == "getitem":
        raise RefusalError("indexes an array that cannot be seen from outside", "pass it in captured=, or let the function close over it")
    if function is None:
        random = "rand" in plain or "normal" in plain or "bernoulli" in plain
        hint = "random numbers are drawn outside and passed in captured=; dropout_p= is dropout" if random else f"it knows {KNOWN}"
        raise RefusalError(f"calls {prefix}{name}, which tracing does not know", hint)
    try:
        return function(b, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, RefusalError) or error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        raise RefusalError(f"calls {prefix}{name} with arguments that tracing does not know ({error})", "its plain form works") from None
