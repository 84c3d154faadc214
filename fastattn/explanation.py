"""`explain`: which engine and Config a call takes, and why each other engine does not. Nothing is run; no GPU is needed."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Never

from . import api, registry
from .arrays.view import CPU, ITEMSIZE, Device, View, contiguous
from .engine import BUILT_IN, FAMILIES, Engine, load
from .errors import message
from .problem import Grads, Operands, Problem


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call takes; `str` of it is a page for people.

    `engine` is None where no engine takes the call. `reasons`: why not, of each engine that does not run it. `config`: tiles and stages of
    each kernel, or the CPU engine's instruction set and threads. `kernels`: keys of all that is launched, as the log of compilations
    and `fastattn precompile` have them.
    """

    call: str
    device: str
    engine: str | None
    config: str
    kernels: tuple[str, ...]
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.call} on {self.device}: {self.engine or 'no engine takes it'}" + (f" ({self.config})" if self.config else "")]
        lines += [f"  launches {kernel}" for kernel in self.kernels]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A call on its way to an engine; `where` is what forward or backward of an Engine get after the problem."""

    engine: str | None
    direction: str
    problem: Problem
    where: tuple[Any, ...]


class _Stop(BaseException):
    """Ends a call where an engine would run it."""

    def __init__(self, seen: _Seen) -> None:
        self.seen = seen


def explain(call: Callable[..., Any] | Problem, /, *arguments: Any, device: str | None = None, **keywords: Any) -> Explanation:
    """Which engine the call takes, its Config and its kernels, and why each other engine does not take it. Nothing is run.

    call        attention, attention_backward, attention_varlen, attention_varlen_backward or a function that calls one of them (of
                fastattn.compat, say), with the arguments that it would be called with; its first attention call is explained. Results are
                allocated as in the call, because their place decides too, and let go. attention_backward and attention_varlen_backward
                take the forward's arrays alone, too: dout, out and lse are then taken for what the forward would give. Or a Problem, its
                operands taken for contiguous; then `engine` is the one keyword.
    device      explain it for this memory: "cpu", or CUDA memory of an architecture, "sm_90a", "sm_80", ..., which needs no GPU but the
                packages of the GPU engine. None: where the arrays are; a Problem needs one.

    A registered engine that refuses a call only once it has seen the arrays is named as the one that takes it. Raises what the call
    raises, but for UnsupportedError: then `engine` of the result is None. ValueError for another device, TypeError where nothing is called.

        print(fastattn.explain(fastattn.attention, q, k, v, causal=True))
        fastattn.explain(fastattn.attention, q, k, v, device="sm_90a").engine       # q, k and v are NumPy arrays
    """
    if isinstance(call, Problem):
        named = keywords.pop("engine", None)
        if arguments or keywords:
            raise TypeError("explain(): a Problem has no arguments but device and engine.")
        if device is None:
            raise ValueError(message("explain", "device", "is None", "'cpu' or an architecture, 'sm_90a', because a Problem has none"))
        seen = _assumed(call, named)
    else:
        seen = _backward_of_inputs(call, arguments, keywords) or _caught(call, arguments, keywords)
    memory, d, where = _device(device, seen)
    asked, by = registry.order(seen.problem.call, seen.engine, registry.in_use(), memory)
    reasons, taken = dict[str, str](), None
    for engine in asked:
        reason = _refuses(engine, seen, d)
        if reason is not None:
            reasons[engine.name] = reason
        elif taken is not None:
            reasons[engine.name] = f"it comes after {taken.name}"
        else:
            taken = engine
    for engine in registry.engines():
        if engine is not taken and engine.name not in reasons:
            reasons[engine.name] = _left_out(engine, memory, by)
    kernels, config = _kernels(taken, seen, d)
    return Explanation(seen.problem.call, where, taken.name if taken else None, config, kernels, reasons)


def _caught(call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Seen:
    """The first attention call that call(*arguments, **keywords) makes."""
    def recorder(engine: str | None) -> Engine:
        def stop(direction: str) -> Callable[..., Never]:
            def run(problem: Problem, *where: Any) -> Never:
                raise _Stop(_Seen(engine, direction, problem, where))
            return run
        return Engine("explain", "", stop("forward"), stop("backward"), lambda problem: None)
    try:
        with registry.scope(recorder):
            call(*arguments, **keywords)
    except _Stop as stopped:
        return stopped.seen
    name = getattr(call, "__name__", repr(call))
    raise TypeError(message("explain", "call", f"is {name}, which called no attention", "fastattn.attention, attention_backward, "
                            "attention_varlen, attention_varlen_backward, or a function that calls one"))


def _backward_of_inputs(call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Seen | None:
    """The call of a backward from the arguments of its forward; None where call is none, or dout, out or lse is given too."""
    forward: Callable[..., Any]
    arrays: tuple[str, ...]
    if call is api.attention_backward:
        forward, arrays = api.attention, ("q", "k", "v")
    elif call is api.attention_varlen_backward:
        forward, arrays = api.attention_varlen, ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    else:
        return None
    named = [name for name in arrays if name in keywords]
    if not {"dout", "out", "lse"}.isdisjoint(keywords) or len(arguments) + len(named) != len(arrays):
        return None
    own = {name: keywords.get(name) for name in ("dlse", "need_dbias", "deterministic")}
    seen = _caught(forward, arguments, {name: x for name, x in keywords.items() if name not in own} | {"return_lse": True})
    o, out, lse, stream = seen.where

    def new(x: View, shape: tuple[int, ...]) -> View:
        return View(1 << 20, shape, contiguous(shape, x.itemsize), x.dtype, x.device)
    dbias = None
    if own["need_dbias"] and o.bias is not None:            # 1 where bias broadcasts
        dbias = new(o.bias, tuple([1 if s == 0 else n for n, s in zip(o.bias.shape, o.bias.strides, strict=True)]))
    dq, dk, dv = (new(x, x.shape) for x in (o.q, o.k, o.v))
    grads = Grads(dq, dk, dv, dbias, None if o.sinks is None else new(o.sinks, o.sinks.shape))
    where = (o, out, out, lse, None if own["dlse"] is None else lse, grads, stream, bool(own["deterministic"]))
    return _Seen(seen.engine, "backward", replace(seen.problem, call=call.__name__), where)


def _assumed(p: Problem, engine: str | None) -> _Seen:
    """A call of the problem with contiguous operands at addresses that are never used; of the backward if its name says so."""
    def array(shape: tuple[int, ...], dtype: str = p.dtype) -> View:
        return View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype)
    lead_q, lead_k = ((p.total_q or 0,), (p.total_k or 0,)) if p.packed else ((p.batch, p.seqlen_q), (p.batch, p.seqlen_k))
    scores, lengths = (p.batch, p.num_heads, p.seqlen_q, p.seqlen_k), array((p.batch + 1,), "int32") if p.packed else None
    o = Operands(array((*lead_q, p.num_heads, p.head_dim)), array((*lead_k, p.num_heads_k, p.head_dim)),
                 array((*lead_k, p.num_heads_k, p.head_dim_v)), array(scores, p.score.bias) if p.score.bias else None,
                 array(scores, "bool") if p.score.mask else None,
                 array((p.batch, p.num_heads), p.compute_dtype) if p.score.alibi else None,
                 array((p.num_heads,), p.compute_dtype) if p.score.sinks else None, lengths, lengths,
                 array((p.batch,), "int32") if p.seqused_k else None)
    out, lse = array(p.out_shape), array(p.lse_shape, p.lse_dtype)
    if "backward" not in p.call:
        return _Seen(engine, "forward", p, (o, out, None, None))
    return _Seen(engine, "backward", p, (o, out, out, lse, None, Grads(o.q, o.k, o.v, None, o.sinks), None, False))


def _device(device: str | None, seen: _Seen) -> tuple[Device, Any, str]:
    """Memory, the gpu.device.Device (an ImportError where its packages are missing, None for host memory), and its name for people."""
    memory = seen.where[0].q.device
    if device is None and memory[0] == "cuda":
        d = load("gpu", seen.problem.call).device(memory[1])
        return memory, d, f"{d.name} ({d.arch})"
    if device in (None, "cpu"):
        return CPU, None, "the CPU"
    try:
        load("gpu", "explain")
    except ImportError as error:
        return ("cuda", 0), error, str(device)
    from .gpu import precompile
    try:
        arch = precompile.parse_arch(str(device))
    except ValueError:
        raise ValueError(message("explain", "device", f"is {device!r}", f"'cpu' or one of {', '.join(precompile.PROCESSORS)}")) from None
    return ("cuda", 0), precompile.absent_device(arch), arch


def _refuses(engine: Engine, seen: _Seen, d: Any) -> str | None:
    if engine.name in FAMILIES:
        if isinstance(d, ImportError):
            return str(d)
        return load("gpu", seen.problem.call).refuses(engine.name, _gpu_call(seen), d)  # type: ignore[no-any-return]
    try:
        return engine.refuses(seen.problem, seen.direction)
    except ImportError as error:
        if not engine.built_in:
            raise
        return str(error)


def _gpu_call(seen: _Seen) -> Any:
    from .gpu.spec import BackwardCall, Call

    if seen.direction == "forward":
        return Call(seen.problem, *seen.where[:3])
    operands, dout, out, lse, dlse, grads, _, deterministic = seen.where
    return BackwardCall(seen.problem, operands, dout, out, lse, dlse, grads, deterministic)


def _left_out(engine: Engine, memory: Device, by: str) -> str:
    """Why a call does not ask it at all."""
    if engine.device != memory[0]:
        return f"it reads {'host' if engine.device == 'cpu' else 'CUDA'} memory"
    if by:
        return f"{by} does not name it"
    return "it runs only where it is named" if engine.built_in else "it is registered, but not activated"


def _kernels(engine: Engine | None, seen: _Seen, d: Any) -> tuple[tuple[str, ...], str]:
    """Keys of the kernels, and the Config of each. A key is "forward_sm90 <Spec> | <Config>"."""
    if engine is None or not engine.built_in:
        return (), ""
    if engine is BUILT_IN["reference"]:
        return (), "float64 NumPy"
    if engine is BUILT_IN["cpu"]:
        from . import cpu
        from .cpu.plan import threads_for

        return (), f"{cpu.instruction_set()}, threads {threads_for(seen.problem, cpu.get_num_threads())}"
    from .gpu import precompile
    from .gpu.spec import make_backward_spec, make_spec

    call = _gpu_call(seen)
    if seen.direction == "forward" and 0 in call.out.shape:
        return (), ""
    spec = make_spec(call.problem, call.operands, call.lse is not None) if seen.direction == "forward" else make_backward_spec(call)
    with registry.use_engine(engine.name):
        keys = tuple(dict.fromkeys(source.key for source in precompile.sources(call, spec, d)))
    parts = [key.partition(" | ") for key in keys]
    return keys, "; ".join(f"{head.split()[0]} {config}" for head, _, config in parts if config)
