"""Launches of the kernels that work on one row at a time: what every family's backward starts and ends with,
merge_states, the transform.

None of this imports Numba: a kernel that is in the cache is launched without it.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from ...arrays.view import View
from ...errors import UnsupportedError
from ..runtime.arch import arch_of
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import MOST_BLOCKS
from ..spec import AnyCall, Arguments, BackwardCall, Spec, whole_chunks
from .config import (
    GROUP_COLUMNS,
    GROUP_THREADS,
    LOOPS,
    MERGE_THREADS,
    PADDING,
    PREPROCESS_ROWS,
    PREPROCESS_THREADS,
    ROUND_ROWS,
    ROUND_THREADS,
    SINK_THREADS,
    SUM_THREADS,
    TRANSFORM_BLOCK_ROWS,
    TRANSFORM_THREADS,
)

WARP = 32
make_preprocess, make_dsinks = late("rows.preprocess", "make_preprocess"), late("rows.preprocess", "make_dsinks")
make_round, make_round_dbias = late("rows.postprocess", "make_round"), late("rows.postprocess", "make_round_dbias")
make_sum_groups = late("rows.groups", "make_sum_groups")
make_add_part = late("rows.merge", "make_add_part")
make_transform, make_sum_rows = late("rows.transform", "make_transform"), late("rows.transform", "make_sum_rows")
make_transform_backward = late("rows.transform", "make_transform_backward")

PREPROCESS = ("out_lse:l out_log2:l out_delta:l out_accum:l out_far:l far_mark:i accum_row:i rows:i chunks:i "
              "lse_in:l lse_batch:q lse_head:q lse_row:q dlse:l dlse_batch:q dlse_head:q dlse_row:q cu_seqlens_q:l q_step:q")
DSINKS = "row_lse:l row_delta:l rows:i dsinks:l dsinks_head:q"
ROUND = "accum:l rows:i bands:q grad_scale:f cu_seqlens_q:l q_step:q"
ROUND_DBIAS = "sums:l heads:i bias_rows:i bias_cols:i dbias:l dbias_batch:q dbias_head:q dbias_row:q dbias_col:q"
SUM_GROUPS = ("part_k:l part_v:l parts:i seqlen_k:i num_heads_k:i columns:i blocks_k:i dk:l dk_row:q dk_head:q dk_dim:q head_dim:i "
              "dv:l dv_row:q dv_head:q dv_dim:q head_dim_v:i")
MERGE = ("part:l part_batch:q part_row:q part_head:q part_dim:q part_lse:l part_lse_batch:q part_lse_head:q part_lse_row:q "
         "sum:l sum_top:l out:l out_batch:q out_row:q out_head:q out_dim:q lse:l lse_batch:q lse_head:q lse_row:q "
         "first:i last:i rows:i heads:i dim:i")
TRANSFORM = ("qkv:l qkv_batch:q qkv_row:q qkv_dim:q bias:l bias_dim:q q:l k:l v:l rows:q seqlen:i num_heads:i head_dim:i columns:i "
             "column_blocks:i scale:{f} cu_seqlens:l cu_step:q total:i")
TRANSFORM_BACKWARD = ("dqkv:l partial:l dq:l dq_batch:q dq_head:q dq_row:q dq_dim:q dk:l dk_batch:q dk_head:q dk_row:q dk_dim:q "
                      "dv:l dv_batch:q dv_head:q dv_row:q dv_dim:q rows:q seqlen:i num_heads:i head_dim:i columns:i column_blocks:i "
                      "scale:{f} cu_seqlens:l cu_step:q batch:i")
SUM_ROWS = "partial:l rows:i columns:i to:l to_dim:q"


def starts_early(launcher: Launcher) -> bool:
    """Whether the device can start a kernel before the one before it has ended (ptx/sync.py)."""
    return arch_of(launcher.device.arch).number >= 90


# ---------------------------------------------------------------- delta and lse
@dataclass(frozen=True, slots=True)
class Rows:
    """Addresses of what `preprocessed` computes for every query row. preprocess.py says where a row is.

    Parameters
    ----------
    lse, delta
        One number a row, float32 (float64 for float64 problems).
    log2
        lse in units of log2; 0 if it is not computed.
    accum
        Zeroed float32 sums of dq, a row of them for each query row; 0 if there are none.
    count
        Rows of each (batch, head), with padding.
    far, mark
        A word in memory that is `mark` if any row of the call is far (tile/gradients.py). Only with `log2`.
    bounded
        Whether an infinite delta is stored as float32's largest number (preprocess.py).
    """

    lse: int
    log2: int
    delta: int
    accum: int
    count: int
    far: int
    mark: int
    bounded: bool

    def map(self, call: AnyCall, block_m: int, launcher: Launcher, captured: bool) -> int:
        """The tensor map of lse in units of log2 (row 0) and delta (row 1), for boxes of block_m numbers."""
        return launcher.row_map(self.log2, self.count * batch_heads(call), self.delta - self.log2, block_m, captured)


def padded_rows(call: AnyCall) -> int:
    """Rows of each (batch, head) with padding; packed: of each head, all sequences together."""
    p = call.problem
    if p.packed:
        return ((p.total_q or 0) + PADDING * (p.batch + 1)) // PADDING * PADDING
    return -(-p.seqlen_q // PADDING) * PADDING


def batch_heads(call: AnyCall) -> int:
    """Number of lines of padded_rows: one for each (batch, head); packed: one for each head."""
    p = call.problem
    return p.num_heads * (1 if p.packed else p.batch)


def refuses_rows(call: BackwardCall) -> str | None:
    """None, or that int32 cannot count the rows."""
    rows = padded_rows(call)
    return None if rows <= MOST_BLOCKS else f"it has {rows} query rows with padding, over 2**31 - 1"


def row_strides(x: View | None, packed: bool) -> tuple[int, int, int, int]:
    """Pointer, batch, head and row strides of lse or dlse."""
    if x is None:
        return 0, 0, 0, 0
    return (x.ptr, 0, *x.strides) if packed else (x.ptr, *x.strides)  # type: ignore[return-value]


def _lengths_q(call: BackwardCall) -> tuple[int, int]:
    """Pointer and stride of cu_seqlens_q; zeros for a dense problem."""
    cu = call.operands.cu_seqlens_q
    return (cu.ptr, cu.strides[0]) if cu else (0, 0)


@lru_cache(maxsize=PROGRAMS)
def preprocess_program(spec: Spec, whole: bool, dlse: bool, log2: bool, accum: bool, early: bool, bounded: bool) -> Program:
    key = f"preprocess {spec.text}" + " whole" * whole + " dlse" * dlse + " log2" * log2 + " accum" * accum + " early" * early
    key += " bounded" * bounded
    return program(key, lambda: (make_preprocess(spec, whole, dlse, log2, accum, early, bounded), 0),
                   Arguments(spec, PREPROCESS, ("dout", "out")), PREPROCESS_THREADS)


@contextmanager
def preprocessed(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int, log2: bool = True,
                 accum_dim: int = 0) -> Iterator[Rows]:
    """Enqueue the kernel that every backward starts with. Its results are valid for work enqueued inside the `with`.

    Parameters
    ----------
    log2
        Compute lse in units of log2 too, for kernels that take exp2(s * log2_scale - lse) instead of exp(s - lse).
    accum_dim
        Columns of float32 sums of dq that are zeroed for each row.
    """
    p = call.problem
    rows, heads = padded_rows(call), batch_heads(call)
    size, chunks = 8 if p.dtype == "float64" else 4, -(-rows // PREPROCESS_ROWS)
    each, sums = -(-rows * heads * size // 256) * 256, 4 * accum_dim * rows * heads
    with launcher.temporary((2 + log2) * each + sums + 4 * log2, stream) as memory:
        lse, accum = memory + 2 * each if log2 else memory, memory + (2 + log2) * each
        mark = launcher.mark()      # a new one, so that the word need not be cleared; one that holds it by chance costs time only
        bounded = log2 and spec.dropout and call.out.dtype == "float16"
        where = Rows(lse, memory if log2 else 0, memory + each, accum if accum_dim else 0, rows, accum + sums if log2 else 0, mark, bounded)
        plain = Spec(spec.dtype, spec.head_dim_v, spec.head_dim_v, packed=spec.packed, lse=False)
        if call.out.dtype != spec.dtype:
            plain = replace(plain, out_dtype=call.out.dtype)
        whole = whole_chunks(call.dout) and whole_chunks(call.out) and plain.out_dtype is None
        kernel = preprocess_program(plain, whole, call.dlse is not None, log2, accum_dim > 0, starts_early(launcher), bounded)
        own = (where.lse, where.log2, where.delta, where.accum, where.far, mark, 4 * accum_dim, rows, chunks,
               *row_strides(call.lse, p.packed), *row_strides(call.dlse, p.packed), *_lengths_q(call))
        if heads and chunks:
            kernel.launch(launcher, heads * chunks, call, own, stream)
        yield where


@lru_cache(maxsize=PROGRAMS)
def dsinks_program(spec: Spec, bounded: bool) -> Program:
    return program(f"dsinks {spec.text}" + " bounded" * bounded, lambda: (make_dsinks(spec, bounded), 0), Arguments(spec, DSINKS),
                   SINK_THREADS)


def dsinks(call: BackwardCall, spec: Spec, rows: Rows, launcher: Launcher, stream: int) -> None:
    """Enqueue writing grads.dsinks, if there are any."""
    x = call.grads.dsinks
    if x is None or call.problem.num_heads == 0:
        return
    kernel = dsinks_program(Spec(spec.dtype, 16, 16, packed=spec.packed, sinks=spec.sinks, lse=False), rows.bounded)
    own = (rows.lse, rows.delta, rows.count, x.ptr, x.strides[0])
    kernel.launch(launcher, call.problem.num_heads, call, own, stream)


# ---------------------------------------------------------------- float32 sums to gradients
@lru_cache(maxsize=PROGRAMS)
def round_program(spec: Spec, dim: int, vector: int, whole: bool, early: bool) -> Program:
    key = f"round_dq {spec.text} dim {dim}" + " vector" * vector + " whole" * whole + " early" * early
    return program(key, lambda: (make_round(spec, dim, vector, whole, early), 0), Arguments(spec, ROUND, ("dq",)), ROUND_THREADS,
                   early=early)


def round_dq(call: BackwardCall, spec: Spec, rows: Rows, dim: int, launcher: Launcher, stream: int,
             vector: bool = True) -> None:
    """Enqueue writing grads.dq from the sums in `rows.accum`, `dim` columns a row.

    `vector`: whether the sums of a lane are next to each other, as mma.add_sums leaves them on sm_90 and later.
    """
    dq = call.grads.dq
    bands = batch_heads(call) * rows.count // ROUND_ROWS
    if bands:
        kernel = round_program(Spec(spec.dtype, 16, 16, packed=spec.packed, lse=False, out_dtype=spec.out_dtype), dim, int(vector),
                               whole_chunks(dq) and dim - dq.shape[-1] in (0, 8), starts_early(launcher))
        own = (rows.accum, rows.count, bands, call.problem.score.softmax_scale, *_lengths_q(call))
        kernel.launch(launcher, -(-bands // (ROUND_THREADS // WARP)), call, own, stream)


@cache
def round_dbias_source(dtype: str) -> Source:
    return Source(f"round_dbias {dtype}", lambda: (make_round_dbias(dtype), 0), fields_of(ROUND_DBIAS), ROUND_THREADS)


def sums_dbias(call: BackwardCall) -> bool:
    """Whether dbias can be added up by a kernel that computes every dS: there is one, of every score."""
    x, p = call.grads.dbias, call.problem
    return x is not None and x.shape[2:] == (p.seqlen_q, p.seqlen_k) and p.score.softcap is None and p.flex is None


@contextmanager
def dbias_sums(x: View | None, launcher: Launcher, stream: int) -> Iterator[tuple[int, int, int, int]]:
    """Zeroed float32 sums of dbias's shape, for work enqueued inside the `with`; its end enqueues rounding them to `x`.

    Yields
    ------
    (address, batch stride, head stride, row stride)
        In bytes, 0 along axes of length 1. Zeros where x is None or empty.
    """
    if x is None or 0 in x.shape:
        yield 0, 0, 0, 0
        return
    batch, heads, rows, cols = x.shape
    size = 4 * batch * heads * rows * cols
    with launcher.temporary(size, stream) as memory:
        launcher.clear(memory, size, stream)
        yield memory, 4 * heads * rows * cols * (batch > 1), 4 * rows * cols * (heads > 1), 4 * cols
        values = [memory, heads, rows, cols, x.ptr, *x.strides]
        launcher.load(round_dbias_source(x.dtype)).launch(batch * heads * rows, values, stream)


# ---------------------------------------------------------------- parts of a group
@cache
def sum_groups_source(dtype: str, whole: bool) -> Source:
    key = f"sum_groups {dtype}" + " whole" * whole
    return Source(key, lambda: (make_sum_groups(dtype, whole), 0), fields_of(SUM_GROUPS), GROUP_THREADS)


def sum_groups(part_k: View, part_v: View, dk: View, dv: View, launcher: Launcher, stream: int) -> None:
    """Enqueue writing dk and dv (1, key, head, dim) as sums over the first axis of float32 parts (part, key, head, columns)."""
    parts, seqlen_k, heads, columns = part_k.shape
    blocks = -(-seqlen_k * heads * (columns // GROUP_COLUMNS) // GROUP_THREADS)
    values = [part_k.ptr, part_v.ptr, parts, seqlen_k, heads, columns, blocks, dk.ptr, *dk.strides[1:], dk.shape[3],
              dv.ptr, *dv.strides[1:], dv.shape[3]]
    launcher.load(sum_groups_source(dk.dtype, whole_chunks(dk) and whole_chunks(dv))).launch(2 * blocks, values, stream)


# ---------------------------------------------------------------- merge_states
@cache
def merge_source(dtype: str, target: str | None = None) -> Source:
    """`target`: the result's dtype, None for the part's."""
    key = f"merge {dtype}" + (f" {target}" if target else "")
    return Source(key, lambda: (make_add_part(dtype, target or dtype), 0), fields_of(MERGE), MERGE_THREADS)


def merge_states(outs: list[View], lses: list[View], out: View, lse: View, launcher: Launcher, stream: int) -> None:
    """Enqueue writing out (batch, rows, heads, dim) and lse (batch, heads, rows) from parts of the same shapes, or all
    without the batch axis. out may be the first part, and lse its lse."""
    shape = (1,) * (4 - len(out.shape)) + out.shape
    rows, real = math.prod(shape[:3]), lse.itemsize
    if rows > MOST_BLOCKS:
        raise UnsupportedError(f"merge_states(): {rows} rows, more than 2**31 - 1.")
    if 0 in shape[:3]:
        return

    def strides(x: View, axes: int) -> tuple[int, ...]:
        return (0,) * (axes - len(x.strides)) + x.strides
    out_bytes = rows * shape[3] * real
    with launcher.temporary(out_bytes + 2 * rows * real, stream) as memory:
        result = out.ptr, *strides(out, 4), lse.ptr, *strides(lse, 3)
        for n, (part, part_lse) in enumerate(zip(outs, lses, strict=True)):
            values = [part.ptr, *strides(part, 4), part_lse.ptr, *strides(part_lse, 3), memory, memory + out_bytes, *result, int(n == 0),
                      int(n == len(outs) - 1), *shape[1:]]
            launcher.load(merge_source(part.dtype, None if part.dtype == out.dtype else out.dtype)).launch(rows, values, stream)


# ---------------------------------------------------------------- transform_bias_rescale_qkv
def _of(text: str, dtype: str) -> tuple[tuple[str, str], ...]:
    return fields_of(text.format(f="d" if dtype == "float64" else "f"))


@cache
def transform_source(dtype: str, whole: bool, packed: bool) -> Source:
    key = f"transform {dtype}" + " whole" * whole + " packed" * packed
    return Source(key, lambda: (make_transform(dtype, whole, packed), 0), _of(TRANSFORM, dtype), TRANSFORM_THREADS)


@cache
def transform_backward_source(dtype: str, whole: bool, packed: bool) -> Source:
    key = f"transform_backward {dtype}" + " whole" * whole + " packed" * packed
    return Source(key, lambda: (make_transform_backward(dtype, whole, packed), 0), _of(TRANSFORM_BACKWARD, dtype), TRANSFORM_THREADS)


@cache
def sum_rows_source(dtype: str) -> Source:
    return Source(f"sum_rows {dtype}", lambda: (make_sum_rows(dtype), 0), _of(SUM_ROWS, dtype), SUM_THREADS)


def _blocks(rows: int, block_rows: int, columns: int) -> tuple[int, int]:
    """(thread blocks of the grid, how many of them share rows)."""
    side = -(-columns // WARP)
    grid = -(-rows // block_rows) * side
    if grid > MOST_BLOCKS:
        raise UnsupportedError(f"transform_bias_rescale_qkv(): {grid} blocks of {block_rows} rows, more than 2**31 - 1.")
    return grid, side


def _vectors(width: int, size: int, whole: bool) -> int:
    """Vectors of a row of `width` elements: 16 bytes each, or one element each where rows are not made of aligned 16
    bytes."""
    return width * (size if whole else 16) // 16


def transform(qkv: View, qkv_bias: View, cu_seqlens: View | None, q: View, k: View, v: View, scale: float, launcher: Launcher,
              stream: int) -> None:
    """Enqueue writing q = (q + bias) * scale, k + bias and v + bias, contiguous (batch, num_heads, seqlen, head_dim).

    From qkv (batch, seqlen, 3 * width), or with cu_seqlens from packed rows (total, 3 * width); then rows past a
    sequence's end are zeros.
    """
    batch, num_heads, seqlen, head_dim = q.shape
    if 0 in q.shape:
        return
    size = qkv.itemsize
    whole = head_dim * size % 16 == 0 and whole_chunks(qkv) and whole_chunks(qkv_bias) and all(x.ptr % 16 == 0 for x in (q, k, v))
    columns, rows = _vectors(3 * num_heads * head_dim, size, whole), batch * seqlen
    grid, side = _blocks(rows, TRANSFORM_BLOCK_ROWS, columns)
    strides = qkv.strides if cu_seqlens is None else (0, *qkv.strides)
    lengths = (0, 0, 0) if cu_seqlens is None else (cu_seqlens.ptr, cu_seqlens.strides[0], qkv.shape[0])
    values = [qkv.ptr, *strides, qkv_bias.ptr, qkv_bias.strides[0], q.ptr, k.ptr, v.ptr, rows, seqlen, num_heads, head_dim, columns, side,
              scale, *lengths]
    launcher.load(transform_source(qkv.dtype, whole, cu_seqlens is not None)).launch(grid, values, stream)


def transform_backward(dq: View, dk: View, dv: View, cu_seqlens: View | None, dqkv: View, dqkv_bias: View, scale: float,
                       launcher: Launcher, stream: int) -> None:
    """Enqueue writing dqkv, contiguous rows of the forward's qkv, and dqkv_bias, their sum. dq, dk and dv have any
    strides.

    Rows of no sequence become 0. The sum is float32 (float64), in an order that only the shape decides.
    """
    batch, num_heads, seqlen, head_dim = dq.shape
    size, width, rows = dq.itemsize, dqkv.shape[-1], math.prod(dqkv.shape[:-1])
    if width == 0:
        return
    whole = head_dim * size % 16 == 0 and all(whole_chunks(x) for x in (dq, dk, dv)) and dqkv.ptr % 16 == 0
    columns = _vectors(width, size, whole)
    grid, side = _blocks(rows, LOOPS * TRANSFORM_BLOCK_ROWS, columns)
    tiles = grid // side
    real = 8 if dq.dtype == "float64" else 4
    with launcher.temporary(tiles * width * real, stream) as partial:
        lengths = (0, 0) if cu_seqlens is None else (cu_seqlens.ptr, cu_seqlens.strides[0])
        grads = [n for x in (dq, dk, dv) for n in (x.ptr, *x.strides)]
        values = [dqkv.ptr, partial, *grads, rows, seqlen, num_heads, head_dim, columns, side, scale, *lengths, batch]
        if grid:
            launcher.load(transform_backward_source(dq.dtype, whole, cu_seqlens is not None)).launch(grid, values, stream)
        values = [partial, tiles, width, dqkv_bias.ptr, dqkv_bias.strides[0]]
        launcher.load(sum_rows_source(dq.dtype)).launch(-(-width // WARP), values, stream)
