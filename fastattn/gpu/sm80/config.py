"""Tilings of the mma.sync kernels, per architecture: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import SHARED_MEMORY, feature_weight, squeeze
from ..spec import Spec


@dataclass(frozen=True, slots=True)
class ForwardSm80Config:
    """One tiling of choose_forward: `warps` with 16 * tiles query rows each, block_n keys a step, `stages` of K and V.

    `keep_q`: Q in registers rather than read from shared memory in every step. `optimistic`: as Config's; K must still be there for
    another try, and it is written for 32 rows a warp. `squeeze`: as BackwardConfig's. `whole`: rows of q, k and v are aligned pieces of
    16 bytes (`whole_out`: of out); not a choice but a property of the operands, that the code depends on.
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


def choose_forward(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True) -> ForwardSm80Config:
    """Chosen by registers (none spilled) and shared memory; two blocks of four warps on a multiprocessor wherever they fit."""
    dim, room = max(spec.head_dim, spec.head_dim_v), SHARED_MEMORY.get(arch, 99)
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None
    many = {"whole": whole, "whole_out": whole_out}
    if dim > 128:       # 16 rows a warp: the output of 32 would take all registers
        return ForwardSm80Config(4, 1, 64 if room > 160 and whole and not heavy else 32, 1, 1, squeeze=squeeze(spec), **many)
    if heavy or not whole:
        return ForwardSm80Config(4, 1, 64 if dim > 64 or room > 160 else 32, 1, 2, **many)
    if dim > 64:
        return ForwardSm80Config(4, 2, 64 if room > 200 else 48 if room > 160 else 32, 1, 2, **many)      # 64 spill on sm_80
    return ForwardSm80Config(4, 2, 64, 2, 2, optimistic=True, **many)


@dataclass(frozen=True, slots=True)
class BackwardSm80Config:
    """One tiling of choose_backward: `warps`, of which `split` share 16 * tiles keys, block_m queries a step, `stages` of Q and dO.

    split 1: a warp has whole rows of P^T and dS^T and feeds them to the products of dV and dK out of its registers. More: it has a part
    of the queries of its keys' scores, and a part of the columns of their gradients; all of P and dS goes through shared memory.
    `vector`: sums of dq take four numbers an instruction (sm_90 and later). `whole`: rows of q, k, v and dout are aligned pieces of 16
    bytes (`whole_out`: of dk and dv); not choices but properties of the device and the operands, that the code depends on.
    """

    warps: int
    tiles: int
    split: int
    block_m: int
    stages: int = 2
    blocks_per_sm: int = 1
    vector: bool = False
    whole: bool = True
    whole_out: bool = True

    def __post_init__(self) -> None:
        assert self.warps in (4, 8) and self.tiles in (1, 2) and self.stages in (1, 2)
        assert self.block_m in (32, 64, 128), "tiles of padded rows"
        assert self.split in (1, 2, 4) and self.block_m % (16 * self.split) == 0, "a warp has 16 queries at least"
        assert self.block_m % (4 * self.warps) == 0 and self.block_n % (8 * self.warps) == 0, "every thread copies as many rows"

    @property
    def block_n(self) -> int:
        return 16 * self.tiles * self.warps // self.split

    @property
    def columns_apart(self) -> int:
        """Warps that share rows of dQ, 16 of every 16 * columns_apart columns each; 32 rows a warp where there are so many."""
        return min(4, 32 * self.warps // self.block_m)

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} warps {self.warps} tiles {self.tiles} split {self.split} stages {self.stages} "
                f"blocks {self.blocks_per_sm}" + " vector" * self.vector + " elements" * (not self.whole)
                + " out_elements" * (not self.whole_out))


def choose_backward(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True) -> BackwardSm80Config:
    """Chosen by registers (none spilled) and shared memory. dK and dV take tiles * (head_dim + head_dim_v) / (2 * split) registers a
    thread, S and dP tiles * block_m / (2 * split) each."""
    dim, room = max(spec.head_dim, spec.head_dim_v), SHARED_MEMORY.get(arch, 99)
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None or not whole
    many = {"vector": int(arch.removeprefix("sm_").rstrip("a")) >= 90, "whole": whole, "whole_out": whole_out}
    if dim <= 64:
        if heavy:               # 97 KiB
            return BackwardSm80Config(8, 2, 2, 64, **many)
        return BackwardSm80Config(4, 2, 1, 32, 2 if room > 99 else 1, 2, **many)       # 57 or 48.5 KiB: two blocks hide their waits
    if dim <= 128:              # 161 KiB
        if room <= 99:
            return BackwardSm80Config(8, 1, 1, 32, 1, **many)
        several = feature_weight(spec) > 1      # spills a few registers at 64 queries on sm_80
        return BackwardSm80Config(8, 1, 1, 32, **many) if several else BackwardSm80Config(8, 2, 2, 64, **many)
    if room <= 99:              # 68 KiB
        return BackwardSm80Config(4, 1, 2, 32, 1, **many)
    stages = 2 if dim <= 192 or room > 200 else 1
    several = feature_weight(spec) > 1 or (spec.mask and spec.bias is not None)     # spills 4 to 36 bytes at 64 queries
    return BackwardSm80Config(8, 1, 2, 32 if several else 64, stages, **many)
