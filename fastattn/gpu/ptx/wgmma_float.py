"""Products for Hopper whose float32 A operand is split in registers: Q lies in shared memory as float32, K and V as parts (parts.py).

Q is kept in groups of eight columns, 32 bytes. Of each four groups of row r, group j is in place j ^ (r % 4): then the eight bytes that the
lanes of a half-warp load at a time, of four rows, lie in different banks.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, VOID, emit, instruction, literals, pack, unpack
from .memory import emit_load16_if, emit_load_shared_pair
from .parts import PAIRS, PART_DTYPE, PARTS, SWAPPED, emit_parts
from .wgmma import _multiply

GROUPS = 4                  # of 32 bytes that change places with each other: two steps of an MMA
CHUNK_BYTES = 32 * GROUPS   # of a row of Q: 32 columns
# copy16(to, source, bytes): asynchronous; of 16 bytes (4 bytes) those past `bytes` are not read and are 0
copy16_if = instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "rlr")
copy4_if = instruction("cp.async.ca.shared.global [$0], [$1], 4, $2;", "rlr")


@intrinsic
def load_parts(typingctx: Any, address: Any, turn: Any, row_bytes: Any) -> Any:
    """The parts of 32 columns of rows r and r + 8 of Q, as A operands of two steps: the four registers of each part, step after step.

    address: of the lane's two columns in place 0 of row r; row r + 8 is 8 * `row_bytes` further. turn: 32 * (r % 4).
    """
    [row] = literals(row_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = [builder.add(args[0], builder.xor(args[1], I32(32 * j))) for j in range(GROUPS)]
        registers = []
        for step in range(2):
            words = [emit_parts(builder, *emit_load_shared_pair(builder, places[2 * step + half], 8 * row * below))
                     for half in (0, 1) for below in (0, 1)]
            registers += [word[part] for part in range(PARTS) for word in words]
        return pack(builder, registers)
    return signature(types.UniTuple(types.int32, 2 * 4 * PARTS), types.int32, types.int32, row_bytes), generate


@intrinsic
def qk(typingctx: Any, acc: Any, a: Any, b: Any, part_bytes: Any) -> Any:
    """acc (64 x N) = A B^T over 32 columns, small products first. a: load_parts's. b: descriptor of the first part of B (N x 32, K-major),
    of which parts are `part_bytes` apart."""
    [apart] = literals(part_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, rows = unpack(builder, args[0], acc.count), unpack(builder, args[1], a.count)
        for n, (part_a, part_b) in enumerate(PAIRS):
            for step in range(2):
                first, at = 4 * (PARTS * step + part_a), builder.add(args[2], I64((part_b * apart + 32 * step) >> 4))
                registers = _multiply(builder, PART_DTYPE, registers, rows[first:first + 4], at, n + step == 0, (0, 0))
        return pack(builder, registers)
    return signature(acc, acc, a, types.uint64, part_bytes), generate



@intrinsic
def kq_chunks(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, first: Any, end: Any, rows: Any) -> Any:
    """A B^T of parts in shared memory, K-major, in panels of `rows` rows and of `depth` columns in all, over columns [first, end). For
    each 32 columns a product of its own, one after the other in acc: their sum in this order has the bits of that of qk's, of B and A."""
    d, start, stop, of_panel = literals(depth, first, end, rows)
    chunks = range(start // 16, min(stop, d) // 16, 2)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, out, panels = unpack(builder, args[0], acc.count), list[Any](), -(-d // 64)
        for step in chunks:
            chunk = registers[len(out):][:acc.count // len(chunks)]
            for n, pair in enumerate(SWAPPED):
                for k in range(step, min(step + 2, d // 16)):
                    at = [builder.add(x, I64(((part * panels + k // 4) * of_panel * 128 + k % 4 * 32) >> 4))
                          for x, part in zip(args[1:3], pair, strict=True)]
                    chunk = _multiply(builder, PART_DTYPE, chunk, at[:1], at[1], n + k == step, (0, 0))
            out += chunk
        return pack(builder, out)
    return signature(acc, acc, types.uint64, types.uint64, depth, first, end, rows), generate


@intrinsic
def load_lines(typingctx: Any, source: Any, by_row: Any, rows: Any, columns: Any, first: Any, count: Any) -> Any:
    """Eight columns of each of `count` rows of float32 in memory, from row 16 * `first` on, 16 rows and by_row bytes a row from each other.
    Rows from `rows` on and columns from `columns` on, counted from those of `source`, are not read and are 0."""
    start, n = literals(first, count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, step = [], builder.mul(args[1], I64(16))
        at = builder.add(args[0], builder.mul(step, I64(start)))
        for row in range(start, start + n):
            inside = builder.icmp_signed("<", I32(16 * row), args[2])
            for half in (0, 1):
                there = builder.and_(inside, builder.icmp_signed("<", I32(4 * half), args[3]))
                registers += [builder.bitcast(x, F32) for x in emit_load16_if(builder, there, builder.add(at, I64(16 * half)))]
            at = builder.add(at, step)
        return pack(builder, registers)
    return signature(types.UniTuple(types.float32, 8 * n), types.uint64, types.int64, types.int32, types.int32, first, count), generate


@intrinsic
def store_lines(typingctx: Any, x: Any, address: Any, part_bytes: Any, first: Any) -> Any:
    """Store the parts of load_lines's rows to a panel of shared memory for each part, `part_bytes` from each other. address: of the eight
    columns in row 0. 16 rows on, the swizzle is the same."""
    apart, start = literals(part_bytes, first)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = unpack(builder, args[0], x.count)
        for row in range(x.count // 8):
            pairs = [emit_parts(builder, numbers[k], numbers[k + 1]) for k in range(8 * row, 8 * row + 8, 2)]
            for part in range(PARTS):
                text = f"st.shared.v4.b32 [$0+{part * apart + (start + row) * 16 * 128}], {{$1, $2, $3, $4}};"
                emit(builder, VOID, text, "r,r,r,r,r,~{memory}", [args[1], *(words[part] for words in pairs)])
        return context.get_dummy_value()
    return signature(types.none, x, types.int32, part_bytes, first), generate
