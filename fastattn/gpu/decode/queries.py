"""The queries of the split-key kernel: in registers, or where these do not hold them in shared memory. And their products with keys."""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx import direct, direct_8bit, direct_columns, direct_parts
from ..ptx.scalar import load_shared, store_shared
from ..spec import Spec
from ..tile.fragments import lane_row, quad_max, zeros
from .combine import query_of
from .config import ROWS, DecodeConfig, chunks_of, q_words
from .prefix import of_shared


class HeldQ(NamedTuple):
    """Rows g and g + 8 of a warp's Q, a lane's chunks, and the factors of their scores."""

    row0: Any
    row1: Any
    unit0: Any
    unit1: Any


class KeptQ(NamedTuple):
    """The address of a lane's operands in shared memory, and the factors of its rows' scores."""

    address: Any
    unit0: Any
    unit1: Any


class Queries(NamedTuple):
    """Device functions.

    q = load_q(a, base, place, first, lane, w, rows)
        A warp's rows of the block's Q. By all threads: with Q in shared memory behind a barrier.
    unit0, unit1 = units_of(base, first)
        The factors of the scores of rows `first` and first + 8.
    acc_s = scores_of(q, k)
        S = Q K^T.
    """

    load_q: Any
    units_of: Any
    scores_of: Any


def q_bytes(spec: Spec, config: DecodeConfig) -> int:
    """Bytes of a warp's tile of Q in shared memory."""
    return direct.Q_STEP * chunks_of(spec, config).k * q_words(spec, config)


def make_products(spec: Spec, config: DecodeConfig) -> tuple[Any, Any, Any]:
    """(keep_q, qk, pv)."""
    TILES = config.row_tiles
    if spec.dtype == "float32":
        return direct_parts.keep_q, direct_parts.qk, direct_parts.pv
    if config.columns:
        (qk, pv), (keep_q, kept_qk) = direct_columns.make_products(spec.dtype), direct_columns.make_kept(spec.dtype)
    else:
        (qk, pv), (keep_q, kept_qk) = direct.make_products(spec.dtype, TILES), direct.make_kept(spec.dtype, TILES)
    if spec.cache_dtype is not None:
        qk, kept_qk, pv = direct_8bit.make_products(spec.p_dtype, spec.cache_dtype, config.native, TILES)
    return keep_q, kept_qk if config.keep_q else qk, pv


def make_queries(spec: Spec, config: DecodeConfig, Q: int, UNITS: int) -> Queries:
    """Q, UNITS: offsets in shared memory, of the rows and of the factors of their scores."""
    KEY_WARPS, KEEP_Q, TILES, COLUMNS = config.key_warps, config.keep_q, config.row_tiles, config.columns
    CHUNK, CHUNKS, _, WHOLE, _ = chunks_of(spec, config)
    COUNT_S, Q_BYTES = config.fragment_keys // 2 * TILES, q_bytes(spec, config)
    NARROW, EIGHT_BIT = spec.p_dtype != spec.dtype, spec.cache_dtype is not None        # q is bfloat16, and float16 in products
    (PREFIX, _), PACKED, (keep_q, qk, _) = of_shared(spec), spec.packed, make_products(spec, config)
    (load_rows, _), load_every_second = direct.make_loads(config.row_warps == 1), direct.make_load_pairs(config.row_warps == 1)
    read, put = load_shared("float32", 1), store_shared("float32")

    @inline
    def q_row(a, place, r, chunk):
        """A lane's chunks of row r of Q."""
        i, head = query_of(a, place, r)
        if PREFIX and not PACKED:
            batch = divide(i, a.seqlen_q)
            address = uint64(a.q + uint64(batch * a.q_batch + (i - batch * a.seqlen_q) * a.q_row + head * a.q_head))
        else:
            address = uint64(a.q + uint64(place.batch * a.q_batch + (place.q_start + i) * a.q_row + head * a.q_head))
        if EIGHT_BIT:       # a chunk of K has as many elements as two of Q
            left, address = int32(divide(a.head_dim, 8) - 2 * chunk), uint64(address + uint64(32 * chunk))
            even = load_every_second(address, int64(0), int32(0), int32(0), 8, CHUNKS, left, 0, int32(0))
            odd = load_every_second(uint64(address + uint64(16)), int64(0), int32(0), int32(0), 8, CHUNKS, int32(left - 1), 0, int32(0))
            return direct_8bit.weave(even, odd)
        address = uint64(address + uint64(16 * chunk))
        return load_rows(address, int64(0), int32(0), int32(0), 8, CHUNKS, int32(divide(a.head_dim, CHUNK) - chunk), WHOLE, int32(0))

    @inline
    def narrow(words):
        """(a lane's chunks of a row of Q for products, the factor of the row's scores): times a power of two all are below 2**15. What is
        below 2**-28 of the largest number of the row loses bits, an error of 2**-39 of that number."""
        if NARROW:
            factor, unit = direct_8bit.factors(quad_max(direct_8bit.largest(words)))
            return direct_8bit.narrowed(words, factor), unit
        else:
            return words, float32(1)

    @inline
    def load_pair(a, place, r0, r1, lane):
        """Rows of the block for products, and the factors of their scores."""
        (q0, unit0), (q1, unit1) = narrow(q_row(a, place, r0, int32(lane & 3))), narrow(q_row(a, place, r1, int32(lane & 3)))
        return HeldQ(q0, q1, unit0, unit1)

    @inline
    def store_pair(base, address, first, q):
        keep_q(address, q.row0, q.row1)
        if NARROW:      # the lanes of a quad write the same
            units = int32(base + UNITS + 4 * first)
            put(units, q.unit0)
            put(int32(units + 32), q.unit1)

    @inline
    def units_of(base, first):
        """The factors of the scores of rows `first` and first + 8."""
        if NARROW:
            units = int32(base + UNITS + 4 * first)
            return read(units)[0], read(int32(units + 32))[0]
        else:
            return float32(1), float32(1)

    @inline
    def load_columns_of_q(a, base, place, lane, w, rows):
        """Row g, in registers or in shared memory."""
        q = q_row(a, place, int32(min(lane_row(lane), rows - 1)), int32(lane & 3))
        if KEEP_Q:
            address = int32(base + Q + 16 * lane)
            if w == 0:
                keep_q(address, q)
            cuda.syncthreads()
            return KeptQ(address, float32(1), float32(1))
        else:
            return HeldQ(q, int32(0), float32(1), float32(1))

    @inline
    def load_q(a, base, place, first, lane, w, rows):
        """Rows g and g + 8 of the warp, `first` and first + 8 of the block; of a second tile rows behind them, in shared memory."""
        if COLUMNS:
            return load_columns_of_q(a, base, place, lane, w, rows)
        r0, r1 = int32(min(first, rows - 1)), int32(min(first + 8, rows - 1))
        if KEEP_Q:
            address = int32(base + Q + divide(w, KEY_WARPS) * (TILES * Q_BYTES) + 16 * lane)
            if w - divide(w, KEY_WARPS) * KEY_WARPS == 0:
                store_pair(base, address, first, load_pair(a, place, r0, r1, lane))
                if TILES == 2:
                    r0, r1 = int32(min(first + ROWS, rows - 1)), int32(min(first + ROWS + 8, rows - 1))
                    store_pair(base, int32(address + Q_BYTES), int32(first + ROWS), load_pair(a, place, r0, r1, lane))
            cuda.syncthreads()
            unit0, unit1 = units_of(base, first)
            return KeptQ(address, unit0, unit1)
        else:
            return load_pair(a, place, r0, r1, lane)

    @inline
    def scores_of(q, k):
        """S = Q K^T."""
        if KEEP_Q:
            return qk(zeros(COUNT_S), q.address, k)
        elif COLUMNS:
            return qk(zeros(COUNT_S), q.row0, k)
        else:
            return qk(zeros(COUNT_S), q.row0, q.row1, k)
    return Queries(load_q, units_of, scores_of)
