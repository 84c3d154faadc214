"""Tile sizes per architecture and problem: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from .spec import Spec

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}      # KiB a block may ask for


@dataclass(frozen=True, slots=True)
class ConfigSimt:
    """One tiling of forward_simt: block_m query rows x block_n keys a step, copied in slices of `slice_dim` columns of head_dim; `loads` in
    flight per thread."""

    block_m: int
    block_n: int
    slice_dim: int
    threads: int = 256
    loads: int = 8
    blocks_per_sm: int = 1

    @property
    def text(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.slice_dim} threads {self.threads} loads {self.loads} blocks {self.blocks_per_sm}"


def block_m_simt(dtype: str, head_dim_v: int) -> int:
    """Rows of a tile, so that O takes at most 64 registers a thread: with 128 the features of some problems spill."""
    rows = 64 if head_dim_v <= 256 else 32
    return rows // 2 if dtype == "float64" else rows


def forward_simt(spec: Spec) -> ConfigSimt:
    """Shared memory stays under the 99 KB of consumer cards. Two blocks an SM, 128 registers a thread, where that compiles without spills:
    not with features' addresses, nor with a small head_dim, whose loops the compiler unrolls."""
    block_m = block_m_simt(spec.dtype, spec.head_dim_v)
    features = spec.softcap or spec.alibi or spec.bias or spec.mask or spec.dropout
    if spec.dtype == "float64":
        return ConfigSimt(block_m, 64, 64)
    return ConfigSimt(block_m, 64, 128, blocks_per_sm=2 if spec.head_dim >= 64 and 64 <= spec.head_dim_v <= 128 and not features else 1)


def lines_simt(spec: Spec) -> int:
    """Most lines of a tile of backward_simt and dbias. Of few columns the compiler makes straight code of the loops over them and keeps
    more at once: with features, 64 lines would spill 4 to 136 bytes, with most of them 32 lines would spill 12."""
    small = max(spec.head_dim, spec.head_dim_v) < 64
    if small and num_features(spec) > 2:
        return 16
    return 32 if spec.dtype == "float64" or (small and num_features(spec) > 0) else 64


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of forward_sm90: block_m query rows (64 per consumer warpgroup), block_n keys, `stages` of K and V in flight.

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


def forward_sm90(spec: Spec, seqlen_k: int = 1 << 30) -> Config:
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
            return Config(128, 64 if several else 96 if with_mask else 128, turns=True, optimistic=again)
        return Config(192, 128, turns=True, optimistic=again)
    if dim <= 128:
        if spec.dropout and num_features(spec) == 1:        # 112: 1.52 of cuDNN, 96: 1.33; 128 spills
            return Config(128, 112, turns=True, optimistic=again)
        return Config(128, 64 if several else 80 if with_mask else 96 if heavy else 128, turns=True, optimistic=again)
    if dim <= 192:          # a mask beside another feature spills 4 to 28 bytes at 64 keys, and where the maximum is looked for again
        return Config(128, 32 if several else 48 if with_mask else 64 if heavy else 96, out_panels=2, turns=True,
                      optimistic=again and not with_mask)
    if heavy:
        return Config(128, 32, out_panels=2, optimistic=False, hints=True)
    plain = not (spec.left or spec.packed or spec.scaled or spec.sinks)        # others spill a few registers
    if plain and seqlen_k >= LONG:
        return Config(128, 80, out_panels=0, turns=True, hints=True)
    return Config(128, 48 if spec.alibi and spec.packed else 64, out_panels=2, optimistic=plain, hints=True)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One tiling of forward_decode: each of `warps` goes through every warps-th piece of `keys` keys of a split. `overhead`: what a block
    costs besides its steps, in steps."""

    keys: int
    warps: int = 4
    blocks_per_sm: int = 2
    overhead: int = 4

    def __post_init__(self) -> None:
        assert self.keys % 16 == 0

    @property
    def text(self) -> str:
        return f"{self.keys} keys warps {self.warps} blocks {self.blocks_per_sm}"


def forward_decode(spec: Spec) -> DecodeConfig:
    """Two steps of K and V take 128 registers a thread at head_dim 128, and so do two of twice the keys at 64."""
    return DecodeConfig(16 if max(spec.head_dim, spec.head_dim_v) > 64 else 32)


def num_features(spec: Spec) -> int:
    """Of those that take registers."""
    return spec.dropout + spec.softcap + spec.mask + (spec.alibi is not None) + (spec.bias is not None)


def feature_weight(spec: Spec) -> int:
    """0: features cost no registers to speak of, 1: one value more for every score, 2: several."""
    values = spec.dropout + spec.mask + (spec.bias is not None) * (1 if spec.bias_pairs else 2)
    return 0 if values == 0 else 1 if values + spec.softcap + (spec.alibi is not None) <= 2 else 2


SHORT, LONG = 1536, 3072       # keys; measured in docs/performance.md


def squeeze(spec: Spec, pieces: int = 1) -> int:
    """For a bias beside a mask, whose elements take more registers than there are: 4 to 72 bytes would spill. Packing them takes
    arithmetic, which the one or the other alone does without."""
    return pieces if spec.mask and spec.bias is not None else 0


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """One tiling of backward_sm90: 128 keys, head sizes padded to `dim`, block_m query rows a step, `q_stages` of Q (two of dO).

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


def backward_sm90(spec: Spec) -> BackwardConfig:
    """S, dP and dQ take block_m / 2, block_m / 2 and 32 registers a thread, P block_m / 4, dK and dV dim / 2 each, of 240."""
    two = num_features(spec) > 1
    if max(spec.head_dim, spec.head_dim_v) <= 64 and spec.dbias is None and not spec.softcap and not (spec.mask and two):     # they spill
        return BackwardConfig(64, 128, crowded=spec.bias is not None, halves=spec.bias is None)
    crowded = two or (spec.dropout and spec.packed) or (spec.softcap and spec.right)        # others spill
    return BackwardConfig(128, 64, crowded=crowded, squeeze=squeeze(spec))


@dataclass(frozen=True, slots=True)
class ConfigSm80:
    """One tiling of forward_sm80: `warps` with 16 * tiles query rows each, block_n keys a step, `stages` of K and V.

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


def forward_sm80(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True) -> ConfigSm80:
    """Chosen by registers (none spilled) and shared memory; two blocks of four warps on a multiprocessor wherever they fit."""
    dim, room = max(spec.head_dim, spec.head_dim_v), SHARED_MEMORY.get(arch, 99)
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None
    many = {"whole": whole, "whole_out": whole_out}
    if dim > 128:       # 16 rows a warp: the output of 32 would take all registers
        return ConfigSm80(4, 1, 64 if room > 160 and whole and not heavy else 32, 1, 1, squeeze=squeeze(spec), **many)
    if heavy or not whole:
        return ConfigSm80(4, 1, 64 if dim > 64 or room > 160 else 32, 1, 2, **many)
    if dim > 64:
        return ConfigSm80(4, 2, 64 if room > 200 else 48 if room > 160 else 32, 1, 2, **many)      # sm_80 spills a register at 64 keys
    return ConfigSm80(4, 2, 64, 2, 2, optimistic=True, **many)


@dataclass(frozen=True, slots=True)
class BackwardConfigSm80:
    """One tiling of backward_sm80: `warps`, of which `split` share 16 * tiles keys, block_m queries a step, `stages` of Q and dO.

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


def backward_sm80(spec: Spec, arch: str, whole: bool = True, whole_out: bool = True) -> BackwardConfigSm80:
    """Chosen by registers (none spilled) and shared memory. dK and dV take tiles * (head_dim + head_dim_v) / (2 * split) registers a
    thread, S and dP tiles * block_m / (2 * split) each."""
    dim, room = max(spec.head_dim, spec.head_dim_v), SHARED_MEMORY.get(arch, 99)
    heavy = spec.bias is not None or spec.mask or spec.dropout or spec.softcap or spec.alibi is not None or not whole
    many = {"vector": int(arch.removeprefix("sm_").rstrip("a")) >= 90, "whole": whole, "whole_out": whole_out}
    if dim <= 64:
        if heavy:               # 97 KiB
            return BackwardConfigSm80(8, 2, 2, 64, **many)
        return BackwardConfigSm80(4, 2, 1, 32, 2 if room > 99 else 1, 2, **many)       # 57 or 48.5 KiB: two blocks hide their waits
    if dim <= 128:              # 161 KiB
        if room <= 99:
            return BackwardConfigSm80(8, 1, 1, 32, 1, **many)
        several = feature_weight(spec) > 1      # spills a few registers at 64 queries on sm_80
        return BackwardConfigSm80(8, 1, 1, 32, **many) if several else BackwardConfigSm80(8, 2, 2, 64, **many)
    if room <= 99:              # 68 KiB
        return BackwardConfigSm80(4, 1, 2, 32, 1, **many)
    stages = 2 if dim <= 192 or room > 200 else 1
    several = feature_weight(spec) > 1 or (spec.mask and spec.bias is not None)     # spills 4 to 36 bytes at 64 queries
    return BackwardConfigSm80(8, 1, 2, 32 if several else 64, stages, **many)


@dataclass(frozen=True, slots=True)
class QueryConfig:
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


def query_sm90(spec: Spec) -> QueryConfig:
    """Widest blocks without spilled registers, all features of a class together. S and dP take block_n / 2 registers a thread each, dS
    block_n / 4, dQ head_dim / 2, bias and mask up to block_n / 2 each, softcap block_n / 4, of 240. Shared memory: 256 bytes a
    column of Q and dO, 2 * block_n one of a stage of K and V, columns rounded to 64, of 227 KB: over 128 columns not every stage fits."""
    dim = max(spec.head_dim, spec.head_dim_v)
    size = 0 if dim <= 64 else 1 if dim <= 128 else 2 if dim <= 192 else 3
    weight = feature_weight(spec) if spec.bias is not None or spec.mask or spec.softcap else 0
    if weight > 1:
        return QueryConfig((48, 48, 32, 16)[size])
    if weight > 0 or spec.softcap:
        if size == 3:
            return QueryConfig(48, 2, 2, behind=False)
        return QueryConfig((80, 64, 48 if spec.softcap and weight > 0 else 64)[size], behind=not (size == 2 and spec.bias is not None))
    block_n = ((112 if spec.dropout else 128, 96, 80, 64) if spec.alibi is None else (96, 80, 64, 64))[size]
    if size == 3:
        return QueryConfig(block_n, 2, 1, behind=False)
    return QueryConfig(block_n, 3, 1 if block_n == 80 and size == 2 else 2)


@dataclass(frozen=True, slots=True)
class WideConfig:
    """One tiling of backward_sm90_wide: 128 keys, 64 query rows a step, `q_stages` of Q and `do_stages` of dO; `part` is "dk" or "dv".

    Of "dk": `behind`: the product of dK of the block before is the last of a step, and dS is computed beside it; else it comes right after
    that of S, which gives Q's place back earlier. `late`: dP is asked for when P is there and dK's product has ended: fewer registers.
    Of both: `squeeze`, as BackwardConfig's.
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


def wide_sm90(spec: Spec, part: str) -> WideConfig:
    """S and dP take 32 registers a thread each, P and dS 16, the gradient its head size / 2, bias and mask 32 each, of 240. Shared memory:
    16 KB for 64 columns of K and of V, 8 for those of a stage of Q and dO, of 227 KB: over 192 columns, fewer stages."""
    columns, columns_v = -(-spec.head_dim // 64), -(-spec.head_dim_v // 64)
    if part == "dv":
        return WideConfig(part, 2, 2, squeeze=squeeze(spec, 2))     # in one piece 4 bytes spill at head_dim 256
    crowded = spec.bias is not None or spec.mask or spec.softcap
    if columns == 4:
        return WideConfig(part, 2, 1 if columns_v == 4 else 2, late=True, squeeze=squeeze(spec))
    return WideConfig(part, 3, 1 if columns + columns_v == 7 else 2, behind=not crowded, late=spec.dbias is not None,
                      squeeze=squeeze(spec))
