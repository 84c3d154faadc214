"""The tiling of the Hopper kernel for few queries over a latent cache (latent.py), and which calls it runs. Without Numba."""
from __future__ import annotations

import math
from dataclasses import dataclass

from ...arrays.view import EIGHT_BIT
from ...problem import Problem
from ..decode.config import FEW_QUERIES
from ..runtime.tensormap import fits
from ..spec import Call, Spec, whole_chunks
from .config import WARPGROUP

LATENT_DIMS = 576, 512      # head_dim, head_dim_v: MLA's latent with its rotary part
ROWS = 64                   # query rows of a block: those of an MMA, of all heads that share a key head
HALVES = "float16", "bfloat16"
CONSUMERS = 2               # warpgroups, each of which has half of O's columns: 128 registers a thread
THREADS = WARPGROUP * (1 + CONSUMERS)
LEAST_BOX = 16              # rows of a TMA box, as in caches.py
BLOCK_N, STAGES = 64, 2     # 72 KB a stage beside 72 KB of Q
# With more in the cache and several requests their splits are planned on the device, which is a launch more, of 2 to 3 us. A block takes
# some 1.5 us for 64 keys. Predicted, to be measured
FEW_KEYS = 2048
MERGES = 4096               # blocks of the merge at most, about: more rows of a plane are merged by one block, one after another


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """A tiling.

    Parameters
    ----------
    block_n, stages
        Keys of a step, and stages of them in flight.
    box, whole
        Rows of a TMA box; whether a page has as many.
    overhead
        What a thread block costs besides its steps, in steps: Q, the first keys, a result of 128 KB.
    """

    block_n: int = BLOCK_N
    stages: int = STAGES
    box: int = BLOCK_N
    whole: bool = False
    overhead: int = 4

    @property
    def text(self) -> str:
        return (f"{self.block_n} keys stages {self.stages} box {self.box} overhead {self.overhead}"
                + " whole" * self.whole)

    @property
    def step(self) -> int:
        """Keys of a step of a block."""
        return self.block_n

    @property
    def blocks_per_sm(self) -> int:
        return 1


def box_of(call: Call, block_n: int) -> int:
    """Rows of a TMA box. Of a block table it does not depend on how many pages a request has: with num_splits=1 neither may the bits."""
    extra = call.operands.cache
    paged = extra is not None and extra.block_table.device == call.operands.k.device and len(extra.block_table.shape) == 2
    return math.gcd(call.operands.k.shape[1], block_n) if paged else block_n


def may_be_latent(p: Problem) -> bool:
    """Whether latent.py may run the problem, which depends on addresses: the values are the keys' first columns, or not."""
    return (p.head_dim, p.head_dim_v) == LATENT_DIMS


def refuses_latent(call: Call, spec: Spec) -> str | None:
    """None, or why latent.py does not run a call: over caches one that the split-key kernel of decode/ would run, over arrays any."""
    p, o = call.problem, call.operands
    if not may_be_latent(p):
        return f"head_dim is {p.head_dim} and head_dim_v {p.head_dim_v}, not {LATENT_DIMS[0]} and {LATENT_DIMS[1]}"
    if (o.v.ptr, o.v.strides) != (o.k.ptr, o.k.strides):
        return "the values are not the first columns of the keys"
    eight, box = p.cache is not None and o.k.dtype in EIGHT_BIT, box_of(call, BLOCK_N)
    if p.dtype not in HALVES or not (eight or o.k.dtype == p.dtype):
        return f"q is {p.dtype} and the caches are {o.k.dtype}"
    features = _features(p, spec)
    if features:
        return f"it has no {', '.join(features)}"
    if not (whole_chunks(call.out) and whole_chunks(o.q)):
        return "rows of q or out are not whole, aligned pieces of 16 bytes"
    if not eight and (unread := fits(o.k)) is not None:
        return f"k: {unread}"
    if p.cache is None and (p.packed or p.seqlen_q > FEW_QUERIES):
        return f"packed arrays, or more than {FEW_QUERIES} queries"
    if box < (BLOCK_N if eight else LEAST_BOX):
        return f"pages have {o.k.shape[1]} keys, which are boxes of {box} rows"
    return None


def _features(p: Problem, spec: Spec) -> list[str]:
    """What the kernel does not have of what the call has."""
    found = {"limit to the left of a row's diagonal": spec.left, "ALiBi": spec.alibi, "bias": spec.bias, "mask": spec.mask,
             "dropout": spec.dropout, "function of the caller's": spec.traced, "diagonals": spec.diagonals,
             f"{p.out_dtype} output": p.out_dtype not in HALVES}
    return [name for name, there in found.items() if there]
