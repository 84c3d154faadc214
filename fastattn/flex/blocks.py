"""`block_mask`: a mask that is made once and used in many calls. `and_masks`, `or_masks`: masks of masks."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import words
from ..arrays.convert import view
from ..arrays.readers import in_device_memory, shape_of
from ..errors import message
from ..options import Check
from .capture import is_array
from .evaluate import Array
from .intervals import ALL, NONE, SOME, tile_states
from .ops import INT
from .program import Builder, Program
from .trace import Traced, described, traced

MaskMod = Callable[..., Any]
DEFAULT = 128                           # rows and keys of a block
WIDE = 48                               # most cells of a picture's side
CELLS = {NONE: "·", SOME: "▒", ALL: "█"}
MOST = 2**31 - 1
MOST_PROGRAMS = 256                     # with planes for all


def _joined(all_of: bool, masks: tuple[MaskMod, ...], b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    seen = masks[0](b, h, q_idx, kv_idx)
    for mask in masks[1:]:
        seen = seen & mask(b, h, q_idx, kv_idx) if all_of else seen | mask(b, h, q_idx, kv_idx)
    return seen


def _join(call: str, masks: tuple[MaskMod, ...]) -> MaskMod:
    for n, mask in enumerate(masks):
        if not callable(mask):
            raise TypeError(message(call, f"mask {n}", f"is {words.shown(mask)}", "a function (b, h, q_idx, kv_idx)"))
    if not masks:
        raise TypeError(message(call, "masks", "are none", "at least one function (b, h, q_idx, kv_idx)"))
    return functools.partial(_joined, call == "and_masks", masks)


def and_masks(*masks: MaskMod) -> MaskMod:
    """A mask_mod that sees what all of some masks see.

    Parameters
    ----------
    *masks : callable
        Functions (b, h, q_idx, kv_idx) -> condition.

    Returns
    -------
    callable
        Of the same arguments.

    Raises
    ------
    TypeError
        One is no function, or there is none.

    Notes
    -----
    As torch.nn.attention.flex_attention.and_masks, whose results may be passed to fastattn too.

    Examples
    --------
    >>> from fastattn import and_masks
    >>> near = and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 4)
    >>> near(0, 0, 5, 2), near(0, 0, 5, 1)
    (True, False)
    """
    return _join("and_masks", masks)


def or_masks(*masks: MaskMod) -> MaskMod:
    """A mask_mod that sees what at least one of some masks sees.

    Parameters
    ----------
    *masks : callable
        Functions (b, h, q_idx, kv_idx) -> condition.

    Returns
    -------
    callable
        Of the same arguments.

    Raises
    ------
    TypeError
        One is no function, or there is none.

    Notes
    -----
    As torch.nn.attention.flex_attention.or_masks, whose results may be passed to fastattn too.

    Examples
    --------
    >>> from fastattn import or_masks
    >>> prefix = or_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: k < 3)
    >>> prefix(0, 0, 0, 2), prefix(0, 0, 0, 3)
    (True, False)
    """
    return _join("or_masks", masks)


@functools.lru_cache(MOST_PROGRAMS)
def _pinned(p: Program, names: frozenset[str]) -> Program:
    """The program with these inputs 0: one plane serves all. Kept, so that a mask that is made again has what its program has computed."""
    b, new = Builder(p.arrays, p.numbers), list[int]()
    for x in p.lines:
        at_zero = x.op == "input" and x.value in names
        new.append(b.const(0, INT) if at_zero else b.copy(x, tuple([new[n] for n in x.args])))
    return b.program(*[new[n] for n in p.outputs])


class BlockMask:
    """What `block_mask` returns. `print` shows it as a picture.

    Attributes
    ----------
    mask_mod : callable or None
        The function.
    blocks : array or None
        The boolean array of blocks.
    batch, num_heads : int or None
        None, as 1: one plane for all.
    seqlen_q, seqlen_k : int
        For which lengths it was made.
    block : (int, int)
        Rows and keys of a block.
    """

    def __init__(self, mask_mod: MaskMod | None, blocks: Any, batch: int | None, num_heads: int | None, seqlen_q: int, seqlen_k: int,
                 block: tuple[int, int], device: tuple[str, int] | None) -> None:
        self.mask_mod, self.blocks, self.batch, self.num_heads = mask_mod, blocks, batch, num_heads
        self.seqlen_q, self.seqlen_k, self.block, self.device = seqlen_q, seqlen_k, block, device
        self.kept: dict[Any, Any] = {}
        self.traced: Traced | None = None
        if mask_mod is not None:
            planes = {"batch": batch, "head": num_heads}
            found = traced("block_mask", "mask_mod", mask_mod, (), True)
            one = frozenset([name for name, n in planes.items() if n in (None, 1)])
            self.traced = found._replace(program=_pinned(found.program, one))

    @property
    def program(self) -> Program | None:
        return None if self.traced is None else self.traced.program

    def tiles(self, block: tuple[int, int] | None = None) -> Array:
        """What each tile sees: 0 no pair, 1 some, 2 all.

        Parameters
        ----------
        block : (int, int), optional
            Rows and keys of a tile. Default: those of a block.

        Returns
        -------
        ndarray (batch, num_heads, tiles of rows, tiles of keys), uint8
            batch and num_heads are 1 where one plane serves all. Arrays on a device are copied to the host.
        """
        block = self.block if block is None else block
        shape = self.batch or 1, self.num_heads or 1, -(-self.seqlen_q // block[0]), -(-self.seqlen_k // block[1])
        states = np.full(shape, ALL, np.uint8)
        if self.traced is not None:
            arrays = [on_host(x, "block_mask", name) for x, name in zip(self.traced.arrays, self.traced.names, strict=True)]
            states = tile_states(self.traced.program, arrays, self.traced.numbers, shape[0], shape[1], self.seqlen_q, self.seqlen_k, block)
        if self.blocks is not None:
            states = self._with_blocks(states, block)
        return states

    def _with_blocks(self, states: Array, block: tuple[int, int]) -> Array:
        """Tiles of which the blocks let nothing, or only a part, through."""
        blocks = np.broadcast_to(on_host(self.blocks, "block_mask", "blocks"), (*states.shape[:2], *self.count))
        for axis, (tile, own, length) in enumerate(zip(block, self.block, (self.seqlen_q, self.seqlen_k), strict=True), 2):
            first = np.arange(-(-length // tile)) * tile
            last = np.minimum(first + tile, length) - 1
            total = np.insert(np.cumsum(blocks, axis, dtype=np.float64), 0, 0, axis)
            parts = np.take(total, last // own + 1, axis) - np.take(total, first // own, axis)
            shape = [1] * 4
            shape[axis] = len(first)
            blocks = parts / (last // own + 1 - first // own).reshape(shape)
        return np.where(blocks == 0, NONE, np.where((blocks == 1) | (states == NONE), states, SOME)).astype(np.uint8)

    @property
    def count(self) -> tuple[int, int]:
        """Blocks of rows and of keys."""
        return -(-self.seqlen_q // self.block[0]), -(-self.seqlen_k // self.block[1])

    def sparsity(self) -> float:
        """The share of blocks in which no pair is seen, which calls skip, in percent."""
        return float((self.tiles() == NONE).mean() * 100)

    def __repr__(self) -> str:
        one = (self.batch or 1, self.num_heads or 1) == (1, 1)
        planes = "one plane for all" if one else f"batch {self.batch}, num_heads {self.num_heads}"
        of = " and ".join(name for name, x in (("a function", self.mask_mod), ("an array of blocks", self.blocks)) if x is not None)
        return f"BlockMask({self.seqlen_q} x {self.seqlen_k}, blocks of {self.block[0]} x {self.block[1]}, {planes}, of {of})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.picture()}"

    def picture(self, batch: int = 0, head: int = 0) -> str:
        """One plane as text: █ sees all pairs, ▒ some, · none. At most 48 tiles a side.

        Parameters
        ----------
        batch, head : int, default 0
            Which plane.

        Returns
        -------
        str
            A line for each tile of rows.
        """
        plane = self.tiles()[batch, head]
        for axis, n in enumerate(plane.shape):
            first = np.arange(0, n, max(1, math.ceil(n / WIDE)))
            if n:
                least, most = np.minimum.reduceat(plane, first, axis), np.maximum.reduceat(plane, first, axis)
                plane = np.where(least == most, least, SOME)
        return "\n".join("".join(CELLS[int(x)] for x in row) for row in plane)


def block_mask(mask_mod: MaskMod | None, batch: int | None, num_heads: int | None, seqlen_q: int, seqlen_k: int, *, blocks: Any = None,
               block: int | tuple[int, int] = DEFAULT, device: Any = None) -> BlockMask:
    """A mask to use in many calls: what an engine makes of it, it makes once.

    Parameters
    ----------
    mask_mod : callable or None
        ``mask_mod(b, h, q_idx, kv_idx)`` gives a condition, True where the row attends the key: see `attention`. It may close over arrays,
        which must not change as long as the mask is used.
    batch, num_heads : int or None
        Those of the calls. None or 1: one plane for all, for which b or h is 0.
    seqlen_q, seqlen_k : int
        Those of the calls. A mask of a function alone may also be used in calls of other lengths.
    blocks : array that broadcasts to (batch, num_heads, blocks of rows, blocks of keys), optional
        bool, True where a block may be seen. With a function a pair is seen where both let it.
    block : int or (int, int), default 128
        Rows and keys of a block of `blocks`. Below 128 it also says that the mask is made of short pieces, as documents of some hundred
        tokens: GPU kernels then take smaller tiles where they have them. Results are the same but for rounding.
    device : str or (str, int), optional
        "cpu" or "cuda": calls on other memory are refused. None: its arrays decide.

    Returns
    -------
    BlockMask
        Pass it as ``block_mask=``. ``print`` shows a picture.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, or the function cannot be traced.

    Notes
    -----
    The arguments are those of torch's create_block_mask. Nothing is computed before a call needs it.

    Source: Dong et al., "Flex Attention: A programming model for generating optimized attention kernels", 2024.

    Examples
    --------
    >>> from fastattn import block_mask
    >>> print(block_mask(lambda b, h, q, k: (q >= k) & (q - k < 40), None, None, 100, 100, block=20))
    BlockMask(100 x 100, blocks of 20 x 20, one plane for all, of a function)
    ▒····
    █▒···
    ▒█▒··
    ·▒█▒·
    ··▒█▒
    """
    check = Check("block_mask")
    if mask_mod is None and blocks is None:
        raise check.value("mask_mod", "is None", "a function (b, h, q_idx, kv_idx)", "or blocks=, a boolean array")
    planes = [None if n is None else check.integer(name, n, 1, MOST) for name, n in (("batch", batch), ("num_heads", num_heads))]
    lengths = [check.integer(name, n, 0, MOST) for name, n in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))]
    sides = block if isinstance(block, tuple) and len(block) == 2 else (block, block)
    rows, keys = (check.integer("block", n, 1, MOST, "a pair is (rows, keys)") for n in sides)
    made = BlockMask(mask_mod, None, planes[0], planes[1], lengths[0], lengths[1], (rows, keys), _device(check, device))
    if blocks is not None:
        if not is_array(blocks):
            raise check.type("blocks", f"is {words.kind(blocks)}", "a boolean array")
        dtype = described(blocks).dtype
        if dtype != "bool":
            raise check.type("blocks", f"has dtype {dtype}", "bool, True where a block may be seen", words.cast("blocks", blocks, "bool"))
        whole = made.batch or 1, made.num_heads or 1, *made.count
        given = shape_of(blocks) or ()
        if not 2 <= len(given) <= 4 or any(n not in (1, m) for n, m in zip(given[::-1], whole[::-1], strict=False)):
            raise check.value("blocks", f"has shape {given}", f"a shape that broadcasts to (batch, num_heads, blocks, blocks) = {whole}")
        made.blocks = blocks
    return made


def _device(check: Check, device: Any) -> tuple[str, int] | None:
    if device is None:
        return None
    kind, _, number = str(device).partition(":") if not isinstance(device, tuple) else (str(device[0]), "", str(device[1]))
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise check.value("device", f"is {words.shown(device)}", "'cpu', 'cuda', 'cuda:1', or a device of torch")
    return kind, int(number) if number else 0


def on_host(x: Any, call: str, argument: str) -> Array:
    """An array of any library in host memory."""
    if in_device_memory(x):
        for way in ("cpu", "get", "copy_to_host"):
            if hasattr(x, way):
                x = getattr(x, way)()
                break
    return view(x.detach() if hasattr(x, "detach") else x, call, argument).numpy()
