"""Tile sizes per architecture and problem: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from .spec import Spec

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}      # KiB a block may ask for


@dataclass(frozen=True, slots=True)
class Config:
    """One tiling of forward_sm90: block_m query rows (64 per consumer warpgroup), block_n keys, `stages` of K and V in flight.

    `alias`: the output leaves through Q's shared memory, which leaves room for wider key blocks but delays the next tile's Q.
    `lazy`: the output is rescaled only when a row's maximum grew by more than 2**8; until then its exponentials may exceed 1.
    """

    block_m: int
    block_n: int
    stages: int = 2
    alias: bool = False
    lazy: bool = False

    def __post_init__(self) -> None:
        assert self.block_m in (64, 128, 192) and self.block_n % 16 == 0 and 16 <= self.block_n <= 256

    @property
    def consumer_registers(self) -> int:
        return {64: 240, 128: 232, 192: 160}[self.block_m]

    @property
    def producer_registers(self) -> int:
        """24 are too few for a producer that also looks for tiles."""
        return {64: 40, 128: 40, 192: 32}[self.block_m]

    @property
    def text(self) -> str:
        return f"{self.block_m}x{self.block_n} stages {self.stages}" + " alias" * self.alias + " lazy" * self.lazy


def forward_sm90(spec: Spec) -> Config:
    dim = max(spec.head_dim, spec.head_dim_v)
    if dim <= 64:
        return Config(192, 128)
    if dim <= 128:
        return Config(128, 128)
    if dim <= 192:
        return Config(128, 96, alias=True)
    return Config(128, 80, alias=True)
