"""What kernels of the backward compute of a score_mod besides its score."""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ...flex.derivative import derivative
from ...flex.program import Program
from ..spec import Spec


class Sum(NamedTuple):
    """The gradient of one load of a captured array: dS times output `output` of the derivative, summed at the element `at`.

    at: the outputs that are its indices.
    """

    array: int
    output: int
    at: tuple[int, ...]


@lru_cache(maxsize=256)
def with_rate(p: Program) -> Program:
    """Outputs: the score and its derivative by the score that the function was given."""
    return derivative(p, ()).program


@lru_cache(maxsize=256)
def rate_of(p: Program) -> float | None:
    """The derivative by the given score if it is the same everywhere."""
    d = with_rate(p)
    line = d.lines[d.outputs[1]]
    return float(line.value) if line.op == "const" else None


@lru_cache(maxsize=256)
def with_sums(p: Program, arrays: tuple[int, ...]) -> tuple[Program, tuple[Sum, ...]]:
    """(program, sums) of these captured arrays: outputs of the program are the score, its derivative by it, one derivative by each load,
    then the indices of all loads."""
    d = derivative(p, arrays)
    lines = d.program.lines
    indices = [m for n in d.loads for m in lines[n].args]
    program, sums, at = Program(lines, (*d.program.outputs, *indices), d.program.arrays, d.program.numbers), [], len(d.program.outputs)
    for i, n in enumerate(d.loads):
        count = len(lines[n].args)
        sums.append(Sum(lines[n].value, 2 + i, tuple(range(at, at + count))))
        at += count
    return program, tuple(sums)


def is_rated(spec: Spec) -> bool:
    """Whether the score_mod's derivative differs from 1: then kernels of the backward keep it."""
    return spec.score_mod is not None and rate_of(spec.score_mod) != 1.0
