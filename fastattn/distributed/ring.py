"""The method "ring": keys and values of one other rank at a time, straight from their owner, and partial results that are merged.

At step s rank r computes with the keys of rank (r - s) mod P, while those of the next step are under way. What is sent never changes and
waits for nobody's arithmetic. In the backward the shares of dk and dv go straight back to the owner, who adds them in the order of steps.
A rank holds the keys of AHEAD + 1 ranks at most.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ..arrays.view import View
from ..problem import Grads, Mask, Operands, Problem
from .gather import grads_of_heads, head_pieces, packed
from .memory import cut
from .messages import Message, Pending
from .reach import Piece, Reach, begun, paired
from .run import Given, Local, Run, buffer, canonical, in_float32, rows_first
from .shares import add_keys, add_scores, piece_grads
from .spans import Span, Spans, parts, total

AHEAD = 2           # steps: a transfer that becomes ready beside a kernel which has all SMs begins when that kernel ends


@lru_cache(1024)
def wanted(reach: Reach, rows: Spans, keys: Spans) -> tuple[Span, ...]:
    """Of each span of keys the part that some of the rows attend."""
    found = []
    for span in keys:
        seen = [some for q in rows if (some := begun(reach.keys(q)).cut(span)).length]
        found.append(Span(min(s.start for s in seen), max(s.stop for s in seen)) if seen else Span(span.start, span.start))
    return tuple(found)


@lru_cache(1024)
def calls(reach: Reach, rows: Spans, keys: Spans, exact: bool) -> list[Piece]:
    """The calls of own rows over spans of keys that lie one after the other."""
    return paired(reach, parts(rows), parts(keys), exact)


class Ring:
    """The exchanges of one call."""

    def __init__(self, run: Run, local: Local) -> None:
        self.run, self.local, self.size, self.reach = run, local, len(local.ranks), local.reach
        self.own = [rows_first(x) for x in (local.o.k, local.o.v)]
        self.give = [packed(run, x) for x in self.own] if self.size > 1 else self.own
        self.started, self.under_way = 0, dict[int, tuple[list[View], Pending]]()

    def at(self, step: int) -> int:
        """The participant whose keys are used at a step."""
        return (self.local.me - step) % self.size

    def by(self, step: int) -> int:
        """The participant who uses own keys at a step."""
        return (self.local.me + step) % self.size

    def spans(self, user: int, owner: int) -> Spans:
        """The keys of `owner` that `user` computes with."""
        if user == owner:
            return self.local.keys[owner]
        return wanted(self.reach, self.local.rows[user], self.local.keys[owner])

    def mine(self, user: int) -> list[slice]:
        """Where the keys that `user` computes with are among own ones."""
        at = parts(self.local.keys[self.local.me])
        return [slice(own.first + span.start - own.span.start, own.first + span.stop - own.span.start)
                for own, span in zip(at, self.spans(user, self.local.me), strict=True)]

    def start(self, step: int) -> tuple[list[View], Pending]:
        """Start the exchange of keys for a step: rows-first buffers of the other's keys and values."""
        owner, user, ranks = self.at(step), self.by(step), self.local.ranks
        rows = total(self.spans(self.local.me, owner))
        buffers = [buffer(self.run.memory, x, rows, x.dtype) for x in self.own]
        give = [Message(cut(x, 0, rows), ranks[user]) for rows in self.mine(user) for x in self.give]
        take = [Message(cut(x, 0, part.rows), ranks[owner]) for part in parts(self.spans(self.local.me, owner)) for x in buffers]
        return buffers, self.run.exchange(give, take)

    def begin(self) -> None:
        """Start the first exchange before anything is computed."""
        self._start_until(1)

    def _start_until(self, last: int) -> None:
        for step in range(self.started + 1, min(last, self.size - 1) + 1):
            self.under_way[step] = self.start(step)
            self.started = step

    def steps(self, own_last: bool = False) -> Iterator[tuple[int, View, View]]:
        """(step, canonical k and v), own keys first or last. Exchanges start AHEAD steps before their keys are used."""
        for step in (*range(1, self.size), 0) if own_last else range(self.size):
            if step or not own_last:
                self._start_until(step + AHEAD)
            held = self.own
            if step:
                held, pending = self.under_way.pop(step)
                pending.wait()
            k, v = held
            yield step, canonical(k), canonical(v)

    def give_back(self, step: int, sums: list[View]) -> tuple[list[slice], list[View], Pending]:
        """Send shares of dk and dv to the owner of a step's keys. (Places among own keys, buffers of what arrives, the exchange.)"""
        owner, user, ranks = self.at(step), self.by(step), self.local.ranks
        places = self.mine(user)
        rows = sum(place.stop - place.start for place in places)
        arrived = [buffer(self.run.memory, x, rows, self.local.wide) for x in self.own]
        give = [Message(x, ranks[owner]) for x in sums]
        return places, arrived, self.run.exchange(give, [Message(x, ranks[user]) for x in arrived])

    def pieces(self, step: int) -> list[Piece]:
        owner = self.at(step)
        return calls(self.reach, self.local.rows[self.local.me], self.spans(self.local.me, owner), self.local.exact)


def bare(run: Run, local: Local, keys: int) -> tuple[Problem, Operands]:
    """The call of all own rows over so many keys that are 0, whatever the mask. Over none out is 0, and lse the sinks or -inf. Over one its
    backward gives dsinks, which depends on lse, out and dout alone.
    """
    p, o = local.problem, local.o
    k, v = [run.memory.empty((x.shape[0], keys, *x.shape[2:]), x.dtype) for x in (o.k, o.v)]
    for x in (k, v):
        run.memory.zero(x)
    score = replace(p.score, alibi=False, bias=None, mask=False)
    problem = replace(p, seqlen_q=o.q.shape[1], seqlen_k=keys, mask=Mask(), dropout=None, score=score)
    return problem, replace(o, k=k, v=v, alibi_slopes=None, bias=None, mask=None)


def without_sinks(local: Local) -> Local:
    """Sinks are counted once, by `bare`."""
    if not local.problem.score.sinks:
        return local
    return replace(local, problem=replace(local.problem, score=replace(local.problem.score, sinks=False)), o=replace(local.o, sinks=None))


def forward(run: Run, local: Local, out: View, lse: View) -> None:
    """Write out and lse of own rows, canonical. The sum so far is float32 (float64)."""
    memory, ring = run.memory, Ring(run, local)
    sums = out if out.dtype == local.wide else memory.empty(out.shape, local.wide)
    first = ring.pieces(0)
    begun = len(first) == 1 and first[0].rows == slice(0, local.o.q.shape[1])       # it writes the sum, and has the sinks
    if not begun:
        problem, o = bare(run, local, 0)
        run.forward(in_float32(problem), o, sums, lse)
    for step, k, v in ring.steps():
        for piece in ring.pieces(step):
            problem, o = (local if begun and step == 0 else without_sinks(local)).piece(piece, k, v)
            if begun and step == 0:
                run.forward(in_float32(problem), o, sums, lse)
                continue
            rows, rows_lse = cut(sums, 1, piece.rows), cut(lse, 2, piece.rows)
            part, part_lse = memory.empty(rows.shape, sums.dtype), memory.empty(rows_lse.shape, lse.dtype)
            run.forward(in_float32(problem), o, part, part_lse)
            memory.merge(rows, rows_lse, part, part_lse)
    if sums is not out:
        memory.copy(out, sums)


def backward(run: Run, local: Local, given: Given, grads: Grads[View], pieces: int = 1) -> None:
    """Write dq, dk, dv of own rows. dbias and dsinks, if wanted, are sums that the caller cleared: shares of this rank are added.

    Every call gets the out and lse of all keys, so that its gradients are its exact shares. Of several pieces, groups of heads, the last
    one uses own keys last: then the shares of all other keys travel while something is computed.
    """
    if grads.dsinks is not None:
        add_dsinks(run, *bare(run, local, 1), given, grads.dsinks)
    started = [(q, k, part, Ring(run, part)) for q, k, part in head_pieces(without_sinks(local), pieces)]
    for *_, ring in started:
        ring.begin()
    computed = [Backward(run, part, ring, given.heads(q), grads_of_heads(grads, q, k), 1 < n + 1 == len(started))
                for n, (q, k, part, ring) in enumerate(started)]
    for piece in computed:
        piece.finish()


class Backward:
    """The gradients of some heads: computed when it is made, but for what other ranks still send."""

    def __init__(self, run: Run, local: Local, ring: Ring, given: Given, grads: Grads[View], own_last: bool) -> None:
        self.run, self.grads, memory = run, grads, run.memory
        self.returning = list[tuple[list[slice], list[View], Pending]]()
        self.dq, self.own = memory.empty(grads.dq.shape, local.wide), [memory.empty(x.shape, local.wide) for x in ring.own]
        first, rows, keys = ring.pieces(1 if own_last and ring.size > 1 else 0), self.dq.shape[1], self.own[0].shape[0]
        dq_begun = len(first) == 1 and first[0].rows == slice(0, rows)      # the first call writes the sum, others are added
        own_pieces = ring.pieces(0)
        own_direct = len(own_pieces) == 1 and own_pieces[0].keys == slice(0, keys) and (not own_last or ring.size == 2)
        for x in ((() if dq_begun else (self.dq,)) + (() if own_direct else tuple(self.own))):
            memory.zero(x)
        for n, (step, k, v) in enumerate(ring.steps(own_last)):
            found, sums, direct = ring.pieces(step), self.own, own_direct
            if step:
                sums = [memory.empty(rows_first(x).shape, local.wide) for x in (k, v)]
                direct = len(found) == 1 and found[0].keys == slice(0, k.shape[1])
                for x in sums if not direct else []:
                    memory.zero(x)
            for piece in found:
                begins = n == 0 and dq_begun
                shares = piece_grads(run, local, piece, k, v, given, grads, self.dq if begins else None, sums if direct else None)
                if not begins:
                    memory.add(cut(self.dq, 1, piece.rows), shares.dq)
                if not direct:
                    add_keys(run, shares, piece.keys, sums)
                add_scores(run, shares, piece, grads)
            if step:
                self.returning.append(ring.give_back(step, sums))
            if len(self.returning) > 1:
                self._add_returned()

    def _add_returned(self) -> None:
        """Add the shares of dk and dv that another rank has computed."""
        places, arrived, pending = self.returning.pop(0)
        pending.wait()
        for to, x in zip(self.own, arrived, strict=True):
            first = 0
            for rows in places:
                length = rows.stop - rows.start
                self.run.memory.add(cut(to, 0, rows), cut(x, 0, slice(first, first + length)))
                first += length

    def finish(self) -> None:
        while self.returning:
            self._add_returned()
        self.run.memory.copy(self.grads.dq, self.dq)
        for to, x in zip((self.grads.dk, self.grads.dv), self.own, strict=True):
            self.run.memory.copy(rows_first(to), x)


def add_dsinks(run: Run, problem: Problem, o: Operands, given: Given, dsinks: View) -> None:
    memory, problem = run.memory, in_float32(problem)
    dq, dk, dv = [memory.empty(x.shape, problem.out_dtype) for x in (o.q, o.k, o.v)]
    found = memory.empty(dsinks.shape, dsinks.dtype if o.sinks is None else o.sinks.dtype)
    run.backward(problem, o, given, Grads(dq, dk, dv, None, found))
    memory.add(dsinks, found)
