"""The rows of one rank in a packed call, and the calls of an engine over some of its rows."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..arrays.view import View
from ..problem import Grads, Mask, Operands, Problem
from .memory import cut, is_contiguous
from .packed_plan import Call, Plan
from .run import Given, Run, heads_of, in_float32


class Piece(NamedTuple):
    """One call of an engine: rows of the rank's and keys of a buffer. `place`: (sequence, first row, first key) if it has one sequence."""

    problem: Problem
    o: Operands
    rows: slice
    keys: slice
    place: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """The rows of one rank, or of all sequences for some heads. `problem` is that of the whole sequences; bias and mask are whole too."""

    run: Run
    problem: Problem
    o: Operands
    plan: Plan
    all_heads: int
    first_head: int = 0

    @property
    def wide(self) -> str:
        return self.problem.compute_dtype

    def heads(self, k: slice) -> Packed:
        """Some key heads, and the query heads that share them."""
        g = self.problem.group
        q = slice(k.start * g, k.stop * g)
        return replace(self, problem=replace(self.problem, num_heads=q.stop - q.start, num_heads_k=k.stop - k.start),
                       o=heads_of(self.o, q, k), first_head=self.first_head + q.start)

    def without_sinks(self) -> Packed:
        return replace(self, problem=replace(self.problem, score=replace(self.problem.score, sinks=False)), o=replace(self.o, sinks=None))

    def pieces(self, name: Any, c: Call, k: View, v: View) -> Iterator[Piece]:
        """The engine's calls of a Call over keys in k and v: one, or one for each sequence where each has a place of its own in bias,
        mask or dropout.
        """
        p = self.problem
        if self.each:
            yield from self._each(c, k, v)
            return
        (n, m), plan, memory = c.longest, self.plan, self.run.memory
        limited, diagonals = self._limited, (self._limited or p.score.alibi) and not c.bottom_right
        problem = replace(p, total_q=c.rows.stop - c.rows.start, total_k=c.keys.stop - c.keys.start, seqlen_q=n, seqlen_k=m,
                          seqused_k=c.used is not None, diagonals=diagonals, mask=Mask(plan.left, plan.right) if limited else Mask())
        lengths = {key: plan.view(memory, (name, key), x) for key, x in (("cu_q", c.cu_q), ("cu_k", c.cu_k))}
        o = replace(self.o, q=cut(self.o.q, 0, c.rows), k=cut(k, 0, c.keys), v=cut(v, 0, c.keys), cu_seqlens_q=lengths["cu_q"],
                    cu_seqlens_k=lengths["cu_k"], seqused_k=None if c.used is None else plan.view(memory, (name, "used"), c.used),
                    diagonals=plan.view(memory, (name, "diagonal"), c.diagonal) if diagonals else None)
        yield Piece(problem, o, c.rows, c.keys)

    @property
    def each(self) -> bool:
        """Whether every sequence has a call of its own."""
        return self.problem.dropout is not None or self.problem.score.bias is not None or self.problem.score.mask

    @property
    def _limited(self) -> bool:
        return self.plan.left is not None or self.plan.right is not None

    def _each(self, c: Call, k: View, v: View) -> Iterator[Piece]:
        """A dense call for each sequence that has rows."""
        p, o, plan = self.problem, self.o, self.plan
        for n in range(len(c.row)):
            rows = slice(c.rows.start + int(c.cu_q[n]), c.rows.start + int(c.cu_q[n + 1]))
            first = c.keys.start + int(c.cu_k[n])
            keys = slice(first, first + int(c.cu_k[n + 1] - c.cu_k[n] if c.used is None else c.used[n]))
            count, many = rows.stop - rows.start, keys.stop - keys.start
            if not count:
                continue
            row, key = int(c.row[n]), int(c.key[n])
            dropout = p.dropout and replace(p.dropout, batch=n, head=self.first_head, row=row, column=key, heads=self.all_heads)
            problem = replace(p, batch=1, total_q=None, total_k=None, seqlen_q=count, seqlen_k=many, dropout=dropout,
                              mask=Mask(plan.left, plan.right, False, int(c.diagonal[n])) if self._limited or p.score.alibi else Mask())
            where = slice(n, n + 1), slice(row, row + count), slice(key, key + many)
            one = replace(o, q=dense(cut(o.q, 0, rows)), k=dense(cut(k, 0, keys)), v=dense(cut(v, 0, keys)), bias=scores(o.bias, *where),
                          mask=scores(o.mask, *where), alibi_slopes=o.alibi_slopes and cut(o.alibi_slopes, 0, where[0]),
                          cu_seqlens_q=None, cu_seqlens_k=None)
            yield Piece(problem, one, rows, keys, (n, row, key))


def scores(x: View | None, batch: slice, rows: slice, keys: slice) -> View | None:
    """A part of bias or mask."""
    return x if x is None else cut(cut(cut(x, 0, batch), 2, rows), 3, keys)


def dense(x: View) -> View:
    """(rows, heads, dim) or (heads, rows) as a batch of one."""
    return View(x.ptr, (1, *x.shape), (0, *x.strides), x.dtype, x.device, x.owner, x.readonly)


def shaped(piece: Piece, x: View) -> View:
    """An array of the piece's rows as its engine call takes it."""
    return x if piece.problem.packed else dense(x)


def forward_into(local: Packed, piece: Piece, out: View, lse: View) -> None:
    """Write out and lse of the piece's rows, any strides."""
    run = local.run
    to = shaped(piece, lse)
    mine = to if is_contiguous(to) else run.memory.empty(to.shape, to.dtype)
    run.forward(piece.problem, piece.o, shaped(piece, out), mine)
    if mine is not to:
        run.memory.copy(to, mine)


def grads_of(local: Packed, piece: Piece, given: Given, grads: Grads[View], dq: View | None = None,
             sums: list[View] | None = None) -> Grads[View]:
    """Arrays (rows, heads, dim) with the gradients of a piece in float32 (float64): `dq`, and `sums`, dk and dv, where they are given, else
    new ones. dbias and dsinks are added to `grads`.
    """
    memory, problem, o = local.run.memory, in_float32(piece.problem), piece.o
    rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
    dq = memory.empty((rows, *o.q.shape[-2:]), problem.out_dtype) if dq is None else dq
    dk, dv = [memory.empty((keys, *x.shape[-2:]), problem.out_dtype) for x in (o.k, o.v)] if sums is None else sums
    dbias = None
    if grads.dbias is not None and o.bias is not None:
        dbias = memory.empty(tuple([1 if n == 1 else m for n, m in zip(grads.dbias.shape, o.bias.shape, strict=True)]), o.bias.dtype)
    dsinks = None if o.sinks is None else memory.empty(o.sinks.shape, o.sinks.dtype)
    of = Given(shaped(piece, cut(given.dout, 0, piece.rows)), shaped(piece, cut(given.out, 0, piece.rows)),
               shaped(piece, cut(given.lse, 1, piece.rows)), None if given.dlse is None else shaped(piece, cut(given.dlse, 1, piece.rows)))
    local.run.backward(problem, o, of, Grads(shaped(piece, dq), shaped(piece, dk), shaped(piece, dv), dbias, dsinks))
    if dsinks is not None and grads.dsinks is not None:
        memory.add(grads.dsinks, dsinks)
    if dbias is not None and piece.place is not None:
        to, (n, row, key) = grads.dbias, piece.place
        for axis, where in ((0, slice(n, n + 1)), (2, slice(row, row + rows)), (3, slice(key, key + keys))):
            to = to if to.shape[axis] == 1 else cut(to, axis, where)
        memory.add(to, dbias)
    return Grads(dq, dk, dv)
