"""Ulysses for packed sequences: each rank gets all rows for some heads, and sends results back."""
from __future__ import annotations

from dataclasses import replace

from ..arrays.view import View
from ..problem import Grads
from .gather import packed
from .memory import cut
from .messages import Message
from .packed_calls import Packed
from .packed_plan import Side
from .run import Given, Run
from .spans import evenly


class Exchange:
    """Rows of all heads <-> all rows of own heads."""

    def __init__(self, local: Packed) -> None:
        self.local, self.rank, self.size = local, local.plan.rank, local.plan.size
        self.key_heads = evenly(local.problem.num_heads_k, self.size)
        self.others = [rank for rank in range(self.size) if rank != self.rank]

    @property
    def run(self) -> Run:
        return self.local.run

    def heads(self, rank: int, by: int) -> slice:
        own = self.key_heads[rank]
        return slice(own.start * by, own.stop * by)

    def _rows(self, side: Side, rank: int) -> View:
        name = "q" if side is self.local.plan.q else "k"
        return self.local.plan.view(self.run.memory, ("rows", name, rank), side.rows[rank])

    def to_heads(self, arrays: list[tuple[View, Side, int]]) -> list[View]:
        """(rows, heads, ...) Views, the rows' side, and their heads for each key head -> all rows of own heads."""
        memory, give, take, arrived = self.run.memory, list[Message](), list[Message](), {}
        found = [memory.empty((int(side.starts[-1]), *cut(x, 1, self.heads(self.rank, by)).shape[1:]), x.dtype) for x, side, by in arrays]
        for rank in self.others:
            give += [Message(packed(self.run, cut(x, 1, self.heads(rank, by))), rank) for x, _, by in arrays]
            arrived[rank] = [memory.empty((len(side.rows[rank]), *to.shape[1:]), to.dtype)
                             for to, (_, side, _) in zip(found, arrays, strict=True)]
            take += [Message(x, rank) for x in arrived[rank]]
        pending = self.run.exchange(give, take)
        for to, (x, side, by) in zip(found, arrays, strict=True):
            memory.move(to, cut(x, 1, self.heads(self.rank, by)), x.shape[0], self._rows(side, self.rank))
        pending.wait()
        for rank in self.others:
            for to, x, (_, side, _) in zip(found, arrived[rank], arrays, strict=True):
                memory.move(to, x, x.shape[0], self._rows(side, rank))
        return found

    def to_rows(self, arrays: list[tuple[View, View, Side, int]]) -> None:
        """The inverse: (all rows of own heads, own rows of all heads to write, the rows' side, heads for each key head)."""
        memory, give, take, arrived = self.run.memory, list[Message](), list[Message](), {}
        for rank in self.others:
            for x, _, side, _ in arrays:
                ready = memory.empty((len(side.rows[rank]), *x.shape[1:]), x.dtype)
                memory.move(ready, x, ready.shape[0], None, self._rows(side, rank))
                give.append(Message(ready, rank))
            arrived[rank] = [memory.empty(cut(to, 1, self.heads(rank, by)).shape, to.dtype) for _, to, _, by in arrays]
            take += [Message(x, rank) for x in arrived[rank]]
        pending = self.run.exchange(give, take)
        for x, to, side, by in arrays:
            memory.move(cut(to, 1, self.heads(self.rank, by)), x, to.shape[0], None, self._rows(side, self.rank))
        pending.wait()
        for rank in self.others:
            for (_, to, _, by), x in zip(arrays, arrived[rank], strict=True):
                memory.copy(cut(to, 1, self.heads(rank, by)), x)

    def operands(self) -> Packed:
        """The whole problem of own heads."""
        local, o, plan, group = self.local, self.local.o, self.local.plan, self.local.problem.group
        q, k, v = self.to_heads([(o.q, plan.q, group), (o.k, plan.k, 1), (o.v, plan.k, 1)])
        own = local.heads(self.key_heads[self.rank])
        problem = own.problem
        if problem.dropout is not None:
            problem = replace(problem, dropout=replace(problem.dropout, head=own.first_head, heads=own.all_heads))
        return replace(own, problem=problem, o=replace(own.o, q=q, k=k, v=v))


def rows_of_lse(x: View) -> View:
    """(heads, rows) as (rows, heads)."""
    return x.permute((1, 0))


def forward(local: Packed, out: View, lse: View) -> None:
    """Write out and lse of own rows."""
    exchange, memory = Exchange(local), local.run.memory
    mine = exchange.operands()
    rows, heads = mine.o.q.shape[:2]
    mine_out, mine_lse = memory.empty((rows, heads, out.shape[2]), out.dtype), memory.empty((heads, rows), lse.dtype)
    local.run.forward(mine.problem, mine.o, mine_out, mine_lse)
    group, side = local.problem.group, local.plan.q
    exchange.to_rows([(mine_out, out, side, group), (rows_of_lse(mine_lse), rows_of_lse(lse), side, group)])


def backward(local: Packed, given: Given, grads: Grads[View]) -> None:
    """Write dq, dk, dv of own rows. dbias and dsinks of own heads go into `grads`, whose other heads stay 0."""
    exchange, memory, group = Exchange(local), local.run.memory, local.problem.group
    mine, q, k = exchange.operands(), local.plan.q, local.plan.k
    arrays = [given.dout, given.out, rows_of_lse(given.lse), *([] if given.dlse is None else [rows_of_lse(given.dlse)])]
    dout, out, lse, *dlse = exchange.to_heads([(x, q, group) for x in arrays])
    of = Given(dout, out, rows_of_lse(lse), rows_of_lse(dlse[0]) if dlse else None)
    dq, dk, dv = [memory.empty(x.shape, x.dtype) for x in (mine.o.q, mine.o.k, mine.o.v)]
    own, dbias, dsinks = exchange.heads(exchange.rank, group), None, None
    if grads.dbias is not None and mine.o.bias is not None:
        shape = list(grads.dbias.shape)
        shape[1] = mine.problem.num_heads if shape[1] > 1 else 1
        dbias = memory.empty(tuple(shape), mine.o.bias.dtype)
    if grads.dsinks is not None and mine.o.sinks is not None:
        dsinks = memory.empty(mine.o.sinks.shape, mine.o.sinks.dtype)
    local.run.backward(mine.problem, mine.o, of, Grads(dq, dk, dv, dbias, dsinks))
    exchange.to_rows([(dq, grads.dq, q, group), (dk, grads.dk, k, 1), (dv, grads.dv, k, 1)])
    if dbias is not None:
        memory.add(cut(grads.dbias, 1, own) if grads.dbias.shape[1] > 1 else grads.dbias, dbias)
    if dsinks is not None:
        memory.add(cut(grads.dsinks, 0, own), dsinks)
