"""transform_bias_rescale_qkv on the CPU: one pass over memory in each direction.

transform.pxi has the loop, transform.h the conversions.
"""
from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..arrays import convert
from ..arrays.view import View, numpy_dtype
from . import _engine
from .threads import threads_of_call

SERIAL_BYTES = 256 << 10        # below it one thread: starting others takes as long
# Results from this size on are written past the caches: 36 MB in half the time (in the same time if the memory is new).
# 9 MB would take 10 % more.
STREAM_BYTES = 32 << 20


def _bytes(*arrays: View) -> int:
    return sum(math.prod(x.shape) * x.itemsize for x in arrays)


def _threads(size: int) -> int:
    return 1 if size < SERIAL_BYTES else threads_of_call()


def _copied(cu_seqlens: View | None) -> NDArray[np.int64] | None:
    """Read once, because the caller's array may change during the call."""
    return None if cu_seqlens is None else np.array(cu_seqlens.numpy(), np.int64)


def forward(qkv: View, qkv_bias: View, cu_seqlens: View | None, q: View, k: View, v: View, scale: float) -> None:
    """Write q = (q + bias) * scale, k + bias and v + bias, contiguous (batch, num_heads, seqlen, head_dim).

    qkv is (batch, seqlen, 3 * width), or packed (total, 3 * width) with cu_seqlens; then zeros follow each sequence's
    end.
    """
    real = np.float64 if qkv.dtype == "float64" else np.float32
    bias = np.ascontiguousarray(qkv_bias.numpy().astype(real))
    size, row = _bytes(q, k, v), q.shape[-1] * q.itemsize
    stream = size >= STREAM_BYTES and row % 16 == 0 and all(x.ptr % 16 == 0 for x in (q, k, v))
    _engine.transform(qkv, convert.view(bias, "transform", "bias"), _copied(cu_seqlens), (q, k, v), scale, stream, _threads(size))


def backward(dq: View, dk: View, dv: View, cu_seqlens: View | None, dqkv: View, dqkv_bias: View, scale: float) -> None:
    """Write dqkv and dqkv_bias, from dq, dk and dv of any strides.

    dqkv has the forward's contiguous rows, 0 for rows of no sequence. dqkv_bias is their sum: float32 in groups of
    rows, then float64.
    """
    rows = View(dqkv.ptr, (math.prod(dqkv.shape[:-1]), dqkv.shape[-1]), dqkv.strides[-2:], dqkv.dtype, dqkv.device, dqkv.owner)
    sums = _engine.transform_backward((dq, dk, dv), _copied(cu_seqlens), rows, scale, _threads(_bytes(dqkv)))
    dqkv_bias.numpy()[...] = sums.sum(axis=0, dtype=np.float64).astype(numpy_dtype(dqkv_bias.dtype))
