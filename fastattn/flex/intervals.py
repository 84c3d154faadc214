"""A mask's program on whole tiles: whether a tile sees no pair, some, or all, without asking for each pair.

Interval arithmetic gives for each line the lowest and the highest value that it can have in a tile. A condition is then
false, true or open. Elements of captured arrays have the range of those that the tile's rows or keys load, from a table of
ranges of powers of two. Open tiles are asked pair by pair.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .evaluate import cut, evaluate
from .ops import BOOL, FLOAT, HIGH, INT, LOW, OPS, numpy_type, whole
from .program import Line, Program

Array = np.ndarray[Any, Any]
NONE, SOME, ALL = 0, 1, 2               # of the pairs of a tile
PAIRS = 1 << 22                         # evaluated at once
_RISING = ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "sqrt", "floor", "round")


class Range(NamedTuple):
    """Lowest and highest value; of conditions both are booleans, and lo <= hi."""

    lo: Array
    hi: Array

    @property
    def exact(self) -> bool:
        return bool(np.all(self.lo == self.hi))


class Ranges:
    """The lowest and highest elements of an array between two indices of its last axis, by levels of 2**n elements."""

    def __init__(self, a: Array) -> None:
        self.lows, self.highs = [a], [a]
        while 2 << (len(self.lows) - 1) <= a.shape[-1]:
            step = 1 << (len(self.lows) - 1)
            for levels, least in ((self.lows, np.minimum), (self.highs, np.maximum)):
                x = levels[-1]
                levels.append(least(x[..., :x.shape[-1] - step], x[..., step:]))

    def between(self, before: tuple[Array, ...], first: Array, last: Array) -> Range:
        """Of elements [*before, first to last]."""
        level = np.frexp((last - first + 1).astype(np.float64))[1] - 1
        *before_, first, last, level = np.broadcast_arrays(*before, first, last, level)
        lo, hi = np.empty(first.shape, self.lows[0].dtype), np.empty(first.shape, self.lows[0].dtype)
        for n in np.unique(level):
            at = level == n
            i, j, front = first[at], last[at] - (1 << int(n)) + 1, [x[at] for x in before_]
            lo[at] = np.minimum(self.lows[n][(*front, i)], self.lows[n][(*front, j)])
            hi[at] = np.maximum(self.highs[n][(*front, i)], self.highs[n][(*front, j)])
        return Range(lo, hi)


def _everything(kind: str) -> tuple[Any, Any]:
    return (-np.inf, np.inf) if kind == FLOAT else (LOW, HIGH) if kind == INT else (False, True)


def _products(f: Callable[..., Array], x: Range, y: Range) -> Range:
    """Of an operation whose extremes are at the corners."""
    corners = [f(a, b) for a in x for b in y]
    return Range(np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners)))


def _comparison(op: str, x: Range, y: Range) -> Range:
    if op == "lt":
        return Range(x.hi < y.lo, x.lo < y.hi)
    if op == "le":
        return Range(x.hi <= y.lo, x.lo <= y.hi)
    same, apart = (x.lo == x.hi) & (y.lo == y.hi) & (x.lo == y.lo), (x.hi < y.lo) | (y.hi < x.lo)
    return Range(same, ~apart) if op == "eq" else Range(apart, ~same)


def _arithmetic(op: str, line: Line, args: list[Range]) -> Range | None:
    """The range of an operation; None where nothing is known. Integers are int64 here, so that sums do not wrap."""
    x, y = args[0], args[-1]
    if op in _RISING:
        return Range(OPS[op].function(x.lo), OPS[op].function(x.hi))
    if op == "add":
        return Range(x.lo + y.lo, x.hi + y.hi)
    if op == "sub":
        return Range(x.lo - y.hi, x.hi - y.lo)
    if op == "neg":
        return Range(-x.hi, -x.lo)
    if op in ("min", "max"):
        return Range(OPS[op].function(x.lo, y.lo), OPS[op].function(x.hi, y.hi))
    if op == "abs":
        inside = (x.lo <= 0) & (x.hi >= 0)
        return Range(np.where(inside, 0, np.minimum(abs(x.lo), abs(x.hi))), np.maximum(abs(x.lo), abs(x.hi)))
    if op == "mul":
        return _products(np.multiply, x, y)
    if op == "div" and y.exact and np.all(y.lo != 0):
        return _products(np.divide, x, y)
    if op == "floordiv" and y.exact and np.all(y.lo > 0):
        return Range(x.lo // y.lo, x.hi // y.lo)
    if op == "mod" and y.exact and np.all(y.lo > 0):
        whole_ = x.lo // y.lo == x.hi // y.lo
        return Range(np.where(whole_, x.lo % y.lo, 0), np.where(whole_, x.hi % y.lo, y.lo - 1))
    if op == "shr" and y.exact and np.all((y.lo >= 0) & (y.lo < 32)):
        return Range(x.lo >> y.lo, x.hi >> y.lo)
    return None


def _logic(op: str, args: list[Range]) -> Range | None:
    x, y = args[0], args[-1]
    if op == "not":
        return Range(~x.hi, ~x.lo)
    if op in ("and", "or"):
        return Range(OPS[op].function(x.lo, y.lo), OPS[op].function(x.hi, y.hi))
    known = (x.lo == x.hi) & (y.lo == y.hi)
    return Range(known & (x.lo ^ y.lo), ~known | (x.lo ^ y.lo))


class _Tiles:
    """Ranges of all lines over tiles."""

    def __init__(self, p: Program, inputs: dict[str, Range], arrays: Sequence[Array], numbers: Sequence[float]) -> None:
        self.p, self.inputs, self.arrays, self.numbers = p, inputs, arrays, numbers
        self.tables: dict[int, Ranges] = {}
        self.found: list[Range] = []
        with np.errstate(all="ignore"):
            for x in p.lines:
                self.found.append(self._checked(x, self._range(x)))

    def _range(self, x: Line) -> Range | None:
        args = [self.found[n] for n in x.args]
        if x.op == "input":
            return self.inputs[x.value]
        if x.op in ("const", "number", "length"):
            value = x.value if x.op == "const" else self.numbers[x.value] if x.op == "number" else self.arrays[x.value[0]].shape[x.value[1]]
            return Range(np.asarray(value), np.asarray(value))
        if x.op == "load":
            return self._load(x, args)
        if x.op == "where":
            return Range(np.where(args[0].lo, args[1].lo, np.where(args[0].hi, np.minimum(args[1].lo, args[2].lo), args[2].lo)),
                         np.where(args[0].lo, args[1].hi, np.where(args[0].hi, np.maximum(args[1].hi, args[2].hi), args[2].hi)))
        if x.op in ("float", "int"):
            return Range(whole(args[0].lo), whole(args[0].hi)) if x.op == "int" and self.p.lines[x.args[0]].kind == FLOAT else args[0]
        if x.op in ("lt", "le", "eq", "ne"):
            return _comparison(x.op, *args)
        if x.kind == BOOL:
            return _logic(x.op, args)
        if all(a.exact for a in args) and x.op not in ("add", "sub", "mul"):
            kinds = [numpy_type(self.p.lines[n].kind, np.float64) for n in x.args]
            value = OPS[x.op].function(*[np.asarray(a.lo).astype(kind) for a, kind in zip(args, kinds, strict=True)])
            return Range(value, value)
        return _arithmetic(x.op, x, args)

    def _checked(self, x: Line, found: Range | None) -> Range:
        """In the line's kind. An integer that may wrap, and a float that may be NaN, may be anything."""
        low, high = _everything(x.kind)
        if found is None:
            return Range(np.asarray(low), np.asarray(high))
        dtype = np.int64 if x.kind == INT else numpy_type(x.kind, np.float64)
        lo, hi = np.broadcast_arrays(np.asarray(found.lo).astype(dtype), np.asarray(found.hi).astype(dtype))
        if x.kind == BOOL:
            return Range(lo, hi)
        open_ = (lo < low) | (hi > high) if x.kind == INT else np.isnan(lo) | np.isnan(hi)
        return Range(np.where(open_, low, lo), np.where(open_, high, hi))

    def _load(self, x: Line, args: list[Range]) -> Range | None:
        a = self.arrays[x.value]
        at = [Range(cut(i.lo, n), cut(i.hi, n)) for i, n in zip(args, a.shape, strict=True)]
        if not at:
            return Range(a, a)
        if not all(i.exact for i in at[:-1]):
            return Range(np.asarray(a.min()), np.asarray(a.max())) if a.size else None
        if at[-1].exact:
            value = a[tuple([i.lo for i in at])]
            return Range(value, value)
        table = self.tables.get(x.value)
        if table is None:
            table = self.tables[x.value] = Ranges(a)
        return table.between(tuple([i.lo for i in at[:-1]]), at[-1].lo, at[-1].hi)


# ---------------------------------------------------------------- tiles of a mask
def tile_states(p: Program, arrays: Sequence[Array], numbers: Sequence[float], batch: int, num_heads: int, seqlen_q: int, seqlen_k: int,
                block: tuple[int, int], exact: bool = True) -> Array:
    """(batch, num_heads, tiles of rows, tiles of keys) uint8: NONE, SOME or ALL of the pairs of a mask_mod's program.

    Without `exact` a tile that intervals cannot decide is SOME.
    """
    arrays = [x.astype(np.int32) if x.dtype == np.int64 else x for x in arrays]
    rows, keys = np.arange(-(-seqlen_q // block[0])) * block[0], np.arange(-(-seqlen_k // block[1])) * block[1]
    last_row, last_key = np.minimum(rows + block[0], seqlen_q) - 1, np.minimum(keys + block[1], seqlen_k) - 1
    b, h = np.arange(batch)[:, None, None, None], np.arange(num_heads)[:, None, None]
    shape = batch, num_heads, len(rows), len(keys)
    if 0 in shape:
        return np.zeros(shape, np.uint8)
    inputs = {"batch": Range(b, b), "head": Range(h, h), "q": Range(rows[:, None], last_row[:, None]), "k": Range(keys, last_key)}
    seen = _Tiles(p, inputs, arrays, numbers).found[p.outputs[0]]
    states = np.broadcast_to(np.where(seen.lo, ALL, np.where(seen.hi, SOME, NONE)).astype(np.uint8), shape).copy()
    if exact:
        _ask(p, arrays, numbers, states, block, seqlen_q, seqlen_k)
    return states


def _ask(p: Program, arrays: Sequence[Array], numbers: Sequence[float], states: Array, block: tuple[int, int], seqlen_q: int,
         seqlen_k: int) -> None:
    """Decide tiles that are SOME pair by pair. Planes that the program does not tell apart are asked once."""
    planes = states[:states.shape[0] if "batch" in p.used else 1, :states.shape[1] if "head" in p.used else 1]
    open_ = np.argwhere(planes == SOME)
    step = max(1, PAIRS // (block[0] * block[1]))
    for first in range(0, len(open_), step):
        b, h, m, n = (x[:, None, None] for x in open_[first:first + step].T)
        q, k = m * block[0] + np.arange(block[0])[:, None], n * block[1] + np.arange(block[1])
        inside = (q < seqlen_q) & (k < seqlen_k)
        places = {name: x.astype(np.int32) for name, x in (("batch", b), ("head", h), ("q", q), ("k", k))}
        seen = evaluate(p, places, arrays, numbers)[0]
        all_, any_ = (seen | ~inside).all(axis=(1, 2)), (seen & inside).any(axis=(1, 2))
        planes[tuple(open_[first:first + step].T)] = np.where(all_, ALL, np.where(any_, SOME, NONE))
    states[...] = np.broadcast_to(planes, states.shape)
