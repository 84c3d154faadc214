"""Key and value caches in host memory: where a request's keys are, and how those of a call get there, with the rotation of q.

Every engine of host memory uses this. `key_row` is the one place in Python that reads a block table; the CPU kernels' is in cpu/call.pxi.

The arithmetic of a rotation is float32 (float64 for float64 arrays), rounded once to the dtype that is written.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .arrays.dlpack import address
from .arrays.view import EIGHT_BIT, View
from .problem import Operands, Problem, Rotary
from .quantize import quantized

Array = np.ndarray[Any, Any]


def key_row(table: Array, requests: int | Array, page_size: int, keys: Array) -> tuple[Array, Array]:
    """Where keys of requests are in a cache: their pages, and their rows in them. `table` is the block table."""
    size = max(page_size, 1)                                # caches without rows have no keys
    return table[requests, keys // size], keys % size


def append(problem: Problem, o: Operands) -> Operands:
    """Write the new keys and values behind those in the caches. Returns the operands of what is left: attention over the
    caches, with q rotated.
    """
    cache, given = problem.cache, o.cache
    assert cache is not None and given is not None
    q, turn = o.q, None
    if cache.rotary is not None:
        assert given.rotary_cos is not None and given.rotary_sin is not None
        turn = cache.rotary, given.rotary_cos.numpy(), given.rotary_sin.numpy()
    requests, positions, rows = _new_rows(problem, o)
    if cache.append:
        assert given.k is not None and given.v is not None
        pages, slots = key_row(given.block_table.numpy(), requests, cache.page_size, positions)
        for cached, new, scale, number, turned in ((o.k, given.k, o.k_scale, cache.k_scale, turn),
                                                   (o.v, given.v, o.v_scale, cache.v_scale, None)):
            x = new.numpy()[rows]
            x = x if turned is None else rotated(x, positions, *turned)
            if cached.dtype in EIGHT_BIT and new.dtype not in EIGHT_BIT:
                x = quantized(x, number if scale is None else scale.numpy()[requests][:, :, None], cached.dtype)
            cached.numpy()[pages, slots] = x
    if turn is not None:
        turned_q = np.array(q.numpy())
        turned_q[rows] = rotated(turned_q[rows], positions, *turn)
        q = View(address(turned_q), turned_q.shape, turned_q.strides, q.dtype, owner=turned_q)
    return replace(o, q=q)


def _new_rows(problem: Problem, o: Operands) -> tuple[Array, Array, Any]:
    """Of all query rows, request by request: their request, their position in its keys, and their index in q-like arrays."""
    assert o.seqused_k is not None
    used = o.seqused_k.numpy()
    if o.cu_seqlens_q is None:
        requests, row = np.repeat(np.arange(problem.batch), problem.seqlen_q), np.tile(np.arange(problem.seqlen_q), problem.batch)
        return requests, used[requests] - problem.seqlen_q + row, (requests, row)
    cu = o.cu_seqlens_q.numpy()
    requests, row = np.repeat(np.arange(problem.batch), np.diff(cu)), np.arange(cu[-1])
    return requests, (used - cu[1:])[requests] + row, row


def rotated(x: Array, positions: Array, rotary: Rotary, cos: Array, sin: Array) -> Array:
    """Rows x (rows, heads, dim), turned by their positions, not yet rounded where x has 16 bits."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    c: Array = cos.astype(real)[positions][:, None, :]
    s: Array = sin.astype(real)[positions][:, None, :]
    result, half = x.astype(real), rotary.dim // 2
    first = np.s_[..., 0:rotary.dim:2] if rotary.interleaved else np.s_[..., :half]
    second = np.s_[..., 1:rotary.dim:2] if rotary.interleaved else np.s_[..., half:rotary.dim]
    a: Array = result[first].copy()
    b: Array = result[second].copy()
    result[first], result[second] = a * c - b * s, a * s + b * c
    return result
