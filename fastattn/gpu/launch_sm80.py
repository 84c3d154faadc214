"""Launching forward_sm80: what it takes, its tiling, its arguments. Without Numba, as all that a call runs through: see compile.Source."""
from __future__ import annotations

from functools import lru_cache
from typing import Any

from .compile import Source
from .compile import load as load_kernel
from .config import ConfigSm80, forward_sm80
from .device import Device
from .packed import head_group, most_tiles, table
from .spec import Arguments, Call, Launch, Spec, whole_chunks

OWN = "table:l tiles:i head_group:i"


@lru_cache(maxsize=1024)
def arguments_of(spec: Spec) -> Arguments:
    return Arguments(spec, OWN, ("q", "k", "v", "out"))


def _kernel(spec: Spec, config: ConfigSm80) -> tuple[Any, int]:
    """Imported here, with Numba, because a kernel in the cache needs neither."""
    from .forward_sm80 import make_forward

    return make_forward(spec, config)


@lru_cache(maxsize=1024)
def source(spec: Spec, config: ConfigSm80) -> Source:
    return Source(f"forward_sm80 {spec.text} | {config.text}", lambda: _kernel(spec, config), arguments_of(spec).fields,
                  32 * config.warps, config.blocks_per_sm)


def refuses(call: Call, d: Device) -> str | None:
    """None, or why this family does not take the call."""
    p = call.problem
    if int(d.arch.removeprefix("sm_").rstrip("a")) < 80:
        return f"it needs sm_80, this is {d.arch}"
    if p.dtype not in ("float16", "bfloat16"):
        return f"it has no {p.dtype} products"
    if max(p.head_dim, p.head_dim_v) > 256:
        return f"head_dim is {max(p.head_dim, p.head_dim_v)}, over 256"
    if 0 in call.operands.k.shape:
        return "there are no keys"
    return None


def prepare(call: Call, spec: Spec, d: Device) -> Launch:
    """Enqueues the kernel for this call, or one that differs in addresses only, and before it the table of a packed problem."""
    o = call.operands
    config = forward_sm80(spec, d.arch, whole_chunks(o.q) and whole_chunks(o.k) and whole_chunks(o.v), whole_chunks(call.out))
    kernel, values = load_kernel(source(spec, config), d.ordinal), arguments_of(spec).bound(call)
    tiles, heads = most_tiles(call, config.block_m), head_group(call)

    def launch(call: Call, stream: int) -> None:
        with table(call, config.block_m, d.ordinal, stream) as sequences:
            kernel.launch(tiles, values(call, (sequences, tiles, heads)), stream)
    return launch
