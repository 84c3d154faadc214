"""Tilings of the Hopper kernels: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import LONG, SHORT, feature_weight, num_features, squeeze
from ..spec import Spec


@dataclass(frozen=True, slots=True)
class ForwardSm90Config:
    """One tiling of choose_forward: block_m query rows (64 per consumer warpgroup), block_n keys, `stages` of K and V in flight.

    `out_panels`: panels of 64 columns of the output that have a place in shared memory at a time, for each warpgroup; with 0 the output
    goes from the registers to global memory, 16 bytes a thread at a time.
    `turns`: consumer warpgroups issue their products one after another, so that one's softmax runs beside another's products.
    `optimistic`: blocks without a structural mask are exponentiated under the maximum so far; their own is only looked for where that
    overflows.
    `hints`: in the L2 cache Q and the output make room first, K and V, which other tiles read too, last.
    """

    block_m: int
    block_n: int
    stages: int = 2
    out_panels: int = 4
    turns: bool = False
    optimistic: bool = True
    hints: bool = False

    def __post_init__(self) -> None:
        assert self.block_m in (64, 128, 192) and self.block_n % 16 == 0 and 16 <= self.block_n <= 256
        assert self.stages in (1, 2, 4), "a stage is a block's number modulo a power of two"

    @property
    def consumer_registers(self) -> int:
        return {64: 240, 128: 232, 192: 160}[self.block_m]

    @property
    def producer_registers(self) -> int:
        """24 are too few for a producer that also looks for tiles."""
        return {64: 40, 128: 40, 192: 32}[self.block_m]

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} stages {self.stages} out {self.out_panels}"
                + " optimistic" * self.optimistic + " turns" * self.turns + " hints" * self.hints)


def choose_forward(spec: Spec, seqlen_k: int = 1 << 30) -> ForwardSm90Config:
    """Wide key blocks where registers allow: features that hold another value for every score need narrower ones.

    Scores take block_n / 2 registers a thread, probabilities block_n / 4, the output head_dim_v / 2, of 232 (160 with three consumers).
    """
    dim = max(spec.head_dim, spec.head_dim_v)
    heavy, several = feature_weight(spec) > 0, feature_weight(spec) > 1
    # looking for a block's maximum after all asks for all that its scores are made of: with these some registers spill
    again = spec.alibi is None and not several and (spec.bias is None or spec.bias_pairs)
    with_mask = spec.mask and num_features(spec) > 1        # the mask beside another
    if dim <= 64:
        if several or heavy or spec.softcap or (spec.right and seqlen_k < SHORT and not spec.packed):
            narrow = with_mask or (spec.mask and spec.packed)       # 108 to 292 bytes would spill
            return ForwardSm90Config(128, 64 if several else 96 if narrow else 128, turns=True, optimistic=again)
        return ForwardSm90Config(192, 128, turns=True, optimistic=again)
    if dim <= 128:
        if spec.dropout and num_features(spec) == 1:        # 112: 1.52 of cuDNN, 96: 1.33; 128 spills
            return ForwardSm90Config(128, 112, turns=True, optimistic=again)
        return ForwardSm90Config(128, 64 if several else 80 if with_mask else 96 if heavy else 128, turns=True, optimistic=again)
    if dim <= 192:          # a mask beside another feature spills 4 to 28 bytes at 64 keys, and where the maximum is looked for again
        return ForwardSm90Config(128, 32 if several else 48 if with_mask else 64 if heavy else 96, out_panels=2, turns=True,
                      optimistic=again and not with_mask)
    if heavy:
        return ForwardSm90Config(128, 32, out_panels=2, optimistic=False, hints=True)
    plain = not (spec.left or spec.packed or spec.scaled or spec.sinks)        # others spill a few registers
    if plain and seqlen_k >= LONG:
        return ForwardSm90Config(128, 80, out_panels=0, turns=True, hints=True)
    return ForwardSm90Config(128, 48 if spec.alibi and spec.packed else 64, out_panels=2, optimistic=plain, hints=True)


@dataclass(frozen=True, slots=True)
class BackwardSm90Config:
    """One tiling of choose_backward: 128 keys, head sizes padded to `dim`, block_m query rows a step, `q_stages` of Q (two of dO).

    `crowded`: dQ of the block before leaves before the scores are touched, and the product of dV ends before dP is asked for, so that
    features find registers.
    `halves`: P is computed for one half of the queries before dP is asked for and for the other half after, so that the registers of S, P
    and dP are never all taken. `squeeze`: elements of bias and mask are packed as they arrive, two and 32 to a register, in so many
    pieces, one after the other; 0: they are not.
    """

    dim: int
    block_m: int
    q_stages: int = 3
    crowded: bool = False
    halves: bool = False
    squeeze: int = 0

    def __post_init__(self) -> None:
        assert (self.dim, self.block_m) in ((64, 128), (128, 64)), "each warpgroup makes one panel of dQ"
        assert not (self.crowded and self.halves), "the second half is computed beside dP"

    @property
    def text(self) -> str:
        return (f"{self.block_m}x128 dim {self.dim} stages {self.q_stages}" + " crowded" * self.crowded
                + " halves" * self.halves + (f" squeeze {self.squeeze}" if self.squeeze else ""))


def choose_backward(spec: Spec) -> BackwardSm90Config:
    """S, dP and dQ take block_m / 2, block_m / 2 and 32 registers a thread, P block_m / 4, dK and dV dim / 2 each, of 240."""
    two = num_features(spec) > 1
    if max(spec.head_dim, spec.head_dim_v) <= 64 and spec.dbias is None and not spec.softcap and not (spec.mask and two):     # they spill
        plain = spec.deterministic and not (spec.left or spec.right or spec.packed)
        crowded = spec.scaled or spec.mask or plain         # 4 to 36 bytes spill in halves
        return BackwardSm90Config(64, 128, crowded=crowded, halves=not crowded)
    # others spill: of a bias all but dense ones that every row sees all of, or of 16 bits with dbias
    several = spec.packed or ((spec.left or spec.right) and (spec.dbias is None or spec.bias == "float32"))
    crowded = two or spec.softcap or (spec.dropout and spec.packed) or (spec.bias is not None and several)
    return BackwardSm90Config(128, 64, crowded=crowded, squeeze=squeeze(spec))


@dataclass(frozen=True, slots=True)
class DqSm90Config:
    """One tiling of backward_sm90_dq: 128 query rows, block_n keys a step, `stages` of K and `stages_v` of V.

    `behind`: the product of dQ of the block before is the last of a step, and dS is computed beside it; else it comes right after that of
    S, which gives K's place back earlier.
    """

    block_n: int
    stages: int = 3
    stages_v: int = 2
    behind: bool = True

    def __post_init__(self) -> None:
        assert self.block_n % 16 == 0 and 16 <= self.block_n <= 256
        assert self.stages >= 2 and self.stages_v >= 1, "K is used by the step after, too"

    @property
    def text(self) -> str:
        return f"128x{self.block_n} stages {self.stages} {self.stages_v}" + " behind" * self.behind


def choose_dq(spec: Spec) -> DqSm90Config:
    """Widest blocks without spilled registers, all features of a class together. S and dP take block_n / 2 registers a thread each, dS
    block_n / 4, dQ head_dim / 2, bias and mask up to block_n / 2 each, softcap block_n / 4, of 240. Shared memory: 256 bytes a
    column of Q and dO, 2 * block_n one of a stage of K and V, columns rounded to 64, of 227 KB: over 128 columns not every stage fits."""
    dim = max(spec.head_dim, spec.head_dim_v)
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2 if dim <= 192 else 3
    weight = feature_weight(spec) if spec.bias is not None or spec.mask or spec.softcap else 0
    if weight > 1:
        return DqSm90Config((48, 48, 32, 16)[size])
    if weight > 0 or spec.softcap:
        if size == 3:
            return DqSm90Config(48, 2, 2, behind=False)
        both = weight > 0 and (spec.softcap or (spec.mask and spec.bias is not None))
        return DqSm90Config((80, 64, 48 if both else 64)[size], behind=not (size == 2 and spec.bias is not None))
    block_n = ((112 if spec.dropout else 128, 96, 80, 64) if spec.alibi is None else (96, 80, 64, 64))[size]
    if size == 3:
        return DqSm90Config(block_n, 2, 1, behind=False)
    return DqSm90Config(block_n, 3, 1 if block_n == 80 and size == 2 else 2)


@dataclass(frozen=True, slots=True)
class WideSm90Config:
    """One tiling of backward_sm90_wide: 128 keys, 64 query rows a step, `q_stages` of Q and `do_stages` of dO; `part` is "dk" or "dv".

    Of "dk": `behind`: the product of dK of the block before is the last of a step, and dS is computed beside it; else it comes right after
    that of S, which gives Q's place back earlier. `late`: dP is asked for when P is there and dK's product has ended: fewer registers.
    Of both: `squeeze`, as BackwardSm90Config's.
    """

    part: str
    q_stages: int
    do_stages: int
    behind: bool = False
    late: bool = False
    squeeze: int = 0

    def __post_init__(self) -> None:
        assert self.part in ("dk", "dv") and not (self.part == "dv" and (self.behind or self.late))
        assert self.q_stages >= 1 + (self.part == "dk"), "Q is used by the step after, too"
        assert self.do_stages in (1, 2), "the producer may clean for two heads ahead, no more: smem.init_clean"
        assert not (self.behind and self.late), "dK of the block before would wait for P"

    @property
    def text(self) -> str:
        return (f"{self.part} 64x128 stages {self.q_stages} {self.do_stages}" + " behind" * self.behind + " late" * self.late
                + (f" squeeze {self.squeeze}" if self.squeeze else ""))


def choose_wide(spec: Spec, part: str) -> WideSm90Config:
    """S and dP take 32 registers a thread each, P and dS 16, the gradient its head size / 2, bias and mask 32 each, of 240. Shared memory:
    16 KB for 64 columns of K and of V, 8 for those of a stage of Q and dO, of 227 KB: over 192 columns, fewer stages."""
    columns, columns_v = -(-spec.head_dim // 64), -(-spec.head_dim_v // 64)
    packs = 1 if spec.mask and spec.softcap else squeeze(spec, 2 if part == "dv" else 1)     # in one piece 4 bytes spill at head_dim 256
    if part == "dv":
        return WideSm90Config(part, 2, 2, squeeze=packs)
    crowded = spec.bias is not None or spec.mask or spec.softcap
    if columns == 4:
        return WideSm90Config(part, 2, 1 if columns_v == 4 else 2, late=True, squeeze=packs)
    return WideSm90Config(part, 3, 1 if columns + columns_v == 7 else 2, behind=not crowded, late=spec.dbias is not None,
                      squeeze=packs)
