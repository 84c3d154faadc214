"""Launches of the kernels on plain threads: refuses, forward, backward, and dbias of every family. Without Numba."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..flex.config import ANY_ORDER, EXPONENTS, UNITS
from ..flex.derived import with_sums
from ..flex.launch import bitmap, bitmap_fields, captured_sums
from ..rows.launch import Rows, dsinks, preprocessed, refuses_rows
from ..runtime.compile import late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import LENGTHS, MOST_BLOCKS, lengths, most_tiles, table
from ..spec import AnyCall, Arguments, BackwardCall, Call, Launch, Spec
from ..traced import sum_fields
from .config import SimtConfig, block_m_of, choose_forward, parts_dkdv, tile_captured, tile_dbias, tile_dkdv, tile_dq

make_forward, places_of = late("simt.forward", "make_forward"), late("simt.pairs", "places_of")
make_dq, make_dkdv = late("simt.backward", "make_dq"), late("simt.backward", "make_dkdv")
make_dbias, make_captured = late("simt.dbias", "make_dbias"), late("simt.captured", "make_captured")
FORWARD = "table:l tiles:i head_group:i scale:{f} cap:{f} keep:{f}"
PAIRS = "row_lse:l row_delta:l rows:i scale:{f} cap:{f} keep:{f} "      # of every kernel of the backward: what pairs.py reads
DQ = "table:l tiles:i head_group:i "
DKDV = "table:l tiles:i head_group:i num_heads_k:i "
DBIAS = "dbias:l dbias_by_batch:q dbias_by_head:q dbias_by_row:q dbias_by_col:q batches:i heads:i bias_rows:i bias_cols:i "
LEAST_LINES = 16            # of a tile of the backward


def _of(text: str, spec: Spec) -> str:
    """Fields in the dtype of the arithmetic."""
    return text.format(f="d" if spec.dtype == "float64" else "f")


def refuses(call: AnyCall, d: Device) -> str | None:
    """None, but for caches, more tiles than a grid has blocks, or more rows than int32 counts."""
    if call.problem.cache is not None:
        return "it reads no caches"
    if isinstance(call, BackwardCall):
        tiles = max(most_tiles(call, LEAST_LINES), most_tiles(call, LEAST_LINES, by_keys=True))
        if tiles > MOST_BLOCKS:
            return f"it has {tiles} tiles of {LEAST_LINES} rows or keys, over 2**31 - 1"
        return refuses_rows(call)
    tiles = most_tiles(call, block_m_of(call.problem.dtype, call.problem.head_dim_v))
    return None if tiles <= MOST_BLOCKS else f"it has {tiles} tiles of query rows, over 2**31 - 1"


# ---------------------------------------------------------------- forward
@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: SimtConfig) -> Program:
    return program(f"forward_simt {spec.text} | {config.text}", lambda: make_forward(spec, config),
                   Arguments(spec, _of(FORWARD + bitmap_fields(spec), spec), ("q", "k", "v", "out")), config.threads,
                   config.blocks_per_sm)


def prepare(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only; before it, the table of a packed
    problem."""
    p, config = call.problem, choose_forward(spec)
    source, arguments = forward_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(call)
    block_m, block_n, tiles = config.block_m, config.block_n, most_tiles(call, config.block_m)
    own = tiles, p.group, p.score.softmax_scale, p.score.softcap or 0.0, p.dropout.keep_scale if p.dropout else 0.0

    def launch(call: Call, stream: int) -> None:
        with (table(call, block_m, launcher, stream) as sequences,
              bitmap(call, spec, block_m, block_n, launcher, stream) as kinds):
            kernel.launch(tiles, values(call, (sequences, *own, *kinds)), stream)
    return launch


# ---------------------------------------------------------------- backward
@lru_cache(maxsize=PROGRAMS)
def dq_program(spec: Spec) -> Program:
    tile = tile_dq(spec)
    return program(f"backward_simt dq {spec.text} | {tile.text}",
                   lambda: (make_dq(spec, tile), places_of(spec, tile).size),
                   Arguments(spec, DQ + _of(PAIRS + bitmap_fields(spec), spec), ("q", "k", "v", "dout", "dq")), tile.threads)


@lru_cache(maxsize=PROGRAMS)
def dkdv_program(spec: Spec, dk: bool, dv: bool) -> Program:
    tile = tile_dkdv(spec)
    return program(f"backward_simt {'dk' * dk + 'dv' * dv} {spec.text} | {tile.text}",
                   lambda: (make_dkdv(spec, tile, dk, dv), places_of(spec, tile).size),
                   Arguments(spec, DKDV + _of(PAIRS + bitmap_fields(spec), spec), ("q", "k", "v", "dout", "dk", "dv")), tile.threads)


def _values_of_pairs(call: BackwardCall, rows: Rows) -> tuple[Any, ...]:
    """Values of the fields PAIRS."""
    p = call.problem
    return (rows.lse, rows.delta, rows.count, p.score.softmax_scale, p.score.softcap or 0.0,
            p.dropout.keep_scale if p.dropout else 0.0)


def backward(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
    """Enqueue the kernels: lse and delta of rows, dk and dv, dq, dbias, dsinks."""
    p, plain = call.problem, replace(spec, sinks=None, dbias=None, deterministic=False)
    with preprocessed(call, spec, launcher, stream, log2=False) as rows:
        own = _values_of_pairs(call, rows)
        tile = tile_dkdv(plain)
        block, tiles = tile.lines, most_tiles(call, tile.lines, by_keys=True)
        if tiles:
            with (table(call, block, launcher, stream, by_keys=True) as sequences,
                  bitmap(call, spec, tile.columns, block, launcher, stream, by_keys=True) as kinds):
                values = sequences, tiles, 1, p.num_heads_k, *own, *kinds
                for part in parts_dkdv(plain):
                    dkdv_program(plain, *part).launch(launcher, tiles, call, values, stream)
        tile = tile_dq(plain)
        block, tiles = tile.lines, most_tiles(call, tile.lines)
        if tiles:
            with (table(call, block, launcher, stream) as sequences,
                  bitmap(call, spec, block, tile.columns, launcher, stream) as kinds):
                dq_program(plain).launch(launcher, tiles, call, (sequences, tiles, p.group, *own, *kinds), stream)
        dbias(call, spec, rows, launcher, stream)
        captured(call, spec, rows, launcher, stream)
        dsinks(call, spec, rows, launcher, stream)


# ---------------------------------------------------------------- dbias, for every family
@lru_cache(maxsize=PROGRAMS)
def dbias_program(spec: Spec, used: bool) -> Program:
    tile, own = tile_dbias(spec), DBIAS + _of(PAIRS, spec) + (LENGTHS if spec.packed else "")
    return program(f"dbias {spec.text}{' seqused_k' * used} | {tile.text}",
                   lambda: (make_dbias(spec, tile, used), places_of(spec, tile).size),
                   Arguments(spec, own, ("q", "k", "v", "dout")), tile.threads)


def dbias(call: BackwardCall, spec: Spec, rows: Rows, launcher: Launcher, stream: int) -> None:
    """Enqueue writing all of grads.dbias, if there is one."""
    x = call.grads.dbias
    if x is None or 0 in x.shape:
        return
    spec = replace(spec, sinks=None, deterministic=False)
    tile = tile_dbias(spec)
    own = (x.ptr, *x.strides, *x.shape, *_values_of_pairs(call, rows), *(lengths(call) if spec.packed else ()))
    tiles = x.shape[0] * x.shape[1] * -(-x.shape[2] // tile.lines) * -(-x.shape[3] // tile.columns)
    dbias_program(spec, call.problem.seqused_k).launch(launcher, tiles, call, own, stream)


# ---------------------------------------------------------------- gradients of captured arrays, for every family
@lru_cache(maxsize=PROGRAMS)
def captured_program(spec: Spec, arrays: tuple[int, ...], order: int = ANY_ORDER) -> Program:
    tile = tile_captured(spec)
    assert spec.score_mod is not None
    own = DQ + _of(PAIRS + bitmap_fields(spec), spec) + " " + sum_fields(spec.score_mod, arrays, order != ANY_ORDER)
    return program(f"captured {spec.text} of {arrays}{('', ' exponents', ' units')[order]} | {tile.text}",
                   lambda: (make_captured(spec, tile, arrays, order), places_of(spec, tile).size),
                   Arguments(spec, own, ("q", "k", "v", "dout")), tile.threads)


def captured(call: BackwardCall, spec: Spec, rows: Rows, launcher: Launcher, stream: int) -> None:
    """Enqueue writing all of grads.dcaptured, if there are any."""
    if spec.score_mod is None:
        return
    spec = replace(spec, sinks=None, dbias=None, deterministic=False)
    tile = tile_captured(spec)
    tiles = most_tiles(call, tile.lines)
    with captured_sums(call, launcher, stream) as (arrays, sums):
        if tiles and with_sums(spec.score_mod, arrays)[1]:
            with (table(call, tile.lines, launcher, stream) as sequences,
                  bitmap(call, spec, tile.lines, tile.columns, launcher, stream) as kinds):
                own = (sequences, tiles, call.problem.group, *_values_of_pairs(call, rows), *kinds, *sums)
                for order in (EXPONENTS, UNITS) if call.deterministic else (ANY_ORDER,):
                    captured_program(spec, arrays, order).launch(launcher, tiles, call, own, stream)
