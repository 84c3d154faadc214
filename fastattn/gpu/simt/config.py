"""Tilings of the kernels on plain threads: every number with its constraint."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import num_features
from ..spec import Spec


@dataclass(frozen=True, slots=True)
class SimtConfig:
    """One tiling of choose_forward: block_m query rows x block_n keys a step, copied in slices of `slice_dim` columns of head_dim;
    `loads` in flight per thread."""

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
    """Rows of a tile, so that O takes at most 64 registers a thread: with 128 the features of some problems spill."""
    rows = 64 if head_dim_v <= 256 else 32
    return rows // 2 if dtype == "float64" else rows


def choose_forward(spec: Spec) -> SimtConfig:
    """Shared memory stays under the 99 KB of consumer cards. Two blocks an SM, 128 registers a thread, where that compiles without spills:
    not with features' addresses, nor with a small head_dim, whose loops the compiler unrolls."""
    block_m = block_m_of(spec.dtype, spec.head_dim_v)
    features = spec.softcap or spec.alibi or spec.bias or spec.mask or spec.dropout
    if spec.dtype == "float64":
        return SimtConfig(block_m, 64, 64)
    return SimtConfig(block_m, 64, 128, blocks_per_sm=2 if spec.head_dim >= 64 and 64 <= spec.head_dim_v <= 128 and not features else 1)


def lines_of(spec: Spec) -> int:
    """Most lines of a tile of backward_simt and dbias. Of few columns the compiler makes straight code of the loops over them and keeps
    more at once: with features, and of 16-bit numbers, 64 lines would spill 4 to 136 bytes; with most features, of float64 with two, 32
    lines would spill 12."""
    small, wide = max(spec.head_dim, spec.head_dim_v) < 64, spec.dtype == "float64"
    if small and num_features(spec) > (1 if wide else 2):
        return 16
    return 32 if wide or (small and (num_features(spec) > 0 or spec.dtype != "float32")) else 64
