"""The numbers of a problem: ordinary ones, and those that break softmax.

Huge scores come from small integers times powers of two, so that every engine's products and sums are exact and the right answer is one
number: what rounding would decide is drawn seldom.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}     # the smallest denormal
SCORES = ("normal", "integers", "huge_integers", "huge", "equal_keys", "one_hot", "denormal", "large_k", "zero")
BIAS = ("normal", "inf", "large_rows", "large_parts", "lowest_rows", "lowest_parts", "integers", "large_all")
NUMBERS = ("float", "int", "np.float64", "np.float32", "array")


def standard(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return random.standard_normal(shape, dtype=np.float32).astype(NUMPY[dtype])


def power(random: np.random.Generator, low: int, high: int) -> float:
    return 2.0 ** int(random.integers(low, high + 1))


def query_and_key(random: np.random.Generator, kind: str, dtype: str, shape_q: tuple[int, ...], shape_k: tuple[int, ...],
                  scale: float) -> tuple[Array, Array]:
    """q and k of `kind`. Scores, scale included, stay finite in float32; so do the sums of products before the scale."""
    dim = max(shape_q[-1], 1)
    q, k = (random.standard_normal(shape, dtype=np.float32).astype(np.float64) for shape in (shape_q, shape_k))
    if kind in ("integers", "huge_integers", "equal_keys"):
        q, k = np.rint(2 * q), np.rint(2 * k)
    if kind == "equal_keys" and shape_k[1 if len(shape_k) == 4 else 0]:
        k[...] = k[..., :1, :, :]
    if kind == "zero":
        (q if random.random() < 0.5 else k)[...] = 0
    if kind == "one_hot":
        for x in (q, k):
            hot = random.integers(0, min(dim, 3), x.shape[:-1])[..., None] == np.arange(dim)
            x[...] = np.where(hot, random.choice([1.0, 2.0, -1.0], x.shape), 0)
    if kind in ("huge_integers", "huge", "one_hot", "equal_keys"):
        up_q, up_k = _sizes(random, dtype, dim * 64.0, abs(scale))
        q, k = q * up_q, k * up_k
    if kind == "denormal":
        (q if random.random() < 0.5 else k)[...] *= TINY[dtype]
    if kind == "large_k":                       # scores of ordinary size from operands of very different sizes
        limit = min(math.log2(LARGEST[dtype]) - 4, -math.log2(TINY[dtype]) - 24, 60)
        up = power(random, 0, int(max(limit, 0)))
        q, k = q / up, k * up
    q, k = (np.clip(x, -LARGEST[dtype], LARGEST[dtype]) for x in (q, k))
    return q.astype(NUMPY[dtype]), k.astype(NUMPY[dtype])


def _sizes(random: np.random.Generator, dtype: str, sum_of: float, scale: float) -> tuple[float, float]:
    """Powers of two for q and for k: sum_of such products, and their score, stay below 2**120 (float64: 2**1000)."""
    top, largest = (1000, 1000) if dtype == "float64" else (120, min(int(math.log2(LARGEST[dtype])) - 5, 120))
    room = top - math.ceil(math.log2(max(sum_of, 1))) - max(0, math.ceil(math.log2(scale)) if scale > 0 else 0)
    total = int(random.integers(0, max(room, 0) + 1)) if random.random() < 0.4 else int(random.integers(0, max(min(room, 45), 0) + 1))
    a = int(random.integers(max(0, total - largest), min(total, largest) + 1)) if total - largest <= min(total, largest) else largest
    return 2.0**a, 2.0 ** min(total - a, largest)


def bias_of(random: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: str, beside: bool = False) -> Array:
    """A bias: finite but for -inf, and of any size that the dtype has; half of it `beside` large scores, so that the sum is finite."""
    bias = np.asarray(random.standard_normal(shape))
    lowest, part = -LARGEST[dtype] / (2 if beside else 1), random.random(shape) < 0.4
    rows = random.random((*shape[:-1], 1) if shape else ()) < 0.6
    large = max(float(random.choice([-1e4, -1e9, -1e10, -1e12, -2.0**30, -1e30, -1e36])), lowest)
    if kind == "inf":
        bias[part] = -np.inf
        bias[np.broadcast_to(rows & (random.random(rows.shape) < 0.3), shape)] = -np.inf
    elif kind in ("large_rows", "lowest_rows"):
        bias[np.broadcast_to(rows, shape)] = large if kind == "large_rows" else lowest
    elif kind in ("large_parts", "lowest_parts"):
        bias[part] = large if kind == "large_parts" else lowest
        bias[np.broadcast_to(rows & (random.random(rows.shape) < 0.2), shape)] = lowest
    elif kind == "large_all":
        bias[...] = large if random.random() < 0.7 else -large if -large < LARGEST[dtype] else lowest
    elif kind == "integers":
        bias = np.asarray(np.rint(bias * 4) * power(random, 0, 10 if dtype == "float16" else 60))
    return bias.astype(NUMPY[dtype])


def number(kind: str, x: float | None) -> Any:
    """An option of this value as another kind of number: what a caller's configuration may hold."""
    if x is None:
        return None
    if kind == "int":
        return int(x) if float(x).is_integer() and abs(x) < 2**63 else x
    if kind == "np.float32":
        return np.float32(x) if float(np.float32(x)) == x else np.float64(x)
    if kind == "np.float64":
        return np.float64(x)
    return np.array(x, np.float64) if kind == "array" else x


def count(kind: str, x: int | None) -> Any:
    """As `number`, for integers."""
    if x is None or kind in ("float", "int"):
        return x
    if kind == "array" and -(2**63) <= x < 2**63:
        return np.array(x, np.int64)
    return np.uint64(x) if x >= 0 else np.int64(x)
