"""What a function makes of q - k, for fragments of the tensor cores.

Elements of a fragment lie at constant distances from its first one. So q - k of each is one number of the thread and a constant: a
comparison of it with a constant is one instruction, and as a float it is one addition instead of a conversion. Two inputs stand for it,
`behind` as an int32 and `apart` as a float32. Beyond 2**24 `apart` is rounded, as the float of an int32 is.

Without Numba: tilings ask, too.
"""
from __future__ import annotations

from functools import lru_cache

from ...flex.lower import lower
from ...flex.ops import BOOL, FLOAT, INT
from ...flex.program import Builder, Line, Program

_COMPARISONS = ("lt", "le", "eq", "ne")
_MOST = 2**30           # of a constant that is added to a difference


def natural(p: Program, n: int) -> bool:
    """Whether an integer line is never negative, as most indices: no sum of them leaves an int32 where it matters, as they are cut."""
    line = p.lines[n]
    if line.op == "const":
        return bool(line.value >= 0)
    if line.op in ("input", "length"):
        return bool(line.value != "behind")
    if line.op in ("add", "mul", "min", "floordiv", "and"):
        return all(natural(p, m) for m in line.args)
    if line.op == "max":
        return any(natural(p, m) for m in line.args)
    if line.op == "where":
        return all(natural(p, m) for m in line.args[1:])
    return line.op == "abs" or (line.op == "mod" and natural(p, line.args[1]))


@lru_cache(maxsize=256)
def by_distance(p: Program) -> Program:
    """A lowered program, with `behind` and `apart` where it has q - k, and `below` where it compares a size with a constant."""
    rewriting = _Rewriting(p)
    new: list[int] = []
    for x in p.lines:
        new.append(rewriting.line(x, tuple([new[n] for n in x.args])))
    return rewriting.b.program(*[new[n] for n in p.outputs])


class _Rewriting:
    def __init__(self, p: Program) -> None:
        self.b = Builder(p.arrays, p.numbers, derives=True)

    def is_input(self, n: int, name: str) -> bool:
        return self.b.lines[n].op == "input" and self.b.lines[n].value == name

    def behind(self) -> int:
        return self.b.add("input", (), INT, "behind")

    def line(self, x: Line, args: tuple[int, ...]) -> int:
        b = self.b
        if x.op == "sub" and x.kind == INT:
            if self.is_input(args[0], "q") and self.is_input(args[1], "k"):
                return self.behind()
            if self.is_input(args[0], "k") and self.is_input(args[1], "q"):
                return b.do("neg", self.behind())
        if x.op == "abs" and x.kind == INT and b.lines[args[0]].op == "neg":
            return b.do("abs", *b.lines[args[0]].args)
        if x.op == "float" and (apart := self.apart(args[0])) is not None:
            return apart
        if x.op in _COMPARISONS and b.lines[args[0]].kind == INT:
            return self.comparison(x.op, *args)
        return b.copy(x, args)

    def apart(self, n: int) -> int | None:
        """The float of line n, if it is q - k, its negative or its size."""
        line = self.b.lines[n]
        if self.is_input(n, "behind"):
            return self.b.add("input", (), FLOAT, "apart")
        if line.op in ("neg", "abs") and self.is_input(line.args[0], "behind"):
            return self.b.do(line.op, self.b.add("input", (), FLOAT, "apart"))
        return None

    def comparison(self, op: str, x: int, y: int) -> int:
        b, zero = self.b, self.b.const(0, INT)
        if self.is_input(x, "q") and self.is_input(y, "k"):
            return b.do(op, self.behind(), zero)
        if self.is_input(x, "k") and self.is_input(y, "q"):
            return b.do(op, zero, self.behind())
        size, most = b.lines[x], b.lines[y]
        if op in ("lt", "le") and size.op == "abs" and most.op == "const" and self.is_difference(size.args[0]):
            within = most.value - (op == "lt")              # -within <= x <= within, as one comparison without signs
            if 0 <= within < _MOST:
                return b.add("below", (self.plus(size.args[0], within), b.const(2 * within + 1, INT)), BOOL)
        return b.do(op, x, y)

    def is_difference(self, n: int) -> bool:
        """Whether an int32 holds the size of line n: of -2**31 it does not."""
        line, seen = self.b.lines[n], Program(tuple(self.b.lines), (n,), tuple(self.b.arrays), tuple(self.b.numbers))
        return self.is_input(n, "behind") or (line.op == "sub" and all(natural(seen, m) for m in line.args))

    def plus(self, n: int, more: int) -> int:
        """n + more, where it is the same for a row if it can be."""
        b, line = self.b, self.b.lines[n]
        if line.op == "sub":
            return b.do("sub", b.do("add", line.args[0], b.const(more, INT)), line.args[1])
        return b.do("add", n, b.const(more, INT))


def is_light(p: Program | None) -> bool:
    """Whether a score_mod's elements are made of the score, of q - k and of what is the same for a tile: they can be computed twice
    without keeping anything for it."""
    if p is None:
        return True
    made = by_distance(lower(p))
    return made.used <= {"score", "raw", "scale", "batch", "head", "behind", "apart"} and not made.gathers


__all__ = ["by_distance", "is_light", "natural"]
