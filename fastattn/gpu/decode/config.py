"""The tiling of the split-key kernel."""
from __future__ import annotations

from dataclasses import dataclass

from ..spec import Spec

ROWS = 16                   # query rows of a tile, of all heads that share a key head
FEW_KEYS = 256              # with fewer, a tile of the other forwards takes no longer
MOST_SPLITS = 128
WARP = 32                   # threads


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """A tiling of the split-key kernel.

    Parameters
    ----------
    keys, warps
        Each of `warps` handles every warps-th piece of `keys` keys of a split.
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread.
    overhead
        What a thread block costs besides its steps, in steps.
    """

    keys: int
    warps: int = 4
    blocks_per_sm: int = 2
    overhead: int = 4

    def __post_init__(self) -> None:
        assert self.keys % 16 == 0

    @property
    def text(self) -> str:
        return f"{self.keys} keys warps {self.warps} blocks {self.blocks_per_sm}"


def choose_decode(spec: Spec) -> DecodeConfig:
    """Two steps of K and V take 128 registers a thread at head_dim 128, and so do two of twice the keys at 64."""
    return DecodeConfig(keys=16 if max(spec.head_dim, spec.head_dim_v) > 64 else 32)
