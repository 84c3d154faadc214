"""Who owns and who needs which rows of packed sequences, and the calls that compute it: made once for the same lengths."""
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..arrays.view import View
from ..memo import Recent
from ..problem import Mask
from .memory import Memory
from .spans import KEY_TILE, Sequences

Numbers = np.ndarray[Any, Any]


def ranges(starts: Numbers, stops: Numbers) -> Numbers:
    """The numbers of all ranges [start, stop), one range after the other."""
    lengths = np.maximum(stops - starts, 0)
    first = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) if len(lengths) else np.zeros(0, np.int64)
    return first + np.arange(lengths.sum())


class Call(NamedTuple):
    """One call of all sequences: where its rows and keys lie, and of each sequence the row and the key with which its part begins, and the
    key, counted from there, on which that row stands.
    """

    rows: slice
    keys: slice
    cu_q: Numbers
    cu_k: Numbers
    used: Numbers | None
    row: Numbers
    key: Numbers
    diagonal: Numbers
    longest: tuple[int, int]        # rows and keys of a sequence
    bottom_right: bool              # whether the diagonals are those that a call without them has


def call_of(rows: slice, keys: slice, cu_q: Numbers, cu_k: Numbers, used: Numbers | None, row: Numbers, key: Numbers,
            diagonal: Numbers) -> Call:
    n, m = np.diff(cu_q), np.diff(cu_k)
    own = (m if used is None else used) - n
    return Call(rows, keys, cu_q, cu_k, used, row, key, diagonal, (int(n.max(initial=0)), int(m.max(initial=0))),
                bool(((own == diagonal) | (n == 0)).all()))


class Side:
    """The rows of q, or of k and v, of every rank."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences, self.starts = sequences, np.asarray(sequences.starts, np.int64)
        self.lengths = np.diff(self.starts)
        chunks = [sequences.chunks(rank) for rank in range(sequences.size)]
        # (rank, chunk, sequence, start and stop)
        self.spans = np.asarray(chunks, np.int64).reshape(sequences.size, len(chunks[0]), sequences.number, 2)
        self.rows = [ranges((spans[..., 0] + self.starts[:-1]).ravel(), (spans[..., 1] + self.starts[:-1]).ravel()) for spans in self.spans]
        self.owner, self.place = np.empty(self.starts[-1], np.int32), np.empty(self.starts[-1], np.int64)
        for rank, rows in enumerate(self.rows):
            self.owner[rows], self.place[rows] = rank, np.arange(len(rows))

    def chunk_rows(self, rank: int, chunk: int) -> slice:
        """Where a chunk of all sequences lies among a rank's rows."""
        lengths = (self.spans[rank, :, :, 1] - self.spans[rank, :, :, 0]).sum(axis=1)
        first = int(lengths[:chunk].sum())
        return slice(first, first + int(lengths[chunk]))

    def chunks_of(self, rank: int) -> list[slice]:
        """Where a rank's chunks of all sequences lie among its rows."""
        return [self.chunk_rows(rank, chunk) for chunk in range(self.spans.shape[1])]

    def cumulative(self, rank: int, chunk: int) -> Numbers:
        spans = self.spans[rank, chunk]
        return np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])


class Plan:
    """What a rank computes, and what it gives to and takes from each other rank."""

    def __init__(self, q: Sequences, k: Sequences, mask: Mask, rank: int) -> None:
        self.q, self.k, self.rank, self.size = Side(q), Side(k), rank, q.size
        self.left, self.right = mask.left, mask.right
        self.shift = np.zeros(q.number, np.int64) if mask.top_left else self.k.lengths - self.q.lengths
        self._views: dict[Any, View] = {}
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), the first time that it is asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def needed(self, rank: int) -> tuple[Numbers, Numbers]:
        """(chunk, sequence) bounds [low, high) of the keys that a rank's rows attend; low is a multiple of KEY_TILE."""
        start, stop = self.q.spans[rank, ..., 0] + self.shift, self.q.spans[rank, ..., 1] + self.shift
        low = np.zeros_like(start) if self.left is None else np.clip(start - self.left, 0, self.k.lengths) // KEY_TILE * KEY_TILE
        high = np.broadcast_to(self.k.lengths, stop.shape) if self.right is None else np.clip(stop + self.right, 0, self.k.lengths)
        empty = (start >= stop) | (low >= high)
        return np.where(empty, 0, low), np.where(empty, 0, high)

    # ------------------------------------------------------------ gather
    def held(self, rank: int) -> tuple[Numbers, Numbers]:
        """Of each sequence the keys [low, high) that a rank holds: what all its chunks need."""
        low, high = self.needed(rank)
        first = np.where(high > 0, low, np.iinfo(np.int64).max).min(axis=0)
        last = high.max(axis=0)
        return np.where(last > 0, first, 0), last

    def held_count(self, rank: int) -> int:
        """How many keys a rank holds."""
        return int(self._once(("held", rank), lambda: int(np.subtract(*self.held(rank)[::-1]).sum())))

    def _held_rows(self, rank: int) -> Numbers:
        low, high = self.held(rank)
        return ranges(low + self.k.starts[:-1], high + self.k.starts[:-1])

    def given(self, to: int) -> Numbers:
        """Which of the rank's own keys another rank holds, in its order."""
        def make() -> Numbers:
            rows = self._held_rows(to)
            found: Numbers = self.k.place[rows[self.k.owner[rows] == self.rank]].astype(np.int32)
            return found
        return self._once(("given", to), make)  # type: ignore[no-any-return]

    def taken(self, source: int) -> Numbers:
        """Where another rank's keys are among those that this one holds."""
        def make() -> Numbers:
            return np.flatnonzero(self.k.owner[self._held_rows(self.rank)] == source).astype(np.int32)
        return self._once(("taken", source), make)  # type: ignore[no-any-return]

    def gathered(self) -> list[Call]:
        """A call for each chunk."""
        return self._once("gathered", self._gathered)  # type: ignore[no-any-return]

    def _gathered(self) -> list[Call]:
        (low, high), (first, last) = self.needed(self.rank), self.held(self.rank)
        keys, cu_k = slice(0, int((last - first).sum())), np.concatenate([[0], np.cumsum(last - first)])
        found = []
        for chunk in range(len(low)):
            start = self.q.spans[self.rank, chunk, :, 0]
            found.append(call_of(self.q.chunk_rows(self.rank, chunk), keys, self.q.cumulative(self.rank, chunk), cu_k,
                              np.where(high[chunk] > 0, high[chunk] - first, 0), start, first, start + self.shift - first))
        return found

    # ------------------------------------------------------------ ring
    def paired(self, owner: int) -> list[Call]:
        """The calls over the keys of one rank: one for each pair of chunks that has anything to compute."""
        return self._once(("paired", owner), lambda: self._paired(owner))  # type: ignore[no-any-return]

    def _paired(self, owner: int) -> list[Call]:
        found = []
        for i in range(self.q.spans.shape[1]):
            for j in range(self.k.spans.shape[1]):
                q, k = self.q.spans[self.rank, i], self.k.spans[owner, j]
                row, key = q[:, 0] + self.shift, k[:, 0]
                seen = (q[:, 0] < q[:, 1]) & (k[:, 0] < k[:, 1])
                if self.right is not None:
                    seen &= key <= q[:, 1] - 1 + self.shift + self.right
                if self.left is not None:
                    seen &= k[:, 1] - 1 >= row - self.left
                if seen.any():
                    found.append(call_of(self.q.chunk_rows(self.rank, i), self.k.chunk_rows(owner, j), self.q.cumulative(self.rank, i),
                                      self.k.cumulative(owner, j), None, q[:, 0], key, row - key))
        return found

    # ------------------------------------------------------------ numbers as operands
    def view(self, memory: Memory, name: Any, numbers: Numbers) -> View:
        """Row numbers or lengths where the call's arrays are, made once."""
        found = self._views.get((memory.device, name))
        if found is None:
            found = self._views[memory.device, name] = memory.numbers(numbers)
        return found


_cumulative: Recent[Any, View] = Recent()


def cumulative(memory: Memory, sequences: Sequences) -> View:
    """The cumulative lengths as an operand, made once."""
    key = memory.device, sequences.starts
    found = _cumulative.get(key)
    if found is None:
        found = _cumulative[key] = memory.numbers(np.asarray(sequences.starts))
    return found


@lru_cache(32)
def plan_of(q: Sequences, k: Sequences, mask: Mask, rank: int) -> Plan:
    return Plan(q, k, mask, rank)
