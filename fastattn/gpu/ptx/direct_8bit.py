"""direct.py's products of 16-bit Q with K and V of 8 bits: loaded as they are, and widened in registers, which is exact.

A chunk of 16 bytes has 16 elements. A word of K is one step of 16 columns of the MMA; Q has twice as many chunks, of which a lane loads
neighbours: `weave` puts them in K's order. The elements of a chunk of V are the lane's column in 16 MMAs.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import pack, unpack
from .direct import Q_STEP, load_operand
from .mma import multiply
from .widen import emit_permute, make_widen


@intrinsic
def weave(typingctx: Any, even: Any, odd: Any) -> Any:
    """Chunks 0, 2, ... and chunks 1, 3, ... of a row of Q, four words each, in order."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second = (unpack(builder, x, even.count) for x in args)
        return pack(builder, [word for n in range(0, even.count, 4) for word in (*first[n:n + 4], *second[n:n + 4])])
    return signature(types.UniTuple(types.int32, 2 * even.count), even, odd), generate


def make_products(dtype: str, source: str, native: bool) -> tuple[Any, Any, Any]:
    """(qk, kept_qk, pv) of Q of `dtype` with K and V of `source`: as direct.make_products and direct.make_kept have them."""
    widen = make_widen(dtype, source, native)

    def scores(builder: Any, acc: Any, count: int, k: Any, words_k: int, operands: Any) -> Any:
        registers, words, tiles = unpack(builder, acc, count), unpack(builder, k, words_k), count // 4
        of_row = words_k // tiles
        for step, a in enumerate(operands):
            for t in range(tiles):
                b = widen(builder, words[t * of_row + step])
                registers[4 * t:4 * t + 4] = multiply(builder, dtype, registers[4 * t:4 * t + 4], a, b)
        return pack(builder, registers)

    @intrinsic
    def qk(typingctx: Any, acc: Any, q0: Any, q1: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
            return scores(builder, args[0], acc.count, args[3], k.count,
                          [[first[at], second[at], first[at + 1], second[at + 1]] for at in range(0, q0.count, 2)])
        return signature(acc, acc, q0, q1, k), generate

    @intrinsic
    def kept_qk(typingctx: Any, acc: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            steps = k.count // (acc.count // 4)
            return scores(builder, args[0], acc.count, args[2], k.count,
                          (load_operand(builder, args[1], Q_STEP * step) for step in range(steps)))
        return signature(acc, acc, types.int32, k), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
            wide, pairs = acc.count // 64, min(p.count // 2, 2)     # chunks of a row, pairs of a lane's keys in an MMA
            for u in range(p.count // (2 * pairs)):
                rows = [words[(2 * pairs * u + r) * 4 * wide:(2 * pairs * u + r + 1) * 4 * wide] for r in range(2 * pairs)]
                for word in range(4 * wide):
                    both = [[pair for selector in (0x5140, 0x7362)
                             for pair in widen(builder, emit_permute(builder, rows[r][word], rows[r + 1][word], selector))]
                            for r in range(0, 2 * pairs, 2)]
                    for n in range(4):
                        at = 4 * (4 * word + n)
                        registers[at:at + 4] = multiply(builder, dtype, registers[at:at + 4], a[2 * pairs * u:2 * pairs * (u + 1)],
                                                        [column[n] for column in both])
            return pack(builder, registers)
        return signature(acc, acc, p, v), generate
    return qk, kept_qk, pv
