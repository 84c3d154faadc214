"""The mask of a call as one program: its mask_mod, and its boolean array of blocks as a load."""
from __future__ import annotations

from functools import lru_cache

from ...flex.operands import FlexOperands
from ...flex.ops import INT
from ...flex.program import Builder, Captured, Program

AXES = "batch", "head", "q", "k"


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
