"""Tilings of the Hopper forward of float32 operands that splits Q in registers."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import num_features
from ..spec import Spec
from .config import SHARED_MEMORY, panel_columns, slice_dim

CONSUMERS = 2               # warpgroups
PART_BYTES = 2              # of a part of an element
PARTS = 3
WARPGROUP = 128             # threads
MOST_SPLIT = 128            # head_dim to which the producer splits K and V: wider heads leave it no registers
SHORT_KEYS = 128            # keys of a dense call whose tiles are `short`
LEAST_KEYS = 512            # of a split of the keys: fewer take as long as what merges them
MOST_SPLITS = 128           # of the keys
MERGE_THREADS = 128
MOST_SHARED_ROWS = 256      # head_dim_v from which both warpgroups share rows: one has registers for so many columns of O


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFloatConfig:
    """A tiling.

    Parameters
    ----------
    block_n
        Keys of a step.
    stages
        Panels of K and V, 64 columns of all parts each, in flight.
    slices
        1: each warpgroup has 64 query rows. 2: both have the same 64 rows. Each sums half of the products of a score, and has half of
        the output's columns.
    split
        The producer's warpgroup reads K and V as float32 and splits them. Otherwise one thread of it loads their parts by TMA, which a
        pass before has written: consumers then have 240 registers instead of 208.
    keep_q
        The parts of Q stay in registers instead of being made in every step: of one panel.
    consumers
        Consumer warpgroups. With one, two thread blocks on a multiprocessor hide each other's waits.
    partial
        The keys are some of the call's: what is stored is O before its division, maxima and sums of rows, for merge_float.py.
    """

    block_n: int
    stages: int
    slices: int
    split: bool = False
    keep_q: bool = False
    consumers: int = CONSUMERS
    partial: bool = False

    def __post_init__(self) -> None:
        assert self.block_n % 16 == 0 and self.slices in (1, CONSUMERS) and not (self.split and self.slices > 1)
        assert self.stages in (2, 4), "a panel's stage is its number modulo a power of two"

    @property
    def block_m(self) -> int:
        """Query rows of a tile."""
        return 64 * self.consumers // self.slices

    @property
    def producer_registers(self) -> int:
        return {1: 80, 2: 88}[self.consumers] if self.split else 24

    @property
    def consumer_registers(self) -> int:
        return {1: 176, 2: 208}[self.consumers] if self.split else 240

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} stages {self.stages} slices {self.slices}" + " split" * self.split + " keep_q" * self.keep_q
                + " one consumer" * (self.consumers == 1) + " partial" * self.partial)


def room_for_panels(head_dim: int, block_n: int, slices: int) -> int:
    """Panels of K and V that fit beside Q, and beside both halves of the scores where warpgroups share rows."""
    rows, shared = 64 * CONSUMERS // slices, slices * WARPGROUP * 4 * block_n // 2 if slices > 1 else 0
    return (SHARED_MEMORY - 4 * rows * panel_columns(head_dim) - shared) // (PARTS * PART_BYTES * 64 * block_n)


def choose_forward(spec: Spec, whole: bool = True, short: bool = False) -> ForwardFloatConfig:
    """The widest key blocks of which four panels fit, so that the loads of two or three are in flight.

    whole: rows of k and v are aligned pieces of 16 bytes, as the producer reads them. short: a tile has two blocks of keys at most. Its
    time is latency, which two thread blocks hide: padded BERT 67 us instead of 70. At 512 keys it would be 681 instead of 599.
    """
    dim, features = max(spec.head_dim, spec.head_dim_v), num_features(spec)
    if dim <= MOST_SPLIT and whole:
        if short:       # a mask and dropout: 12 bytes would spill at 64 keys
            return ForwardFloatConfig(block_n=64 if features < 2 else 48, stages=2, slices=1, split=True, consumers=1)
        room = spec.head_dim > 32 or spec.head_dim_v <= 96          # half a panel of Q beside all of O: 4 bytes would spill
        return ForwardFloatConfig(block_n=64, stages=4, slices=1, split=True, keep_q=spec.head_dim <= 64 and not features and room)
    slices = 1 if dim <= MOST_SHARED_ROWS else CONSUMERS
    # up to head_dim_v 256 a warpgroup's columns of O take 128 registers: with 64 keys 184 bytes would spill, with 48 and a feature 12
    crowded = slices == 1 and spec.head_dim_v > 192
    # and over head_dim_v 512 160 registers: with 48 keys 28 bytes would spill
    widest = (64, 48, 32)[min(features + crowded + 2 * (spec.head_dim_v > 512), 2)]
    for block_n in (64, 48, 32):
        if block_n <= widest and room_for_panels(spec.head_dim, block_n, slices) >= 4:
            return ForwardFloatConfig(block_n=block_n, stages=4, slices=slices)
    return ForwardFloatConfig(block_n=32, stages=2, slices=slices)


def columns_of(spec: Spec, config: ForwardFloatConfig) -> int:
    """Columns of the output of a warpgroup: of a slice whole panels."""
    return slice_dim(spec.head_dim_v, config.slices)
