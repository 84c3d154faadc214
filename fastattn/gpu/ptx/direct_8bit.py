"""direct.py's products of 16-bit Q with K and V of 8 bits: loaded as they are, and widened in registers, which is exact.

A chunk of 16 bytes has 16 elements. A word of K is one step of 16 columns of the MMA; Q has twice as many chunks, of which a lane loads
neighbours: `weave` puts them in K's order. The elements of a chunk of V are the lane's column in 16 MMAs.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, emit, pack, unpack
from .direct import kept_operands
from .mma import multiply
from .widen import emit_permute, make_widen


@intrinsic
def weave(typingctx: Any, even: Any, odd: Any) -> Any:
    """Chunks 0, 2, ... and chunks 1, 3, ... of a row of Q, four words each, in order."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second = (unpack(builder, x, even.count) for x in args)
        return pack(builder, [word for n in range(0, even.count, 4) for word in (*first[n:n + 4], *second[n:n + 4])])
    return signature(types.UniTuple(types.int32, 2 * even.count), even, odd), generate


@intrinsic
def largest(typingctx: Any, words: Any) -> Any:
    """2**n of the largest finite bfloat16 of a tuple of words, which is below 2**(n + 1); 0 for subnormal ones. As float32."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = I32(0)
        for word in unpack(builder, args[0], words.count):
            for bits in (word, builder.lshr(word, I32(16))):
                exponent = builder.and_(bits, I32(0x7F80))
                higher = builder.and_(builder.icmp_signed(">", exponent, found), builder.icmp_signed("<", exponent, I32(0x7F80)))
                found = builder.select(higher, exponent, found)
        return builder.bitcast(builder.shl(found, I32(16)), F32)
    return signature(types.float32, words), generate


@intrinsic
def factors(typingctx: Any, top: Any) -> Any:
    """(2**(14 - n), 2**(n - 14)) of top = 2**n: numbers below 2**(n + 1) times the first are below 2**15. n is -112 at least."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        exponent = builder.lshr(builder.bitcast(args[0], I32), I32(23))
        exponent = builder.select(builder.icmp_signed(">", exponent, I32(15)), exponent, I32(15))
        bits = builder.sub(I32(2 * 127 + 14), exponent), builder.sub(exponent, I32(14))
        return pack(builder, [builder.bitcast(builder.shl(x, I32(23)), F32) for x in bits])
    return signature(types.UniTuple(types.float32, 2), types.float32), generate


@intrinsic
def narrowed(typingctx: Any, words: Any, factor: Any) -> Any:
    """Pairs of bfloat16 times a power of two as pairs of float16. From 2**-14 on they are exact, below they are multiples of 2**-24."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        text = ("{ .reg .f32 x, y; .reg .b32 t; shl.b32 t, $1, 16; mov.b32 x, t; and.b32 t, $1, 0xFFFF0000; mov.b32 y, t; "
                "mul.f32 x, x, $2; mul.f32 y, y, $2; cvt.rn.f16x2.f32 $0, y, x; }")
        return pack(builder, [emit(builder, I32, text, "=r,r,f", [word, args[1]], False) for word in unpack(builder, args[0], words.count)])
    return signature(words, words, types.float32), generate


def make_products(dtype: str, source: str, native: bool, tiles: int = 1) -> tuple[Any, Any, Any]:
    """(qk, kept_qk, pv) of Q of `dtype` with K and V of `source`: as direct.make_products and direct.make_kept have them. Numbers are
    widened once for all tiles."""
    widen = make_widen(dtype, source, native)

    def scores(builder: Any, acc: Any, count: int, k: Any, words_k: int, operands: Any) -> Any:
        registers, words, of_tile = unpack(builder, acc, count), unpack(builder, k, words_k), count // tiles
        of_row = words_k // (of_tile // 4)
        for step, of_step in enumerate(operands):
            for t in range(of_tile // 4):
                b = widen(builder, words[t * of_row + step])
                for tile, a in enumerate(of_step):
                    at = of_tile * tile + 4 * t
                    registers[at:at + 4] = multiply(builder, dtype, registers[at:at + 4], a, b)
        return pack(builder, registers)

    @intrinsic
    def qk(typingctx: Any, acc: Any, q0: Any, q1: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
            return scores(builder, args[0], acc.count, args[3], k.count,
                          [[[first[at], second[at], first[at + 1], second[at + 1]]] for at in range(0, q0.count, 2)])
        return signature(acc, acc, q0, q1, k), generate

    @intrinsic
    def kept_qk(typingctx: Any, acc: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            steps = k.count // (acc.count // (4 * tiles))
            return scores(builder, args[0], acc.count, args[2], k.count, kept_operands(builder, args[1], steps, tiles))
        return signature(acc, acc, types.int32, k), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
            of_acc, of_p = acc.count // tiles, p.count // tiles
            wide, pairs = of_acc // 64, min(of_p // 2, 2)           # chunks of a row, pairs of a lane's keys in an MMA
            for u in range(of_p // (2 * pairs)):
                rows = [words[(2 * pairs * u + r) * 4 * wide:(2 * pairs * u + r + 1) * 4 * wide] for r in range(2 * pairs)]
                for word in range(4 * wide):
                    both = [[pair for selector in (0x5140, 0x7362)
                             for pair in widen(builder, emit_permute(builder, rows[r][word], rows[r + 1][word], selector))]
                            for r in range(0, 2 * pairs, 2)]
                    for n in range(4):
                        for tile in range(tiles):
                            at, p_at = of_acc * tile + 4 * (4 * word + n), of_p * tile + 2 * pairs * u
                            registers[at:at + 4] = multiply(builder, dtype, registers[at:at + 4], a[p_at:p_at + 2 * pairs],
                                                            [column[n] for column in both])
            return pack(builder, registers)
        return signature(acc, acc, p, v), generate
    return qk, kept_qk, pv
