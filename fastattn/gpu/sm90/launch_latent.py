"""Launches of the Hopper kernel for few queries over a latent cache. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

from ...arrays.view import View
from ...problem import Problem
from ..decode import launch as decode
from ..decode.config import PLAN_ENTRY, PLANNED_REQUESTS, WAVES, plan_entries
from ..runtime.compile import late
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.tensormap import form
from ..spec import Arguments, Call, Launch, Spec
from . import caches
from .config_latent import FEW_KEYS, MERGES, ROWS, THREADS, LatentConfig, box_of

make_latent, make_merge = late("sm90.latent", "make_latent"), late("decode.combine", "make_merge")
LATENT = "map_k:l part:l part_rows:l lines:i splits:i heads_k:i pieces:i"


def _own(spec: Spec) -> str:
    return (LATENT + decode.LENGTHS + decode.PLAN * spec.planned + decode.SCALES * (spec.cache_dtype is not None)
            + caches.PAGES * spec.paged)


def _strided(spec: Spec) -> tuple[str, ...]:
    """Keys of 8 bits are loaded without TMA."""
    return ("q", "out") if spec.cache_dtype is None else ("q", "k", "out")


@lru_cache(maxsize=PROGRAMS)
def latent_program(spec: Spec, config: LatentConfig) -> Program:
    return program(f"latent_sm90 {spec.text} | {config.text}", lambda: make_latent(spec, config),
                   Arguments(spec, _own(spec), _strided(spec), online=True), THREADS)


@lru_cache(maxsize=PROGRAMS)
def merge_program(spec: Spec, step: int, overhead: int) -> Program:
    """The kernel that merges splits of steps of `step` keys."""
    return program(f"merge_splits {spec.text} | rows {ROWS} step {step} overhead {overhead}",
                   lambda: make_merge(spec, ROWS, step, overhead), Arguments(spec, _own(spec), _strided(spec), online=True),
                   spec.head_dim_v // 4, early=True)


def tiling(call: Call, config: LatentConfig) -> LatentConfig:
    """The tiling for the call's pages."""
    box = box_of(call, config.block_n)
    return replace(config, box=box, whole=box == call.operands.k.shape[1])


def plans(p: Problem) -> bool:
    """Whether splits are planned on the device, where alone it is known how long requests are: of several that may be long."""
    return p.cache is not None and p.cache.num_splits is None and p.seqlen_k > FEW_KEYS and 1 < p.batch < PLANNED_REQUESTS


def lengths_of(call: Call) -> tuple[int, ...]:
    """Values of decode.LENGTHS; over arrays without addresses."""
    p = call.problem
    if p.cache is None:
        return 0, 0, 0, 0, p.seqlen_k, 0, -(-p.seqlen_q * p.group // ROWS)
    return decode.lengths_of(call, p.cache.append, ROWS)


def prepare(call: Call, spec: Spec, launcher: Launcher, config: LatentConfig | None = None) -> Launch:
    """What enqueues the kernels for this call, or one that differs in addresses only: a plan of the splits, where requests may have
    different lengths; the kernel; the merge of its splits."""
    p, planned, slots, config = call.problem, plans(call.problem), launcher.device.num_sms, tiling(call, config or LatentConfig())
    spec = replace(spec if p.cache is None else caches.spec_of(call, spec), planned=planned)
    if p.eight_bit is not None:
        spec = replace(spec, cache_dtype=call.operands.k.dtype, out_dtype=p.eight_bit.out_dtype)
    source, arguments = latent_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(call)

    def boxes(call: Call) -> tuple[tuple[View, int], ...]:
        return ((call.operands.k, config.box),) if p.eight_bit is None else ()
    forms = tuple(form(x, rows) for x, rows in boxes(call))
    planes, splits = p.num_heads_k * decode.units_of(p, ROWS), 1
    if planned:
        entries = plan_entries(planes // p.num_heads_k, p.num_heads_k, slots)
        planes = entries * p.num_heads_k
        # those of several splits are the first of the plan: at most two for each that fills WAVES waves
        parted = min(entries, 2 * WAVES * slots // p.num_heads_k + 1) * p.num_heads_k
        makes = decode.plan_program(False, spec.right, spec.packed, config.block_n, config.overhead, ROWS, True)
        maker, planned_by = launcher.load(makes.source), makes.arguments.bound(call)
    else:
        splits, _ = decode.split_keys(planes, p.seqlen_k, config, slots)
        asked = None if p.cache is None else p.cache.num_splits
        splits, entries, parted = decode.device_splits(planes, p.seqlen_k, splits, asked), 0, planes
    # in memory, of the rows of each split: outputs; maxima and sums; then the plan. A planned split is a plane of its own
    lines, rows, several = (p.num_heads_k if planned else planes) * ROWS, splits * parted * ROWS, planned or splits > 1
    out_bytes, row_bytes, plan_bytes, pieces = 4 * rows * p.head_dim_v, 8 * rows, PLAN_ENTRY * entries, max(min(MERGES // parted, ROWS), 1)
    if several:
        merge_source, merge_arguments = merge_program(spec, config.block_n, config.overhead)
        merge, merge_values = launcher.load(merge_source), merge_arguments.bound(call)

    def launch(call: Call, stream: int) -> None:
        memory = launcher.temporary(out_bytes + row_bytes + plan_bytes, stream) if several else nullcontext(0)
        with memory as part:
            lengths, plan = lengths_of(call), (part + out_bytes + row_bytes,) if planned else ()
            if planned:
                maker.launch(1, planned_by(call, (*plan, entries, slots, p.num_heads_k, *lengths)), stream)
            [map_k] = launcher.tensor_maps(boxes(call), launcher.capturing(stream), forms) if forms else [0]
            scales = () if p.eight_bit is None else decode.scales_of(call, p.eight_bit.factor)
            pages = () if p.cache is None else caches.values(call)[3:]         # behind those of caches.LENGTHS
            own = map_k, part, part + out_bytes if several else 0, lines, splits, p.num_heads_k, pieces, *lengths, *plan, *scales, *pages
            kernel.launch(planes * splits, values(call, own), stream)
            if several:
                merge.launch(parted * pieces, merge_values(call, own), stream)
    return launch
