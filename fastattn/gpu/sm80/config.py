"""Tilings of the mma.sync kernels, for each architecture: every number with its constraint, and the measurement that
chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import feature_weight, num_features, squeeze
from ..runtime.arch import arch_of
from ..spec import Spec

WARP = 32                   # threads
MOST_DIM = 256              # of head_dim and head_dim_v: the registers that O takes
ONE_TILE = 64               # rows and head_dim of a head that is one tile of rows
FEW_ROWS = 32               # of a tile of two warps
ONE_TILE_KEYS, FEW_ROWS_KEYS = 256, 512     # over so many keys, Hopper's tiles take 1.1 times as long, for FEW_ROWS 1.3 times
PANEL = 64                  # columns of a panel of shared memory: rows of 128 bytes


# ---------------------------------------------------------------- forward
@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSm80Config:
    """A tiling of the forward.

    Parameters
    ----------
    warps, tiles
        Warps of a thread block, with 16 * tiles query rows each.
    block_n
        Keys of a step.
    stages
        Stages of K and V.
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread.
    keep_q
        Q stays in registers instead of being read from shared memory in every step.
    optimistic
        As in ForwardSm90Config. Needs two stages, because the fallback reads K again. Written for 32 rows a warp.
    squeeze
        As in BackwardSm90Config.
    whole, whole_out
        Rows of q, k and v (of out) are aligned pieces of 16 bytes. Not a choice but a property of the operands that the
        code depends on.
    """

    warps: int
    tiles: int
    block_n: int
    stages: int = 2
    blocks_per_sm: int = 2
    keep_q: bool = False
    optimistic: bool = False
    squeeze: int = 0
    whole: bool = True
    whole_out: bool = True

    def __post_init__(self) -> None:
        assert not self.optimistic or (self.stages, self.tiles) == (2, 2)
        assert self.warps in (2, 4, 8) and self.tiles in (1, 2) and self.stages in (1, 2)
        assert self.block_n % 16 == 0 and self.block_n % (4 * self.warps) == 0, "every thread copies as many rows"

    @property
    def block_m(self) -> int:
        return 16 * self.tiles * self.warps

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} warps {self.warps} stages {self.stages} blocks {self.blocks_per_sm}"
                + " keep_q" * self.keep_q + " optimistic" * self.optimistic + (f" squeeze {self.squeeze}" if self.squeeze else "")
                + " elements" * (not self.whole) + " out_elements" * (not self.whole_out))


def choose_forward(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True, rows: int = 0) -> ForwardSm80Config:
    """Chosen by registers (none spilled) and shared memory; two blocks of four warps on a multiprocessor wherever they
    fit.

    rows: those of a head that is one tile, else 0. Then the time is latency, which more blocks hide.
    """
    dim, room = max(spec.head_dim, spec.head_dim_v), arch_of(arch).shared_memory
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None
    pieces = {"whole": whole, "whole_out": whole_out}
    if spec.parts > 1:      # 96 KB of shared memory: 6 bytes an element
        if dim <= 64 and not heavy and room > 200:      # 32 rows a warp would spill 20 bytes on sm_90a, where the other family is faster
            return ForwardSm80Config(warps=8, tiles=1, block_n=64, stages=1, blocks_per_sm=1)
        # two blocks on a multiprocessor, beside head_dim_v over 112 a smaller head_dim: 20 bytes would spill at 32 keys
        block_n = 16 if room > 200 and spec.head_dim_v > 112 and spec.head_dim < spec.head_dim_v else 32
        return ForwardSm80Config(warps=4, tiles=1 if dim > 64 or heavy else 2, block_n=block_n, stages=1,
                                 blocks_per_sm=2 if room > 200 else 1)
    if rows > 0:
        warps, blocks = 2 if rows <= FEW_ROWS else 4, 4 if whole and num_features(spec) <= 1 else 2
        return ForwardSm80Config(warps=warps, tiles=1, block_n=64, stages=1, blocks_per_sm=blocks * 4 // warps, **pieces)
    if dim > 128:       # 16 rows a warp: the output of 32 would take all registers
        block_n = 64 if room > 160 and whole and not heavy else 32
        return ForwardSm80Config(warps=4, tiles=1, block_n=block_n, stages=1, blocks_per_sm=1, squeeze=squeeze(spec), **pieces)
    if heavy or not whole:
        return ForwardSm80Config(warps=4, tiles=1, block_n=64 if dim > 64 or room > 160 else 32, stages=1, **pieces)
    if dim > 64:        # 64 keys spill on sm_80, and on sm_90a 4 to 8 bytes in a window's forward with lse
        crowded = spec.left and spec.right and spec.lse and spec.head_dim_v > 112
        block_n = 64 if room > 200 and not crowded else 48 if room > 160 else 32
        return ForwardSm80Config(warps=4, tiles=2, block_n=block_n, stages=1, **pieces)
    return ForwardSm80Config(warps=4, tiles=2, block_n=64, optimistic=True, **pieces)


# ---------------------------------------------------------------- backward
@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSm80Config:
    """A tiling of the backward.

    Parameters
    ----------
    warps, tiles, split
        Warps of a thread block; `split` of them share 16 * tiles keys. With split 1 a warp has whole rows of P^T and
        dS^T and feeds them to the MMAs of dV and dK out of its registers. Otherwise it has a part of the queries of its
        keys' scores and a part of the columns of their gradients, and all of P and dS goes through shared memory.
    block_m
        Query rows of a step.
    stages
        Stages of Q and dO.
    blocks_per_sm
        As in ForwardSm80Config.
    one_buffer
        With `split` and one stage: dS takes the memory of P when dV is computed, from when on the next dO is in flight.
    vector
        Sums of dq take four numbers an instruction: sm_90 and later. A property of the device.
    whole, whole_out
        Rows of q, k, v and dout (of dk and dv) are aligned pieces of 16 bytes. A property of the operands.
    """

    warps: int
    tiles: int
    split: int
    block_m: int
    stages: int = 2
    blocks_per_sm: int = 1
    one_buffer: bool = False
    vector: bool = False
    whole: bool = True
    whole_out: bool = True

    def __post_init__(self) -> None:
        assert self.warps in (4, 8) and self.tiles in (1, 2) and self.stages in (1, 2)
        assert not self.one_buffer or (self.split > 1 and self.stages == 1), "what shares memory, and is loaded early"
        assert self.block_m in (32, 64, 128), "divides rows.config.PADDING"
        assert self.split in (1, 2, 4) and self.block_m % (16 * self.split) == 0, "a warp has 16 queries at least"
        assert self.block_m % (4 * self.warps) == 0 and self.block_n % (8 * self.warps) == 0, "every thread copies as many rows"

    @property
    def block_n(self) -> int:
        return 16 * self.tiles * self.warps // self.split

    @property
    def columns_apart(self) -> int:
        """Warps that share rows of dQ; each has 16 of every 16 * columns_apart columns. 32 rows a warp where there are
        enough."""
        return min(4, 32 * self.warps // self.block_m)

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} warps {self.warps} tiles {self.tiles} split {self.split} stages {self.stages} "
                f"blocks {self.blocks_per_sm}" + " one_buffer" * self.one_buffer + " vector" * self.vector + " elements" * (not self.whole)
                + " out_elements" * (not self.whole_out))


def choose_backward(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True) -> BackwardSm80Config:
    """Chosen by registers (none spilled) and shared memory. dK and dV take tiles * (head_dim + head_dim_v) / (2 *
    split) registers a thread, S and dP tiles * block_m / (2 * split) each."""
    dim, room = max(spec.head_dim, spec.head_dim_v), arch_of(arch).shared_memory
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None or not whole
    rows = {"vector": arch_of(arch).number >= 90, "whole": whole, "whole_out": whole_out}
    if spec.parts > 1:
        return _choose_backward_float(dim, room, rows["vector"])
    if dim <= 64:
        if heavy:               # 97 KiB
            return BackwardSm80Config(warps=8, tiles=2, split=2, block_m=64, **rows)
        # 57 or 48.5 KiB: two blocks hide each other's waits
        stages = 2 if room > 99 else 1
        return BackwardSm80Config(warps=4, tiles=2, split=1, block_m=32, stages=stages, blocks_per_sm=2, **rows)
    if dim <= 128:              # 161 KiB
        if room <= 99:
            return BackwardSm80Config(warps=8, tiles=1, split=1, block_m=32, stages=1, **rows)
        if feature_weight(spec) > 1:        # spills a few registers at 64 queries on sm_80
            return BackwardSm80Config(warps=8, tiles=1, split=1, block_m=32, **rows)
        return BackwardSm80Config(warps=8, tiles=2, split=2, block_m=64, **rows)
    if room <= 99:              # 68 KiB
        return BackwardSm80Config(warps=4, tiles=1, split=2, block_m=32, stages=1, **rows)
    several = feature_weight(spec) > 1 or (spec.mask and spec.bias is not None)     # spills 4 to 36 bytes at 64 queries
    stages = 2 if dim <= 192 or room > 200 else 1
    return BackwardSm80Config(warps=8, tiles=1, split=2, block_m=32 if several else 64, stages=stages, **rows)


def _choose_backward_float(dim: int, room: int, vector: bool) -> BackwardSm80Config:
    """float32: 6 bytes an element, and P and dS take three times as many registers. One buffer for both: without it no tile of 64
    queries fits. Shared memory: 120 KB (84 with 32 queries) at head_dim 64, 216 KB (156) at 128."""
    if dim <= 64 and room > 200:        # two blocks hide each other's waits: 68 TFLOP/s, one with 64 queries 59
        return BackwardSm80Config(warps=4, tiles=1, split=1, block_m=32, stages=1, blocks_per_sm=2, vector=vector)
    block_m = 64 if room > (99 if dim <= 64 else 200) else 32
    tiles, split = (2, 4) if dim > 64 and block_m == 64 else (1, 2)         # tiles 1 would spill 96 bytes
    return BackwardSm80Config(warps=8, tiles=tiles, split=split, block_m=block_m, stages=1, one_buffer=True, vector=vector)


def dq_columns(spec: Spec) -> int:
    """Columns of the float32 sums of dq: whole panels."""
    return -(-spec.head_dim // PANEL) * PANEL
