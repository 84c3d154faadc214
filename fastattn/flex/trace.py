"""A plain Python function of a score and its place -> Program. The function is called with stand-ins that note what is done to them.

    trace(lambda score, b, h, q, k, slopes: score - slopes[h] * abs(q - k), [("float32", 1)]).text

No bytecode and no source text is read. `traced` is the public functions' way in: it finds the arrays and numbers that a
function holds, and remembers what it has traced. A number is a constant of the program at first, because a constant costs
nothing. If it has another value in a later call, it is a run-time number from then on, so nothing is compiled for the third
value. (Where Python needs to know it, as range does, it stays a constant.)
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..arrays import words
from ..arrays.view import NAMES
from ..errors import message
from ..memo import Recent
from .capture import Held, Leaf, is_array, is_number
from .functions import FUNCTIONS
from .ops import BOOL, FLOAT, HIGH, INT, LOW
from .program import INPUTS, Captured, Program
from .refusal import DecidesError, RefusalError, line_of, of_jax, raised_in_jax
from .values import Array, TraceBuilder, Value, line

SIGNATURES = {False: "(score, b, h, q_idx, kv_idx)", True: "(b, h, q_idx, kv_idx)"}


class Traced(NamedTuple):
    """A program with what it works on: the caller's arrays, what they are called, and the values of its run-time numbers."""

    program: Program
    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    numbers: tuple[float, ...]


class _Used(NamedTuple):
    """A program, and which leaves its arrays and numbers are."""

    program: Program
    arrays: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(slots=True)
class _Numbers:
    """The numbers of functions of one shape: their first values, which have changed since, and which Python must know."""

    first: tuple[Any, ...]
    moving: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)


_numbers: Recent[Any, _Numbers] = Recent()
_programs: Recent[Any, _Used] = Recent()


class _Late(Value):
    """A Value whose line is made when it is used: an array without axes, or a run-time number."""

    __slots__ = ("_line",)

    def __init__(self, b: TraceBuilder, make: Callable[[], int]) -> None:
        self.b, self._line = b, make

    @property
    def n(self) -> int:  # type: ignore[override]
        return self._line()


class _Tracing:
    """One call of a function with stand-ins."""

    def __init__(self, leaves: Sequence[Leaf], moving: set[int], captured: int) -> None:
        self.b, self.leaves, self.moving = TraceBuilder(FUNCTIONS), leaves, moving
        self.arrays: list[int] = []                         # leaves that are used, in order of first use; those of captured= at first
        self.numbers: list[int] = []
        for n in range(captured):
            if not leaves[n].number:
                self._register(n)

    def _register(self, leaf: int) -> int:
        if leaf not in self.arrays:
            self.arrays.append(leaf)
            self.b.arrays.append(described(self.leaves[leaf].value))
        return self.arrays.index(leaf)

    def _number(self, leaf: int) -> int:
        kind = _kind(self.leaves[leaf].value)
        if leaf not in self.numbers:
            self.numbers.append(leaf)
            self.b.numbers.append(kind)
        return self.b.add("number", (), kind, self.numbers.index(leaf))

    def stand_in(self, n: int) -> Any:
        leaf = self.leaves[n]
        if leaf.number:
            return _Late(self.b, lambda: self._number(n)) if n in self.moving else plain_number(leaf.value)
        axes = described(leaf.value).ndim
        if axes:
            return Array(self.b, self._register, n, leaf.name, axes)
        return _Late(self.b, lambda: self.b.load(self._register(n)))

    def run(self, function: Callable[..., Any], captured: Sequence[Any], mask: bool) -> _Used:
        b = self.b
        given = [Value(b, b.add("input", (), FLOAT if name == "score" else INT, name)) for name in INPUTS[mask:]]
        result = function(*given, *captured)
        if result is None:
            raise RefusalError("returns None", "a return statement gives the condition" if mask else "a return statement gives the score")
        n = line(b, result)
        kind = b.lines[n].kind
        if mask and kind != BOOL:
            raise RefusalError("returns a number", "a condition works, as q_idx >= kv_idx; score_mod= takes functions of a score")
        if not mask and kind == BOOL:
            raise RefusalError("returns a condition", "mask_mod= takes conditions; numpy.where(c, score, -numpy.inf) is a score")
        return _Used(b.program(b.to(n, BOOL if mask else FLOAT)), tuple(self.arrays), tuple(self.numbers))


def _kind(x: Any) -> str:
    return FLOAT if isinstance(plain_number(x), float) else INT


def plain_number(x: Any) -> Any:
    """A number as Python's own; an integer beyond 32 bits as a float."""
    x = x if type(x) in (int, float) else x.item()
    return float(x) if type(x) is int and not LOW <= x <= HIGH else x


def described(x: Any) -> Captured:
    """dtype and number of axes of an array of any library, also of one known by its interface alone, or of a pair that says both."""
    if isinstance(x, tuple):
        return Captured(*x)
    interface = None if hasattr(x, "shape") else getattr(x, "__cuda_array_interface__", None)
    if isinstance(interface, dict) and {"typestr", "shape"} <= interface.keys():
        return Captured(np.dtype(interface["typestr"]).name, len(interface["shape"]))
    dtype = getattr(x, "dtype", "")
    known = NAMES.get(dtype) if isinstance(dtype, np.dtype) else None
    return Captured(known or words.dtype_of(dtype), len(x.shape))


# ---------------------------------------------------------------- tracing
def trace(function: Callable[..., Any], arrays: Sequence[tuple[str, int]] = (), mask: bool = False) -> Program:
    """The program of a score_mod, or, where `mask`, of a mask_mod.

    `arrays` are (dtype, number of axes) of its captured arrays; what else it holds are constants. RefusalError, or what the function
    raises.
    """
    leaves = [Leaf(x, f"captured[{n}]", False) for n, x in enumerate(arrays)]
    tracing = _Tracing(leaves, set(), len(leaves))
    return tracing.run(function, [tracing.stand_in(n) for n in range(len(leaves))], mask).program


def traced(call: str, argument: str, function: Callable[..., Any], captured: Sequence[Any] = (), mask: bool = False) -> Traced:
    """The program of a caller's function, with its arrays: those of `captured`, then those that it holds, in order of first use."""
    if not callable(function):
        raise TypeError(message(call, argument, f"is {words.shown(function)}", f"a function {SIGNATURES[mask]}"))
    for n, x in enumerate(captured):
        if not (is_array(x) or is_number(x)):
            raise TypeError(message(call, f"captured[{n}]", f"is {words.kind(x)}", "an array or a number",
                                    "numpy.asarray makes an array of a list" if isinstance(x, list | tuple) else ""))
    try:
        held = Held(function)
    except OverflowError:
        raise TypeError(message(call, argument, "holds too many objects to look through", "a function that closes over few",
                                "captured= takes its arrays")) from None
    leaves = [Leaf(x, f"captured[{n}]", is_number(x)) for n, x in enumerate(captured)] + held.leaves
    found = _known(call, argument, function, held, leaves, len(captured), mask)
    return Traced(found.program, tuple([leaves[n].value for n in found.arrays]), tuple([leaves[n].name for n in found.arrays]),
                  tuple([plain_number(leaves[n].value) for n in found.numbers]))


def _known(call: str, argument: str, function: Callable[..., Any], held: Held, leaves: list[Leaf], captured: int, mask: bool) -> _Used:
    """The program, of an earlier call where that had the same shape, dtypes and constants."""
    values = tuple([plain_number(x.value) if x.number else None for x in leaves])
    if held.shape is None:
        return _trace(call, argument, function, held, leaves, captured, mask, _Numbers(values))
    kinds = tuple([_kind(x.value) if x.number else described(x.value) for x in leaves])
    shape = held.shape, captured, mask, kinds
    numbers = _numbers.get(shape)
    if numbers is None:
        numbers = _numbers[shape] = _Numbers(values)
    numbers.moving |= {n for n, (x, y) in enumerate(zip(values, numbers.first, strict=True)) if x != y} - numbers.known

    def key() -> Any:
        return shape, frozenset(numbers.moving), tuple([None if n in numbers.moving else repr(x) for n, x in enumerate(values)])
    found = _programs.get(key())
    if found is None:
        found = _trace(call, argument, function, held, leaves, captured, mask, numbers)
        _programs[key()] = found
    return found


def _trace(call: str, argument: str, function: Callable[..., Any], held: Held, leaves: list[Leaf], captured: int, mask: bool,
           numbers: _Numbers) -> _Used:
    _check_signature(call, argument, function, captured, mask)
    while True:
        try:
            first, second = [_once(held, leaves, captured, mask, numbers.moving) for _ in range(2)]
            break
        except DecidesError as error:
            if not error.numbers:
                raise _refused(call, argument, error, mask) from None
            again = _Tracing(leaves, numbers.moving, captured)
            decided = _leaves_of(again, held, captured, mask, error.numbers)
            numbers.moving -= decided
            numbers.known |= decided
        except RefusalError as error:
            raise _refused(call, argument, error, mask) from None
        except Exception as error:
            if raised_in_jax(error):
                raise _refused(call, argument, of_jax().with_traceback(error.__traceback__), mask) from None
            error.add_note(f"It was raised by {argument}, which {call}() called to trace it; its arguments stand for any place.")
            raise
    if first.program != second.program:
        raise TypeError(message(call, argument, "gives another formula each time it is called", "one that does not change",
                                "random numbers and counters are made outside and passed in captured="))
    return first


def _once(held: Held, leaves: list[Leaf], captured: int, mask: bool, moving: set[int]) -> _Used:
    tracing = _Tracing(leaves, moving, captured)
    stand_ins = [tracing.stand_in(n) for n in range(len(leaves))]
    function = held.rebuilt(stand_ins[captured:]) if held.leaves else held.function
    return tracing.run(function, stand_ins[:captured], mask)


def _leaves_of(tracing: _Tracing, held: Held, captured: int, mask: bool, numbers: frozenset[int]) -> set[int]:
    """Which leaves the run-time numbers of an interrupted trace are: it is traced again up to there."""
    stand_ins = [tracing.stand_in(n) for n in range(len(tracing.leaves))]
    try:
        tracing.run(held.rebuilt(stand_ins[captured:]) if held.leaves else held.function, stand_ins[:captured], mask)
    except DecidesError as error:
        return {tracing.numbers[n] for n in error.numbers}
    raise AssertionError("the function differs between two calls")


def _check_signature(call: str, argument: str, function: Callable[..., Any], captured: int, mask: bool) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):                         # some built-in functions have none
        return
    count = len(INPUTS) - mask
    try:
        signature.bind(*range(count + captured))
    except TypeError:
        more = "" if mask else f", then {captured} captured" if captured else ", then nothing, because captured= is empty"
        raise TypeError(message(call, argument, f"takes {signature}", f"{count} arguments {SIGNATURES[mask]}{more}")) from None


def _refused(call: str, argument: str, error: RefusalError, mask: bool) -> TypeError:
    where = line_of(error.__traceback__)
    kind = "a condition of b, h, q_idx and kv_idx" if mask else "a formula of the score and its place"
    return TypeError(message(call, argument, f"{error.has}{f' in {where}' if where else ''}", kind, error.hint))
