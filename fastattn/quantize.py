"""`quantize_fp8`: arrays of 16 or more bits to 8-bit floats and their scales, x = x8 * scale.

Nothing of attention is here. In host memory it is NumPy, on CUDA memory the kernels of gpu/rows/quantize.py.
"""
from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .arrays import words
from .arrays.convert import Caller
from .arrays.view import EIGHT_BIT, FLOATS, LARGEST, View, numpy_dtype
from .engine import load
from .options import Check
from .signature import uncompiled
from .types import A, Layout

Array = np.ndarray[Any, Any]
AXES: tuple[str | None, ...] = (None, "head", "batch_head")


@uncompiled
def quantize_fp8(x: A, axis: Literal["head", "batch_head"] | None = None, dtype: Any = "float8_e4m3fn", *,
                 layout: Layout | Literal["thd"] = "bshd", stream: Any = None) -> tuple[A, A]:
    """Round an array to 8-bit floats, with a scale that makes use of their range: x is about x8 * scale.

    Parameters
    ----------
    x : array (batch, seqlen, num_heads, head_dim)
        float16, bfloat16, float32 or float64. With ``layout="bhsd"`` heads come before seqlen. Packed arrays, (total,
        num_heads, head_dim), have three axes with any layout.
    axis : {None, "head", "batch_head"}, default None
        What shares a scale: all of x, each head, or each head of each batch entry.
    dtype : str or dtype, default "float8_e4m3fn"
        "float8_e4m3fn" or "float8_e5m2", or torch's, NumPy's or JAX's dtype of that name.
    layout : {"bshd", "bhsd", "thd"}, default "bshd"
        Order of the axes of x.
    stream : int or stream, optional
        As in `attention`, CUDA arrays only.

    Returns
    -------
    x8 : array
        x's shape and library, a DeviceArray where the library has no 8-bit floats. Larger numbers than the dtype has
        saturate, also infinities; NaN stays NaN.
    scale : array (1,), (num_heads,) or (batch, num_heads)
        float32, positive and finite: the largest finite magnitude divided by the largest number of the dtype, 448 or
        57344. 1 where all are zeros.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong.

    Notes
    -----
    Query heads that share a key head share its q_scale in `attention`. For one scale a group, quantise q as
    ``q.reshape(batch, seqlen, num_heads_k, group * head_dim)`` and give it its shape back.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import quantize_fp8
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 4, 8), np.float32)
    >>> x8, scale = quantize_fp8(x, axis="head")
    >>> x8.dtype.name, scale.shape
    ('float8_e4m3fn', (4,))
    >>> bool(np.abs(x8.astype(np.float32) * scale[:, None] - x).max() < abs(x).max() / 16)
    True
    """
    call, check = "quantize_fp8", Check("quantize_fp8")
    if layout not in ("bshd", "bhsd", "thd"):
        raise check.value("layout", f"is {layout!r}", "'bshd', 'bhsd' or 'thd'")
    if axis not in AXES:
        raise check.value("axis", f"is {axis!r}", "None, 'head' or 'batch_head'")
    name = words.dtype_of(dtype)
    if name not in EIGHT_BIT:
        raise check.value("dtype", f"is {words.shown(dtype)}", " or ".join(map(repr, EIGHT_BIT)))
    caller = Caller(call, layout, stream, "x", x)
    found = caller.first
    check.dtype("x", found, FLOATS)
    rank = len(found.shape)
    if rank not in ((3,) if layout == "thd" else (3, 4)):
        expected = "3 axes" if layout == "thd" else "4 axes, or packed 3"
        raise check.value("x", f"has shape {found.shape}", f"{expected} for layout {layout!r}")
    if rank == 3 and axis == "batch_head":
        raise check.value("axis", "is 'batch_head' and x is packed", "None or 'head'", "packed arrays have no batch axis")
    output = caller.output(found.shape, name, found)
    scale = caller.allocate(scale_shape(found, axis), "float32", found)
    if caller.stream is None:
        quantize(found, output.view, scale.view)
    else:
        load("gpu", call).quantize(found, output.view, scale.view, caller.handle)
    return output.finish(), scale.finish()


def scale_shape(x: View, axis: str | None) -> tuple[int, ...]:
    """Of the scales of a canonical (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim) view."""
    if axis is None:
        return (1,)
    return (x.shape[-2],) if axis == "head" else (x.shape[0], x.shape[-2])


@np.errstate(all="ignore")
def quantize(x: View, out: View, scale: View) -> None:
    """Write out and scale, whose shape says what shares a scale, in host memory."""
    a, most, limits = x.numpy(), LARGEST[out.dtype], np.finfo(np.float32)
    a = a.astype(np.float64 if x.dtype == "float64" else np.float32)
    apart = () if scale.shape == (1,) else (a.ndim - 2,) if len(scale.shape) == 1 else (0, a.ndim - 2)
    axes, magnitude = tuple(n for n in range(a.ndim) if n not in apart), np.abs(a)
    top = np.max(magnitude, axis=axes, where=np.isfinite(magnitude), initial=0, keepdims=True)
    factor = np.where(top == 0, 1, np.clip(top / a.dtype.type(most), limits.smallest_subnormal, limits.max)).astype(np.float32)
    scale.numpy()[...] = factor.reshape(scale.shape)
    out.numpy()[...] = quantized(a, factor, out.dtype)


@np.errstate(all="ignore")
def quantized(x: Array, scale: Any, dtype: str) -> Array:
    """x / scale in float32 (float64 for float64), saturated and rounded once to an 8-bit dtype. NaN stays NaN."""
    real, most = np.float64 if x.dtype == np.float64 else np.float32, LARGEST[dtype]
    rounded: Array = np.clip(x.astype(real) / np.asarray(scale, real), -most, most).astype(numpy_dtype(dtype))
    return rounded
