"""Which keys rows attend, across ranks: what has to be sent, and the calls that compute it."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..problem import Mask
from .spans import KEY_TILE, PIECE, Part, Span, Spans, united


class Reach(NamedTuple):
    """The structural mask in rows and keys of the whole sequences: row g stands on key g + shift."""

    left: int | None
    right: int | None
    shift: int
    seqlen_q: int
    seqlen_k: int

    @classmethod
    def of(cls, mask: Mask, seqlen_q: int, seqlen_k: int) -> Reach:
        return cls(mask.left, mask.right, mask.diagonal(0, seqlen_q, seqlen_k), seqlen_q, seqlen_k)

    @property
    def limited(self) -> bool:
        return self.left is not None or self.right is not None

    def keys(self, rows: Span) -> Span:
        """The keys that some of the rows attend."""
        if not rows.length:
            return Span(0, 0)
        lo = 0 if self.left is None else rows.start + self.shift - self.left
        hi = self.seqlen_k if self.right is None else rows.stop + self.shift + self.right
        return Span(lo, max(lo, hi)).cut(Span(0, self.seqlen_k))

    def rows(self, keys: Span) -> Span:
        """The rows that attend some of the keys."""
        if not keys.length:
            return Span(0, 0)
        lo = 0 if self.right is None else keys.start - self.shift - self.right
        hi = self.seqlen_q if self.left is None else keys.stop - self.shift + self.left
        return Span(lo, max(lo, hi)).cut(Span(0, self.seqlen_q))

    def whole(self, rows: Span, keys: Span) -> bool:
        """Whether every one of the rows attends every one of the keys."""
        left = self.left is None or rows.stop - 1 + self.shift - self.left <= keys.start
        return left and (self.right is None or rows.start + self.shift + self.right >= keys.stop - 1)

    def diagonal(self, rows: Span, keys: Span) -> int:
        """The key, counted from keys.start, on which the first of the rows stands."""
        return rows.start + self.shift - keys.start


class Piece(NamedTuple):
    """One call: rows, which are a part of the rank's, and keys, which are a part of a buffer's. Slices say where they lie there.

    `spans` are the rows and keys of the sequence. None: they are several chunks, one after the other, and either all rows attend all keys,
    or the diagonal, bottom-right, is right for all.
    """

    rows: slice
    keys: slice
    spans: tuple[Span, Span] | None
    masked: bool


def keys_needed(reach: Reach, rows: Spans) -> Spans:
    """The keys that a rank's rows attend: ascending spans that begin at tiles, because a kernel's tiles then are those of one rank."""
    needed = [reach.keys(span) for span in rows]
    return united([Span(span.start // KEY_TILE * KEY_TILE, span.stop) for span in needed if span.length])


def gathered(reach: Reach, rows: Sequence[Part], held: Sequence[Part]) -> list[Piece]:
    """The calls of the rank's rows over the keys that it holds, one for each chunk of rows; chunks that attend nothing have no keys."""
    found = []
    for part in rows:
        if not part.span.length:
            continue
        needed = reach.keys(part.span)
        if not needed.length:
            found.append(Piece(part.rows, slice(0, 0), (part.span, Span(0, 0)), False))
            continue
        home = next(h for h in held if h.span.start <= needed.start and needed.stop <= h.span.stop)
        keys = Span(max(needed.start // KEY_TILE * KEY_TILE, home.span.start), needed.stop)
        first = home.first + keys.start - home.span.start
        found.append(Piece(part.rows, slice(first, first + keys.length), (part.span, keys), reach.limited))
    return found


def begun(span: Span) -> Span:
    """The span from where a piece of the dropout's mask begins."""
    return Span(span.start // PIECE * PIECE, span.stop)


def paired(reach: Reach, rows: Sequence[Part], keys: Sequence[Part], exact: bool) -> list[Piece]:
    """The calls of the rank's rows over one other rank's keys, as few as possible. `exact`: each call must know its place, for ALiBi and
    dropout, so that chunks that are not neighbours in the sequence are not taken together.
    """
    found = list[Piece]()
    for q in rows:
        for k in keys:
            seen = begun(reach.keys(q.span)).cut(k.span)
            rows_seen = begun(reach.rows(seen)).cut(q.span)
            if not seen.length or not rows_seen.length:
                continue
            at = slice(q.first + rows_seen.start - q.span.start, q.first + rows_seen.stop - q.span.start)
            to = slice(k.first + seen.start - k.span.start, k.first + seen.stop - k.span.start)
            found.append(Piece(at, to, (rows_seen, seen), not reach.whole(rows_seen, seen)))
    return found if exact else _joined(reach, found)


def _is_square(reach: Reach, piece: Piece) -> bool:
    """Whether it is causal, and its diagonal goes from corner to corner."""
    if piece.spans is None or reach.left is not None or reach.right != 0:
        return False
    rows, keys = piece.spans
    return reach.diagonal(rows, keys) == 0 and rows.length == keys.length


def _joined(reach: Reach, pieces: list[Piece]) -> list[Piece]:
    """Calls without a mask become one where they have the same rows and neighbouring keys, or the same keys and neighbouring rows. A causal
    square and what is whole below it become one as well.
    """
    if len(pieces) == 3 and all(_is_square(reach, piece) for piece in (pieces[0], pieces[2])):
        a, b, c = pieces
        if a.rows.stop == b.rows.start and b.rows == c.rows and a.keys == b.keys and b.keys.stop == c.keys.start and not b.masked:
            return [Piece(slice(a.rows.start, c.rows.stop), slice(a.keys.start, c.keys.stop), None, True)]
    found = list[Piece]()
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and not last.masked and not piece.masked:
            if last.rows == piece.rows and last.keys.stop == piece.keys.start:
                found[-1] = Piece(last.rows, slice(last.keys.start, piece.keys.stop), None, False)
                continue
            if last.keys == piece.keys and last.rows.stop == piece.rows.start:
                found[-1] = Piece(slice(last.rows.start, piece.rows.stop), last.keys, None, False)
                continue
        found.append(piece)
    return found
