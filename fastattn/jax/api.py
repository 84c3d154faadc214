"""The public functions: arguments are told apart, nothing is computed."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Never, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from .. import registry
from ..arrays import words
from ..arrays.convert import small
from ..arrays.view import CPU, View
from ..errors import message
from ..flex.operands import functions_of
from ..options import Options, read_options
from ..signature import hiding, unknown_arguments
from ..types import (
    Array,
    BlockMask,
    Captured,
    Causal,
    EngineName,
    FrameworkOptions,
    Integer,
    Lengths,
    MaskMod,
    Number,
    PackedFrameworkOptions,
    ScoreMod,
    Window,
)
from . import flex
from .derivative import attend
from .problems import LENGTHS, NUMBERS, traced_problem
from .record import Record

_PLACED = "a call that JAX differentiates is a problem by itself; fastattn's own function has it"
_OF_XLA = {"out": "XLA allocates the results", "stream": "XLA chooses the stream", "diagonal": _PLACED, "dropout_at": _PLACED,
           "dropout_heads": _PLACED, "out_dtype": "gradients have the dtypes of their inputs"}
_NEEDED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
_INTEGERS = ("int32", "uint32", "int64", "uint64")


@overload
def attention(q: Array, k: Array, v: Array, *, return_lse: Literal[False] = ..., **options: Unpack[FrameworkOptions]) -> jax.Array: ...
@overload
def attention(q: Array, k: Array, v: Array, *, return_lse: Literal[True],
              **options: Unpack[FrameworkOptions]) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(q: Array, k: Array, v: Array, *, return_lse: bool,
              **options: Unpack[FrameworkOptions]) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@hiding
def attention(q: Any, k: Any, v: Any, *more: Never, causal: Causal = False, window: Window | None = None,
              softmax_scale: Number | None = None, softcap: Number | None = None, alibi_slopes: Any = None, bias: Any = None,
              mask: Any = None, sinks: Any = None, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None,
              captured: Captured = (), block_mask: BlockMask | None = None, dropout_p: Number = 0.0, seed: Any = None, offset: Any = 0,
              layout: Literal["bshd", "bhsd"] = "bshd", return_lse: bool = False, deterministic: bool = False,
              engine: EngineName | None = None, **unknown: Never) -> Any:
    """`fastattn.attention` for JAX: differentiable, and part of compiled programs.

    Gradients are those of q, k, v, bias and sinks, also through lse.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        float16, bfloat16, float32 or float64 (JAX's x64 mode). A JAX array or tracer; NumPy arrays are converted as
        `jax.numpy.asarray` does.
    k : array (batch, seqlen_k, num_heads_k, head_dim)
        q's dtype; num_heads_k divides num_heads.
    v : array (batch, seqlen_k, num_heads_k, head_dim_v)
        q's dtype.
    causal, window, softmax_scale, softcap, dropout_p : optional
        As in `fastattn.attention`. Numbers are part of the compiled program, so they are no tracers.
    alibi_slopes : array (num_heads,) or (batch, num_heads), optional
        float32, float64, q's dtype, or a list. It has no gradient.
    bias : array that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        q's dtype or float32. Its gradient is computed only if it is differentiated.
    mask : array that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        bool, True where a query attends a key.
    sinks : array (num_heads,), optional
        float32, float64, q's dtype, or a list.
    score_mod, mask_mod, captured, block_mask : optional
        As in `fastattn.attention`, in Python's and NumPy's words: ``numpy.where``, not ``jax.numpy.where``. The float arrays
        that score_mod reads, captured or in its closure, have gradients. Numbers are part of the compiled program.
    seed, offset : int or array (), optional
        Of dropout, as in `fastattn.attention`. An int is part of the compiled program: a new one compiles again. An
        array of (u)int32 or (u)int64 is read when the program runs, on the CPU; on CUDA it is refused.
    layout : {"bshd", "bhsd"}, default "bshd"
        Order of the axes of q, k, v and out.
    return_lse : bool, default False
        Return (out, lse).
    deterministic : bool, default False
        Gradients with the same bits in every run. Slower on the GPU; the CPU engine is always deterministic.
    engine : str, optional
        As in `fastattn.attention`. None: those of the `use_engine` around the call while it is traced, if there is one.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        q's dtype, in the caller's layout.
    lse : array (batch, num_heads, seqlen_q)
        Only with ``return_lse``: float32 (float64 for float64 input).

    Raises
    ------
    ValueError, TypeError
        An argument is wrong, as far as shapes and dtypes tell: raised while JAX traces, with the text of
        `fastattn.attention`. What is found when the program runs is an error of JAX, a JaxRuntimeError or ValueError,
        with that text: INVALID_ARGUMENT, UNIMPLEMENTED where no engine takes the call, RESOURCE_EXHAUSTED without
        memory.

    Notes
    -----
    jax.jvp and second derivatives are refused by an error. Under vmap the mapped axis becomes part of the batch; calls
    with dropout, with sinks of their own, and packed calls run one after the other.

    Examples
    --------
    >>> import jax
    >>> import numpy as np
    >>> from fastattn.jax import attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4, 8), np.float32)
    >>> step = jax.jit(jax.grad(lambda q: attention(q, k, v, causal=True).sum()))
    >>> step(q).shape
    (2, 5, 4, 8)
    """
    if more or unknown:
        raise _unknown(attention, more, unknown)
    call = "attention"
    if layout not in ("bshd", "bhsd"):
        raise ValueError(message(call, "layout", f"is {layout!r}", "'bshd' or 'bhsd'", "attention_varlen takes packed arrays"))
    arrays = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
    options, numbers = _options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    functions, held = flex.read(call, functions_of(score_mod, mask_mod, captured, block_mask))
    found = {**_arrays(call, arrays), **numbers, **{name: _array(call, name, x) for name, x in held.items()}}
    return _call(call, found, options, layout, engine, return_lse, deterministic, functions)


@overload
def attention_varlen(q: Array, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: Literal[False] = ...,
                     **options: Unpack[PackedFrameworkOptions]) -> jax.Array: ...
@overload
def attention_varlen(q: Array, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: Literal[True],
                     **options: Unpack[PackedFrameworkOptions]) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention_varlen(q: Array, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: bool,
                     **options: Unpack[PackedFrameworkOptions]) -> jax.Array | tuple[jax.Array, jax.Array]: ...
@hiding
def attention_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *more: Never, max_seqlen_q: Integer | None = None,
                     max_seqlen_k: Integer | None = None, seqused_k: Any = None, causal: Causal = False,
                     window: Window | None = None, softmax_scale: Number | None = None,
                     softcap: Number | None = None, alibi_slopes: Any = None, bias: Any = None, mask: Any = None, sinks: Any = None,
                     score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None, captured: Captured = (),
                     block_mask: BlockMask | None = None, dropout_p: Number = 0.0, seed: Any = None, offset: Any = 0,
                     layout: Literal["thd"] = "thd",
                     return_lse: bool = False, deterministic: bool = False, engine: EngineName | None = None, **unknown: Never) -> Any:
    """`fastattn.attention_varlen` for JAX: sequences of different lengths, packed along one axis.

    Parameters
    ----------
    q : array (total_q, num_heads, head_dim)
        As in `attention`, of fastattn.jax.
    k : array (total_k, num_heads_k, head_dim)
        q's dtype; num_heads_k divides num_heads.
    v : array (total_k, num_heads_k, head_dim_v)
        q's dtype.
    cu_seqlens_q, cu_seqlens_k : array (sequences + 1,)
        int32 or int64, cumulative lengths in rows: 0 first, never decreasing, the last at most total_q or total_k. A
        tracer, an array or a list.
    max_seqlen_q, max_seqlen_k : int, optional
        At least the longest sequence. Default: the longest of lengths that are lists or NumPy arrays; otherwise, as
        their numbers are not known while JAX traces, total_q and total_k.
    seqused_k : array (sequences,), optional
        int32 or int64: only the first seqused_k[n] keys of sequence n exist.
    alibi_slopes : array (num_heads,) or (sequences, num_heads), optional
    bias, mask : array that broadcasts to (sequences, num_heads, max_seqlen_q, max_seqlen_k), optional
        Indexed inside each sequence.
    causal, window, softmax_scale, softcap, sinks, dropout_p, seed, offset : optional
        As in `attention`, inside each sequence.
    score_mod, mask_mod, captured, block_mask : optional
        As in `attention`, of fastattn.jax.
    layout : {"thd"}
        The one layout of packed arrays.
    return_lse, deterministic, engine : optional
        As in `attention`.

    Returns
    -------
    out : array (total_q, num_heads, head_dim_v)
        Rows of no sequence are 0.
    lse : array (num_heads, total_q)
        Only with ``return_lse``. Rows of no sequence are -inf.

    Raises
    ------
    ValueError, TypeError
        As `attention`. Lengths are checked when the program runs on the CPU, and not on CUDA; those given as lists or
        NumPy arrays also while JAX traces.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn.jax import attention_varlen
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 7, 4, 8), np.float32)
    >>> attention_varlen(q, k, v, [0, 3, 7], [0, 3, 7], causal=True).shape          # two sequences, of 3 and 4 rows
    (7, 4, 8)
    """
    if more or unknown:
        raise _unknown(attention_varlen, more, unknown)
    call = "attention_varlen"
    if layout != "thd":
        raise ValueError(message(call, "layout", f"is {layout!r}", "'thd'", "attention takes 'bshd' and 'bhsd'"))
    arrays = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    options, numbers = _options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    functions, held = flex.read(call, functions_of(score_mod, mask_mod, captured, block_mask))
    found = {**_arrays(call, {**arrays, **lengths}), **numbers, **{name: _array(call, name, x) for name, x in held.items()}}
    return _call(call, found, options, layout, engine, return_lse, deterministic, functions, _known_lengths(call, lengths))


def _call(call: str, arrays: dict[str, Any], options: Options, layout: str, engine: str | None, return_lse: Any, deterministic: Any,
          functions: str | None, lengths: Mapping[str, View] | None = None) -> Any:
    """Check a call, and make it. `lengths` are Views of lengths whose numbers are known."""
    _check_engine(call, engine)
    record = Record(call, tuple(arrays), ("out", "lse") if return_lse else ("out",), options, layout, engine,
                    registry.in_use() if engine is None else None, bool(deterministic), functions)
    problem = traced_problem(record, arrays, lengths)
    if record.packed:       # the program keeps the maxima of now, so that shapes that follow from them never change
        for name, n in (("max_seqlen_q", problem.seqlen_q), ("max_seqlen_k", problem.seqlen_k)):
            if not isinstance(n, int):
                raise ValueError(message(call, name, "is None", f"an int, because {name[-1]} has a symbolic shape"))
        record = replace(record, options=options._replace(max_seqlen_q=problem.seqlen_q, max_seqlen_k=problem.seqlen_k))
    found = attend(record, arrays)
    return (found["out"], found["lse"]) if return_lse else found["out"]


# ---------------------------------------------------------------- arguments
def _unknown(function: Any, more: tuple[Any, ...], unknown: Mapping[str, Any]) -> TypeError:
    for name, why in _OF_XLA.items():
        if name in unknown and not more:
            return TypeError(f"{function.__name__}(): {name} is no keyword of it in fastattn.jax, because {why}.")
    return unknown_arguments(function, more, unknown)


def _arrays(call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are there, as JAX's arrays."""
    return {name: _array(call, name, x) for name, x in given.items() if x is not None or name in _NEEDED}


def _array(call: str, name: str, x: Any) -> Any:
    if isinstance(x, jax.Array):                            # tracers are
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            raise TypeError(message(call, name, f"is {jax.typeof(x)}, sharded over axes of an explicit mesh", "an array of one device",
                                    "inside jax.shard_map each device calls it with its part"))
        return x
    listed = isinstance(x, (list, tuple)) and name in (*LENGTHS, "alibi_slopes", "sinks")
    if not listed and not isinstance(x, np.ndarray):
        raise TypeError(message(call, name, f"is {words.kind(x)}", "an array of JAX or NumPy", f"jax.numpy.asarray({name}) makes one"))
    host = small(x, None if name in LENGTHS else "float64", call, name).numpy()
    return jnp.asarray(host.astype(np.int32) if listed and name in LENGTHS else host)


def _known_lengths(call: str, lengths: Mapping[str, Any]) -> dict[str, View] | None:
    """Views of lengths, if all of them are lists or NumPy arrays."""
    given = {name: x for name, x in lengths.items() if x is not None}
    if any(isinstance(x, jax.Array) for x in given.values()):
        return None
    return {name: small(x, None, call, name) for name, x in given.items()}


def _options(call: str, causal: Any, window: Any, softmax_scale: Any, softcap: Any, dropout_p: Any, seed: Any, offset: Any,
             *maxima: Any) -> tuple[Options, dict[str, Any]]:
    """The options as plain values, and those of seed and offset that are arrays, which dropout alone reads."""
    names = ("causal", "window", "softmax_scale", "softcap", "dropout_p", "max_seqlen_q", "max_seqlen_k")
    for name, x in zip(names, (causal, window, softmax_scale, softcap, dropout_p, *maxima), strict=False):
        if any(isinstance(part, jax.core.Tracer) for part in (x if isinstance(x, (tuple, list)) else (x,))):
            raise TypeError(message(call, name, "is a JAX tracer", "a number, because it is part of the compiled program",
                                    "softmax_scale=1.0 with q * scale works" if name == "softmax_scale" else
                                    "jax.jit(..., static_argnames=...) keeps it one"))
    numbers = {name: _number(call, name, x) for name, x in zip(NUMBERS, (seed, offset), strict=True) if isinstance(x, jax.Array)}
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, 0 if "seed" in numbers else seed,
                           0 if "offset" in numbers else offset, *maxima)
    if options.dropout_p == 0:              # nothing reads them: calls that differ in them are one program
        return options._replace(seed=None, offset=0), {}
    return options, numbers


def _number(call: str, name: str, x: Any) -> Any:
    """A seed or offset that is read when the program runs."""
    hint = f"jax.random.bits(key, dtype='uint32') makes one of a key, as {name}"
    if str(x.dtype) not in _INTEGERS:
        raise TypeError(message(call, name, f"has dtype {x.dtype}", f"an int, or an array of {', '.join(_INTEGERS)}", hint))
    if x.shape != ():
        raise ValueError(message(call, name, f"has shape {x.shape}", "one number, shape ()", hint))
    return x


def _check_engine(call: str, engine: str | None) -> None:
    """ValueError for an engine that reads no memory at all: which memory it will be is not known while JAX traces."""
    if engine is None:
        return
    try:
        registry.order(call, engine, None, CPU)
    except ValueError:
        registry.order(call, engine, None, ("cuda", 0))
