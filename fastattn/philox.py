"""Philox4x32-10 and the keep mask in NumPy: the definition of dropout, which every engine reproduces bit for bit.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its library Random123.

One Philox call covers eight elements of a 16 x 16 piece of the score matrix, addressed by position and not by tile:

    element (batch b, head h, row i, column j) of the problem that dropout_at and dropout_heads speak of
    counter = ((i // 16) * 8 + i % 8, (j // 16) * 4 + (j % 8) // 2, b * num_heads + h, offset)
    key     = (low, high) word of the seed
    lane    = ((i % 16) // 8) * 4 + ((j % 16) // 8) * 2 + j % 2      16 bits each; lane 0 is the low half of word 0
    kept when lane value >= round(p * 65536)
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .problem import Dropout

_ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)     # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85                           # key increments: golden ratio and sqrt(3) - 1
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray[Any, Any], key: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Philox4x32-10: `counter` (..., 4) uint32 and `key` (..., 2) uint32, broadcast -> (..., 4) uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for i in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        round_0, round_1 = (k0 + np.uint64(i * _W0 & 0xFFFFFFFF)) & _LOW, (k1 + np.uint64(i * _W1 & 0xFFFFFFFF)) & _LOW
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ round_0, p1 & _LOW, (p0 >> _32) ^ c3 ^ round_1, p0 & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def keep_mask(dropout: Dropout, batches: Sequence[int], num_heads: int, seqlen_q: int, seqlen_k: int) -> np.ndarray[Any, Any]:
    """The elements that dropout keeps, (len(batches), num_heads, seqlen_q, seqlen_k) bool.

    `batches` are sequence numbers.
    """
    rows, columns = -(-seqlen_q // 16), -(-seqlen_k // 16)
    first, all_heads = dropout.plane(num_heads)
    heads = (first + np.asarray(batches, np.int64).reshape(-1, 1) * all_heads + np.arange(num_heads)).reshape(-1, 1, 1)
    counter = np.empty((heads.size, rows * 8, columns * 4, 4), np.uint32)
    counter[..., 0] = dropout.row // 2 + np.arange(rows * 8).reshape(-1, 1)
    counter[..., 1] = dropout.column // 4 + np.arange(columns * 4)
    counter[..., 2] = heads & 0xFFFFFFFF
    counter[..., 3] = dropout.offset
    words = philox4x32(counter, np.array([dropout.seed & 0xFFFFFFFF, dropout.seed >> 32], np.uint32))
    lanes = np.stack([words & 0xFFFF, words >> 16], axis=-1)
    # (head, row piece, i % 8, column piece, (j % 8) // 2, i half, j half, j % 2) -> i and j in order
    lanes = lanes.reshape(heads.size, rows, 8, columns, 4, 2, 2, 2).transpose(0, 1, 5, 2, 3, 6, 4, 7)
    lanes = lanes.reshape(len(batches), num_heads, rows * 16, columns * 16)
    return np.asarray(lanes[..., :seqlen_q, :seqlen_k] >= dropout.threshold)
