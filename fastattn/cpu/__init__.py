"""The CPU engine: tiled kernels in Cython, compiled once per instruction set.

This file chooses the instruction set and divides Problems into tasks. FASTATTN_ISA forces one that `levels.py` lists.

Reading order: plan.py (how a problem is divided), forward.pxi (the loop), backward.pxi, kernels.h (what is done with a
tile), real.h, rows.h and rows_backward.h (the micro-kernels).
"""
from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.view import View, numpy_dtype
from ..caches import append
from ..problem import Grads, Operands, Problem
from . import dbias, eight_bit, flex, levels, plan, shared
from .rowcode import Machine
from .threads import borrow_with, get_num_threads, set_num_threads, threads_of_call

__all__ = ["Forms", "address", "backward", "forward", "get_num_threads", "instruction_set", "name", "prepare", "prepare_backward",
           "set_num_threads", "supports"]

name = "cpu"
_level = levels.choose()            # of those that were built
_engine: Any = importlib.import_module(f".isa.{_level}", __name__)
address, Forms = _engine.address, _engine.Forms
borrow_with(_engine.borrow)
_machine = Machine(*_engine.machine())


def instruction_set() -> str:
    """The level in use, for example 'x86_64_v4'."""
    return _level


def supports(problem: Problem) -> str | None:
    """None, or the one thing that this engine does not have: functions that read arrays of very many axes."""
    if problem.flex is not None:
        return flex.reason(problem.flex)
    return None


def forward(problem: Problem, operands: Operands, out: View, lse: View | None) -> None:
    """Write out, and lse if it is not None. Rows of a packed output that belong to no sequence become 0 and -inf."""
    p, o, into = problem, operands if problem.cache is None else append(problem, operands), out
    if p.eight_bit is not None:
        p, into = eight_bit.for_kernels(p, out)
    lengths, most = plan.read_lengths(p, o), threads_of_call()
    if lengths.cu_q is not None:
        _clear_unowned(lengths.cu_q, into, 0)
        if lse is not None:
            _clear_unowned(lengths.cu_q, lse, 1)
    if p.cache is None:
        _prepared(p, o, lengths, into, lse, most)(*_addresses(o, into, lse))
    elif groups := shared.groups(p, o, lengths):
        shared.attend(p, o, lengths, into, lse, groups, partial(_over_caches, most=most))
    else:
        _over_caches(p, o, lengths, into, lse, most)
    if into is not out:
        eight_bit.store(into, out)


def _addresses(o: Operands, out: View, lse: View | None) -> tuple[int, ...]:
    return o.q.ptr, o.k.ptr, o.v.ptr, out.ptr, 0 if lse is None else lse.ptr


def _over_caches(p: Problem, o: Operands, lengths: plan.Lengths, out: View, lse: View | None, most: int) -> None:
    """The forward of requests over their caches, each alone."""
    vector, half = _engine.vector_length(p.dtype, plan.in_parts(p, lengths))
    team = plan.team_for(p, most)
    for cut in plan.plan_with_cache(p, o, lengths, vector, half, team.threads):
        _planned(p, o, lengths, out, lse, cut, team)(*_addresses(o, out, lse))


def prepare(problem: Problem, operands: Operands, out: View, lse: View | None) -> Any:
    """What `forward` does with dense operands of such shapes and strides, at any addresses.

    Returns
    -------
    run(addresses, stream)
        Of q, k, v, out and lse, if this call has one. None for packed operands, whose lengths are checked in each call,
        for those that change scores, and for 8-bit ones.
    """
    if problem.packed or problem.cache is not None or problem.eight_bit is not None or not operands.plain:
        return None
    p, lengths, threads = problem, plan.read_lengths(problem, operands), threads_of_call()
    o, out, lse = Operands(_bare(operands.q), _bare(operands.k), _bare(operands.v)), _bare(out), lse and _bare(lse)
    ready = _prepared(p, o, lengths, out, lse, threads)
    no_lse = (0,) if lse is None else ()

    def run(addresses: Sequence[int], stream: int) -> None:
        nonlocal ready, threads
        if threads_of_call() != threads:
            threads = get_num_threads()
            ready = _prepared(p, o, lengths, out, lse, threads)
        ready(*addresses, *no_lse)
    return run


def _bare(x: View) -> View:
    """The view without the caller's memory, for what is kept."""
    return replace(x, owner=None)


def prepare_backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None,
                     grads: Grads[View], deterministic: bool) -> Any:
    """What `backward` does with plain dense operands of such shapes and strides, at any addresses.

    Returns
    -------
    run(addresses, stream)
        Of q, k, v, dout, out, lse, dlse if this call has one, dq, dk and dv. None as in `prepare`, and for empty arrays.
    """
    arrays = operands.q, operands.k, operands.v, dout, out, lse, dlse, grads.dq, grads.dk, grads.dv
    if problem.packed or not operands.plain or any(x is not None and 0 in x.shape for x in arrays):
        return None
    q, k, v, *rest = [x and _bare(x) for x in arrays]
    o, lengths, threads = Operands(q, k, v), plan.read_lengths(problem, operands), threads_of_call()    # type: ignore[arg-type]
    no_dlse = (0,) if dlse is None else ()

    def prepared() -> Any:
        vector, waves = _waves(problem, lengths)
        return _engine.prepare_backward(problem, o, lengths, *rest, list(waves), plan.few_rows(problem, lengths.longest_q, vector),
                                        plan.in_parts(problem, lengths), *plan.team_for(problem, threads, backward=True))
    ready = prepared()

    def run(addresses: Sequence[int], stream: int) -> None:
        nonlocal ready, threads
        if threads_of_call() != threads:
            threads = get_num_threads()
            ready = prepared()
        ready(*addresses[:6], *no_dlse, *addresses[6:])
    return run


def _waves(p: Problem, lengths: plan.Lengths) -> tuple[int, Sequence[plan.Wave]]:
    """Elements of a vector, and the waves of the backward."""
    vector, _ = _engine.vector_length(p.dtype, plan.in_parts(p, lengths))
    return vector, plan.plan_backward(p, lengths, -(-p.head_dim // vector) * vector)


def _prepared(p: Problem, o: Operands, lengths: plan.Lengths, out: View, lse: View | None, most: int) -> Any:
    """The compiled engine's forward, on at most so many threads."""
    vector, half = _engine.vector_length(p.dtype, plan.in_parts(p, lengths))
    team = plan.team_for(p, most)
    return _planned(p, o, lengths, out, lse, plan.plan_forward(p, o, lengths, vector, half, team.threads), team)


def _planned(p: Problem, o: Operands, lengths: plan.Lengths, out: View, lse: View | None, cut: plan.Plan, team: plan.Team) -> Any:
    return _engine.prepare(p, o, lengths, out, lse, cut.order, cut.first_block, cut.block_m, cut.splits, cut.split_keys, cut.folded,
                           cut.all_heads, cut.few, cut.direct, cut.in_parts, *team, flex.functions_of(p, o.flex, _machine))


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads[View]) -> None:
    """Write dq, dk, dv, and dbias and dsinks if their Views are given. Always deterministic."""
    p, o, lengths = problem, operands, plan.read_lengths(problem, operands)
    if lengths.cu_q is not None and lengths.cu_k is not None:
        _clear_unowned(lengths.cu_q, grads.dq, 0)
        for x in (grads.dk, grads.dv):
            if lengths.used_k is not None:
                x.numpy()[...] = 0
            _clear_unowned(lengths.cu_k, x, 0)
    real = numpy_dtype(p.compute_dtype)
    delta = np.zeros(p.lse_shape, real)
    way, itself = dbias.way_of(p, grads.dbias)
    rows, sums, place = None, None, grads.dbias
    if way == "rows":
        rows, place = np.zeros(p.lse_shape, real), None
    elif itself:
        grads.dbias.numpy()[...] = 0
    elif grads.dbias is not None:
        sums, place = dbias.reals(grads.dbias.shape, p)
    vector, waves = _waves(p, lengths)
    wanted = grads.dcaptured or ()
    captured = None if o.flex is None or not wanted else flex.sums_of(p, o.flex, lengths, wanted)
    _engine.backward(p, o, lengths, dout, out, lse, dlse, grads.dq, grads.dk, grads.dv, place, way, delta, rows, waves,
                     plan.few_rows(p, lengths.longest_q, vector), plan.in_parts(p, lengths),
                     *plan.team_for(p, threads_of_call(), backward=True),
                     flex.functions_of(p, o.flex, _machine, wanted), captured)
    flex.store(captured, wanted)
    if rows is not None:
        dbias.add_rows(rows, lengths, grads.dbias)
    if sums is not None:
        grads.dbias.numpy()[...] = sums
    if grads.dsinks is not None:
        assert o.sinks is not None
        end = None if lengths.cu_q is None else lengths.cu_q[-1]       # rows of no sequence come after it
        grads.dsinks.numpy()[...] = _dsinks(o.sinks.numpy(), lse.numpy()[..., :end], delta[..., :end])


def _dsinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """-sum over rows of exp(sink - lse) delta: a sink is a score whose value row is zero.

    Rows that attend nothing and have no sink have lse -inf and no share. The sink is rounded as lse is, so that it is
    never larger than lse.
    """
    heads = lse.ndim - 2
    logit = sinks.astype(lse.dtype).astype(np.float64).reshape(-1, 1)
    terms = np.where(np.isinf(lse), 0, np.exp(logit - np.where(np.isinf(lse), np.inf, lse)) * delta)
    return -terms.sum(axis=tuple(i for i in range(lse.ndim) if i != heads))


def _clear_unowned(cu_seqlens: NDArray[np.int64], x: View, axis: int) -> None:
    """Fill the rows after the last sequence with 0; with axis 1 x is an lse (heads, rows), and they become -inf."""
    end = int(cu_seqlens[-1])
    if end < x.shape[axis]:
        a = x.numpy()
        if axis:
            a[:, end:] = -np.inf
        else:
            a[end:] = 0
