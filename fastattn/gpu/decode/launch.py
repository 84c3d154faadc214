"""Launching forward_decode: what it takes, how the keys are split. Without Numba, as all that a call runs through: see compile.Source."""
from __future__ import annotations

from functools import lru_cache

from ...masks import row_bounds
from ..config import num_features
from ..runtime.compile import Source, late
from ..runtime.compile import load as load_kernel
from ..runtime.device import Device, capturing
from ..runtime.workspace import MOST_ARRIVALS, arrivals, temporary
from ..spec import Arguments, Call, Launch, Spec, whole_chunks
from .config import DecodeConfig, choose_decode

ROWS = 16               # query rows of a tile: of all heads that share a key head
FEW_KEYS = 256          # below, a tile of the other forwards is done as soon
MOST_SPLITS = 128
make_forward = late("decode.forward", "make_forward")
OWN = "part:l part_rows:l arrived:l lines:i splits:i split_keys:i first_key:i end_key:i heads_k:i"


def takes(call: Call, spec: Spec) -> bool:
    """Whether this kernel runs a call that a tensor-core family takes: few queries, many keys, and nothing but masks and a softcap."""
    p, o = call.problem, call.operands
    return (p.seqlen_q * p.group <= ROWS and p.seqlen_k >= FEW_KEYS and not p.packed and {p.head_dim, p.head_dim_v} <= {64, 128}
            and num_features(spec) == spec.softcap and all(whole_chunks(x) for x in (o.q, o.k, o.v)))


@lru_cache(maxsize=1024)
def _kernel(spec: Spec) -> tuple[DecodeConfig, Source, Arguments]:
    config, arguments = choose_decode(spec), Arguments(spec, OWN, ("q", "k", "v", "out"))
    return config, Source(f"forward_decode {spec.text} | {config.text}", lambda: make_forward(spec, config), arguments.fields,
                          32 * config.warps, config.blocks_per_sm), arguments


def split_keys(planes: int, keys: int, config: DecodeConfig, num_sms: int) -> tuple[int, int]:
    """(splits, keys of each) so that the last block ends first, in steps; `planes`: batch times key heads."""
    step, slots = config.keys * config.warps, num_sms * config.blocks_per_sm

    def divided(count: int) -> tuple[int, int]:
        steps = -(-keys // (count * step))
        return -(-keys // (steps * step)), steps

    def time(count: int) -> int:
        count, steps = divided(count)
        return -(-planes * count // slots) * (steps + config.overhead)
    most = min(MOST_SPLITS, -(-keys // step)) if planes <= MOST_ARRIVALS else 1
    count, steps = divided(min(range(1, most + 1), key=time))
    return count, steps * step


def prepare(call: Call, spec: Spec, d: Device) -> Launch:
    """Enqueues the kernel for this call, or one that differs in addresses only."""
    config, source, arguments = _kernel(spec)
    kernel, values, p = load_kernel(source, d.ordinal), arguments.bound(call), call.problem
    planes, lines = p.batch * p.num_heads_k, p.batch * p.num_heads * p.seqlen_q
    limits = p.seqlen_q, p.seqlen_k, p.mask.left, p.mask.right, p.mask.top_left
    first, end = row_bounds(0, *limits)[0], row_bounds(p.seqlen_q - 1, *limits)[1]
    if first >= end:        # no row sees any key
        first, end = 0, 1
    splits, keys = split_keys(planes, end - first, config, d.num_sms)
    grid, own = planes * splits, (lines, splits, keys, first, end, p.num_heads_k)
    out_bytes = 4 * splits * lines * p.head_dim_v

    def launch(call: Call, stream: int) -> None:
        kernel.launch(grid, values(call, (0, 0, 0, *own)), stream)

    def launch_split(call: Call, stream: int) -> None:
        arrived = arrivals(d.ordinal, capturing(stream))
        with temporary(out_bytes + 8 * splits * lines, d.ordinal, stream) as part:
            kernel.launch(grid, values(call, (part, part + out_bytes, arrived, *own)), stream)
    return launch if splits == 1 else launch_split
