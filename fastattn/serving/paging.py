"""Where a request's keys are: the one place in Python that reads a block table. (The CPU kernels' is in cpu/call.pxi.)"""
from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def key_row(table: Array, requests: int | Array, page_size: int, keys: Array) -> tuple[Array, Array]:
    """Where keys of requests are in a cache: their pages, and their rows in them. `table` is the block table."""
    size = max(page_size, 1)                                # caches without rows have no keys
    return table[requests, keys // size], keys % size
