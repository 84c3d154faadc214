"""The derivative of a program, by reverse mode on its lines: one pass gives it by the score and by every captured element.

Two rules keep NaN out, where differentiating op by op gives it:

- A condition travels with the gradient, and selects last. In where(x > 0, log(x), 0) the gradient of log is g / x, infinite
  or worse where the branch is not taken. Selecting before the division would give 0 / 0; here it is where(x > 0, g / x, 0).
- A gradient of 0 passes nothing on through an operation whose slope may be infinite: 0 * inf is 0.

An engine adds the third: a pair whose dS is 0 has no gradient, whatever the derivative is there.
At a kink the first operand counts: min(x, y) and max(x, y) give x the gradient at a tie. abs and sign have slope 0 at 0.
"""
from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from .ops import FLOAT
from .program import Builder, Line, Program

LN2 = math.log(2)


class Derivative(NamedTuple):
    """`program` has as outputs the score, its derivative by the score, then one by each of `loads`, which are lines of it.

    The gradient of a captured array's element is the sum of dS times that, over all places that load it.
    """

    program: Program
    loads: tuple[int, ...]

    @property
    def arrays(self) -> tuple[int, ...]:
        """For each of `loads` the array."""
        return tuple([self.program.lines[n].value for n in self.loads])


class _Part(NamedTuple):
    """A gradient: `value` where line `condition` is true, 0 elsewhere; everywhere without a condition."""

    condition: int | None
    value: int


class _Reverse:
    """Gradients of lines so far."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.parts: dict[int, list[_Part]] = {}

    def pass_on(self, n: int, part: _Part) -> None:
        """Part of the gradient of line n. Of integers and conditions there is none."""
        if self.b.lines[n].kind == FLOAT and not self.b.is_const(part.value, 0):
            self.parts.setdefault(n, []).append(part)

    def gradient(self, n: int) -> _Part | None:
        """What line n has so far, in one part: no line after n is left to add to it."""
        parts, b = self.parts.get(n, []), self.b
        if not parts:
            return None
        by_condition: dict[int | None, int] = {}
        for condition, value in parts:
            by_condition[condition] = b.do("add", by_condition[condition], value) if condition in by_condition else value
        if len(by_condition) == 1:
            return _Part(*next(iter(by_condition.items())))
        zero, total, either = b.const(0.0), b.const(0.0), None
        for condition, value in by_condition.items():
            total = b.do("add", total, value if condition is None else b.do("where", condition, value, zero))
            if condition is not None:
                either = condition if either is None else b.do("or", either, condition)
        return _Part(None if None in by_condition else either, total)

    def final(self, n: int) -> int:
        """The gradient of line n with its condition applied."""
        part = self.gradient(n)
        if part is None:
            return self.b.const(0.0)
        return part.value if part.condition is None else self.b.do("where", part.condition, part.value, self.b.const(0.0))


def derivative(p: Program, arrays: Collection[int] | None = None) -> Derivative:
    """The derivative of a score_mod's program by its score and by the elements of these arrays, of all float arrays if None."""
    b = Builder(p.arrays, p.numbers, derives=True)
    new: list[int] = []
    for x in p.lines:
        new.append(b.copy(x, tuple([new[n] for n in x.args])))
    out = new[p.outputs[0]]
    reverse = _Reverse(b)
    reverse.pass_on(out, _Part(None, b.const(1.0)))
    for n in range(out, -1, -1):
        line = b.lines[n]
        if line.args and line.kind == FLOAT and line.op != "load":
            part = reverse.gradient(n)
            if part is not None:
                _through(b, n, line, part, reverse)
    score = next((n for n, x in enumerate(b.lines) if x.op == "input" and x.value == "score"), None)
    loads = [n for n, x in enumerate(b.lines) if x.op == "load" and n in reverse.parts and (arrays is None or x.value in arrays)]
    slope = b.const(0.0) if score is None else reverse.final(score)
    result = b.program(out, slope, *[reverse.final(n) for n in loads], *loads)
    count = 2 + len(loads)
    return Derivative(Program(result.lines, result.outputs[:count], result.arrays, result.numbers), result.outputs[count:])


def _and(b: Builder, condition: int | None, other: int) -> int | None:
    if b.is_const(other):
        return condition if b.lines[other].value else other
    return other if condition is None else b.do("and", condition, other)


def _through(b: Builder, n: int, line: Line, part: _Part, reverse: _Reverse) -> None:
    """Pass the gradient of line n on to what it is made of."""
    do, args, g, zero = b.do, line.args, part.value, b.const(0.0)
    x = args[0]

    def smooth(m: int, value: int) -> None:
        reverse.pass_on(m, _Part(part.condition, value))

    def steep(m: int, value: int) -> None:
        """Where the slope may be infinite."""
        reverse.pass_on(m, _Part(_and(b, part.condition, do("ne", g, zero)), value))

    def branch(m: int, condition: int, value: int) -> None:
        reverse.pass_on(m, _Part(_and(b, part.condition, condition), value))
    if line.op == "where":
        branch(args[1], x, g)
        branch(args[2], do("not", x), g)
    elif line.op in ("add", "sub"):
        smooth(x, g)
        smooth(args[1], g if line.op == "add" else do("neg", g))
    elif line.op == "mul":
        smooth(x, do("mul", g, args[1]))
        smooth(args[1], do("mul", g, x))
    elif line.op == "div":
        through = smooth if b.is_const(args[1]) and not b.is_const(args[1], 0) else steep
        share = do("div", g, args[1])
        through(x, share)
        if not b.is_const(args[1]):
            through(args[1], do("neg", do("mul", share, n)))
    elif line.op == "reciprocal":
        steep(x, do("neg", do("mul", g, do("mul", n, n))))
    elif line.op == "neg":
        smooth(x, do("neg", g))
    elif line.op == "abs":
        branch(x, do("ne", x, zero), do("where", do("lt", x, zero), do("neg", g), g))
    elif line.op in ("min", "max"):
        mine = do("le", *args) if line.op == "min" else do("le", args[1], x)
        branch(x, mine, g)
        branch(args[1], do("not", mine), g)
    elif line.op in ("exp", "exp2"):
        steep(x, do("mul", do("mul", g, n), b.const(LN2 if line.op == "exp2" else 1.0)))
    elif line.op in ("log", "log2"):
        steep(x, do("mul", do("div", g, x), b.const(1 / LN2 if line.op == "log2" else 1.0)))
    elif line.op == "tanh":
        smooth(x, do("mul", g, do("sub", b.const(1.0), do("mul", n, n))))
    elif line.op == "sigmoid":
        smooth(x, do("mul", g, do("mul", n, do("sub", b.const(1.0), n))))
    elif line.op == "erf":
        smooth(x, do("mul", do("mul", g, b.const(2 / math.sqrt(math.pi))), do("exp", do("neg", do("mul", x, x)))))
    elif line.op == "sqrt":
        steep(x, do("div", do("mul", g, b.const(0.5)), n))
    elif line.op == "sin":
        smooth(x, do("mul", g, do("cos", x)))
    elif line.op == "cos":
        smooth(x, do("neg", do("mul", g, do("sin", x))))
    else:
        assert line.op in ("float", "floor", "round"), line.op
