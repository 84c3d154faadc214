"""Ulysses: heads instead of rows. Inside a team of ranks each gets all of the team's rows for some heads, and sends results back.

Everything here is rows-first, (rows, batch, heads, ...), and all messages of one direction are one exchange.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..arrays.view import View
from .gather import packed
from .memory import cut, rows_together
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


@lru_cache(256)
def places(spans: tuple[Spans, ...]) -> list[list[slice]]:
    """For each member where its spans lie among all rows of the team, in the order of the sequence."""
    every = parts(united([span for member in spans for span in member]))

    def place(start: int, length: int) -> slice:
        home = next(part for part in every if part.span.start <= start <= part.span.stop - length)
        return slice(home.first + start - home.span.start, home.first + start - home.span.start + length)
    return [[place(span.start, span.length) if span.length else slice(0, 0) for span in member] for member in spans]


class Given(NamedTuple):
    """A rows-first View of own rows and all heads, which has `by` heads for each key head, and the rows of every member. 0: it has no axis
    of heads, and everybody gets all.
    """

    x: View
    by: int
    spans: tuple[Spans, ...]

    def heads(self, team: Team, n: int) -> View:
        """What member n gets."""
        return self.x if self.by == 0 else cut(self.x, 2, team.heads(n, self.by))


class ToHeads:
    """For own rows of all heads: the team's rows of own heads. One exchange, which starts when this is made."""

    def __init__(self, run: Run, team: Team, arrays: Sequence[Given]) -> None:
        self._memory, self._team, self._arrays = run.memory, team, arrays
        give, take, self._found = list[Message](), list[Message](), list[View]()
        for x in arrays:
            rows = sum(total(member) for member in x.spans)
            self._found.append(run.memory.empty((rows, *x.heads(team, team.me).shape[1:]), x.x.dtype))
        for n in team.others:
            for x, to in zip(arrays, self._found, strict=True):
                whole = packed(run, x.heads(team, n))
                give += [Message(cut(whole, 0, part.rows), team.ranks[n]) for part in parts(x.spans[team.me])]
                take += [Message(cut(to, 0, place), team.ranks[n]) for place in places(x.spans)[n]]
        self._pending = run.exchange(give, take)

    def wait(self) -> list[View]:
        """What is here already is copied now, behind all exchanges that have started."""
        team = self._team
        for x, to in zip(self._arrays, self._found, strict=True):
            own = [(place, part.rows) for part, place in zip(parts(x.spans[team.me]), places(x.spans)[team.me], strict=True)]
            for pair in rows_together(to, x.heads(team, team.me), own):
                self._memory.copy(*pair)
        self._pending.wait()
        return self._found


class Result(NamedTuple):
    """The team's rows of own heads, own rows of all heads to write, both rows-first, heads for each key head, and the rows of every member.
    0: without an axis of heads; the shares of all members are added.
    """

    x: View
    to: View
    by: int
    spans: tuple[Spans, ...]

    def heads(self, team: Team, n: int) -> View:
        """Where the heads of member n are written."""
        return self.to if self.by == 0 else cut(self.to, 2, team.heads(n, self.by))


class ToRows:
    """The inverse of ToHeads. One exchange, which starts when this is made; `finish` writes the results."""

    def __init__(self, run: Run, team: Team, arrays: Sequence[Result]) -> None:
        self._run, self._team, self._arrays = run, team, arrays
        give, take, self._kept = list[Message](), list[Message](), dict[int, list[View]]()
        ready = [packed(run, x.x) for x in arrays]
        for n in team.others:
            self._kept[n] = [run.memory.empty(x.heads(team, n).shape, x.to.dtype) for x in arrays]
            for x, whole, arrived in zip(arrays, ready, self._kept[n], strict=True):
                give += [Message(cut(whole, 0, place), team.ranks[n]) for place in places(x.spans)[n]]
                take += [Message(cut(arrived, 0, part.rows), team.ranks[n]) for part in parts(x.spans[team.me])]
        self._pending = run.exchange(give, take)

    def finish(self) -> None:
        memory, team = self._run.memory, self._team
        for x in self._arrays:
            if x.by == 0:
                memory.zero(x.to)
        for n in [team.me, *team.others]:       # what is here already is written while the rest arrives
            if n != team.me:
                self._pending.wait()
            for index, x in enumerate(self._arrays):
                source = x.x if n == team.me else self._kept[n][index]
                own = [(part.rows, place if n == team.me else part.rows)
                       for part, place in zip(parts(x.spans[team.me]), places(x.spans)[team.me], strict=True)]
                for pair in rows_together(x.heads(team, n), source, own):
                    (memory.add if x.by == 0 else memory.copy)(*pair)
