"""The tiling of the split-key kernel, and which calls it runs."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ...problem import Problem
from ..config import num_features
from ..spec import Spec

ROWS = 16                   # query rows of a tile, of all heads that share a key head: those of an MMA
COLUMNS = 8                 # of a tile whose queries are columns of an MMA
# Of a block. An SM reads 10 16-bit elements of K and V a clock from memory (20 bytes: 4.4 TB/s over 132 SMs at 1.7 GHz), of which each
# takes 16 multiplications for every 16 rows; mma.sync does some 600 a clock. So 64 rows should keep up. Measured, 16 x 8192 keys of 8
# heads of 128: 16 rows 127 us; 32 rows 170 in two warps, for which too few bytes are in flight, and 140 in one; 64 rows 234
# (docs/log-gpu.md)
MOST_ROWS = 64
# Of a request over caches: a tile of the other kernels has 64 rows and more of one query head, of which three quarters would be padding.
# The blocks of this one have rows of all heads that share a key head: those of 128 heads over one latent cache fill two. To be measured
FEW_QUERIES = 16
FEW_KEYS = 256              # with fewer, a tile of the other forwards takes no longer
MOST_SPLITS = 128
# Where lengths are on the device, and some may be long: 4 MB of K and V at head_dim 128, 250 us of one thread block's share of the memory.
# Predicted, to be measured
MOST_SPLIT_KEYS = 8192
# With more than that in the cache and several requests their splits are planned on the device (plan.py): a launch of 2 to 3 us more, which
# is predicted, too. The plan's block has PLANNED_REQUESTS words of shared memory for their lengths
PLAN_THREADS, PLANNED_REQUESTS, PLAN_ENTRY = 1024, 2048, 16             # threads, requests, bytes of an entry
TILE = 8                    # bits of a split's number in an entry, above them are those of its block of rows
CANDIDATES, WAVES = 32, 2   # splits that fill a CANDIDATES-th of WAVES waves and more are compared
MOST_DIM = 256              # with more, registers do not hold O
# Of calls over caches, whose values may then be computed a slice of columns at a time: 576 columns of K of 8 keys take 72 registers, and O
# of SLICE columns 64. Each slice computes all scores
MOST_CACHED_DIM, SLICE = 576, 128
WARP = 32                   # threads
STAGES = 3                  # of a ring
HOPPER = 90                 # the architecture
CLUSTER, CLUSTER_STEPS = 8, 4           # blocks of a cluster: what every device with clusters takes; steps of a block
BLOCKS, FEW_COLUMNS = 3, 64             # thread blocks of a multiprocessor with few registers, and the head size that was measured
PAIRS = 5                   # thread blocks of a multiprocessor where two have the keys of a key head
RESERVED = 1024             # bytes of shared memory of each thread block that the system takes
CHUNKS_BYTES = 512          # of a warp's chunks of 16 bytes
PIECE = 32                  # bytes of four columns of a split's result, the row's maximum and its sum, as clusters send them
ROW_BYTES = 32              # of what the scores of a row need, in shared memory
NATIVE = 89                 # architectures from here on have an instruction that widens 8-bit numbers
LEAST_WIDTH = 16            # columns of a block of mask words (rows/mask_words.py); otherwise the keys of a step
MASK_COLUMNS = 32           # splits begin at multiples of it, so that a step has whole blocks of any config, or half a block
# 16-bit Q stays in registers up to this head size, beside 64 registers of K and V and 64 of O. Parts of float32 take three times as many.
# Beside 8-bit K and V up to half of it: the numbers that they are widened to take registers, too
MOST_Q_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """A tiling of the split-key kernel.

    Parameters
    ----------
    keys, warps
        A warp handles `keys` keys at a time.
    row_warps
        So many warps have the same keys and different rows; the others have other keys of the split.
    row_tiles
        A warp has so many times 16 rows: each an A operand and an accumulator of its own, for which K and V are loaded once.
    exact
        head_dim and head_dim_v are the Spec's, without padding.
    keep_q
        Q is in shared memory, not in registers.
    stages
        Slots a warp of the ring in shared memory that warps with the same keys have for K and V. 0: K and V go to registers.
    whole_pages
        The keys of a step are in one page: the size of pages is a multiple of `keys`, and splits begin at multiples. With stages alone.
    one_page
        A request's keys are all in the first page that its table names.
    columns
        Queries, 8 at most, are columns of MMAs whose rows are keys, or columns of the values (ptx/direct_columns.py).
    cluster
        So many splits are a thread-block cluster, which merges them (cluster.py). 1: they are merged through global memory (combine.py).
    early
        The kernel is launched before the kernel in front of it has ended (programmatic dependent launch), and waits for it.
    native
        An instruction widens 8-bit numbers: since sm_89. A property of the device.
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread.
    overhead
        What a thread block costs besides its steps, in steps.
    """

    keys: int
    warps: int = 4
    row_warps: int = 1
    row_tiles: int = 1
    exact: bool = True
    keep_q: bool = False
    blocks_per_sm: int = 2
    overhead: int = 4
    native: bool = False
    stages: int = 0
    whole_pages: bool = False
    cluster: int = 1
    early: bool = False
    columns: bool = False
    one_page: bool = False

    def __post_init__(self) -> None:
        assert self.keys == 8 or self.keys % 16 == 0
        assert self.warps % self.row_warps == 0
        assert self.stages == 0 or self.row_warps > 1
        assert self.row_tiles == 1 or (self.row_tiles == 2 and self.keep_q)
        assert not self.columns or (self.keys % 16 == 0 and self.row_warps == self.row_tiles == 1)

    @property
    def key_warps(self) -> int:
        """Warps of a block with different keys."""
        return self.warps // self.row_warps

    @property
    def step(self) -> int:
        """Keys of a step of a block."""
        return self.keys * self.key_warps

    @property
    def warp_rows(self) -> int:
        """Query rows of a warp."""
        return COLUMNS if self.columns else ROWS * self.row_tiles

    @property
    def fragment_keys(self) -> int:
        """Keys of the columns of a fragment of S of `warp_rows` rows, and so of its registers."""
        return self.keys // 2 if self.columns else self.keys

    @property
    def rows(self) -> int:
        """Query rows of a block."""
        return self.warp_rows * self.row_warps

    @property
    def text(self) -> str:
        flags = [name for name in ("exact", "keep_q", "native", "whole_pages", "early", "columns", "one_page") if getattr(self, name)]
        flags += ["row tiles 2"] * (self.row_tiles == 2)
        return " ".join([f"{self.keys} keys warps {self.warps} rows {self.rows} blocks {self.blocks_per_sm} stages {self.stages} "
                         f"cluster {self.cluster} overhead {self.overhead}", *flags])


class Chunks(NamedTuple):
    """How a row of K and V is divided among lanes.

    Parameters
    ----------
    size
        Elements in 16 bytes.
    k, v
        Chunks of a lane.
    whole_k, whole_v
        Those of them that every head size has which the Spec stands for.
    """

    size: int
    k: int
    v: int
    whole_k: int
    whole_v: int


def chunks_of(spec: Spec, config: DecodeConfig) -> Chunks:
    size = 16 if spec.cache_dtype is not None else 4 if spec.dtype == "float32" else 8
    least, least_v = (n if config.exact else n - 16 + size for n in (spec.head_dim, spec.head_dim_v))
    return Chunks(size, -(-spec.head_dim // (4 * size)), -(-spec.head_dim_v // (8 * size)), least // (4 * size), least_v // (8 * size))


def ring_bytes(spec: Spec, config: DecodeConfig) -> tuple[int, int]:
    """(bytes of K of a step of a warp in shared memory, of K and V)."""
    chunks = chunks_of(spec, config)
    of_k = CHUNKS_BYTES * chunks.k * config.keys // 8
    return of_k, of_k + CHUNKS_BYTES * chunks.v * config.keys // 4


def q_words(spec: Spec, config: DecodeConfig) -> int:
    """Words of a lane's chunk of Q in shared memory, of the rows of a tile."""
    return 4 if spec.cache_dtype is not None else 3 if spec.dtype == "float32" else 1 if config.columns else 2


def shared_bytes(spec: Spec, config: DecodeConfig) -> int:
    """Bytes of shared memory of a thread block: those of forward.py, which has the layout, and up to 512 more."""
    chunks, ring, rows = chunks_of(spec, config), config.stages * ring_bytes(spec, config)[1], config.rows
    out = config.warp_rows * (32 * chunks.size * chunks.v + 16)
    q = -(-rows // ROWS) * CHUNKS_BYTES * chunks.k * q_words(spec, config)
    received = rows * spec.head_dim_v // 4 * PIECE if config.cluster > 1 else 0
    return (config.warps * max(out, ring) + 8 * config.key_warps * rows + received
            + (512 * config.warps * config.row_tiles if config.row_tiles > 1 else 0)
            + (q + rows * (4 + ROW_BYTES) if config.keep_q else 0) + 128)


def choose_decode(spec: Spec, p: Problem) -> DecodeConfig:
    """The tiling for the rows of the problem, all in one block."""
    return _of_rows(spec, p, p.seqlen_q * p.group)


def choose_cached(spec: Spec, p: Problem, num_splits: int | None) -> DecodeConfig:
    """The tiling of a call over caches, whose rows may be in several blocks.

    Packed requests have as many rows as they have on average. With num_splits=1 it does not depend on how many rows there are, so that a
    request has the same bits whatever it is batched with.
    """
    rows = p.seqlen_q if not p.packed else min(-(-(p.total_q or 0) // max(p.batch, 1)), p.seqlen_q)
    return _of_rows(spec, p, min(max((1 if num_splits == 1 else rows) * p.group, 1), MOST_ROWS))


def most_units(batch: int, rows: int | None, total_q: int, group: int, block_rows: int) -> int:
    """How many blocks of rows (units.py) a call over caches has at most, of one key head. rows: of each request, None: packed."""
    if rows is not None:
        return batch * -(-rows // block_rows)
    return total_q * group // block_rows + batch + 1


def _of_rows(spec: Spec, p: Problem, rows: int) -> DecodeConfig:
    """A step of K and V takes 16 to 64 registers a thread each, so that 48 to 64 KB are on their way to a multiprocessor.

    4.4 TB/s times 0.7 us, what a load takes, are 23 KB a multiprocessor. More keys, at head_dim 128 and beyond, would spill.
    """
    dim, row_warps = max(spec.head_dim, spec.head_dim_v), -(-rows // ROWS)
    wide, eight = spec.dtype == "float32", spec.cache_dtype is not None
    bytes_of_row = dim * (1 if eight else 4 if wide else 2)
    # 16 keys spill on sm_120; 32 where a block's rows have scales of their own requests, whose keys come from L2
    if eight and ((dim > MOST_Q_DIM and num_features(spec) > 1) or (dim > MOST_Q_DIM // 2 and spec.shared == "prefix")):
        bytes_of_row *= 2
    keys = 8 if bytes_of_row > 256 else 16 if bytes_of_row > 128 else 32
    exact = (p.head_dim, p.head_dim_v) == (spec.head_dim, spec.head_dim_v)
    keep_q = wide or dim > (MOST_Q_DIM // 2 if eight else MOST_Q_DIM)
    return DecodeConfig(keys=keys, row_warps=1 << (row_warps - 1).bit_length(), exact=exact, keep_q=keep_q)


def with_tiles(spec: Spec, config: DecodeConfig) -> DecodeConfig:
    """The tiling with two tiles of 16 rows a warp in place of two warps with the same keys, where registers hold both accumulators.

    Measured, 16 x 8192 keys of 8 heads of 128, with four and eight warps: 169 us before, 146 and 140; 8-bit keys 132 before, 123 and 115.
    64 rows in two such warps 494 us, where four that share a ring take 238. Not measured with keys that requests share.
    """
    dim, eight = max(spec.head_dim, spec.head_dim_v), spec.cache_dtype is not None
    fits = config.rows == 2 * ROWS and dim <= MOST_Q_DIM and spec.dtype != "float32"
    if not fits or spec.bias is not None or spec.mask or spec.traced or spec.shared:
        return config
    keys = min(config.keys, 16) if eight else config.keys
    return replace(config, row_tiles=2, row_warps=1, keep_q=True, keys=keys)


def with_ring(spec: Spec, config: DecodeConfig, shared_memory: int) -> DecodeConfig:
    """The tiling with a ring, where it is faster and two thread blocks have room for it. shared_memory: bytes that a block may use.

    Measured, 16 x 8192 keys of 8 heads of 128, registers and ring: 64 rows 292 and 234 us, 32 rows 170 and 177, 16 rows 127 and 172: copies
    to shared memory come at 3 TB/s, loads at 4.2 as long as warps load different keys.
    """
    found = replace(config, stages=STAGES)
    room = (shared_memory + RESERVED) // config.blocks_per_sm - RESERVED
    fast = config.rows == MOST_ROWS and spec.dtype != "float32" and spec.cache_dtype is None
    return found if fast and shared_bytes(spec, found) <= room else config


def with_long_steps(config: DecodeConfig, spec: Spec, page_size: int) -> DecodeConfig:
    """The tiling for keys that requests share, with steps of twice as many keys where a ring has them: the rows of many requests are bound
    by products and not by bytes, and a step's maxima and rescaling cost more than it waits.

    Measured, both kernels, 4 query heads a key head: 16 and 64 requests over 8k keys 39.8 and 98.6 us in place of 43.7 and 104.8, 64 over
    32k 270 for 289, 256 over 8k 291 for 311 (docs/log-gpu.md).
    """
    longer = spec.shared == "prefix" and config.stages == STAGES and config.keys == 16 and page_size % 32 == 0
    return replace(config, keys=32, stages=1) if longer else config


def with_cluster(config: DecodeConfig, key_heads: int, keys: int, num_sms: int) -> DecodeConfig:
    """The tiling with the splits of a key head as a cluster, where CLUSTER of them are CLUSTER_STEPS steps at most and all blocks run at
    once.

    Measured, one request of 8 heads of 128, through global memory, and a cluster of 16 and of 8 (with a ring, which takes 0.9 us more): 1k
    keys 10.0, 7.1 and 6.8 us; 8k keys 16.5, 16.9 and 20.2.
    """
    steps = -(-keys // (CLUSTER * config.keys * config.key_warps))
    fits = steps <= CLUSTER_STEPS and CLUSTER * key_heads <= config.blocks_per_sm * num_sms
    return replace(config, cluster=CLUSTER, overhead=1, early=True) if fits else config


def with_blocks(spec: Spec, config: DecodeConfig, key_heads: int, num_sms: int) -> DecodeConfig:
    """The tiling with three thread blocks a multiprocessor, where all key heads run at once with them and not with two.

    Measured, 320 key heads of 1500 keys and head_dim 64: 38 us, two blocks 45, one of eight warps 44; four blocks 40.
    """
    dim, plain = max(spec.head_dim, spec.head_dim_v), not (num_features(spec) or spec.traced or spec.dtype == "float32" or spec.cache_dtype)
    fits = plain and dim == FEW_COLUMNS and config.rows == ROWS and config.blocks_per_sm * num_sms < key_heads <= BLOCKS * num_sms
    return replace(config, blocks_per_sm=BLOCKS, keys=16, keep_q=True, early=True) if fits else config


def with_columns(spec: Spec, p: Problem, config: DecodeConfig, planned: bool) -> DecodeConfig:
    """The tiling with the queries of a key head as columns, where they are COLUMNS at most. planned: a block has keys of any request.

    O takes half the registers, so that they hold 16 keys of head_dim 256, or 32 of 128. Measured, H200, before and after: 16 x 8192 keys of
    8 heads of 256 263 and 247 us, in pages of 64 263 and 253; 1 x 1024 of 128 6.1 and 5.7, 1 x 8192 14.8 and 14.5, 16 x 1024 19.8 and 19.6,
    65536 keys beside 255 x 512 213 and 198 in steps of 32 keys, 200 in three blocks of 16. Two blocks of four warps where keys are not
    planned take 128 us and not 123 (16 x 8192).
    """
    dim, features = max(spec.head_dim, spec.head_dim_v), num_features(spec)
    few = p.seqlen_q * p.group <= COLUMNS and config.rows == ROWS
    plain = not (spec.dtype == "float32" or spec.cache_dtype or spec.shared or spec.traced or spec.mask or spec.bias)
    if not few or not plain or (dim > MOST_Q_DIM and features):
        return config
    longer = planned and not features and MOST_Q_DIM // 2 < dim <= MOST_Q_DIM
    return replace(config, columns=True, keys=32 if longer else max(config.keys, 16))


def with_pairs(config: DecodeConfig, key_heads: int, num_sms: int) -> DecodeConfig:
    """The tiling of with_blocks with the halves of a key head's keys in a pair of blocks, where five of them a multiprocessor are
    nearly all in use. With one block for each key head some multiprocessors have three and others two.

    Measured, 320 key heads of 1500 keys and head_dim 64: 31.7 us, one block each 34.3; pairs of four warps 32.3, of two 35.6.
    """
    fits = config.columns and config.blocks_per_sm == BLOCKS and (PAIRS - 1) * num_sms < 2 * key_heads <= PAIRS * num_sms
    return replace(config, blocks_per_sm=PAIRS, warps=3, cluster=2, overhead=1, keep_q=False) if fits else config


def few_rows(p: Problem, num_sms: int) -> bool:
    """Whether the queries of a key head are few enough for this kernel.

    More than 16 rows are read again by tiled kernels for every query head of a group, or their tiles do not fill the device. Otherwise
    those read K and V once, too, and multiply faster.
    """
    rows = p.seqlen_q * p.group
    return rows <= ROWS or (rows <= MOST_ROWS and (p.group > 1 or p.batch * p.num_heads < num_sms))


def plan_entries(units: int, heads_k: int, slots: int) -> int:
    """Entries of a plan at most: splits that fill WAVES waves, and one more of each of `units` blocks of rows."""
    return -(-WAVES * slots // heads_k) + units + 1


def page_division(size: int) -> tuple[int, int]:
    """(magic, shift) with row // size == row * magic >> shift for 0 <= row < 2**31 (Granlund and Montgomery 1994)."""
    extra = (size - 1).bit_length()
    return -(-(1 << 31 + extra) // size), 31 + extra
