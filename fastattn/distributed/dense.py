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
from .checks import check_memory, group_of, local_rows, ranks_agree, shard_of, shared_facts, whole_length
from .explained import explained
from .heads import Team, to_heads, to_rows
from .memory import cut, memory_of
from .messages import Group
from .plan import Method, choose, rows_of, teams
from .run import Given, Local, Run, canonical, rows_first, sum_over_ranks
from .spans import Spans, evenly, total


class Whole(NamedTuple):
    """What the caller says about the whole, besides the options of attention."""

    call: str
    group: Any
    seqlen: Any
    seqlen_k: Any
    shard: Any
    method: Any
    pieces: Any


class Prepared(NamedTuple):
    """A call that was checked: nothing was sent yet."""

    caller: Caller
    run: Run
    problem: Problem
    o: Operands
    rows: tuple[Spans, ...]         # of each rank
    keys: tuple[Spans, ...]
    method: Method
    pieces: int
    bias: View | None = None        # as the caller gave it
    bias_has_rows: bool = True      # or one for all
    need_dbias: bool = False


def prepare(w: Whole, raw: tuple[Any, ...], layout: str, stream: Any, engine: str | None, qkv: tuple[Any, Any, Any],
            scores: tuple[Any, Any, Any, Any], given: tuple[Any, Any, Any, Any] | None = None, need_dbias: bool = False,
            deterministic: bool = False) -> tuple[Prepared, Given | None]:
    """Check everything; `raw` are the arguments of read_options. The ranks agree first if they are asked to."""
    check, found = Check(w.call), None
    group = group_of(check, w.group)
    with ranks_agree(w.call, group) as facts:
        facts.add(shard=w.shard, method=w.method, pieces=w.pieces, engine=engine, need_dbias=need_dbias, deterministic=deterministic)
        shard, pieces = shard_of(check, w.shard), 1 if w.pieces is None else check.integer("pieces", w.pieces, 1, 2**15)
        options = read_options(w.call, *raw)
        caller, as_given = read(w.call, layout, stream, qkv, scores)
        refuse_backward(check, as_given.q, as_given.k, as_given.v)
        check_memory(check, group, as_given.q)
        problem, o, rows, keys = whole_problem(check, w, group, shard, options, as_given)
        facts.add(**options._asdict(), **shared_facts(problem))
        method = choose(check, w.method, group.size, problem, shard, given is not None)
        if given is not None:
            found = _given(caller, problem, o, given, need_dbias)
            facts.add(dlse=found.dlse is not None)
        chosen = registry.choose(w.call, engine, o.q.device)
        run = explained(Run(chosen, memory_of(caller.stream), group, caller.stream, deterministic), method)
        lengths, bias = [total(spans) for spans in rows], as_given.bias
        bias_has_rows = bias is None or not need_dbias or has_rows(check, four_axes(bias.shape)[2], lengths, group.rank)
    return Prepared(caller, run, problem, o, rows, keys, method, min(pieces, problem.num_heads_k), bias, bias_has_rows, need_dbias), found


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
    return replace(problem, seqlen_q=seqlen_q), replace(checked, k=o.k, v=o.v), rows, keys


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


def four_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (4 - len(shape)) + shape


class Stage:
    """The operands as the outer ranks see them: own rows of all heads, or after an exchange in a team its rows of own heads."""

    def __init__(self, ready: Prepared) -> None:
        self.ready, u = ready, ready.method.ulysses
        group = ready.run.group
        self.first, self.me = group.rank // u * u, group.rank % u
        self.team = Team(tuple(range(self.first, self.first + u)), self.me, evenly(ready.problem.num_heads_k, u))
        self.rows, self.keys = ready.rows[self.first:self.first + u], ready.keys[self.first:self.first + u]
        self.own = self.team.key_heads[self.me]

    def local(self) -> Local:
        """Exchanges the operands inside the team."""
        ready, (run, problem, o) = self.ready, self.ready[1:4]
        u, size = ready.method.ulysses, run.group.size
        local = Local(problem, o, teams(ready.rows, u), teams(ready.keys, u), run.group.rank // u, tuple(range(self.me, size, u)),
                      problem.num_heads)
        if u == 1:
            return local
        q, = to_heads(run, self.team, self.rows, [(rows_first(o.q), problem.group)])
        k, v = to_heads(run, self.team, self.keys, [(rows_first(x), 1) for x in (o.k, o.v)])
        heads = local.heads(self.own.start, self.own.stop)
        bias, mask = [None if x is None else self.score_rows(x) for x in (o.bias, o.mask)]
        return replace(heads, o=replace(heads.o, q=canonical(q), k=canonical(k), v=canonical(v), bias=bias, mask=mask))

    def score_rows(self, x: View) -> View:
        """bias or mask of own heads for the rows of the team. What broadcasts is sent once."""
        whole, group = x.shape, self.ready.problem.group
        x = collapsed(x)
        own = slice(self.own.start * group, self.own.stop * group)
        rows = total([span for spans in self.rows for span in spans])
        if x.shape[2] > 1 or whole[2] == 1:
            found, = to_heads(self.ready.run, self.team, self.rows, [(score_rows_first(x), group if x.shape[1] > 1 else 0)])
            x = found.permute((1, 2, 0, 3))
        elif x.shape[1] > 1:
            x = cut(x, 1, own)
        return x.broadcast_to((whole[0], own.stop - own.start, rows, whole[3]))

    def given(self, given: Given) -> Given:
        if self.ready.method.ulysses == 1:
            return given
        run, group = self.ready.run, self.ready.problem.group
        arrays = [rows_first(x) for x in (given.dout, given.out, given.lse, given.dlse) if x is not None]
        dout, out, lse, *dlse = to_heads(run, self.team, self.rows, [(x, group) for x in arrays])
        return Given(canonical(dout), canonical(out), lse.permute((1, 2, 0)), dlse[0].permute((1, 2, 0)) if dlse else None)

    def score_sums(self, local: Local) -> tuple[View | None, View | None]:
        """Cleared sums of dbias and dsinks over the calls of this rank: rows and heads of `local`, and 1 where bias broadcasts."""
        memory, p, dbias = self.ready.run.memory, local.problem, None
        if self.ready.need_dbias and self.ready.bias is not None:
            shape = four_axes(self.ready.bias.shape)
            rows = local.o.q.shape[1] if self.ready.bias_has_rows else 1
            dbias = memory.empty((shape[0], p.num_heads if shape[1] > 1 else 1, rows, shape[3]), p.compute_dtype)
            memory.zero(dbias)
        dsinks = memory.empty((p.num_heads,), p.compute_dtype) if p.score.sinks else None
        if dsinks is not None:
            memory.zero(dsinks)
        return dbias, dsinks

    @property
    def query_heads(self) -> slice:
        return self.team.heads(self.me, self.ready.problem.group)

    def dbias(self, bias: View, sums: View) -> Any:
        """The gradient of bias, of the shape that the caller gave it."""
        ready, (run, problem) = self.ready, self.ready[1:3]
        shape = four_axes(bias.shape)
        if ready.method.ulysses > 1:
            whole = run.memory.empty(shape, sums.dtype)
            run.memory.zero(whole)
            by = problem.group if shape[1] > 1 else 0
            if ready.bias_has_rows:
                to_rows(run, self.team, self.rows, [(score_rows_first(sums), score_rows_first(whole), by)])
            else:
                run.memory.copy(cut(whole, 1, self.query_heads) if by else whole, sums)
            sums = whole
        if not ready.bias_has_rows:
            sum_over_ranks(run, sums)
        output = ready.caller.allocate(bias.shape, bias.dtype, bias)
        run.memory.copy(output.view.broadcast_to(shape), sums)
        return output.finish()

    def dsinks(self, sinks: View, sums: View) -> Any:
        """The gradient of sinks, of all ranks."""
        ready, (run, problem, o) = self.ready, self.ready[1:4]
        whole = sums
        if ready.method.ulysses > 1:
            whole = run.memory.empty((problem.num_heads,), sums.dtype)
            run.memory.zero(whole)
            run.memory.copy(cut(whole, 0, self.query_heads), sums)
        sum_over_ranks(run, whole)
        output = ready.caller.allocate(whole.shape, sinks.dtype, o.q if isinstance(sinks.source, (list, tuple)) else sinks)
        run.memory.copy(output.view, whole)
        return output.finish()


def collapsed(x: View) -> View:
    """The View without what `broadcast_to` has repeated."""
    shape = tuple([1 if s == 0 else n for n, s in zip(x.shape, x.strides, strict=True)])
    return View(x.ptr, shape, x.strides, x.dtype, x.device, x.owner, x.readonly)


def score_rows_first(x: View) -> View:
    return x.permute((2, 0, 1, 3))


def forward(ready: Prepared, return_lse: bool) -> Any:
    """The result in the caller's kind."""
    with ready.run.settled():
        return _forward_of(ready, return_lse)


def _forward_of(ready: Prepared, return_lse: bool) -> Any:
    caller, run, problem, o = ready[:4]
    shape = (*o.q.shape[:3], o.v.shape[3])
    out = caller.output(shape, problem.out_dtype, o.q)
    lse = caller.allocate((shape[0], shape[2], shape[1]), problem.lse_dtype, o.q)
    stage = Stage(ready)
    local = stage.local()
    if ready.method.ulysses == 1:
        _forward(ready, local, out.view, lse.view)
    else:
        rows, memory = local.o.q.shape[1], run.memory
        mine = memory.empty((rows, shape[0], local.problem.num_heads, shape[3]), problem.out_dtype)
        mine_lse = memory.empty((shape[0], local.problem.num_heads, rows), problem.lse_dtype)
        _forward(ready, local, canonical(mine), mine_lse)
        group = problem.group
        to_rows(run, stage.team, stage.rows, [(mine, rows_first(out.view), group), (rows_first(mine_lse), rows_first(lse.view), group)])
    return (out.finish(), lse.finish()) if return_lse else out.finish()


def _forward(ready: Prepared, local: Local, out: View, lse: View) -> None:
    if ready.method.keys == "ring":
        ring.forward(ready.run, local, out, lse)
    else:
        gather.forward(ready.run, local, out, lse, min(ready.pieces, local.problem.num_heads_k))


def backward(ready: Prepared, given: Given) -> Grads[Any]:
    """The gradients of own rows, each of the kind of its input."""
    with ready.run.settled():
        return _backward_of(ready, given)


def _backward_of(ready: Prepared, given: Given) -> Grads[Any]:
    caller, run, problem, o = ready[:4]
    stage = Stage(ready)
    dq, dk, dv = [caller.output(x.shape, x.dtype, x) for x in (o.q, o.k, o.v)]
    local, given = stage.local(), stage.given(given)
    sums = stage.score_sums(local)
    if ready.method.ulysses == 1:
        _backward(ready, local, given, Grads(dq.view, dk.view, dv.view, *sums))
    else:
        of_q, of_k, of_v = [run.memory.empty(rows_first(x).shape, x.dtype) for x in (local.o.q, local.o.k, local.o.v)]
        _backward(ready, local, given, Grads(canonical(of_q), canonical(of_k), canonical(of_v), *sums))
        to_rows(run, stage.team, stage.rows, [(of_q, rows_first(dq.view), problem.group)])
        to_rows(run, stage.team, stage.keys, [(of_k, rows_first(dk.view), 1), (of_v, rows_first(dv.view), 1)])
    dbias = None if sums[0] is None or ready.bias is None else stage.dbias(ready.bias, sums[0])
    dsinks = None if sums[1] is None or o.sinks is None else stage.dsinks(o.sinks, sums[1])
    return Grads(dq.finish(), dk.finish(), dv.finish(), dbias, dsinks)


def _backward(ready: Prepared, local: Local, given: Given, grads: Grads[View]) -> None:
    if ready.method.keys == "ring":
        ring.backward(ready.run, local, given, grads, min(ready.pieces, local.problem.num_heads_k))
    else:
        gather.backward(ready.run, local, given, grads, min(ready.pieces, local.problem.num_heads_k))
