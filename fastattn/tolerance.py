"""The rule of accuracy: an error against float64 is at most twice that of the same computation done naively in the
input's precision, plus that dtype's rounding of the result.

Errors are Frobenius norms of a tensor's difference. The naive computation is the reference's own code in float32 with P
and dS rounded to the input's dtype before they are multiplied. The tests and `python -m fastattn check` both judge by
this file.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .reference import Precision

Array = np.ndarray[Any, Any]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FACTOR = 2.0


def naive_precision(dtype: str) -> Precision:
    """The arithmetic of the naive rival for inputs of a dtype."""
    return Precision("float32", dtype if dtype in ("float16", "bfloat16") else None, from_lse=True)


def norm(x: Array) -> float:
    """Frobenius norm of the finite elements."""
    x = np.asarray(x, np.float64)
    return float(np.linalg.norm(x[np.isfinite(x)]))


def distance(got: Array, exact: Array) -> float:
    """Frobenius norm of the difference; infinite where the infinities or NaNs of the two differ."""
    a, b = np.asarray(got).astype(np.float64), np.asarray(exact).astype(np.float64)
    if np.isnan(a).any() or np.isnan(b).any() or not np.array_equal(np.isinf(a) * np.sign(a), np.isinf(b) * np.sign(b)):
        return float("inf")
    finite = np.isfinite(b)
    return float(np.linalg.norm(a[finite] - b[finite]))


def allowed(rival: float, dtype: str, size: float, rounding: str | None = None, shrink: float = 1.0) -> float:
    """The largest error that is right, where the naive rival's is `rival`.

    `size` is the norm that a rounding of the result is taken of, in `dtype` or, if that is coarser, in `rounding`.
    `shrink`: the rival's precision is that much worse than the result's.
    """
    # two roundings of the arithmetic on top: with few elements the rival may just have been lucky
    return FACTOR * rival + (max(EPS[dtype], EPS[rounding or dtype]) + 2 * EPS["float32"] * shrink) * size
