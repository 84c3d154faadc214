"""A traced function (fastattn/flex) as code of kernels: what of it is the same for a tile, a row or a column is computed there, the rest
for every score.

The stages of a function, each a plain Python function made here from the program's lines, which goes through `inline` like the helpers
written by hand:

    tile    = tile_values(a, batch, head, scale)                               what depends on batch, head and numbers alone
    row     = row_values(a, tile, batch, head, q, scale)                       and on the query's index
    column  = column_values(a, tile, batch, head, k, scale)                    and on the key's index
    outputs = element_values(a, tile, row, column, batch, head, q, k, score, scale)

A program is data: its lines become expressions of the functions named in ops.py and ptx/traced.py, nothing else.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import float32, float64, int32

from ...flex.program import Program
from ..dsl.inline import inline
from ..ptx.arith import exp2, fma, log2, quotient, reciprocal
from ..ptx.traced import (
    absolute,
    add_to,
    largest,
    load_captured,
    near_cosine,
    near_sine,
    root,
    rounded,
    smallest,
    whole_f32,
    whole_f64,
)
from .distance import natural
from .ops import INTEGERS, as_bool, below, divided, element_of, element_of_natural, flag, inverted, select

STAGES = TILE, ROW, COLUMN, ELEMENT = "tile", "row", "column", "element"
EARLIER = {"tile": (), "row": ("tile",), "column": ("tile",), "element": ("tile", "row", "column")}
_GIVEN = {"tile": "batch, head, scale", "row": "batch, head, q, scale", "column": "batch, head, k, scale",
          "element": "batch, head, q, k, score, scale"}
_COMPARE = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_ALWAYS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "neg": "MINUS_ZERO - {}"}
# of float32 on fragments: instructions where there are any. Errors of some units in the last place
_FAST = {**_ALWAYS, "abs": "absolute({})", "min": "smallest({}, {})", "max": "largest({}, {})", "exp2": "exp2({})", "log2": "log2({})",
         "reciprocal": "reciprocal({})", "div": "quotient({}, {})", "sqrt": "root({})", "sin": "sine({})", "cos": "cosine({})"}
# of plain threads: what the reference computes
_EXACT = {**_ALWAYS, "abs": "abs({})", "div": "divided({}, {})", "reciprocal": "divided(ONE, {})", "exp2": "exp_two({})",
          "min": "select(({0} < {1}) | ({0} != {0}), {0}, {1})", "max": "select(({0} > {1}) | ({0} != {0}), {0}, {1})",
          "sigmoid": "divided(ONE, ONE + math.exp(MINUS_ZERO - {}))",
          **{name: f"math.{name}({{}})" for name in ("exp", "log", "log2", "tanh", "sqrt", "sin", "cos")}}
_BOTH = {"erf": "math.erf({})", "floor": "floor({})", "round": "nearest({})"}
# 2 pi in three parts, so that the product of the first two with a whole number below 2**16 is exact
_TURN, _P0, _P1, _P2 = float32(1 / (2 * math.pi)), float32(-6.28125), float32(-1.9350051879882812e-3), float32(-3.0199159819021225e-7)


@inline
def angle(x):
    """x less whole turns, in [-pi, pi] and a little more."""
    turns = rounded_turns(x * _TURN)
    return fma(turns, _P2, fma(turns, _P1, fma(turns, _P0, x)))


rounded_turns = rounded("rni", "float32")


@inline
def sine(x):
    return near_sine(angle(x))


@inline
def cosine(x):
    return near_cosine(angle(x))


@inline
def exp_two(x):
    return math.exp2(x)


class Staged:
    """The stages of a program.

    Parameters
    ----------
    p
        The program; for fragments a lowered one.
    prefix
        Of the names of its fields (fields.py).
    exact
        None: float32 of fragments. Otherwise Numba's float32 or float64, for plain threads.

    Attributes
    ----------
    functions
        The Python function of each stage.
    wanted
        The lines that each stage hands on.
    stage
        The stage of each line.
    distances
        Whether element_values takes q - k besides, as int32 and as float32 (distance.py).
    """

    def __init__(self, p: Program, prefix: str, exact: Any = None) -> None:
        self.program, self.prefix, self.exact = p, prefix, exact
        self._real = np.float64 if exact is not None and exact is float64 else np.float32
        self._compute = "float64" if self._real is np.float64 else "float32"
        self.stage = p.classes
        self.distances = any(x.op == "input" and x.value in ("behind", "apart") for x in p.lines)
        self.wanted = self._wanted()
        self.names = self._names()
        self.functions = {stage: self._function(stage) for stage in STAGES}

    def _free(self, n: int) -> bool:
        """Whether a line costs nothing: an input, a constant, a number among the kernel's arguments."""
        return self.program.lines[n].op in ("const", "input", "number", "length")

    def _wanted(self) -> dict[str, list[int]]:
        wanted: dict[str, list[int]] = {stage: [] for stage in STAGES}
        asked = [(m, self.stage[n]) for n, line in enumerate(self.program.lines) for m in line.args]
        for m, stage in (*asked, *((m, "element") for m in self.program.outputs)):
            if not self._free(m) and self.stage[m] != stage and m not in wanted[self.stage[m]]:
                wanted[self.stage[m]].append(m)
        wanted["element"] = list(self.program.outputs)
        return wanted

    def _names(self) -> dict[str, Any]:
        """What the text of the stages may name, besides loads and constants."""
        names = {"select": select, "divided": divided, "inverted": inverted, "flag": flag, "as_bool": as_bool, "element_of": element_of,
                 "element_of_natural": element_of_natural, "math": math, "int32": int32, "exp2": exp2, "log2": log2,
                 "reciprocal": reciprocal, "smallest": smallest, "largest": largest, "absolute": absolute, "root": root, "sine": sine,
                 "cosine": cosine, "exp_two": exp_two, "ZERO": np.int32(0), "REAL": float64 if self._compute == "float64" else float32,
                 "whole": whole_f64 if self._compute == "float64" else whole_f32, "ONE": self._real(1), "MINUS_ZERO": self._real(-0.0)}
        names |= {"quotient": quotient, "below": below, "floor": rounded("rmi", self._compute), "nearest": rounded("rni", self._compute)}
        return names | {f"i_{name}": f for name, f in INTEGERS.items()}

    def text(self, stage: str) -> str:
        """The source of a stage."""
        earlier, lines = EARLIER[stage], self.program.lines
        have = {n: f"{s}[{i}]" for s in earlier for i, n in enumerate(self.wanted[s])}
        have |= {n: self._name(n, line) for n, line in enumerate(lines) if self._free(n)}
        needed, stack = set[int](), [n for n in self.wanted[stage] if n not in have]
        while stack:
            n = stack.pop()
            needed.add(n)
            stack += [m for m in lines[n].args if m not in have and m not in needed]
        more = ("behind, apart",) if self.distances and stage == ELEMENT else ()
        text = [f"def {stage}_values({', '.join(('a', *earlier, _GIVEN[stage], *more))}):"]
        for n in sorted(needed):
            text.append(f"    v{n} = {self._expression(lines[n], [have.get(m) or f'v{m}' for m in lines[n].args])}")
        results = "".join(f"{have.get(n) or f'v{n}'}, " for n in self.wanted[stage])
        return "\n".join((*text, f"    return ({results or 'ZERO,'})")) + "\n"

    def _name(self, n: int, line: Any) -> str:
        if line.op == "input":
            return "score" if line.value == "raw" else str(line.value)
        if line.op == "number":
            return f"a.{self.prefix}_number{line.value}"
        if line.op == "length":
            return f"a.{self.prefix}{line.value[0]}_n{line.value[1]}"
        self.names[f"c{n}"] = {"f": self._real, "i": np.int32, "b": np.bool_}[line.kind](line.value)
        return f"c{n}"

    def address(self, number: int, indices: list[str], naturals: list[bool], name: str = "") -> str:
        """The address of an element of captured array `number`, or of what has its shape and the strides `name`_by0, .."""
        name = name or f"a.{self.prefix}{number}"
        text = name
        for axis, (index, known) in enumerate(zip(indices, naturals, strict=True)):
            text = f"element_of{'_natural' * known}({text}, {name}_by{axis}, {index}, a.{self.prefix}{number}_n{axis})"
        return text

    def _load(self, line: Any, args: list[str]) -> str:
        dtype = self.program.arrays[line.value][0]
        self.names[f"load_{dtype}"] = load_captured(dtype, self._compute)
        text = f"load_{dtype}({self.address(line.value, args, [natural(self.program, m) for m in line.args])})"
        return f"as_bool({text})" if line.kind == "b" else text

    def _expression(self, line: Any, args: list[str]) -> str:
        kind = self.program.lines[line.args[0]].kind if line.args else line.kind
        if line.op == "load":
            return self._load(line, args)
        if line.op == "where":
            return f"select({', '.join(args)})"
        if line.op == "below":
            return f"below({', '.join(args)})"
        if line.op in _COMPARE:
            return f"{args[0]} {_COMPARE[line.op]} {args[1]}"
        if line.op == "float":
            return f"REAL({args[0] if kind == 'i' else f'flag({args[0]})'})"
        if line.op == "int":
            return f"whole({args[0]})" if kind == "f" else f"flag({args[0]})"
        if kind == "b":
            return f"inverted({args[0]})" if line.op == "not" else f"{args[0]} {_LOGIC[line.op]} {args[1]}"
        if line.kind == "i":
            if line.op in ("floordiv", "mod") and self._is_simple_division(line):
                return f"i_{line.op}_natural({', '.join(args)})"
            return f"i_{line.op}({', '.join(args)})"
        return ({**_BOTH, **(_FAST if self.exact is None else _EXACT)})[line.op].format(*args)

    def _is_simple_division(self, line: Any) -> bool:
        """Whether neither operand is negative and the divisor is not 0."""
        by = self.program.lines[line.args[1]]
        return natural(self.program, line.args[0]) and by.op == "const" and by.value > 0

    def _function(self, stage: str) -> Any:
        text = self.text(stage)
        space = dict(self.names)
        exec(compile(text, f"<fastattn traced {stage}>", "exec"), space)
        return space[f"{stage}_values"]



def make_stages(p: Program, prefix: str, exact: Any = None) -> tuple[Any, Any, Any, Any]:
    """(tile_values, row_values, column_values, element_values), to be called by kernels."""
    functions = Staged(p, prefix, exact).functions
    return tuple(inline(functions[stage]) for stage in STAGES)


__all__ = ["STAGES", "Staged", "add_to", "make_stages", "natural"]
