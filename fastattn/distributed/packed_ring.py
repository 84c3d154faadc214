"""The method "ring" for packed sequences: the keys of one other rank at a time, all of its rows, and partial results that are merged."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..arrays.view import View
from ..problem import Grads, Mask, Operands, Problem
from .gather import packed
from .memory import cut, is_contiguous
from .messages import Message, Pending
from .packed_calls import Packed, dense, forward_into, grads_of
from .ring import AHEAD
from .run import Given, in_float32


class Ring:
    """The exchanges of one call. Whether a rank has anything to compute with another's keys, both know."""

    def __init__(self, local: Packed) -> None:
        self.local, self.own = local, [local.o.k, local.o.v]
        self.give = [packed(local.run, x) for x in self.own]
        self.size, self.rank = local.plan.size, local.plan.rank

    def start(self, step: int) -> tuple[list[View], Pending]:
        memory, owner, user = self.local.run.memory, (self.rank - step) % self.size, (self.rank + step) % self.size
        buffers = [memory.empty((len(self.local.plan.k.rows[owner]), *x.shape[1:]), x.dtype) for x in self.own]
        return buffers, self.local.run.exchange([Message(x, user) for x in self.give], [Message(x, owner) for x in buffers])

    def steps(self) -> Iterator[tuple[int, View, View]]:
        """(step, k, v). Exchanges start AHEAD steps before their keys are used."""
        under_way = {step: self.start(step) for step in range(1, min(AHEAD, self.size))}
        held = self.own
        for step in range(self.size):
            if step + AHEAD < self.size:
                under_way[step + AHEAD] = self.start(step + AHEAD)
            if step:
                held, pending = under_way.pop(step)
                pending.wait()
            yield step, held[0], held[1]

    def give_back(self, step: int, sums: list[View]) -> tuple[list[View], Pending]:
        """Send shares of dk and dv to the owner of a step's keys; (buffers of what arrives, the exchange)."""
        memory, owner, user = self.local.run.memory, (self.rank - step) % self.size, (self.rank + step) % self.size
        arrived = [memory.empty(x.shape, self.local.wide) for x in self.own]
        return arrived, self.local.run.exchange([Message(x, owner) for x in sums], [Message(x, user) for x in arrived])


def bare(local: Packed, keys: int) -> tuple[Problem, Operands]:
    """The dense call of all own rows over so many keys that are 0, see ring.bare."""
    p, o, memory = local.problem, local.o, local.run.memory
    k, v = [memory.empty((1, keys, *x.shape[1:]), x.dtype) for x in (o.k, o.v)]
    for x in (k, v):
        memory.zero(x)
    problem = replace(p, batch=1, total_q=None, total_k=None, seqlen_q=o.q.shape[0], seqlen_k=keys, mask=Mask(), dropout=None,
                      score=replace(p.score, alibi=False, bias=None, mask=False))
    return problem, replace(o, q=dense(o.q), k=k, v=v, alibi_slopes=None, bias=None, mask=None, cu_seqlens_q=None, cu_seqlens_k=None)


def forward(local: Packed, out: View, lse: View) -> None:
    """Write out and lse of own rows. The sum so far is float32 (float64)."""
    memory, ring = local.run.memory, Ring(local)
    sums = out if out.dtype == local.wide else memory.empty(out.shape, local.wide)
    calls = [(owner, n, call) for owner in range(ring.size) for n, call in enumerate(local.plan.paired(owner))]
    begun = set[int]()          # chunks, by their first row, with a result, to which others are merged: the sinks are in it
    for chunk in local.plan.q.chunks_of(ring.rank):
        if chunk.stop > chunk.start and (local.each or all(call.rows != chunk for *_, call in calls)):
            _begin(local, chunk, sums, lse)
            begun.add(chunk.start)
    later = local.without_sinks()
    for step, k, v in ring.steps():
        for owner, n, call in calls:
            if owner != (ring.rank - step) % ring.size or call.rows.stop == call.rows.start:
                continue
            first = call.rows.start not in begun
            begun.add(call.rows.start)
            for piece in (local if first else later).pieces(("ring", owner, n), call, k, v):
                piece = piece._replace(problem=in_float32(piece.problem))
                rows, rows_lse = cut(sums, 0, piece.rows), cut(lse, 1, piece.rows)
                if first:
                    forward_into(local, piece, rows, rows_lse)
                    continue
                part, part_lse = memory.empty(rows.shape, local.wide), memory.empty(rows_lse.shape, lse.dtype)
                forward_into(local, piece, part, part_lse)
                memory.merge(dense(rows), dense(rows_lse), dense(part), dense(part_lse))
    if sums is not out:
        memory.copy(out, sums)


def _begin(local: Packed, rows: slice, sums: View, lse: View) -> None:
    """Write what rows have without a key."""
    problem, o = bare(replace(local, o=replace(local.o, q=cut(local.o.q, 0, rows))), 0)
    to = dense(cut(lse, 1, rows))
    mine = to if is_contiguous(to) else local.run.memory.empty(to.shape, to.dtype)
    local.run.forward(in_float32(problem), o, dense(cut(sums, 0, rows)), mine)
    if mine is not to:
        local.run.memory.copy(to, mine)


def backward(local: Packed, given: Given, grads: Grads[View]) -> None:
    """Write dq, dk, dv of own rows; shares of dbias and dsinks are added."""
    memory, ring, wide = local.run.memory, Ring(local), local.wide
    dq, *own = [memory.empty(x.shape, wide) for x in (local.o.q, *ring.own)]
    calls = [(owner, n, call) for owner in range(ring.size) for n, call in enumerate(local.plan.paired(owner))]
    begun = _cleared(local, [dq], local.plan.q.chunks_of(ring.rank), [call.rows for *_, call in calls])
    if grads.dsinks is not None:
        _add_dsinks(local, given, grads.dsinks)
    local, returning = local.without_sinks(), list[tuple[list[View], Pending]]()
    for step, k, v in ring.steps():
        owner, sums = (ring.rank - step) % ring.size, own
        if step:
            sums = [memory.empty(x.shape, wide) for x in (k, v)]
        of_step = [(n, call) for of, n, call in calls if of == owner]
        begun_keys = _cleared(local, sums, local.plan.k.chunks_of(owner), [call.keys for _, call in of_step])
        for n, call in of_step:
            new, new_keys = call.rows.start not in begun, call.keys.start not in begun_keys
            begun.add(call.rows.start)
            begun_keys.add(call.keys.start)
            for piece in local.pieces(("ring", owner, n), call, k, v):
                found = grads_of(local, piece, given, grads, cut(dq, 0, piece.rows) if new else None,
                                 [cut(x, 0, piece.keys) for x in sums] if new_keys else None)
                if not new:
                    memory.add(cut(dq, 0, piece.rows), found.dq)
                for to, x in [] if new_keys else zip(sums, (found.dk, found.dv), strict=True):
                    memory.add(cut(to, 0, piece.keys), x)
        if step:
            returning.append(ring.give_back(step, sums))
        while returning and (len(returning) > 1 or step + 1 == ring.size):
            arrived, pending = returning.pop(0)
            pending.wait()
            for to, x in zip(own, arrived, strict=True):
                memory.add(to, x)
    for to, x in zip((grads.dq, grads.dk, grads.dv), (dq, *own), strict=True):
        memory.copy(to, x)


def _cleared(local: Packed, sums: list[View], chunks: list[slice], written: list[slice]) -> set[int]:
    """Chunks, by their first row, to which is added: all where each sequence has a call of its own, else those that no call writes. They
    are cleared. The first call of another chunk writes it.
    """
    found = {chunk.start: chunk for chunk in chunks if chunk.stop > chunk.start and (local.each or chunk not in written)}
    for chunk in found.values():
        for x in sums:
            local.run.memory.zero(cut(x, 0, chunk))
    return set(found)


def _add_dsinks(local: Packed, given: Given, dsinks: View) -> None:
    memory, (problem, o) = local.run.memory, bare(local, 1)
    problem = in_float32(problem)
    dq, dk, dv = [memory.empty(x.shape, problem.out_dtype) for x in (o.q, o.k, o.v)]
    found = memory.empty(dsinks.shape, dsinks.dtype if o.sinks is None else o.sinks.dtype)
    of = Given(dense(given.dout), dense(given.out), dense(given.lse), None if given.dlse is None else dense(given.dlse))
    local.run.backward(problem, o, of, Grads(dq, dk, dv, None, found))
    memory.add(dsinks, found)


