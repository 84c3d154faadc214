"""The method "gather" for packed sequences: every rank receives the keys that its rows attend, one message from each other rank."""
from __future__ import annotations

from ..arrays.view import View
from ..problem import Grads
from .memory import cut, is_contiguous
from .messages import Message, Pending
from .packed_calls import Packed, forward_into, grads_of
from .run import Given


class Keys:
    """Keys and values that a rank holds: its exchange, and that of their gradients' shares."""

    def __init__(self, local: Packed) -> None:
        run, plan, memory = local.run, local.plan, local.run.memory
        self.local, self.own = local, (local.o.k, local.o.v)
        self.count = plan.held_count(plan.rank)
        self.others = [rank for rank in range(plan.size) if rank != plan.rank]
        self.given = {rank: plan.given(rank) for rank in range(plan.size)}
        self.taken = {rank: plan.taken(rank) for rank in range(plan.size)}
        self.held = [memory.empty((self.count, *x.shape[1:]), x.dtype) for x in self.own]
        give, take = list[Message](), list[Message]()
        self.arrived = {}
        for rank in self.others:
            for x in self.own:
                packed = memory.empty((len(self.given[rank]), *x.shape[1:]), x.dtype)
                memory.move(packed, x, len(self.given[rank]), None, self.rows("give", rank))
                give.append(Message(packed, rank))
            self.arrived[rank] = [memory.empty((len(self.taken[rank]), *x.shape[1:]), x.dtype) for x in self.own]
            take += [Message(x, rank) for x in self.arrived[rank]]
        self.pending: Pending = run.exchange(give, take)
        for to, x in zip(self.held, self.own, strict=True):
            memory.move(to, x, len(self.taken[plan.rank]), self.rows("take", plan.rank), self.rows("give", plan.rank))

    def rows(self, what: str, rank: int) -> View:
        numbers = self.given if what == "give" else self.taken
        return self.local.plan.view(self.local.run.memory, (what, rank), numbers[rank])

    def wait(self) -> tuple[View, View]:
        memory = self.local.run.memory
        self.pending.wait()
        for rank in self.others:
            for to, x in zip(self.held, self.arrived.pop(rank), strict=True):
                memory.move(to, x, x.shape[0], self.rows("take", rank))
        k, v = self.held
        return k, v

    def give_back(self, sums: list[View], to: list[View]) -> None:
        """Send shares of dk and dv to the owners, and write the sums of own keys, added in the order of ranks."""
        memory, wide, rank = self.local.run.memory, self.local.wide, self.local.plan.rank
        give, take, arrived = list[Message](), list[Message](), {}
        for other in self.others:
            for x in sums:
                packed = memory.empty((len(self.taken[other]), *x.shape[1:]), wide)
                memory.move(packed, x, packed.shape[0], None, self.rows("take", other))
                give.append(Message(packed, other))
            arrived[other] = [memory.empty((len(self.given[other]), *x.shape[1:]), wide) for x in self.own]
            take += [Message(x, other) for x in arrived[other]]
        pending = self.local.run.exchange(give, take)
        pending.wait()
        for n, result in enumerate(to):
            total = result if result.dtype == wide and is_contiguous(result) else memory.empty(result.shape, wide)
            memory.zero(total)
            for other in range(self.local.plan.size):
                if other == rank:
                    memory.move(total, sums[n], len(self.given[rank]), self.rows("give", rank), self.rows("take", rank), True)
                else:
                    memory.move(total, arrived[other][n], len(self.given[other]), self.rows("give", other), None, True)
            if total is not result:
                memory.copy(result, total)


def forward(local: Packed, out: View, lse: View) -> None:
    """Write out and lse of own rows."""
    keys = Keys(local)
    k, v = keys.wait()
    for n, call in enumerate(local.plan.gathered()):
        for piece in local.pieces(("gather", n), call, k, v):
            forward_into(local, piece, cut(out, 0, piece.rows), cut(lse, 1, piece.rows))


def backward(local: Packed, given: Given, grads: Grads[View]) -> None:
    """Write dq, dk, dv of own rows; shares of dbias and dsinks are added."""
    memory, keys = local.run.memory, Keys(local)
    k, v = keys.wait()
    sums = [memory.empty(x.shape, local.wide) for x in keys.held]
    calls = local.plan.gathered()
    whole = None if local.each else next((n for n, call in enumerate(calls) if call.rows.stop > call.rows.start), None)
    for x in sums if whole is None else []:
        memory.zero(x)
    for n, call in enumerate(calls):        # each has all keys that are held, so the first one writes the sums
        for piece in local.pieces(("gather", n), call, k, v):
            direct = n == whole
            if piece.rows.stop == piece.rows.start:
                continue
            found = grads_of(local, piece, given, grads, None, sums if direct else None)
            memory.copy(cut(grads.dq, 0, piece.rows), found.dq)
            for to, x in [] if direct else zip(sums, (found.dk, found.dv), strict=True):
                memory.add(cut(to, 0, piece.keys), x)
    keys.give_back(sums, [grads.dk, grads.dv])
