"""Rows of a result from a fragment to global memory: 16-bit rows from a packed fragment, float32 and 8-bit rows from float32."""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, I64, literals, unpack
from ..ptx.memory import emit_store16_if, emit_store_e4m3_pair_if, emit_store_f32_if, emit_store_halves_if
from .fragments import col_of, row_of, transpose_quad


@intrinsic
def store_whole_rows(typingctx: Any, packed: Any, address0: Any, address1: Any, keep0: Any, keep1: Any, lane: Any) -> Any:
    """Store a packed fragment to global memory: each of the thread's rows if its keep0, keep1 is not 0.

    address0, address1: of the thread's first column in its rows, which are 16-byte aligned. The threads of a quad exchange words, so
    that each stores 16 bytes of a row at a time: a quarter of the time of 4-byte stores.
    """
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, thread = unpack(builder, args[0], packed.count), builder.and_(args[5], I32(3))
        for r in (0, 1):
            words = registers[r::2]
            address = builder.add(args[1 + r], builder.mul(builder.zext(thread, I64), I64(12)))     # chunk t of 16 bytes, from column 2 t
            for j in range(0, len(words), 4):
                count, keep = min(4, len(words) - j), args[3 + r]
                if count < 4:
                    keep = builder.select(builder.icmp_unsigned("<", thread, I32(count)), keep, I32(0))
                pieces = transpose_quad(builder, thread, words[j:j + 4] + [I32(0)] * (4 - count))
                emit_store16_if(builder, keep, builder.add(address, I64(16 * j)), pieces)
        return context.get_dummy_value()
    return signature(types.none, packed, types.uint64, types.uint64, types.int32, types.int32, types.int32), generate


@intrinsic
def store_rows(typingctx: Any, packed: Any, address0: Any, address1: Any, keep0: Any, keep1: Any, columns: Any) -> Any:
    """store_whole_rows for any alignment, element by element. Only `columns` columns from the thread's first on exist."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        keep = [builder.icmp_unsigned("!=", x, I32(0)) for x in args[3:5]]
        for j, word in enumerate(unpack(builder, args[0], packed.count)):
            row, col = row_of(2 * j) // 8, col_of(2 * j)
            inside = [builder.zext(builder.and_(keep[row], builder.icmp_signed("<", I32(col + i), args[5])), I32) for i in (0, 1)]
            emit_store_halves_if(builder, inside[0], inside[1], builder.add(args[1 + row], I64(2 * col)), word)
        return context.get_dummy_value()
    return signature(types.none, packed, types.uint64, types.uint64, types.int32, types.int32, types.int32), generate


@intrinsic
def store_floats(typingctx: Any, acc: Any, address0: Any, address1: Any, by_column: Any, keep0: Any, keep1: Any, columns: Any,
                 step16: Any) -> Any:
    """store_rows of float32, `by_column` bytes from column to column. The fragment has 16 of every 16 * step16 columns."""
    [step] = literals(step16)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        keep = [builder.icmp_unsigned("!=", x, I32(0)) for x in args[4:6]]
        for k, x in enumerate(unpack(builder, args[0], acc.count)):
            row, column = row_of(k) // 8, k // 8 * 16 * step + col_of(k % 8)
            inside = builder.zext(builder.and_(keep[row], builder.icmp_signed("<", I32(column), args[6])), I32)
            emit_store_f32_if(builder, inside, builder.add(args[1 + row], builder.mul(args[3], I64(column))), x)
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, types.uint64, types.int64, types.int32, types.int32, types.int32,
                     step16), generate


@intrinsic
def store_bytes(typingctx: Any, acc: Any, address0: Any, address1: Any, keep0: Any, keep1: Any) -> Any:
    """Store a float32 fragment as contiguous float8_e4m3fn, two at a time: each of the thread's rows if its keep0, keep1 is not 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[0], acc.count)
        for k in range(0, acc.count, 2):
            row = row_of(k) // 8
            emit_store_e4m3_pair_if(builder, args[3 + row], args[1 + row], col_of(k), x[k], x[k + 1])
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, types.uint64, types.int32, types.int32), generate
