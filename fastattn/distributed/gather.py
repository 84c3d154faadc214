"""The method "gather": every rank receives the keys and values that its rows attend, then computes whole calls.

Of a causal mask that is everything up to the last row, of a window its halo. Nothing partial is merged: out has the bits of one rank. In
the backward each rank has a share of dk and dv for all keys that it received, which it sends to their owners.
"""
from __future__ import annotations

from ..arrays.view import View
from ..problem import Grads
from .memory import cut, is_contiguous
from .messages import Message, Pending
from .reach import gathered, keys_needed
from .run import Given, Local, Run, buffer, canonical, rows_first
from .shares import add_keys, add_scores, piece_grads
from .spans import Part, Spans, evenly, parts, total


class Keys:
    """Keys and values that a rank holds for its rows: rows-first buffers of the spans `held`."""

    def __init__(self, run: Run, local: Local) -> None:
        """Starts the exchange; `wait` before the first use."""
        self.run, self.local = run, local
        self.needed = [keys_needed(local.reach, spans) for spans in local.rows]
        self.own = [rows_first(x) for x in (local.o.k, local.o.v)]
        self.alone = len(local.ranks) == 1
        if self.alone:
            self.needed, self.held, self.buffers = list(local.keys), parts(local.keys[0]), self.own
            return
        self.held = parts(self.needed[local.me])
        memory, rows = run.memory, total(self.needed[local.me])
        give = [packed(run, x) for x in self.own]
        self.buffers = [buffer(memory, x, rows, x.dtype) for x in self.own]
        sends = [Message(cut(x, 0, mine), local.ranks[to]) for to in self.others()
                 for mine, _ in overlaps(self.needed[to], parts(local.keys[local.me])) for x in give]
        takes = [Message(cut(x, 0, held), local.ranks[source]) for source in self.others()
                 for _, held in overlaps(self.needed[local.me], parts(local.keys[source])) for x in self.buffers]
        self.pending: Pending = run.exchange(sends, takes)
        for mine, held in overlaps(self.needed[local.me], parts(local.keys[local.me])):
            for to, x in zip(self.buffers, self.own, strict=True):
                memory.copy(cut(to, 0, held), cut(x, 0, mine))

    def others(self) -> list[int]:
        return [n for n in range(len(self.local.ranks)) if n != self.local.me]

    def wait(self) -> tuple[View, View]:
        """Canonical k and v of the held spans."""
        if not self.alone:
            self.pending.wait()
        k, v = self.buffers
        return canonical(k), canonical(v)

    def give_back(self, shares: list[View]) -> Shares:
        """Send shares of dk and dv, rows-first sums of the held spans, to the owners of their keys."""
        run, local, memory = self.run, self.local, self.run.memory
        kept = {}
        for source in range(len(local.ranks)):
            n = total(self.taken(source))
            kept[source] = [buffer(memory, x, n, local.wide) for x in shares] if source != local.me else []
        sends = [Message(cut(x, 0, held), local.ranks[to]) for to in self.others()
                 for _, held in overlaps(self.needed[local.me], parts(local.keys[to])) for x in shares]
        takes = list[Message]()
        for source in self.others():
            first = 0
            for span in self.taken(source):
                takes += [Message(cut(x, 0, slice(first, first + span.length)), local.ranks[source]) for x in kept[source]]
                first += span.length
        return Shares(self, shares, kept, run.exchange(sends, takes))

    def taken(self, rank: int) -> Spans:
        """The spans of own keys that a rank holds, in the order of its messages."""
        mine = self.local.keys[self.local.me]
        return tuple([span for needed in self.needed[rank] for own in mine if (span := own.cut(needed)).length])


class Shares:
    """Shares of dk and dv under way to the owners of keys."""

    def __init__(self, keys: Keys, shares: list[View], kept: dict[int, list[View]], pending: Pending) -> None:
        self.keys, self.shares, self.kept, self.pending = keys, shares, kept, pending

    def add_up(self, dk: View, dv: View) -> None:
        """Write the gradients of own keys, canonical: the shares of all ranks, added in the order of ranks."""
        keys, local, memory = self.keys, self.keys.local, self.keys.run.memory
        for n, to in enumerate((dk, dv)):
            target = rows_first(to)
            direct = target.dtype == local.wide and is_contiguous(target)
            sums = target if direct else memory.empty(target.shape, local.wide)
            memory.zero(sums)
            if n == 0:
                self.pending.wait()
            for rank in range(len(local.ranks)):
                if rank == local.me:
                    for mine, held in overlaps(keys.needed[rank], parts(local.keys[rank])):
                        memory.add(cut(sums, 0, mine), cut(self.shares[n], 0, held))
                else:
                    first = 0
                    for mine, _ in overlaps(keys.needed[rank], parts(local.keys[local.me])):
                        length = mine.stop - mine.start
                        memory.add(cut(sums, 0, mine), cut(self.kept[rank][n], 0, slice(first, first + length)))
                        first += length
            if not direct:
                memory.copy(target, sums)


def overlaps(needed: Spans, owned: list[Part]) -> list[tuple[slice, slice]]:
    """(rows in the owner's memory, rows in the memory of who needs them) of each common span, in the order of messages."""
    found = []
    for held in parts(needed):
        for own in owned:
            span = own.span.cut(held.span)
            if span.length:
                found.append((slice(own.first + span.start - own.span.start, own.first + span.stop - own.span.start),
                              slice(held.first + span.start - held.span.start, held.first + span.stop - held.span.start)))
    return found


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


def forward(run: Run, local: Local, out: View, lse: View, pieces: int = 1) -> None:
    """Write out and lse of own rows, canonical."""
    started = [(q, part, Keys(run, part)) for q, _, part in head_pieces(local, pieces)]
    for q, part, keys in started:
        _compute(run, part, keys, cut(out, 2, q), cut(lse, 1, q))


def _compute(run: Run, local: Local, keys: Keys, out: View, lse: View) -> None:
    k, v = keys.wait()
    for piece in gathered(local.reach, parts(local.rows[local.me]), keys.held):
        problem, o = local.piece(piece, k, v)
        to = cut(lse, 2, piece.rows)
        contiguous = to if is_contiguous(to) else run.memory.empty(to.shape, to.dtype)
        run.forward(problem, o, cut(out, 1, piece.rows), contiguous)
        if contiguous is not to:
            run.memory.copy(to, contiguous)


def backward(run: Run, local: Local, given: Given, grads: Grads[View], pieces: int = 1) -> None:
    """Write dq, dk, dv of own rows. dbias and dsinks, if wanted, are sums that the caller cleared: shares of this rank are added."""
    started = [(q, k, part, Keys(run, part)) for q, k, part in head_pieces(local, pieces)]
    under_way = []
    for q, k, part, keys in started:
        mine = grads_of_heads(grads, q, k)
        shares = _shares(run, part, keys, given.heads(q), mine)
        under_way.append((mine, keys.give_back(shares)))
    for mine, sent in under_way:
        sent.add_up(mine.dk, mine.dv)


def grads_of_heads(grads: Grads[View], q: slice, k: slice) -> Grads[View]:
    dbias = grads.dbias
    return Grads(cut(grads.dq, 2, q), cut(grads.dk, 2, k), cut(grads.dv, 2, k),
                 dbias if dbias is None or dbias.shape[1] == 1 else cut(dbias, 1, q),
                 None if grads.dsinks is None else cut(grads.dsinks, 0, q))


def _shares(run: Run, local: Local, keys: Keys, given: Given, grads: Grads[View]) -> list[View]:
    """Write dq, add to dbias and dsinks; rows-first sums of dk and dv for the held keys."""
    k, v = keys.wait()
    memory, rows = run.memory, total([part.span for part in keys.held])
    sums = [buffer(memory, x, rows, local.wide) for x in keys.own]
    pieces = sorted(gathered(local.reach, parts(local.rows[local.me]), keys.held), key=lambda piece: piece.keys.start - piece.keys.stop)
    whole = bool(pieces) and pieces[0].keys == slice(0, rows)       # the call with most keys writes the sums, others are added
    for x in sums if not whole else []:
        memory.zero(x)
    for n, piece in enumerate(pieces):
        direct = whole and n == 0
        found = piece_grads(run, local, piece, k, v, given, grads, None, sums if direct else None)
        memory.copy(cut(grads.dq, 1, piece.rows), found.dq)
        if not direct:
            add_keys(run, found, piece.keys, sums)
        add_scores(run, found, piece, grads)
    return sums
