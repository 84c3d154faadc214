"""Launching forward_sm80: what it takes, its tiling, its arguments. Without Numba, as all that a call runs through: see compile.Source."""
from __future__ import annotations

from functools import lru_cache

from ..decode import launch as launch_decode
from ..runtime.compile import Source, late
from ..runtime.compile import load as load_kernel
from ..runtime.device import Device
from ..runtime.packed import head_group, most_tiles, table
from ..spec import Arguments, Call, Launch, Spec, unfit, whole_chunks
from .config import ForwardSm80Config, choose_forward

make_forward = late("sm80.forward", "make_forward")
OWN = "table:l tiles:i head_group:i"


@lru_cache(maxsize=1024)
def arguments_of(spec: Spec) -> Arguments:
    return Arguments(spec, OWN, ("q", "k", "v", "out"))


@lru_cache(maxsize=1024)
def source(spec: Spec, config: ForwardSm80Config) -> Source:
    return Source(f"forward_sm80 {spec.text} | {config.text}", lambda: make_forward(spec, config), arguments_of(spec).fields,
                  32 * config.warps, config.blocks_per_sm)


def refuses(call: Call, d: Device) -> str | None:
    """None, or why this family does not take the call."""
    p = call.problem
    if int(d.arch.removeprefix("sm_").rstrip("a")) < 80:
        return f"it needs sm_80, this is {d.arch}"
    if (reason := unfit(p)) is not None:
        return reason
    if 0 in call.operands.k.shape:
        return "there are no keys"
    return None


def prepare(call: Call, spec: Spec, d: Device) -> Launch:
    """Enqueues the kernel for this call, or one that differs in addresses only, and before it the table of a packed problem."""
    if launch_decode.takes(call, spec):
        return launch_decode.prepare(call, spec, d)
    o = call.operands
    config = choose_forward(spec, d.arch, whole_chunks(o.q) and whole_chunks(o.k) and whole_chunks(o.v), whole_chunks(call.out))
    kernel, values = load_kernel(source(spec, config), d.ordinal), arguments_of(spec).bound(call)
    tiles, heads = most_tiles(call, config.block_m), head_group(call)

    def launch(call: Call, stream: int) -> None:
        with table(call, config.block_m, d.ordinal, stream) as sequences:
            kernel.launch(tiles, values(call, (sequences, tiles, heads)), stream)
    return launch
