"""Boolean masks that models use, and the pairs that a kernel has to visit under them.

A mask is (batch or 1, 1, rows or 1, keys), True = may attend. It follows from numbers alone, so that a case's pairs can
be counted where there is no device. Every row attends at least one key.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Kind = Literal["random", "padding", "left", "documents", "prefix"]
TILE = 128      # rows and keys of a tile: a tile without any pair that may attend is not visited


def make(kind: Kind, batch: int, rows: int, keys: int) -> Array:
    """A mask of a kind; "random" is drawn on the device instead (bench/gpu/rivals.py), and leaves no tile empty.

    padding: keys behind each sequence's length, which is from a quarter of all keys to all.
    left: causal, without the keys of the padding on the left. Rows of padding attend themselves, as in transformers.
    documents: causal inside documents of one row of tokens, eight on average.
    prefix: causal, and everybody attends the first fifth.
    """
    draw = np.random.default_rng(0)
    row, key = np.arange(rows)[:, None] + keys - rows, np.arange(keys)
    lengths = draw.integers(keys // 4, keys, batch, endpoint=True)
    if kind == "padding":
        return np.asarray(key < lengths[:, None])[:, None, None, :]
    causal = key <= row
    if kind == "left":
        return ((causal & (key >= (keys - lengths)[:, None, None])) | (key == row))[:, None]
    if kind == "documents":
        document = np.cumsum(np.isin(key, draw.choice(keys, 7)))
        return (causal & (document[row] == document))[None, None]
    if kind == "prefix":
        return (causal | (key < keys // 5))[None, None]
    raise ValueError(f"a mask of kind {kind!r} has no definition here")


@lru_cache(64)
def visited(kind: Kind, batch: int, rows: int, keys: int) -> int:
    """Pairs of one head, over the whole batch, in tiles that hold a pair that may attend."""
    if kind == "random":
        return batch * rows * keys
    mask = make(kind, batch, rows, keys)
    of_keys = np.arange(0, keys, TILE)
    widths = np.diff(np.append(of_keys, keys))
    occupied = np.logical_or.reduceat(mask, of_keys, axis=3)
    if mask.shape[2] == 1:
        heights = np.array([rows])
    else:
        of_rows = np.arange(0, rows, TILE)
        heights = np.diff(np.append(of_rows, rows))
        occupied = np.logical_or.reduceat(occupied, of_rows, axis=2)
    return int((occupied * widths * heights[:, None]).sum()) * (batch // mask.shape[0])
