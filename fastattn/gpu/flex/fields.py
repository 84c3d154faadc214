"""A kernel's arguments for a traced function: its numbers, and of each captured array the address, strides in bytes and lengths."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...arrays.view import View
from ...flex.program import Program
from .masks import mask_of

SCORE, MASK, SUM = "score", "seen", "sum"       # how the fields' names begin: of score_mod, of mask_mod, of gradients of arrays


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
    """Values of `fields` of a call's mask, masks.mask_of."""
    o = call.operands.flex
    return _values(mask_of(o), (*o.mask_arrays, *(() if o.blocks is None else (o.blocks,))), o.mask_numbers)


def _values(p: Program | None, arrays: Sequence[View], numbers: Sequence[float]) -> tuple[Any, ...]:
    assert p is not None
    found: list[Any] = [float(x) if kind == "f" else int(x) for kind, x in zip(p.numbers, numbers, strict=True)]
    for x in arrays:
        found += [x.ptr, *x.strides, *x.shape]
    return tuple(found)


def sum_fields(p: Program, arrays: tuple[int, ...]) -> str:
    """Fields for the gradients of these arrays: address and strides in bytes; lengths are those of the array."""
    return " ".join(" ".join([f"{SUM}{n}:l", *(f"{SUM}{n}_by{axis}:q" for axis in range(p.arrays[n].ndim))]) for n in arrays)
