"""Ulysses: heads instead of rows. Inside a team of ranks each gets all of the team's rows for some heads, and sends results back.

Everything here is rows-first, (rows, batch, heads, ...), and all messages of one direction are one exchange.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arrays.view import View
from .gather import packed
from .memory import cut
from .messages import Message
from .run import Run
from .spans import Spans, parts, total, united


@dataclass(frozen=True, slots=True)
class Team:
    """Who shares rows and heads: ranks of the group, this one's place among them, and the key heads that each gets."""

    ranks: tuple[int, ...]
    me: int
    key_heads: tuple[slice, ...]

    def heads(self, n: int, of_key: int) -> slice:
        """Member n's heads of an array that has `of_key` heads for each key head."""
        return slice(self.key_heads[n].start * of_key, self.key_heads[n].stop * of_key)

    @property
    def others(self) -> list[int]:
        return [n for n in range(len(self.ranks)) if n != self.me]


def places(spans: Sequence[Spans]) -> list[list[slice]]:
    """For each member where its spans lie among all rows of the team, in the order of the sequence."""
    every = parts(united([span for member in spans for span in member]))

    def place(start: int, length: int) -> slice:
        home = next(part for part in every if part.span.start <= start <= part.span.stop - length)
        return slice(home.first + start - home.span.start, home.first + start - home.span.start + length)
    return [[place(span.start, span.length) if span.length else slice(0, 0) for span in member] for member in spans]


def to_heads(run: Run, team: Team, spans: Sequence[Spans], arrays: Sequence[tuple[View, int]]) -> list[View]:
    """For own rows of all heads: the team's rows of own heads. `arrays`: rows-first Views, with their heads for each key head; 0: an array
    without an axis of heads, of which everybody gets all.
    """
    memory, at, mine = run.memory, places(spans), parts(spans[team.me])
    rows = sum(total(member) for member in spans)

    def of(x: View, n: int, by: int) -> View:
        return x if by == 0 else cut(x, 2, team.heads(n, by))
    found = [memory.empty((rows, *of(x, team.me, by).shape[1:]), x.dtype) for x, by in arrays]
    give, take = list[Message](), list[Message]()
    for n in team.others:
        whole = [packed(run, of(x, n, by)) for x, by in arrays]
        give += [Message(cut(x, 0, part.rows), team.ranks[n]) for part in mine for x in whole]
        take += [Message(cut(to, 0, place), team.ranks[n]) for place in at[n] for to in found]
    pending = run.exchange(give, take)
    for part, place in zip(mine, at[team.me], strict=True):
        for to, (x, by) in zip(found, arrays, strict=True):
            memory.copy(cut(to, 0, place), cut(of(x, team.me, by), 0, part.rows))
    pending.wait()
    return found


def to_rows(run: Run, team: Team, spans: Sequence[Spans], arrays: Sequence[tuple[View, View, int]]) -> None:
    """The inverse: (the team's rows of own heads, own rows of all heads to write, heads for each key head), rows-first. 0: an array without
    an axis of heads, whose shares of all members are added.
    """
    memory, at, mine = run.memory, places(spans), parts(spans[team.me])
    give, take, kept = list[Message](), list[Message](), dict[int, list[View]]()
    ready = [packed(run, x) for x, _, _ in arrays]
    for n in team.others:
        kept[n] = [memory.empty(to.shape if by == 0 else cut(to, 2, team.heads(n, by)).shape, to.dtype) for _, to, by in arrays]
        give += [Message(cut(x, 0, place), team.ranks[n]) for place in at[n] for x in ready]
        take += [Message(cut(x, 0, part.rows), team.ranks[n]) for part in mine for x in kept[n]]
    pending = run.exchange(give, take)
    pending.wait()
    for index, (x, to, by) in enumerate(arrays):
        if by == 0:
            memory.zero(to)
        for n in range(len(team.ranks)):
            for part, place in zip(mine, at[team.me], strict=True):
                source = cut(x, 0, place) if n == team.me else cut(kept[n][index], 0, part.rows)
                if by == 0:
                    memory.add(cut(to, 0, part.rows), source)
                else:
                    memory.copy(cut(cut(to, 2, team.heads(n, by)), 0, part.rows), source)
