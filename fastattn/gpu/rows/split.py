"""Rows of float32 to rows of their three bfloat16 parts (ptx/parts.py), which tensor cores multiply: one pass over memory, for all
operands of a call.

    x (batch, rows, heads, dim), any strides   ->   (batch, rows, heads, 3 * width) contiguous: all high parts, all middle, all low ones

width is dim rounded up to whole panels of 64 columns; columns past dim are 0. So to a kernel that copies panels to shared memory a row is
one of three times as many panels.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I64, unpack
from ..dsl.inline import divide, inline
from ..ptx.memory import emit_store16_if
from ..ptx.parts import PARTS, emit_parts
from ..ptx.scalar import load_chunk, load_if
from ..ptx.sync import let_next_start
from .config import SPLIT_COLUMNS as COLUMNS
from .config import SPLIT_THREADS as THREADS


@intrinsic
def store_parts(typingctx: Any, address: Any, part_bytes: Any, x: Any, keep: Any) -> Any:
    """Store the parts of eight neighbours, 16 bytes each, `part_bytes` apart, if `keep` is not 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = unpack(builder, args[2], x.count)
        pairs = [emit_parts(builder, numbers[k], numbers[k + 1], any_value=True) for k in range(0, x.count, 2)]
        for part in range(PARTS):
            at = builder.add(args[0], builder.mul(builder.sext(args[1], I64), I64(part)))
            emit_store16_if(builder, args[3], at, [words[part] for words in pairs])
        return context.get_dummy_value()
    return signature(types.none, types.uint64, types.int32, x, types.int32), generate


def make_pieces(PANELS: int, WHOLE: bool) -> Any:
    """split(x, by_batch, by_row, by_head, by_dim, to, lines, rows, heads, dim, block): the lines of thread block `block` of an operand.

    A thread has COLUMNS columns of a line, a row of one head. WHOLE: rows are aligned pieces of 16 bytes.
    """
    CHUNKS = PANELS * 64 // COLUMNS
    LINES, PART_BYTES = THREADS // CHUNKS, PANELS * 128
    load_vector, load_element = load_chunk("float32"), load_if("float32", "float32")

    @inline
    def load(source, by_dim, first, dim, there):
        """Eight columns from `first` on; 0 past `dim`."""
        if WHOLE:
            left = load_vector(uint64(source + 4 * first), int32(there & (first < dim)))
            right = load_vector(uint64(source + 4 * first + 16), int32(there & (first + 4 < dim)))
            return left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]
        else:
            at = int64(source + first * by_dim)
            return (load_element(uint64(at), int32(there & (first < dim))),
                    load_element(uint64(at + by_dim), int32(there & (first + 1 < dim))),
                    load_element(uint64(at + 2 * by_dim), int32(there & (first + 2 < dim))),
                    load_element(uint64(at + 3 * by_dim), int32(there & (first + 3 < dim))),
                    load_element(uint64(at + 4 * by_dim), int32(there & (first + 4 < dim))),
                    load_element(uint64(at + 5 * by_dim), int32(there & (first + 5 < dim))),
                    load_element(uint64(at + 6 * by_dim), int32(there & (first + 6 < dim))),
                    load_element(uint64(at + 7 * by_dim), int32(there & (first + 7 < dim))))

    @inline
    def split(x, by_batch, by_row, by_head, by_dim, to, lines, rows, heads, dim, block):
        thread = int32(cuda.threadIdx.x)
        line, chunk = int32(block * LINES + thread // CHUNKS), int32(thread % CHUNKS)
        there = line < lines
        line = int32(min(line, lines - 1))
        rest = divide(line, heads)
        batch = divide(rest, rows)
        source = int64(x) + batch * by_batch + int32(rest - batch * rows) * by_row + int32(line - rest * heads) * by_head
        address = uint64(int64(to) + int64(line) * (PARTS * PART_BYTES) + 2 * COLUMNS * chunk)
        store_parts(address, int32(PART_BYTES), load(source, by_dim, int32(chunk * COLUMNS), dim, there), int32(there))
    return split


def make_split(PANELS: tuple[int, ...], WHOLE: tuple[bool, ...], EARLY: bool) -> Any:
    """The kernel, of q, k, v and, if there are four, dout: thread blocks up to a.q_end have lines of q, then up to a.k_end of k.

    EARLY: the next kernel may start before this one has ended.
    """
    split_q, split_k, split_v, split_dout = (make_pieces(*which) for which in zip((*PANELS, 1)[:4], (*WHOLE, True)[:4], strict=True))
    DOUT = len(PANELS) > 3

    def kernel(a):
        if EARLY:
            let_next_start()
        block = int32(cuda.blockIdx.x)
        if block < a.q_end:
            split_q(a.q, a.q_batch, a.q_row, a.q_head, a.q_dim, a.q_to, a.q_lines, a.q_rows, a.q_heads, a.q_columns, block)
        elif block < a.k_end:
            split_k(a.k, a.k_batch, a.k_row, a.k_head, a.k_dim, a.k_to, a.k_lines, a.k_rows, a.k_heads, a.k_columns,
                    int32(block - a.q_end))
        elif block < a.v_end:
            split_v(a.v, a.v_batch, a.v_row, a.v_head, a.v_dim, a.v_to, a.v_lines, a.v_rows, a.v_heads, a.v_columns,
                    int32(block - a.k_end))
        else:
            if DOUT:
                split_dout(a.dout, a.dout_batch, a.dout_row, a.dout_head, a.dout_dim, a.dout_to, a.dout_lines, a.dout_rows, a.dout_heads,
                           a.dout_columns, int32(block - a.v_end))
    return kernel


def make_split_keys(PANELS: tuple[int, int], WHOLE: tuple[bool, bool], EARLY: bool) -> Any:
    """The kernel of k and v alone: thread blocks up to a.k_end have lines of k. EARLY as in make_split."""
    split_k, split_v = (make_pieces(*which) for which in zip(PANELS, WHOLE, strict=True))

    def kernel(a):
        if EARLY:
            let_next_start()
        block = int32(cuda.blockIdx.x)
        if block < a.k_end:
            split_k(a.k, a.k_batch, a.k_row, a.k_head, a.k_dim, a.k_to, a.k_lines, a.k_rows, a.k_heads, a.k_columns, block)
        else:
            split_v(a.v, a.v_batch, a.v_row, a.v_head, a.v_dim, a.v_to, a.v_lines, a.v_rows, a.v_heads, a.v_columns,
                    int32(block - a.k_end))
    return kernel
