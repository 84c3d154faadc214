"""What a call does: the method, who takes part in it, and why."""
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from ..arrays.view import Device
from ..options import Check
from ..problem import Problem
from .reach import Reach, keys_needed
from .spans import TILE, Spans, spans_of, total, united

GATHER_BYTES = 16 << 30     # of keys, values and their gradients that "auto" lets a rank hold
PIECE_TILES = 256           # 128 rows of a head each, that half of the heads of a chunk must have: about two for each processor of a device
METHODS = "'auto', 'gather', 'ring', 'ulysses' or a pair (ulysses, ring)"


class Method(NamedTuple):
    """`ulysses` ranks exchange heads; `outer` teams of such ranks exchange keys, by "gather" or in a "ring"."""

    ulysses: int
    outer: int
    keys: str
    why: str

    def __str__(self) -> str:
        if self.ulysses == 1:
            return self.keys
        return "ulysses" if self.outer == 1 else f"ulysses {self.ulysses} x ring {self.outer}"


@lru_cache(256)
def rows_of(seqlen: int, size: int, shard: str) -> tuple[Spans, ...]:
    return tuple([spans_of(seqlen, size, rank, shard) for rank in range(size)])


@lru_cache(256)
def teams(spans: tuple[Spans, ...], ulysses: int) -> tuple[Spans, ...]:
    """The rows of each team of neighbouring ranks, in the order of the sequence."""
    if ulysses == 1 and len(spans) > 1:
        return spans
    return tuple([united([span for rank in spans[first:first + ulysses] for span in rank]) for first in range(0, len(spans), ulysses)])


def choose(check: Check, method: Any, size: int, problem: Problem, shard: str, backward: bool) -> Method:
    """The Method that the argument names. ValueError where the ranks or heads do not fit it."""
    if method == "auto":
        return _auto(size, problem, shard, backward)
    if method in ("gather", "ring"):
        return Method(1, size, method, f"method={method!r}")
    pair = (size, 1) if method == "ulysses" else method
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
        raise check.value("method", f"is {method!r}", METHODS)
    if pair[0] * pair[1] != size:
        raise check.value("method", f"is {method!r}", f"a pair whose product is the number of ranks, {size}")
    if pair[0] > problem.num_heads_k:
        raise check.value("method", f"is {method!r}", f"at most one rank for each of num_heads_k = {problem.num_heads_k} to exchange heads",
                          "method='gather' takes any number of heads")
    return Method(pair[0], pair[1], "ring" if pair[1] > 1 else "gather", f"method={method!r}")


def pieces_of(given: int | None, size: int, problem: Problem, shard: str, device: Device) -> int:
    """How many groups of heads: what the caller says, else two on a device where each has enough to do. Then the transfers of one are
    under way while the other is computed. A window has little to send.
    """
    if given is not None:
        return min(given, problem.num_heads_k)
    chunks = size * (2 if shard == "zigzag" else 1)
    tiles = problem.batch * problem.num_heads * problem.seqlen_q // (2 * TILE * chunks)
    sends = size > 1 and device[0] == "cuda" and problem.mask.left is None
    return 2 if sends and problem.num_heads_k > 1 and tiles >= PIECE_TILES else 1


def held_bytes(problem: Problem, size: int, shard: str, backward: bool) -> int:
    """Bytes of keys and values, and of the float32 sums of their gradients, that "gather" holds in the rank with the most."""
    reach, rows = Reach.of(problem.mask, problem.seqlen_q, problem.seqlen_k), rows_of(problem.seqlen_q, size, shard)
    keys = max(total(keys_needed(reach, spans)) for spans in rows)
    item = 8 if problem.dtype == "float64" else 4 if problem.dtype == "float32" else 2
    elements = problem.batch * keys * problem.num_heads_k * (problem.head_dim + problem.head_dim_v)
    return elements * (item + (max(item, 4) if backward else 0))


def _auto(size: int, problem: Problem, shard: str, backward: bool) -> Method:
    held = held_bytes(problem, size, shard, backward)
    room = f"{held / 2**30:.2f} GiB of keys and values in a rank, limit {GATHER_BYTES / 2**30:g} GiB"
    if held <= GATHER_BYTES:
        return Method(1, size, "gather", f"auto: whole calls, {room}")
    return Method(1, size, "ring", f"auto: the keys of one rank at a time, because \"gather\" holds {room}")
