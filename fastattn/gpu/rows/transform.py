"""transform_bias_rescale_qkv and its backward on the GPU: one pass over memory each way.

    qkv (batch, seqlen, 3 * num_heads * head_dim)   <->   q, k, v (batch, num_heads, seqlen, head_dim)

A warp has 32 vectors of 16 bytes, 512 contiguous bytes, of ROWS rows, whose loads are in flight together. It finds once which of q, k
and v its columns belong to, their head and their bias. A block has WARPS such groups of rows. If head_dim, an address or a stride is
not a multiple of 16 bytes, a vector is one element. Packed: qkv has the rows of one sequence after the other.

In the backward a block loops over LOOPS such groups of rows and stores the sum of their gradients. A second kernel adds up these partial
sums, always in the same order.
"""
from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ...arrays.view import ITEMSIZE
from ..dsl.asm import I32, I64, pack, unpack
from ..dsl.inline import divide, inline
from ..ptx.arith import emit_pack_half
from ..ptx.memory import emit_store16_if
from ..ptx.scalar import load_chunk, load_if, store
from ..tile.schedule import length_at
from .config import LOOPS, SUM_THREADS, SUM_WARPS
from .config import TRANSFORM_BLOCK_ROWS as BLOCK_ROWS
from .config import TRANSFORM_ROWS as ROWS
from .config import TRANSFORM_THREADS as THREADS
from .config import TRANSFORM_WARPS as WARPS


# ---------------------------------------------------------------- vectors: tuples of 8, 4, 2 or 1 numbers
@intrinsic
def add_chunk(typingctx: Any, x: Any, y: Any) -> Any:
    """x + y, number by number."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(unpack(builder, args[0], x.count), unpack(builder, args[1], x.count), strict=True)
        return pack(builder, [builder.fadd(a, b) for a, b in pairs])
    return signature(x, x, x), generate


@intrinsic
def scale_chunk(typingctx: Any, x: Any, factor: Any) -> Any:
    """x * factor."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [builder.fmul(a, args[1]) for a in unpack(builder, args[0], x.count)])
    return signature(x, x, x.dtype), generate


@intrinsic
def join_chunks(typingctx: Any, x: Any, y: Any) -> Any:
    """The numbers of x, then those of y."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, [*unpack(builder, args[0], x.count), *unpack(builder, args[1], y.count)])
    return signature(types.UniTuple(x.dtype, x.count + y.count), x, y), generate


@cache
def store_chunk(dtype: str) -> Any:
    """put(address, x): the tuple that load_chunk gives, rounded, to 16 bytes at an aligned global address."""
    @intrinsic
    def put(typingctx: Any, address: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            numbers = unpack(builder, args[1], x.count)
            if dtype == "float64":
                wide = [builder.bitcast(n, I64) for n in numbers]
                words = [builder.trunc(half, I32) for n in wide for half in (n, builder.lshr(n, I64(32)))]
            elif dtype == "float32":
                words = [builder.bitcast(n, I32) for n in numbers]
            else:
                words = [emit_pack_half(builder, numbers[k], numbers[k + 1], dtype) for k in range(0, 8, 2)]
            emit_store16_if(builder, I32(1), args[0], words)
            return context.get_dummy_value()
        return signature(types.none, types.uint64, x), generate
    return put


def make_access(dtype: str, WHOLE: bool, compute: str = "") -> tuple[Any, Any]:
    """(load, put): x = load(address, inside), zeros without an access if `inside` is 0; put(address, x). `compute`: the dtype of single
    numbers, if another than compute_of says."""
    if WHOLE:
        return load_chunk(dtype), store_chunk(dtype)
    compute = compute or compute_of(dtype)
    load_one, put_one = load_if(dtype, compute), store(dtype, compute)

    @inline
    def load(address, inside):
        return (load_one(address, inside),)

    @inline
    def put(address, x):
        put_one(address, x[0])
    return load, put


def compute_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# ---------------------------------------------------------------- shared by both directions
def make_column(VECTOR: int) -> Any:
    """column_of(a, c), of vector c of a row -> (0, 1 or 2 for q, k or v; the head; the vector's first index in head_dim)."""
    @inline
    def column_of(a, c):
        width, element = int32(a.num_heads * a.head_dim), int32(c * VECTOR)
        part = int32(int32(element >= width) + int32(element >= 2 * width))
        rest = int32(element - part * width)
        head = divide(rest, a.head_dim)
        return part, head, int32(rest - head * a.head_dim)
    return column_of


@inline
def of_part(part, q, k, v):
    return q if part == 0 else (k if part == 1 else v)


# ---------------------------------------------------------------- forward
def make_transform(dtype: str, WHOLE: bool, PACKED: bool) -> Any:
    """The kernel. Its rows are those of q, k and v, with the padding of each sequence. a.columns: vectors in a row of qkv."""
    SIZE, VECTOR = ITEMSIZE[dtype], 16 // ITEMSIZE[dtype] if WHOLE else 1
    REAL = float64 if dtype == "float64" else float32
    load, put = make_access(dtype, WHOLE)
    column_of = make_column(VECTOR)

    @inline
    def source(a, b, t):
        """(address of row t of sequence b in qkv, whether the row exists)."""
        if PACKED:
            start = length_at(a.cu_seqlens, b, a.cu_step, a.total)
            end = length_at(a.cu_seqlens, int64(b + 1), a.cu_step, a.total)
            return int64(a.qkv) + (start + int64(t)) * a.qkv_row, int32(t < end - start)
        else:
            return int64(a.qkv) + b * a.qkv_batch + t * a.qkv_row, int32(1)

    def kernel(a):
        block, lane, warp = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        tile = divide(block, a.column_blocks)
        c, row = int32((block - tile * a.column_blocks) * 32 + lane), int64(int64(tile) * BLOCK_ROWS + warp * ROWS)
        if c < a.columns:
            if row < a.rows:
                part, head, dim = column_of(a, c)
                bias = load(uint64(int64(a.bias) + int64(c) * VECTOR * a.bias_dim), int32(1))
                factor = a.scale if part == 0 else REAL(1)
                out = int64(of_part(part, a.q, a.k, a.v)) + int64(dim) * SIZE
                b = int64(row // int64(a.seqlen))
                t = int32(row - b * int64(a.seqlen))
                froms, tos, insides = cuda.local.array(ROWS, int64), cuda.local.array(ROWS, int64), cuda.local.array(ROWS, int32)
                for i in range(ROWS):
                    froms[i], tos[i], insides[i] = int64(0), int64(0), int32(0)
                    if row + i < a.rows:
                        at, inside = source(a, b, t)
                        froms[i], insides[i] = at + int64(c) * VECTOR * a.qkv_dim, inside
                        tos[i] = out + ((b * a.num_heads + head) * a.seqlen + t) * int64(a.head_dim * SIZE)
                    t = int32(t + 1)
                    if t == a.seqlen:
                        t, b = int32(0), int64(b + 1)
                x0, x1 = load(uint64(froms[0]), insides[0]), load(uint64(froms[1]), insides[1])
                x2, x3 = load(uint64(froms[2]), insides[2]), load(uint64(froms[3]), insides[3])
                write(tos[0], x0, bias, factor, insides[0])
                write(tos[1], x1, bias, factor, insides[1])
                write(tos[2], x2, bias, factor, insides[2])
                write(tos[3], x3, bias, factor, insides[3])

    @inline
    def write(to, x, bias, factor, inside):
        """Store (x + bias) * factor; zeros in the padding, nothing past the last row."""
        if to != 0:
            if inside != 0:
                put(uint64(to), scale_chunk(add_chunk(x, bias), factor))
            elif PACKED:
                put(uint64(to), x)      # zeros
    return kernel


# ---------------------------------------------------------------- backward
def make_transform_backward(dtype: str, WHOLE: bool, PACKED: bool) -> Any:
    """The kernel. Its rows are those of dqkv, contiguous. A block also stores the float32 (float64) sum of its LOOPS * BLOCK_ROWS rows."""
    SIZE, VECTOR = ITEMSIZE[dtype], 16 // ITEMSIZE[dtype] if WHOLE else 1
    compute = compute_of(dtype)
    REAL, REAL_SIZE = (float64, 8) if compute == "float64" else (float32, 4)
    load, put = make_access(dtype, WHOLE)
    put_real, column_of, SHARED = store(compute, compute), make_column(VECTOR), THREADS * VECTOR

    @inline
    def cumulative(a, b):
        return int64(length_at(a.cu_seqlens, b, a.cu_step, int32(a.rows)))

    @inline
    def sequence_of(a, row):
        """The last sequence that starts at `row` or before; a.batch if the row belongs to none."""
        if PACKED:
            low, high = int32(0), int32(a.batch)
            while low < high:
                middle = int32((low + high + 1) >> 1)
                if cumulative(a, middle) <= row:
                    low = middle
                else:
                    high = int32(middle - 1)
            return int64(low)
        else:
            return int64(row // int64(a.seqlen))

    @inline
    def start_of(a, b):
        if PACKED:
            return cumulative(a, b)
        else:
            return b * int64(a.seqlen)

    def kernel(a):
        block, lane, warp = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        sums = cuda.shared.array(SHARED, REAL)
        tile = divide(block, a.column_blocks)
        first = int32((block - tile * a.column_blocks) * 32)
        c, width = int32(first + lane), int32(a.num_heads * a.head_dim)
        part, head, dim = column_of(a, c)
        inside = int32(c < a.columns)
        factor = a.scale if part == 0 else REAL(1)
        batch, by_row = of_part(part, a.dq_batch, a.dk_batch, a.dv_batch), of_part(part, a.dq_row, a.dk_row, a.dv_row)
        at = int64(of_part(part, a.dq, a.dk, a.dv)) + head * of_part(part, a.dq_head, a.dk_head, a.dv_head) \
            + dim * of_part(part, a.dq_dim, a.dk_dim, a.dv_dim)
        to = int64(a.dqkv) + int64(c) * (VECTOR * SIZE)
        pitch = int64(3 * width) * SIZE
        acc = load(uint64(a.dqkv), int32(0))                # zeros
        b = sequence_of(a, int64(int64(tile) * (LOOPS * BLOCK_ROWS) + warp * ROWS))     # searched once; later rows advance it
        for n in range(LOOPS):
            row = int64((int64(tile) * LOOPS + n) * BLOCK_ROWS + warp * ROWS)
            if row < a.rows:
                froms, insides = cuda.local.array(ROWS, int64), cuda.local.array(ROWS, int32)
                for i in range(ROWS):
                    froms[i], insides[i] = int64(0), int32(0)
                    if row + i < a.rows:
                        while b < a.batch and start_of(a, int64(b + 1)) <= row + i:
                            b = int64(b + 1)
                        if b < a.batch:
                            t = int64(row + i - start_of(a, b))
                            froms[i], insides[i] = at + b * batch + t * by_row, int32(inside & int32(t < a.seqlen))
                x0, x1 = load(uint64(froms[0]), insides[0]), load(uint64(froms[1]), insides[1])
                x2, x3 = load(uint64(froms[2]), insides[2]), load(uint64(froms[3]), insides[3])
                acc = add_chunk(acc, write(a, to + row * pitch, x0, factor, int32(inside & int32(row < a.rows))))
                acc = add_chunk(acc, write(a, to + (row + 1) * pitch, x1, factor, int32(inside & int32(row + 1 < a.rows))))
                acc = add_chunk(acc, write(a, to + (row + 2) * pitch, x2, factor, int32(inside & int32(row + 2 < a.rows))))
                acc = add_chunk(acc, write(a, to + (row + 3) * pitch, x3, factor, int32(inside & int32(row + 3 < a.rows))))
        for e in range(VECTOR):
            sums[(warp * 32 + lane) * VECTOR + e] = acc[e]
        cuda.syncthreads()
        for column in range(int32(cuda.threadIdx.x), 32 * VECTOR, THREADS):
            total = REAL(0)
            for w in range(WARPS):
                total += sums[w * 32 * VECTOR + column]
            element = int32(first * VECTOR + column)
            if element < 3 * width:
                put_real(uint64(int64(a.partial) + (int64(tile) * (3 * width) + element) * REAL_SIZE), total)

    @inline
    def write(a, to, x, factor, inside):
        x = scale_chunk(x, factor)
        if inside != 0:
            put(uint64(to), x)
        return x
    return kernel


def make_sum_rows(dtype: str) -> Any:
    """The kernel that adds up the partial sums, 32 columns a block, and rounds to `dtype`."""
    compute = compute_of(dtype)
    REAL, SIZE = (float64, 8) if compute == "float64" else (float32, 4)
    load_real, put = load_if(compute, compute), store(dtype, compute)

    def kernel(a):
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        sums = cuda.shared.array(SUM_THREADS, REAL)
        column, total = int32(int32(cuda.blockIdx.x) * 32 + lane), REAL(0)
        for row in range(warp, a.rows, SUM_WARPS):
            total += load_real(uint64(int64(a.partial) + (int64(row) * a.columns + column) * SIZE), int32(column < a.columns))
        sums[warp * 32 + lane] = total
        cuda.syncthreads()
        if warp == 0:
            if column < a.columns:
                total = REAL(0)
                for w in range(SUM_WARPS):
                    total += sums[w * 32 + lane]
                put(uint64(int64(a.to) + column * a.to_dim), total)
    return kernel
