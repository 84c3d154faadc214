"""The gradient of the bias: where the kernels add dS, so that a broadcast bias needs little extra memory."""
from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays.convert import view
from ..arrays.view import View, numpy_dtype
from ..problem import Problem
from .plan import Lengths

# rows: the bias is broadcast over keys. The kernels sum dS over each query row, add_rows sums the rest
# sums: dS are added to reals (float32 or float64) of dbias's shape; to dbias itself if it holds such reals
# once: nothing is broadcast and dbias has a narrower dtype. Each dS is rounded and stored once
# pass: as once, but sequences or heads share dbias. The kernels sum it piece by piece in an extra pass, 1.4 times the work
Way = Literal["none", "rows", "sums", "once", "pass"]
SUMS_BYTES = 16 << 20   # reals next to a narrower dbias: up to this size they cost less than a pass


def way_of(p: Problem, dbias: View | None) -> tuple[Way, bool]:
    """The way, and whether the kernels write into dbias itself."""
    if dbias is None:
        return "none", False
    shape, real = dbias.shape, numpy_dtype(p.compute_dtype)
    if shape[3] == 1 and p.seqlen_k > 1:
        return "rows", False
    if dbias.dtype == p.compute_dtype and dbias.strides[3] == dbias.itemsize:
        return "sums", True
    if shape == (p.batch, p.num_heads, p.seqlen_q, p.seqlen_k):
        return "once", True
    if (shape[2] == 1 and p.seqlen_q > 1) or np.prod(shape, dtype=object) * real.itemsize <= SUMS_BYTES:
        return "sums", False
    return "pass", True


def reals(shape: tuple[int, ...], p: Problem) -> tuple[NDArray[Any], View]:
    """Zeros, to which the kernels add dS."""
    sums = np.zeros(shape, numpy_dtype(p.compute_dtype))
    return sums, view(sums, p.call, "dbias")


def add_rows(sums: NDArray[Any], lengths: Lengths, dbias: View) -> None:
    """dbias of a bias that is broadcast over keys, from the sums of its rows, (batch, heads, seqlen_q) or (heads, total_q)."""
    to, one = dbias.numpy(), tuple(n == 1 for n in dbias.shape)
    if lengths.cu_q is None:
        to[...] = sums.sum(axis=tuple(i for i in range(3) if one[i]), keepdims=True, dtype=np.float64)[..., None]
        return
    to[...] = 0
    total = np.zeros((to.shape[1], 1 if one[2] else lengths.longest_q))
    for b, (begin, end) in enumerate(zip(lengths.cu_q[:-1], lengths.cu_q[1:], strict=True)):
        if not one[0]:
            total[...] = 0
        rows = sums[:, begin:end].sum(axis=tuple(i - 1 for i in (1, 2) if one[i]), keepdims=True, dtype=np.float64)
        total[:, :rows.shape[1]] += rows
        to[0 if one[0] else b, :, :total.shape[1], 0] = total
