"""The implementations on the GPU: each as a call on the same tensors, and its results under common names.

Tensors are (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim). lse is (batch, num_heads,
seqlen) or (num_heads, total).
"""
from __future__ import annotations

import importlib.util
import inspect
import itertools
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from .. import masks, torch_calls
from ..arrays import ITEMSIZE
from ..case import Case
from . import ladder

Tensor = Any
Tensors = dict[str, Any]
SEED = 1  # of our dropout
GRADIENTS = ("dq", "dk", "dv", "dbias")
BACKENDS = ("cuDNN", "flash", "efficient", "math", "sdpa")
MOST_SCORES = 2 << 30       # bytes of scores and their softmax that torch's math backend may store


@dataclass(frozen=True, slots=True)
class Runner:
    """`call` is one public call, allocation included. `named` gives its results their names (out, lse; dq, dk, dv, dbias).

    `checked` is the same computation for the check, with `out` poisoned if it can be passed. None: the check uses
    `call`.
    """

    call: Callable[[], Any]
    label: str
    named: Callable[[Any], Tensors]
    checked: Callable[[], Tensors] | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """The case's arrays, None for the rest. cu_seqlens is int32 on the device, slopes and sinks are float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor = None
    mask: Tensor = None
    slopes: Tensor = None
    sinks: Tensor = None
    cu_seqlens: Tensor = None


def input_bytes(case: Case) -> int:
    """Bytes of q, k and v."""
    total = sum(case.lengths)
    rows_q, rows_k = (total, total) if total else (case.batch * case.seqlen, case.batch * case.shape_k[2])
    of_v = 0 if case.latent else case.shape_v[3]
    return ITEMSIZE[case.dtype] * (rows_q * case.num_heads * case.head_dim + rows_k * case.shape_k[1] * (case.head_dim + of_v))


def make_inputs(case: Case, device: str, number: int = 0) -> Inputs:
    """Normal random numbers, the same for a case in every run. `number` distinguishes sets of inputs."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()) + number)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, kind: Any = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=kind)

    b, h, s, d = case.shape_q
    _, hk, sk, dv = case.shape_v
    total = sum(case.lengths)
    leading_q, leading_k = ((total,), (total,)) if total else ((b, s), (b, sk))
    q, k = draw(*leading_q, h, d), draw(*leading_k, hk, d)
    v = k[..., :dv] if case.latent else draw(*leading_k, hk, dv)
    dout = draw(*leading_q, h, dv)
    ends = [0, *itertools.accumulate(case.lengths)]
    return Inputs(q, k, v, dout,
                  bias=draw(b if case.bias_batch else 1, h, s, sk) if case.bias else None,
                  mask=_mask(case, device, generator) if case.mask else None,
                  slopes=2.0 ** (-8 * torch.arange(1, h + 1, device=device, dtype=torch.float32) / h) if case.alibi else None,
                  sinks=draw(h, kind=torch.float32) if case.sinks else None,
                  cu_seqlens=torch.tensor(ends, device=device, dtype=torch.int32) if total else None)


def _mask(case: Case, device: str, generator: Any) -> Tensor:
    import torch

    if case.mask_kind == "random":      # of ten pairs nine
        return torch.rand(1, 1, case.seqlen, case.shape_k[2], generator=generator, device=device) < 0.9
    return torch.from_numpy(masks.make(case.mask_kind, case.batch, case.seqlen, case.shape_k[2])).to(device)


def distances(rows: slice, length: int, keys: int, device: Any) -> Tensor:
    """How far each key is behind the diagonal of each row, which is bottom-right. length: of the whole sequence of queries."""
    import torch

    return torch.arange(keys, device=device) - (torch.arange(length, device=device)[rows].unsqueeze(1) + keys - length)


def structural(case: Case, distance: Tensor) -> Tensor:
    """The pairs that causal and window leave, None if the case has neither."""
    seen = distance <= 0 if case.causal else None
    if case.window is None:
        return seen
    near = distance.abs() <= case.window
    return near if seen is None else near & seen


# ---------------------------------------------------------------- fastattn
def forced(case: Case) -> Callable[[], AbstractContextManager[Any]]:
    """A context, to enter around each call, in which the case's kernel family is forced."""
    if not case.kernels:
        return nullcontext
    from fastattn import gpu

    use: Any = gpu.use  # type: ignore[attr-defined,unused-ignore]
    return lambda: use(case.kernels)


def options(case: Case, x: Inputs) -> dict[str, Any]:
    """Keywords of fastattn.attention and attention_varlen."""
    found: dict[str, Any] = {"causal": case.causal}
    if case.window is not None:
        found["window"] = (case.window, 0 if case.causal else case.window)
    if case.softcap is not None:
        found["softcap"] = case.softcap
    if case.dropout_p:
        found |= {"dropout_p": case.dropout_p, "seed": SEED}
    if case.position:
        found["diagonal"] = case.shape_k[2] - case.seqlen
        found |= {"dropout_at": (0, 0, 0, 0), "dropout_heads": case.num_heads} if case.dropout_p else {}
    if case.float32_out:
        found["out_dtype"] = "float32"
    found |= {name: array for name, array in (("alibi_slopes", x.slopes), ("bias", x.bias), ("mask", x.mask), ("sinks", x.sinks))
              if array is not None}
    if case.lengths:
        found |= {"max_seqlen_q": case.seqlen, "max_seqlen_k": case.seqlen}
    return found


def make_fastattn(case: Case, x: Inputs, engine: str | None = None) -> Runner:
    import torch

    import fastattn

    extra = options(case, x) | {"engine": engine}
    use = forced(case)
    arrays = (x.q, x.k, x.v) + ((x.cu_seqlens, x.cu_seqlens) if case.lengths else ())
    attention: Any = fastattn.attention_varlen if case.lengths else fastattn.attention
    backward: Any = fastattn.attention_varlen_backward if case.lengths else fastattn.attention_backward
    label = f"fastattn {fastattn.__version__}{f' {case.kernels}' if case.kernels else ''}"
    if not case.alone:
        def forward() -> Any:
            with use():
                return attention(*arrays, **extra)

        def checked() -> Tensors:
            with use():
                place = x.q.new_full((*x.q.shape[:-1], x.v.shape[-1]), float("nan"), dtype=torch.float32 if case.float32_out else None)
                out, lse = attention(*arrays, **extra, out=place, return_lse=True)
            return {"out": out, "lse": lse}

        return Runner(forward, label, lambda out: {"out": out}, checked)
    with use():
        out, lse = attention(*arrays, **extra, return_lse=True)
    if case.need_dbias:
        extra["need_dbias"] = True
    if case.deterministic:
        extra["deterministic"] = True

    def gradients() -> Any:
        with use():
            return backward(x.dout, *arrays[:3], out, lse, *arrays[3:], **extra)

    return Runner(gradients, label, lambda grads: {name: getattr(grads, name) for name in GRADIENTS if getattr(grads, name) is not None})


def make_plain(case: Case, x: Inputs, engine: str | None = None) -> Runner:
    """fastattn without the features, to measure their cost."""
    return make_fastattn(case.plain, Inputs(x.q, x.k, x.v, x.dout, cu_seqlens=x.cu_seqlens), engine)


# ---------------------------------------------------------------- the others
def make_sdpa(case: Case, x: Inputs, backend: str) -> Runner:
    """torch's scaled_dot_product_attention with one backend. "sdpa" lets torch choose."""
    import torch

    _refuse(case, backend, "softcap", "sinks", "deterministic", "lengths")
    stored = 2 * 4 * case.batch * case.num_heads * case.seqlen * case.shape_k[2]
    if backend == "math" and stored > MOST_SCORES:
        raise NotImplementedError(f"math would store {stored / 1e9:.0f} GB of scores")
    mask = attn_mask(case, x, backend)
    attend = torch_calls.sdpa(backend, causal=mask is None and case.causal and case.seqlen > 1, dropout_p=case.dropout_p,
                              grouped=case.shape_k[1] != case.num_heads)
    return _torch_runner(case, replace(x, bias=mask), attend, f"torch {torch.__version__} {backend}")


def attn_mask(case: Case, x: Inputs, backend: str) -> Tensor:
    """SDPA's attn_mask, made before the timed calls as models do; None where is_causal says it all.

    A boolean mask where pairs are only hidden, else one bias of all that is added. torch's own object for the bottom-right
    diagonal where that alone is wanted and the backend knows it.
    """
    from torch.nn.attention.bias import causal_lower_right

    rows, keys, hides = case.seqlen, case.shape_k[2], case.causal and case.seqlen > 1
    added = x.bias is not None or x.slopes is not None
    if not added and x.mask is None and case.window is None:
        if not hides or rows == keys:
            return None
        if backend != "cuDNN":
            return causal_lower_right(rows, keys)
    if backend == "flash":
        raise NotImplementedError("flash takes no attn_mask")
    distance = distances(slice(None), rows, keys, x.q.device)
    seen = structural(case, distance) if hides or case.window is not None else None
    if x.mask is not None:
        seen = x.mask if seen is None else seen & x.mask
    if not added:
        return seen
    if case.need_dbias:
        if seen is not None or x.slopes is not None:
            raise NotImplementedError("one attn_mask for a bias with a gradient beside a mask or alibi is not written")
        return x.bias
    bias = 0 if x.bias is None else x.bias
    if x.slopes is not None:
        bias = bias - x.slopes.reshape(-1, 1, 1) * distance.abs()
    return (bias if seen is None else bias.masked_fill(~seen, float("-inf"))).reshape(-1, case.num_heads, rows, keys).to(x.q.dtype)


def make_unfused(case: Case, x: Inputs, backend: str) -> Runner:
    """The first rung of the ladder: three torch calls, S and P in memory."""
    import torch

    _refuse(case, backend, "window", "alibi", "softcap", "bias", "mask", "sinks", "dropout_p", "deterministic", "lengths")
    return _torch_runner(case, x, ladder.make_unfused(case, x.q), f"torch {torch.__version__} unfused")


def make_varlen(case: Case, x: Inputs, backend: str) -> Runner:
    """torch.nn.attention.varlen.varlen_attn: torch's flash backend for packed sequences."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    _refuse(case, backend, "window", "alibi", "softcap", "bias", "mask", "sinks", "dropout_p", "deterministic")
    old = "is_causal" in inspect.signature(varlen_attn).parameters
    extra: dict[str, Any] = {"is_causal": case.causal} if old else {"window_size": (-1, 0)} if case.causal else {}
    if case.shape_k[1] != case.num_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        extra["enable_gqa"] = True
    cu, longest = x.cu_seqlens, case.seqlen
    return _torch_runner(case, x, lambda q, k, v, bias: varlen_attn(q, k, v, cu, cu, longest, longest, **extra),
                         f"torch {torch.__version__} varlen_attn")


def make_fa4(case: Case, x: Inputs, backend: str) -> Runner:
    """FlashAttention-4. The first call of each variant compiles it."""
    from .device import distribution

    _refuse(case, backend, "alibi", "bias", "mask", "dropout_p")
    extra: dict[str, Any] = {"causal": case.causal}
    if case.window is not None:
        extra["window_size"] = (case.window, 0 if case.causal else case.window)
    if case.softcap is not None:
        extra["softcap"] = case.softcap
    if case.deterministic:
        extra["deterministic"] = True
    if x.sinks is not None:
        extra["learnable_sink"] = x.sinks.bfloat16()
    if case.lengths:
        extra |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens, "max_seqlen_q": case.seqlen, "max_seqlen_k": case.seqlen}

    attend = torch_calls.flash_attention_4(packed=bool(case.lengths), **extra)
    return _torch_runner(case, x, attend, f"FA4 {distribution('flash-attn-4') or ''}")


def _torch_runner(case: Case, x: Inputs, attend: Callable[..., Tensor], label: str) -> Runner:
    """A forward without autograd, or the gradients alone: the graph is built once and kept."""
    if not case.alone:
        return Runner(torch_calls.forward_alone(attend, x.q, x.k, x.v, x.bias), label, lambda out: {"out": out})
    return Runner(torch_calls.gradients_alone(attend, (x.q, x.k, x.v), x.bias, x.dout, case.need_dbias), label,
                  lambda grads: dict(zip(GRADIENTS, grads, strict=False)))


def _refuse(case: Case, backend: str, *fields: str) -> None:
    """NotImplementedError if the case has a feature that the rival would silently ignore."""
    for name in fields:
        if getattr(case, name):
            raise NotImplementedError(f"{backend} has no {name}")


MAKERS: dict[str, Callable[[Case, Inputs, str], Runner]] = {
    **dict.fromkeys(BACKENDS, make_sdpa), "unfused": make_unfused, "varlen_attn": make_varlen, "FA4": make_fa4,
    **dict.fromkeys(ladder.FORCED, lambda case, x, name: make_fastattn(ladder.forced(case, name), x)),
    "plain": lambda case, x, backend: make_plain(case, x),
}
MODULES = {"FA4": "flash_attn.cute", "varlen_attn": "torch.nn.attention.varlen"}


def missing(name: str) -> str | None:
    """Why a rival cannot run here, or None."""
    module = MODULES.get(name)
    if module is None:
        return None
    try:
        return None if importlib.util.find_spec(module) else f"not installed: {module}"
    except ImportError:
        return f"not installed: {module}"
