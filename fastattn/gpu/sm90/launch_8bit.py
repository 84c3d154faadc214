"""Launches of the Hopper forward on 8-bit operands: refuses, prepare. Without Numba: see runtime/compile.py."""
from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from ...arrays.view import EIGHT_BIT, View, contiguous
from ..config import num_features
from ..rows import widen_launch
from ..rows.append_launch import is_paged
from ..rows.config import TRANSPOSE_THREADS
from ..rows.quantize_launch import four_axes
from ..runtime.compile import Source, fields_of, late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import LENGTHS, MOST_BLOCKS, head_group, lengths, most_tiles, table
from ..runtime.tensormap import fits
from ..spec import LOG2E, AnyCall, Arguments, Call, Launch, Spec, make_spec, whole_chunks
from . import caches
from .config import OUT_ROWS, WARPGROUP
from .config_8bit import DIMS, Forward8BitConfig, choose_forward_8bit

make_forward_8bit, make_transpose = late("sm90.forward_8bit", "make_forward_8bit"), late("rows.transpose_8bit", "make_transpose")
FORWARD = "map_q:l map_k:l map_v:l map_out:l counter:l table:l tiles:i head_group:i scales:l num_heads_k:i"
SCALED_V = ("v:l v_batch:q v_row:q v_head:q vt:l scales:l log2_scale:f factor:f q_scale:l q_scale_batch:q q_scale_head:q "
             "k_scale:l k_scale_batch:q k_scale_head:q v_scale:l v_scale_batch:q v_scale_head:q out_scale:l "
            "blocks:i heads:i batch:i seqlen_k:i total_q:i ")
TRANSPOSE = SCALED_V + LENGTHS
CACHED = SCALED_V + ("lengths:l lengths_step:q seqlen_q:i room:i appends:i table:l table_row:q table_entry:q last_page:i page_size:i "
                     "k:l k_batch:q k_row:q k_head:q k_to:l")
ALIGN = 256                                     # of the arrays in the temporary memory


def spec_of(call: Call) -> Spec:
    """The Spec of the kernel: `make_spec` with the output's dtype."""
    return replace(make_spec(call.problem, call.operands, call.lse is not None), out_dtype=call.problem.out_dtype)


def refuses(call: AnyCall, d: Device) -> str | None:
    """None, or why the call is not run on 8-bit products. Other kernels run it, widened."""
    o = call.operands
    if not isinstance(call, Call) or (reason := _refuses_kind(call, d)) is not None:
        return "8-bit operands have no backward" if not isinstance(call, Call) else reason
    for name, x in (("q", o.q), ("k", o.k), ("v", o.v), ("out", call.out)):
        if (reason := fits(x)) is not None:
            return f"{name}: {reason}"
    grid = _grid(call, choose_forward_8bit(spec_of(call)))
    return None if grid <= MOST_BLOCKS else f"it has {grid} blocks of keys, over 2**31 - 1"


def _refuses_kind(call: Call, d: Device) -> str | None:
    """`refuses` of what caches and arrays have in common."""
    p, o = call.problem, call.operands
    if d.arch != "sm_90a" or p.dtype not in EIGHT_BIT:
        return "only Hopper has 8-bit products, of 8-bit q, k and v"
    if p.head_dim != p.head_dim_v or p.head_dim not in DIMS:
        return f"head sizes are {p.head_dim} and {p.head_dim_v}, not both one of {', '.join(map(str, DIMS))}"
    spec = make_spec(p, o, False)
    if num_features(spec) or spec.scaled or spec.sinks:
        return "it has features that the 8-bit kernel has not"
    return "it has no keys" if p.seqlen_k == 0 or (p.packed and not p.batch) else None


# ---------------------------------------------------------------- the transposed V, and scales
def _blocks(call: Call, block_n: int) -> int:
    """Blocks of keys of a head; packed: of all sequences together, each of which begins with a block of its own."""
    p = call.problem
    return (p.total_k or 0) // block_n + p.batch + 1 if p.packed else -(-p.seqlen_k // block_n)


@cache
def transpose_source(dim: int, block_n: int, panel: int, packed: bool, used: bool) -> Source:
    key = f"transpose_8bit {dim} blocks of {block_n}" + " packed" * packed + " seqused_k" * used
    return Source(key, lambda: make_transpose(dim, block_n, panel, packed, used), fields_of(TRANSPOSE), TRANSPOSE_THREADS)


@cache
def cached_source(dim: int, block_n: int, panel: int, paged: bool) -> Source:
    key = f"transpose_8bit {dim} blocks of {block_n} cached" + " paged" * paged
    return Source(key, lambda: make_transpose(dim, block_n, panel, False, False, True, paged), fields_of(CACHED), TRANSPOSE_THREADS)


def transposed(call: Call, config: Forward8BitConfig, address: int) -> View:
    """The transposed V at an address, as tensor maps take it: rows are panels of keys of one column."""
    p = call.problem
    rows = _blocks(call, config.block_n) * (config.block_n // config.panel) * p.head_dim
    batch = () if p.packed else (p.batch,)
    shape = (*batch, p.num_heads_k, rows, config.panel)
    *by_batch, by_head, by_row, _ = contiguous(shape, 1)
    return View(address, (*batch, rows, p.num_heads_k, config.panel), (*by_batch, by_row, by_head, 1), call.operands.v.dtype,
                call.operands.v.device)


def _values(call: Call, config: Forward8BitConfig, to: int, scales: int) -> list[Any]:
    """Values of SCALED_V."""
    p, o, e = call.problem, call.operands, call.problem.eight_bit
    assert e is not None
    v = four_axes(o.v)
    values: list[Any] = [v.ptr, *v.strides[:3], to, scales, p.score.softmax_scale * LOG2E, e.factor]
    for x in (o.q_scale, o.k_scale, o.v_scale):
        values += [0, 0, 0] if x is None else [x.ptr, *x.strides]
    out_scale = 0 if o.out_scale is None else o.out_scale.ptr
    return [*values, out_scale, _blocks(call, config.block_n), p.num_heads_k, p.batch, p.seqlen_k, p.total_q or 0]


def _grid(call: Call, config: Forward8BitConfig) -> int:
    p = call.problem
    return p.num_heads_k * _blocks(call, config.block_n) * (1 if p.packed else p.batch)


def transpose(call: Call, config: Forward8BitConfig, to: int, scales: int, launcher: Launcher, stream: int) -> None:
    """Enqueue writing the transposed V and the scales of each (batch, key head)."""
    p = call.problem
    source = transpose_source(p.head_dim, config.block_n, config.panel, p.packed, p.seqused_k)
    launcher.load(source).launch(_grid(call, config), [*_values(call, config, to, scales), *lengths(call)], stream)


def transpose_cached(call: Call, config: Forward8BitConfig, to: int, scales: int, keys: int, launcher: Launcher, stream: int) -> None:
    """The same of caches, whose K is copied to `keys`."""
    p, o, paged = call.problem, call.operands, is_paged(call)
    assert o.seqused_k is not None and o.cache is not None and p.cache is not None
    table, (pages, size) = o.cache.block_table, o.k.shape[:2]
    entries = (table.ptr, table.strides[0], table.strides[1] if len(table.shape) == 2 else 0) if paged else (0, 0, 0)
    values = [*_values(call, config, to, scales), o.seqused_k.ptr, o.seqused_k.strides[0], p.seqlen_q, p.seqlen_k, int(p.cache.append),
              *entries, pages - 1, size, o.k.ptr, *o.k.strides[:3], keys]
    launcher.load(cached_source(p.head_dim, config.block_n, config.panel, paged)).launch(_grid(call, config), values, stream)


# ---------------------------------------------------------------- forward
@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: Forward8BitConfig, dtype_k: str, dtype_v: str) -> Program:
    kinds = "" if (dtype_k, dtype_v) == (spec.dtype, spec.dtype) else f" k={dtype_k} v={dtype_v}"
    return program(f"forward_sm90_8bit {spec.text}{kinds} | {config.text}", lambda: make_forward_8bit(spec, config, dtype_k, dtype_v),
                   Arguments(spec, FORWARD + caches.LENGTHS * spec.lengths, ("out",)), WARPGROUP * (1 + config.consumers), early=True)


def prepare(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernels for this call, or one that differs in addresses only: the transposition of V and the forward; before them
    the table of a packed problem."""
    return prepare_as(call, choose_forward_8bit(spec_of(call)), launcher)


def prepare_as(call: Call, config: Forward8BitConfig, launcher: Launcher) -> Launch:
    """`prepare` with a tiling."""
    p, e = call.problem, call.problem.eight_bit
    assert e is not None
    source, arguments = forward_program(spec_of(call), config, e.dtype_k, e.dtype_v)
    kernel, values = launcher.load(source), arguments.bound(call)
    tiles, heads, grid = most_tiles(call, config.block_m), head_group(call), min(most_tiles(call, config.block_m), launcher.device.num_sms)
    scale_bytes = -(-8 * p.batch * p.num_heads_k // ALIGN) * ALIGN
    size = scale_bytes + math.prod(transposed(call, config, 0).shape)

    def launch(call: Call, stream: int) -> None:
        o = call.operands
        with launcher.temporary(size, stream) as memory, table(call, config.block_m, launcher, stream) as sequences:
            transpose(call, config, memory + scale_bytes, memory, launcher, stream)
            vt, captured = transposed(call, config, memory + scale_bytes), launcher.capturing(stream)
            boxes = (o.q, config.block_m), (o.k, config.block_n), (vt, p.head_dim)
            maps = launcher.tensor_maps((*boxes, (call.out, OUT_ROWS)) if config.out_panels else boxes, captured)
            map_out = maps[3] if config.out_panels else 0       # else stored from the registers
            own = (*maps[:3], map_out, launcher.counter(captured), sequences, tiles, heads, memory, p.num_heads_k)
            kernel.launch(grid, values(call, own), stream)
    return launch


# ---------------------------------------------------------------- caches
def refuses_caches(call: Call, d: Device) -> str | None:
    """None, or why a call of attention_with_kvcache does not run on 8-bit products. Other kernels run it, with a wider q."""
    p, o = call.problem, call.operands
    assert p.cache is not None
    if (reason := _refuses_kind(call, d)) is not None:
        return reason
    if p.packed or p.cache.rotary is not None or p.mask.left is not None:
        return "it is packed, rotates q or has a window"
    if p.seqlen_k > caches.MOST_KEYS:
        return f"a request has room for {p.seqlen_k} keys, over {caches.MOST_KEYS}"
    if not (whole_chunks(o.k) and whole_chunks(o.v)):
        return "rows of the caches are not whole, aligned pieces of 16 bytes"
    for name, x in (("q", o.q), ("out", call.out)):
        if (reason := fits(x)) is not None:
            return f"{name}: {reason}"
    grid = _grid(call, choose_forward_8bit(spec_of(call)))
    return None if grid <= MOST_BLOCKS else f"it has {grid} blocks of keys, over 2**31 - 1"


def takes_caches(call: Call, wide: Call, d: Device) -> bool:
    """Whether a call of attention_with_kvcache runs here. wide: the one with a q of 16 bits, which the split-key kernel runs where it has
    few rows."""
    if refuses_caches(call, d) is not None or widen_launch.parts_of(call) is None:
        return False
    return not caches.by_splits(wide, d, None)


def prepare_caches(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """`prepare` for a call of attention_with_kvcache, behind its append: K and V go to temporary memory, in the parts of widen_launch."""
    parts, spec = widen_launch.parts_of(call), replace(spec_of(call), lengths=True)
    e, config = call.problem.eight_bit, choose_forward_8bit(spec)
    assert parts is not None and e is not None
    source, arguments = forward_program(spec, config, e.dtype_k, e.dtype_v)
    kernel = launcher.load(source)
    size = _sizes(widen_launch.of_part(call, parts[0]), config)[-1]

    def launch(call: Call, stream: int) -> None:
        with launcher.temporary(size, stream) as memory:
            for part in parts:
                attend(widen_launch.of_part(call, part), memory, stream)

    def attend(call: Call, memory: int, stream: int) -> None:
        p, o = call.problem, call.operands
        values_at, keys_at, _ = (memory + n for n in _sizes(call, config))
        transpose_cached(call, config, values_at, memory, keys_at, launcher, stream)
        shape = p.batch, p.seqlen_k, p.num_heads_k, p.head_dim
        k = View(keys_at, shape, contiguous(shape, 1), o.k.dtype, o.k.device)
        captured = launcher.capturing(stream)
        boxes = (o.q, config.block_m), (k, config.block_n), (transposed(call, config, values_at), p.head_dim)
        maps = launcher.tensor_maps((*boxes, (call.out, OUT_ROWS)) if config.out_panels else boxes, captured)
        map_out, tiles = maps[3] if config.out_panels else 0, most_tiles(call, config.block_m)
        own = (*maps[:3], map_out, launcher.counter(captured), 0, tiles, head_group(call), memory, p.num_heads_k, *caches.lengths(call))
        kernel.launch(min(tiles, launcher.device.num_sms), arguments.values(call, own), stream)
    return launch


def _sizes(call: Call, config: Forward8BitConfig) -> tuple[int, int, int]:
    """Where the transposed V, and the copy of K begin behind the scales, and where all ends."""
    p = call.problem
    values = -(-8 * p.batch * p.num_heads_k // ALIGN) * ALIGN
    keys = values + -(-math.prod(transposed(call, config, 0).shape) // ALIGN) * ALIGN
    return values, keys, keys + p.batch * p.seqlen_k * p.num_heads_k * p.head_dim
