"""Fragments of the backward, which has scores transposed: a thread's rows are keys, its columns are queries.

So lse and delta belong to columns; bits of dropout are made for queries by keys and turned; dQ travels in pieces of 16 x 64 sums, 4 KB
that a warp writes and that are read in the order in which its lanes hold them.
"""
from __future__ import annotations

from typing import Any

from numba import int32, uint32
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from .dropout import philox
from .fragments import call_scalar, col_of, row_of
from .inline import inline
from .ptx.arith import emit_exp2, emit_fma
from .ptx.asm import F32, I32, I64, pack, unpack
from .ptx.matrix import emit_transpose
from .ptx.memory import emit_add_if, emit_load_shared_pair, emit_store_shared_vector
from .spec import Spec

PIECE = 4096        # bytes of a piece: 8 groups of 8 columns, 16 bytes a lane in each


def _minus_columns(builder: Any, address: Any, count: int) -> list[Any]:
    """Minus the float32 of the column of each of `count` registers, from shared memory."""
    pairs = [emit_load_shared_pair(builder, address, 8 * k) for k in range(0, count, 4)]
    return [builder.fsub(F32(-0.0), pairs[k // 4][k % 2]) for k in range(count)]


@intrinsic
def exp2_columns(typingctx: Any, acc: Any, scale: Any, address: Any) -> Any:
    """exp2(acc * scale - x[column]), x float32 in shared memory; address of that of the thread's first column."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus_columns(builder, args[2], acc.count)
        return pack(builder, [emit_exp2(builder, emit_fma(builder, x, args[1], y))
                              for x, y in zip(unpack(builder, args[0], acc.count), minus, strict=True)])
    return signature(acc, acc, types.float32, types.int32), generate


@intrinsic
def grad_scores(typingctx: Any, p: Any, dp: Any, factor: Any, address: Any) -> Any:
    """p * (dp * factor - x[column]), x as in exp2_columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus_columns(builder, args[3], p.count)
        return pack(builder, [builder.fmul(x, emit_fma(builder, y, args[2], z)) for x, y, z in
                              zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), minus, strict=True)])
    return signature(p, p, p, types.float32, types.int32), generate


@intrinsic
def multiply(typingctx: Any, acc: Any, other: Any) -> Any:
    """acc * other, both float32 fragments."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.fmul(x, y) for x, y in
                              zip(unpack(builder, args[0], acc.count), unpack(builder, args[1], acc.count), strict=True)])
    return signature(acc, acc, acc), generate


@intrinsic
def store_piece(typingctx: Any, acc: Any, address: Any) -> Any:
    """A fragment of 16 x 64 sums to a piece in shared memory; the lane's first address."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for j in range(0, acc.count, 4):
            emit_store_shared_vector(builder, args[1], 128 * j, registers[j:j + 4])
        return context.get_dummy_value()
    return signature(types.none, acc, types.int32), generate


@intrinsic
def add_elements(typingctx: Any, acc: Any, pointer0: Any, pointer1: Any, stride: Any, limit0: Any, limit1: Any) -> Any:
    """Adds a fragment to float32 numbers in global memory: the converse of fragments.make_gather, with the same arguments."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for k, x in enumerate(unpack(builder, args[0], acc.count)):
            row, column = row_of(k) // 8, col_of(k)
            keep = builder.zext(builder.icmp_signed("<", I32(column), args[4 + row]), I32)
            emit_add_if(builder, keep, builder.add(args[1 + row], builder.mul(args[3], I64(column))), x)
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, types.uint64, types.int64, types.int32, types.int32), generate


# ---------------------------------------------------------------- dropout
def _make_keep(COUNT: int) -> tuple[Any, Any]:
    @intrinsic
    def draw(typingctx: Any, query16: Any, key16: Any, lane: Any, plane: Any, offset: Any, key0: Any, key1: Any, threshold: Any) -> Any:
        n = COUNT // 8
        sig = signature(types.UniTuple(types.uint32, 4), *[types.uint32] * 6)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            query16, key16, lane, plane, offset, key0, key1, threshold = args
            call = call_scalar(context, builder, philox, sig)
            column = builder.add(builder.shl(key16, I32(2)), builder.and_(lane, I32(3)))
            words = []
            for piece in range(n):
                row = builder.add(builder.shl(builder.add(query16, I32(piece)), I32(3)), builder.lshr(lane, I32(2)))
                random = [emit_transpose(builder, x) for x in unpack(builder, call([row, column, plane, offset, key0, key1]), 4)]
                bits = I32(0)
                for k in range(8):
                    word = random[k // 4 * 2 + row_of(k) // 8]
                    lane16 = word if k % 2 else builder.shl(word, I32(16))
                    keep = builder.icmp_unsigned(">=", lane16, threshold)
                    bits = builder.or_(bits, builder.select(keep, I32(1 << k), I32(0)))
                words.append(bits)
            packed = []
            for j in range(0, n, 4):
                whole = words[j]
                for i, bits in enumerate(words[j + 1:j + 4], 1):
                    whole = builder.or_(whole, builder.shl(bits, I32(8 * i)))
                packed.append(whole)
            return pack(builder, packed)
        return signature(types.UniTuple(types.int32, -(-n // 4)), *[types.int32] * 4, *[types.uint32] * 4), generate

    @intrinsic
    def keep(typingctx: Any, acc: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words, out = unpack(builder, args[1], bits.count), []
            for k, x in enumerate(unpack(builder, args[0], acc.count)):
                bit = builder.and_(words[k // 32], I32(1 << (k % 32)))
                out.append(builder.select(builder.icmp_unsigned("!=", bit, I32(0)), x, F32(0.0)))
            return pack(builder, out)
        return signature(acc, acc, bits), generate
    return draw, keep


def make_dropout_transposed(spec: Spec, COUNT: int) -> tuple[Any, Any]:
    """(draw, drop): bits = draw(a, key, query, plane), `key` and `query` the thread's first; acc = drop(acc, bits) is 0 where the
    definition in philox.py drops. One Philox call gives 16 x 16 pairs; movmatrix turns its words."""
    if not spec.dropout:
        @inline
        def no_bits(a, key, query, plane):
            return int32(0)

        @inline
        def nothing(acc, bits):
            return acc
        return no_bits, nothing
    draw_bits, keep = _make_keep(COUNT)

    @inline
    def draw(a, key, query, plane):
        lane = int32(((key & 7) << 2) | ((query & 7) >> 1))
        return draw_bits(int32(query >> 4), int32(key >> 4), lane, plane, uint32(a.offset), a.seed_low, a.seed_high, a.threshold)

    @inline
    def drop(acc, bits):
        return keep(acc, bits)
    return draw, drop
