"""Probes of gpu/test_intrinsics.py: what a probe is, and what the files of probes share.

A probe is a kernel of one warp or a few, the instructions that must stand in its PTX, and a check that launches it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from numba import int32, int64, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import memory
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.tile import fragments as f

Array = np.ndarray[Any, Any]
C = 64                      # columns of the test fragments: 16 x C, COUNT registers a thread
COUNT = C // 2
BITS = C // 4               # of a word for one of the two rows
FIELDS = "src:l other:l dst:l map_a:l map_b:l map_c:l n:i"
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Probe:
    """`make()` gives the kernel; `check(launch)` runs it: launch(src, other, dst, n, maps) returns what the kernel made of dst."""

    covers: tuple[str, ...]
    text: tuple[str, ...]
    make: Callable[[], Any]
    check: Callable[[Callable[..., Array]], None]
    threads: int = 32
    shared: int = 0

    def source(self, name: str) -> compiler.Source:
        fields = tuple((field[:-2], field[-1]) for field in FIELDS.split())
        return compiler.Source(f"test {name}", lambda: (self.make(), self.shared), fields, self.threads)


PROBES: dict[str, Probe] = {}


def add(covers: str, text: str, make: Callable[[], Any], check: Callable[[Any], None], name: str = "", threads: int = 32,
        shared: int = 0) -> None:
    """`covers`: names, `text`: instructions separated by ';'."""
    words = tuple(covers.split())
    PROBES[name or words[0]] = Probe(words, tuple(t.strip() for t in text.split(";") if t.strip()), make, check, threads, shared)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(a: Array, b: Array) -> None:
    np.testing.assert_array_equal(a, b)


def inlined(function: Any) -> Any:
    """A lambda as something that kernels can call; intrinsics are that already."""
    return inline(function) if isinstance(function, FunctionType) else function


# ---------------------------------------------------------------- fragments: 16 x C, one warp; ROW and COL of the fragment's elements
gather, to_float = f.make_gather("float32"), f.make_unpack("float32", False)
LANE, REGISTER = np.arange(32)[None, :], np.arange(COUNT)[:, None]
ROW, COL = LANE // 4 + 8 * (REGISTER // 2 % 2), 2 * (LANE % 4) + 8 * (REGISTER // 4) + REGISTER % 2


def as_matrix(registers: Array) -> Array:
    """(registers, lanes) -> 16 x columns."""
    count = registers.shape[0]
    m = np.empty((16, 2 * count), registers.dtype)
    m[ROW[:count], COL[:count]] = registers
    return m


@inline
def load(pointer, lane):
    at = uint64(pointer + uint64(4 * (f.lane_row(lane) * C + f.thread_col(lane))))
    return to_float(gather(at, uint64(at + uint64(32 * C)), int64(4), int32(C), int32(C), COUNT))


@inline
def save(pointer, lane, acc):
    for k in range(COUNT):
        memory.store_f32(uint64(pointer + uint64(4 * (32 * k + lane))), acc[k])
