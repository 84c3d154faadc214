"""The tiling of the split-key kernel."""
from __future__ import annotations

from dataclasses import dataclass

from ..spec import Spec


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One tiling of choose_decode: each of `warps` goes through every warps-th piece of `keys` keys of a split. `overhead`: what a block
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


def choose_decode(spec: Spec) -> DecodeConfig:
    """Two steps of K and V take 128 registers a thread at head_dim 128, and so do two of twice the keys at 64."""
    return DecodeConfig(16 if max(spec.head_dim, spec.head_dim_v) > 64 else 32)
