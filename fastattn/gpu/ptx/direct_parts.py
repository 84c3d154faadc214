"""direct.py's products of float32 operands: loaded as they are, and split into their three bfloat16 parts (parts.py) in registers.

High times high has an accumulator of its own and all smaller products share another, as in mma_parts.py.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, pack, unpack
from .direct import Q_STEP, load_operand, store_operand
from .mma_parts import _multiply_parts, _sum
from .parts import PARTS, emit_parts


def _pair(builder: Any, x: Any, y: Any) -> list[Any]:
    """The parts of two words that are float32."""
    return emit_parts(builder, builder.bitcast(x, F32), builder.bitcast(y, F32))


@intrinsic
def keep_q(typingctx: Any, address: Any, q0: Any, q1: Any) -> Any:
    """direct.make_kept's keep_q: the parts of Q, PARTS * Q_STEP bytes for every 16 columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
        for at in range(0, q0.count, 4):
            pairs = [_pair(builder, *row[column:column + 2]) for column in (at, at + 2) for row in (first, second)]
            for part in range(PARTS):
                store_operand(builder, args[0], Q_STEP * (PARTS * (at // 4) + part), [pair[part] for pair in pairs])
        return context.get_dummy_value()
    return signature(types.none, types.int32, q0, q1), generate


@intrinsic
def qk(typingctx: Any, acc: Any, address: Any, k: Any) -> Any:
    """acc + Q K^T. address: keep_q's."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        large, words, tiles = unpack(builder, args[0], acc.count), unpack(builder, args[2], k.count), acc.count // 4
        small, of_row = [F32(0.0)] * acc.count, k.count // tiles
        for step in range(of_row // 4):
            a = [load_operand(builder, args[1], Q_STEP * (PARTS * step + part)) for part in range(PARTS)]
            for t in range(tiles):
                x, at = words[t * of_row + 4 * step:][:4], slice(4 * t, 4 * t + 4)
                pairs = _pair(builder, *x[:2]), _pair(builder, *x[2:])
                b = [[pair[part] for pair in pairs] for part in range(PARTS)]
                large[at], small[at] = _multiply_parts(builder, large[at], small[at], a, b)
        return pack(builder, _sum(builder, large, small))
    return signature(acc, acc, types.int32, k), generate


@intrinsic
def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
    """acc + P V. p: P's parts (fragments.make_pack); v from direct.load_columns. Sums begin at zero and are then added to acc."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, a, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
        wide, each = acc.count // 16, p.count // PARTS          # chunks of a row, registers of a part of P
        pairs = min(each // 2, 2)                               # of a lane's keys in an MMA
        rows = [words[r * 4 * wide:(r + 1) * 4 * wide] for r in range(v.count // (4 * wide))]
        for tile in range(4 * wide):
            at, large, small = slice(4 * tile, 4 * tile + 4), [F32(0.0)] * 4, [F32(0.0)] * 4
            for u in range(each // (2 * pairs)):
                split = [_pair(builder, rows[r][tile], rows[r + 1][tile]) for r in range(2 * pairs * u, 2 * pairs * (u + 1), 2)]
                b = [[pair[part] for pair in split] for part in range(PARTS)]
                of_p = [a[part * each + 2 * pairs * u:part * each + 2 * pairs * (u + 1)] for part in range(PARTS)]
                large, small = _multiply_parts(builder, large, small, of_p, b)
            registers[at] = _sum(builder, registers[at], _sum(builder, large, small))
        return pack(builder, registers)
    return signature(acc, acc, p, v), generate
