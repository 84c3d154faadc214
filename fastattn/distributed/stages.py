"""The stages of a dense call: without Ulysses one, of own rows; with it groups of heads, of which some travel while others are computed."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..arrays.convert import Caller
from ..arrays.view import View
from ..problem import Operands, Problem
from .heads import Given as Sent
from .heads import Result, Team, ToHeads, ToRows
from .memory import cut
from .plan import Method, teams
from .run import Given, Local, Run, canonical, rows_first, sum_over_ranks
from .saved import Saved
from .spans import Spans, evenly, total


class Prepared(NamedTuple):
    """A call that was checked: nothing was sent yet."""

    caller: Caller
    run: Run
    problem: Problem
    o: Operands
    rows: tuple[Spans, ...]         # of each rank
    keys: tuple[Spans, ...]
    method: Method
    pieces: int
    bias: View | None = None        # as the caller gave it
    bias_has_rows: bool = True      # or one for all
    need_dbias: bool = False
    return_saved: bool = False
    saved: Saved | None = None      # of the forward


class Stage:
    """The operands as the outer ranks see them: own rows of all heads, or after an exchange in a team its rows of own heads.

    Piece `piece` of so many of every member's key heads. The exchange starts when this is made.
    """

    def __init__(self, ready: Prepared, given: Given | None, piece: int, pieces: int) -> None:
        self.ready, u = ready, ready.method.ulysses
        run, problem, o = ready.run, ready.problem, ready.o
        rank = run.group.rank
        first, self.me = rank // u * u, rank % u
        members = evenly(problem.num_heads_k, u)
        heads = [slice(whole.start + part.start, whole.start + part.stop)
                 for whole in members for part in [evenly(whole.stop - whole.start, pieces)[piece]]]
        self.team = Team(tuple(range(first, first + u)), self.me, tuple(heads))
        self.rows, self.keys = ready.rows[first:first + u], ready.keys[first:first + u]
        self.own, self.given = self.team.key_heads[self.me], given
        self.exchange: ToHeads | None = None
        if u > 1:
            self.saved = None if ready.saved is None else ready.saved.arrays[piece]
            arrays = [] if self.saved else [Sent(rows_first(o.q), problem.group, self.rows),
                                            *[Sent(rows_first(x), 1, self.keys) for x in (o.k, o.v)]]
            if given is not None:
                arrays += [Sent(rows_first(x), problem.group, self.rows) for x in (given.dout, given.out, given.lse, given.dlse)
                           if x is not None]
            self.scores = [self._sent(x) for x in (o.bias, o.mask)]
            arrays += [x for x in self.scores if x is not None]
            self.exchange = ToHeads(run, self.team, arrays)

    def _sent(self, x: View | None) -> Sent | None:
        """bias or mask, if its rows travel. What broadcasts is sent once."""
        if x is None or (collapsed(x).shape[2] == 1 and x.shape[2] > 1):
            return None
        return Sent(score_rows_first(collapsed(x)), self.ready.problem.group if collapsed(x).shape[1] > 1 else 0, self.rows)

    def local(self) -> tuple[Local, Given | None]:
        """What is computed, once it has arrived."""
        ready, (run, problem, o) = self.ready, self.ready[1:4]
        u, size = ready.method.ulysses, run.group.size
        local = Local(problem, o, teams(ready.rows, u), teams(ready.keys, u), run.group.rank // u, tuple(range(self.me, size, u)),
                      problem.num_heads)
        if self.exchange is None:
            return local, self.given
        more = self.exchange.wait()
        q, k, v, *more = [*(self.saved or [canonical(x) for x in more[:3]]), *more[0 if self.saved else 3:]]
        found = None
        if self.given is not None:
            dout, out, lse, *more = more
            dlse = None if self.given.dlse is None else more.pop(0).permute((1, 2, 0))
            found = Given(canonical(dout), canonical(out), lse.permute((1, 2, 0)), dlse)
        heads = local.heads(self.own.start, self.own.stop)
        bias, mask = [None if x is None else self._score(x, None if sent is None else more.pop(0))
                      for x, sent in zip((o.bias, o.mask), self.scores, strict=True)]
        return replace(heads, o=replace(heads.o, q=q, k=k, v=v, bias=bias, mask=mask)), found

    def _score(self, x: View, arrived: View | None) -> View:
        """bias or mask of own heads for the rows of the team."""
        whole, rows = x.shape, total([span for spans in self.rows for span in spans])
        if arrived is not None:
            x = arrived.permute((1, 2, 0, 3))
        else:
            x = collapsed(x)
            x = cut(x, 1, self.query_heads) if x.shape[1] > 1 else x
        return x.broadcast_to((whole[0], self.query_heads.stop - self.query_heads.start, rows, whole[3]))

    def sent_back(self, arrays: list[tuple[View, View, int, bool]]) -> ToRows:
        """Start the exchange of results: (rows-first, where they are written, heads for each key head, whether the rows are those of k)."""
        return ToRows(self.ready.run, self.team, [Result(x, to, by, self.keys if of_keys else self.rows) for x, to, by, of_keys in arrays])

    def score_sums(self, local: Local) -> tuple[View | None, View | None]:
        """Cleared sums of dbias and dsinks over the calls of this rank: rows and heads of `local`, and 1 where bias broadcasts."""
        memory, p, dbias = self.ready.run.memory, local.problem, None
        if self.ready.need_dbias and self.ready.bias is not None:
            shape = four_axes(self.ready.bias.shape)
            rows = local.o.q.shape[1] if self.ready.bias_has_rows else 1
            dbias = memory.empty((shape[0], p.num_heads if shape[1] > 1 else 1, rows, shape[3]), p.compute_dtype)
            memory.zero(dbias)
        dsinks = memory.empty((p.num_heads,), p.compute_dtype) if p.score.sinks else None
        if dsinks is not None:
            memory.zero(dsinks)
        return dbias, dsinks

    @property
    def query_heads(self) -> slice:
        return self.team.heads(self.me, self.ready.problem.group)

    def dbias(self, bias: View, sums: View) -> View:
        """Own rows of all heads; 0 where other stages or ranks have them."""
        ready, (run, problem) = self.ready, self.ready[1:3]
        if ready.method.ulysses == 1:
            return sums
        shape = four_axes(bias.shape)
        whole, by = run.memory.empty(shape, sums.dtype), problem.group if shape[1] > 1 else 0
        run.memory.zero(whole)
        if ready.bias_has_rows:
            self.sent_back([(score_rows_first(sums), score_rows_first(whole), by, False)]).finish()
        else:
            run.memory.copy(cut(whole, 1, self.query_heads) if by else whole, sums)
        return whole

    def dsinks(self, sums: View) -> View:
        """All heads; 0 where other stages or ranks have them."""
        ready, (run, problem) = self.ready, self.ready[1:3]
        if ready.method.ulysses == 1:
            return sums
        whole = run.memory.empty((problem.num_heads,), sums.dtype)
        run.memory.zero(whole)
        run.memory.copy(cut(whole, 0, self.query_heads), sums)
        return whole


def stages_of(ready: Prepared, given: Given | None = None) -> list[Stage]:
    """The stages of a call, whose exchanges have started."""
    u = ready.method.ulysses
    pieces = 1 if u == 1 else min(ready.pieces, ready.problem.num_heads_k // u)
    return [Stage(ready, given, piece, pieces) for piece in range(pieces)]


def gradient_of_bias(ready: Prepared, bias: View, of_stages: list[View]) -> Any:
    """The gradient of bias, of the shape that the caller gave it."""
    run, (sums, *more) = ready.run, of_stages
    for x in more:
        run.memory.add(sums, x)
    if not ready.bias_has_rows:
        sum_over_ranks(run, sums)
    output = ready.caller.allocate(bias.shape, bias.dtype, bias)
    run.memory.copy(output.view.broadcast_to(sums.shape), sums)
    return output.finish()


def gradient_of_sinks(ready: Prepared, sinks: View, of_stages: list[View]) -> Any:
    """The gradient of sinks, of all ranks."""
    run, (sums, *more) = ready.run, of_stages
    for x in more:
        run.memory.add(sums, x)
    sum_over_ranks(run, sums)
    output = ready.caller.allocate(sums.shape, sinks.dtype, ready.o.q if isinstance(sinks.source, (list, tuple)) else sinks)
    run.memory.copy(output.view, sums)
    return output.finish()


def four_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (4 - len(shape)) + shape


def collapsed(x: View) -> View:
    """The View without what `broadcast_to` has repeated."""
    shape = tuple([1 if s == 0 else n for n, s in zip(x.shape, x.strides, strict=True)])
    return View(x.ptr, shape, x.strides, x.dtype, x.device, x.owner, x.readonly)


def score_rows_first(x: View) -> View:
    return x.permute((2, 0, 1, 3))
