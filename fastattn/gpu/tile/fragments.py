"""Accumulator fragments: the registers of a warp's 16 x N tile that one thread holds, the same for mma.sync and wgmma.

Register k of a fragment lies in row `row + 8 * (k / 2 % 2)` and column `col + 8 * (k / 4) + k % 2`, where row = lane / 4 and
col = 2 * (lane % 4) are the thread's first (PTX ISA 9.7.14.5.8, figure of the m16n8 accumulator). So a thread has two rows, eight
apart, and the four threads of a quad share them. A fragment is a tuple of registers; a packed one has two 16-bit values in each.
`elementwise` applies a plain scalar function to every element.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, emit, literals, pack, unpack
from ..dsl.inline import Compiled
from ..ptx.arith import emit_exp2, emit_fma, emit_max, emit_pack_half
from ..ptx.memory import emit_load16_if, emit_load_if, half_to_float, halves
from ..ptx.parts import PARTS, emit_parts
from ..ptx.sync import emit_opaque, emit_shuffle_xor

NEG_INF = F32(float("-inf"))
PAIR = types.UniTuple(types.float32, 2)


# Where a thread's first register lies. Computed in 64 bits and truncated, as Numba would: LLVM's choices depend on it.
@intrinsic
def lane_row(typingctx: Any, lane: Any) -> Any:
    """The first row of a lane in its warp's 16."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.trunc(builder.ashr(builder.sext(args[0], I64), I64(2)), I32)
    return signature(types.int32, types.int32), generate


@intrinsic
def thread_row(typingctx: Any, thread: Any, lane: Any) -> Any:
    """The first row of a thread, if warp w has rows 16 w to 16 w + 15."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        thread, lane = (builder.sext(x, I64) for x in args)
        first = builder.mul(builder.ashr(thread, I64(5)), I64(16), flags=["nsw"])
        return builder.trunc(builder.add(first, builder.ashr(lane, I64(2)), flags=["nsw"]), I32)
    return signature(types.int32, types.int32, types.int32), generate


@intrinsic
def thread_col(typingctx: Any, lane: Any) -> Any:
    """The first column of a lane, or of a thread: only the two lowest bits count."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.trunc(builder.mul(builder.and_(builder.sext(args[0], I64), I64(3)), I64(2), flags=["nsw"]), I32)
    return signature(types.int32, types.int32), generate


def row_of(k: int) -> int:
    """0 or 8: the row of register k, counted from the thread's first."""
    return 8 * (k // 2 % 2)


def col_of(k: int) -> int:
    """The column of register k, counted from the thread's first."""
    return 8 * (k // 4) + k % 2


@intrinsic
def zeros(typingctx: Any, count: Any) -> Any:
    """A fragment of `count` float32 zeros."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [F32(0.0)] * n)
    return signature(types.UniTuple(types.float32, n), count), generate


@intrinsic
def own_zeros(typingctx: Any, count: Any) -> Any:
    """`zeros` that the compiler cannot share with others: accumulators that a loop carries. Shared, ptxas finds no registers for both."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [emit(builder, F32, "mov.b32 $0, 0f00000000;", "=f", []) for _ in range(n)])
    return signature(types.UniTuple(types.float32, n), count), generate


@intrinsic
def zeros_packed(typingctx: Any, count: Any) -> Any:
    """A packed fragment of `count` registers of zeros."""
    [n] = literals(count)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [I32(0)] * n)
    return signature(types.UniTuple(types.int32, n), count), generate


@intrinsic
def part(typingctx: Any, fragment: Any, index: Any, count: Any) -> Any:
    """Part `index` of `count` equal parts: of a fragment's columns, or of a tuple of fragments."""
    i, parts = literals(index, count)
    n = fragment.count // parts

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, unpack(builder, args[0], fragment.count)[i * n:(i + 1) * n])
    return signature(types.UniTuple(fragment.dtype, n), fragment, index, count), generate


@intrinsic
def join(typingctx: Any, first: Any, second: Any) -> Any:
    """The fragment made of these two parts."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, unpack(builder, args[0], first.count) + unpack(builder, args[1], second.count))
    return signature(types.UniTuple(first.dtype, first.count + second.count), first, second), generate


@intrinsic
def row_max(typingctx: Any, acc: Any, max0: Any, max1: Any) -> Any:
    """The maxima of the thread's two rows and of max0, max1."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows: list[Any] = []
        registers = unpack(builder, args[0], acc.count)
        for r, start in ((0, args[1]), (2, args[2])):
            # two chains a row, one of which begins with `start`: half the latency of one chain
            chains: list[Any] = [start, None]
            for i, k in enumerate(range(r, acc.count, 4)):
                for x in registers[k:k + 2]:
                    chains[i % 2] = x if chains[i % 2] is None else emit_max(builder, chains[i % 2], x)
            rows.append(chains[0] if chains[1] is None else emit_max(builder, *chains))
        return pack(builder, rows)
    return signature(PAIR, acc, types.float32, types.float32), generate


@intrinsic
def row_sum(typingctx: Any, acc: Any) -> Any:
    """The sums of the thread's two rows."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, rows = unpack(builder, args[0], acc.count), []
        for r in (0, 2):
            terms = [registers[k + i] for k in range(r, acc.count, 4) for i in (0, 1)]
            while len(terms) > 1:
                terms = [builder.fadd(*terms[j:j + 2]) if j + 1 < len(terms) else terms[j] for j in range(0, len(terms), 2)]
            rows.append(terms[0])
        return pack(builder, rows)
    return signature(PAIR, acc), generate


def _across(distances: tuple[int, ...], combine: Any) -> Any:
    @intrinsic
    def reduce(typingctx: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = args[0]
            for distance in distances:
                value = combine(builder, value, emit_shuffle_xor(builder, value, distance))
            return value
        return signature(types.float32, types.float32), generate
    return reduce


# reductions over the quad, the four threads that share a row
quad_max = _across((1, 2), emit_max)
quad_sum = _across((1, 2), lambda builder, a, b: builder.fadd(a, b))
# over the eight threads that share columns, which are the rows of a transposed fragment
column_max = _across((4, 8, 16), emit_max)
column_sum = _across((4, 8, 16), lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def exp2_minus(typingctx: Any, acc: Any, scale0: Any, scale1: Any, max0: Any, max1: Any) -> Any:
    """exp2(acc * scale - max), with each row's scale and maximum."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scales, minus = args[1:3], [builder.fsub(F32(-0.0), x) for x in args[3:]]
        registers = unpack(builder, args[0], acc.count)
        return pack(builder, [emit_exp2(builder, emit_fma(builder, x, scales[row_of(k) // 8], minus[row_of(k) // 8]))
                              for k, x in enumerate(registers)])
    return signature(acc, acc, *[types.float32] * 4), generate


@intrinsic
def scale_rows(typingctx: Any, acc: Any, scale0: Any, scale1: Any) -> Any:
    """acc * scale, with each row's scale."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.fmul(x, args[1 + row_of(k) // 8]) for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.float32, types.float32), generate


@intrinsic
def scale_seen_rows(typingctx: Any, acc: Any, scale0: Any, scale1: Any) -> Any:
    """As scale_rows, but a scale of 0 gives 0. Such a row attends no key, and what it holds may be NaN."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        nothing = [builder.fcmp_ordered("==", scale, F32(0.0)) for scale in args[1:]]
        return pack(builder, [builder.select(nothing[row_of(k) // 8], F32(0.0), builder.fmul(x, args[1 + row_of(k) // 8]))
                              for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.float32, types.float32), generate


@intrinsic
def keep_interval(typingctx: Any, acc: Any, lo0: Any, hi0: Any, lo1: Any, hi1: Any) -> Any:
    """acc where lo <= column < hi, else -inf. Bounds are per row and count from the thread's first column."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out = []
        for k, x in enumerate(unpack(builder, args[0], acc.count)):
            lo, hi = args[1 + row_of(k) // 4:3 + row_of(k) // 4]
            column = I32(col_of(k))
            inside = builder.and_(builder.icmp_signed("<=", lo, column), builder.icmp_signed("<", column, hi))
            out.append(builder.select(inside, x, NEG_INF))
        return pack(builder, out)
    return signature(acc, acc, *[types.int32] * 4), generate


@intrinsic
def keep_below(typingctx: Any, acc: Any, hi0: Any, hi1: Any) -> Any:
    """acc where column < hi, else -inf: keep_interval for rows without a lower bound."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.select(builder.icmp_signed("<", I32(col_of(k)), args[1 + row_of(k) // 8]), x, NEG_INF)
                              for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.int32, types.int32), generate


@intrinsic
def keep_from(typingctx: Any, acc: Any, lo0: Any, lo1: Any) -> Any:
    """acc where lo <= column, else -inf: keep_interval for rows without an upper bound."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.select(builder.icmp_signed("<=", args[1 + row_of(k) // 8], I32(col_of(k))), x, NEG_INF)
                              for k, x in enumerate(unpack(builder, args[0], acc.count))])
    return signature(acc, acc, types.int32, types.int32), generate


def make_pack(dtype: str, positive: bool = False) -> Any:
    """packed = to_half(acc): rounded to 16-bit `dtype`, in the layout of the next MMA's A operand. `positive`: negative values become 0.

    Of float32: its three parts (ptx/parts.py), as many registers for each, one part after the other.
    """
    @intrinsic
    def to_parts(typingctx: Any, acc: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x = unpack(builder, args[0], acc.count)
            if positive:
                x = [emit_max(builder, y, F32(0.0)) for y in x]
            parts = [emit_parts(builder, x[k], x[k + 1]) for k in range(0, acc.count, 2)]
            return pack(builder, [words[n] for n in range(PARTS) for words in parts])
        return signature(types.UniTuple(types.int32, PARTS * acc.count // 2), acc), generate
    if dtype == "float32":
        return to_parts

    @intrinsic
    def to_half(typingctx: Any, acc: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x = unpack(builder, args[0], acc.count)
            return pack(builder, [emit_pack_half(builder, x[k], x[k + 1], dtype, positive) for k in range(0, acc.count, 2)])
        return signature(types.UniTuple(types.int32, acc.count // 2), acc), generate
    return to_half


def elementwise(f: Any) -> Any:
    """acc = apply(acc, row, col, extra): f(x, row, column, *extra) of every element; row and col are the thread's first.

    f is a plain function of float32, int32, int32 and the types of the tuple `extra`. It is inlined for each register.
    """
    @intrinsic
    def apply(typingctx: Any, acc: Any, row: Any, col: Any, extra: Any) -> Any:
        scalar = Compiled(f, (types.float32, types.int32, types.int32, *extra.types), types.float32)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            rest = unpack(builder, args[3], len(extra.types))
            out = []
            for k, x in enumerate(unpack(builder, args[0], acc.count)):
                position = builder.add(args[1], I32(row_of(k))), builder.add(args[2], I32(col_of(k)))
                out.append(scalar.call(builder, [x, *position, *rest]))
            return pack(builder, out)
        return signature(acc, acc, types.int32, types.int32, extra), generate
    return apply


@intrinsic
def add(typingctx: Any, acc: Any, other: Any) -> Any:
    """acc + other, both float32 fragments."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.fadd(x, y) for x, y in
                              zip(unpack(builder, args[0], acc.count), unpack(builder, args[1], acc.count), strict=True)])
    return signature(acc, acc, acc), generate


@intrinsic
def add_columns(typingctx: Any, acc: Any, other: Any, first: Any) -> Any:
    """acc with a fragment of fewer columns added to its registers from `first` on. Added here, not where the sums are needed."""
    [start] = literals(first)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out = unpack(builder, args[0], acc.count)
        for k, x in enumerate(unpack(builder, args[1], other.count)):
            out[start + k] = emit(builder, F32, "add.rn.f32 $0, $1, $2;", "=f,f,f", [out[start + k], x])
        return pack(builder, out)
    return signature(acc, acc, other, first), generate


@intrinsic
def sum_parts(typingctx: Any, fragment: Any, count: Any) -> Any:
    """The sum of `count` equal parts, added in their order."""
    [parts] = literals(count)
    n = fragment.count // parts

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[0], fragment.count)
        out = x[:n]
        for first in range(n, fragment.count, n):
            out = [builder.fadd(a, b) for a, b in zip(out, x[first:first + n], strict=True)]
        return pack(builder, out)
    return signature(types.UniTuple(fragment.dtype, n), fragment, count), generate


@intrinsic
def scale_add(typingctx: Any, acc: Any, scale: Any, other: Any) -> Any:
    """acc * scale + other, rounded once."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [emit_fma(builder, x, args[1], y) for x, y in
                              zip(unpack(builder, args[0], acc.count), unpack(builder, args[2], acc.count), strict=True)])
    return signature(acc, acc, types.float32, acc), generate


def make_gather(dtype: str) -> Any:
    """tile = gather(pointer0, pointer1, stride, limit0, limit1, count): elements of a score-shaped operand, as 32-bit registers.

    pointer0, pointer1: addresses of the thread's two rows at its first column. stride: bytes between columns. limit0, limit1: how
    many columns of each row exist from there on. Columns past the limit are not read and are 0. `make_unpack` converts to float32
    later, so that the loads can be issued early.
    """
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}[dtype]

    @intrinsic
    def gather(typingctx: Any, pointer0: Any, pointer1: Any, stride: Any, limit0: Any, limit1: Any, count: Any) -> Any:
        [n] = literals(count)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out = []
            for k in range(n):
                column = col_of(k)
                pointer = builder.add(args[row_of(k) // 8], builder.mul(args[2], I64(column)))
                inside = builder.icmp_signed("<", I32(column), args[3 + row_of(k) // 8])
                out.append(emit_load_if(builder, inside, pointer, size))
            return pack(builder, out)
        return signature(types.UniTuple(types.int32, n), types.uint64, types.uint64, types.int64, types.int32, types.int32, count), generate
    return gather


def make_gather_pairs() -> Any:
    """make_gather for contiguous 16-bit elements: two columns a load. Rows are 4-byte aligned, of even length; the first column is even."""
    @intrinsic
    def gather(typingctx: Any, pointer0: Any, pointer1: Any, limit0: Any, limit1: Any, count: Any) -> Any:
        [n] = literals(count)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out = []
            for k in range(0, n, 2):
                pointer = builder.add(args[row_of(k) // 8], I64(2 * col_of(k)))
                inside = builder.icmp_signed("<", I32(col_of(k)), args[2 + row_of(k) // 8])
                out.append(emit_load_if(builder, inside, pointer, 4))
            return pack(builder, out)
        return signature(types.UniTuple(types.int32, n // 2), *[types.uint64] * 2, *[types.int32] * 2, count), generate
    return gather


def make_gather_whole() -> Any:
    """make_gather for contiguous 16-bit elements: eight columns a load.

    Of each 32 columns thread t of a quad reads columns 8 t to 8 t + 7; make_unpack_whole exchanges them in the quad. `col` is the
    thread's first column. Rows must be 16-byte aligned and a multiple of 8 columns long; the fragment has a multiple of 32 columns.
    """
    @intrinsic
    def gather(typingctx: Any, pointer0: Any, pointer1: Any, limit0: Any, limit1: Any, col: Any, count: Any) -> Any:
        [n] = literals(count)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out: list[Any] = []
            start = builder.mul(builder.and_(args[4], I32(6)), I32(3))      # from the thread's first column, 2 t, to its chunk's, 8 t
            for r in (0, 1):
                pointer = builder.add(args[r], builder.zext(builder.mul(start, I32(2)), I64))
                for first in range(0, 2 * n, 32):       # 2 n columns
                    inside = builder.icmp_signed("<", builder.add(start, I32(first)), args[2 + r])
                    out += emit_load16_if(builder, inside, builder.add(pointer, I64(2 * first)))
            return pack(builder, out)
        return signature(types.UniTuple(types.int32, n // 2), *[types.uint64] * 2, *[types.int32] * 3, count), generate
    return gather


def make_unpack_whole(dtype: str) -> Any:
    """acc = unpack(tile, col): the float32 fragment of a tile from make_gather_whole."""
    @intrinsic
    def to_float(typingctx: Any, tile: Any, col: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words, thread = unpack(builder, args[0], tile.count), builder.and_(builder.lshr(args[1], I32(1)), I32(3))
            half = tile.count // 2
            rows = [[word for j in range(r * half, (r + 1) * half, 4) for word in transpose_quad(builder, thread, words[j:j + 4])]
                    for r in (0, 1)]
            out = []
            for pair in zip(*rows, strict=True):
                for word in pair:
                    out += [half_to_float(builder, x, dtype) for x in halves(builder, word)]
            return pack(builder, out)
        return signature(types.UniTuple(types.float32, 2 * tile.count), tile, types.int32), generate
    return to_float


def make_unpack(dtype: str, pairs: bool) -> Any:
    """acc = unpack(tile): the float32 fragment of a tile from make_gather, or with `pairs` from make_gather_pairs."""
    @intrinsic
    def to_float(typingctx: Any, tile: Any) -> Any:
        n = tile.count * (2 if pairs else 1)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out: list[Any] = []
            for word in unpack(builder, args[0], tile.count):
                if dtype == "float32":
                    out.append(builder.bitcast(word, F32))
                else:
                    low, high = halves(builder, word)
                    out += [half_to_float(builder, x, dtype) for x in ((low, high) if pairs else (low,))]
            return pack(builder, out)
        return signature(types.UniTuple(types.float32, n), tile), generate
    return to_float


@intrinsic
def pairs_of(typingctx: Any, tile: Any) -> Any:
    """16-bit elements, one a register, packed two a register: the layout of make_gather_pairs."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[0], tile.count)
        return pack(builder, [emit_opaque(builder, builder.or_(x[k], builder.shl(x[k + 1], I32(16)))) for k in range(0, tile.count, 2)])
    return signature(types.UniTuple(types.int32, tile.count // 2), tile), generate


def make_draw(philox: Any, COUNT: int, EARLY: bool = False) -> Any:
    """words = draw(row16, col16, lane, plane, offset, key0, key1): philox.py's random bits, 16 a register.

    The fragment has COUNT registers. row16, col16: first row / 16 and first column / 16 of the warp's fragment. plane: batch * num_heads +
    head. One Philox call gives four words, for the eight registers of a 16 x 16 piece. EARLY: computed where the call stands, not where
    the words are used.
    """
    @intrinsic
    def draw(typingctx: Any, row16: Any, col16: Any, lane: Any, plane: Any, offset: Any, key0: Any, key1: Any) -> Any:
        random = Compiled(philox, (types.uint32,) * 6, types.UniTuple(types.uint32, 4))

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            row16, col16, lane, plane, offset, key0, key1 = args
            row = builder.add(builder.shl(row16, I32(3)), builder.lshr(lane, I32(2)))
            thread, words = builder.and_(lane, I32(3)), list[Any]()
            for piece in range(COUNT // 8):
                column = builder.add(builder.shl(builder.add(col16, I32(piece)), I32(2)), thread)
                words += unpack(builder, random.call(builder, [row, column, plane, offset, key0, key1]), 4)
            return pack(builder, [emit_opaque(builder, x) if EARLY else x for x in words])
        return signature(types.UniTuple(types.uint32, COUNT // 2), *[types.int32] * 4, *[types.uint32] * 3), generate
    return draw


@intrinsic
def drop(typingctx: Any, acc: Any, words: Any, threshold: Any) -> Any:
    """acc, 0 where philox.py drops. words: from make_draw. threshold: shifted left by 16."""
    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        drawn, out = unpack(builder, args[1], words.count), list[Any]()
        for n, x in enumerate(unpack(builder, args[0], acc.count)):
            k = n % 8
            word = drawn[n // 8 * 4 + row_of(k) // 4 + k // 4]
            lane16 = word if k % 2 else builder.shl(word, I32(16))
            out.append(builder.select(builder.icmp_unsigned(">=", lane16, args[2]), x, F32(0.0)))
        return pack(builder, out)
    return signature(acc, acc, words, types.uint32), generate


def transpose_quad(builder: Any, lane: Any, words: list[Any]) -> list[Any]:
    """Transpose 4 x 4 words in each quad: word j of thread t becomes word t of thread j."""
    words = list(words)
    for distance, pairs in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
        odd = builder.icmp_unsigned("!=", builder.and_(lane, I32(distance)), I32(0))
        for i, j in pairs:
            received = emit_shuffle_xor(builder, builder.select(odd, words[i], words[j]), distance)
            words[i], words[j] = builder.select(odd, received, words[i]), builder.select(odd, words[j], received)
    return words
