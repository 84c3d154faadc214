"""merge_states: partial results over disjoint keys -> the result over all keys. In host memory it is computed here; gpu/rows/merge.py is
the kernel.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .arrays.convert import Caller
from .arrays.readers import written
from .arrays.view import Output, View, overlap
from .engine import load
from .options import Check
from .problem import check_array
from .signature import uncompiled
from .types import A, B, Layout


@uncompiled
def merge_states(outs: Sequence[A], lses: Sequence[B], *, layout: Layout | Literal["thd"] = "bshd", out: A | None = None,
                 lse: B | None = None, stream: Any = None) -> tuple[A, B]:
    """Attention over all keys from partial results over disjoint keys.

    Parameters
    ----------
    outs : sequence of arrays
        One out for each part, of one shape and device: (batch, seqlen_q, num_heads, head_dim_v), with
        "bhsd" (batch, num_heads, seqlen_q, head_dim_v), with "thd" (total_q, num_heads, head_dim_v). Their dtypes may
        differ, but float64 stands beside float64 only.
    lses : sequence of arrays
        One lse for each part: (batch, num_heads, seqlen_q), with "thd" (num_heads, total_q); float32 (float64 for
        float64 outs).
    layout : {"bshd", "bhsd", "thd"}, default "bshd"
        Order of the axes of outs.
    out : array of the shape of one part, optional
        Written and returned; of the parts' dtype, or float32 beside 16 bits. It may be ``outs[0]`` itself, for a running
        result, and otherwise shares no memory with the parts.
    lse : array of the shape and dtype of one part's lse, optional
        Written and returned; it may be ``lses[0]`` itself.
    stream : int or stream, optional
        As in `attention`, CUDA arrays only.

    Returns
    -------
    out, lse : array
        The shape of one part. out has the parts' dtype, float32 where they differ. It is rounded once, at the end.

    Raises
    ------
    ValueError, TypeError
        The parts do not fit together.

    Notes
    -----
    ``out = sum(exp(lse_n - lse) * out_n)``. A row without keys in a part, lse -inf or +inf (FlashAttention's mark), adds nothing, whatever
    out holds there. Give sinks to one of the parts only.

    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention, merge_states
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 8), np.float32)
    >>> parts = [attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (np.s_[:4], np.s_[4:])]
    >>> out, lse = merge_states(*zip(*parts))
    >>> np.allclose(out, attention(q, k, v), atol=1e-6)
    True

    A running result is kept in float32, and each part is merged into it:

    >>> part, part_lse = attention(q, k[:, 4:], v[:, 4:], return_lse=True)
    >>> out, lse = attention(q, k[:, :4], v[:, :4], return_lse=True)
    >>> merge_states([out, part], [lse, part_lse], out=out, lse=lse)[0] is out
    True
    """
    call, check = "merge_states", Check("merge_states")
    if layout not in ("bshd", "bhsd", "thd"):
        raise check.value("layout", f"is {layout!r}", "'bshd', 'bhsd' or 'thd'")
    if len(outs) == 0 or len(outs) != len(lses):
        raise check.value("lses", f"has {len(lses)} parts", f"one for each of at least one out, {len(outs)}")
    caller = Caller(call, layout, stream, "outs[0]", outs[0])
    out_views = [caller.first, *[caller.tokens(x, f"outs[{n}]") for n, x in enumerate(outs) if n]]
    lse_views = [caller.view(x, f"lses[{n}]") for n, x in enumerate(lses)]
    first, rank = out_views[0], 3 if layout == "thd" else 4
    if len(first.shape) != rank:
        raise check.value("outs[0]", f"has shape {first.shape}", f"{rank} axes for layout {layout!r}")
    check.dtype("outs[0]", first, (*SINGLE, "float64"))
    lse_shape, lse_dtype = (*first.shape[:-3], first.shape[-2], first.shape[-3]), first.compute_dtype
    beside = SINGLE if first.dtype in SINGLE else ("float64",)
    for n, part in enumerate(out_views):
        check_array(call, f"outs[{n}]", part, first.shape, beside, first.device)
    for n, part_lse in enumerate(lse_views):
        check_array(call, f"lses[{n}]", part_lse, lse_shape, lse_dtype, first.device)
    dtype = first.dtype if all(x.dtype == first.dtype for x in out_views) else "float32"
    into = None if out is None else caller.tokens(out, "out")
    into_lse = None if lse is None else caller.view(lse, "lse")
    if into is not None:
        check_array(call, "out", into, first.shape, tuple(dict.fromkeys((dtype, lse_dtype))), first.device, output=True)
        _refuse_shared(check, "out", into, out_views, lse_views)
    if into_lse is not None:
        check_array(call, "lse", into_lse, lse_shape, lse_dtype, first.device, output=True)
        _refuse_shared(check, "lse", into_lse, lse_views, out_views if into is None else [*out_views, into])
    merge = merge_views if caller.stream is None else load("gpu", call).merge_states
    merged = caller.output(first.shape, dtype, first) if into is None else Output(into, out, written(out))
    merged_lse = caller.allocate(lse_shape, lse_dtype, lse_views[0]) if into_lse is None else Output(into_lse, lse, written(lse))
    merge(out_views, lse_views, merged.view, merged_lse.view, caller.handle)
    return merged.finish(), merged_lse.finish()


SINGLE = ("float32", "float16", "bfloat16")     # dtypes whose lse is float32


def _refuse_shared(check: Check, argument: str, x: View, parts: list[View], others: list[View]) -> None:
    """ValueError if an output shares memory with an input, unless it is the first part itself."""
    same = (x.ptr, x.strides, x.dtype) == (parts[0].ptr, parts[0].strides, parts[0].dtype)
    if any(overlap(x, part) for part in (*(parts[1:] if same else parts), *others)):
        raise check.value(argument, "shares memory with a part", f"memory of its own, or {argument}s[0] itself")


@np.errstate(all="ignore")
def merge_views(outs: list[View], lses: list[View], out: View, lse: View, stream: int | None = None) -> None:
    """Write out = sum(exp(lse_n - lse) * out_n) and lse = log(sum(exp(lse_n))), in lse's dtype.

    `stream` is the kernel's.
    """
    parts = [np.where(x.numpy() == np.inf, -np.inf, x.numpy()) for x in lses]      # +inf is FlashAttention's mark of an empty row
    peak = np.maximum.reduce(parts)
    peak = np.where(peak == -np.inf, 0, peak)
    weights = [np.exp(part - peak) for part in parts]
    total = sum(weights)
    divisor, merged = np.where(total == 0, 1, total), np.zeros(out.shape, lse.dtype)
    for x, weight in zip(outs, weights, strict=True):
        share = (weight / divisor).swapaxes(-1, -2)[..., None]      # shares sum to 1, so finite parts give a finite result
        merged += np.where(share == 0, 0, share * x.numpy().astype(lse.dtype))
    out.numpy()[...] = merged
    lse.numpy()[...] = peak + np.log(total)
