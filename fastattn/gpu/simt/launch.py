"""Launching forward_simt: what it takes, its tiling, its arguments. Without Numba, as all that a call runs through: see compile.Source."""
from __future__ import annotations

from functools import lru_cache

from ..runtime.compile import Source, late
from ..runtime.compile import load as load_kernel
from ..runtime.device import Device
from ..runtime.packed import MOST_BLOCKS, most_tiles, table
from ..spec import Arguments, Call, Launch, Spec
from .config import SimtConfig, block_m_of, choose_forward

make_forward = late("simt.forward", "make_forward")


@lru_cache(maxsize=1024)
def arguments_of(spec: Spec) -> Arguments:
    letter = "d" if spec.dtype == "float64" else "f"
    return Arguments(spec, f"table:l tiles:i head_group:i scale:{letter} cap:{letter} keep:{letter}", ("q", "k", "v", "out"))


@lru_cache(maxsize=1024)
def source(spec: Spec, config: SimtConfig) -> Source:
    return Source(f"forward_simt {spec.text} | {config.text}", lambda: make_forward(spec, config), arguments_of(spec).fields,
                  config.threads, config.blocks_per_sm)


def refuses(call: Call, d: Device) -> str | None:
    """None, but for more tiles than a grid has blocks."""
    tiles = most_tiles(call, block_m_of(call.problem.dtype, call.problem.head_dim_v))
    return None if tiles <= MOST_BLOCKS else f"it has {tiles} tiles of query rows, over 2**31 - 1"


def prepare(call: Call, spec: Spec, d: Device) -> Launch:
    """Enqueues the kernel for this call, or one that differs in addresses only, and before it the table of a packed problem."""
    p, config = call.problem, choose_forward(spec)
    kernel, values, tiles = load_kernel(source(spec, config), d.ordinal), arguments_of(spec).bound(call), most_tiles(call, config.block_m)
    own = tiles, p.group, p.score.softmax_scale, p.score.softcap or 0.0, p.dropout.keep_scale if p.dropout else 0.0

    def launch(call: Call, stream: int) -> None:
        with table(call, config.block_m, d.ordinal, stream) as sequences:
            kernel.launch(tiles, values(call, (sequences, *own)), stream)
    return launch
