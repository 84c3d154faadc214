"""Launches of the split-key kernel: which calls it runs, how keys are split. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from ...arrays.view import EIGHT_BIT, View
from ...masks import row_bounds
from ...problem import Problem
from ..rows.mask_words import mask_words
from ..runtime.arch import arch_of
from ..runtime.compile import late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import MOST_BLOCKS
from ..runtime.workspace import MOST_ARRIVALS
from ..spec import FAR_TOPS, MOST_FLOAT_DIM, Arguments, Call, Launch, Spec, make_spec, whole_chunks
from .config import (
    FEW_KEYS,
    HOPPER,
    LEAST_WIDTH,
    MASK_COLUMNS,
    MOST_CACHED_DIM,
    MOST_DIM,
    MOST_Q_DIM,
    MOST_SPLIT_KEYS,
    MOST_SPLITS,
    NATIVE,
    PLAN_ENTRY,
    PLAN_THREADS,
    PLANNED_REQUESTS,
    ROWS,
    WARP,
    WAVES,
    DecodeConfig,
    choose_cached,
    choose_decode,
    few_rows,
    most_units,
    page_division,
    plan_entries,
    with_blocks,
    with_cluster,
    with_columns,
    with_pairs,
    with_ring,
    with_tiles,
)

make_forward, make_plan = late("decode.forward", "make_forward"), late("decode.plan", "make_plan")
FORWARD = "part:l part_rows:l arrived:l lines:i splits:i split_keys:i first_key:i end_key:i heads_k:i"
LENGTHS = " lengths:l lengths_step:q cu_seqlens_q:l q_step:q room:i appends:i tiles:i"
SCALES = " " + " ".join(f"{x}_scale:l {x}_scale_batch:q {x}_scale_head:q" for x in "qkv") + " v_number:f"
PLAN = " plan:l"
MAKE_PLAN = "plan:l entries:i slots:i heads_k:i"
SHARED, PLAN_SHARED = " shared:i shared_part:l shared_rows:l shared_splits:i", " shared:i page_size:i"
TABLE = " table:l table_row:q table_entry:q last_page:i page_size:i page_magic:I page_shift:i"


class KeyCache(NamedTuple):
    """The caches that k and v of a call are, where they are more than arrays: how many keys a batch entry has, and where.

    Parameters
    ----------
    append
        A batch entry has as many keys as it has queries behind those that the call's seqused_k counts.
    block_table
        Gives the View of the pages of each batch entry, (batch, pages), or (batch,) for one page each. k and v are then (pages, page_size,
        num_heads_k, head_dim). None: k and v have a row for each batch entry.
    num_splits
        The most splits of an entry's keys. None: chosen. With 1 an entry's result has the same bits in any batch.
    """

    append: bool = False
    block_table: Callable[[Call], View] | None = None
    num_splits: int | None = None


def refuses_cache(call: Call, spec: Spec) -> str | None:
    """None, or why this kernel does not run a call whose k and v are a KeyCache."""
    p, o = call.problem, call.operands
    dim, most = max(p.head_dim, p.head_dim_v), MOST_FLOAT_DIM if spec.dtype == "float32" else MOST_CACHED_DIM
    if dim > most:
        return f"head_dim is {dim}, over {most}"
    blocks = p.num_heads_k * units_of(p, ROWS)
    if blocks > MOST_BLOCKS:
        return f"it has {blocks} blocks of {ROWS} query rows, over 2**31 - 1"
    if 0 in o.k.shape or p.seqlen_k > MOST_BLOCKS:
        return f"a request has room for {p.seqlen_k} keys in {o.k.shape[0]} pages"
    return None if all(0 in x.shape or whole_chunks(x) for x in (o.q, o.k, o.v)) else "rows are not whole, aligned pieces of 16 bytes"


def refuses_caches(call: Call) -> str | None:
    """None, or why no kernel runs this call of attention_with_kvcache."""
    p, extra = call.problem, call.operands.cache
    assert p.cache is not None and extra is not None
    if p.dtype not in FAR_TOPS or p.cache.dtype not in (p.dtype, *EIGHT_BIT):
        return f"it has no products of {call.operands.q.dtype} and {p.cache.dtype}"
    return refuses_cache(call, make_spec(p, call.operands, False))


def accepts(call: Call, spec: Spec, d: Device) -> bool:
    """Whether this kernel runs a call of a tensor-core family: few queries, many keys, dense, no dropout. Functions need registers for Q.

    Not a float32 call that gives lse: a backward may follow, which recomputes P as exp(S - lse). Its S has the bits of the tiled forwards'
    S. This kernel sums over head_dim in another order, and one unit in the last place of a score of 1e9 is 64.
    """
    p, o = call.problem, call.operands
    dim = max(p.head_dim, p.head_dim_v)
    if spec.parts > 1 and call.lse is not None:
        return False
    return (few_rows(p, d.num_sms) and p.seqlen_k >= FEW_KEYS and not p.packed and dim <= MOST_DIM
            and not spec.dropout and not (spec.traced and dim > MOST_Q_DIM) and all(whole_chunks(x) for x in (o.q, o.k, o.v)))


@lru_cache(maxsize=PROGRAMS)
def plan_program(left: bool, right: bool, packed: bool, step: int, overhead: int, rows: int, split_all: bool = False,
                 shared: str | None = None) -> Program:
    """The kernel that plans splits, of steps of `step` keys, of blocks of `rows` rows. shared: as in Spec."""
    spec = Spec("float16", 16, 16, left=left, right=right, packed=packed, lse=False, shared=shared)
    name = f"plan_splits {spec.text} | step {step} overhead {overhead} rows {rows}" + " all" * split_all
    fields = MAKE_PLAN + LENGTHS + PLAN_SHARED * (shared is not None)
    return program(name, lambda: (make_plan(spec, step, overhead, rows, split_all), 0), Arguments(spec, fields), PLAN_THREADS)


@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: DecodeConfig) -> Program:
    own = FORWARD + LENGTHS * spec.lengths + PLAN * spec.planned + SCALES * (spec.cache_dtype is not None) + TABLE * spec.paged
    own += SHARED * (spec.shared is not None)
    return program(f"forward_decode {spec.text} | {config.text}", lambda: make_forward(spec, config),
                   Arguments(spec, own, ("q", "k", "v", "out"), online=True),
                   WARP * config.warps, config.blocks_per_sm, config.early, config.cluster)


class Tiling(Protocol):
    """What `split_keys` knows of a kernel's tiling: keys of a block's step, what a block costs besides, in steps, and blocks of an SM."""

    @property
    def step(self) -> int: ...
    @property
    def overhead(self) -> int: ...
    @property
    def blocks_per_sm(self) -> int: ...


def split_keys(key_heads: int, keys: int, config: Tiling, num_sms: int) -> tuple[int, int]:
    """(number of splits, keys of each) for which the last thread block is estimated to end first. `key_heads`: of the whole batch."""
    return min(_times(key_heads, keys, config, num_sms))[1:]


def _times(key_heads: int, keys: int, config: Tiling, num_sms: int) -> Iterator[tuple[int, int, int]]:
    """(time, splits, keys of each) for all numbers of splits. Time is counted in steps of `config.keys` keys a warp, of a multiprocessor
    that is full of warps."""
    step, slots = config.step, num_sms * config.blocks_per_sm
    for count in range(1, min(MOST_SPLITS, -(-keys // step)) + 1 if key_heads <= MOST_ARRIVALS else 2):
        steps = -(-keys // (count * step))
        splits = -(-keys // (steps * step))
        yield -(-key_heads * splits // slots) * (steps + config.overhead), splits, steps * step


def with_warps(config: DecodeConfig, key_heads: int, keys: int, num_sms: int) -> DecodeConfig:
    """One thread block of eight warps a multiprocessor in place of two of four, where the last one is estimated to end at most 2 % later.

    There are fewer results to merge. Measured, its time as a part of the other's (docs/log-gpu.md): 1 x 8k and 32k keys 0.91 and 0.96,
    16 x 1k 0.91, 320 key heads of 1500 keys 0.93, 16 x 8k 1.01 and 1.0, 1 x 128k 0.99. Where the estimate is higher, 64 x 1k: 1.14. With an
    early launch 16 x 1k takes 0.97 of the time, and others as long; with two blocks 64 x 1k takes 1.04.
    """
    wide = replace(config, warps=8, blocks_per_sm=1, early=True)
    time, time_wide = (min(_times(key_heads, keys, x, num_sms))[0] for x in (config, wide))
    return wide if 50 * time_wide <= 51 * time else config


def _range(p: Problem, pairs: bool) -> tuple[int, int]:
    """The keys that any row attends; one key if there are none. They begin where steps can: with a mask at a multiple of MASK_COLUMNS,
    with `pairs` of a bias at an even key."""
    limits = p.seqlen_q, p.seqlen_k, p.mask.left, p.mask.right, p.mask.top_left, p.mask.first
    first, end = row_bounds(0, *limits)[0], row_bounds(p.seqlen_q - 1, *limits)[1]
    if first >= end:
        return 0, 1
    return first - first % (MASK_COLUMNS if p.score.mask else 2 if pairs else 1), end


def units_of(p: Problem, block_rows: int) -> int:
    """Blocks of rows of a key head, of all requests."""
    return most_units(p.batch, None if p.packed else p.seqlen_q * p.group, p.total_q or 0, p.group, block_rows)


def lengths_of(call: Call, append: bool, block_rows: int) -> tuple[int, ...]:
    """Values of LENGTHS."""
    used, cu, p = call.operands.seqused_k, call.operands.cu_seqlens_q, call.problem
    assert used is not None
    packed = (0, 0) if cu is None else (cu.ptr, cu.strides[0])
    return used.ptr, used.strides[0], *packed, p.seqlen_k, int(append), -(-p.seqlen_q * p.group // block_rows)


def cache_values(call: Call, cache: KeyCache, block_rows: int, plan: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Values of LENGTHS, of PLAN, of SCALES with 8-bit caches, and with a block table of TABLE."""
    k, p = call.operands.k, call.problem
    values: tuple[Any, ...] = *lengths_of(call, cache.append, block_rows), *plan
    if p.eight_bit is not None:
        values += scales_of(call, p.eight_bit.factor)
    if cache.block_table is not None:
        table, (pages, size) = cache.block_table(call), k.shape[:2]
        values += (table.ptr, table.strides[0], table.strides[1] if len(table.shape) == 2 else 0, pages - 1, size, *page_division(size))
    return values


def scales_of(call: Call, factor: float) -> tuple[Any, ...]:
    """Values of SCALES: of q, k and v, where they are arrays, and the output's factor."""
    o, values = call.operands, list[Any]()
    for x in (o.q_scale, o.k_scale, o.v_scale):
        values += [0, 0, 0] if x is None else [x.ptr, *x.strides]
    return *values, factor


def spec_of(call: Call, spec: Spec, cache: KeyCache | None) -> Spec:
    """The Spec of the kernel, if it has no plan."""
    spec = replace(spec, bias_whole=False, lengths=cache is not None, paged=cache is not None and cache.block_table is not None)
    e = call.problem.eight_bit
    return spec if e is None else replace(spec, cache_dtype=call.operands.k.dtype, out_dtype=e.out_dtype)


def of_pages(config: DecodeConfig, spec: Spec, call: Call, cache: KeyCache) -> DecodeConfig:
    """The tiling of a call over caches: whether steps, or all keys of a request, are in one page each."""
    shape = () if cache.block_table is None else cache.block_table(call).shape
    one_page = len(shape) == 1 or shape[1:] == (1,)
    whole = spec.paged and not one_page and call.operands.k.shape[1] % config.keys == 0 and not spec.left and config.stages > 0
    return replace(config, whole_pages=whole, one_page=one_page)


def prepare(call: Call, spec: Spec, launcher: Launcher, cache: KeyCache | None = None, config: DecodeConfig | None = None) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only.

    cache: what k and v are, if not arrays of problem.seqlen_k keys. Their lengths are seqused_k then, which the host does not read.
    config: a tiling to be used in place of the chosen one.
    """
    p = call.problem
    spec = spec_of(call, spec, cache)
    config = config or chosen(spec, p, cache, launcher.device)
    if cache is not None:
        config = of_pages(config, spec, call, cache)
        spec = replace(spec, planned=plans(p, config, cache.num_splits))
    source, arguments = forward_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(call)
    key_heads, rows, (first, end) = p.batch * p.num_heads_k, p.batch * p.num_heads * p.seqlen_q, _range(p, spec.bias_pairs)
    if cache is not None:
        key_heads = p.num_heads_k * units_of(p, config.rows)
        rows = key_heads * config.rows
    if cache is not None and plans(p, config, cache.num_splits):
        planned = prepare_planned(call, spec, launcher, cache, config)
        return lambda call, stream: planned(call, (), stream)
    splits, keys = split_keys(key_heads, end - first, config, launcher.device.num_sms)
    if cache is not None:
        one_block = not p.packed and p.seqlen_q * p.group <= config.rows
        splits = device_splits(key_heads, p.seqlen_k if one_block else 0, splits, cache.num_splits)
    if config.cluster > 1:
        step = config.keys * config.key_warps
        splits, keys = config.cluster, -(-(end - first) // (config.cluster * step)) * step
    grid, own = key_heads * splits, (rows, splits, keys, first, end, p.num_heads_k)
    width = max(config.keys, LEAST_WIDTH)
    out_bytes = 4 * splits * rows * spec.head_dim_v    # of the splits' outputs; then their maxima and sums

    def launch(call: Call, stream: int) -> None:
        more = () if cache is None else cache_values(call, cache, config.rows)
        with mask_words(call, width, launcher, stream) as call:
            kernel.launch(grid, values(call, (0, 0, 0, *own, *more)), stream)

    def launch_split(call: Call, stream: int) -> None:
        arrived, more = launcher.arrivals(launcher.capturing(stream)), () if cache is None else cache_values(call, cache, config.rows)
        with (mask_words(call, width, launcher, stream) as call,
              launcher.temporary(out_bytes + 8 * splits * rows, stream) as part):
            kernel.launch(grid, values(call, (part, part + out_bytes, arrived, *own, *more)), stream)
    return launch if splits == 1 or config.cluster > 1 else launch_split


def plans(p: Problem, config: DecodeConfig, num_splits: int | None) -> bool:
    """Whether the splits of a call over caches are planned on the device: some of several requests may be long."""
    some_blocks = p.packed or p.seqlen_q * p.group <= config.rows
    return some_blocks and num_splits is None and p.seqlen_k > MOST_SPLIT_KEYS and 1 < p.batch < PLANNED_REQUESTS


def prepare_planned(call: Call, spec: Spec, launcher: Launcher, cache: KeyCache,
                    config: DecodeConfig) -> Callable[[Call, tuple[int, ...], int], None]:
    """`prepare` with a plan: what enqueues both kernels, of a call, values of SHARED if the spec has them, and a stream."""
    p = call.problem
    slots, step = launcher.device.num_sms * config.blocks_per_sm, config.step
    entries = plan_entries(units_of(p, config.rows), p.num_heads_k, slots)
    # the planes of several splits are the first of the plan: at most two for each that fills WAVES waves
    assert 2 * WAVES * slots <= MOST_ARRIVALS
    makes = plan_program(spec.left, spec.right, spec.packed, step, config.overhead, config.rows, shared=spec.shared)
    maker, planned_by = launcher.load(makes.source), makes.arguments.bound(call)
    source, arguments = forward_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(call)
    grid, rows = entries * p.num_heads_k, p.num_heads_k * config.rows
    own = rows, 1, 0, 0, 0, p.num_heads_k
    out_bytes, plan_bytes = 4 * grid * config.rows * spec.head_dim_v, PLAN_ENTRY * entries
    rows_bytes = 8 * grid * config.rows

    def launch(call: Call, shared: tuple[int, ...], stream: int) -> None:
        arrived = launcher.arrivals(launcher.capturing(stream))
        with launcher.temporary(out_bytes + rows_bytes + plan_bytes, stream) as part:
            plan = part + out_bytes + rows_bytes
            lengths = lengths_of(call, cache.append, config.rows)
            of_plan = (shared[0], call.operands.k.shape[1]) if shared else ()
            maker.launch(1, planned_by(call, (plan, entries, slots, p.num_heads_k, *lengths, *of_plan)), stream)
            more = *cache_values(call, cache, config.rows, (plan,)), *shared
            kernel.launch(grid, values(call, (part, part + out_bytes, arrived, *own, *more)), stream)
    return launch


def chosen(spec: Spec, p: Problem, cache: KeyCache | None, d: Device) -> DecodeConfig:
    """The tiling of a call on a device. What is Hopper's alone here has been measured there alone."""
    asked = None if cache is None else cache.num_splits
    config = fitted(choose_decode(spec, p) if cache is None else choose_cached(spec, p, asked), spec, d)
    if arch_of(d.arch).number != HOPPER:
        return config
    config = with_tiles(spec, config)
    if config.row_warps > 1:
        return with_ring(spec, config, d.shared_memory)
    if spec.shared == "prefix":         # whose splits are merged behind it
        return config
    if asked is not None:
        return config
    if cache is not None and plans(p, config, asked):
        return with_columns(spec, p, config, True)
    key_heads, (first, end) = p.num_heads_k * (p.batch if cache is None else units_of(p, config.rows)), _range(p, spec.bias_pairs)
    found = with_blocks(spec, with_cluster(config, key_heads, end - first, d.num_sms), key_heads, d.num_sms)
    if found != config:
        return with_pairs(with_columns(spec, p, found, False), key_heads, d.num_sms)
    if spec.dtype == "float32" or (spec.cache_dtype is not None and config.row_tiles == 1):
        return found
    wide = with_warps(config, key_heads, end - first, d.num_sms)
    return config if wide == config else with_columns(spec, p, wide, False)


def fitted(config: DecodeConfig, spec: Spec, d: Device) -> DecodeConfig:
    """The tiling on a device: 64 rows of a wide Q need 142 KB of shared memory, 32 need 72."""
    native = spec.cache_dtype is not None and arch_of(d.arch).number >= NATIVE
    rows = min(config.row_warps, 2) if spec.head_dim > MOST_DIM and arch_of(d.arch).shared_memory < 160 else config.row_warps
    return replace(config, native=native, row_warps=rows)


def device_splits(key_heads: int, seqlen_k: int, splits: int, asked: int | None) -> int:
    """The most splits of a batch entry's keys, where only the device knows how many it has. seqlen_k: 0 where its rows are in several
    blocks, which are enough without.

    `splits` is right if all have seqlen_k keys. If few do, theirs are the last to end: so a split has MOST_SPLIT_KEYS at most. A thread
    block without keys ends at once.
    """
    if key_heads > MOST_ARRIVALS:
        return 1
    return min(MOST_SPLITS, max(splits, -(-seqlen_k // MOST_SPLIT_KEYS)) if asked is None else max(asked, 1))
