"""Packed calls: from arguments to one of the methods, and back. Local arrays are (rows, heads, dim), lse (heads, rows)."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from .. import registry
from ..arrays.convert import Caller
from ..arrays.view import View
from ..eight_bit import refuse_backward
from ..options import Check, Options, read_options
from ..problem import Grads, Operands, Problem, check_array, problem_of
from . import packed_gather, packed_heads, packed_ring
from .checks import check_memory, group_of, ranks_agree, refuse_graph, shard_of, shared_facts
from .explained import explained
from .memory import Memory, memory_of
from .packed_calls import Packed
from .packed_plan import Plan, cumulative, plan_of
from .plan import GATHER_BYTES, Method
from .plan import choose as choose_method
from .run import Given, Run, sum_over_ranks
from .sharding import sequences_of
from .spans import Sequences


class Whole(NamedTuple):
    """What the caller says about the whole, besides the options of attention."""

    call: str
    group: Any
    cu_seqlens: Any
    cu_seqlens_k: Any
    shard: Any
    method: Any


class Prepared(NamedTuple):
    """A call that was checked: nothing was sent yet."""

    caller: Caller
    local: Packed
    method: Method
    bias: View | None = None        # as the caller gave it
    need_dbias: bool = False


def prepare(w: Whole, raw: tuple[Any, ...], stream: Any, engine: str | None, qkv: tuple[Any, Any, Any],
            scores: tuple[Any, Any, Any, Any], given: tuple[Any, Any, Any, Any] | None = None, need_dbias: bool = False,
            deterministic: bool = False) -> tuple[Prepared, Given | None]:
    """Check everything; `raw` are the arguments of read_options. The ranks agree first if they are asked to."""
    check, found = Check(w.call), None
    group = group_of(check, w.group)
    with ranks_agree(w.call, group) as facts:
        facts.add(shard=w.shard, method=w.method, engine=engine, need_dbias=need_dbias, deterministic=deterministic)
        shard, options = shard_of(check, w.shard), read_options(w.call, *raw)
        q = sequences_of(check, "cu_seqlens", w.cu_seqlens, group.size, shard)
        k = q if w.cu_seqlens_k is None else sequences_of(check, "cu_seqlens_k", w.cu_seqlens_k, group.size, shard)
        if k.number != q.number:
            raise check.value("cu_seqlens_k", f"describes {k.number} sequences", f"as many as cu_seqlens, {q.number}")
        facts.add(cu_seqlens=q.starts[-1], sequences=hash((q.starts, k.starts)))
        caller, as_given = _read(w.call, stream, qkv, scores)
        refuse_graph(w.call, facts, caller.stream, packed=True)
        memory = memory_of(caller.stream)
        refuse_backward(check, as_given.q, as_given.k, as_given.v)
        check_memory(check, group, as_given.q)
        problem, o, plan = whole_problem(check, memory, q, k, group.rank, options, as_given)
        if facts.wanted:
            facts.add(**options._asdict(), **shared_facts(problem))
        method = choose(check, w.method, problem, plan, shard, given is not None)
        if given is not None:
            found = _given(caller, problem, o, given, need_dbias)
            facts.add(dlse=found.dlse is not None)
        run = explained(Run(registry.choose(w.call, engine, o.q.device), memory, group, caller.stream, deterministic), method)
    return Prepared(caller, Packed(run, problem, o, plan, problem.num_heads), method, as_given.bias, need_dbias), found


def _read(call: str, stream: Any, qkv: tuple[Any, Any, Any], scores: tuple[Any, Any, Any, Any]) -> tuple[Caller, Operands]:
    caller = Caller(call, "thd", stream, "q", qkv[0])
    bias, mask, alibi_slopes, sinks = scores
    dtype = caller.first.compute_dtype
    o = Operands(caller.first, caller.tokens(qkv[1], "k"), caller.tokens(qkv[2], "v"),
                 bias=None if bias is None else caller.view(bias, "bias"), mask=None if mask is None else caller.view(mask, "mask"),
                 alibi_slopes=None if alibi_slopes is None else caller.small(alibi_slopes, "alibi_slopes", dtype),
                 sinks=None if sinks is None else caller.small(sinks, "sinks", dtype))
    return caller, o


def whole_problem(check: Check, memory: Memory, q: Sequences, k: Sequences, rank: int, options: Options,
                  o: Operands) -> tuple[Problem, Operands, Plan]:
    """The Problem of the whole sequences, the checked operands of own rows, and the rank's Plan."""
    lengths = [max([sequences.length(n) for n in range(sequences.number)], default=0) for sequences in (q, k)]
    for name, x, sequences in (("q", o.q, q), ("k", o.k, k), ("v", o.v, k)):
        rows = sum(span.length for span in sequences.spans(rank))
        if len(x.shape) == 3 and x.shape[0] != rows:
            raise check.value(name, f"has {x.shape[0]} rows", f"{rows}, which rank {rank} owns of {sequences.starts[-1]} rows in "
                              f"{sequences.number} sequences", "shard(x, group, 0, cu_seqlens=...) cuts them")
    whole = [View(x.ptr, (sequences.starts[-1], *x.shape[1:]), x.strides, x.dtype, x.device, x.owner) if len(x.shape) == 3 else x
             for x, sequences in ((o.q, q), (o.k, k), (o.v, k))]
    cu = [cumulative(memory, sequences) for sequences in (q, k)]
    options = options._replace(max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])
    of_all = replace(o, q=whole[0], k=whole[1], v=whole[2], cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
    problem, checked = problem_of(check.call, of_all, options)
    return problem, replace(checked, q=o.q, k=o.k, v=o.v), plan_of(q, k, problem.mask, rank)


def choose(check: Check, method: Any, problem: Problem, plan: Plan, shard: str, backward: bool) -> Method:
    """The Method that the argument names."""
    if isinstance(method, tuple):
        raise check.value("method", f"is {method!r}", "'auto', 'gather', 'ring' or 'ulysses', because sequences are packed")
    found = choose_method(check, "gather" if method == "auto" else method, plan.size, problem, shard, backward)
    if method != "auto":
        return found
    item = 8 if problem.dtype == "float64" else 4 if problem.dtype == "float32" else 2
    rows = max([plan.held_count(rank) for rank in range(plan.size)])
    held = rows * problem.num_heads_k * (problem.head_dim + problem.head_dim_v) * (item + (max(item, 4) if backward else 0))
    why = f"{held / 2**30:.2f} GiB of keys and values in a rank, limit {GATHER_BYTES / 2**30:g} GiB"
    if held <= GATHER_BYTES:
        return Method(1, plan.size, "gather", f"auto: whole calls, {why}")
    return Method(1, plan.size, "ring", f"auto: the keys of one rank at a time, because \"gather\" holds {why}")


def _given(caller: Caller, p: Problem, o: Operands, given: tuple[Any, Any, Any, Any], need_dbias: bool) -> Given:
    """dout, out, lse and dlse, checked."""
    call, device = caller.call, o.q.device
    if need_dbias and o.bias is None:
        raise Check(call).value("need_dbias", "is True", "a bias to differentiate", "pass bias= or need_dbias=False")
    shape, lse_shape = (*o.q.shape[:2], o.v.shape[2]), (o.q.shape[1], o.q.shape[0])
    dout, out, lse = [caller.view(x, name) for name, x in zip(("dout", "out", "lse"), given[:3], strict=True)]
    dlse = None if given[3] is None else caller.view(given[3], "dlse")
    for name, x, wanted, dtype in (("dout", dout, shape, p.dtype), ("out", out, shape, p.dtype), ("lse", lse, lse_shape, p.lse_dtype),
                                   ("dlse", dlse, lse_shape, p.lse_dtype)):
        if x is not None:
            check_array(call, name, x, wanted, dtype, device)
    return Given(dout, out, lse, dlse)


def forward(ready: Prepared, return_lse: bool) -> Any:
    """The result in the caller's kind."""
    caller, local, method = ready[:3]
    o, problem = local.o, local.problem
    out = caller.output((*o.q.shape[:2], o.v.shape[2]), problem.out_dtype, o.q)
    lse = caller.allocate((o.q.shape[1], o.q.shape[0]), problem.lse_dtype, o.q)
    methods = {"gather": packed_gather.forward, "ring": packed_ring.forward, "ulysses": packed_heads.forward}
    with local.run.settled():
        methods[str(method)](local, out.view, lse.view)
    return (out.finish(), lse.finish()) if return_lse else out.finish()


def backward(ready: Prepared, given: Given) -> Grads[Any]:
    """The gradients of own rows, each of the kind of its input."""
    caller, local, method = ready[:3]
    o, memory = local.o, local.run.memory
    dq, dk, dv = [caller.output(x.shape, x.dtype, x) for x in (o.q, o.k, o.v)]
    bias, sinks, dbias, dsinks = ready.bias, o.sinks, None, None
    if ready.need_dbias and bias is not None:
        dbias = memory.empty((1,) * (4 - len(bias.shape)) + bias.shape, local.wide)
        memory.zero(dbias)
    if sinks is not None:
        dsinks = memory.empty(sinks.shape, local.wide)
        memory.zero(dsinks)
    methods = {"gather": packed_gather.backward, "ring": packed_ring.backward, "ulysses": packed_heads.backward}
    with local.run.settled():
        methods[str(method)](local, given, Grads(dq.view, dk.view, dv.view, dbias, dsinks))
    found = list[Any]()
    for like, x in ((bias, dbias), (sinks, dsinks)):
        if x is None or like is None:
            found.append(None)
            continue
        sum_over_ranks(local.run, x)
        output = caller.allocate(like.shape, like.dtype, o.q if isinstance(like.source, (list, tuple)) else like)
        memory.copy(output.view.broadcast_to(x.shape), x)
        found.append(output.finish())
    return Grads(dq.finish(), dk.finish(), dv.finish(), *found)
