"""mma.sync with operands loaded from global memory to registers, 16 bytes a load: no shared memory, no barrier (PTX ISA 9.7.14.5.8).

An MMA sums over depth in any order, as long as both operands have the same one, and the columns of its result may be permuted. So lane
4 g + c loads whole chunks of 8 elements where the instruction's figure has pairs:

    Q, K    chunks c, c + 4, ... of a row. The first four elements of a chunk stand for columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of one
            step of 16, the last four for those of the next step
    V       chunks g, g + 8, ... of keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9. The elements of a chunk are the lane's column in eight MMAs

K and V are then read in runs of 64 and 128 bytes.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, I64, emit, literals, pack, unpack
from .memory import emit_store_shared_vector
from .mma import multiply


def _load(builder: Any, address: Any, offset: int) -> list[Any]:
    """Four words at a 16-byte aligned address. They are read once and bypass the L1 cache."""
    text = f"ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    value = emit(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,l", [address])
    return [builder.extract_value(value, k) for k in range(4)]


def _row(builder: Any, base: Any, by_row: Any, row: Any, last: Any) -> Any:
    """Address of a row, or of the last row if it does not exist."""
    row = builder.select(builder.icmp_signed("<", row, last), row, last)
    return builder.add(base, builder.mul(builder.sext(row, I64), by_row))


def _make_load(rows_of: Callable[[int], list[int]], apart: int) -> Any:
    """load(base, by_row, row, last, count, chunks): `chunks` chunks, `apart` bytes apart, of rows row + n for n in rows_of(count).

    base: address of the first chunk in row 0. last: the last row that exists.
    """
    @intrinsic
    def load(typingctx: Any, base: Any, by_row: Any, row: Any, last: Any, count: Any, chunks: Any) -> Any:
        n, wide = literals(count, chunks)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            base, by_row, row, last = args[:4]
            words = []
            for offset in rows_of(n):
                at = _row(builder, base, by_row, builder.add(row, I32(offset)), last)
                for j in range(wide):
                    words += _load(builder, at, apart * j)
            return pack(builder, words)
        result = types.UniTuple(types.int32, 4 * len(rows_of(n)) * wide)
        return signature(result, types.uint64, types.int64, types.int32, types.int32, count, chunks), generate
    return load


# a lane's part of 8 * count rows of Q or K: `row` is the first row plus g, `base` that of chunk c
load_rows = _make_load(lambda count: [8 * t for t in range(count)], 64)
# of 16 * count rows of V: `row` is the first row plus 2 c, `base` that of chunk g
load_columns = _make_load(lambda count: [16 * u + k for u in range(count) for k in (0, 1, 8, 9)], 128)


def make_products(dtype: str) -> tuple[Any, Any]:
    """(qk, pv) for 16 rows.

    acc_s = qk(acc_s, q0, q1, k): q0, q1, k from load_rows; q0 and q1 are the lane's rows g and g + 8
    acc_o = pv(acc_o, p, v): p packed, v from load_columns. Columns of acc_o are permuted; store_output restores their order
    """
    @intrinsic
    def qk(typingctx: Any, acc: Any, q0: Any, q1: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, words = unpack(builder, args[0], acc.count), unpack(builder, args[3], k.count)
            first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
            for at in range(0, q0.count, 2):            # a step of 16 columns
                a = [first[at], second[at], first[at + 1], second[at + 1]]
                for t in range(acc.count // 4):
                    b = words[t * q0.count + at:t * q0.count + at + 2]
                    registers[4 * t:4 * t + 4] = multiply(builder, dtype, registers[4 * t:4 * t + 4], a, b)
            return pack(builder, registers)
        return signature(acc, acc, q0, q1, k), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
            wide = acc.count // 32                      # chunks of a row
            for u in range(p.count // 4):               # 16 keys
                rows = [words[(4 * u + r) * 4 * wide:(4 * u + r + 1) * 4 * wide] for r in range(4)]
                for tile in range(8 * wide):
                    word, selector = tile // 2, (0x7632 if tile % 2 else 0x5410)
                    b = [emit(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [rows[r][word], rows[r + 1][word]], False)
                         for r in (0, 2)]
                    registers[4 * tile:4 * tile + 4] = multiply(builder, dtype, registers[4 * tile:4 * tile + 4], a[4 * u:4 * u + 4], b)
            return pack(builder, registers)
        return signature(acc, acc, p, v), generate
    return qk, pv


@intrinsic
def store_output(typingctx: Any, acc: Any, address: Any, pitch: Any) -> Any:
    """Store acc_o of pv as float32 rows to shared memory. address: of column 16 c in the lane's row g. pitch: bytes between rows."""
    [row_bytes] = literals(pitch)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for h in range(acc.count // 32):
            for row in range(2):
                # columns 64 h + 16 c + i of O are column 2 c of MMA i, the eight after them column 2 c + 1
                values = [registers[4 * (8 * h + i) + 2 * row + column] for column in range(2) for i in range(8)]
                for at in range(0, 16, 4):
                    emit_store_shared_vector(builder, args[1], 8 * row * row_bytes + 256 * h + 4 * at, values[at:at + 4])
        return context.get_dummy_value()
    return signature(types.none, acc, types.int32, pitch), generate
