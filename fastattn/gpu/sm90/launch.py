"""Launching forward_sm90: what it takes, its tiling, its arguments. Without Numba, as all that a call runs through: see compile.Source."""
from __future__ import annotations

from functools import lru_cache

from ...arrays.view import View
from ..config import feature_weight
from ..decode import launch as launch_decode
from ..runtime.compile import Source, late
from ..runtime.compile import load as load_kernel
from ..runtime.device import Device, capturing
from ..runtime.packed import head_group, most_tiles, table
from ..runtime.tensormap import fits, form, tensor_maps
from ..runtime.workspace import counter
from ..spec import Arguments, Call, Launch, Spec, make_spec, unfit
from .config import ForwardSm90Config, choose_forward

make_forward = late("sm90.forward", "make_forward")
OWN = "map_q:l map_k:l map_v:l map_out:l counter:l table:l tiles:i head_group:i"


@lru_cache(maxsize=1024)
def arguments_of(spec: Spec) -> Arguments:
    return Arguments(spec, OWN, ("out",))


@lru_cache(maxsize=1024)
def source(spec: Spec, config: ForwardSm90Config) -> Source:
    return Source(f"forward_sm90 {spec.text} | {config.text}", lambda: make_forward(spec, config), arguments_of(spec).fields,
                  128 * (1 + config.block_m // 64))


@lru_cache(maxsize=1024)
def _choice(spec: Spec, seqlen_k: int) -> tuple[ForwardSm90Config, Source, Arguments]:
    config = choose_forward(spec, seqlen_k)
    return config, source(spec, config), arguments_of(spec)


def refuses(call: Call, d: Device) -> str | None:
    """None, or why this family does not take the call."""
    p, o = call.problem, call.operands
    if d.arch != "sm_90a":
        return f"it needs sm_90a, this is {d.arch}"
    if (reason := unfit(p)) is not None:
        return reason
    for name, x in (("q", o.q), ("k", o.k), ("v", o.v), ("out", call.out)):
        reason = fits(x)
        if reason is not None:
            return f"{name}: {reason}"
    if max(p.head_dim, p.head_dim_v) > 192 and feature_weight(make_spec(p, o, False)) > 1:
        return "several features at head_dim over 192 do not fit its registers"
    return None


def prepare(call: Call, spec: Spec, d: Device) -> Launch:
    """Enqueues the kernel for this call, or one that differs in addresses only, and before it the table of a packed problem."""
    if launch_decode.takes(call, spec):
        return launch_decode.prepare(call, spec, d)
    config, kernel_source, arguments = _choice(spec, call.problem.seqlen_k)
    kernel, values = load_kernel(kernel_source, d.ordinal), arguments.bound(call)
    tiles, heads = most_tiles(call, config.block_m), head_group(call)
    grid, block_m, block_n = min(tiles, d.num_sms), config.block_m, config.block_n

    def boxes(call: Call) -> tuple[tuple[View, int], ...]:
        o = call.operands
        return (o.q, block_m), (o.k, block_n), (o.v, block_n), (call.out, 64)
    forms = tuple(form(x, rows) for x, rows in boxes(call))

    def launch(call: Call, stream: int, sequences: int = 0) -> None:
        captured = capturing(stream)
        maps = tensor_maps(boxes(call), captured, forms)
        kernel.launch(grid, values(call, (*maps, counter(d.ordinal, captured), sequences, tiles, heads)), stream)

    def launch_packed(call: Call, stream: int) -> None:
        with table(call, block_m, d.ordinal, stream) as sequences:
            launch(call, stream, sequences)
    return launch_packed if spec.packed else launch
