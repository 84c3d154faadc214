"""8-bit floats: `quantize_fp8`, and the rounding that the append uses."""
from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..arrays.convert import Caller
from ..arrays.view import FLOAT8, numpy_dtype
from ..errors import UnsupportedError
from ..options import Check
from ..problem import DTYPES
from ..signature import uncompiled
from ..types import A, Layout

Values = np.ndarray[Any, Any]
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def quantized(x: Values, scale: Any, dtype: str) -> Values:
    """x / scale in float32 (float64 for float64), saturated and rounded once. NaN stays NaN."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(over="ignore"):
        rounded: Values = np.clip(x.astype(real) / np.asarray(scale, real), -LARGEST[dtype], LARGEST[dtype]).astype(numpy_dtype(dtype))
    return rounded


@uncompiled
def quantize_fp8(x: A, axis: Literal["head", "batch_head"] | None = None,
                 dtype: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn", *,
                 layout: Layout | Literal["thd"] = "bshd") -> tuple[A, A]:
    """Round an array to 8-bit floats with a scale: ``x = x8 * scale``.

    Parameters
    ----------
    x : array (batch, seqlen, num_heads, head_dim)
        float16, bfloat16, float32 or float64, in host memory. Packed (total, num_heads, head_dim) with
        ``layout="thd"``.
    axis : {None, "head", "batch_head"}
        One scale for all of x, for each head, or for each head of each batch entry.
    dtype : {"float8_e4m3fn", "float8_e5m2"}
        e4m3fn has 3 bits after the point and reaches 448, e5m2 2 bits and 57344.
    layout : {"bshd", "bhsd", "thd"}, default "bshd"
        Order of x's axes, and of x8's.

    Returns
    -------
    x8 : array of x's shape and kind
        NaN stays NaN; an infinity becomes the largest number.
    scale : array (1,), (num_heads,) or (batch, num_heads)
        float32, positive and finite: the largest finite magnitude over the largest 8-bit number; 1 where all is 0.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong.
    UnsupportedError
        x is in device memory.

    Notes
    -----
    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import quantize_fp8
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 4, 8), np.float32)
    >>> x8, scale = quantize_fp8(x, "head")
    >>> str(x8.dtype), scale.shape, bool(np.allclose(x8.astype(np.float32) * scale[:, None], x, rtol=2**-4, atol=1e-2))
    ('float8_e4m3fn', (4,), True)
    """
    check = Check("quantize_fp8")
    if axis not in (None, "head", "batch_head"):
        raise check.value("axis", f"is {axis!r}", "None, 'head' or 'batch_head'")
    if dtype not in FLOAT8:
        raise check.value("dtype", f"is {dtype!r}", " or ".join(map(repr, FLOAT8)))
    if layout not in ("bshd", "bhsd", "thd"):
        raise check.value("layout", f"is {layout!r}", "'bshd', 'bhsd' or 'thd'")
    caller = Caller(check.call, layout, None, "x", x)
    given = caller.first
    check.dtype("x", given, DTYPES)
    rank = 3 if layout == "thd" else 4
    if len(given.shape) != rank:
        raise check.value("x", f"has {len(given.shape)} axes, shape {given.shape}", f"{rank} axes for layout {layout!r}")
    if axis == "batch_head" and layout == "thd":
        raise check.value("axis", "is 'batch_head'", "None or 'head', because packed x has no batch axis")
    if caller.stream is not None:
        raise UnsupportedError("quantize_fp8(): x is in CUDA memory, which it does not read yet; host memory works.")
    values = given.numpy()
    over = {None: tuple(range(rank)), "head": (*range(rank - 2), rank - 1), "batch_head": (1, 3)}[axis]
    scale = _scale(values, over, dtype)
    eight = caller.output(given.shape, dtype, given)
    eight.view.numpy()[...] = quantized(values, scale, dtype)
    shape = {None: (1,), "head": given.shape[-2:-1], "batch_head": (given.shape[0], given.shape[-2])}[axis]
    scales = caller.allocate(shape, "float32", given)
    scales.view.numpy()[...] = scale.reshape(shape)
    return eight.finish(), scales.finish()


def _scale(x: Values, over: tuple[int, ...], dtype: str) -> Values:
    """float32, with the reduced axes kept as 1."""
    size = np.abs(np.asarray(x).astype(np.float64))
    most = np.where(np.isfinite(size), size, 0).max(axis=over, keepdims=True, initial=0)
    info = np.finfo(np.float32)
    scale = np.clip(most / LARGEST[dtype], float(info.smallest_subnormal), float(info.max)).astype(np.float32)
    return np.where(most == 0, np.float32(1), scale)
