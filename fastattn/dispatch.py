"""The flow that the public functions share: caller's arrays -> Views -> Problem -> engine -> results in the caller's
kind and layout.
"""
from __future__ import annotations

from typing import Any

from . import repeat
from .arrays.convert import Caller
from .arrays.readers import written
from .arrays.view import FLOATS, Device, Output, View, overlap
from .eight_bit import refuse_backward
from .errors import message
from .memo import Recent
from .options import SCALES, Check, Options
from .problem import Grads, Operands, Problem, check_array, is_plain, problem_of
from .registry import choose

_problems: Recent[Any, Problem] = Recent()
Scores = tuple[Any, Any, Any, Any]      # bias, mask, alibi_slopes, sinks
PLAIN: Scores = (None, None, None, None)
Lengths = tuple[Any, Any, Any, Any]     # cu_seqlens_q, cu_seqlens_k, seqused_k, diagonal of each sequence


# ---------------------------------------------------------------- arrays in
def read(call: str, layout: str, stream: Any, qkv: tuple[Any, Any, Any], scores: tuple[Any, Any, Any, Any],
         lengths: Lengths | None = None, scales: tuple[Any, ...] | None = None,
         flex: Any = None) -> tuple[Caller, Operands]:
    """The call, and canonical Views of its arrays.

    `scores` is (bias, mask, alibi_slopes, sinks); `lengths` of packed arrays is (cu_seqlens_q, cu_seqlens_k,
    seqused_k, diagonal where it is an array); `scales` are those of options.SCALES that are arrays;
    `flex` are the call's Functions.
    """
    packed = lengths is not None
    if layout not in (("thd",) if packed else ("bshd", "bhsd")):
        other = "attention" if packed else "attention_varlen takes packed arrays, layout 'thd'"
        raise ValueError(message(call, "layout", f"is {layout!r}", "'thd'" if packed else "'bshd' or 'bhsd'",
                                 f"{other} takes 'bshd' and 'bhsd'" if packed else other))
    q, k, v = qkv
    caller = Caller(call, layout, stream, "q", q)
    o = Operands(caller.first, caller.tokens(k, "k"), caller.tokens(v, "v"))
    if lengths is not None:
        o.cu_seqlens_q, o.cu_seqlens_k = caller.small(lengths[0], "cu_seqlens_q"), caller.small(lengths[1], "cu_seqlens_k")
        o.seqused_k = None if lengths[2] is None else caller.small(lengths[2], "seqused_k")
        o.diagonals = None if lengths[3] is None else caller.small(lengths[3], "diagonal")
    bias, mask, alibi_slopes, sinks = scores
    if bias is not None:
        o.bias = caller.view(bias, "bias")
    if mask is not None:
        o.mask = caller.view(mask, "mask")
    if alibi_slopes is not None:
        o.alibi_slopes = caller.small(alibi_slopes, "alibi_slopes", o.q.compute_dtype)
    if sinks is not None:
        o.sinks = caller.small(sinks, "sinks", o.q.compute_dtype)
    if scales is not None:
        o.q_scale, o.k_scale, o.v_scale, o.out_scale = [
            None if x is None else caller.small(x, name, "float32") for name, x in zip(SCALES, scales, strict=True)]
    if flex is not None:
        from .flex.read import read_flex

        o.flex = read_flex(caller, flex)
    return caller, o


def _problem(caller: Caller, o: Operands, options: Options) -> tuple[Problem, Operands]:
    """`problem_of`, cached for calls that shapes, dtypes, devices and options describe completely: 1 us instead of 6.

    Engines may keep what they chose for a Problem by its identity, because such calls share one.
    """
    key: Any = None
    if o.plain and not (o.packed and o.q.device[0] == "cpu"):       # in host memory the values of lengths are checked too
        q, k, v = o.q, o.k, o.v
        key = (caller.call, options, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        if o.packed:
            lengths = (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k, o.diagonals)
            key += tuple([x and (x.shape, x.dtype, x.device) for x in lengths])
        found = _problems.get(key)
        if found is not None:
            return found, o
    try:
        problem, o = problem_of(caller.call, o, options)
    except (TypeError, ValueError) as error:
        if caller.bhsd:
            error.add_note("Shapes in this message are in the order (batch, seqlen, num_heads, head_dim).")
        raise
    if key is not None:
        _problems[key] = problem
    return problem, o


# ---------------------------------------------------------------- calls that may have occurred before


def forward_again(call: str, engine: str | None, options: Options, layout: str, return_lse: bool, qkv: tuple[Any, Any, Any],
                  scores: Scores = PLAIN, lengths: Lengths | None = None) -> Any:
    """`forward` on the current stream, into new memory, by repeat.py where the call has occurred before."""
    more, which = _present(scores, lengths)
    key, results = repeat.replay(call, engine, qkv + more, (options, layout, return_lse, engine, which))
    if results is not None:
        return tuple(results) if return_lse else results[0]
    caller, o = read(call, layout, None, qkv, scores, lengths)
    return forward(caller, engine, options, o, None, return_lse, key)


def backward_again(call: str, engine: str | None, options: Options, layout: str, deterministic: bool, qkv: tuple[Any, Any, Any],
                   given: tuple[Any, Any, Any, Any], scores: Scores = PLAIN, lengths: Lengths | None = None,
                   need_dbias: bool = False) -> Grads[Any]:
    """`backward` on the current stream, by repeat.py where the call has occurred before."""
    more, which = _present(scores, lengths)
    arrays = qkv + more + (given[:3] if given[3] is None else given)
    key, results = repeat.replay(call, engine, arrays, (options, layout, deterministic, engine, which, need_dbias))
    if results is not None:
        if len(results) == 3:
            return Grads(*results)
        dq, dk, dv, *rest = results
        return Grads(dq, dk, dv, rest[0] if need_dbias else None, None if scores[3] is None else rest[-1])
    caller, o = read(call, layout, None, qkv, scores, lengths)
    return backward(caller, engine, options, o, given, need_dbias, deterministic, key)


def _present(scores: Scores, lengths: Lengths | None) -> tuple[tuple[Any, ...], Any]:
    """The operands that a call has besides q, k, v, in the order of Operands, and which they are, as a plain value."""
    if lengths is None and is_plain(*scores):
        return (), None
    more = scores if lengths is None else scores + lengths
    return tuple([x for x in more if x is not None]), tuple([x is None for x in more])


# ---------------------------------------------------------------- an engine, and results out
def forward(caller: Caller, engine: str | None, options: Options, o: Operands, out: Any, return_lse: bool, key: Any = None) -> Any:
    """out, or (out, lse). `key` is the call's in repeat.py, None where it cannot be repeated there."""
    problem, ready = _problem(caller, o, options)
    given = None if out is None else given_out(caller, out, problem, o)
    chosen = choose(caller.call, engine, o.q.device)
    output = caller.output(problem.out_shape, problem.out_dtype, o.q) if given is None else given
    lse = caller.allocate(problem.lse_shape, problem.lse_dtype, o.q) if return_lse else None
    where, results = (output.view, None if lse is None else lse.view), (output,) if lse is None else (output, lse)
    chosen.forward(problem, ready, *where, caller.handle)
    if key is not None:
        repeat.remember(key, chosen, getattr(chosen, "prepare", None), (problem, ready, *where), results)
    return output.finish() if lse is None else (output.finish(), lse.finish())


def given_out(caller: Caller, out: Any, problem: Problem, o: Operands) -> Output:
    """A caller's `out`: the right array, writable, and sharing no element with an input, which an engine may still
    read.
    """
    view = caller.view(out, "out")
    check_array(caller.call, "out", view, caller.shape(problem.out_shape), problem.out_dtype, o.q.device, output=True)
    names = {"k": "k_cache", "v": "v_cache"} if o.cache is not None else {}
    for part, called in ((o, names), (o.cache, {})):
        for name in () if part is None else part.__slots__:
            x = getattr(part, name)
            if isinstance(x, View) and overlap(view, x):
                raise _shared(caller.call, called.get(name, name))
    for name, x in {} if o.flex is None else o.flex.views.items():
        if overlap(view, x):
            raise _shared(caller.call, name)
    output = Output(view, out, written(out))
    return output.bshd() if caller.bhsd else output


def _shared(call: str, name: str) -> ValueError:
    return ValueError(message(call, "out", f"shares memory with {name}", "memory of its own", "out=None allocates it"))


def backward(caller: Caller, engine: str | None, options: Options, o: Operands, given: tuple[Any, Any, Any, Any], need_dbias: bool,
             deterministic: bool, key: Any = None, need_dcaptured: bool = False) -> Grads[Any]:
    """The gradients, each of the kind of its input's array. `given` is (dout, out, lse, dlse), `key` as in `forward`."""
    call, device = caller.call, o.q.device
    refuse_backward(Check(call), o.q, o.k, o.v)
    problem, ready = _problem(caller, o, options)
    if need_dbias and o.bias is None:
        raise ValueError(message(call, "need_dbias", "is True", "a bias to differentiate", "pass bias= or need_dbias=False"))
    if need_dcaptured and not (o.flex is not None and o.flex.score_arrays):
        raise ValueError(message(call, "need_dcaptured", "is True", "a score_mod with arrays to differentiate",
                                 "pass them in captured=, or need_dcaptured=False"))
    shape = caller.shape(problem.out_shape)
    dtypes = (problem.dtype, problem.out_dtype) if problem.float32_out else (problem.dtype,)
    dout, out = _checked(caller, "dout", given[0], shape, dtypes, device), _checked(caller, "out", given[1], shape, dtypes, device)
    lse = _checked(caller, "lse", given[2], problem.lse_shape, (problem.lse_dtype,), device)
    dlse = None if given[3] is None else _checked(caller, "dlse", given[3], problem.lse_shape, (problem.lse_dtype,), device)
    if caller.bhsd:
        dout, out = dout.bshd(), out.bshd()
    chosen = choose(call, engine, device)
    dq, dk, dv = [caller.output(x.shape, problem.out_dtype, x) for x in (o.q, o.k, o.v)]
    dbias = caller.allocate(o.bias.shape, o.bias.dtype, o.bias) if need_dbias and o.bias is not None else None
    dsinks = None
    if o.sinks is not None:
        dsinks = caller.allocate(o.sinks.shape, o.sinks.dtype, o.q if isinstance(o.sinks.source, (list, tuple)) else o.sinks)
    dcaptured = _captured(caller, o) if need_dcaptured else None
    views = Grads(dq.view, dk.view, dv.view, None if dbias is None else _four_axes(dbias.view), None if dsinks is None else dsinks.view,
                  None if dcaptured is None else tuple([x and x.view for x in dcaptured]))
    where = problem, ready, dout, out, lse, dlse, views
    chosen.backward(*where, caller.handle, deterministic)
    if key is not None:
        repeat.remember(key, chosen, getattr(chosen, "prepare_backward", None), (*where, deterministic),
                        [x for x in (dq, dk, dv, dbias, dsinks) if x is not None])
    return Grads(dq.finish(), dk.finish(), dv.finish(), None if dbias is None else dbias.finish(),
                 None if dsinks is None else dsinks.finish(), None if dcaptured is None else _entries(o, dcaptured))


def _captured(caller: Caller, o: Operands) -> tuple[Output | None, ...]:
    """For each array of score_mod the gradient's, if it has one."""
    assert o.flex is not None
    return tuple([caller.allocate(x.shape, x.dtype, x) if x.dtype in FLOATS else None for x in o.flex.score_arrays])


def _entries(o: Operands, dcaptured: tuple[Output | None, ...]) -> tuple[Any, ...]:
    """The gradients in the order of Grads.dcaptured."""
    assert o.flex is not None
    arrays = [None if x is None else x.finish() for x in dcaptured]
    return tuple([None if n is None else arrays[n] for n in o.flex.entries])


def _checked(caller: Caller, name: str, x: Any, shape: tuple[int, ...], dtypes: tuple[str, ...], device: Device) -> View:
    """The View of an array of exactly this shape, in the caller's layout, and one of these dtypes."""
    view = caller.view(x, name)
    check_array(caller.call, name, view, shape, dtypes, device)
    return view


def _four_axes(x: View) -> View:
    return x.broadcast_to((1,) * (4 - len(x.shape)) + x.shape)
