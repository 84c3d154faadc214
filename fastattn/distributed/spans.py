"""Who owns which rows: pure arithmetic on lengths, without a group and without arrays.

A sequence is cut into equal chunks, two a rank for "zigzag", one for "contiguous". Of 2 P zigzag chunks rank r owns chunk r and chunk
2 P - 1 - r, so that a causal mask gives every rank the same work.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

SHARDS = ("zigzag", "contiguous")
PIECE = 16              # rows: dropout is addressed by pieces of 16 x 16
TILE = 128              # rows: no tile of a kernel is cut in two
KEY_TILE = 256          # keys: every engine's tile of keys divides it
LONG = 2 * TILE         # from this many rows a chunk the bounds are multiples of TILE: then a chunk is at most half a tile off


class Span(NamedTuple):
    """Rows or keys from `start` to `stop` of a sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def cut(self, other: Span) -> Span:
        """The part inside another span; of length 0 where there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


Spans = tuple[Span, ...]        # of one rank, in the order of its local rows


def bounds(seqlen: int, parts: int) -> list[int]:
    """parts + 1 bounds of equal parts, rounded to multiples of TILE, of PIECE where parts are short."""
    unit = TILE if seqlen >= LONG * parts else PIECE
    inside = [min((2 * n * seqlen + unit * parts) // (2 * unit * parts) * unit, seqlen) for n in range(parts)]
    return [*inside, seqlen]


def spans_of(seqlen: int, size: int, rank: int, shard: str) -> Spans:
    """The chunks of a rank, empty ones too."""
    parts = 2 * size if shard == "zigzag" else size
    b = bounds(seqlen, parts)
    own = (rank, parts - 1 - rank) if shard == "zigzag" else (rank,)
    return tuple([Span(b[n], b[n + 1]) for n in own])


def total(spans: Sequence[Span]) -> int:
    return sum(span.length for span in spans)


def evenly(count: int, parts: int) -> tuple[slice, ...]:
    """0 to count in parts of nearly equal size."""
    return tuple([slice(n * count // parts, (n + 1) * count // parts) for n in range(parts)])


def united(spans: Sequence[Span]) -> Spans:
    """The union in ascending order; spans that touch become one, empty ones vanish."""
    found: list[Span] = []
    for span in sorted(span for span in spans if span.length):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return tuple(found)


class Part(NamedTuple):
    """A span, and its first row in memory that has only some spans."""

    span: Span
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.span.length)


def parts(spans: Sequence[Span]) -> list[Part]:
    """Spans that lie one after the other in memory."""
    found, first = list[Part](), 0
    for span in spans:
        found.append(Part(span, first))
        first += span.length
    return found


class Sequences(NamedTuple):
    """Packed sequences over ranks: every sequence is cut by itself, and sequence n is dealt out from rank n on.

    Local rows are the first chunks of all sequences, then the second chunks, each in the order of the sequences.
    """

    starts: tuple[int, ...]             # cumulative lengths
    size: int
    shard: str

    @property
    def number(self) -> int:
        return len(self.starts) - 1

    def length(self, n: int) -> int:
        return self.starts[n + 1] - self.starts[n]

    def chunks(self, rank: int) -> list[list[Span]]:
        """For each of a rank's chunks, one or two, the span of every sequence."""
        return _chunks(self, rank)

    def spans(self, rank: int) -> Spans:
        """The rank's rows as rows of the packed array, in the order of its local rows."""
        return _packed_spans(self, rank)


@lru_cache(64)
def _chunks(s: Sequences, rank: int) -> list[list[Span]]:
    of = [spans_of(s.length(n), s.size, (rank + n) % s.size, s.shard) for n in range(s.number)]
    return [[spans[half] for spans in of] for half in range(2 if s.shard == "zigzag" else 1)]


@lru_cache(64)
def _packed_spans(s: Sequences, rank: int) -> Spans:
    return tuple([Span(start + span.start, start + span.stop) for chunk in _chunks(s, rank)
                  for start, span in zip(s.starts, chunk, strict=False)])
