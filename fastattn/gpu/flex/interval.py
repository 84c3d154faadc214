"""What a mask_mod gives in a tile, without asking for every pair: interval arithmetic on the lines that differ from pair to pair.

An interval is (low, high) of int64, ends included; of a condition (0, 0), (1, 1) or (0, 1). Lines of rows and of columns come as the
intervals of their values in the tile. Floating point lines are unknown: NaN has no place in an interval.
"""
from __future__ import annotations

from typing import Any

from numba import int32, int64

from ...flex.program import Program
from ..dsl.inline import inline
from ..traced import MASK
from .ops import INTEGERS
from .staged import COLUMN, ROW, TILE

LOW, HIGH = -(2**31), 2**31 - 1
_floordiv, _mod = INTEGERS["floordiv"], INTEGERS["mod"]


@inline
def fit(low, high):
    """The interval if an int32 holds it: sums wrap."""
    wraps = (low < LOW) | (high > HIGH)
    low, high = (int64(LOW), int64(HIGH)) if wraps else (low, high)
    return low, high


@inline
def add(x, y):
    return fit(x[0] + y[0], x[1] + y[1])


@inline
def sub(x, y):
    return fit(x[0] - y[1], x[1] - y[0])


@inline
def neg(x):
    return fit(-x[1], -x[0])


@inline
def mul(x, y):
    a, b, c, d = x[0] * y[0], x[0] * y[1], x[1] * y[0], x[1] * y[1]
    return fit(min(min(a, b), min(c, d)), max(max(a, b), max(c, d)))


@inline
def size_of(x):
    most, least = max(abs(x[0]), abs(x[1])), min(abs(x[0]), abs(x[1]))
    least = int64(0) if (x[0] <= 0) & (x[1] >= 0) else least
    return fit(least, most)


@inline
def smaller(x, y):
    return min(x[0], y[0]), min(x[1], y[1])


@inline
def larger(x, y):
    return max(x[0], y[0]), max(x[1], y[1])


@inline
def floordiv(x, y):
    """Known for a divisor that is one positive number."""
    by = int32(y[0])
    known = (y[0] == y[1]) & (y[0] > 0)
    by = by if known else int32(1)
    low, high = int64(_floordiv(int32(x[0]), by)), int64(_floordiv(int32(x[1]), by))
    low, high = (low, high) if known else (int64(LOW), int64(HIGH))
    return low, high


@inline
def mod(x, y):
    """Known for a divisor that is one positive number; exact if the interval meets no multiple of it but at its start."""
    known = (y[0] == y[1]) & (y[0] > 0)
    by = int32(y[0]) if known else int32(1)
    low, high = int64(_mod(int32(x[0]), by)), int64(_mod(int32(x[1]), by))
    exact = (x[1] - x[0] < y[0]) & (low <= high)
    low, high = (low, high) if exact else (int64(0), int64(by) - int64(1))
    low, high = (low, high) if known else (int64(LOW), int64(HIGH))
    return low, high


@inline
def less(x, y):
    return int64(x[1] < y[0]), int64(x[0] < y[1])


@inline
def less_equal(x, y):
    return int64(x[1] <= y[0]), int64(x[0] <= y[1])


@inline
def equal(x, y):
    return int64((x[0] == x[1]) & (y[0] == y[1]) & (x[0] == y[0])), int64((x[0] <= y[1]) & (y[0] <= x[1]))


@inline
def unequal(x, y):
    always, ever = equal(x, y)
    return int64(1) - ever, int64(1) - always


@inline
def both(x, y):
    return x[0] & y[0], x[1] & y[1]


@inline
def either(x, y):
    return x[0] | y[0], x[1] | y[1]


@inline
def negated(x):
    return int64(1) - x[1], int64(1) - x[0]


@inline
def one_of(x, y):
    return unequal(x, y)


@inline
def chosen(c, x, y):
    """where(c, x, y)."""
    low = x[0] if c[0] == 1 else y[0] if c[1] == 0 else min(x[0], y[0])
    high = x[1] if c[0] == 1 else y[1] if c[1] == 0 else max(x[1], y[1])
    return low, high


_NUMBERS = {"add": "add", "sub": "sub", "mul": "mul", "neg": "neg", "abs": "size_of", "min": "smaller", "max": "larger",
            "floordiv": "floordiv", "mod": "mod", "lt": "less", "le": "less_equal", "eq": "equal", "ne": "unequal", "where": "chosen"}
_CONDITIONS = {"and": "both", "or": "either", "xor": "one_of", "not": "negated", "where": "chosen", "eq": "equal", "ne": "unequal",
               "lt": "less", "le": "less_equal"}


def ranges_of(program: Program, wanted: list[int]) -> list[int]:
    """Which of the lines that a stage hands on have an interval."""
    return [n for n in wanted if program.lines[n].kind != "f"]


class Bounds:
    """bounds_values(a, tile, rows, columns, batch, head, q, k): the interval of the program's output.

    rows, columns: tuples of the intervals of what these stages hand on (of `ranges_of` it), q and k those of the indices.
    """

    def __init__(self, program: Program, stage: tuple[str, ...], wanted: dict[str, list[int]]) -> None:
        self.program, self.stage = program, stage
        self.places = {n: f"{name}[{i}]" for name, s in (("rows", ROW), ("columns", COLUMN))
                       for i, n in enumerate(ranges_of(program, wanted[s]))}
        self.tile = {n: f"tile[{i}]" for i, n in enumerate(wanted[TILE])}
        self.names: dict[str, Any] = {"int64": int64, "add": add, "sub": sub, "mul": mul, "neg": neg,
                                      "size_of": size_of, "smaller": smaller, "larger": larger, "floordiv": floordiv, "mod": mod,
                                      "less": less, "less_equal": less_equal, "equal": equal, "unequal": unequal, "both": both,
                                      "either": either, "negated": negated, "one_of": one_of, "chosen": chosen}
        self.text = self._text()
        space = dict(self.names)
        exec(compile(self.text, "<fastattn traced bounds>", "exec"), space)
        self.function = inline(space["bounds_values"])

    def _text(self) -> str:
        lines, needed, stack = self.program.lines, set[int](), list(self.program.outputs)
        while stack:
            n = stack.pop()
            if n not in needed:
                needed.add(n)
                stack += lines[n].args if n not in self.places and n not in self.tile else ()
        text = ["def bounds_values(a, tile, rows, columns, batch, head, q, k):"]
        text += [f"    v{n} = {self._interval(n)}" for n in sorted(needed) if lines[n].kind != "f"]
        return "\n".join((*text, f"    return v{self.program.outputs[0]}")) + "\n"

    def _interval(self, n: int) -> str:
        line = self.program.lines[n]
        unknown = "int64(0), int64(1)" if line.kind == "b" else f"int64({LOW}), int64({HIGH})"
        if n in self.places:
            return self.places[n]
        if n in self.tile:
            return f"int64({self.tile[n]}), int64({self.tile[n]})"
        if line.op == "const":
            return f"int64({int(line.value)}), int64({int(line.value)})"
        if line.op == "input":
            return str(line.value) if line.value in ("q", "k") else f"int64({line.value}), int64({line.value})"
        if line.op in ("number", "length"):
            name = f"a.{MASK}_number{line.value}" if line.op == "number" else f"a.{MASK}{line.value[0]}_n{line.value[1]}"
            return f"int64({name}), int64({name})"
        kinds = [self.program.lines[m].kind for m in line.args]
        if "f" in kinds or line.op == "load":
            return unknown
        if line.op == "int" and kinds == ["b"]:
            return f"v{line.args[0]}"
        names = _CONDITIONS if line.kind == "b" and (kinds[0] == "b" or line.op == "where") else _NUMBERS
        rule = (_NUMBERS if line.kind == "b" and kinds[0] == "i" else names).get(line.op)
        return unknown if rule is None else f"{rule}({', '.join(f'v{m}' for m in line.args)})"


__all__ = ["Bounds", "ranges_of"]
