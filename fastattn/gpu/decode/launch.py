"""Launches of the split-key kernel: which calls it runs, how keys are split. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ...masks import row_bounds
from ..rows.mask_words import mask_words
from ..runtime.compile import late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.workspace import MOST_ARRIVALS
from ..spec import Arguments, Call, Launch, Spec, whole_chunks
from .config import FEW_KEYS, LEAST_WIDTH, MASK_COLUMNS, MOST_DIM, MOST_SPLITS, WARP, DecodeConfig, choose_decode, few_rows

make_forward = late("decode.forward", "make_forward")
FORWARD = "part:l part_rows:l arrived:l lines:i splits:i split_keys:i first_key:i end_key:i heads_k:i"


def accepts(call: Call, spec: Spec, d: Device) -> bool:
    """Whether this kernel runs a call of a tensor-core family: few queries, many keys, dense, no dropout."""
    p, o = call.problem, call.operands
    return (few_rows(p, d.num_sms) and p.seqlen_k >= FEW_KEYS and not p.packed and max(p.head_dim, p.head_dim_v) <= MOST_DIM
            and not spec.dropout and all(whole_chunks(x) for x in (o.q, o.k, o.v)))


@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: DecodeConfig) -> Program:
    return program(f"forward_decode {spec.text} | {config.text}", lambda: make_forward(spec, config),
                   Arguments(spec, FORWARD, ("q", "k", "v", "out"), online=True), WARP * config.warps, config.blocks_per_sm)


def split_keys(key_heads: int, keys: int, config: DecodeConfig, num_sms: int) -> tuple[int, int]:
    """(number of splits, keys of each) for which the last thread block is estimated to end first.

    `key_heads`: of the whole batch. Time is counted in steps of `config.keys` keys a warp.
    """
    step, slots = config.keys * config.key_warps, num_sms * config.blocks_per_sm

    def divided(count: int) -> tuple[int, int]:
        steps = -(-keys // (count * step))
        return -(-keys // (steps * step)), steps

    def time(count: int) -> int:
        count, steps = divided(count)
        return -(-key_heads * count // slots) * (steps + config.overhead)
    most = min(MOST_SPLITS, -(-keys // step)) if key_heads <= MOST_ARRIVALS else 1
    count, steps = divided(min(range(1, most + 1), key=time))
    return count, steps * step


def prepare(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only."""
    p, spec = call.problem, replace(spec, bias_whole=False)
    config = choose_decode(spec, p)
    source, arguments = forward_program(spec, config)
    kernel, values = launcher.load(source), arguments.bound(call)
    key_heads, rows = p.batch * p.num_heads_k, p.batch * p.num_heads * p.seqlen_q
    limits = p.seqlen_q, p.seqlen_k, p.mask.left, p.mask.right, p.mask.top_left
    first, end = row_bounds(0, *limits)[0], row_bounds(p.seqlen_q - 1, *limits)[1]
    if first >= end:        # no row attends any key
        first, end = 0, 1
    first -= first % MASK_COLUMNS
    splits, keys = split_keys(key_heads, end - first, config, launcher.device.num_sms)
    grid, own = key_heads * splits, (rows, splits, keys, first, end, p.num_heads_k)
    width = max(config.keys, LEAST_WIDTH)
    out_bytes = 4 * splits * rows * spec.head_dim_v    # of the splits' outputs; then their maxima and sums

    def launch(call: Call, stream: int) -> None:
        with mask_words(call, width, launcher, stream) as call:
            kernel.launch(grid, values(call, (0, 0, 0, *own)), stream)

    def launch_split(call: Call, stream: int) -> None:
        arrived = launcher.arrivals(launcher.capturing(stream))
        with (mask_words(call, width, launcher, stream) as call,
              launcher.temporary(out_bytes + 8 * splits * rows, stream) as part):
            kernel.launch(grid, values(call, (part, part + out_bytes, arrived, *own)), stream)
    return launch if splits == 1 else launch_split
