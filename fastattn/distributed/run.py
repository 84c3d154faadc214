"""What every method works with: the call's engine, memory and group, and the operands of some heads of some rows."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..arrays.streams import Stream
from ..arrays.view import View
from ..memo import Recent
from ..problem import Grads, Mask, Operands, Problem
from .memory import Memory, cut
from .messages import Group, Message, Pending, exchange
from .reach import Piece, Reach
from .spans import Spans

_problems: Recent[Problem, Problem] = Recent()
_known: Recent[int, Problem] = Recent()                         # those that are shared, by identity
_made: Recent[Any, tuple[Problem, Problem]] = Recent()          # by the identity of what they were made of, which is held, and how


def shared(problem: Problem) -> Problem:
    """The one object of equal Problems, because engines remember by identity what they chose for one."""
    if _known.get(id(problem)) is problem:
        return problem
    found = _problems.get(problem)
    if found is None:
        found = _problems[problem] = problem
    _known[id(found)] = found
    return found


def made_of(problem: Problem, key: Any, make: Callable[[Problem], Problem]) -> Problem:
    """make(problem), a shared object. It is remembered by identity, because to make or to hash a Problem takes several microseconds."""
    found = _made.get((id(problem), key))
    if found is None or found[0] is not problem:
        found = _made[id(problem), key] = problem, shared(make(problem))
    return found[1]


class Waited:
    """An exchange that is waited for once."""

    def __init__(self, pending: Pending) -> None:
        self._pending: Pending | None = pending

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()


@dataclass(frozen=True, slots=True)
class Run:
    """One distributed call on this rank."""

    engine: Any                     # what registry.choose gave
    memory: Memory
    group: Group
    stream: Stream | None
    deterministic: bool = False
    under_way: list[Waited] = field(default_factory=list)

    def exchange(self, give: list[Message], take: list[Message]) -> Pending:
        started = Waited(exchange(self.group, give, take, self.stream))
        self.under_way.append(started)
        return started

    @contextmanager
    def settled(self) -> Iterator[None]:
        """An error inside is raised after all messages of this rank have come and gone: no buffer is freed under one, and if all ranks
        raise, because an engine refuses the call, the group can go on.
        """
        try:
            yield
        except Exception:
            for started in self.under_way:
                with suppress(Exception):           # the first error is the one to know
                    started.wait()
            raise

    def forward(self, problem: Problem, o: Operands, out: View, lse: View) -> None:
        self.engine.forward(shared(problem), o, out, lse, self.memory.handle)

    def backward(self, problem: Problem, o: Operands, given: Given, grads: Grads[View]) -> None:
        self.engine.backward(shared(problem), o, given.dout, given.out, given.lse, given.dlse, grads, self.memory.handle,
                             self.deterministic)


@dataclass(frozen=True, slots=True)
class Given:
    """What a backward gets besides the forward's operands, canonical: (batch, rows, heads, dim) and (batch, heads, rows)."""

    dout: View
    out: View
    lse: View
    dlse: View | None

    def rows(self, rows: slice) -> Given:
        return Given(cut(self.dout, -3, rows), cut(self.out, -3, rows), cut(self.lse, -1, rows),
                     None if self.dlse is None else cut(self.dlse, -1, rows))

    def heads(self, heads: slice) -> Given:
        return Given(cut(self.dout, -2, heads), cut(self.out, -2, heads), cut(self.lse, -2, heads),
                     None if self.dlse is None else cut(self.dlse, -2, heads))


@dataclass(frozen=True, slots=True)
class Local:
    """The rows of one participant, dense, and who the others are.

    q, k and v of the operands are (batch, rows, heads, dim) of own rows; bias and mask are (batch, heads, own rows, all keys). `problem`
    has the heads of these operands; its lengths are those of the whole sequences.
    """

    problem: Problem
    o: Operands
    rows: tuple[Spans, ...]         # of each participant
    keys: tuple[Spans, ...]
    me: int
    ranks: tuple[int, ...]          # each participant's rank in the group
    all_heads: int                  # query heads of the call
    first_head: int = 0             # of the operands' query heads, among those

    @property
    def reach(self) -> Reach:
        return Reach.of(self.problem.mask, self.problem.seqlen_q, self.problem.seqlen_k)

    @property
    def exact(self) -> bool:
        """Whether each call must know its place in the whole."""
        p = self.problem
        return p.score.alibi or p.score.bias is not None or p.score.mask or p.dropout is not None

    @property
    def wide(self) -> str:
        """The dtype of sums."""
        return self.problem.compute_dtype

    def heads(self, first: int, last: int) -> Local:
        """Key heads [first, last), and the query heads that share them."""
        p, g = self.problem, self.problem.group
        k, q = slice(first, last), slice(first * g, last * g)
        problem = made_of(p, ("heads", last - first), lambda p: replace(p, num_heads=(last - first) * g, num_heads_k=last - first))
        return replace(self, problem=problem, o=heads_of(self.o, q, k), first_head=self.first_head + first * g)

    def piece(self, piece: Piece, k: View, v: View) -> tuple[Problem, Operands]:
        """The call of a piece over keys in canonical k and v."""
        n, m = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        o = replace(self.o, q=cut(self.o.q, 1, piece.rows), k=cut(k, 1, piece.keys), v=cut(v, 1, piece.keys))
        for name in ("bias", "mask"):
            x = getattr(o, name)
            if x is not None and piece.spans is not None:
                setattr(o, name, cut(cut(x, 2, piece.rows), 3, slice(*piece.spans[1])))
        where = piece.masked, piece.spans, n, m, self.first_head, self.all_heads
        return made_of(self.problem, where, lambda p: placed(replace(p, seqlen_q=n, seqlen_k=m), self.reach, piece, self.first_head,
                                                             self.all_heads)), o


def heads_of(o: Operands, q: slice, k: slice) -> Operands:
    """The operands of some query heads and of the key heads that they share."""
    def of(x: View | None, axis: int) -> View | None:
        return x if x is None else cut(x, axis, q)
    return replace(o, q=cut(o.q, -2, q), k=cut(o.k, -2, k), v=cut(o.v, -2, k), bias=of(o.bias, 1), mask=of(o.mask, 1),
                   alibi_slopes=of(o.alibi_slopes, 1), sinks=of(o.sinks, 0))


def in_float32(problem: Problem) -> Problem:
    """The Problem whose results are float32 beside 16-bit operands: parts of sums are not rounded."""
    if problem.dtype not in ("float16", "bfloat16"):
        return problem
    return made_of(problem, "float32", lambda p: replace(p, float32_out=True))


def placed(problem: Problem, reach: Reach, piece: Piece, first_head: int, heads: int) -> Problem:
    """The Problem of a piece with the mask and the dropout of the place where it lies in the whole."""
    if problem.dropout is not None and piece.spans is not None:
        rows, keys = piece.spans
        problem = replace(problem, dropout=replace(problem.dropout, head=first_head, row=rows.start, column=keys.start, heads=heads))
    if not piece.masked and not problem.score.alibi:
        return replace(problem, mask=Mask())
    left, right = (reach.left, reach.right) if piece.masked else (None, None)
    if piece.spans is None:
        return replace(problem, mask=Mask(left, right))
    first = reach.diagonal(*piece.spans)
    own = problem.seqlen_k - problem.seqlen_q       # bottom-right, which needs no argument
    return replace(problem, mask=Mask(left, right) if first == own else Mask(left, right, False, first))


def sum_over_ranks(run: Run, x: View) -> None:
    """x of all ranks, added in the order of ranks, in every rank. Small arrays only: each rank gets all of them."""
    group, memory = run.group, run.memory
    if group.size == 1 or 0 in x.shape:
        return
    mine = memory.empty(x.shape, x.dtype)
    memory.copy(mine, x)
    parts = [mine if rank == group.rank else memory.empty(x.shape, x.dtype) for rank in range(group.size)]
    others = [rank for rank in range(group.size) if rank != group.rank]
    run.exchange([Message(mine, rank) for rank in others], [Message(parts[rank], rank) for rank in others]).wait()
    memory.copy(x, parts[0])
    for part in parts[1:]:
        memory.add(x, part)


def rows_first(x: View) -> View:
    """Canonical (batch, rows, heads, dim) as (rows, batch, heads, dim); (batch, heads, rows) as (rows, batch, heads)."""
    return x.permute((1, 0, 2, 3)) if len(x.shape) == 4 else x.permute((2, 0, 1))


def canonical(x: View) -> View:
    """The inverse of rows_first for q, k, v, out and their gradients."""
    return x.permute((1, 0, 2, 3))


def buffer(memory: Memory, like: View, rows: int, dtype: str) -> View:
    """A rows-first buffer for so many rows of a rows-first View."""
    return memory.empty((rows, *like.shape[1:]), dtype)
