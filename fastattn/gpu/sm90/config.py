"""Tilings of the Hopper forward, and of the backward of dK and dV: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import LONG, SHORT, feature_weight, num_features, squeeze
from ..spec import Spec

CONSUMERS = 2               # consumer warpgroups of the backward's kernels
BLOCK_N = 128               # keys of a tile of `backward` and `backward_wide`: 64 per consumer warpgroup
WIDE_BLOCK_M = 64           # query rows of a step of `backward_wide`
WARPGROUP = 128             # threads
FLOAT_BLOCK = 64            # keys, and queries of a step, of `backward_float`: its operands take 192 KB of shared memory, dS 24
FLOAT_WARPS = 8             # of a block of `backward_float`
MOST_BIAS_FORWARD, MOST_BIAS_BACKWARD = 64, 128     # head_dim up to which tiles of a bias fit shared memory
OUT_ROWS = 64               # rows of a TMA store of the output: one warpgroup's
FEW_FULL, FEW_WINDOW = 640, 1024        # keys up to which `_choose_few` is asked without a mask, and where rows attend a window
LONGEST = 65536             # keys from which causal tiles at head_dim 128 have steps of 160: 51.2 -> 49.7 ms; at 16384 they gave nothing
PADDED_ROWS = 1.15          # most padded rows over those of smaller tiles; 512 rows, where tiles of 192 won, have 1.125
MOST_DIM = 576              # of head_dim and head_dim_v: MLA's latent with its rotary part; larger tiles do not fit shared memory
SHARED_MEMORY = 225 * 1024  # bytes for tiles, of 227 KB: barriers, tile records and the alignment of the base take less than 2


def slices_of(dim: int) -> int:
    """Warpgroups that share the `dim` columns of a result when a head size is over 256, at most 256 columns each."""
    return 2 if dim <= 512 else 3


def panel_columns(dim: int) -> int:
    """Columns of the panels of 64 that `dim` columns take."""
    return -(-dim // 64) * 64


def slice_dim(dim: int, slices: int) -> int:
    """Columns of each of `slices` slices of `dim` columns. Several are whole panels of 64; the last may be empty."""
    return dim if slices == 1 else panel_columns(-(-dim // slices))


# ---------------------------------------------------------------- a bias in shared memory
def takes_bias_tiles(spec: Spec, most: int) -> bool:
    """Whether a kernel reads the bias from shared memory, where TMA has put it, if TMA can. `most`: the largest head_dim that leaves room.

    With other features its elements stay in registers: their tilings are narrower, and such tiles need whole panels of 64 keys.
    """
    return not (spec.softcap or spec.dropout or spec.alibi or spec.traced) and max(spec.head_dim, spec.head_dim_v) <= most


# ---------------------------------------------------------------- forward
BLOCKS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1))      # thread blocks of a multiprocessor, consumer warpgroups of each


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSm90Config:
    """A tiling of the forward.

    Parameters
    ----------
    block_m, block_n
        Query rows of a tile, 64 per consumer warpgroup, and keys of a step.
    stages
        Stages of K and V in flight.
    out_panels
        Panels of 64 columns of the output that fit in shared memory at once, for each warpgroup. 0: it goes from registers to memory.
    whole_rows
        Rows of the output lie in shared memory as in memory, and TMA stores them whole. Panels would cut rows of 144 bytes at byte 128, in
        the middle of a sector of 32 bytes where the head is odd.
    turns
        FlashAttention-3's ping-pong: warpgroups issue their MMAs one after another, so that one's softmax overlaps another's MMAs.
    slices
        Consumer warpgroups that share 64 query rows. Each computes all their scores and a slice of the output's columns, because one
        has registers for 256 columns only. 1: none share.
    optimistic
        Blocks without a structural mask are exponentiated under the maximum so far. Their own one is computed only if that overflows.
    hints
        L2 eviction priorities: Q and the output are evicted first, K and V, which other tiles read too, last.
    wide_producer
        16 more registers for the producer, 8 fewer for each of two consumers: with pages for two producers.
    box, whole
        Keys in pages: rows of K and V that TMA loads at a time, and whether a page has as many. 0: no pages.
    blocks_per_sm
        Thread blocks of a multiprocessor. Several for few keys and for masks of short pieces: one computes while others wait for
        their first keys or store rows.
    """

    block_m: int
    block_n: int
    stages: int = 2
    out_panels: int = 4
    whole_rows: bool = False
    turns: bool = False
    optimistic: bool = True
    hints: bool = False
    slices: int = 1
    wide_producer: bool = False
    box: int = 0
    whole: bool = False
    blocks_per_sm: int = 1

    def __post_init__(self) -> None:
        assert (self.consumers == 2 or not self.wide_producer) and (self.blocks_per_sm, self.consumers) in BLOCKS
        assert self.block_m in (64, 128, 192) and self.block_n % 16 == 0 and 16 <= self.block_n <= 256
        assert self.stages in (1, 2, 4), "a block's stage is its number modulo a power of two"
        assert not self.whole_rows or self.slices == 1
        assert self.slices == 1 or (self.block_m == 64 and self.slices <= 3), "slices share the rows of one warpgroup"

    @property
    def consumers(self) -> int:
        """Consumer warpgroups."""
        return self.block_m // 64 * self.slices

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return WARPGROUP * self.consumers + 32 if self.lone_producer else WARPGROUP * (1 + self.consumers)

    @property
    def lone_producer(self) -> bool:
        """Whether the producer is one warp behind the consumers, and no registers change hands: there are enough for all warps."""
        return self.blocks_per_sm > 2

    @property
    def consumer_registers(self) -> int:
        """Registers a thread of a consumer warpgroup, of the 64 K of a multiprocessor."""
        registers = {1: 240, 2: 232, 3: 160} if self.blocks_per_sm == 1 else {1: 216, 2: 104}
        return registers[self.consumers] - 8 * self.wide_producer

    @property
    def producer_registers(self) -> int:
        """Registers a thread of the producer warpgroup. 24 are too few for a producer that also draws tile numbers."""
        return {1: 40, 2: 40 if self.blocks_per_sm == 1 else 32, 3: 32}[self.consumers] + 16 * self.wide_producer

    @property
    def text(self) -> str:
        flags = {"optimistic": self.optimistic, "turns": self.turns, "hints": self.hints, "wide_producer": self.wide_producer,
                 "whole_rows": self.whole_rows}
        return (f"{self.block_m}x{self.block_n} stages {self.stages} out {self.out_panels}" + f" slices {self.slices}" * (self.slices > 1)
                + "".join(f" {name}" for name, on in flags.items() if on) + f" box {self.box}" * (self.box > 0) + " whole" * self.whole
                + f" blocks {self.blocks_per_sm}" * (self.blocks_per_sm > 1))


def choose_forward(spec: Spec, seqlen_k: int = 1 << 30, seqlen_q: int = 1 << 30) -> ForwardSm90Config:
    """The widest key blocks that registers allow: features that hold another value for every score need narrower ones.

    Scores take block_n / 2 registers a thread, probabilities block_n / 4, the output head_dim_v / 2, of 232 (three consumers: 160).
    """
    dim = max(spec.head_dim, spec.head_dim_v)
    if dim > 256:
        return _choose_sliced(spec)
    if spec.bias_tiles:         # 192 x 128 would spill 48 bytes; docs/log-gpu.md has the others
        block_m, block_n = (192, 96) if dim <= 32 else (128, 128)
        return ForwardSm90Config(block_m=block_m, block_n=block_n, turns=True)
    heavy, several = feature_weight(spec) > 0, feature_weight(spec) > 1
    # The fallback of `optimistic` recomputes the scores and so keeps all their operands live. With these that spills.
    capped = spec.softcap and num_features(spec) > 1        # the softcap and another feature: 36 to 72 bytes would spill
    optimistic = spec.alibi is None and not several and not capped and (spec.bias is None or spec.bias_pairs)
    if dim <= 64:
        if (few := _choose_few(spec, seqlen_k, seqlen_q, optimistic)) is not None:
            return few
        if several or heavy or spec.softcap or (spec.right and seqlen_k < SHORT and not spec.packed):
            # a softcap and dropout: 172 to 280 bytes would spill at 128 keys, 76 at 112
            block_n = (48 if capped else 64) if several else 96 if capped and heavy else 128
            return ForwardSm90Config(block_m=128, block_n=block_n, turns=True, optimistic=optimistic)
        return ForwardSm90Config(block_m=128 if _wasteful(spec, seqlen_q) else 192, block_n=128, turns=True, optimistic=optimistic)
    if dim <= 96 and (wider := _choose_wider(spec, seqlen_k, seqlen_q, optimistic)) is not None:
        return wider
    if dim <= 128:
        # dropout with 112: 1.52 of cuDNN, with 96: 1.33; 128 spills, with both forms of a softcap 24 to 56 bytes
        if num_features(spec) == 1 and (spec.dropout or (spec.softcap and spec.cap is None)):
            return ForwardSm90Config(block_m=128, block_n=112, turns=True, optimistic=optimistic)
        block_n = (48 if capped else 64) if several else 80 if capped and heavy else 96 if heavy or capped else 128
        if dim > 96 and seqlen_k >= LONGEST and spec.right and _is_plain(spec) and not (spec.left or spec.packed):
            block_n = 160
        return ForwardSm90Config(block_m=128, block_n=block_n, turns=True, optimistic=optimistic)
    if dim <= 192 and spec.head_dim_v <= 128 and num_features(spec) == 0:
        # MLA's 192/128, where O takes no more than at head_dim 128: 676 TFLOP/s with 96 keys, 691 with 112, 708 with 128, 714 with hints
        return ForwardSm90Config(block_m=128, block_n=128, out_panels=1, turns=True, optimistic=optimistic, hints=True)
    if dim <= 192:
        wide = heavy or (spec.softcap and spec.head_dim_v > 160)        # 96 keys would spill 36 to 108 bytes, 80 up to 12
        block_n = 32 if several else 48 if capped else 64 if wide else 96
        return ForwardSm90Config(block_m=128, block_n=block_n, out_panels=2, turns=True, optimistic=optimistic)
    if heavy or capped:
        return ForwardSm90Config(block_m=128, block_n=32, out_panels=2, optimistic=False, hints=True)
    plain = not (spec.left or spec.packed or spec.scaled or spec.sinks)        # others spill a few registers
    if plain and seqlen_k >= LONG:
        return ForwardSm90Config(block_m=128, block_n=80, out_panels=0, turns=True, hints=True)
    if spec.softcap and dim > 240:      # with the output in shared memory 44 bytes would spill, and to head_dim 240 without it 48
        return ForwardSm90Config(block_m=128, block_n=64, out_panels=0, turns=True, optimistic=False, hints=True)
    block_n = 48 if spec.softcap or (spec.alibi and spec.packed) else 64
    return ForwardSm90Config(block_m=128, block_n=block_n, out_panels=2, optimistic=plain, hints=True)


def _is_plain(spec: Spec) -> bool:
    """No feature that takes registers, no caches, no functions."""
    return num_features(spec) == 0 and not (spec.lengths or spec.traced)


def _wasteful(spec: Spec, seqlen_q: int) -> bool:
    """Whether tiles of 192 rows have much more padding than those of 128: 197 rows are 384, which was 0.84 of cuDNN, or 256."""
    return not spec.packed and _padded(seqlen_q, 192) > PADDED_ROWS * _padded(seqlen_q, 128)


def _choose_few(spec: Spec, seqlen_k: int, seqlen_q: int, optimistic: bool) -> ForwardSm90Config | None:
    """head_dim to 64 and few keys: several thread blocks on a multiprocessor. None: one is faster. Features would spill.

    A window, or a causal call to SHORT keys: blocks of 64 rows and 64 keys leave out most of what is masked. Without a mask the time is
    that of all scores, padding included: in smaller tiles, of which there are two, 1.12 times that in tiles of 192 rows, in tiles of 128
    rows, one block on a multiprocessor, 1.17 times. Many queries over few keys, and one step of 128 keys, are not for smaller tiles.
    """
    if not _is_plain(spec):
        return None
    small = ForwardSm90Config(block_m=64, block_n=64, blocks_per_sm=3, optimistic=optimistic)
    if spec.left or spec.right:
        most = FEW_WINDOW if spec.left and spec.right else 0 if spec.left or spec.packed or seqlen_q > 2 * seqlen_k else SHORT - 1
        return small if seqlen_k <= most else None
    if spec.packed or not 128 < seqlen_k <= FEW_FULL or seqlen_q > 2 * seqlen_k:
        return None

    def scores(block_m: int, block_n: int) -> int:
        return _padded(seqlen_q, block_m) * _padded(seqlen_k, block_n)
    one = 1.17 * scores(128, 128) if _wasteful(spec, seqlen_q) else scores(192, 128)
    if 1.12 * min(scores(64, 64), scores(128, 48)) >= one:
        return None
    large = ForwardSm90Config(block_m=128, block_n=48, blocks_per_sm=2, turns=True, optimistic=optimistic)
    return large if scores(128, 48) < scores(64, 64) else small


def _choose_wider(spec: Spec, seqlen_k: int, seqlen_q: int, optimistic: bool) -> ForwardSm90Config | None:
    """head_dim 65 to 96: as many rows as at head_dim 64, where exponentials are the limit, too. None: tiles of 128 rows are faster.

    Without a mask they take 0.78 to 0.89 of the time a score, with a causal one 1.00 (docs/log-gpu.md). 128 keys would spill 48 bytes.
    """
    if not _is_plain(spec) or spec.left or spec.right:
        return None
    more = _padded(seqlen_q, 192) * _padded(seqlen_k, 112) / (_padded(seqlen_q, 128) * _padded(seqlen_k, 128))
    if not spec.packed and more > 1.1:
        return None
    return ForwardSm90Config(block_m=192, block_n=112, whole_rows=True, turns=True, optimistic=optimistic)


def _padded(rows: int, block_m: int) -> int:
    """Rows of the tiles of so many rows."""
    return -(-rows // block_m) * block_m


def _choose_sliced(spec: Spec) -> ForwardSm90Config:
    """Head sizes over 256: warpgroups share 64 query rows, and two stages of K and V take the shared memory that Q leaves."""
    slices = slices_of(spec.head_dim_v)
    columns, columns_v = panel_columns(spec.head_dim), slices * slice_dim(spec.head_dim_v, slices)
    room = SHARED_MEMORY - 64 * 2 * columns
    block_n = room // (2 * 2 * (columns + columns_v)) // 16 * 16
    # turns: 376 instead of 386 TFLOP/s at head_dim 512; optimistic: 305 instead of 303, for 30 % more instructions
    most = 16 if slices > 2 and num_features(spec) > 1 else 32 if feature_weight(spec) > 0 else 64     # 40 bytes would spill
    return ForwardSm90Config(block_m=64, block_n=min(block_n, most), out_panels=0, slices=slices, optimistic=False)


# ---------------------------------------------------------------- dK and dV together
FIRST_TO_LAST = 32768       # keys from which causal calls go through query blocks from first to last
SPLIT_DIM = 48              # head_dim to which `split` takes 0.93 to 0.99 of the time; at 64 and 4096 keys it takes 1.15 times as long
SPLIT_ROWS = 256            # and rows to which it takes 0.96 to 1.00 at 64: two blocks of them
MLA = 192, 128, 64          # head_dim, head_dim_v and query rows of a step: the largest heads whose dK and dV fit the registers


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSm90Config:
    """A tiling of `backward`: BLOCK_N keys a tile.

    Parameters
    ----------
    dim, dim_v
        head_dim and head_dim_v of the Spec. Over 128 it is deterministic: there are no registers for dQ.
    block_m
        Query rows of a step.
    q_stages
        Stages of Q; dO has two.
    crowded
        For features that need registers: dQ of the previous block is stored before the scores are touched, and the MMA
        of dV ends before that of dP is issued.
    halves
        P is computed for one half of the queries before the MMA of dP is issued and for the other half after it, so
        that the registers of S, P and dP are never all live.
    squeeze
        Pieces in which elements of the bias are packed as they arrive, two to a register, one piece after the other. 0:
        they are not packed.
    apart
        Calls with far rows have a loop of their own, so that the main loop has no code for them: 538 instructions
        instead of 723 at head_dim 128. That code cost 1 to 4 % at head_dim 128 and 2 to 5 % at 64 (docs/log-gpu.md).
        Features leave no registers for it.
    down
        Blocks of queries go from last to first. Under a causal mask, tiles of different keys then begin with the same
        blocks and read Q and dO from the L2 cache together. From first to last they would begin apart: 2 to 5 % slower at
        512 to 8192 keys, 1 % faster at 65536.
    one_tile
        A head's keys are one tile, so that dQ of a block of queries is complete: it goes to memory as it is, without float32 sums, their
        zeros and their rounding.
    pair
        With `one_tile`: a head has two tiles of keys, and two blocks of queries. Its thread blocks are a cluster, and each stores dQ of one
        block of queries: the other one sends it its part through shared memory.
    split
        A third consumer warpgroup has no keys: it computes dQ of all of a tile's keys and adds it to the sums. The other two then neither
        wait for each other's dS nor store dQ.
    """

    dim: int
    dim_v: int
    block_m: int
    q_stages: int = 3
    crowded: bool = False
    halves: bool = False
    squeeze: int = 0
    apart: bool = False
    down: bool = False
    one_tile: bool = False
    pair: bool = False
    split: bool = False

    def __post_init__(self) -> None:
        assert not self.pair or (self.one_tile and not self.apart), "a loop for far rows ends dQ of each block alone"
        assert not self.split or (self.block_m == 128 and not self.one_tile)
        assert (self.block_m == 128 and max(self.dim, self.dim_v) <= 64) or self.block_m == 64, "dQ of a step is two panels at most"
        assert not (self.crowded and self.halves), "the second half overlaps the MMA of dP"

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return WARPGROUP * (1 + CONSUMERS + self.split)

    @property
    def registers(self) -> int:
        """Registers a thread of a warpgroup that has keys, of the 64 K of a multiprocessor."""
        return 200 if self.split else 240

    @property
    def dq_registers(self) -> int:
        """Registers a thread of the warpgroup of dQ."""
        return 88

    @property
    def text(self) -> str:
        dims = f"{self.dim}" if self.dim == self.dim_v else f"{self.dim}/{self.dim_v}"
        flags = "".join(f" {name}" for name in ("crowded", "halves", "apart", "down", "one_tile", "pair", "split") if getattr(self, name))
        return f"{self.block_m}x{BLOCK_N} dim {dims} stages {self.q_stages}{flags}" + (f" squeeze {self.squeeze}" if self.squeeze else "")


def is_wide(spec: Spec) -> bool:
    """Whether each gradient has a kernel of its own, because no kernel has registers for dK and dV."""
    if spec.head_dim <= MLA[0] and spec.head_dim_v <= MLA[1] and num_features(spec) == 0:
        return False
    return max(spec.head_dim, spec.head_dim_v) > 128


def _choose_with_tiles(spec: Spec, down: bool) -> BackwardSm90Config:
    """choose_backward for a bias in shared memory, which takes registers only while it is added. Two stages of Q, because it lies in the
    place of dS."""
    if max(spec.head_dim, spec.head_dim_v) <= 64:       # not crowded, 48 to 264 bytes would spill
        return BackwardSm90Config(dim=spec.head_dim, dim_v=spec.head_dim_v, block_m=128, q_stages=2, crowded=True, down=down)
    return BackwardSm90Config(dim=spec.head_dim, dim_v=spec.head_dim_v, block_m=64, q_stages=2, crowded=spec.mask, down=down)


def choose_backward(spec: Spec, seqlen_k: int = 1 << 30, tiles: int = 0, rows: int = 1 << 30) -> BackwardSm90Config:
    """The tiling for so many keys. tiles: of a head's keys, if their thread blocks can write dQ. rows: query rows of all heads of a
    group."""
    config = _choose_by_registers(spec, seqlen_k)
    if tiles == 1 and config.block_m == 128:            # a causal one spills 4 bytes with far rows apart
        return replace(config, one_tile=True, apart=False)
    if tiles == 2 and config.block_m == 128 and _is_plain(spec) and not spec.scaled:
        return replace(config, one_tile=True, pair=True, apart=False)
    if _is_plain(spec) and not (spec.packed or spec.scaled or spec.deterministic) and config.block_m == 128:
        if max(spec.head_dim, spec.head_dim_v) <= SPLIT_DIM or 128 < rows <= SPLIT_ROWS:
            return replace(config, split=True, halves=False, apart=True)
    return config


def _choose_by_registers(spec: Spec, seqlen_k: int) -> BackwardSm90Config:
    """S and dP take block_m / 2 registers a thread each, dQ up to 32, P block_m / 4, dK and dV half their head size each, of
    240."""
    dim, dim_v, down = spec.head_dim, spec.head_dim_v, spec.right and seqlen_k < FIRST_TO_LAST
    if dim > 128:
        return BackwardSm90Config(dim=dim, dim_v=dim_v, block_m=MLA[2], crowded=True, apart=True, down=down)
    if spec.bias_tiles:
        return _choose_with_tiles(spec, down)
    two, at_most_mask = num_features(spec) > 1, num_features(spec) == spec.mask
    spills = spec.dbias is not None or spec.softcap or (spec.mask and two)
    if max(dim, dim_v) <= 64 and not spills:
        plain = spec.deterministic and not (spec.left or spec.right or spec.packed)
        crowded = spec.scaled or spec.mask or plain         # 4 to 36 bytes spill in halves
        apart = at_most_mask and not crowded and not (spec.packed and (spec.left or spec.right))     # packed and causal: 8 bytes spill
        return BackwardSm90Config(dim=dim, dim_v=dim_v, block_m=128, crowded=crowded, halves=not crowded, apart=apart, down=down)
    # others spill: of calls with a bias the packed ones and those masked by position
    several = spec.packed or spec.left or spec.right
    crowded = max(dim, dim_v) > 64 and (two or spec.softcap or (spec.dropout and spec.packed) or (spec.bias is not None and several))
    packs = 1 if spec.softcap and spec.bias is not None else squeeze(spec)       # 8 bytes would spill
    return BackwardSm90Config(dim=dim, dim_v=dim_v, block_m=64, crowded=crowded, squeeze=packs, apart=at_most_mask and not crowded,
                              down=down)


# A group's query heads as separate tiles (launch.py). Estimates, in seconds and bytes a second.
STEP_FLOPS = 4.5e12         # of a multiprocessor in a step of the backward
PART_BANDWIDTH = 3e12       # parts are written and read, partly in L2
PART_OVERHEAD = 8e-6        # of the kernel that adds them up, half of it on the host
MOST_PART_BYTES = 256 << 20
WORTH = 0.85                # of the time without parts


def worth_parts(spec: Spec, config: BackwardSm90Config, heads_k: int, group: int, seqlen_q: int, seqlen_k: int, num_sms: int) -> bool:
    """Whether the backward of one sequence is faster if each query head of a group has its own tiles, whose dK and dV are added up later.

    The longest tile bounds a call whose tiles are few: that of the first keys, which all queries attend, of all heads of a group.
    """
    blocks, tiles = -(-seqlen_q // config.block_m), -(-seqlen_k // BLOCK_N)
    steps = heads_k * group * tiles * blocks * (0.5 + 0.5 / tiles if spec.right else 1.0)
    step = config.block_m * BLOCK_N * 10 * config.dim / STEP_FLOPS
    part_bytes = 2 * 4 * heads_k * group * seqlen_k * max(config.dim, config.dim_v)
    whole, apart = max(group * blocks, steps / num_sms) * step, max(blocks, steps / num_sms) * step
    return part_bytes <= MOST_PART_BYTES and apart + 2 * part_bytes / PART_BANDWIDTH + PART_OVERHEAD < WORTH * whole
