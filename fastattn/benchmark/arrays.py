"""NumPy arrays as other libraries' arrays, in the same memory."""
from __future__ import annotations

import importlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
# Largest accepted relative difference of two results: rounding gives a tenth of it, a wrong mask or scale 1.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def aligned(values: Array, dtype: str) -> Array:
    """A copy that starts on a cache line, as torch's arrays do. NumPy guarantees 16 bytes only."""
    kind: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    memory = np.empty(values.size * kind.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: Array = memory[start:start + values.size * kind.itemsize].view(kind).reshape(values.shape)
    array[...] = values
    return array


def tensor(array: Array) -> Any:
    """The same memory as a torch tensor. bfloat16 goes through int16, because torch does not know ml_dtypes."""
    torch = importlib.import_module("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
