"""The steps of "gather": in which order a rank's chunks of rows are computed, which keys must have arrived before each, and which shares of
dk and dv are complete after it. Pure arithmetic, made once for the same lengths.

Every rank computes its chunks in the same order of their numbers, so all ranks know what each sends at every step.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .reach import Piece, Reach, gathered, keys_needed
from .spans import Part, Span, Spans, parts


class Give(NamedTuple):
    """Rows of own memory that go to a participant."""

    to: int
    rows: slice


class Take(NamedTuple):
    """Rows that come from a participant, and where they belong in own memory."""

    source: int
    rows: slice


class Steps(NamedTuple):
    """What a participant holds, computes and exchanges. Lists have an entry for each step."""

    held: list[Part]                    # keys
    own: list[tuple[slice, slice]]      # (rows of own keys, the same among those held)
    pieces: list[list[Piece]]           # the call of the step's chunk; none if it has no rows
    give: list[list[Give]]              # own keys
    take: list[list[Take]]              # keys, to where they are held
    back: list[list[Give]]              # shares of keys that are held
    returned: list[list[Take]]          # shares of own keys


def without(spans: Spans, taken: Spans) -> Spans:
    """The parts of the spans that lie in none of `taken`."""
    for other in taken:
        cut = [(Span(span.start, min(span.stop, other.start)), Span(max(span.start, other.stop), span.stop)) for span in spans]
        spans = tuple([part for both in cut for part in both if part.length > 0])
    return spans


def overlaps(wanted: Spans, owned: list[Part], held: list[Part]) -> list[tuple[slice, slice]]:
    """(rows in the owner's memory, rows in the memory of who holds them) of each common span, in the order of messages."""
    found = []
    for want in wanted:
        home = next(part for part in held if part.span.start <= want.start and want.stop <= part.span.stop)
        for own in owned:
            span = own.span.cut(want)
            if span.length:
                found.append((slice(own.first + span.start - own.span.start, own.first + span.stop - own.span.start),
                              slice(home.first + span.start - home.span.start, home.first + span.stop - home.span.start)))
    return found


def new_at_each(needed: list[Spans], order: tuple[int, ...]) -> list[Spans]:
    """Of what the chunks need, in this order, what none before needed."""
    found, before = [], Spans()
    for chunk in order:
        found.append(without(needed[chunk], before))
        before += needed[chunk]
    return found


@lru_cache(256)
def steps_of(reach: Reach, rows: tuple[Spans, ...], keys: tuple[Spans, ...], me: int, order: tuple[int, ...]) -> Steps:
    """The Steps of participant `me`, of participants with these rows and keys."""
    held = [parts(keys_needed(reach, own)) for own in rows]
    owned = [parts(own) for own in keys]
    needed = [[keys_needed(reach, (span,)) for span in own] for own in rows]
    arrives = [new_at_each(of, order) for of in needed]
    leaves = [new_at_each(of, order[::-1])[::-1] for of in needed]
    others = [n for n in range(len(rows)) if n != me]
    steps = range(len(order))
    calls = {piece.rows.start: piece for piece in gathered(reach, parts(rows[me]), held[me])}
    of_chunk = [[calls[part.first]] if part.span.length else [] for part in parts(rows[me])]
    return Steps(
        held[me], overlaps(keys_needed(reach, rows[me]), owned[me], held[me]), [of_chunk[chunk] for chunk in order],
        [[Give(to, mine) for to in others for mine, _ in overlaps(arrives[to][n], owned[me], held[to])] for n in steps],
        [[Take(source, rows) for source in others for _, rows in overlaps(arrives[me][n], owned[source], held[me])] for n in steps],
        [[Give(to, rows) for to in others for _, rows in overlaps(leaves[me][n], owned[to], held[me])] for n in steps],
        [[Take(source, mine) for source in others for mine, _ in overlaps(leaves[source][n], owned[me], held[source])] for n in steps])
