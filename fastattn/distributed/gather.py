"""The method "gather": every rank receives the keys and values that its rows attend, then computes whole calls.

Of a causal mask that is everything up to the last row, of a window its halo. Nothing partial is merged: out has the bits of one rank. In
the backward each rank has a share of dk and dv for all keys that it received, which it sends to their owners.

A call of rows that attend own keys only waits for nobody, and a share leaves when no later call adds to it (steps.py).
"""
from __future__ import annotations

from ..arrays.view import View
from ..problem import Grads
from .memory import cut, is_contiguous, rows_together
from .messages import Done, Message, Pending
from .run import Given, Local, Run, buffer, canonical, rows_first
from .shares import add_keys, add_scores, piece_grads
from .spans import evenly, total
from .steps import Steps, steps_of


class Keys:
    """Keys and values that a rank holds for its rows: rows-first buffers. `order`: in which its chunks of rows are computed."""

    def __init__(self, run: Run, local: Local, order: tuple[int, ...], saved: list[View] | None = None) -> None:
        """Starts the exchange, unless all is there already; `wait` before a step's call.

        It is one, because a kernel that has all processors lets no second one in before it ends.
        """
        self.run, self.local = run, local
        self.steps: Steps = steps_of(local.reach, local.rows, local.keys, local.me, order)
        self.own = [rows_first(x) for x in (local.o.k, local.o.v)]
        self.alone = len(local.ranks) == 1
        self.rows = total([part.span for part in self.steps.held])
        self.pending: Pending = Done()
        self._own_copied = True
        if self.alone and self.rows == self.own[0].shape[0]:
            self.buffers = self.own
            return
        if saved is not None:
            self.buffers = saved
            return
        memory, ranks = run.memory, local.ranks
        give = self.own if self.alone else [packed(run, x) for x in self.own]
        self.buffers = [buffer(memory, x, self.rows, x.dtype) for x in self.own]
        self.pending = run.exchange(
            [Message(cut(x, 0, one.rows), ranks[one.to]) for given in self.steps.give for one in given for x in give],
            [Message(cut(x, 0, one.rows), ranks[one.source]) for taken in self.steps.take for one in taken for x in self.buffers])
        self._own_copied = False

    def wait(self, step: int) -> tuple[View, View]:
        """Canonical k and v of the held spans; what the steps until this one attend is there."""
        if not self._own_copied:            # not before: exchanges of other pieces start first
            for to, x in zip(self.buffers, self.own, strict=True):
                for pair in rows_together(to, x, [(held, mine) for mine, held in self.steps.own]):
                    self.run.memory.copy(*pair)
        self._own_copied = True
        if any(self.steps.take[:step + 1]):
            self.pending.wait()
        k, v = self.buffers
        return canonical(k), canonical(v)

    def finish(self) -> None:
        """Own keys may change after it."""
        self.pending.wait()


class Shares:
    """The shares of dk and dv of the held keys: rows-first sums, which go to the owners of the keys."""

    def __init__(self, keys: Keys) -> None:
        self.keys, self.run, self.local = keys, keys.run, keys.local
        self.sums = [buffer(self.run.memory, x, keys.rows, self.local.wide) for x in keys.own]
        # shares of own keys, (rows, [of dk, of dv]), and their exchange
        self.arriving = list[tuple[list[tuple[slice, list[View]]], Pending]]()

    def give_back(self, step: int) -> None:
        """Send the shares that no later step adds to."""
        steps, ranks = self.keys.steps, self.local.ranks
        arrived = [(one.rows, [buffer(self.run.memory, x, one.rows.stop - one.rows.start, self.local.wide) for x in self.sums])
                   for one in steps.returned[step]]
        give = [Message(cut(x, 0, one.rows), ranks[one.to]) for one in steps.back[step] for x in self.sums]
        take = [Message(x, ranks[one.source]) for one, (_, both) in zip(steps.returned[step], arrived, strict=True) for x in both]
        self.arriving.append((arrived, self.run.exchange(give, take)))

    def add_up(self, dk: View, dv: View) -> None:
        """Write the gradients of own keys, canonical: own shares first, then the others' in the order of steps and of ranks."""
        memory, own, places = self.run.memory, total(self.local.keys[self.local.me]), self.keys.steps.own
        whole = sum(mine.stop - mine.start for mine, _ in places) == own
        sums = self.sums
        if not whole:                   # some of the own keys are attended by other ranks' rows only
            sums = [buffer(memory, x, own, self.local.wide) for x in self.sums]
            for to, x in zip(sums, self.sums, strict=True):
                memory.zero(to)
                for mine, held in places:
                    memory.copy(cut(to, 0, mine), cut(x, 0, held))
            places = [(slice(0, own), slice(0, own))]
        for arrived, pending in self.arriving:
            pending.wait()
            for rows, both in arrived:
                for to, x in zip(sums, both, strict=True):
                    memory.add(cut(to, 0, _moved(rows, places)), x)
        for result, x in zip((dk, dv), sums, strict=True):
            for pair in rows_together(rows_first(result), x, places):
                memory.copy(*pair)


def _moved(rows: slice, places: list[tuple[slice, slice]]) -> slice:
    """Rows of own keys as rows of the sums."""
    mine, held = next((mine, held) for mine, held in places if mine.start <= rows.start and rows.stop <= mine.stop)
    return slice(rows.start - mine.start + held.start, rows.stop - mine.start + held.start)


def packed(run: Run, x: View) -> View:
    """A rows-first View whose rows are contiguous: itself, or a copy."""
    if is_contiguous(x):
        return x
    to = run.memory.empty(x.shape, x.dtype)
    run.memory.copy(to, x)
    return to


def head_pieces(local: Local, pieces: int) -> list[tuple[slice, slice, Local]]:
    """(query heads, key heads, operands) of each piece; pieces are under way while others are computed."""
    heads, group = local.problem.num_heads_k, local.problem.group
    if pieces == 1:
        return [(slice(0, heads * group), slice(0, heads), local)]
    return [(slice(k.start * group, k.stop * group), k, local.heads(k.start, k.stop)) for k in evenly(heads, pieces)]


def upwards(local: Local) -> tuple[int, ...]:
    """Of a causal mask the chunk with the fewest keys first: while it is computed, keys of the others arrive."""
    return tuple(range(len(local.rows[local.me])))


def forward(run: Run, local: Local, out: View, lse: View, pieces: int = 1) -> list[list[View]]:
    """Write out and lse of own rows, canonical. What is held of each piece."""
    started = [(q, part, Keys(run, part, upwards(part))) for q, _, part in head_pieces(local, pieces)]
    for q, part, keys in started:
        for step, calls in enumerate(keys.steps.pieces):
            k, v = keys.wait(step)
            for piece in calls:
                problem, o = part.piece(piece, k, v)
                to = cut(cut(lse, 1, q), 2, piece.rows)
                contiguous = to if is_contiguous(to) else run.memory.empty(to.shape, to.dtype)
                run.forward(problem, o, cut(cut(out, 2, q), 1, piece.rows), contiguous)
                if contiguous is not to:
                    run.memory.copy(to, contiguous)
        keys.finish()
    return [keys.buffers for *_, keys in started]


def backward(run: Run, local: Local, given: Given, grads: Grads[View], pieces: int = 1, saved: list[list[View]] | None = None) -> None:
    """Write dq, dk, dv of own rows. dbias and dsinks, if wanted, are sums that the caller cleared: shares of this rank are added.

    The last piece computes the chunk with the most keys first: shares of keys that no other chunk attends leave while others are computed.
    """
    pieces_of = head_pieces(local, pieces)
    orders = [upwards(part)[::-1] if n + 1 == len(pieces_of) else upwards(part) for n, (*_, part) in enumerate(pieces_of)]
    started = [(q, k, part, Keys(run, part, orders[n], None if saved is None else saved[n])) for n, (q, k, part) in enumerate(pieces_of)]
    under_way = []
    for q, k, part, keys in started:
        mine = grads_of_heads(grads, q, k)
        under_way.append((mine, _shares(run, part, keys, given.heads(q), mine)))
    for mine, shares in under_way:
        shares.add_up(mine.dk, mine.dv)


def grads_of_heads(grads: Grads[View], q: slice, k: slice) -> Grads[View]:
    dbias = grads.dbias
    return Grads(cut(grads.dq, 2, q), cut(grads.dk, 2, k), cut(grads.dv, 2, k),
                 dbias if dbias is None or dbias.shape[1] == 1 else cut(dbias, 1, q),
                 None if grads.dsinks is None else cut(grads.dsinks, 0, q))


def _shares(run: Run, local: Local, keys: Keys, given: Given, grads: Grads[View]) -> Shares:
    """Write dq, add to dbias and dsinks; the shares of dk and dv are on their way to the owners of their keys."""
    memory, shares, pieces = run.memory, Shares(keys), keys.steps.pieces
    whole = next(((step, n) for step, calls in enumerate(pieces) for n, x in enumerate(calls) if x.keys == slice(0, keys.rows)), None)
    for x in shares.sums if whole is None else []:
        memory.zero(x)
    begun, later = whole is None, list[tuple[Grads[View], slice]]()     # a call with all keys writes the sums, the others are added
    for step, calls in enumerate(pieces):
        k, v = keys.wait(step)
        for n, piece in enumerate(calls):
            direct = (step, n) == whole
            found = piece_grads(run, local, piece, k, v, given, grads, None, shares.sums if direct else None)
            memory.copy(cut(grads.dq, 1, piece.rows), found.dq)
            add_scores(run, found, piece, grads)
            begun = begun or direct
            if not direct:
                later.append((found, piece.keys))
            while begun and later:
                add_keys(run, *later.pop(0), shares.sums)
        shares.give_back(step)
    keys.finish()
    return shares
