"""The same program in fewer operations, for engines: exp2, log2 and reciprocal in place of exp, log, tanh, sigmoid, erf and most divisions.

Factors of lower rank are multiplied first, and once: softmax_scale, a constant and what exp2 asks for become one number of a
tile. The score may be given as its dot product and scale (`raw`), so that the scale joins them.
"""
from __future__ import annotations

import math

from .ops import FLOAT
from .program import Builder, Line, Program

LOG2E = math.log2(math.e)
# erf(x) = 1 - polynomial(t) * exp(-x**2), t = 1 / (1 + p * x), x >= 0, to 1.5e-7: Abramowitz and Stegun, 7.1.26
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_P = 0.3275911
_RANK = {"batch": 1, "head": 1, "scale": 1, "q": 2, "k": 2, "score": 3, "raw": 3}        # for how many places an input is the same


def lower(p: Program, raw: bool = True, exact: bool = False) -> Program:
    """`raw`: the input score becomes raw * scale, two inputs. `exact`: keep operations whose lowered form is worse than float32's
    rounding, for float64: exp, log, tanh, sigmoid, erf and div stay.
    """
    lowering = _Lowering(p, raw, exact)
    new: list[int] = []
    for x in p.lines:
        new.append(lowering.line(x, tuple([new[n] for n in x.args])))
    return lowering.b.program(*[new[n] for n in p.outputs])


class _Lowering:
    def __init__(self, p: Program, raw: bool, exact: bool) -> None:
        self.b, self.raw, self.exact = Builder(p.arrays, p.numbers, derives=True), raw, exact
        self.ranks: list[int] = []                          # of b's lines

    def rank(self, n: int) -> int:
        while len(self.ranks) <= n:
            x = self.b.lines[len(self.ranks)]
            of_args = max([self.ranks[m] for m in x.args], default=1 if x.op in ("number", "length", "load") else 0)
            self.ranks.append(_RANK[x.value] if x.op == "input" else of_args)
        return self.ranks[n]

    def mul(self, x: int, y: int) -> int:
        """x * y, where lower ranks are brought together."""
        b = self.b
        if self.rank(x) < self.rank(y):
            x, y = y, x
        line = b.lines[x]
        if line.op == "mul":
            high, low = line.args if self.rank(line.args[0]) >= self.rank(line.args[1]) else line.args[::-1]
            if self.rank(y) < self.rank(high) and self.rank(low) < self.rank(high):
                return self.mul(high, self.mul(low, y))
        if line.op in ("add", "sub") and b.is_const(y) and any(b.is_const(m) for m in line.args):
            return b.do(line.op, *[self.mul(m, y) for m in line.args])
        return b.do("mul", x, y)

    def const(self, value: float) -> int:
        return self.b.const(value, FLOAT)

    def exp2(self, x: int, factor: float = LOG2E) -> int:
        """exp2(x * factor)."""
        return self.b.do("exp2", self.mul(x, self.const(factor)))

    def reciprocal(self, n: int) -> int:
        return self.b.do("div", self.const(1.0), n) if self.b.is_const(n) else self.b.do("reciprocal", n)

    def multiplies(self, x: int, y: int) -> bool:
        """Whether x / y is x times the reciprocal of y. Not where y is made of a score: beyond 2**126 the reciprocal is below float32's
        normal numbers, and s / (1 + abs(s)) would be 0."""
        if self.exact:
            return self.b.is_const(y) and _reciprocal_is_exact(self.b.lines[y].value)
        return self.rank(y) < _RANK["score"] or self.b.is_const(x)

    def line(self, x: Line, args: tuple[int, ...]) -> int:
        b, const = self.b, self.const
        if x.op == "input" and x.value == "score" and self.raw:
            return self.mul(b.add("input", (), FLOAT, "raw"), b.add("input", (), FLOAT, "scale"))
        if x.op == "mul" and x.kind == FLOAT:
            return self.mul(*args)
        if x.op == "div" and self.multiplies(*args):
            return self.mul(args[0], self.reciprocal(args[1]))
        if self.exact:
            return b.copy(x, args)
        if x.op == "exp":
            return self.exp2(args[0])
        if x.op == "log":
            return self.mul(b.do("log2", args[0]), const(1 / LOG2E))
        if x.op == "tanh":
            return b.do("sub", const(1.0), self.mul(self.reciprocal(b.do("add", self.exp2(args[0], 2 * LOG2E), const(1.0))), const(2.0)))
        if x.op == "sigmoid":
            return self.reciprocal(b.do("add", self.exp2(args[0], -LOG2E), const(1.0)))
        if x.op == "erf":
            return self.erf(args[0])
        return b.copy(x, args)

    def erf(self, x: int) -> int:
        b = self.b
        size = b.do("abs", x)
        t = self.reciprocal(b.do("add", self.mul(size, self.const(_ERF_P)), self.const(1.0)))
        total = self.const(_ERF[0])
        for c in _ERF[1:]:
            total = b.do("add", b.do("mul", total, t), self.const(c))
        above = b.do("sub", self.const(1.0), b.do("mul", b.do("mul", total, t), self.exp2(b.do("mul", x, x), -LOG2E)))
        return b.do("where", b.do("lt", x, self.const(0.0)), b.do("neg", above), above)


def _reciprocal_is_exact(x: float) -> bool:
    return x != 0 and math.isfinite(x) and abs(math.frexp(x)[0]) == 0.5
