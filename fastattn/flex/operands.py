"""What a Problem and its Operands have where a call brings functions of its own."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..arrays.view import View
    from .program import Program


class Functions(NamedTuple):
    """The arguments of a call as the caller gives them."""

    score_mod: Any
    mask_mod: Any
    captured: Any
    block_mask: Any


def functions_of(score_mod: Any, mask_mod: Any, captured: Any, block_mask: Any) -> Functions | None:
    """None where a call has none of them."""
    if score_mod is None and mask_mod is None and block_mask is None and type(captured) is tuple and not captured:
        return None
    return Functions(score_mod, mask_mod, captured, block_mask)


@dataclass(frozen=True, slots=True)
class Flex:
    """The functions of a call, as programs: score_mod(softcap(softmax_scale * q.k) + alibi + bias), then the masks.

    A pair is seen if every mask that there is lets it: Problem.mask, the boolean mask, `mask_mod`, and the blocks, of
    `block` = (rows, keys).
    """

    score_mod: Program | None = None
    mask_mod: Program | None = None
    block: tuple[int, int] | None = None
    fine: bool = False          # the BlockMask was made for blocks below the default: engines may take smaller tiles


@dataclass(slots=True)
class FlexOperands:
    """Where the arrays of the programs are, in the order of Program.arrays, and the values of their numbers.

    `blocks` is bool, broadcast to (batch, num_heads, blocks of rows, blocks of keys). `kept` is where an engine may keep what it
    has made of the masks, under a key of its own that has all that it depends on but the arrays' elements: the caller's
    BlockMask has it. None: nothing outlives the call. `names` are what the caller calls the arrays of score_mod, `entries` what
    Grads.dcaptured has: for each the number of an array, or None. `planes` are the BlockMask's batch and num_heads.
    """

    flex: Flex
    score_arrays: tuple[View, ...] = ()
    score_numbers: tuple[float, ...] = ()
    mask_arrays: tuple[View, ...] = ()
    mask_numbers: tuple[float, ...] = ()
    blocks: View | None = None
    kept: dict[Any, Any] | None = None
    names: tuple[str, ...] = ()
    entries: tuple[int | None, ...] = ()
    planes: tuple[int | None, int | None] = (None, None)

    @property
    def views(self) -> dict[str, View]:
        """All of its arrays, by name."""
        found = dict(zip(self.names, self.score_arrays, strict=True))
        found |= {f"mask_mod's array {n}": x for n, x in enumerate(self.mask_arrays)}
        return found if self.blocks is None else found | {"block_mask": self.blocks}
