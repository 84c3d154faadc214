"""Tilings of the Hopper backwards that compute one gradient alone: dQ, and at larger head sizes dK and dV."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import feature_weight, num_features, squeeze
from ..spec import Spec
from .config import CONSUMERS, SHARED_MEMORY, WIDE_BLOCK_M, panel_columns, slice_dim, slices_of


# ---------------------------------------------------------------- one gradient alone
@dataclass(frozen=True, slots=True, kw_only=True)
class Sliced:
    """What a tiling of a kernel for one gradient says of its consumer warpgroups.

    Parameters
    ----------
    slices
        Warpgroups that share a tile's 64 rows (keys). Each computes all their dS, or P, and a slice of the gradient's
        columns. 1: none share, each of two has 64 rows of its own.
    """

    slices: int = 1

    @property
    def row_groups(self) -> int:
        """Groups of 64 rows, or keys, in a tile."""
        return CONSUMERS if self.slices == 1 else 1

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.row_groups * self.slices

    @property
    def consumer_registers(self) -> int:
        """Registers a thread of a consumer warpgroup, of the 64 K of a multiprocessor."""
        return {2: 240, 3: 160}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers a thread of the producer warpgroup."""
        return {2: 24, 3: 32}[self.consumers]


# ---------------------------------------------------------------- dQ alone
WASTED_KEYS = 1.2           # padded keys in steps of 80 over those in steps of 64, which then are faster: 256 keys are 320, 163 -> 155 us


@dataclass(frozen=True, slots=True, kw_only=True)
class DqSm90Config(Sliced):
    """A tiling of `backward_dq`.

    Parameters
    ----------
    block_n
        Keys of a step.
    stages, stages_v
        Stages of K and of V.
    behind
        The MMA of dQ of the previous block is the last of a step and overlaps the computation of dS. Otherwise it comes
        right after that of S, which frees K's stage earlier.
    """

    block_n: int
    stages: int = 3
    stages_v: int = 2
    behind: bool = True

    def __post_init__(self) -> None:
        assert self.block_n % 16 == 0 and 16 <= self.block_n <= 256
        assert self.stages >= 2 and self.stages_v >= 1, "the next step uses K, too"

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return 64 * self.row_groups

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} stages {self.stages} {self.stages_v}" + f" slices {self.slices}" * (self.slices > 1)
                + " behind" * self.behind)


def choose_dq(spec: Spec, seqlen_k: int = 1 << 30) -> DqSm90Config:
    """The widest blocks without spilled registers, for all features of a class together.

    S and dP take block_n / 2 registers a thread each, dS block_n / 4, dQ head_dim / 2, a bias up to block_n / 2,
    softcap block_n / 4, of 240. Shared memory: 256 bytes a column of Q and dO, 2 * block_n a column of a stage of K and
    V, columns rounded up to 64, of 227 KB: over 128 columns there is no room for all stages.
    """
    dim = max(spec.head_dim, spec.head_dim_v)
    if dim > 256:
        return _choose_sliced_dq(spec)
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2 if dim <= 192 else 3
    weight = feature_weight(spec) if spec.bias is not None or spec.softcap else 0
    if weight > 1:
        return DqSm90Config(block_n=(48, 48, 32, 16)[size])
    if weight > 0 or spec.softcap:
        if size == 3:
            return DqSm90Config(block_n=48, stages=2, stages_v=2, behind=False)
        both = weight > 0 and (spec.softcap or (spec.mask and spec.bias is not None))
        block_n = (80, 64, 48 if both else 64)[size]
        return DqSm90Config(block_n=block_n, behind=not (size == 2 and spec.bias is not None))
    both = spec.mask and spec.dropout       # 32 bytes would spill at 80 keys
    block_n = ((112 if spec.dropout else 128, 96, 64 if both else 80, 64) if spec.alibi is None else (96, 80, 64, 64))[size]
    if size == 3:
        return DqSm90Config(block_n=block_n, stages=2, stages_v=1, behind=False)
    if block_n == 80 and size == 2 and -(-seqlen_k // 80) * 80 >= WASTED_KEYS * -(-seqlen_k // 64) * 64:
        block_n = 64
    return DqSm90Config(block_n=block_n, stages=3, stages_v=1 if block_n == 80 and size == 2 else 2)


def _choose_sliced_dq(spec: Spec) -> DqSm90Config:
    """The most keys that fit: Q and dO of 64 rows stay, K has two stages and V one."""
    slices = slices_of(spec.head_dim)
    columns, columns_v, columns_k = panel_columns(spec.head_dim), panel_columns(spec.head_dim_v), slices * slice_dim(spec.head_dim, slices)
    room = SHARED_MEMORY - 64 * 2 * (columns + columns_v)
    sizes = (32, 16) if num_features(spec) > 1 else (64, 32, 16)        # two features: 12 bytes spill at 64 keys
    return DqSm90Config(block_n=next(n for n in sizes if 2 * n * (2 * columns_k + columns_v) <= room), stages=2, stages_v=1,
                        behind=False, slices=slices)


# ---------------------------------------------------------------- dK alone and dV alone, head_dim over 128
@dataclass(frozen=True, slots=True, kw_only=True)
class WideSm90Config(Sliced):
    """A tiling of `backward_wide`.

    Parameters
    ----------
    part
        The gradient that the kernel computes, "dk" or "dv".
    block_m
        Query rows of a step.
    q_stages, do_stages
        Stages of Q and of dO.
    behind
        Of "dk" only. The MMA of dK of the previous block is the last of a step and overlaps the computation of dS.
        Otherwise it comes right after that of S, which frees Q's stage earlier.
    late
        Of "dk" only. The MMA of dP is issued when P is computed and dK's MMA has ended: fewer registers.
    squeeze
        As in BackwardSm90Config.
    """

    part: str
    block_m: int = WIDE_BLOCK_M
    q_stages: int
    do_stages: int
    behind: bool = False
    late: bool = False
    squeeze: int = 0

    def __post_init__(self) -> None:
        assert self.part in ("dk", "dv") and not (self.part == "dv" and (self.behind or self.late))
        assert self.q_stages >= 1 + (self.part == "dk"), "the next step uses Q, too"
        assert self.do_stages in (1, 2), "tile/ring.py, make_tails: the producer may clear the tails of two heads ahead, not more"
        assert not (self.behind and self.late), "dK of the previous block would wait for P"

    @property
    def block_n(self) -> int:
        """Keys of a tile."""
        return 64 * self.row_groups

    @property
    def text(self) -> str:
        return (f"{self.part} {self.block_m}x{self.block_n} stages {self.q_stages} {self.do_stages}"
                + f" slices {self.slices}" * (self.slices > 1) + " behind" * self.behind + " late" * self.late
                + (f" squeeze {self.squeeze}" if self.squeeze else ""))


def choose_wide(spec: Spec, part: str) -> WideSm90Config:
    """The most stages that fit.

    S and dP take 32 registers a thread each, P and dS 16, the gradient its head size / 2, a bias 32, of 240. Shared
    memory: 16 KB for 64 columns of K and of V, 8 for those of a stage of Q and dO, of 227 KB: over 192 columns, fewer
    stages.
    """
    if max(spec.head_dim, spec.head_dim_v) > 256:
        return _choose_sliced_wide(spec, part)
    columns, columns_v = -(-spec.head_dim // 64), -(-spec.head_dim_v // 64)
    pieces = squeeze(spec, 2 if part == "dv" else 1)        # of dV, in one piece 4 bytes spill at head_dim 256
    if part == "dv":
        return WideSm90Config(part=part, q_stages=2, do_stages=2, squeeze=pieces)
    crowded = spec.bias is not None or spec.softcap
    if columns == 4:
        return WideSm90Config(part=part, q_stages=2, do_stages=1 if columns_v == 4 else 2, late=True, squeeze=pieces)
    return WideSm90Config(part=part, q_stages=3, do_stages=1 if columns + columns_v == 7 else 2, behind=not crowded,
                          late=spec.dbias is not None, squeeze=pieces)


def _choose_sliced_wide(spec: Spec, part: str) -> WideSm90Config:
    """The most query rows that fit: K, and of "dk" V, of 64 keys stay; Q has two stages, dO two if there is room, else one."""
    of_dk = part == "dk"
    slices = slices_of(spec.head_dim if of_dk else spec.head_dim_v)
    columns, columns_v = panel_columns(spec.head_dim), panel_columns(spec.head_dim_v)
    columns_q = slices * slice_dim(spec.head_dim, slices) if of_dk else columns
    columns_do = columns_v if of_dk else slices * slice_dim(spec.head_dim_v, slices)
    room = SHARED_MEMORY - 64 * 2 * (columns + of_dk * columns_v)
    # two features: 16 to 60 bytes spill at 64 rows; three warpgroups, which have 160 registers a thread: 128
    sizes = (32, 16) if num_features(spec) > 1 or slices > 2 else (64, 32, 16)
    block_m, do_stages = next((m, n) for m in sizes for n in (2, 1) if 2 * m * (2 * columns_q + n * columns_do) <= room)
    return WideSm90Config(part=part, block_m=block_m, q_stages=2, do_stages=do_stages, slices=slices)
