"""Code of a traced function (fastattn/flex) for the engine's interpreter: where each line runs, and in which registers.

A line runs once for a head and tile of keys if it does not depend on the query row, else once a row if it does not depend
on the key, else for each score. Values for one place of many are narrow registers, values for each key are wide ones.
program.h says what the lines do, program_rows.h runs them.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.view import View
from ..flex.ops import BOOL, FLOAT, INT
from ..flex.program import COLUMN, ELEMENT, ROW, TILE, Line, Program

SCORE, MOST_AXES, LAST_PLACE = -1, 8, 2**31 - 1         # program.h
CODE = np.dtype([("op", np.int32), ("flags", np.int32), ("to", np.int32), ("a", np.int32), ("b", np.int32), ("c", np.int32),
                 ("k", np.int64), ("axis", np.int32), ("spare", np.int32)])
SCATTER = np.dtype([("array", np.int32), ("factor", np.int32), ("wide", np.int32), ("list", np.int32)])
CAPTURED = np.dtype([("ptr", np.int64), ("by", np.int64, MOST_AXES), ("length", np.int64, MOST_AXES), ("axes", np.int32),
                     ("dtype", np.int32)])
DTYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3, "bool": 4, "int32": 16, "int64": 17}      # program.h
_ONCE = (TILE, COLUMN)
_WIDE = (COLUMN, ELEMENT)
_PREFIXED = {"f": "f_", "i": "i_", "b": "b_"}


class Machine(NamedTuple):
    """What the compiled level says of itself: bytes of a vector, keys of a wide register, names of the operations."""

    vector: int
    keys: int
    ops: tuple[str, ...]


class Scatter(NamedTuple):
    """A gradient: which array it belongs to, and how many axes that has."""

    array: int
    axes: int


class Form(NamedTuple):
    """What code needs to know of an array. Its address is no part of it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class _Step:
    """An operation on earlier steps; `where` it is computed; whether it depends on the score. `index`: the steps of the indices of
    an array of any size.
    """

    op: str
    args: tuple[int, ...]
    where: str
    k: Any = 0
    axis: int = 0
    index: tuple[int, ...] = ()
    scored: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        return self.args + self.index


@dataclass(frozen=True, slots=True)
class Register:
    """Bytes from the start, or SCORE, and whether there is a value for each key."""

    at: int
    wide: bool


@dataclass(frozen=True)
class Code:
    """Lines [0, once) are run once for a head and tile, the others for each row. `bounds`: the program for interval arithmetic.

    `scatters`: which outputs, but for the first, are factors of a gradient.
    """

    lines: NDArray[Any]
    once: int
    bounds: NDArray[Any]
    lists: NDArray[np.int32]
    outputs: tuple[Register, ...]
    scatters: NDArray[Any]
    batch: int
    head: int
    q: int
    by_head: bool
    bytes: int


def form_of(x: View) -> Form:
    return Form(x.dtype, x.shape, x.strides)


def captured(views: Sequence[View]) -> NDArray[Any]:
    """The arrays as C reads them. One without elements becomes a zero: whatever the index, there is something to read."""
    found = np.zeros(len(views), CAPTURED)
    for to, x in zip(found, views, strict=True):
        to["ptr"], to["axes"], to["dtype"] = x.ptr, len(x.shape), DTYPE[x.dtype]
        to["length"], to["by"] = 1, 0
        if 0 not in x.shape:
            to["length"][:len(x.shape)], to["by"][:len(x.shape)] = x.shape, x.strides
        else:
            to["ptr"] = ZERO.ctypes.data
    return found


ZERO = np.zeros(1)


@lru_cache(maxsize=128)
def assemble(program: Program, forms: tuple[Form, ...], numbers: tuple[float, ...], machine: Machine, real: int,
             bounded: bool = False, scatters: tuple[Scatter, ...] = ()) -> Code:
    """Code for arrays of these forms and these run-time numbers. `real`: bytes of the arithmetic's floats.

    bounded: with bounds, of a mask. scatters: the outputs after the first are a factor for each, then the indices of each.
    """
    steps = _Steps(program, forms, numbers, real)
    outputs = tuple([steps.of[n] for n in program.outputs])
    steps.fuse(outputs)
    return _Allocation(steps.steps, outputs, machine, real).code(_bounds(program, forms, numbers, machine) if bounded else None, scatters)


# ---------------------------------------------------------------- lines to steps
def _joined(*places: str) -> str:
    rows, columns = any(x in (ROW, ELEMENT) for x in places), any(x in (COLUMN, ELEMENT) for x in places)
    return ELEMENT if rows and columns else ROW if rows else COLUMN if columns else TILE


def _far(x: Form) -> bool:
    """Whether places in the array, in bytes, may need more than 31 bits."""
    span = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.strides, strict=True))
    return max(span, *map(abs, x.strides), 0) > LAST_PLACE


def _operation(p: Program, line: Line) -> str:
    """The machine's name of an operation on numbers of a kind."""
    kind = p.lines[line.args[-1]].kind
    if line.op in ("float", "int"):
        return {"float": "f_of_", "int": "i_of_"}[line.op] + kind
    return line.op if line.op == "where" else _PREFIXED[kind] + line.op


def _constant(kind: str, value: Any) -> tuple[str, Any]:
    return ("f_const", float(value)) if kind == FLOAT else ("i_const", -int(value) if kind == BOOL else int(value))


def _of_call(p: Program, line: Line, forms: Sequence[Form], numbers: Sequence[float]) -> tuple[str, Any] | None:
    """What is a constant once a call's arrays and numbers are known."""
    if line.op == "const":
        return _constant(line.kind, line.value)
    if line.op == "number":
        return _constant(line.kind, numbers[line.value])
    if line.op == "length":
        return _constant(INT, forms[line.value[0]].shape[line.value[1]])
    return None


class _Steps:
    """The program in the machine's operations: loads as places and elements, constants of the call put in. `of`: line -> step."""

    def __init__(self, p: Program, forms: tuple[Form, ...], numbers: tuple[float, ...], real: int) -> None:
        self.real = real
        self.steps: list[_Step] = []
        self.known: dict[tuple[Any, ...], int] = {}
        self.of: list[int] = []
        self.forms = forms
        for line in p.lines:
            constant = _of_call(p, line, forms, numbers)
            args = tuple([self.of[n] for n in line.args])
            if constant is not None:
                n = self.add(constant[0], (), TILE, constant[1])
            elif line.op == "input":
                n = self.add(line.value, (), {"score": ELEMENT, "q": ROW, "k": COLUMN}.get(line.value, TILE))
            elif line.op == "load":
                n = self._load(line, args)
            else:
                n = self._plain(_operation(p, line), args)
            self.of.append(n)

    def add(self, op: str, args: tuple[int, ...], where: str, k: Any = 0, axis: int = 0, index: tuple[int, ...] = ()) -> int:
        key = (op, args, type(k).__name__, repr(k), axis, index)
        if key not in self.known:
            self.known[key] = len(self.steps)
            scored = op == "score" or any(self.steps[n].scored for n in (*args, *index))
            self.steps.append(_Step(op, args, where, k, axis, index, scored))
        return self.known[key]

    def _place_of(self, *args: int) -> str:
        return _joined(*(self.steps[n].where for n in args))

    def _plain(self, op: str, args: tuple[int, ...]) -> int:
        """A power of two divides by bits; in float32 scores are divided by a reciprocal."""
        last = self.steps[args[-1]]
        if op == "f_div" and self.real == 4 and last.where != ELEMENT and self.steps[args[0]].scored:
            return self._plain("f_mul", (args[0], self._plain("f_reciprocal", args[1:])))
        if op in ("i_floordiv", "i_mod") and last.op == "i_const" and last.k > 0 and last.k & last.k - 1 == 0:
            k = last.k.bit_length() - 1 if op == "i_floordiv" else last.k - 1
            return self._plain("i_shr" if op == "i_floordiv" else "i_and", (args[0], self.add("i_const", (), TILE, k)))
        return self.add(op, args, self._place_of(*args))

    def _load(self, line: Line, index: tuple[int, ...]) -> int:
        """An element. Axes whose index is the same for most places come first, so that their part of the place is computed once."""
        x, kind = self.forms[line.value], line.kind
        if _far(x):
            return self.add(f"{kind}_far", (), self._place_of(*index), line.value, 0, index)
        order = sorted(range(len(index)), key=lambda axis: (TILE, ROW, COLUMN, ELEMENT).index(self.steps[index[axis]].where))
        place: tuple[int, ...] = ()
        for axis in order:
            args = (index[axis], *place)
            place = (self.add("place", args, self._place_of(*args), line.value, axis),)
        if not place:
            place = (self.add("i_const", (), TILE, 0),)
        return self.add(f"{kind}_load", place, self._place_of(*place), line.value)

    def fuse(self, outputs: tuple[int, ...]) -> None:
        """x * y + z and z - x * y in one step, where the product has no other use and is not computed more seldom."""
        uses = [0] * len(self.steps)
        for n in [*(m for step in self.steps for m in step.reads), *outputs]:
            uses[n] += 1
        for step in self.steps:
            if step.op not in ("f_add", "f_sub"):
                continue
            pairs = [(step.args[1], step.args[0])] + ([step.args] if step.op == "f_add" else [])
            for product, other in pairs:
                of = self.steps[product]
                if of.op == "f_mul" and uses[product] == 1 and of.where == step.where:
                    step.op, step.args = "f_muladd" if step.op == "f_add" else "f_submul", (*of.args, other)
                    break


def _bounds(p: Program, forms: tuple[Form, ...], numbers: tuple[float, ...], machine: Machine) -> tuple[NDArray[Any], list[int]]:
    """The program as it stands, for interval arithmetic: registers are numbers of lines, the first four the inputs."""
    number = {"batch": 0, "head": 1, "q": 2, "k": 3}
    of: list[int] = []
    found: list[tuple[Any, ...]] = [(machine.ops.index("i_const"), 0, n, -1, -1, -1, 0, 0, 0) for n in range(4)]
    lists: list[int] = []
    for line in p.lines:
        if line.op == "input":
            of.append(number[line.value])
            continue
        args, op, k, axis = [of[n] for n in line.args], "", 0, 0
        constant = _of_call(p, line, forms, numbers)
        if constant is not None:
            op, k = constant[0], 0 if constant[0] == "f_const" else constant[1]
        elif line.op == "load":
            op, k, axis, args = f"{line.kind}_load", line.value, len(lists), []
            lists += [of[n] for n in line.args]
        else:
            op = _operation(p, line)
        of.append(len(found))
        found.append((machine.ops.index(op), 0, len(found), *[*args, -1, -1, -1][:3], k, axis, 0))
    found.append((machine.ops.index("b_or"), 0, len(found), of[p.outputs[0]], of[p.outputs[0]], -1, 0, 0, 0))
    return np.array(found, CODE), lists


# ---------------------------------------------------------------- registers
class _Allocation:
    """Registers for the steps that the outputs need. Narrow ones are never used again. A wide one is, when its last reader has run."""

    def __init__(self, steps: list[_Step], outputs: tuple[int, ...], machine: Machine, real: int) -> None:
        self.steps, self.outputs, self.machine, self.real = steps, outputs, machine, real
        self.order = self._order()
        self.narrow = self.wide = 0
        self.register: dict[int, tuple[int, bool]] = {}     # number, wide
        self.free: list[int] = []
        self._allocate()

    def _order(self) -> list[int]:
        needed, stack = set[int](), list(self.outputs)
        while stack:
            n = stack.pop()
            if n not in needed:
                needed.add(n)
                stack += self.steps[n].reads
        stages = {TILE: 0, COLUMN: 0, ROW: 1, ELEMENT: 1}
        return sorted(needed, key=lambda n: (stages[self.steps[n].where], n))

    def _allocate(self) -> None:
        once = {n for n in self.order if self.steps[n].where in _ONCE}
        last = {m: n for n in self.order for m in self.steps[n].reads}
        kept = {m for m, n in last.items() if m in once and n not in once} | set(self.outputs)
        for n in self.order:
            step = self.steps[n]
            if step.op == "score":
                continue
            for m in dict.fromkeys(step.reads):
                if last[m] == n and m not in kept and m in self.register and self.register[m][1]:
                    self.free.append(self.register[m][0])
            self.register[n] = self._take(step.where in _WIDE)

    def _take(self, wide: bool) -> tuple[int, bool]:
        if not wide:
            self.narrow += 1
            return self.narrow - 1, False
        if self.free:
            return self.free.pop(), True
        self.wide += 1
        return self.wide - 1, True

    def _at(self, n: int) -> Register:
        """Narrow registers come first."""
        if self.steps[n].op == "score":
            return Register(SCORE, True)
        number, wide = self.register[n]
        start = self.narrow * self.machine.vector if wide else 0
        return Register(start + number * (self.machine.keys * self.real if wide else self.machine.vector), wide)

    def _list(self, index: Sequence[int]) -> list[int]:
        """Registers of the indices of an array, two numbers each."""
        return [x for n in index for x in (self._at(n).at, int(self._at(n).wide))]

    def code(self, bounds: tuple[NDArray[Any], list[int]] | None, scatters: tuple[Scatter, ...]) -> Code:
        lists = [] if bounds is None else list(bounds[1])
        lines: list[tuple[Any, ...]] = []
        once = 0
        inputs = {"batch": SCORE, "head": SCORE, "q": SCORE}
        for n in self.order:
            step = self.steps[n]
            if step.op in inputs:
                inputs[step.op] = self._at(n).at
            if step.op in ("score", *inputs):
                continue
            to, args = self._at(n), [self._at(m) for m in step.args]
            k, axis = step.k, step.axis
            if step.op == "f_const":
                k = int(np.float64(k).view(np.int64))
            if step.index or step.op.endswith("_far"):
                axis = len(lists)
                lists += self._list(step.index)
            if step.op == "place" and len(args) == 2:
                args.insert(1, args[1])             # what comes before is operand c
            flags = int(to.wide) | sum(2 << i for i, x in enumerate(args) if x.wide)
            a, b, c = [*[x.at for x in args], 0, 0, 0][:3]
            name = "column" if step.op == "k" else step.op
            if step.op == "place" and len(args) == 1:
                name, c = "first_place", 0
            lines.append((self.machine.ops.index(name), flags, to.at, a, b, c, k, axis, 0))
            once += step.where in _ONCE
        outputs, found = [self._at(n) for n in self.outputs], []
        index = self.outputs[1 + len(scatters):]
        for s, factor in zip(scatters, outputs[1:], strict=False):
            found.append((s.array, factor.at, factor.wide, len(lists)))
            lists += self._list(index[:s.axes])
            index = index[s.axes:]
        by_head = any(self.steps[n].op == "head" for n in self.order)
        total = self.narrow * self.machine.vector + self.wide * self.machine.keys * self.real
        return Code(np.array(lines, CODE), once, np.zeros(0, CODE) if bounds is None else bounds[0],
                    np.array(lists, np.int32), tuple(outputs), np.array(found, SCATTER), inputs["batch"], inputs["head"], inputs["q"],
                    by_head, total)
