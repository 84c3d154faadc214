"""Fragments of the backward, which has scores transposed: a thread's rows are keys, its columns are queries.

So lse and delta belong to columns; bits of dropout are made for queries by keys and turned; dQ travels in pieces of 16 x 64 sums, 4 KB
that a warp writes and that are read in the order in which its lanes hold them.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int32, int64, uint32, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, VOID, emit, instruction, literals, pack, unpack
from ..dsl.inline import Compiled, inline
from ..ptx.arith import emit_abs, emit_exp2, emit_fma, emit_max, emit_min_nan, emit_product, reciprocal
from ..ptx.matrix import emit_transpose
from ..ptx.memory import emit_add_if, emit_load_pair, emit_load_shared_pair, emit_store_shared_vector, load_shared_b32, store_shared_b32
from ..ptx.sync import opaque, thread_index
from ..spec import FAR_LSE, Spec
from .dropout import philox
from .fragments import col_of, make_pack, row_of, scale_seen_rows, store_rows, store_whole_rows
from .smem import Smem

PIECE = 4096        # bytes of a piece: 8 groups of 8 columns, 16 bytes a lane in each


@intrinsic
def load_columns(typingctx: Any, address: Any, count: Any) -> Any:
    """The float32 of the columns of a fragment of `count` registers, from shared memory; address of that of the thread's first column."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [x for k in range(0, n, 4) for x in emit_load_shared_pair(builder, args[0], 8 * k)])
    return signature(types.UniTuple(types.float32, n // 2), types.int32, count), generate


def _minus(builder: Any, columns: Any, count: int) -> list[Any]:
    """Minus the number of the column of each of `count` registers."""
    values = unpack(builder, columns, count // 2)
    return [builder.fsub(F32(-0.0), values[k // 4 * 2 + k % 2]) for k in range(count)]


@intrinsic
def exp2_columns(typingctx: Any, acc: Any, scale: Any, columns: Any) -> Any:
    """exp2(acc * scale - x[column]), x by load_columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus(builder, args[2], acc.count)
        return pack(builder, [emit_exp2(builder, emit_fma(builder, x, args[1], y))
                              for x, y in zip(unpack(builder, args[0], acc.count), minus, strict=True)])
    return signature(acc, acc, types.float32, columns), generate


@intrinsic
def grad_scores(typingctx: Any, p: Any, dp: Any, factor: Any, columns: Any) -> Any:
    """p * (dp * factor - x[column]), x as in exp2_columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus(builder, args[3], p.count)
        return pack(builder, [builder.fmul(x, emit_fma(builder, y, args[2], z)) for x, y, z in
                              zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), minus, strict=True)])
    return signature(p, p, p, types.float32, columns), generate


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


# ---------------------------------------------------------------- far rows
# Their lse is too large for the one instruction that makes an exponent of a score: its product with log2(e), and the score's, are rounded.
# What that instruction gets instead is what gives the difference of score and lse, at most 0, and FAR_LSE, which is next to nothing. The
# score is rounded as the forward rounds a row's maximum, so that this has P = 1 where the sum had no room in lse.
def _emit_near(builder: Any, x: Any, scale: Any, inverse: Any, lse: Any, far: Any) -> Any:
    """x, or where `far` is true what is to be taken for it: (x * scale - lse) * inverse, at most 0. NaN stays NaN."""
    difference = builder.fsub(emit_product(builder, x, scale), lse)
    return builder.select(far, builder.fmul(emit_min_nan(builder, difference, F32(0.0)), inverse), x)


@intrinsic
def near_columns(typingctx: Any, acc: Any, scale: Any, inverse: Any, place: Any, address: Any) -> Any:
    """Scores with those of far columns changed. `place`: of the lse in units of log2 of the thread's first column in shared memory;
    `address`: of the lse itself in global memory."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, out = unpack(builder, args[0], acc.count), list[Any]()
        for k in range(0, acc.count, 4):
            far = [builder.fcmp_ordered("==", x, F32(FAR_LSE)) for x in emit_load_shared_pair(builder, args[3], 8 * k)]
            lse = emit_load_pair(builder, args[4], 8 * k)
            out += [_emit_near(builder, x, args[1], args[2], lse[n % 2], far[n % 2]) for n, x in enumerate(registers[k:k + 4])]
            emit(builder, VOID, "bar.warp.sync -1;", "~{memory}", [])       # one after the other: there are no registers for all
        return pack(builder, out)
    return signature(acc, acc, types.float32, types.float32, types.int32, types.uint64), generate


@intrinsic
def near_rows(typingctx: Any, acc: Any, scale: Any, inverse: Any, rows: Any, lses: Any) -> Any:
    """The same where rows are queries: `rows` and `lses`, of two each, are lse in units of log2 and lse itself."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        far = [builder.fcmp_ordered("==", x, F32(FAR_LSE)) for x in unpack(builder, args[3], 2)]
        lse = unpack(builder, args[4], 2)
        return pack(builder, [_emit_near(builder, x, args[1], args[2], lse[row_of(k) // 8], far[row_of(k) // 8])
                              for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.float32, types.float32, rows, lses), generate


def make_any_far(BLOCK_M: int) -> Any:
    """any_far(place): 1 where any of BLOCK_M rows is far, whose lse in units of log2 are at `place` in shared memory; else 0."""
    WORDS = BLOCK_M // 32
    letters = "abcd"[:WORDS]
    tests = "".join(f" setp.eq{'.or' * (k > 0)}.b32 p, {x}, 0x{np.float32(FAR_LSE).view(np.uint32):08X}{', p' * (k > 0)};"
                    for k, x in enumerate(letters))
    vector = f"ld.shared.v{WORDS}.b32 {{{', '.join(letters)}}}" if WORDS > 1 else "ld.shared.b32 a"
    any_far_word = instruction(f"{{ .reg .pred p; .reg .b32 {', '.join(letters)}; {vector}, [$1];{tests} vote.sync.any.pred p, p, -1; "
                               "selp.b32 $0, 1, 0, p; }", "r", "r")

    @inline
    def any_far(place):
        return any_far_word(int32(place + (thread_index() & 31) * (4 * WORDS)))
    return any_far


def make_near(spec: Spec) -> tuple[Any, Any]:
    """(near_columns, near_rows) without scale and inverse."""
    SCALED = spec.scaled

    @inline
    def factors(a):
        """From a score to units of lse, and from there to what gives an exponent of 2."""
        if SCALED:
            return float32(1), float32(1)
        else:
            return a.softmax_scale, reciprocal(a.softmax_scale)

    @inline
    def columns_near(a, acc, place, address):
        scale, inverse = factors(a)
        return near_columns(acc, scale, inverse, place, address)

    @inline
    def rows_near(a, acc, rows, lses):
        scale, inverse = factors(a)
        return near_rows(acc, scale, inverse, rows, lses)
    return columns_near, rows_near


# ---------------------------------------------------------------- of Hopper's kernels by keys
def make_kept_tile(spec: Spec, smem: Smem) -> tuple[Any, Any, Any]:
    """keep_tile(base, n_block, head_k, batch, k_start, used, keys, q_start), by one thread at the start, and kept_tile(base), which gives
    all but the last back at the end: the loop between has no registers for them.

    kept_q_start(base) gives that one. The first `used` of the sequence's `keys` take part: all, if dense.
    """
    PACKED = spec.packed
    PLACE = smem.take(28 if PACKED else 24, 4)

    @inline
    def keep_tile(base, n_block, head_k, batch, k_start, used, keys, q_start):
        store_shared_b32(base + PLACE, n_block)
        store_shared_b32(base + PLACE + 4, head_k)
        store_shared_b32(base + PLACE + 8, batch)
        store_shared_b32(base + PLACE + 12, k_start)
        store_shared_b32(base + PLACE + 16, keys)
        store_shared_b32(base + PLACE + 20, q_start)
        if PACKED:
            store_shared_b32(base + PLACE + 24, used)

    @inline
    def kept_tile(base):
        keys = load_shared_b32(base + PLACE + 16)
        used = load_shared_b32(base + PLACE + 24) if PACKED else keys
        return (load_shared_b32(base + PLACE), load_shared_b32(base + PLACE + 4), load_shared_b32(base + PLACE + 8),
                load_shared_b32(base + PLACE + 12), used, keys)

    @inline
    def kept_q_start(base):
        return load_shared_b32(base + PLACE + 20)
    return keep_tile, kept_tile, kept_q_start


def make_store(spec: Spec, DIM: int) -> Any:
    """store(acc, pointer, by_row, dim, lane, key, used, end): 16 rows a warp of dK or dV, `dim` of DIM columns, those below `end`. Keys
    from `used` on get 0, selected: their rows of K and V, which took part in the products, may hold anything."""
    PACKED, to_half = spec.packed, make_pack(spec.dtype)

    @inline
    def store(acc, pointer, by_row, dim, lane, key, used, end):
        if PACKED:
            acc = scale_seen_rows(acc, float32(1) if key < used else float32(0), float32(1) if key + 8 < used else float32(0))
        packed, col = to_half(acc), int32((lane & 3) * 2)
        address = uint64(pointer + key * by_row + 2 * col)
        next_row = uint64(address + uint64(8 * by_row))
        rows0, rows1 = int32(1) if key < end else int32(0), int32(1) if key + 8 < end else int32(0)
        if dim == DIM:
            store_whole_rows(packed, address, next_row, rows0, rows1, lane)
        else:
            store_rows(packed, address, next_row, rows0, rows1, int32(dim - col))
    return store


def make_add_dbias(spec: Spec) -> Any:
    """add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k): dS to the sums of dbias, whose keys are side by side: eight lanes
    fill a sector. Fields: sums sums_batch sums_head sums_row."""
    PACKED = spec.packed

    @inline
    def add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k):
        if PACKED:
            seqlen_q, seqlen_k = int32(min(seqlen_q, a.seqlen_q)), int32(min(seqlen_k, a.seqlen_k))
        at = uint64(int64(a.sums) + batch * a.sums_batch + head * a.sums_head + int64(query) * a.sums_row + 4 * key)
        limit0 = int32(seqlen_q - query) if key < seqlen_k else int32(0)
        limit1 = int32(seqlen_q - query) if key + 8 < seqlen_k else int32(0)
        add_elements(acc_ds, at, uint64(at + uint64(32)), int64(opaque(a.sums_row)), limit0, limit1)     # opaque: no register a column
    return add_dbias


# ---------------------------------------------------------------- dropout
def make_draw(COUNT: int) -> Any:
    """words = draw(query16, key16, lane, plane, offset, key0, key1): what philox.py draws for a transposed fragment of COUNT registers, 16
    bits each; those of register 2 j are the lower half of word j. One Philox call gives 16 x 16 pairs; movmatrix turns its words."""
    @intrinsic
    def draw(typingctx: Any, query16: Any, key16: Any, lane: Any, plane: Any, offset: Any, key0: Any, key1: Any) -> Any:
        random = Compiled(philox, (types.uint32,) * 6, types.UniTuple(types.uint32, 4))

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            query16, key16, lane, plane, offset, key0, key1 = args
            column = builder.add(builder.shl(key16, I32(2)), builder.and_(lane, I32(3)))
            words = []
            for piece in range(COUNT // 8):
                row = builder.add(builder.shl(builder.add(query16, I32(piece)), I32(3)), builder.lshr(lane, I32(2)))
                drawn = random.call(builder, [row, column, plane, offset, key0, key1])
                words += [emit_transpose(builder, x) for x in unpack(builder, drawn, 4)]
            return pack(builder, words)
        return signature(types.UniTuple(types.int32, COUNT // 2), *[types.int32] * 4, *[types.uint32] * 3), generate
    return draw


@intrinsic
def mark_dropped(typingctx: Any, p: Any, words: Any, threshold: Any) -> Any:
    """-p where the draw is below the threshold, which is in the upper half of its word."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words_, out = unpack(builder, args[1], words.count), []
        for k, x in enumerate(unpack(builder, args[0], p.count)):
            lane16 = words_[k // 2] if k % 2 else builder.shl(words_[k // 2], I32(16))
            out.append(builder.select(builder.icmp_unsigned(">=", lane16, args[2]), x, builder.fsub(F32(-0.0), x)))
        return pack(builder, out)
    return signature(p, p, words, types.uint32), generate


@intrinsic
def grad_marked(typingctx: Any, p: Any, dp: Any, factor: Any, columns: Any) -> Any:
    """grad_scores where p may be marked: |p| * ((0 where p < 0, else dp * factor) - x[column])."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus, out = _minus(builder, args[3], p.count), []
        for x, y, z in zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), minus, strict=True):
            rest = builder.fmul(emit_abs(builder, x), z)
            out.append(emit_fma(builder, emit_max(builder, x, F32(0.0)), builder.fmul(y, args[2]), rest))
        return pack(builder, out)
    return signature(p, p, p, types.float32, columns), generate


def make_dropout_transposed(spec: Spec, COUNT: int) -> tuple[Any, Any, Any, Any]:
    """(draw, mark, pack_kept, grad): probabilities, never negative, carry in their sign what dropout drops, which costs no registers and
    little arithmetic.

    words = draw(a, key, query, plane)      `key` and `query` the thread's first
    p = mark(a, p, words)                   negative where the definition in philox.py drops
    half = pack_kept(p)                     rounded to 16 bits, 0 where dropped; the 1 / (1 - dropout_p) is left for later
    acc_ds = grad(a, p, acc_dp, deltas)     grad_scores of what is kept; deltas by load_columns
    """
    pack_kept = make_pack(spec.dtype, positive=spec.dropout)
    if not spec.dropout:
        @inline
        def no_words(a, key, query, plane):
            return int32(0)

        @inline
        def unmarked(a, p, words):
            return p

        @inline
        def grad_all(a, p, acc_dp, deltas):
            return grad_scores(p, acc_dp, float32(1), deltas)
        return no_words, unmarked, pack_kept, grad_all
    draw_words = make_draw(COUNT)

    @inline
    def draw(a, key, query, plane):
        lane = int32(((key & 7) << 2) | ((query & 7) >> 1))
        return draw_words(int32(query >> 4), int32(key >> 4), lane, plane, uint32(a.offset), a.seed_low, a.seed_high)

    @inline
    def mark(a, p, words):
        return mark_dropped(p, words, a.threshold)

    @inline
    def grad(a, p, acc_dp, deltas):
        return grad_marked(p, acc_dp, a.keep_scale, deltas)
    return draw, mark, pack_kept, grad
