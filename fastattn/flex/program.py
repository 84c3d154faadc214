"""`Program`: a user's function as a list of lines, each an operation on earlier lines. `Builder` makes one.

    0:f=input(;'score')  1:i=input(;'q')  2:i=input(;'k')  3:i=sub(1,2)  4:f=float(3)  5:f=add(0,4)  -> 5

Equal lines are one. The text is all that an engine compiles, hence its cache key: two functions of the same formula share it.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .ops import BOOL, COMMUTES, FLOAT, INT, OPS, kind_of, numpy_type, whole, wrapped

INPUTS = ("score", "batch", "head", "q", "k")           # of a score_mod, in the order in which it gets them; a mask_mod has no score
TILE, ROW, COLUMN, ELEMENT = "tile", "row", "column", "element"
_CLASSES = {(False, False): TILE, (True, False): ROW, (False, True): COLUMN, (True, True): ELEMENT}
_PAIRS = "score", "raw", "behind", "apart"       # the last three are of engines: lower.py, gpu/flex/distance.py
_ROWS, _COLUMNS = frozenset(["q", *_PAIRS]), frozenset(["k", *_PAIRS])


class Line(NamedTuple):
    """`op` on earlier lines `args` gives a `kind`, FLOAT, INT or BOOL.

    Beside those of ops.py the operations are
    const (`value`: the constant), input (its name), number (which run-time number), length (which array, which axis),
    load (which array; `args` are indices, one for each axis, which are cut to the array: below 0 to the first element, past the
    end to the last), float and int (casts).
    """

    op: str
    args: tuple[int, ...]
    kind: str
    value: Any = None


class Captured(NamedTuple):
    """An array that a program loads from."""

    dtype: str
    ndim: int


@dataclass(frozen=True)
class Program:
    """`outputs` are lines. `arrays` are those that it loads from, `numbers` the kinds of its run-time numbers."""

    lines: tuple[Line, ...]
    outputs: tuple[int, ...]
    arrays: tuple[Captured, ...] = ()
    numbers: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text

    @cached_property
    def text(self) -> str:
        shown = [f"{n}:{x.kind}={x.op}({','.join(map(str, x.args))}{'' if x.value is None else ';' + repr(x.value)})"
                 for n, x in enumerate(self.lines)]
        arrays = ",".join(f"{x.dtype}/{x.ndim}" for x in self.arrays)
        return f"{' '.join(shown)} -> {','.join(map(str, self.outputs))} of [{arrays}] {''.join(self.numbers)}".rstrip()

    @cached_property
    def depends(self) -> tuple[frozenset[str], ...]:
        """For each line the inputs that it depends on."""
        found: list[frozenset[str]] = []
        for x in self.lines:
            own: Iterable[str] = [x.value] if x.op == "input" else ()
            found.append(frozenset(own).union(*(found[n] for n in x.args)))
        return tuple(found)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """For each line where it can be computed: once for a TILE of a head, for a ROW, for a COLUMN, or for each ELEMENT."""
        return tuple([_CLASSES[bool(d & _ROWS), bool(d & _COLUMNS)] for d in self.depends])

    @property
    def used(self) -> frozenset[str]:
        """The inputs that the outputs depend on."""
        return frozenset[str]().union(*(self.depends[n] for n in self.outputs))

    @property
    def gathers(self) -> bool:
        """Whether it loads an element for every score."""
        return any(x.op == "load" and c == ELEMENT for x, c in zip(self.lines, self.classes, strict=True))

    def only(self, *outputs: int) -> Program:
        """What these lines need."""
        b = Builder(self.arrays, self.numbers)
        b.lines = list(self.lines)
        return b.program(*outputs)


class Builder:
    """Lines so far. Constants are folded; x + 0, x * 1 and x / 1 are x.

    `derives`: x * 0 is 0 too, which derivatives are full of; there 0 * inf is not meant.
    """

    def __init__(self, arrays: Sequence[Captured] = (), numbers: Sequence[str] = (), derives: bool = False) -> None:
        self.lines: list[Line] = []
        self.known: dict[Line, int] = {}
        self.arrays, self.numbers, self.derives = list(arrays), list(numbers), derives

    def add(self, op: str, args: tuple[int, ...] = (), kind: str = FLOAT, value: Any = None) -> int:
        """A line as it is, if there is none like it."""
        line = Line(op, args, kind, value)
        key = line._replace(value=(type(value).__name__, repr(value)))      # 0.0 is not -0.0, nor 1 True
        if key not in self.known:
            self.known[key] = len(self.lines)
            self.lines.append(line)
        return self.known[key]

    def copy(self, line: Line, args: tuple[int, ...]) -> int:
        """A line of another program, on lines of this one."""
        return self.do(line.op, *args) if line.op in OPS else self.add(line.op, args, line.kind, line.value)

    def include(self, p: Program) -> tuple[int, ...]:
        """The outputs of a program over the same arrays and numbers, as lines of this one."""
        new: list[int] = []
        for x in p.lines:
            new.append(self.copy(x, tuple([new[n] for n in x.args])))
        return tuple([new[n] for n in p.outputs])

    def const(self, value: Any, kind: str = FLOAT) -> int:
        x = float(value) if kind == FLOAT else bool(value) if kind == BOOL else wrapped(int(value))
        return self.add("const", (), kind, x)

    def load(self, array: int, args: tuple[int, ...] = ()) -> int:
        return self.add("load", args, kind_of(self.arrays[array].dtype), array)

    def is_const(self, n: int, value: Any = None) -> bool:
        line = self.lines[n]
        return line.op == "const" and (value is None or line.value == value)

    def to(self, n: int, kind: str) -> int:
        """Line n as a kind."""
        line = self.lines[n]
        if line.kind == kind:
            return n
        if line.op == "const":
            return self.const(int(whole(np.float64(line.value))) if line.kind == FLOAT and kind == INT else line.value, kind)
        if kind == BOOL:
            return self.add("ne", (n, self.const(0, line.kind)), BOOL)
        return self.add("float" if kind == FLOAT else "int", (n,), kind)

    def do(self, op: str, *args: int) -> int:
        """An operation of OPS on lines, which are brought to one kind as NumPy would. TypeError: "logic" of floats."""
        if op == "where":
            return self._where(*args)
        kinds, rule = [self.lines[n].kind for n in args], OPS[op]
        common = FLOAT if FLOAT in kinds or rule.of == "real" else INT if INT in kinds or rule.of in ("number", "whole") else BOOL
        if common == FLOAT and rule.of in ("logic", "whole"):
            raise TypeError(op)
        args = tuple([self.to(n, common) for n in args])
        kind = BOOL if rule.compares else common
        if all(self.is_const(n) for n in args):
            return self._fold(op, args, kind)
        same = self._same(op, args)
        if same is not None:
            return same
        if op in COMMUTES and args[0] > args[1]:
            args = args[::-1]
        return self.add(op, args, kind)

    def _where(self, c: int, x: int, y: int) -> int:
        kinds = self.lines[x].kind, self.lines[y].kind
        data = FLOAT if FLOAT in kinds else INT if INT in kinds else BOOL
        c, x, y = self.to(c, BOOL), self.to(x, data), self.to(y, data)
        if self.is_const(c):
            return x if self.lines[c].value else y
        return x if x == y else self.add("where", (c, x, y), data)

    @np.errstate(all="ignore")
    def _fold(self, op: str, args: tuple[int, ...], kind: str) -> int:
        values = [np.asarray(self.lines[n].value, numpy_type(self.lines[n].kind, np.float64)) for n in args]
        return self.const(OPS[op].function(*values).item(), kind)

    def _same(self, op: str, args: tuple[int, ...]) -> int | None:
        """The line that the operation gives without computing anything."""
        pairs = (args, args[::-1]) if op in COMMUTES else (args,)
        for x, *rest in pairs:
            y = rest[0] if rest else x
            kind = self.lines[y].kind
            if kind == BOOL and self.is_const(y) and op in ("and", "or", "xor"):
                if op == "xor":
                    return x if not self.lines[y].value else None
                return x if self.lines[y].value == (op == "and") else y
            if (op in ("add", "sub") and self.is_const(y, 0)) or (op in ("mul", "div") and self.is_const(y, 1)):
                return x
            if op == "mul" and self.is_const(y, 0) and self.derives:
                return y
            if op in ("min", "max", "and", "or") and x == y:
                return x
        if op == "not" and self.lines[args[0]].op == "not":
            return self.lines[args[0]].args[0]
        if op == "div" and self.derives and self.is_const(args[0], 0):
            return args[0]
        return None

    def program(self, *outputs: int) -> Program:
        """What the outputs need, renumbered."""
        needed, stack = set[int](), list(outputs)
        while stack:
            n = stack.pop()
            if n not in needed:
                needed.add(n)
                stack += self.lines[n].args
        new = {n: i for i, n in enumerate(sorted(needed))}
        lines = tuple([self.lines[n]._replace(args=tuple([new[m] for m in self.lines[n].args])) for n in new])
        return Program(lines, tuple([new[n] for n in outputs]), tuple(self.arrays), tuple(self.numbers))


def renumbered(p: Program, arrays: Sequence[Captured], numbers: Sequence[str], array: dict[int, int], number: dict[int, int]) -> Program:
    """The program with other numbers for its arrays and run-time numbers: those of a longer list."""
    def of(x: Line) -> Line:
        if x.op == "load":
            return x._replace(value=array[x.value])
        if x.op == "length":
            return x._replace(value=(array[x.value[0]], x.value[1]))
        return x._replace(value=number[x.value]) if x.op == "number" else x
    return replace(p, lines=tuple(map(of, p.lines)), arrays=tuple(arrays), numbers=tuple(numbers))
