"""merge_states in host memory: partial results over disjoint keys -> the result over all keys. gpu/rows/merge.py is the
kernel.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""
from __future__ import annotations

import numpy as np

from .arrays.view import View


@np.errstate(all="ignore")
def merge_states(outs: list[View], lses: list[View], out: View, lse: View, stream: int | None = None) -> None:
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
