"""A 16-bit bias that TMA brings: tiles in shared memory, which a warp reads as fragments with ldmatrix.

A tile has panels of 64 keys, one row of 128 bytes for each query, swizzled like those of Q and K (smem.py). ldmatrix gives a lane two
neighbouring scores a register, without bank conflicts. Transposed, it gives them to a fragment of keys by queries, for the backward. A
thread that loads its elements from global memory needs a load for each of these, or exchanges words in the quad.
"""
from __future__ import annotations

from typing import Any

from numba import int32
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, literals, pack
from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.mma import emit_ldmatrix, lane_offset, lane_offset_b
from ..spec import Spec
from .fragments import make_unpack
from .smem import PANEL, ROW_BYTES


@intrinsic
def load_rows(typingctx: Any, address: Any, count: Any, panel_bytes: Any) -> Any:
    """The packed fragment of `count` float32 registers of a warp's 16 queries. address: the first row, plus lane_offset."""
    n, panel = literals(count, panel_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = []
        for piece in range(n // 8):         # 16 keys
            at = builder.xor(args[0], I32(32 * (piece % 4)))
            words += emit_ldmatrix(builder, at, piece // 4 * panel, False)
        return pack(builder, words)
    return signature(types.UniTuple(types.int32, n // 2), types.int32, count, panel_bytes), generate


@intrinsic
def load_columns(typingctx: Any, address: Any, count: Any) -> Any:
    """The packed fragment of `count` float32 registers of a warp's 16 keys. address: the first row at these keys, plus lane_offset_b."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = []
        for piece in range(n // 8):         # 16 queries
            words += emit_ldmatrix(builder, args[0], 16 * ROW_BYTES * piece, True)
        return pack(builder, words)
    return signature(types.UniTuple(types.int32, n // 2), types.int32, count), generate


def make_bias_tile(spec: Spec, QUERIES: int, KEYS: int, COUNT: int, TRANSPOSED: bool = False) -> tuple[Any, Any, Any]:
    """(copy, lane_address, read) of a tile of QUERIES x KEYS elements. A warp's fragment of it has COUNT registers.

    copy(base, a, full, to, row, column, head, batch): issue the TMA loads of the tile at this row and column; as smem.make_copy_rows
    lane_address(tile, first, lane): where a lane reads its warp's fragment. `first` is the first of the warp's 16 queries, or TRANSPOSED
    of its 16 keys, counted in the tile
    read(address): the fragment, as float32
    """
    PANEL_BYTES, PANELS = QUERIES * ROW_BYTES, -(-KEYS // PANEL)
    unpack = make_unpack(spec.bias or "float16", True)

    @inline
    def copy(base, a, full, to, row, column, head, batch):
        head, batch = head if a.bias_head != 0 else int32(0), batch if a.bias_batch != 0 else int32(0)
        for p in range(PANELS):
            tma.load(base + to + p * PANEL_BYTES, a.map_bias, base + full, int32(column + p * PANEL), row, head, batch)

    @inline
    def lane_address(tile, first, lane):
        if TRANSPOSED:      # a panel has 64 keys
            return int32((tile + (first >> 6) * PANEL_BYTES + lane_offset_b(lane)) ^ ((first & 63) << 1))
        else:
            return int32(tile + first * ROW_BYTES + lane_offset(lane))

    @inline
    def read(address):
        if TRANSPOSED:
            return unpack(load_columns(address, COUNT))
        else:
            return unpack(load_rows(address, COUNT, PANEL_BYTES))
    return copy, lane_address, read


def tile_bytes(QUERIES: int, KEYS: int) -> int:
    """Bytes of a tile in shared memory."""
    return QUERIES * ROW_BYTES * -(-KEYS // PANEL)
