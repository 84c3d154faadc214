"""Launches of the mma.sync kernels: refuses, forward, backward. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

from ..decode import caches as decode_caches
from ..decode import launch as decode
from ..flex.ladder import first_that_fits
from ..flex.launch import bitmap, bitmap_fields, bitmap_sources
from ..rows.launch import dsinks, preprocessed, refuses_rows, round_dq
from ..rows.mask_words import mask_words
from ..rows.parts import as_parts, parts_of, refuses_parts
from ..runtime.arch import arch_of
from ..runtime.compile import late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import MOST_BLOCKS, head_group, most_tiles, table
from ..short import launch as short
from ..simt.launch import captured
from ..spec import AnyCall, Arguments, BackwardCall, Call, Launch, Spec, unfit, whole_chunks
from .config import (
    FEW_ROWS,
    FEW_ROWS_KEYS,
    MOST_DIM,
    ONE_TILE,
    ONE_TILE_KEYS,
    WARP,
    BackwardSm80Config,
    ForwardSm80Config,
    choose_backward,
    choose_forward,
    dq_columns,
)
from .config_traced import backward_ladder, forward_ladder

make_forward, make_backward = late("sm80.forward", "make_forward"), late("sm80.backward", "make_backward")
FORWARD = "table:l tiles:i head_group:i"
BACKWARD = "row_lse:l row_log2:l row_delta:l accum:l rows:i table:l tiles:i head_group:i num_heads_k:i grad_scale:f"
LEAST_KEYS = 32             # of a tile of the backward


def refuses(call: AnyCall, d: Device) -> str | None:
    """None, or why this family does not run the call."""
    if arch_of(d.arch).number < 80:
        return f"it needs sm_80, this is {d.arch}"
    if isinstance(call, Call) and call.problem.cache is not None:
        return decode.refuses_caches(call)
    if (reason := unfit(call.problem, MOST_DIM)) is not None:
        return reason
    if isinstance(call, BackwardCall):
        return _refuses_backward(call, d)
    if 0 in call.operands.k.shape:
        return "there are no keys"
    return refuses_parts(call) if call.problem.dtype == "float32" else None


def _refuses_backward(call: BackwardCall, d: Device) -> str | None:
    dq = call.grads.dq
    if 0 in call.operands.q.shape:
        return "there are no query rows"
    if short.accepts(call):
        return None
    if call.deterministic:
        return "its sums of dq come in any order"
    if call.grads.dbias is not None:
        return "it has no dbias"
    if call.problem.dtype != "float32" and dq.strides[-1] != dq.itemsize and dq.shape[-1] > 1:
        return "dq: its last axis is not contiguous"
    tiles = most_tiles(call, LEAST_KEYS, by_keys=True)
    if tiles > MOST_BLOCKS:
        return f"it has {tiles} tiles of {LEAST_KEYS} keys, over 2**31 - 1"
    if call.problem.dtype == "float32" and max(call.problem.head_dim, call.problem.head_dim_v) > 64 and arch_of(d.arch).shared_memory < 160:
        return "head_dim over 64 in float32 does not fit its shared memory"
    return refuses_rows(call) or (refuses_parts(call) if call.problem.dtype == "float32" else None)


# ---------------------------------------------------------------- forward
def one_tile(call: Call) -> bool:
    """Whether a head is one tile of queries over few keys. The tiles of longer sequences would be mostly padding."""
    p = call.problem
    keys = FEW_ROWS_KEYS if p.seqlen_q <= FEW_ROWS else ONE_TILE_KEYS
    short = not p.packed and max(p.seqlen_q, p.head_dim, p.head_dim_v) <= ONE_TILE and p.seqlen_k <= keys
    return short and p.dtype != "float32" and p.flex is None


@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: ForwardSm80Config) -> Program:
    return program(f"forward_sm80 {spec.text} | {config.text}", lambda: make_forward(spec, config),
                   Arguments(spec, FORWARD + bitmap_fields(spec), ("q", "k", "v", "out"), online=True), WARP * config.warps,
                   config.blocks_per_sm)


@lru_cache(maxsize=PROGRAMS)
def _forward_config(spec: Spec, arch: str, whole: bool, whole_out: bool, rows: int) -> ForwardSm80Config:
    if not spec.traced:
        return choose_forward(spec, arch, whole, whole_out, rows)
    return first_that_fits(forward_ladder(spec, arch, whole, whole_out), partial(forward_program, spec), arch,
                           lambda config: bitmap_sources(spec, config.block_m, config.block_n))


def prepare(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only; before it, the words of a mask and
    the table of a packed problem."""
    if call.problem.cache is not None:
        return decode_caches.prepare_caches(call, spec, launcher)
    if decode.accepts(call, spec, launcher.device):
        return decode.prepare(call, spec, launcher)
    o = call.operands
    whole = spec.parts > 1 or (whole_chunks(o.q) and whole_chunks(o.k) and whole_chunks(o.v))
    rows = call.problem.seqlen_q if one_tile(call) else 0
    config = _forward_config(spec, launcher.device.arch, whole, whole_chunks(call.out), rows)
    source, arguments = forward_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(parts_of(call, 0)[0] if spec.parts > 1 else call)
    block_m, block_n, tiles, heads = config.block_m, config.block_n, most_tiles(call, config.block_m), head_group(call)

    def launch(call: Call, stream: int) -> None:
        with (table(call, block_m, launcher, stream) as sequences, mask_words(call, block_n, launcher, stream) as call,
              bitmap(call, spec, block_m, block_n, launcher, stream) as kinds):
            kernel.launch(tiles, values(call, (sequences, tiles, heads, *kinds)), stream)

    def launch_float(call: Call, stream: int) -> None:
        with as_parts(call, launcher, stream) as split:
            launch(split, stream)
    return launch_float if spec.parts > 1 else launch


# ---------------------------------------------------------------- backward
@lru_cache(maxsize=PROGRAMS)
def backward_program(spec: Spec, config: BackwardSm80Config) -> Program:
    return program(f"backward_sm80 {spec.text} | {config.text}", lambda: make_backward(spec, config),
                   Arguments(spec, BACKWARD + bitmap_fields(spec), ("q", "k", "v", "dout", "dk", "dv")), WARP * config.warps,
                   config.blocks_per_sm)


@lru_cache(maxsize=PROGRAMS)
def _backward_config(spec: Spec, arch: str, whole: bool, whole_out: bool) -> BackwardSm80Config:
    if not spec.traced:
        return choose_backward(spec, arch, whole, whole_out)
    return first_that_fits(backward_ladder(spec, arch, whole, whole_out), partial(backward_program, spec), arch,
                           lambda config: bitmap_sources(spec, config.block_m, config.block_n, True))


def backward(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
    """Enqueue the kernels: lse and delta of rows, the gradients, dq from its sums, dsinks."""
    if short.accepts(call):
        return short.backward(call, spec, launcher, stream)
    p, o, g = call.problem, call.operands, call.grads
    plain = replace(spec, sinks=None, dbias=None, deterministic=False)
    whole = spec.parts > 1 or all(whole_chunks(x) for x in (o.q, o.k, o.v, call.dout))
    config = _backward_config(plain, launcher.device.arch, whole, whole_chunks(g.dk) and whole_chunks(g.dv))
    tiles, columns = most_tiles(call, config.block_n, True), dq_columns(spec)
    with preprocessed(call, spec, launcher, stream, accum_dim=columns) as rows:
        if tiles:
            with (table(call, config.block_n, launcher, stream, True) as sequences, as_parts(call, launcher, stream) as given,
                  mask_words(given, config.block_m // config.split, launcher, stream, True) as words,
                  bitmap(call, spec, config.block_m, config.block_n, launcher, stream, True) as kinds):
                own = (rows.lse, rows.log2, rows.delta, rows.accum, rows.count, sequences, tiles, head_group(call, True),
                       p.num_heads_k, p.score.softmax_scale, *kinds)
                backward_program(plain, config).launch(launcher, tiles, words, own, stream)
        round_dq(call, spec, rows, columns, launcher, stream, config.vector)
        captured(call, spec, rows, launcher, stream)
        dsinks(call, spec, rows, launcher, stream)
