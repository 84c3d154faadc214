"""What the engine makes of a call's functions: code for score_mod and mask_mod, for the derivative, and for the pass that sums the
gradients of captured arrays."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.view import View
from ..flex.derivative import Derivative, derivative
from ..flex.operands import Flex, FlexOperands
from ..flex.ops import FLOAT
from ..flex.program import Program
from ..problem import Problem
from .plan import Lengths
from .rowcode import MOST_AXES, Code, Machine, Scatter, assemble, captured, form_of

SUMS_BYTES = 32 << 20                   # of the sums of all lanes together, as long as there are several
MOST_LANES = 16                         # tasks with sums of their own
FEW_TASKS = 8                           # there are lanes if there would be fewer tasks
SUMMED_ROWS = 768                       # query rows of a task: DBIAS_M


@dataclass(frozen=True, slots=True)
class Functions:
    """The code of a call's functions, and records of their arrays. `derivative` and `captured` are for a backward.

    mask_real: bytes of the floats of mask_mod.
    """

    score_mod: Code | None
    score_arrays: NDArray[Any]
    mask_mod: Code | None
    mask_arrays: NDArray[Any]
    mask_real: int
    blocks: View | None
    block: tuple[int, int]
    derivative: Code | None = None      # None where it is 1
    captured: Code | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of the gradients of captured arrays, by lane and array; None where an array has no gradient.

    by_batch, by_head, by_rows: sequences, heads, rows never add to the same element.
    """

    sums: list[list[NDArray[np.float64] | None]]
    addresses: NDArray[np.int64]
    by_batch: bool
    by_head: bool
    by_rows: bool


def reason(f: Flex) -> str | None:
    """Why the engine cannot run these functions."""
    axes = max([x.ndim for p in (f.score_mod, f.mask_mod) if p is not None for x in p.arrays], default=0)
    return None if axes <= MOST_AXES else f"its functions read arrays of at most {MOST_AXES} axes; reshape joins some of the {axes}"


def functions_of(p: Problem, o: FlexOperands | None, machine: Machine, wanted: Sequence[View | None] | None = None) -> Functions | None:
    """None where the call has no functions. `wanted`: gradients of captured arrays, in a backward, or ()."""
    if o is None:
        return None
    real = 8 if p.compute_dtype == "float64" else 4
    score, mask = o.flex.score_mod, o.flex.mask_mod
    mask_real = 8 if mask is not None and any(x.kind == FLOAT for x in mask.lines) else real    # as the specification's conditions
    forms = tuple(map(form_of, o.score_arrays))
    slope = sums = None
    if wanted is not None and score is not None:
        slope = _slope(score)
        d = _derivative(score, _asked(wanted))
        if d.loads:
            scatters = tuple([Scatter(n, len(forms[n].shape)) for n in d.arrays])
            sums = assemble(_scattering(d), forms, o.score_numbers, machine, real, scatters=scatters)
    return Functions(
        None if score is None else assemble(score, forms, o.score_numbers, machine, real), captured(o.score_arrays),
        None if mask is None else assemble(mask, tuple(map(form_of, o.mask_arrays)), o.mask_numbers, machine, mask_real, True),
        captured(o.mask_arrays), mask_real, o.blocks, o.flex.block or (1, 1),
        None if slope is None else assemble(slope, forms, o.score_numbers, machine, real), sums)


def _asked(wanted: Sequence[View | None]) -> tuple[int, ...]:
    return tuple([n for n, x in enumerate(wanted) if x is not None])


@lru_cache(maxsize=128)
def _derivative(score: Program, arrays: tuple[int, ...]) -> Derivative:
    return derivative(score, arrays)


@lru_cache(maxsize=128)
def _slope(score: Program) -> Program | None:
    """The derivative by the score alone; None where it is 1."""
    p = _derivative(score, ()).program
    line = p.lines[p.outputs[1]]
    return None if line.op == "const" and line.value == 1 else p.only(p.outputs[1])


def _scattering(d: Derivative) -> Program:
    """The derivative by the score, that by each load, and the indices of each load."""
    return d.program.only(*d.program.outputs[1:], *[m for n in d.loads for m in d.program.lines[n].args])


# ---------------------------------------------------------------- gradients of captured arrays
def sums_of(p: Problem, o: FlexOperands, lengths: Lengths, wanted: Sequence[View | None]) -> Sums | None:
    """Zeros, to which the kernels add. None where no gradient is wanted or all are 0."""
    assert o.flex.score_mod is not None
    d = _derivative(o.flex.score_mod, _asked(wanted))
    if not d.loads:
        return None
    counts = {"batch": p.batch, "head": p.num_heads, "q": lengths.longest_q}
    apart = {name: all(_keeps_apart(d, n, name, count, o) for n in d.loads) for name, count in counts.items()}
    parts = {"batch": p.batch, "head": p.num_heads, "q": -(-lengths.longest_q // SUMMED_ROWS)}
    tasks, rest = (int(np.prod([n for name, n in parts.items() if apart[name] == which], dtype=np.int64)) for which in (True, False))
    sizes = [int(np.prod(x.shape, dtype=np.int64)) if n in d.arrays else 0 for n, x in enumerate(o.score_arrays)]
    lanes = 1 if tasks >= FEW_TASKS else max(1, min(MOST_LANES, rest, SUMS_BYTES // (8 * sum(sizes))))
    sums = [[np.zeros(size) if size else None for size in sizes] for _ in range(lanes)]
    addresses = np.array([[0 if x is None else x.ctypes.data for x in lane] for lane in sums], np.int64)
    return Sums(sums, addresses, apart["batch"], apart["head"], apart["q"])


def _keeps_apart(d: Derivative, load: int, name: str, count: int, o: FlexOperands) -> bool:
    """Whether an index of the load is the input `name` itself, so that its values mean different elements."""
    line = d.program.lines[load]
    indices = [(d.program.lines[n], size) for n, size in zip(line.args, o.score_arrays[line.value].shape, strict=True)]
    return any(x.op == "input" and x.value == name and size >= count for x, size in indices)


def store(sums: Sums | None, wanted: Sequence[View | None]) -> None:
    """The lanes are added up in order, and rounded once."""
    for n, x in enumerate(wanted):
        if x is None:
            continue
        lanes = [] if sums is None else [found for lane in sums.sums if (found := lane[n]) is not None]
        x.numpy()[...] = np.add.reduce(lanes).reshape(x.shape) if lanes else 0
