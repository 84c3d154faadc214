"""vllm.attention.ops.triton_flash_attention for any array: forward attention, also with 8-bit operands or 8-bit keys and values.

Shapes by layout. D_v may differ from D; o has q's shape with v's last axis:

    thd     q (total_q, heads, D)          k (total_k, heads_k, D)          v (total_k, heads_k, D_v)       with cu_seqlens (N + 1,)
    bshd    q (batch, seqlen_q, heads, D)  k (batch, seqlen_k, heads_k, D)  v (batch, seqlen_k, heads_k, D_v)
    bhsd    q (batch, heads, seqlen_q, D)  k (batch, heads_k, seqlen_k, D)  v (batch, heads_k, seqlen_k, D_v)

The scales that are given decide the mode:

    none                            fastattn.attention or attention_varlen on q, k and v as they are
    q_descale, k_descale, v_descale q, k and v are float8_e4m3fn
    k_descale, v_descale            k and v are float8_e4m3fn, q has 16 bits (or more)

For query head h and its key head g the result is softmax(sm_scale * q_descale[h] * k_descale[g] * q.k + alibi + bias)
@ v * v_descale[g] / o_scale. What happens to each scale:

q_descale, k_descale
    A number, or 1 element in host memory, goes into softmax_scale without a rounding. One per head, or in CUDA
    memory, where the host must not read it: q times both is computed in float32 and rounded to float16, which keeps
    11 bits of the product (bfloat16 would keep 8). Magnitudes above 65504 saturate. What underflows moves a score by
    at most sm_scale * D * 2**-16, because abs(k) is at most 448. With a 16-bit q: k times k_descale, rounded to q's
    dtype, as in the original.
v_descale
    The output is multiplied by it, in float32. v stays exact. (With a 16-bit q the original rounds v * v_descale.)
p_scale
    Checked and not used: P is never rounded to 8 bits here. The original's 8-bit product of P and V needs it.
o_scale, input_scale
    The output is divided by it and clamped to +-448. It is float8_e4m3fn unless output_dtype or o says otherwise. This
    holds in both modes; the original ignores it with a 16-bit q.

A scale is a positive number or a tensor. It has 1 element, or one per query head (q_descale, p_scale) or key head
(k_descale, v_descale). o_scale and input_scale have 1 element.

8-bit operands are multiplied as float16, so P is rounded to float16 (with a 16-bit q: to q's dtype). On GPUs that is
as fast as bfloat16 and eight times as exact; on CPUs with bfloat16 instructions it is half as fast. Arrays with 8-bit
operands are NumPy's (dtype ml_dtypes.float8_e4m3fn), torch's or JAX's. The host never waits for a device.

Beyond the original: the CPU, bias with cu_seqlens and through triton_attention, a D_v of its own, head sizes to 576
on the CPU, numbers as scales, errors instead of asserts. Rows that attend nothing are 0.

Source: vLLM, vllm/attention/ops/triton_flash_attention.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..arrays import words
from ..errors import message
from ..options import Check
from ..problem import DTYPES
from . import float8
from .arrays import Shape, shape_of
from .float8 import FP8_MAX, FP8_MIN, NAME, Scale, library, name_of, read_scale, widen
from .probabilities import encode
from .translate import Call, Lengths, forward, lengths

__all__ = ["FP8_MAX", "FP8_MIN", "SUPPORTED_LAYOUTS", "MetaData", "check_and_maybe_quantize_qkv", "maybe_quantize_fp8", "scale_fp8",
           "triton_attention", "triton_attention_rocm"]
SUPPORTED_LAYOUTS = ("thd", "bhsd", "bshd")
_NAMES = {"out": "o", "softmax_scale": "sm_scale", "max_seqlen_q": "max_seqlens_q", "max_seqlen_k": "max_seqlens_k"}
_IN_SCALES = {name: f"fp8_scales[{n}] ({name})" for n, name in enumerate(("q_descale", "k_descale", "v_descale", "p_scale"))}
_TRITON_ATTENTION = Call("triton_attention", {**_NAMES, **_IN_SCALES, "o_scale": "input_scale"})
_WITH_METADATA = Call("triton_attention_rocm", _NAMES)


# ---------------------------------------------------------------- the two calls
def triton_attention(q: Any, k: Any, v: Any, o: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlens_q: int, max_seqlens_k: int,
                     causal: bool = False, sm_scale: float = 1.0, bias: Any = None, fp8_scales: Any = None,
                     input_scale: Any = None) -> tuple[Any, None]:
    """vLLM's triton_attention: attention inside each of the packed sequences.

    Parameters
    ----------
    q, k, v : array
        (total_q, heads, D), (total_k, heads_k, D), (total_k, heads_k, D_v).
    o : array or None
        Receives the output, and its dtype decides the rounding. None: a new array of q's dtype.
    cu_seqlens_q, cu_seqlens_k : array
        (N + 1,) int32 or int64: where each of the N sequences begins.
    max_seqlens_q, max_seqlens_k : int
        The longest sequences. 0: found in cu_seqlens; in CUDA memory the totals are taken, because the host does not
        read it.
    causal : bool
        Causal mask, bottom-right aligned.
    sm_scale : float
        Factor of the scores. Default 1.0, as in the original.
    bias : array, optional
        Additive, broadcasts to (N, heads, max_seqlens_q, max_seqlens_k). An assert of the original refuses every bias.
    fp8_scales : tuple, optional
        (q_scale, k_scale, v_scale, p_scale). q, k and v that are not float8_e4m3fn yet are quantised with them,
        saturating. A q_scale of None leaves q as it is.
    input_scale : number or array, optional
        The output is divided by it; see o_scale in this module's docstring.

    Returns
    -------
    tuple
        (o, None), the pair that the original returns.

    Raises
    ------
    ValueError
        Shapes, lengths or scales that do not go together.
    TypeError
        Unsupported dtypes.
    """
    call = _TRITON_ATTENTION
    if cu_seqlens_q is None and cu_seqlens_k is None:
        raise call.value("cu_seqlens_q", "is None", "cumulative lengths (N + 1,)",
                         "triton_attention_rocm with MetaData(layout='bshd') or 'bhsd' takes dense arrays")
    output_dtype = name_of(q, call, "q")
    metadata = MetaData(sm_scale, "thd", output_dtype, max_seqlens_q, max_seqlens_k, cu_seqlens_q, cu_seqlens_k, o_scale=input_scale,
                        bias=bias, causal=causal)
    if fp8_scales is not None:
        q, k, v = _quantize_all(call, q, k, v, fp8_scales)
        metadata.q_descale, metadata.k_descale, metadata.v_descale, metadata.p_scale = fp8_scales
    return _attend(call, q, k, v, o, metadata)[0], None


@dataclass(eq=False)
class MetaData:
    """vLLM's MetaData: arguments of triton_attention_rocm besides its arrays. Nothing is checked before the call.

    Parameters
    ----------
    sm_scale : float
        Factor of the scores. Default 1.0.
    layout : str
        "bshd" or "bhsd"; with cu_seqlens "thd" or None.
    output_dtype
        The output's dtype if o is None: a dtype of any library, or its name. None is float8_e4m3fn with scales, else
        q's dtype.
    max_seqlens_q, max_seqlens_k : int
        The longest sequences. May stay 0.
    cu_seqlens_q, cu_seqlens_k : array, optional
        (N + 1,) int32 or int64 for packed arrays.
    q_descale, k_descale, v_descale, p_scale, o_scale : number or array, optional
        See this module's docstring.
    bias : array, optional
        Additive, broadcasts to (batch, heads, seqlen_q, seqlen_k); float16, bfloat16 or float32.
    alibi_slopes : array, optional
        (heads,) or (batch, heads).
    seqlen_q, seqlen_k, alibi_batch, alibi_nheads : int, optional
        Not needed. They must be right if given.
    causal : bool
        Causal mask, bottom-right aligned.
    return_encoded_softmax : bool
        Return the probabilities too.
    """

    sm_scale: float = 1.0
    layout: str | None = None
    output_dtype: Any = None
    max_seqlens_q: int = 0
    max_seqlens_k: int = 0
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None
    p_scale: Any = None
    o_scale: Any = None
    bias: Any = None
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    alibi_slopes: Any = None
    alibi_batch: int | None = None
    alibi_nheads: int | None = None
    causal: bool | None = None
    return_encoded_softmax: bool = False

    def set_varlen_params(self, cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
        self.layout, self.cu_seqlens_q, self.cu_seqlens_k = "thd", cu_seqlens_q, cu_seqlens_k

    def set_eight_bit_params(self, q_descale: Any, k_descale: Any, v_descale: Any, p_scale: Any, p_descale: Any, o_scale: Any) -> None:
        """Set the scales. p_descale is 1 / p_scale and is not used."""
        self.q_descale, self.k_descale, self.v_descale, self.p_scale, self.o_scale = q_descale, k_descale, v_descale, p_scale, o_scale

    def need_bias(self, bias: Any, seqlen_q: int | None, seqlen_k: int | None) -> None:
        self.bias, self.seqlen_q, self.seqlen_k = bias, seqlen_q, seqlen_k

    def need_alibi(self, alibi_slopes: Any, batch: int | None, nheads: int | None) -> None:
        self.alibi_slopes, self.alibi_batch, self.alibi_nheads = alibi_slopes, batch, nheads

    def need_causal(self) -> None:
        self.causal = True


def triton_attention_rocm(q: Any, k: Any, v: Any, o: Any, metadata: MetaData) -> tuple[Any, Any]:
    """vLLM's triton_attention_rocm (class _attention).

    Parameters
    ----------
    q, k, v : array
        Shapes by metadata.layout; see this module's docstring.
    o : array or None
        Receives the output. None: a new array.
    metadata : MetaData
        All other arguments.

    Returns
    -------
    tuple
        (o, encoded_softmax). encoded_softmax is None unless metadata.return_encoded_softmax. It holds normalised
        probabilities, (batch, heads, seqlen_q, seqlen_k), in the 16-bit dtype of the MMAs, for packed arrays too. The
        original returns unnormalised float32, for dense arrays only.

    Raises
    ------
    ValueError, TypeError
        As triton_attention.
    """
    if not isinstance(metadata, MetaData):
        raise TypeError(message(_WITH_METADATA.name, "metadata", f"is a {float8.kind(metadata)}", "a fastattn.compat.vllm.MetaData"))
    return _attend(_WITH_METADATA, q, k, v, o, metadata)


# ---------------------------------------------------------------- quantisation
def scale_fp8(t: Any, scale: Any = None) -> tuple[Any, Any]:
    """vLLM's scale_fp8: t / scale as float8_e4m3fn.

    Parameters
    ----------
    t : array
        (..., heads, dim).
    scale : number or array, optional
        Positive: a number, 1 element, or one per head. None: the largest magnitude of t / 448, as a float32 tensor
        (1,) on t's device; 1 if t is all zeros.

    Returns
    -------
    tuple
        (t / scale, scale). float32 arithmetic, saturated to +-448, rounded to nearest even.
    """
    call = Call("scale_fp8")
    if scale is None:
        name_of(t, call, "t")
        xp = library(t, call, "t")
        if 0 in shape_of(t, call.name, "t"):
            raise call.value("t", f"has shape {tuple(t.shape)}", "elements, because scale is None and their largest makes it")
        most = abs(float8.cast(t, "float32")).max().reshape(1) / FP8_MAX
        scale = xp.where(most > 0, most, xp.ones_like(most))
    return _quantized(call, "t", t, "scale", scale), scale


def maybe_quantize_fp8(t: Any, scale: Any) -> Any:
    """t as it is if it is float8_e4m3fn, else scale_fp8(t, scale)[0].

    A scale of None is an error. The original computes one from t and loses it.
    """
    call = Call("maybe_quantize_fp8")
    return t if name_of(t, call, "t") == NAME else _quantized(call, "t", t, "scale", scale)


def check_and_maybe_quantize_qkv(q: Any, k: Any, v: Any, fp8_scales: Any) -> tuple[Any, Any, Any]:
    """maybe_quantize_fp8 of q, k and v.

    fp8_scales is (q_scale, k_scale, v_scale, p_scale). A q_scale of None leaves q as it is, for 8-bit keys and values
    only.
    """
    return _quantize_all(Call("check_and_maybe_quantize_qkv", _IN_SCALES), q, k, v, fp8_scales)


def _quantize_all(call: Call, q: Any, k: Any, v: Any, fp8_scales: Any) -> tuple[Any, Any, Any]:
    if not isinstance(fp8_scales, (tuple, list)) or len(fp8_scales) != 4:
        raise call.value("fp8_scales", f"is {fp8_scales!r}", "a tuple (q_scale, k_scale, v_scale, p_scale)")
    made = []
    for argument, x, scale in zip("qkv", (q, k, v), fp8_scales, strict=False):
        ready = name_of(x, call, argument) == NAME or (argument == "q" and scale is None)
        made.append(x if ready else _quantized(call, argument, x, f"{argument}_descale", scale))
    return made[0], made[1], made[2]


def _quantized(call: Call, argument: str, t: Any, scale_name: str, scale: Any) -> Any:
    if name_of(t, call, argument) not in DTYPES:
        raise TypeError(message(call.name, argument, f"has dtype {name_of(t, call, argument)}", " or ".join(DTYPES)))
    library(t, call, argument)
    if scale is None:
        raise call.value(call.names.get(scale_name, scale_name), "is None", f"the scale that {argument} is divided by",
                         f"scale_fp8({argument}) finds one and gives it")
    shape = shape_of(t, call.name, argument)
    return float8.quantize(t, read_scale(call, scale_name, scale, argument, t, shape[-2] if len(shape) > 1 else 1), 1)


# ---------------------------------------------------------------- one call
class _Widened(NamedTuple):
    """Arguments of fastattn.attention for 8-bit operands, and the factor of its output."""

    q: Any
    k: Any
    v: Any
    softmax_scale: float
    result: Scale


def _attend(call: Call, q: Any, k: Any, v: Any, o: Any, m: MetaData) -> tuple[Any, Any]:
    m = _plain(call, m)
    packed = lengths(call, m.cu_seqlens_q, m.cu_seqlens_k, m.max_seqlens_q or None, m.max_seqlens_k or None)
    layout = _layout(call, m, packed)
    _check_sizes(call, q, k, v, m, layout)
    eight_bit = _mode(call, q, k, v, m)
    work, after = "float16" if eight_bit == "qkv" else name_of(q, call, "q"), 2 if layout == "bhsd" else 1
    name = _output_name(call, o, m, work, eight_bit)
    options = {"causal": m.causal, "softmax_scale": m.sm_scale, "bias": m.bias, "alibi_slopes": m.alibi_slopes}
    result = Scale()
    if eight_bit:
        for argument in ("bias", "alibi_slopes"):
            options[argument] = _of_16_bits(call, argument, options[argument], work)
        q, k, v, options["softmax_scale"], result = _widened(call, q, k, v, m, eight_bit, work, after)
    direct = name == work and result.is_one and m.o_scale is None
    if o is not None and not direct:
        _check_output(call, o, q, (*shape_of(q, call.name, "q")[:-1], shape_of(v, call.name, "v")[-1]))
    dense = {} if packed is not None else {"layout": layout}
    out, _ = forward(call, q, k, v, packed, return_lse=False, out=o if direct else None, **dense, **options)
    if not direct:
        out = _finished(out, o, result, name, after, m.o_scale is not None or name == NAME)
    return out, encode(call, q, k, packed, layout, **options) if m.return_encoded_softmax else None


def _plain(call: Call, m: MetaData) -> MetaData:
    """The MetaData with its numbers as plain values."""
    counts = ("max_seqlens_q", "max_seqlens_k", "seqlen_q", "seqlen_k", "alibi_batch", "alibi_nheads")
    numbers: dict[str, Any] = {name: call.length(name, getattr(m, name)) for name in counts}
    return replace(m, sm_scale=Check(call.name).number("sm_scale", m.sm_scale, "a finite number"), causal=call.flag("causal", m.causal),
                   **numbers)


def _layout(call: Call, m: MetaData, packed: Lengths | None) -> str:
    if packed is not None:
        if m.layout not in (None, "thd"):
            raise call.value("layout", f"is {m.layout!r}", "'thd' or None, because cu_seqlens_q is given")
        return "thd"
    if m.layout not in ("bshd", "bhsd"):
        hint = "packed arrays need cu_seqlens_q and cu_seqlens_k" if m.layout in (None, "thd") else ""
        raise call.value("layout", f"is {m.layout!r}", "'bshd' or 'bhsd', because cu_seqlens_q is None", hint)
    return m.layout


def _check_sizes(call: Call, q: Any, k: Any, v: Any, m: MetaData, layout: str) -> None:
    """Check ranks, from which the head axes follow, and the sizes that MetaData repeats. fastattn.attention checks the rest."""
    shapes = {name: shape_of(x, call.name, name) for name, x in (("q", q), ("k", k), ("v", v))}
    rank = 3 if layout == "thd" else 4
    for name, shape in shapes.items():
        if len(shape) != rank:
            raise call.value(name, f"has {len(shape)} axes, shape {shape}", f"{rank} axes for layout {layout!r}")
    axis = {"thd": 0, "bshd": 1, "bhsd": 2}[layout]
    sequences = shape_of(m.cu_seqlens_q, call.name, "cu_seqlens_q")[0] - 1 if hasattr(m.cu_seqlens_q, "shape") else None
    rows, keys = (m.max_seqlens_q, m.max_seqlens_k) if layout == "thd" else (shapes["q"][axis], shapes["k"][axis])
    batch = sequences if layout == "thd" else shapes["q"][0]
    heads = shapes["q"][1 if layout == "bhsd" else -2]
    given = [("seqlen_q", m.seqlen_q, rows, "q's"), ("seqlen_k", m.seqlen_k, keys, "k's"),
             ("alibi_batch", m.alibi_batch, batch, "the batch"), ("alibi_nheads", m.alibi_nheads, heads, "q's heads")]
    if layout != "thd":
        given += [("max_seqlens_q", m.max_seqlens_q, rows, "q's"), ("max_seqlens_k", m.max_seqlens_k, keys, "k's")]
    for name, has, want, whose in given:
        if has and want and has != want:
            raise call.value(name, f"is {has}", f"{whose}, {want}, or nothing")


def _mode(call: Call, q: Any, k: Any, v: Any, m: MetaData) -> str:
    """"qkv" or "kv", the operands that are 8-bit, or "". Errors for dtypes and scales that do not go together."""
    scales = {name: getattr(m, name) for name in ("q_descale", "k_descale", "v_descale", "p_scale", "o_scale")}
    dtypes = {name: name_of(x, call, name) for name, x in (("q", q), ("k", k), ("v", v))}
    given = [name for name, x in scales.items() if x is not None]
    if not given and NAME not in dtypes.values():
        return ""
    first = given[0] if given else next(name for name, dtype in dtypes.items() if dtype == NAME)
    why = f"{call.names.get(first, first)} is {'given' if given else NAME}"
    for name in ("k_descale", "v_descale") + (("q_descale",) if dtypes["q"] == NAME else ()):
        if scales[name] is None:
            raise call.value(call.names.get(name, name), "is None", f"a scale, because {why}", "1.0 is the scale of what was not divided")
    mode = "kv" if scales["q_descale"] is None else "qkv"
    for name in mode:
        if dtypes[name] != NAME:
            hint = f"maybe_quantize_fp8({name}, {name}_descale) makes it" + (", q_descale=None leaves q as it is" if name == "q" else "")
            raise TypeError(message(call.name, name, f"has dtype {dtypes[name]}", f"{NAME}, because {name}_descale is given", hint))
    if mode == "kv" and dtypes["q"] not in DTYPES:
        raise TypeError(message(call.name, "q", f"has dtype {dtypes['q']}", " or ".join(DTYPES)))
    return mode


def _output_name(call: Call, o: Any, m: MetaData, work: str, eight_bit: str) -> str:
    """The output's dtype."""
    if o is not None:
        argument, name = "o", name_of(o, call, "o")
    else:
        argument = "output_dtype"
        name = (NAME if eight_bit else work) if m.output_dtype is None else words.dtype_of(m.output_dtype) or repr(m.output_dtype)
    if name not in ((*DTYPES, NAME) if eight_bit else (work,)):
        expected = " or ".join((*DTYPES, NAME)) if eight_bit else f"q's dtype, {work}, because no scale is given"
        raise TypeError(message(call.name, argument, f"has dtype {name}" if o is not None else f"is {name}", expected))
    return name


def _of_16_bits(call: Call, argument: str, x: Any, work: str) -> Any:
    """A bias or slopes in the 16-bit dtype that the MMAs do not use become float32, which is exact."""
    if not hasattr(x, "shape") or name_of(x, call, argument) not in ("float16", "bfloat16") or name_of(x, call, argument) == work:
        return x
    return float8.cast(x, "float32")


def _widened(call: Call, q: Any, k: Any, v: Any, m: MetaData, mode: str, work: str, after: int) -> _Widened:
    for name, x in (("q", q), ("k", k), ("v", v)):
        library(x, call, name)
    heads, shared = (shape_of(x, call.name, name)[-1 - after] for name, x in (("q", q), ("k", k)))
    if shared == 0 or heads % shared:
        raise call.value("k", f"has {shared} heads", f"a divisor of q's {heads} heads")
    k_scale, v_scale = (read_scale(call, f"{name}_descale", getattr(m, f"{name}_descale"), "q", q, shared) for name in "kv")
    if m.p_scale is not None:
        read_scale(call, "p_scale", m.p_scale, "q", q, heads)
    result = Scale().times(v_scale, heads)
    if m.o_scale is not None:
        result = result.times(read_scale(call, "o_scale", m.o_scale, "q", q, 1).inverse(), heads)
    one = Scale()
    if mode == "kv":
        wide_k = widen(k, work, Scale(tensor=k_scale.tensor), after)
        return _Widened(q, wide_k, widen(v, work, one, after), m.sm_scale * k_scale.number, result)
    both = read_scale(call, "q_descale", m.q_descale, "q", q, heads).times(k_scale, heads)
    wide_q = widen(q, work, Scale(tensor=both.tensor), after)
    return _Widened(wide_q, widen(k, work, one, after), widen(v, work, one, after), m.sm_scale * both.number, result)


def _check_output(call: Call, o: Any, q: Any, shape: Shape) -> None:
    """Check an o that is written after the kernel."""
    if shape_of(o, call.name, "o") != shape:
        raise call.value("o", f"has shape {tuple(o.shape)}", f"q's with v's last axis, {shape}")
    xp = library(o, call, "o")
    if xp is not library(q, call, "q") or float8.device(o, call, "o") != float8.device(q, call, "q"):
        raise call.value("o", f"is a {float8.kind(o)} on {getattr(o, 'device', 'the host')}", "an array of q's library, on q's device")
    if not (xp.__name__ == "torch" or (xp is np and o.flags.writeable)):
        raise call.value("o", "is read-only", "a writable array", "o=None allocates one")


def _finished(out: Any, o: Any, result: Scale, name: str, after: int, clamp: bool) -> Any:
    """The output times `result` in float32, clamped to the 8-bit range, rounded once more, in o if given."""
    y = result.apply(float8.cast(out, float8.wide(words.dtype_of(out.dtype))), after)
    y = float8.cast(float8.saturate(y, FP8_MAX) if clamp else y, name)
    if o is None:
        return y
    o[...] = y
    return o
