"""merge_states: partial results over disjoint keys -> the result over all keys. In host memory it is computed here; gpu/rows/merge.py is
the kernel.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .arrays.convert import Caller
from .arrays.view import View
from .engine import load
from .options import Check
from .problem import check_array
from .signature import uncompiled
from .types import A, B, Layout


@uncompiled
def merge_states(outs: Sequence[A], lses: Sequence[B], *, layout: Layout | Literal["thd"] = "bshd", stream: Any = None) -> tuple[A, B]:
    """Attention over all keys from partial results over disjoint keys.

    Parameters
    ----------
    outs : sequence of arrays
        One out for each part, of one shape, dtype and device: (batch, seqlen_q, num_heads, head_dim_v), with
        "bhsd" (batch, num_heads, seqlen_q, head_dim_v), with "thd" (total_q, num_heads, head_dim_v).
    lses : sequence of arrays
        One lse for each part: (batch, num_heads, seqlen_q), with "thd" (num_heads, total_q); float32 (float64 for
        float64 outs).
    layout : {"bshd", "bhsd", "thd"}, default "bshd"
        Order of the axes of outs.
    stream : int or stream, optional
        As in `attention`, CUDA arrays only.

    Returns
    -------
    out, lse : array
        The shapes and dtypes of one part.

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
    check.dtype("outs[0]", first, ("float32", "float64", "float16", "bfloat16"))
    lse_shape, lse_dtype = (*first.shape[:-3], first.shape[-2], first.shape[-3]), first.compute_dtype
    for n, (out, lse) in enumerate(zip(out_views, lse_views, strict=True)):
        check_array(call, f"outs[{n}]", out, first.shape, first.dtype, first.device)
        check_array(call, f"lses[{n}]", lse, lse_shape, lse_dtype, first.device)
    merge = _merge if caller.stream is None else load("gpu", call).merge_states
    merged, merged_lse = caller.output(first.shape, first.dtype, first), caller.allocate(lse_shape, lse_dtype, lse_views[0])
    merge(out_views, lse_views, merged.view, merged_lse.view, caller.handle)
    return merged.finish(), merged_lse.finish()


@np.errstate(all="ignore")
def _merge(outs: list[View], lses: list[View], out: View, lse: View, stream: int | None = None) -> None:
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
