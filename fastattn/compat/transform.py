"""ATen's _transform_bias_rescale_qkv for any array, and its backward: the step from a fused projection to attention.

Shapes, D = num_heads * head_dim:

    dense    qkv (batch, T, 3 * D)                                  ->  q, k, v (batch, num_heads, T, head_dim)
    ragged   qkv (total, 3 * D), cu_seqlens (sequences + 1,)        ->  q, k, v (sequences, num_heads, T, head_dim)

Ragged sequences are padded with zeros to T, the longest length rounded up to a multiple of 8. Arithmetic is float32
(float64 for float64), and each result is rounded once. Each direction is one pass over memory, on the CPU and on CUDA
devices.

Source: PyTorch 2.13, aten/src/ATen/native/transformers/cuda/attention.cu.
"""
from __future__ import annotations

import importlib
import math
from typing import Any

from ..arrays.convert import allocate, resolve, small, view
from ..arrays.streams import Stream
from ..arrays.view import View
from ..engine import load
from ..lengths import cumulative
from ..options import Check
from ..problem import DTYPES, check_array

PADDED = 8          # ragged sequences are padded to a multiple of this


def transform_bias_rescale_qkv(qkv: Any, qkv_bias: Any, num_heads: int, *, cu_seqlens: Any = None, max_seqlen: int | None = None,
                               stream: Any = None) -> tuple[Any, Any, Any]:
    """Split qkv into q, k and v, add the bias, and scale q by 1 / sqrt(head_dim), as ATen's _transform_bias_rescale_qkv.

    Parameters
    ----------
    qkv : array
        (batch, T, 3 * D), or packed (total, 3 * D) with cu_seqlens. Any strides.
    qkv_bias : array
        (3 * D,), of qkv's dtype.
    num_heads : int
        A divisor of D.
    cu_seqlens : array, optional
        (sequences + 1,) int32 or int64. The original takes a nested tensor instead.
    max_seqlen : int, optional
        The longest sequence. None reads it from cu_seqlens, which must then be in host memory. Lengths on a device
        are not read by the host: there a sequence longer than max_seqlen is cut off.
    stream : optional
        As in fastattn.attention.

    Returns
    -------
    tuple of array
        q = (q + bias) / sqrt(head_dim), k + bias, v + bias: (batch, num_heads, T, head_dim), contiguous.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not go together.
    UnsupportedError, ImportError
        As fastattn.attention.
    """
    check = Check("transform_bias_rescale_qkv")
    x, on = _first(check, "qkv", qkv, stream)
    bias = view(qkv_bias, check.call, "qkv_bias", on)
    _rank(check, "qkv", x, 3 if cu_seqlens is None else 2, "(batch, T, 3 * D), or (total, 3 * D) with cu_seqlens")
    if len(bias.shape) != 1 or bias.shape[0] % 3 or bias.shape != x.shape[-1:]:
        raise check.value("qkv_bias", f"has shape {bias.shape}", f"one axis, (3 * D,), as long as qkv's last, {x.shape[-1]}")
    check_array(check.call, "qkv_bias", bias, x.shape[-1:], x.dtype, x.device)
    heads = check.integer("num_heads", num_heads, 1, 2**31 - 1)
    width = check.integer("qkv's last axis", x.shape[-1], 3, 2**31 - 1) // 3
    if width % heads:
        raise check.value("num_heads", f"is {heads}", f"a divisor of D = {width}, a third of qkv's last axis")
    cu, batch, T = None, x.shape[0], x.shape[1]
    if cu_seqlens is not None:
        cu, batch, longest = _sequences(check, cu_seqlens, x.shape[0], max_seqlen, x, on)
        T = padded(longest)
    elif max_seqlen is not None:
        raise check.value("max_seqlen", f"is {max_seqlen}", "None, because qkv is dense", "cu_seqlens makes it ragged")
    check.integer("T", T, 0, 2**31 - 1)
    shape = (batch, heads, T, width // heads)
    q, k, v = (allocate(qkv, shape, x.dtype, on) for _ in range(3))
    _run(check, "forward", on, x, bias, cu, q.view, k.view, v.view, _scale(shape))
    return q.finish(), k.finish(), v.finish()


def transform_bias_rescale_qkv_backward(dq: Any, dk: Any, dv: Any, *, cu_seqlens: Any = None, total: int | None = None,
                                        stream: Any = None) -> tuple[Any, Any]:
    """Gradients of transform_bias_rescale_qkv. ATen has no function for this.

    Parameters
    ----------
    dq, dk, dv : array
        (batch, num_heads, T, head_dim), of one dtype, any strides.
    cu_seqlens : array, optional
        The forward's. Gradients of padding are not read.
    total : int, optional
        qkv's rows. None reads the last element of cu_seqlens, which must then be in host memory.
    stream : optional
        As in fastattn.attention.

    Returns
    -------
    tuple of array
        dqkv (batch, T, 3 * D), or (total, 3 * D) with rows of no sequence 0; and dqkv_bias (3 * D,), the sum of the
        unrounded dqkv over its rows, with the same bits in every run.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As the forward.
    """
    check = Check("transform_bias_rescale_qkv_backward")
    first, on = _first(check, "dq", dq, stream)
    _rank(check, "dq", first, 4, "(batch, num_heads, T, head_dim)")
    others = []
    for name, array in (("dk", dk), ("dv", dv)):
        others.append(view(array, check.call, name, on))
        check_array(check.call, name, others[-1], first.shape, first.dtype, first.device)
    batch, heads, T, head_dim = first.shape
    width = 3 * check.integer("num_heads * head_dim", heads * head_dim, 1, (2**31 - 1) // 3)
    rows: tuple[int, ...] = (batch, T)
    cu = None
    if cu_seqlens is not None:
        if total is None:
            total = _last(check, cu_seqlens, on)
        rows = (check.integer("total", total, 0, 2**31 - 1),)
        cu, sequences, _ = _sequences(check, cu_seqlens, rows[0], T, first, on)
        if sequences != batch:
            raise check.value("cu_seqlens", f"describes {sequences} sequences", f"as many as dq has entries, {batch}")
    elif total is not None:
        raise check.value("total", f"is {total}", "None, because dq is dense", "cu_seqlens makes it ragged")
    dqkv, dbias = allocate(dq, (*rows, width), first.dtype, on), allocate(dq, (width,), first.dtype, on)
    _run(check, "backward", on, first, *others, cu, dqkv.view, dbias.view, _scale(first.shape))
    return dqkv.finish(), dbias.finish()


def padded(longest: int) -> int:
    """The padded length T of ragged sequences."""
    return -(-longest // PADDED) * PADDED


def _scale(shape: tuple[int, ...]) -> float:
    return 1.0 / math.sqrt(shape[-1])


def _first(check: Check, name: str, array: Any, stream: Any) -> tuple[View, Stream | None]:
    """The View of the array that decides dtype, device and stream, and that stream."""
    view(array, check.call, name)       # first of all, so that errors name this array
    on = resolve(stream, array, check.call)
    x = view(array, check.call, name, on)
    check.dtype(name, x, DTYPES)
    return x, on


def _rank(check: Check, name: str, x: View, rank: int, axes: str) -> None:
    if len(x.shape) != rank:
        raise check.value(name, f"has {len(x.shape)} axes, shape {x.shape}", f"{rank} axes, {axes}")


def _sequences(check: Check, cu_seqlens: Any, total: int, longest: int | None, like: View, on: Stream | None) -> tuple[View, int, int]:
    """(cu_seqlens, number of sequences, the longest of them)."""
    cu = small(cu_seqlens, None, check.call, "cu_seqlens", on)
    if cu.device != like.device:
        raise check.value("cu_seqlens", f"is on device {cu.device}", f"the other arrays' device, {like.device}")
    if longest is None and cu.device[0] != "cpu":
        raise check.value("max_seqlen", "is None", "the longest sequence, because cu_seqlens is on a device",
                          "the results' shape depends on it")
    check.integer("total", total, 0, 2**31 - 1)
    return cumulative(check, "cu_seqlens", cu, total, longest, "max_seqlen")


def _last(check: Check, cu_seqlens: Any, on: Stream | None) -> int:
    cu = small(cu_seqlens, None, check.call, "cu_seqlens", on)
    if cu.device[0] != "cpu":
        raise check.value("total", "is None", "qkv's rows, because cu_seqlens is on a device")
    check.dtype("cu_seqlens", cu, ("int32", "int64"))
    if len(cu.shape) != 1 or cu.shape[0] < 1:
        raise check.value("cu_seqlens", f"has shape {cu.shape}", "one axis, (number of sequences + 1,)")
    return int(cu.numpy()[-1])


def _run(check: Check, direction: str, on: Stream | None, *arguments: Any) -> None:
    """Call `forward` or `backward` of the engine's transform.py."""
    engine = load("cpu" if on is None else "gpu", check.call)
    run = getattr(importlib.import_module(".transform", engine.__name__), direction)
    run(*arguments) if on is None else run(*arguments, on.handle)
