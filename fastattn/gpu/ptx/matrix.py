"""stmatrix: a warp stores accumulator registers to shared memory as 8x8 tiles of 16 bits (PTX ISA 9.7.14.5.16). movmatrix transposes
one such tile (9.7.14.5.17)."""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, VOID, emit, literals, unpack


@intrinsic
def store_panels(typingctx: Any, packed: Any, row_address: Any, lane_swizzle: Any, panel_bytes: Any, count: Any, first: Any) -> Any:
    """Store panels [first, first + count) of each warp's packed 16 x N accumulator to 128-byte swizzled panels of 64 columns.

    row_address: shared address of this lane's row (lane % 16); lane_swizzle: ((row % 8) * 16) ^ (lane / 16 * 16).
    """
    panel, panels, begin = literals(panel_bytes, count, first)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], packed.count)
        for j in range(4 * begin, min(packed.count // 4, 4 * (begin + panels))):
            column = builder.xor(args[2], I32(2 * j % 8 * 16))
            address = builder.add(builder.add(args[1], column), I32((j // 4 - begin) * panel))
            emit(builder, VOID, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}",
                 [address, *registers[4 * j:4 * j + 4]])
        return context.get_dummy_value()
    return signature(types.none, packed, types.int32, types.int32, panel_bytes, count, first), generate


@intrinsic
def store_matrix_rows(typingctx: Any, packed: Any, address: Any) -> Any:
    """Store each warp's packed 16 x N accumulator to rows that are not swizzled.

    address: shared address of this lane's row (lane % 16), 16 bytes further for lanes from 16 on.
    """
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], packed.count)
        for j in range(packed.count // 4):
            emit(builder, VOID, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}",
                 [builder.add(args[1], I32(32 * j)), *registers[4 * j:4 * j + 4]])
        return context.get_dummy_value()
    return signature(types.none, packed, types.int32), generate


def emit_transpose(builder: Any, word: Any) -> Any:
    """Transpose a warp's 8x8 tile of 16 bits. Each register has two neighbours of a row."""
    return emit(builder, I32, "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word])
