"""Dense calls: from arguments to one of the methods, and back."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from .. import registry
from ..arrays.convert import Caller
from ..arrays.view import View
from ..dispatch import read
from ..eight_bit import refuse_backward
from ..options import Check, Options, read_options
from ..problem import Grads, Operands, Problem, check_array, problem_of
from . import gather, ring
from .checks import check_memory, group_of, local_rows, ranks_agree, refuse_graph, shard_of, shared_facts, whole_length
from .explained import explained
from .memory import memory_of
from .messages import Group
from .plan import choose, pieces_of, rows_of
from .run import Given, Local, Run, canonical, made_of, rows_first, shared
from .saved import Saved, described, refuse_to_save, saved_of
from .spans import Spans, total
from .stages import Prepared, four_axes, gradient_of_bias, gradient_of_sinks, stages_of


class Whole(NamedTuple):
    """What the caller says about the whole, besides the options of attention."""

    call: str
    group: Any
    seqlen: Any
    seqlen_k: Any
    shard: Any
    method: Any
    pieces: Any
    return_saved: bool = False
    saved: Any = None


def prepare(w: Whole, raw: tuple[Any, ...], layout: str, stream: Any, engine: str | None, qkv: tuple[Any, Any, Any],
            scores: tuple[Any, Any, Any, Any], given: tuple[Any, Any, Any, Any] | None = None, need_dbias: bool = False,
            deterministic: bool = False) -> tuple[Prepared, Given | None]:
    """Check everything; `raw` are the arguments of read_options. The ranks agree first if they are asked to."""
    check, found = Check(w.call), None
    group = group_of(check, w.group)
    with ranks_agree(w.call, group) as facts:
        facts.add(shard=w.shard, method=w.method, pieces=w.pieces, engine=engine, need_dbias=need_dbias, deterministic=deterministic)
        shard, pieces = shard_of(check, w.shard), None if w.pieces is None else check.integer("pieces", w.pieces, 1, 2**15)
        options = read_options(w.call, *raw)
        caller, as_given = read(w.call, layout, stream, qkv, scores)
        refuse_graph(w.call, facts, caller.stream)
        refuse_backward(check, as_given.q, as_given.k, as_given.v)
        check_memory(check, group, as_given.q)
        problem, o, rows, keys = whole_problem(check, w, group, shard, options, as_given)
        if facts.wanted:
            facts.add(**options._asdict(), **shared_facts(problem))
        method = choose(check, w.method, group.size, problem, shard, given is not None)
        facts.add(return_saved=w.return_saved, saved=w.saved is not None)
        if w.return_saved:
            refuse_to_save(check, method)
        saved = None
        if w.saved is not None:
            saved = saved_of(check, w.saved, method, w.method != "auto", pieces, problem, group, caller.stream)
            method, pieces = saved.method, saved.pieces
        if given is not None:
            found = _given(caller, problem, o, given, need_dbias)
            facts.add(dlse=found.dlse is not None)
        chosen = registry.choose(w.call, engine, o.q.device)
        pieces = pieces_of(pieces, group.size, problem, shard, o.q.device)
        run = explained(Run(chosen, memory_of(caller.stream), group, caller.stream, deterministic), method, pieces)
        lengths, bias = [total(spans) for spans in rows], as_given.bias
        bias_has_rows = bias is None or not need_dbias or has_rows(check, four_axes(bias.shape)[2], lengths, group.rank)
    return Prepared(caller, run, problem, o, rows, keys, method, pieces, bias, bias_has_rows, need_dbias, w.return_saved, saved), found


def whole_problem(check: Check, w: Whole, group: Group, shard: str, options: Options,
                  o: Operands) -> tuple[Problem, Operands, tuple[Spans, ...], tuple[Spans, ...]]:
    """The Problem of the whole sequences, the checked operands of own rows, and the rows and keys of every rank."""
    size, rank = group.size, group.rank
    if not len(o.q.shape) == len(o.k.shape) == len(o.v.shape) == 4 or o.k.shape[1] != o.v.shape[1]:
        problem_of(check.call, o, options)      # raises
    seqlen_q = whole_length(check, "seqlen", w.seqlen, o.q.shape[1], size)
    same = w.seqlen_k is None and o.k.shape[1] == o.q.shape[1]
    seqlen_k = seqlen_q if same else whole_length(check, "seqlen_k", w.seqlen_k, o.k.shape[1], size)
    rows, keys = rows_of(seqlen_q, size, shard), rows_of(seqlen_k, size, shard)
    local_rows(check, "q", o.q.shape[1], "seqlen", seqlen_q, rows[rank], rank)
    local_rows(check, "k", o.k.shape[1], "seqlen_k", seqlen_k, keys[rank], rank)
    k, v = [View(x.ptr, (x.shape[0], seqlen_k, *x.shape[2:]), x.strides, x.dtype, x.device, x.owner) for x in (o.k, o.v)]
    problem, checked = problem_of(check.call, replace(o, k=k, v=v), options)
    whole = made_of(shared(problem), ("rows", seqlen_q), lambda p: replace(p, seqlen_q=seqlen_q))
    return whole, replace(checked, k=o.k, v=o.v), rows, keys


def has_rows(check: Check, axis: int, lengths: list[int], rank: int) -> bool:
    """Whether the axis of rows of a bias has own rows; otherwise all rows, of all ranks, share it, and so their gradients are added up."""
    if axis != 1 or sum(lengths) == 1:
        return True
    if 1 in lengths and lengths[rank] != 1:
        raise check.value("need_dbias", "is True, and bias has 1 row for all", "a bias with a row for each query",
                          "a rank has only one query, so its bias could be either; np.broadcast_to gives bias all rows")
    return lengths[rank] == 1


def _given(caller: Caller, p: Problem, o: Operands, given: tuple[Any, Any, Any, Any], need_dbias: bool) -> Given:
    """dout, out, lse and dlse, checked."""
    call, device = caller.call, o.q.device
    if need_dbias and o.bias is None:
        raise Check(call).value("need_dbias", "is True", "a bias to differentiate", "pass bias= or need_dbias=False")
    shape, lse_shape = (*o.q.shape[:3], o.v.shape[3]), (o.q.shape[0], o.q.shape[2], o.q.shape[1])
    views = list[View]()
    for name, x, wanted, dtype in (("dout", given[0], caller.shape(shape), p.dtype), ("out", given[1], caller.shape(shape), p.dtype),
                                   ("lse", given[2], lse_shape, p.lse_dtype), ("dlse", given[3], lse_shape, p.lse_dtype)):
        if x is None and name == "dlse":
            continue
        view = caller.view(x, name)
        check_array(call, name, view, wanted, dtype, device)
        views.append(view.bshd() if caller.bhsd and len(wanted) == 4 else view)
    dout, out, lse, *dlse = views
    return Given(dout, out, lse, dlse[0] if dlse else None)


def forward(ready: Prepared, return_lse: bool) -> Any:
    """The results in the caller's kind: out, then lse and what is saved, if they are wanted."""
    with ready.run.settled():
        return _forward_of(ready, return_lse)


def _forward_of(ready: Prepared, return_lse: bool) -> Any:
    caller, run, problem, o = ready[:4]
    stages = stages_of(ready)
    shape = (*o.q.shape[:3], o.v.shape[3])
    out = caller.output(shape, problem.out_dtype, o.q)
    lse = caller.allocate((shape[0], shape[2], shape[1]), problem.lse_dtype, o.q)
    returning, kept = [], list[list[View]]()
    for stage in stages:
        local, _ = stage.local()
        if ready.method.ulysses == 1:
            kept = _forward(ready, local, out.view, lse.view)
            continue
        kept.append([local.o.q, local.o.k, local.o.v])
        rows, memory = local.o.q.shape[1], run.memory
        mine = memory.empty((rows, shape[0], local.problem.num_heads, shape[3]), problem.out_dtype)
        mine_lse = memory.empty((shape[0], local.problem.num_heads, rows), problem.lse_dtype)
        _forward(ready, local, canonical(mine), mine_lse)
        returning.append(stage.sent_back([(mine, rows_first(out.view), problem.group, False),
                                          (rows_first(mine_lse), rows_first(lse.view), problem.group, False)]))
    for results in returning:
        results.finish()
    found = [out.finish(), *([lse.finish()] if return_lse else [])]
    if ready.return_saved:
        place = run.group.rank, run.group.size
        found.append(Saved(described(problem), place, ready.method, run.stream, kept))
    return tuple(found) if len(found) > 1 else found[0]


def _forward(ready: Prepared, local: Local, out: View, lse: View) -> list[list[View]]:
    """The keys and values that are held, of each group of heads."""
    if ready.method.keys == "ring":
        ring.forward(ready.run, local, out, lse)
        return []
    return gather.forward(ready.run, local, out, lse, inner_pieces(ready))


def inner_pieces(ready: Prepared) -> int:
    """Groups of heads inside a stage; with Ulysses the stages are the groups."""
    return ready.pieces if ready.method.ulysses == 1 else 1


def backward(ready: Prepared, given: Given) -> Grads[Any]:
    """The gradients of own rows, each of the kind of its input."""
    with ready.run.settled():
        return _backward_of(ready, given)


def _backward_of(ready: Prepared, given: Given) -> Grads[Any]:
    caller, run, problem, o = ready[:4]
    stages = stages_of(ready, given)
    dq, dk, dv = [caller.output(x.shape, x.dtype, x) for x in (o.q, o.k, o.v)]
    returning, of_bias, of_sinks = [], list[View](), list[View]()
    for stage in stages:
        local, of_stage = stage.local()
        assert of_stage is not None
        sums = stage.score_sums(local)
        if ready.method.ulysses == 1:
            _backward(ready, local, of_stage, Grads(dq.view, dk.view, dv.view, *sums))
        else:
            of_q, of_k, of_v = [run.memory.empty(rows_first(x).shape, x.dtype) for x in (local.o.q, local.o.k, local.o.v)]
            _backward(ready, local, of_stage, Grads(canonical(of_q), canonical(of_k), canonical(of_v), *sums))
            returning.append(stage.sent_back([(of_q, rows_first(dq.view), problem.group, False), (of_k, rows_first(dk.view), 1, True),
                                              (of_v, rows_first(dv.view), 1, True)]))
        if sums[0] is not None and ready.bias is not None:
            of_bias.append(stage.dbias(ready.bias, sums[0]))
        if sums[1] is not None:
            of_sinks.append(stage.dsinks(sums[1]))
    for results in returning:
        results.finish()
    dbias = None if not of_bias or ready.bias is None else gradient_of_bias(ready, ready.bias, of_bias)
    dsinks = None if not of_sinks or o.sinks is None else gradient_of_sinks(ready, o.sinks, of_sinks)
    return Grads(dq.finish(), dk.finish(), dv.finish(), dbias, dsinks)


def _backward(ready: Prepared, local: Local, given: Given, grads: Grads[View]) -> None:
    if ready.method.keys == "ring":
        ring.backward(ready.run, local, given, grads, inner_pieces(ready))
    else:
        held = ready.saved.arrays if ready.saved is not None and ready.method.ulysses == 1 else None
        gather.backward(ready.run, local, given, grads, inner_pieces(ready), held)
