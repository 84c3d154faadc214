"""Tilings of the kernels on plain threads: every number with its constraint."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..config import num_features
from ..spec import Spec

WIDE = 16                   # threads that share a line of a tile: half a warp
BLOCK_N = 64                # keys of a step


# ---------------------------------------------------------------- forward
@dataclass(frozen=True, slots=True, kw_only=True)
class SimtConfig:
    """A tiling of the forward.

    Parameters
    ----------
    block_m, block_n
        Query rows of a tile and keys of a step.
    slice_dim
        Columns of head_dim that are copied to shared memory at a time.
    threads
        Of a thread block.
    loads
        Loads in flight per thread.
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread.
    """

    block_m: int
    block_n: int
    slice_dim: int
    threads: int = 256
    loads: int = 8
    blocks_per_sm: int = 1

    @property
    def text(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.slice_dim} threads {self.threads} loads {self.loads} blocks {self.blocks_per_sm}"


def block_m_of(dtype: str, head_dim_v: int) -> int:
    """Query rows of a tile, so that O takes at most 64 registers a thread: with 128 the features of some problems
    spill."""
    rows = 64 if head_dim_v <= 256 else 32
    return rows // 2 if dtype == "float64" else rows


def choose_forward(spec: Spec) -> SimtConfig:
    """Shared memory stays under the 99 KB of consumer cards.

    Two blocks a multiprocessor leave 128 registers a thread. They are chosen where that compiles without spills: not
    with the addresses of features, nor with a small head_dim, whose loops the compiler unrolls.
    """
    block_m = block_m_of(spec.dtype, spec.head_dim_v)
    features = spec.softcap or spec.alibi or spec.bias or spec.mask or spec.dropout
    if spec.dtype == "float64":
        return SimtConfig(block_m=block_m, block_n=BLOCK_N, slice_dim=64)
    two = spec.head_dim >= 64 and 64 <= spec.head_dim_v <= 128 and not features
    return SimtConfig(block_m=block_m, block_n=BLOCK_N, slice_dim=128, blocks_per_sm=2 if two else 1)


# ---------------------------------------------------------------- backward
@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of `lines` x `columns` scores. Operands are copied in slices of `slice_dim` columns of head_dim, with
    `loads` loads in flight per thread."""

    lines: int
    columns: int
    slice_dim: int
    threads: int = 256
    loads: int = 8

    @property
    def text(self) -> str:
        return f"{self.lines}x{self.columns}x{self.slice_dim} threads {self.threads} loads {self.loads}"

    @property
    def high(self) -> int:
        return self.threads // WIDE

    @property
    def rows(self) -> int:
        """Lines of a thread."""
        return self.lines // self.high

    @property
    def cols(self) -> int:
        """Columns of a thread."""
        return self.columns // WIDE

    @property
    def pitch_p(self) -> int:
        """Elements from line to line of a tile of probabilities in shared memory."""
        return self.columns + 16

    def slices(self, dim: int) -> tuple[int, int]:
        """(number of slices that `dim` columns of head_dim make, width of each)."""
        count = -(-dim // self.slice_dim)
        return count, -(-dim // count // 16) * 16

    def keys(self, dim: int, vector: int) -> int:
        """Rows of a slice that has all `dim` columns."""
        return min(self.columns, max(vector, 1 << (self.columns * self.slice_dim // dim).bit_length() - 1))

    def slice_elements(self, dim: int, vector: int) -> int:
        """Elements in shared memory of a slice with all `dim` columns, rounded up to what the copying threads write."""
        return -(-self.keys(dim, vector) * dim // self.threads) * self.threads


def lines_of(spec: Spec) -> int:
    """Most lines of a tile of the backward and of dbias.

    With a small head_dim the compiler unrolls the loops over its columns and keeps more values live: with features, or
    16-bit operands, 64 lines would spill 4 to 136 bytes. With most features, or float64 and two (packed: one), 32 lines
    would spill 12, and with 16-bit operands alone 8.
    """
    small, wide = max(spec.head_dim, spec.head_dim_v) < 64, spec.dtype == "float64"
    many = 2 if not wide else 0 if spec.packed else 1
    if small and (num_features(spec) > many or (num_features(spec) == 0 and spec.dtype in ("float16", "bfloat16"))):
        return 16
    return 32 if wide or (small and num_features(spec) > 0) else 64


def _tile(spec: Spec, lines: int) -> Tile:
    return Tile(lines, BLOCK_N, 64 if spec.dtype == "float64" else 128)


def _tile_of_sums(spec: Spec, columns: int) -> Tile:
    """A tile whose lines own `columns` columns of gradients, with as many lines as keep these at 64 registers a thread.

    float64: 32 numbers, of twice the size, where possible, because with twice as many the features of some problems
    spill. Shared memory stays under 99 KB.
    """
    most = (4096 if spec.dtype == "float64" else 16384) // columns
    tile = _tile(spec, max(16, min(lines_of(spec), 1 << most.bit_length() - 1 if most else 0)))
    # 16 lines of more columns than that are over 64 registers a thread: with two features of a packed call 8 bytes would spill
    large = 16 * columns > 12288 and spec.packed and num_features(spec) > 1
    # loops over few columns are unrolled: with more than 16 lines, two features (of a packed call one) or float64 would spill 4 to 52 bytes
    small = max(spec.head_dim, spec.head_dim_v) < 64 and tile.lines > 16
    crowded = small and (spec.dtype == "float64" or num_features(spec) + spec.packed > 1)
    return replace(tile, loads=4) if large or crowded else tile


@lru_cache(maxsize=1024)
def tile_dq(spec: Spec) -> Tile:
    """The tile of dq: lines are query rows."""
    return _tile_of_sums(spec, spec.head_dim)


@lru_cache(maxsize=1024)
def tile_dkdv(spec: Spec) -> Tile:
    """The tile of dk and dv: lines are keys."""
    return _tile_of_sums(spec, spec.head_dim + spec.head_dim_v)


def parts_dkdv(spec: Spec) -> tuple[tuple[bool, bool], ...]:
    """(dk, dv) of each launch of dkdv: both at once, but one after the other for the largest float64 heads, whose sums
    would spill."""
    both = spec.dtype != "float64" or spec.head_dim + spec.head_dim_v <= 512
    return ((True, True),) if both else ((True, False), (False, True))


def tile_dbias(spec: Spec) -> Tile:
    """The tile of dbias: three tiles of numbers in registers, 48 a thread, float64 24 of twice the size."""
    spills = spec.packed and spec.softcap       # 4 to 136 bytes at 64 lines
    return _tile(spec, min(lines_of(spec), 32 if spills else 64))


def tile_captured(spec: Spec) -> Tile:
    """The tile of gradients of captured arrays. With more than 8 pairs a thread their loop is not unrolled, and S and dP go to memory."""
    return _tile(spec, min(lines_of(spec), 32))
