"""What Specs and launches know of traced functions: a call's mask as one program, and a function's arguments in a kernel, which are its
numbers, and of each captured array the address, strides in bytes and lengths.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..arrays.view import View
from ..flex.operands import FlexOperands
from ..flex.ops import INT
from ..flex.program import Builder, Captured, Program

SCORE, MASK, SUM = "score", "seen", "sum"       # how the fields' names begin: of score_mod, of mask_mod, of gradients of arrays
AXES = "batch", "head", "q", "k"


# ---------------------------------------------------------------- the mask: its mask_mod, and its boolean array of blocks as a load
def mask_of(o: FlexOperands) -> Program | None:
    """The program, whose last array is that of the blocks; None where all is seen."""
    if o.blocks is None or o.flex.block is None:
        return o.flex.mask_mod
    # along an axis that blocks are broadcast over, all are alike: the bitmap of its tiles has one plane
    return _with_blocks(o.flex.mask_mod, o.flex.block, tuple(stride != 0 for stride in o.blocks.strides))


@lru_cache(maxsize=256)
def _with_blocks(p: Program | None, block: tuple[int, int], differs: tuple[bool, ...]) -> Program:
    b, new = Builder(() if p is None else p.arrays, () if p is None else p.numbers), list[int]()
    for x in () if p is None else p.lines:
        new.append(b.copy(x, tuple([new[n] for n in x.args])))
    b.arrays.append(Captured("bool", len(AXES)))
    at = []
    for name, size, differ in zip(AXES, (1, 1, *block), differs, strict=True):
        place = b.add("input", (), INT, name)
        at.append((place if size == 1 else b.do("floordiv", place, b.const(size, INT))) if differ else b.const(0, INT))
    seen = b.load(len(b.arrays) - 1, tuple(at))
    return b.program(seen if p is None else b.do("and", new[p.outputs[0]], seen))


# ---------------------------------------------------------------- arguments
def fields(p: Program, prefix: str, wide: bool = False) -> str:
    """The fields as spec.Arguments takes them. wide: numbers of float64 kernels are float64."""
    real = "d" if wide else "f"
    found = [f"{prefix}_number{n}:{real if kind == 'f' else 'i'}" for n, kind in enumerate(p.numbers)]
    for n, (_, ndim) in enumerate(p.arrays):
        found.append(f"{prefix}{n}:l")
        found += [f"{prefix}{n}_by{axis}:{'i' if axis == ndim - 1 else 'q'}" for axis in range(ndim)]
        found += [f"{prefix}{n}_n{axis}:i" for axis in range(ndim)]
    return " ".join(found)


def score_values(call: Any) -> tuple[Any, ...]:
    """Values of `fields` of a call's score_mod."""
    o = call.operands.flex
    return _values(o.flex.score_mod, o.score_arrays, o.score_numbers)


def mask_values(call: Any) -> tuple[Any, ...]:
    """Values of `fields` of a call's mask, mask_of."""
    o = call.operands.flex
    return _values(mask_of(o), (*o.mask_arrays, *(() if o.blocks is None else (o.blocks,))), o.mask_numbers)


def _values(p: Program | None, arrays: Sequence[View], numbers: Sequence[float]) -> tuple[Any, ...]:
    assert p is not None
    found: list[Any] = [float(x) if kind == "f" else int(x) for kind, x in zip(p.numbers, numbers, strict=True)]
    for x in arrays:
        found += [x.ptr, *x.strides, *x.shape]
    return tuple(found)


def sum_fields(p: Program, arrays: tuple[int, ...], exact: bool = False) -> str:
    """Fields for the gradients of these arrays: address and strides in bytes; lengths are those of the array. exact: of fixed.py's sums."""
    found = [" ".join([f"{SUM}{n}:l", *(f"{SUM}{n}_by{axis}:q" for axis in range(p.arrays[n].ndim)), *[f"{SUM}{n}_top:l"] * exact])
             for n in arrays]
    return " ".join((*found, *[f"{SUM}_bits:i"] * exact))
