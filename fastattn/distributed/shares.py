"""The gradients of one call, and how they are added to those of the whole."""
from __future__ import annotations

from ..arrays.view import View
from ..problem import Grads
from .memory import cut
from .reach import Piece
from .run import Given, Local, Run, canonical, in_float32


def piece_grads(run: Run, local: Local, piece: Piece, k: View, v: View, given: Given, grads: Grads[View], dq: View | None = None,
                keys: list[View] | None = None) -> Grads[View]:
    """The gradients of one call, dq, dk and dv in float32 (float64). `grads` says which others are wanted. `dq`, and `keys`, rows-first dk
    and dv, are written where they are given; other arrays are new.
    """
    memory, (problem, o) = run.memory, local.piece(piece, k, v)
    problem = in_float32(problem)
    dq = memory.empty(o.q.shape, problem.out_dtype) if dq is None else dq
    dk, dv = [memory.empty(x.shape, problem.out_dtype) for x in (o.k, o.v)] if keys is None else [canonical(x) for x in keys]
    dbias = None
    if grads.dbias is not None and o.bias is not None:
        dbias = memory.empty(tuple([1 if n == 1 else m for n, m in zip(grads.dbias.shape, o.bias.shape, strict=True)]), o.bias.dtype)
    found = Grads(dq, dk, dv, dbias, None if o.sinks is None else memory.empty(o.sinks.shape, o.sinks.dtype))
    run.backward(problem, o, given.rows(piece.rows), found)
    return found


def add_keys(run: Run, found: Grads[View], keys: slice, sums: list[View]) -> None:
    """Add dk and dv of a call to rows-first sums."""
    for to, x in zip(sums, (found.dk, found.dv), strict=True):
        run.memory.add(cut(canonical(to), 1, keys), x)


def add_scores(run: Run, found: Grads[View], piece: Piece, grads: Grads[View]) -> None:
    """Add dbias and dsinks of a call to those of the whole."""
    if found.dbias is not None and piece.spans is not None:
        to = grads.dbias if grads.dbias.shape[2] == 1 else cut(grads.dbias, 2, piece.rows)
        run.memory.add(to if to.shape[3] == 1 else cut(to, 3, slice(*piece.spans[1])), found.dbias)
    if found.dsinks is not None:
        run.memory.add(grads.dsinks, found.dsinks)
