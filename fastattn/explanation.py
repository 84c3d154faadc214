"""`explain`: which engine and Config a call uses, and why not each other engine. Nothing is run; no GPU is needed."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Never

from . import api, api_packed, registry
from .arrays.view import CPU, FLOATS, ITEMSIZE, Device, View, contiguous
from .engine import BUILT_IN, FAMILIES, Engine, load
from .errors import message
from .flex.intervals import NONE, SOME, tile_states
from .flex.operands import FlexOperands
from .problem import Grads, Operands, Problem

MOST_TILES = 1 << 18        # of a mask_mod that are counted


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a call would run. `str` of it is a readable page.

    Attributes
    ----------
    call : str
        The function's name.
    device : str
        The memory and, on CUDA, its architecture.
    engine : str or None
        None where no engine accepts the call.
    config : str
        Tiles and stages of each kernel, or the CPU engine's instruction set and threads.
    kernels : tuple of str
        Keys of all kernels that are launched, as in the log of compilations and in ``fastattn precompile``.
    reasons : mapping of str to str
        Why not, for each engine that does not run the call.
    notes : tuple of str
        What looks like a mistake, though the call is valid; of a mask_mod on a GPU how many tiles are skipped; of a call of
        fastattn.distributed its method, and why.
    """

    call: str
    device: str
    engine: str | None
    config: str
    kernels: tuple[str, ...]
    reasons: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.call} on {self.device}: {self.engine or 'no engine takes it'}" + (f" ({self.config})" if self.config else "")]
        lines += [f"  launches {kernel}" for kernel in self.kernels]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Caught:
    """A call that was stopped before an engine ran it.

    `where`: the arguments of an Engine's forward or backward after the problem. `assumed`: its arrays are addresses only.
    """

    engine: str | None
    direction: str
    problem: Problem
    where: tuple[Any, ...]
    remarks: tuple[str, ...] = ()
    assumed: bool = False


class _Stop(BaseException):
    """Unwinds a call at the point where an engine would run it."""

    def __init__(self, caught: _Caught) -> None:
        self.caught = caught


def explain(call: Callable[..., Any] | Problem, /, *arguments: Any, device: str | None = None, **keywords: Any) -> Explanation:
    """Which engine a call would use, its Config and its kernels, and why not each other engine. Nothing is run.

    Parameters
    ----------
    call : callable or Problem
        attention, attention_backward, attention_varlen, attention_varlen_backward, or a function that calls one of
        them, of fastattn.compat for example: its first attention call is explained. Functions of fastattn.distributed
        send nothing then. Or a Problem, whose operands are
        taken as contiguous.
    *arguments
        Those of the call. The two backward functions also accept the forward's arrays alone; then dout, out and lse are
        taken to be what the forward would give.
    device : str, optional
        Explain the call for this memory: "cpu", or CUDA memory of an architecture, "sm_90a", "sm_80", .... It needs no
        GPU, but the packages of the GPU engine. None: where the arrays are. A Problem needs a device.
    **keywords
        Those of the call; for a Problem only `engine`.

    Returns
    -------
    Explanation
        `engine`, `config`, `kernels`, `reasons`, `notes`; ``print`` shows it as a page.

    Raises
    ------
    ValueError
        The device is unknown, or the call raises it.
    TypeError
        No attention function is called, or the call raises it. UnsupportedError is not raised: then `engine` is None.

    Notes
    -----
    Results are allocated as in the call, because their alignment decides too, and freed. A registered engine that would refuse a
    call only because of its arrays is named as the one that runs it. Nothing is read but lengths, and what a mask_mod reads, so
    ``np.empty`` is enough to ask about a shape: the system gives it no memory until it is written.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.ones((1, 4, 2, 64), np.float16)
    >>> found = fastattn.explain(fastattn.attention, x, x, x, causal=True)
    >>> found.engine, found.reasons["sm90"]
    ('cpu', 'it reads CUDA memory')
    """
    if isinstance(call, Problem):
        named = keywords.pop("engine", None)
        if arguments or keywords:
            raise TypeError("explain(): a Problem has no arguments but device and engine.")
        if device is None:
            raise ValueError(message("explain", "device", "is None", "'cpu' or an architecture, 'sm_90a', because a Problem has none"))
        caught = _assumed(call, named)
    else:
        caught = _backward_of_inputs(call, arguments, keywords) or _catch(call, arguments, keywords)
    memory, d, where = _device(device, caught)
    asked, by = registry.order(caught.problem.call, caught.engine, registry.in_use(), memory)
    reasons, taken = dict[str, str](), None
    for engine in asked:
        reason = _refuses(engine, caught, d, asked)
        if reason is not None:
            reasons[engine.name] = reason
        elif taken is not None:
            reasons[engine.name] = f"it comes after {taken.name}"
        else:
            taken = engine
    for engine in registry.engines():
        if engine is not taken and engine.name not in reasons:
            reasons[engine.name] = _left_out(engine, memory, by)
    kernels, config, notes = _kernels(taken, caught, d)
    return Explanation(caught.problem.call, where, taken.name if taken else None, config, kernels, reasons,
                       (*_notes(caught), *notes, *_of_tiles(caught, kernels)))


def _notes(caught: _Caught) -> tuple[str, ...]:
    """What a valid call may not mean: heads and sequence swapped, a padding mask that is read as (seqlen_q, seqlen_k)."""
    p, o, notes = caught.problem, caught.where[0], list(caught.remarks)
    plain = o.q.strides[1] > o.q.strides[2]                 # rows outside heads: no transposed view and no layout="bhsd"
    if plain and not p.packed and p.num_heads > max(p.seqlen_q, p.seqlen_k):
        notes.append(f"num_heads = {p.num_heads} is above seqlen_q = {p.seqlen_q} and seqlen_k = {p.seqlen_k}; if the arrays are (batch, "
                     "num_heads, seqlen, head_dim), as torch has them, pass layout='bhsd'")
    if o.mask is not None and len(getattr(o.mask.source, "shape", ())) == 2 and p.batch == p.seqlen_q > 1:
        notes.append("mask has two axes and is read as (seqlen_q, seqlen_k); if it is (batch, seqlen_k), pass mask[:, None, None, :]")
    return tuple(notes)


def _of_tiles(caught: _Caught, kernels: Iterable[str]) -> Iterable[str]:
    """How many tiles a mask_mod leaves to the kernels that skip the others, which have a kernel "bitmap 128x64 ..." before them."""
    p, flex = caught.problem, caught.where[0].flex
    for kernel in kernels:
        name, size, *order = kernel.split()[:3]
        if name != "bitmap":
            continue
        block = int(size.split("x")[0]), int(size.split("x")[1])
        by_keys, number = order == ["by_keys"], p.batch * p.num_heads * -(-p.seqlen_q // block[0]) * -(-p.seqlen_k // block[1])
        what = f"tiles of {block[0]} rows x {block[1]} keys{', in the order of keys' * by_keys}"
        unread = caught.assumed or any(x.device != CPU for x in flex.mask_arrays)
        if flex.blocks is not None or (unread and flex.mask_arrays) or p.packed or number > MOST_TILES:
            yield f"{what}: which are skipped, print(block_mask(...)) shows"
            continue
        states = tile_states(flex.flex.mask_mod, [x.numpy() for x in flex.mask_arrays], flex.mask_numbers, p.batch, p.num_heads, p.seqlen_q,
                             p.seqlen_k, block)
        none, some = int((states == NONE).sum()), int((states == SOME).sum())
        yield f"{what}: of {states.size}, {none} are skipped, in {some} pairs are masked, {states.size - none - some} are whole"


def _catch(call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Caught:
    """The first attention call that call(*arguments, **keywords) makes."""
    def recorder(engine: str | None) -> Engine:
        def stop(direction: str) -> Callable[..., Never]:
            def run(problem: Problem, *where: Any) -> Never:
                raise _Stop(_Caught(engine, direction, problem, where))
            return run
        return Engine("explain", "", stop("forward"), stop("backward"), lambda problem: None, caches=True)
    remarks = list[str]()
    token = registry.remarks.set(remarks)
    try:
        with registry.scope(recorder):
            call(*arguments, **keywords)
    except _Stop as stopped:
        return replace(stopped.caught, remarks=tuple(remarks))
    finally:
        registry.remarks.reset(token)
    name = getattr(call, "__name__", repr(call))
    raise TypeError(message("explain", "call", f"is {name}, which called no attention", "fastattn.attention, attention_backward, "
                            "attention_varlen, attention_varlen_backward, or a function that calls one"))


def _backward_of_inputs(call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Caught | None:
    """A backward's call made from its forward's arguments.

    None where call is no backward, or dout, out or lse is given too.
    """
    forward: Callable[..., Any]
    arrays: tuple[str, ...]
    if call is api.attention_backward:
        forward, arrays = api.attention, ("q", "k", "v")
    elif call is api_packed.attention_varlen_backward:
        forward, arrays = api_packed.attention_varlen, ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    else:
        return None
    named = [name for name in arrays if name in keywords]
    if not {"dout", "out", "lse"}.isdisjoint(keywords) or len(arguments) + len(named) != len(arrays):
        return None
    own = {name: keywords.get(name) for name in ("dlse", "need_dbias", "need_dcaptured", "deterministic")}
    caught = _catch(forward, arguments, {name: x for name, x in keywords.items() if name not in own} | {"return_lse": True})
    o, out, lse, stream = caught.where

    def new(x: View, shape: tuple[int, ...]) -> View:
        return View(1 << 20, shape, contiguous(shape, x.itemsize), x.dtype, x.device)
    dbias = None
    if own["need_dbias"] and o.bias is not None:            # 1 where bias broadcasts
        dbias = new(o.bias, tuple([1 if s == 0 else n for n, s in zip(o.bias.shape, o.bias.strides, strict=True)]))
    dq, dk, dv = (View(1 << 20, x.shape, contiguous(x.shape, out.itemsize), out.dtype, x.device) for x in (o.q, o.k, o.v))
    dcaptured = None
    if own["need_dcaptured"] and o.flex is not None:
        dcaptured = tuple([new(x, x.shape) if x.dtype in FLOATS else None for x in o.flex.score_arrays])
    grads = Grads(dq, dk, dv, dbias, None if o.sinks is None else new(o.sinks, o.sinks.shape), dcaptured)
    where = (o, out, out, lse, None if own["dlse"] is None else lse, grads, stream, bool(own["deterministic"]))
    return _Caught(caught.engine, "backward", replace(caught.problem, call=call.__name__), where)


def _assumed(p: Problem, engine: str | None) -> _Caught:
    """A call of the problem with contiguous operands at made-up addresses; the backward if its name is a backward's."""
    def array(shape: tuple[int, ...], dtype: str = p.dtype) -> View:
        return View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype)
    lead_q, lead_k = ((p.total_q or 0,), (p.total_k or 0,)) if p.packed else ((p.batch, p.seqlen_q), (p.batch, p.seqlen_k))
    scores, lengths = (p.batch, p.num_heads, p.seqlen_q, p.seqlen_k), array((p.batch + 1,), "int32") if p.packed else None
    o = Operands(array((*lead_q, p.num_heads, p.head_dim)), array((*lead_k, p.num_heads_k, p.head_dim)),
                 array((*lead_k, p.num_heads_k, p.head_dim_v)), array(scores, p.score.bias) if p.score.bias else None,
                 array(scores, "bool") if p.score.mask else None,
                 array((p.batch, p.num_heads), p.compute_dtype) if p.score.alibi else None,
                 array((p.num_heads,), p.compute_dtype) if p.score.sinks else None, lengths, lengths,
                 array((p.batch,), "int32") if p.seqused_k else None, array((p.batch,), "int32") if p.diagonals else None)
    if p.eight_bit is not None:
        o.k, o.v = array(o.k.shape, p.eight_bit.dtype_k), array(o.v.shape, p.eight_bit.dtype_v)
    if p.flex is not None:                                  # arrays of one element: of an index, a program asks for what there is
        score, mask = ([] if f is None else [array((1,) * x.ndim, x.dtype) for x in f.arrays] for f in (p.flex.score_mod, p.flex.mask_mod))
        numbers = [() if f is None else (0,) * len(f.numbers) for f in (p.flex.score_mod, p.flex.mask_mod)]
        rows, keys = p.flex.block or (1, 1)
        blocks = array((p.batch, p.num_heads, -(-p.seqlen_q // rows), -(-p.seqlen_k // keys)), "bool") if p.flex.block else None
        o.flex = FlexOperands(p.flex, tuple(score), numbers[0], tuple(mask), numbers[1], blocks, names=tuple(map(str, range(len(score)))))
    out, lse = array(p.out_shape, p.out_dtype), array(p.lse_shape, p.lse_dtype)
    if "backward" not in p.call:
        return _Caught(engine, "forward", p, (o, out, None, None), assumed=True)
    dq, dk, dv = [array(x.shape, p.out_dtype) for x in (o.q, o.k, o.v)]
    return _Caught(engine, "backward", p, (o, out, out, lse, None, Grads(dq, dk, dv, None, o.sinks), None, False), assumed=True)


def _device(device: str | None, caught: _Caught) -> tuple[Device, Any, str]:
    """Memory, its gpu.device.Device (an ImportError where packages are missing, None for host memory), and a readable
    name.
    """
    memory = caught.where[0].q.device
    if device is None and memory[0] == "cuda":
        d = load("gpu", caught.problem.call).device(memory[1])
        return memory, d, f"{d.name} ({d.arch})"
    if device in (None, "cpu"):
        return CPU, None, "the CPU"
    try:
        load("gpu", "explain")
    except ImportError as error:
        return ("cuda", 0), error, str(device)
    from .gpu import precompile
    from .gpu.runtime.arch import ARCHITECTURES, parse_arch
    try:
        arch = parse_arch(str(device)).name
    except ValueError:
        raise ValueError(message("explain", "device", f"is {device!r}", f"'cpu' or one of {', '.join(ARCHITECTURES)}")) from None
    return ("cuda", 0), precompile.absent_device(arch), arch


def _refuses(engine: Engine, caught: _Caught, d: Any, asked: Iterable[Engine]) -> str | None:
    if engine.name in FAMILIES:
        if isinstance(d, ImportError):
            return str(d)
        gpu, families = load("gpu", caught.problem.call), tuple(e.name for e in asked if e.name in FAMILIES)
        reasons: dict[str, str | None] = dict(gpu.reasons(_gpu_call(caught), d, families))
        return reasons[engine.name]
    try:
        return engine.refuses(caught.problem, caught.direction)
    except ImportError as error:
        if not engine.built_in:
            raise
        return str(error)


def _gpu_call(caught: _Caught) -> Any:
    from .gpu.spec import BackwardCall, Call

    if caught.direction == "forward":
        return Call(caught.problem, *caught.where[:3])
    operands, dout, out, lse, dlse, grads, _, deterministic = caught.where
    return BackwardCall(caught.problem, operands, dout, out, lse, dlse, grads, deterministic)


def _left_out(engine: Engine, memory: Device, by: str) -> str:
    """Why a call does not try the engine at all."""
    if engine.device != memory[0]:
        return f"it reads {'host' if engine.device == 'cpu' else 'CUDA'} memory"
    if by:
        return f"{by} does not name it"
    return "it runs only where it is named" if engine.built_in else "it is registered, but not activated"


def _kernels(engine: Engine | None, caught: _Caught, d: Any) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Keys of the kernels, the Config of each, and notes. A key is "forward_sm90 <Spec> | <Config>"."""
    if engine is None or not engine.built_in:
        return (), "", ()
    if engine is BUILT_IN["reference"]:
        return (), "float64 NumPy", ()
    if engine is BUILT_IN["cpu"]:
        from . import cpu
        from .cpu.plan import team_for

        return (), f"{cpu.instruction_set()}, threads {team_for(caught.problem, cpu.get_num_threads()).threads}", ()
    from .gpu import precompile
    from .gpu.spec import make_backward_spec, make_spec

    call = _gpu_call(caught)
    if caught.direction == "forward" and 0 in call.out.shape:
        return (), "", ()
    spec = make_spec(call.problem, call.operands, call.lse is not None) if caught.direction == "forward" else make_backward_spec(call)
    with registry.use_engine(engine.name):
        sources = {source.key: source for source in precompile.sources(call, spec, d)}
    parts = [key.partition(" | ") for key in sources]
    notes = _of_registers(sources.values(), d.arch) if spec.traced else ()
    return tuple(sources), "; ".join(f"{head.split()[0]} {config}" for head, _, config in parts if config), tuple(notes)


def _of_registers(sources: Iterable[Any], arch: str) -> Iterable[str]:
    """Of kernels with functions, whose tiling is chosen by their registers, if they are compiled."""
    from .gpu.runtime.compile import known
    from .gpu.runtime.frame import frame_bytes, register_count

    for source in sources:
        if "_mod=" in source.key and (made := known(source, arch)) is not None:
            memory = f"{frame_bytes(made.code)} bytes in local memory" if frame_bytes(made.code) else "nothing in local memory"
            yield f"{source.key.split()[0]}: {register_count(made.code)} registers a thread at its start, {memory}"
