"""Fragments of the backward. Its scores are transposed: a thread's rows are keys, its columns are queries.

So lse and delta belong to columns. Random bits of dropout are drawn for queries by keys and transposed. Sums of dQ are stored in pieces
of 16 rows in groups of 8 columns, 512 bytes each, in the order in which a warp's lanes hold them.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import float32, int32, int64, uint32, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, VOID, emit, instruction, literals, pack, unpack
from ..dsl.inline import Compiled, inline
from ..ptx.arith import emit_abs, emit_exp2, emit_fma, emit_max, emit_min_nan, emit_product, reciprocal
from ..ptx.matrix import emit_transpose
from ..ptx.memory import (
    emit_add_if,
    emit_load_pair,
    emit_load_shared_pair,
    emit_store_cluster_vector,
    emit_store_pair_if,
    emit_store_shared_vector,
    load_shared_b32,
    store_shared_b32,
)
from ..ptx.sync import opaque, thread_index
from ..spec import FAR_LSE, Spec
from .dropout import no_plane, philox, plane_of
from .fragments import col_of, make_pack, row_of, scale_seen_rows, thread_col
from .parked import parked
from .smem import PANEL, Smem
from .stores import store_floats, store_rows, store_whole_rows

PIECE = 4096        # bytes of the largest piece, 64 columns
COLUMN_BYTES = 64   # of a column of a piece: 16 rows of float32


@intrinsic
def load_columns(typingctx: Any, address: Any, count: Any) -> Any:
    """Load one float32 per column of a `count`-register fragment from shared memory. `address`: the value of the thread's first column."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [x for k in range(0, n, 4) for x in emit_load_shared_pair(builder, args[0], 8 * k)])
    return signature(types.UniTuple(types.float32, n // 2), types.int32, count), generate


def _minus(builder: Any, columns: Any, count: int) -> list[Any]:
    """For each of `count` registers minus its column's value."""
    values = unpack(builder, columns, count // 2)
    return [builder.fsub(F32(-0.0), values[k // 4 * 2 + k % 2]) for k in range(count)]


@intrinsic
def exp2_columns(typingctx: Any, acc: Any, scale: Any, columns: Any) -> Any:
    """exp2(acc * scale - x[column]); `columns` are x, from load_columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus(builder, args[2], acc.count)
        return pack(builder, [emit_exp2(builder, emit_fma(builder, x, args[1], y))
                              for x, y in zip(unpack(builder, args[0], acc.count), minus, strict=True)])
    return signature(acc, acc, types.float32, columns), generate


@intrinsic
def grad_scores(typingctx: Any, p: Any, dp: Any, factor: Any, columns: Any) -> Any:
    """p * (dp * factor - x[column]); `columns` are x, from load_columns."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = _minus(builder, args[3], p.count)
        return pack(builder, [builder.fmul(x, emit_fma(builder, y, args[2], z)) for x, y, z in
                              zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), minus, strict=True)])
    return signature(p, p, p, types.float32, columns), generate


def make_grad_rounded(dtype: str) -> Any:
    """grad_rounded(p_half, dp, columns): p * (dp - x[column]) of P as the MMA of dV has it, packed and rounded to `dtype`."""
    @intrinsic
    def grad_rounded(typingctx: Any, p: Any, dp: Any, columns: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            minus, words = _minus(builder, args[2], dp.count), unpack(builder, args[0], p.count)
            values = [x for word in words for x in emit_widen(builder, word, dtype)]
            return pack(builder, [builder.fmul(x, builder.fadd(y, z)) for x, y, z in
                                  zip(values, unpack(builder, args[1], dp.count), minus, strict=True)])
        return signature(dp, p, dp, columns), generate
    return grad_rounded


def emit_widen(builder: Any, word: Any, dtype: str) -> tuple[Any, Any]:
    """The two float32 of a word of 16-bit numbers."""
    if dtype == "bfloat16":
        return builder.bitcast(builder.shl(word, I32(16)), F32), builder.bitcast(builder.and_(word, I32(-65536)), F32)
    text = "{{ .reg .b16 low, high; mov.b32 {{low, high}}, $1; cvt.f32.f16 $0, {}; }}"
    low, high = (emit(builder, F32, text.format(half), "=f,r", [word], side_effect=False) for half in ("low", "high"))
    return low, high


@intrinsic
def multiply(typingctx: Any, acc: Any, other: Any) -> Any:
    """acc * other, both float32 fragments."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.fmul(x, y) for x, y in
                              zip(unpack(builder, args[0], acc.count), unpack(builder, args[1], acc.count), strict=True)])
    return signature(acc, acc, acc), generate


@intrinsic
def store_piece(typingctx: Any, acc: Any, address: Any) -> Any:
    """Store a fragment of 16 rows of sums as a piece in shared memory. `address`: the lane's first."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for j in range(0, acc.count, 4):
            emit_store_shared_vector(builder, args[1], 128 * j, registers[j:j + 4])
        return context.get_dummy_value()
    return signature(types.none, acc, types.int32), generate


@intrinsic
def send_piece(typingctx: Any, acc: Any, address: Any) -> Any:
    """store_piece in the shared memory of any block of the cluster. `address`: one of cluster.address_in."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for j in range(0, acc.count, 4):
            emit_store_cluster_vector(builder, args[1], 128 * j, registers[j:j + 4])
        return context.get_dummy_value()
    return signature(types.none, acc, types.int32), generate


@intrinsic
def add_piece(typingctx: Any, acc: Any, address: Any) -> Any:
    """acc + what store_piece stored of a fragment of the same size."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        stored = [x for j in range(0, acc.count, 4) for half in (0, 8) for x in emit_load_shared_pair(builder, args[1], 128 * j + half)]
        return pack(builder, [builder.fadd(x, y) for x, y in zip(unpack(builder, args[0], acc.count), stored, strict=True)])
    return signature(acc, acc, types.int32), generate


def make_piece_of(HEAD_DIM: int, BLOCK_M: int) -> Any:
    """piece_of(w, thread) -> (offset, bytes) of a warp's piece in the sums of dQ of a step.

    The two warpgroups share a step of 128 rows by rows. One of 64 rows they share by columns: 64 and the rest, or half each. A band of
    16 rows by HEAD_DIM columns is contiguous in memory.
    """
    BAND, FIRST = COLUMN_BYTES * HEAD_DIM, min(PANEL, HEAD_DIM if HEAD_DIM > PANEL else HEAD_DIM // 2)

    @inline
    def piece_of(w, thread):
        number = int32(thread >> 5)
        if BLOCK_M == 128:
            return int32((w * 4 + number) * BAND), int32(BAND)
        else:
            size = int32(COLUMN_BYTES * FIRST if w == 0 or HEAD_DIM == 2 * FIRST else COLUMN_BYTES * (HEAD_DIM - FIRST))
            return int32(number * BAND + w * (COLUMN_BYTES * FIRST)), size
    return piece_of


@intrinsic
def add_elements(typingctx: Any, acc: Any, pointer0: Any, pointer1: Any, stride: Any, limit0: Any, limit1: Any) -> Any:
    """Add a fragment atomically to float32 in global memory. Arguments as in fragments.make_gather."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for k, x in enumerate(unpack(builder, args[0], acc.count)):
            row, column = row_of(k) // 8, col_of(k)
            keep = builder.zext(builder.icmp_signed("<", I32(column), args[4 + row]), I32)
            emit_add_if(builder, keep, builder.add(args[1 + row], builder.mul(args[3], I64(column))), x)
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, types.uint64, types.int64, types.int32, types.int32), generate


# ---------------------------------------------------------------- far rows
# P = exp2(score * scale - lse in units of log2) is one FMA and one ex2. A far row's lse is so large that the rounding of both terms would
# change P. There the difference of score and lse is computed first, at most 0. It replaces the score, and FAR_LSE, which is almost 0,
# replaces the lse. The score is rounded as the forward rounds a row's maximum. So P is exactly 1 where it has to be: where the
# lse is the maximum itself, because log(sum) is below its precision.
# Kernels look for FAR_LSE in each step. Hopper's main loop at head_dim 128 has no room for that: it looks once, for the mark that the
# preprocess gives a call with far rows, and such a call has a loop of its own (config.apart).
def _emit_near(builder: Any, x: Any, scale: Any, inverse: Any, lse: Any, far: Any) -> Any:
    """x, or if `far` min((x * scale - lse) * inverse, 0). NaN stays NaN."""
    difference = builder.fsub(emit_product(builder, x, scale), lse)
    return builder.select(far, builder.fmul(emit_min_nan(builder, difference, F32(0.0)), inverse), x)


@intrinsic
def near_columns(typingctx: Any, acc: Any, scale: Any, inverse: Any, log2_address: Any, lse_address: Any) -> Any:
    """Replace the scores of far columns. log2_address: shared address of the first column's lse in units of log2. lse_address: global
    (uint64) or shared address of its lse."""
    load_lse = emit_load_pair if lse_address == types.uint64 else emit_load_shared_pair

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, out = unpack(builder, args[0], acc.count), list[Any]()
        for k in range(0, acc.count, 4):
            far = [builder.fcmp_ordered("==", x, F32(FAR_LSE)) for x in emit_load_shared_pair(builder, args[3], 8 * k)]
            lse = load_lse(builder, args[4], 8 * k)
            out += [_emit_near(builder, x, args[1], args[2], lse[n % 2], far[n % 2]) for n, x in enumerate(registers[k:k + 4])]
            emit(builder, VOID, "bar.warp.sync -1;", "~{memory}", [])       # a scheduling fence: registers for one pair at a time
        return pack(builder, out)
    return signature(acc, acc, types.float32, types.float32, types.int32, lse_address), generate


@intrinsic
def near_rows(typingctx: Any, acc: Any, scale: Any, inverse: Any, rows: Any, lses: Any) -> Any:
    """near_columns for fragments whose rows are queries. rows: the two lse in units of log2. lses: the two lse."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        far = [builder.fcmp_ordered("==", x, F32(FAR_LSE)) for x in unpack(builder, args[3], 2)]
        lse = unpack(builder, args[4], 2)
        return pack(builder, [_emit_near(builder, x, args[1], args[2], lse[row_of(k) // 8], far[row_of(k) // 8])
                              for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.float32, types.float32, rows, lses), generate


def make_any_far(BLOCK_M: int) -> Any:
    """any_far(address): 1 if any of BLOCK_M rows is far, else 0. `address`: shared address of their lse in units of log2."""
    WORDS, LANES = max(BLOCK_M // 32, 1), min(BLOCK_M, 32)
    letters = "abcd"[:WORDS]
    tests = "".join(f" setp.eq{'.or' * (k > 0)}.b32 p, {x}, 0x{np.float32(FAR_LSE).view(np.uint32):08X}{', p' * (k > 0)};"
                    for k, x in enumerate(letters))
    vector = f"ld.shared.v{WORDS}.b32 {{{', '.join(letters)}}}" if WORDS > 1 else "ld.shared.b32 a"
    any_far_word = instruction(f"{{ .reg .pred p; .reg .b32 {', '.join(letters)}; {vector}, [$1];{tests} vote.sync.any.pred p, p, -1; "
                               "selp.b32 $0, 1, 0, p; }", "r", "r")

    @inline
    def any_far(address):
        return any_far_word(int32(address + (thread_index() & (LANES - 1)) * (4 * WORDS)))
    return any_far


def make_near(spec: Spec) -> tuple[Any, Any]:
    """(columns_near, rows_near): near_columns and near_rows with the Spec's scale and inverse."""
    SCALED = spec.scaled

    @inline
    def factors(a):
        """(factor from acc_s to units of lse, its inverse)."""
        if SCALED:
            return float32(1), float32(1)
        else:
            return a.softmax_scale, reciprocal(a.softmax_scale)

    @inline
    def columns_near(a, acc, log2_address, lse_address):
        scale, inverse = factors(a)
        return near_columns(acc, scale, inverse, log2_address, lse_address)

    @inline
    def rows_near(a, acc, rows, lses):
        scale, inverse = factors(a)
        return near_rows(acc, scale, inverse, rows, lses)
    return columns_near, rows_near


# ---------------------------------------------------------------- for Hopper's kernels that own keys
class KeptTile(NamedTuple):
    """A tile of keys. The first `used` of the sequence's `keys` keys are attended: all, if the problem is dense."""

    n_block: Any
    head_k: Any
    batch: Any
    k_start: Any
    used: Any
    keys: Any


def make_kept_tile(spec: Spec, smem: Smem) -> tuple[Any, Any, Any]:
    """(keep_tile, kept_tile, kept_q_start): a tile's words, parked in shared memory during the main loop.

    keep_tile(base, n_block, head_k, batch, k_start, used, keys, q_start): by one thread, before the loop
    kept_tile(base) -> KeptTile: after the loop
    kept_q_start(base)
    """
    PACKED = spec.packed
    words = parked(smem, 7 if PACKED else 6)
    N_BLOCK, HEAD_K, BATCH, K_START, KEYS, Q_START = words[:6]
    USED = words[6] if PACKED else KEYS

    @inline
    def keep_tile(base, n_block, head_k, batch, k_start, used, keys, q_start):
        store_shared_b32(base + N_BLOCK, n_block)
        store_shared_b32(base + HEAD_K, head_k)
        store_shared_b32(base + BATCH, batch)
        store_shared_b32(base + K_START, k_start)
        store_shared_b32(base + KEYS, keys)
        store_shared_b32(base + Q_START, q_start)
        if PACKED:
            store_shared_b32(base + USED, used)

    @inline
    def kept_tile(base):
        keys = load_shared_b32(base + KEYS)
        used = load_shared_b32(base + USED) if PACKED else keys
        return KeptTile(load_shared_b32(base + N_BLOCK), load_shared_b32(base + HEAD_K), load_shared_b32(base + BATCH),
                        load_shared_b32(base + K_START), used, keys)

    @inline
    def kept_q_start(base):
        return load_shared_b32(base + Q_START)
    return keep_tile, kept_tile, kept_q_start


@intrinsic
def store_numbers(typingctx: Any, acc: Any, address0: Any, address1: Any, keep0: Any, keep1: Any) -> Any:
    """Store a fragment of 16 rows as float32: address0 of the thread's first two numbers, address1 of those 8 rows below."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for k in range(0, acc.count, 2):
            row = row_of(k) // 8
            emit_store_pair_if(builder, args[3 + row], builder.add(args[1 + row], I64(4 * col_of(k))), registers[k], registers[k + 1])
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, types.uint64, types.int32, types.int32), generate


@intrinsic
def without_last(typingctx: Any, packed: Any) -> Any:
    """A packed fragment without its last 8 columns."""
    n = packed.count - 2

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, unpack(builder, args[0], packed.count)[:n])
    return signature(types.UniTuple(packed.dtype, n), packed), generate


def make_store(spec: Spec, DIM: int) -> Any:
    """store(acc, pointer, by_row, dim, lane, key, used, end): a warp's 16 rows of dK or dV, `dim` of DIM columns, rows below `end`.

    Rows from `used` on become 0, by a select: their K and V took part in the MMAs and may hold anything, NaN included. The float32 of
    spec.group_parts have room for all DIM columns.
    """
    PACKED, to_half = spec.packed, make_pack(spec.dtype)
    if spec.group_parts:
        @inline
        def store_part(acc, pointer, by_row, dim, lane, key, used, end):
            address = uint64(pointer + key * by_row + 4 * thread_col(lane))
            rows0, rows1 = int32(1) if key < end else int32(0), int32(1) if key + 8 < end else int32(0)
            store_numbers(acc, address, uint64(address + uint64(8 * by_row)), rows0, rows1)
        return store_part
    SIZE = 4 if spec.out_dtype == "float32" else 2

    @inline
    def store(acc, pointer, by_row, dim, lane, key, used, end):
        if PACKED:
            acc = scale_seen_rows(acc, float32(1) if key < used else float32(0), float32(1) if key + 8 < used else float32(0))
        packed, col = to_half(acc), thread_col(lane)
        address = uint64(pointer + key * by_row + SIZE * col)
        next_row = uint64(address + uint64(8 * by_row))
        rows0, rows1 = int32(1) if key < end else int32(0), int32(1) if key + 8 < end else int32(0)
        if SIZE == 4:
            store_floats(acc, address, next_row, int64(4), rows0, rows1, int32(dim - col), 1)
        elif dim == DIM:
            store_whole_rows(packed, address, next_row, rows0, rows1, lane)
        elif dim == DIM - 8:
            store_whole_rows(without_last(packed), address, next_row, rows0, rows1, lane)
        else:
            store_rows(packed, address, next_row, rows0, rows1, int32(dim - col))
    return store


def make_add_dbias(spec: Spec) -> Any:
    """add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k): add dS atomically to the sums of dbias.

    Neighbouring keys are contiguous in the sums, so that eight lanes fill a 32-byte sector. Arguments: sums sums_batch sums_head sums_row.
    """
    PACKED = spec.packed

    @inline
    def add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k):
        if PACKED:
            seqlen_q, seqlen_k = int32(min(seqlen_q, a.seqlen_q)), int32(min(seqlen_k, a.seqlen_k))
        at = uint64(int64(a.sums) + batch * a.sums_batch + head * a.sums_head + int64(query) * a.sums_row + 4 * key)
        limit0 = int32(seqlen_q - query) if key < seqlen_k else int32(0)
        limit1 = int32(seqlen_q - query) if key + 8 < seqlen_k else int32(0)
        add_elements(acc_ds, at, uint64(at + uint64(32)), int64(opaque(a.sums_row)), limit0, limit1)     # opaque: else a register a column
    return add_dbias


# ---------------------------------------------------------------- dropout
def make_draw(COUNT: int) -> Any:
    """words = draw(query16, key16, lane, plane, offset, key0, key1): philox.py's random numbers for a transposed fragment, 16 bits each.

    The fragment has COUNT registers; the bits of register 2 j are the lower half of word j. One Philox call serves 16 x 16 pairs, and
    movmatrix transposes its words.
    """
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
    """-p where the random number is below the threshold, whose 16 bits are shifted left by 16."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words_, out = unpack(builder, args[1], words.count), []
        for k, x in enumerate(unpack(builder, args[0], p.count)):
            lane16 = words_[k // 2] if k % 2 else builder.shl(words_[k // 2], I32(16))
            out.append(builder.select(builder.icmp_unsigned(">=", lane16, args[2]), x, builder.fsub(F32(-0.0), x)))
        return pack(builder, out)
    return signature(p, p, words, types.uint32), generate


@intrinsic
def grad_marked(typingctx: Any, p: Any, dp: Any, factor: Any, columns: Any) -> Any:
    """grad_scores of a marked p: |p| * ((0 if p < 0 else dp * factor) - x[column])."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus, out = _minus(builder, args[3], p.count), []
        for x, y, z in zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), minus, strict=True):
            rest = builder.fmul(emit_abs(builder, x), z)
            out.append(emit_fma(builder, emit_max(builder, x, F32(0.0)), builder.fmul(y, args[2]), rest))
        return pack(builder, out)
    return signature(p, p, p, types.float32, columns), generate


def make_dropout_transposed(spec: Spec, COUNT: int) -> tuple[Any, Any, Any, Any, Any]:
    """(plane_of, draw, mark, pack_kept, grad). A dropped probability is marked by a negative sign: no registers, and little arithmetic.

    plane = plane_of(a, batch, head)
    words = draw(a, key, query, plane)      key, query: the thread's first
    p = mark(a, p, words)                   negative where philox.py drops
    half = pack_kept(p)                     rounded to 16 bits, 0 where dropped; 1 / (1 - dropout_p) is applied to dV at the end
    acc_ds = grad(a, p, acc_dp, deltas)     grad_scores with dropout; deltas from load_columns
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
        return no_plane, no_words, unmarked, pack_kept, grad_all
    draw_words = make_draw(COUNT)

    @inline
    def draw(a, key, query, plane):
        lane = int32(((key & 7) << 2) | ((query & 7) >> 1))
        row16, column16 = int32((query >> 4) + a.row16), int32((key >> 4) + a.column16)
        return draw_words(row16, column16, lane, plane, uint32(a.offset), a.seed_low, a.seed_high)

    @inline
    def mark(a, p, words):
        return mark_dropped(p, words, a.threshold)

    @inline
    def grad(a, p, acc_dp, deltas):
        return grad_marked(p, acc_dp, a.keep_scale, deltas)
    return plane_of, draw, mark, pack_kept, grad
