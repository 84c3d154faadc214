"""Bits of a boolean mask (rows/mask_words.py): a thread's two rows of a fragment have a word each, bit 2 j + i for its column 8 j + i."""
from __future__ import annotations

import itertools
from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, I64, literals, pack, unpack
from ..ptx.memory import emit_load_if
from .fragments import NEG_INF, row_of


def _bit(k: int) -> Any:
    return I32((1 << k) - (1 << 32 if k == 31 else 0))


@intrinsic
def line_bits(typingctx: Any, pointer: Any, stride: Any, limit: Any, count: Any) -> Any:
    """One word of `count` elements: bit 2 j + i is 1 if the byte at pointer + (8 j + i) * stride is not 0.

    These are the columns of one of the thread's rows. Those from `limit` on, counted from the pointer, are not read and are 0.
    """
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = I32(0)
        for k in range(n):
            column = 8 * (k // 2) + k % 2
            inside = builder.icmp_signed("<", I32(column), args[2])
            x = emit_load_if(builder, inside, builder.add(args[0], builder.mul(args[1], I64(column))), 1)
            word = builder.or_(word, builder.select(builder.icmp_unsigned("!=", x, I32(0)), _bit(k), I32(0)))
        return word
    return signature(types.int32, types.uint64, types.int64, types.int32, count), generate


@intrinsic
def lines_bits(typingctx: Any, pointer: Any, stride: Any, limit: Any, count: Any) -> Any:
    """line_bits of four lines whose bytes are next to each other in memory, 4-byte aligned: four words."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pieces = []         # 8 columns each: bit k of byte m is column k of line m
        for first in range(0, n, 8):
            bits, size = I32(0), min(8, n - first)
            for k in range(first, first + size):
                column = 8 * (k // 2) + k % 2
                inside = builder.icmp_signed("<", I32(column), args[2])
                x = emit_load_if(builder, inside, builder.add(args[0], builder.mul(args[1], I64(column))), 4)
                # bit 7 of each byte that is not 0
                x = builder.and_(builder.or_(builder.add(builder.and_(x, I32(0x7F7F7F7F)), I32(0x7F7F7F7F)), x), I32(-0x7F7F7F80))
                bits = builder.or_(builder.lshr(bits, I32(1)), x)
            pieces.append(builder.lshr(bits, I32(8 - size)))
        words = [I32(0)] * 4
        for m, (at, x) in itertools.product(range(4), enumerate(pieces)):
            byte = builder.and_(builder.lshr(x, I32(8 * m)), I32(0xFF))
            words[m] = builder.or_(words[m], builder.shl(byte, I32(8 * at)))
        return pack(builder, words)
    return signature(types.UniTuple(types.int32, 4), types.uint64, types.int64, types.int32, count), generate


@intrinsic
def keep_words(typingctx: Any, acc: Any, words: Any) -> Any:
    """acc where its bit is set, else -inf. `words`: line_bits of each of the thread's two rows."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows, out = unpack(builder, args[1], 2), []
        for k, x in enumerate(unpack(builder, args[0], acc.count)):
            bit = builder.and_(rows[row_of(k) // 8], _bit(2 * (k // 4) + k % 2))
            out.append(builder.select(builder.icmp_unsigned("!=", bit, I32(0)), x, NEG_INF))
        return pack(builder, out)
    return signature(acc, acc, words), generate
