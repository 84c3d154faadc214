"""The arguments score_mod, mask_mod, captured and block_mask of a call -> FlexOperands, and their checks."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..arrays import words
from ..arrays.convert import Caller
from ..arrays.view import CPU, EIGHT_BIT, Device, View
from ..errors import message
from ..options import Check
from .blocks import DEFAULT, BlockMask
from .capture import is_number
from .operands import Flex, FlexOperands, Functions
from .ops import FLOAT, kind_of
from .program import Builder, renumbered
from .trace import Traced, traced


def programs_of(call: str, g: Functions) -> tuple[Traced | None, Traced | None]:
    """The programs of score_mod and of the masks, after the checks that need no array."""
    block = g.block_mask
    if not isinstance(g.captured, Sequence) or isinstance(g.captured, str | bytes):
        raise TypeError(message(call, "captured", f"is {words.kind(g.captured)}", "a tuple of arrays", "(x,) is a tuple of one"))
    if g.captured and g.score_mod is None:
        raise ValueError(message(call, "captured", f"has {len(g.captured)} arrays without score_mod", "score_mod=, which gets them",
                                 "mask_mod closes over its arrays"))
    if block is not None and not isinstance(block, BlockMask):
        torchs = type(block).__name__ == "BlockMask"
        raise TypeError(message(call, "block_mask", f"is {'torch' if torchs else words.kind(block)}{'s BlockMask' if torchs else ''}",
                                "what fastattn.block_mask returns", "fastattn.block_mask takes the arguments of create_block_mask"))
    score = g.score_mod
    if score is not None and not isinstance(score, Traced):
        score = traced(call, "score_mod", score, g.captured)
    return score, _mask(call, g.mask_mod, block)


def flex_of(score: Traced | None, mask: Traced | None, block: BlockMask | None) -> Flex:
    return Flex(None if score is None else score.program, None if mask is None else mask.program,
                None if block is None or block.blocks is None else block.block, block is not None and max(block.block) < DEFAULT)


def read_flex(caller: Caller, g: Functions) -> FlexOperands:
    """The programs, and Views of what they read. Shapes are checked by `check_flex`."""
    score, mask = programs_of(caller.call, g)
    block = g.block_mask
    o = FlexOperands(flex_of(score, mask, block))
    if score is not None:
        o.score_arrays, o.score_numbers = _views(caller, score, "score_mod"), score.numbers
        o.names, o.entries = tuple([shown_name(name, "score_mod") for name in score.names]), _entries(g.captured, score)
    if mask is not None:
        o.mask_arrays, o.mask_numbers = _views(caller, mask, "mask_mod"), mask.numbers
    if block is not None:
        if block.device is not None and block.device != _place(caller):
            raise ValueError(message(caller.call, "block_mask", f"is for device {block.device}", f"q's device, {_place(caller)}"))
        o.blocks = None if block.blocks is None else caller.view(block.blocks, "block_mask")
        o.kept, o.planes = block.kept if g.mask_mod is None else None, (block.batch, block.num_heads)
    return o


def shown_name(name: str, argument: str) -> str:
    """What errors call an array: `captured[0]`, `table in score_mod`."""
    return name if name.startswith("captured[") else f"{name} in {argument}"


def _place(caller: Caller) -> Device:
    return CPU if caller.stream is None else ("cuda", caller.stream.device)


def _mask(call: str, mask_mod: Any, block: BlockMask | None) -> Traced | None:
    """The program of the masks that the call has: both where there are two. What is traced already is not traced again."""
    if mask_mod is not None and not isinstance(mask_mod, Traced):
        mask_mod = traced(call, "mask_mod", mask_mod, (), True)
    other = None if block is None else block.traced
    if mask_mod is None or other is None:
        return other if mask_mod is None else mask_mod
    return _both(mask_mod, other)


def _both(one: Traced, other: Traced) -> Traced:
    """A pair is seen if both masks let it."""
    arrays, numbers = one.program.arrays + other.program.arrays, one.program.numbers + other.program.numbers
    b, outputs = Builder(arrays, numbers), list[int]()
    first_array = first_number = 0
    for t in (one, other):
        count, kinds = len(t.program.arrays), len(t.program.numbers)
        p = renumbered(t.program, arrays, numbers, {n: first_array + n for n in range(count)}, {n: first_number + n for n in range(kinds)})
        outputs += b.include(p)
        first_array, first_number = first_array + count, first_number + kinds
    return Traced(b.program(b.do("and", *outputs)), one.arrays + other.arrays, one.names + other.names, one.numbers + other.numbers)


def _entries(captured: Sequence[Any], score: Traced) -> tuple[int | None, ...]:
    """For each entry of Grads.dcaptured which array's gradient it is."""
    own = [n for n, x in enumerate(captured) if not is_number(x)]
    entries: list[int | None] = [own.index(n) if n in own else None for n in range(len(captured))]
    entries += range(len(own), len(score.arrays))
    return tuple([None if n is None or kind_of(score.program.arrays[n].dtype) != FLOAT else n for n in entries])


def _views(caller: Caller, t: Traced, argument: str) -> tuple[View, ...]:
    found = []
    for x, name in zip(t.arrays, t.names, strict=True):
        try:
            found.append(caller.view(x, shown_name(name, argument)))
        except TypeError as error:
            error.add_note(f"The function of {argument}= holds it.")
            raise
    return tuple(found)


def check_flex(check: Check, o: FlexOperands, device: Device, shape: tuple[int, int, int, int]) -> FlexOperands:
    """The operands with blocks broadcast to `shape` = (batch, num_heads, seqlen_q, seqlen_k), in blocks."""
    for name, x in o.views.items():
        if x.device != device:
            raise check.value(name, f"is on device {x.device}", f"q's device, {device}")
        if x.dtype in EIGHT_BIT:
            raise check.type(name, f"has dtype {x.dtype}", "float16, bfloat16, float32, float64, int32, int64 or bool",
                             words.cast(name, x.source, "float32"))
        if 0 in x.shape and name != "block_mask":
            raise check.value(name, f"has shape {x.shape}", "at least one element, because every index is cut to the array")
    for name, own, n in zip(("batch", "num_heads"), o.planes, shape, strict=False):
        if own not in (None, 1, n):
            raise check.value("block_mask", f"has {name} = {own}", f"the call's, {n}, or None for one plane for all")
    if o.blocks is None:
        return o
    assert o.flex.block is not None
    rows, keys = o.flex.block
    whole = shape[0], shape[1], -(-shape[2] // rows), -(-shape[3] // keys)
    given = (1,) * (4 - len(o.blocks.shape)) + o.blocks.shape
    if any(n not in (1, m) for n, m in zip(given, whole, strict=True)):
        raise check.value("block_mask", f"has blocks of shape {o.blocks.shape}",
                          f"a shape that broadcasts to (batch, num_heads, blocks, blocks) = {whole}",
                          f"for seqlen_q = {shape[2]} and seqlen_k = {shape[3]} in blocks of {rows} x {keys}")
    if 0 in whole:                  # there is no pair to hide, and no element that a kernel could cut an index to
        return replace(o, blocks=None, flex=replace(o.flex, block=None))
    return replace(o, blocks=o.blocks.broadcast_to(whole))

