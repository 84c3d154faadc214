"""score_mod and mask_mod in a compiled program: their programs travel as text in the Record, their arrays are operands of the call.

Operands are named `score_mod[0]`, `mask_mod[0]`, ... and `block_mask`; the gradient of `score_mod[0]` is `dscore_mod[0]`.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..arrays.view import FLOATS, View
from ..flex.operands import Flex, FlexOperands, Functions
from ..flex.ops import FLOAT, kind_of
from ..flex.program import Captured, Line, Program
from ..flex.read import flex_of, programs_of
from ..memo import Recent

_SCORE, _MASK, _BLOCKS = "score_mod", "mask_mod", "block_mask"


@dataclass(frozen=True, slots=True)
class _Read:
    """What a text says."""

    flex: Flex
    score_numbers: tuple[float, ...]
    mask_numbers: tuple[float, ...]
    planes: tuple[int | None, int | None]


_read: Recent[str, _Read] = Recent()


def read(call: str, functions: Functions | None) -> tuple[str | None, dict[str, Any]]:
    """The text of a call's functions, and the arrays that they read, by name."""
    if functions is None:
        return None, {}
    score, mask = programs_of(call, functions)
    block = functions.block_mask
    arrays: dict[str, Any] = {}
    for name, t in ((_SCORE, score), (_MASK, mask)):
        if t is not None:
            arrays |= {f"{name}[{n}]": x for n, x in enumerate(t.arrays)}
    if block is not None and block.blocks is not None:
        arrays[_BLOCKS] = block.blocks
    flex = flex_of(score, mask, block)
    text = json.dumps({"score": _plain(flex.score_mod), "mask": _plain(flex.mask_mod), "block": flex.block, "fine": flex.fine,
                       "numbers": [() if t is None else t.numbers for t in (score, mask)],
                       "planes": (None, None) if block is None else (block.batch, block.num_heads)})
    return text, arrays


def _plain(p: Program | None) -> Any:
    return None if p is None else [p.lines, p.outputs, p.arrays, p.numbers]


def _program(x: Any) -> Program | None:
    if x is None:
        return None
    lines, outputs, arrays, numbers = x
    made = [Line(op, tuple(args), kind, tuple(value) if isinstance(value, list) else value) for op, args, kind, value in lines]
    return Program(tuple(made), tuple(outputs), tuple([Captured(*a) for a in arrays]), tuple(numbers))


def _of(text: str) -> _Read:
    found = _read.get(text)
    if found is None:
        x = json.loads(text)
        block = None if x["block"] is None else (x["block"][0], x["block"][1])
        flex = Flex(_program(x["score"]), _program(x["mask"]), block, x["fine"])
        found = _read[text] = _Read(flex, tuple(x["numbers"][0]), tuple(x["numbers"][1]), (x["planes"][0], x["planes"][1]))
    return found


def is_operand(name: str) -> bool:
    return name.startswith((f"{_SCORE}[", f"{_MASK}[")) or name == _BLOCKS


def shown(name: str) -> str:
    """What an error calls an operand."""
    return f"an array of {name.partition('[')[0]}" if is_operand(name) else name


def operands(text: str, views: Mapping[str, View]) -> FlexOperands:
    """The functions with the Views of their arrays."""
    x = _of(text)
    score, mask = ([] if p is None else [views[f"{name}[{n}]"] for n in range(len(p.arrays))]
                   for name, p in ((_SCORE, x.flex.score_mod), (_MASK, x.flex.mask_mod)))
    return FlexOperands(x.flex, tuple(score), x.score_numbers, tuple(mask), x.mask_numbers, views.get(_BLOCKS),
                        names=tuple([f"{_SCORE}[{n}]" for n in range(len(score))]), planes=x.planes)


def differentiable(text: str | None) -> tuple[str, ...]:
    """The operands of score_mod that have gradients."""
    p = None if text is None else _of(text).flex.score_mod
    return () if p is None else tuple([f"{_SCORE}[{n}]" for n, a in enumerate(p.arrays) if kind_of(a.dtype) == FLOAT])


def gradients(text: str | None, results: Mapping[str, View]) -> tuple[View | None, ...] | None:
    """Grads.dcaptured among the results of a call; None where they are not wanted."""
    names = differentiable(text)
    if not names or f"d{names[0]}" not in results:
        return None
    p = None if text is None else _of(text).flex.score_mod
    assert p is not None
    return tuple([results.get(f"d{_SCORE}[{n}]") if a.dtype in FLOATS else None for n, a in enumerate(p.arrays)])
