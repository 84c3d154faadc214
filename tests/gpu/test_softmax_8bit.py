"""The softmax in front of an 8-bit P: the kernel's own functions on NumPy arrays, in the kernel's order of blocks, P rounded to e4m3.

P never exceeds 448, lse is exact, and the output is as exact as one whose P is rounded to e4m3 after a whole softmax.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays.view import numpy_dtype
from fastattn.gpu.sm90.config_8bit import Forward8BitConfig
from fastattn.gpu.tile import softmax_8bit
from tests.tools.gpu.emulator import replaced

Array = np.ndarray[Any, Any]
E4M3, KEYS, BLOCK = numpy_dtype("float8_e4m3fn"), 1024, 128
OFFSET = Forward8BitConfig(block_m=128, block_n=BLOCK).offset
IDEAL = 7               # P times 2**7 uses most of e4m3's range
F32 = np.float32


def names() -> dict[str, Any]:
    """What stands for the names that the module imports: a fragment is a float32 array of two rows."""
    def exp2(x: Any) -> Any:
        return np.exp2(F32(x))

    def exp2_minus(acc: Array, scale0: Any, scale1: Any, max0: Any, max1: Any) -> Array:
        wide = acc.astype(np.float64) * F32(scale0) - np.array([[max0], [max1]], np.float64)      # one rounding, as an FMA
        return np.exp2(wide.astype(F32))
    return {"inline": lambda f: f, "float32": F32, "exp2": exp2, "log2": lambda x: np.log2(F32(x)), "quad_max": lambda x: x,
            "quad_sum": lambda x: x, "row_max": lambda acc, a, b: (max(acc[0].max(), a), max(acc[1].max(), b)),
            "row_sum": lambda acc: acc.sum(axis=1, dtype=F32), "exp2_minus": exp2_minus,
            "finite": lambda x: F32(0) if x == -np.inf else x, "NEG_INF": F32(-np.inf), "LN2": F32(np.log(2))}


def run(scores: Array, v: Array, scale: float) -> tuple[Array, Array, float]:
    """(out, lse, largest P) of two rows of products q.k, block after block from the last to the first. The first has maxima of its own, the
    others raise them only where a thread's sum is over 448."""
    with replaced(("tile.softmax_8bit",), names()):
        raised, probabilities, finish_row = softmax_8bit.make_softmax_8bit(OFFSET)
        lag, limit = F32(softmax_8bit.lag_of(OFFSET)), F32(softmax_8bit.TOP)
        top, total, out, largest = [F32(-np.inf)] * 2, [F32(0)] * 2, np.zeros((2, v.shape[1]), F32), 0.0
        for first in range(KEYS - BLOCK, -1, -BLOCK):
            acc = scores[:, first:first + BLOCK].astype(F32)
            first_of_all, alpha0, alpha1 = first == KEYS - BLOCK, F32(1), F32(1)
            if not first_of_all:
                P, *parts = probabilities(F32(scale), acc, *top)
                again = P.reshape(2, -1, 4, 2).sum(axis=(1, 3)).max() > limit       # of each thread of a quad
            if first_of_all or again:
                *top, alpha0, alpha1 = raised(F32(scale), acc, *top, lag if first_of_all else F32(0))
                P, *parts = probabilities(F32(scale), acc, *top)
            total = [total[0] * alpha0 + parts[0], total[1] * alpha1 + parts[1]]
            largest = max(largest, float(P.max()))
            rounded = np.minimum(P, F32(448)).astype(E4M3).astype(F32)
            out = out * np.array([[alpha0], [alpha1]], F32) + rounded @ v[first:first + BLOCK].astype(F32)
        ends = [finish_row(F32(scale), F32(1), top[n], total[n]) for n in range(2)]
    return out * np.array([[factor] for factor, _ in ends], F32), np.array([lse for _, lse in ends]), largest


def exact(scores: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """(out, lse, out whose P is rounded to e4m3 times 2**IDEAL) in float64."""
    S = scores * (scale * np.log(2))
    peak = S.max(axis=1, keepdims=True)
    P = np.exp(S - peak)
    rounded, total = np.minimum(P * 2.0**IDEAL, 448).astype(E4M3).astype(np.float64) / 2.0**IDEAL, P.sum(axis=1, keepdims=True)
    return P @ v / total, (peak + np.log(total))[:, 0], rounded @ v / total


def drawn(kind: str, seed: int = 0) -> tuple[Array, Array]:
    draw = np.random.default_rng(seed)
    scores, v = draw.standard_normal((2, KEYS)) * 1000, draw.standard_normal((KEYS, 16))
    if kind == "ones":
        scores[...] = 700.0
    if kind == "growing":                   # maxima that lag, block after block
        scores += np.linspace(20000, 0, KEYS)
    if kind == "spread":
        scores *= 3
    if kind == "positive":
        v = np.abs(v)
    return scores, v


@pytest.mark.parametrize("kind", ["normal", "ones", "growing", "spread", "positive"])
def test_as_exact_as_a_rounded_p(kind: str) -> None:
    scale, errors, ideal, size = 0.0013, 0.0, 0.0, 0.0
    for seed in range(24):                  # one row's roundings may have a common part
        scores, v = drawn(kind, seed)
        out, lse, largest = run(scores, v, scale)
        want, want_lse, rounded = exact(scores, v, scale)
        assert largest <= 448
        np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-4)
        errors, ideal, size = errors + ((out - want)**2).sum(), ideal + ((rounded - want)**2).sum(), size + (want**2).sum()
    # what lags is rounded at another place of e4m3's steps, with the same relative error; but P of a row's maximum is exact where it does
    # not lag, which is half of the error of rows that a few keys dominate
    assert errors**0.5 <= (2.1 if kind == "spread" else 1.15) * ideal**0.5 + 2e-4 * size**0.5
    if kind == "positive":
        assert errors**0.5 <= 2e-3 * size**0.5


def test_large_scores_stay_below_the_top() -> None:
    """Up to 2**24 in units of log2 the rounding of maximum * scale leaves P below 448."""
    for scale in (100.0, 1000.0, 8000.0):
        scores = np.round(np.random.default_rng(1).standard_normal((2, KEYS)) * 300)
        scores[:, 17] = scores.max() + 0.25
        out, lse, largest = run(scores, np.ones((KEYS, 1)), scale)
        assert largest <= 448 and np.isfinite(lse).all() and np.abs(out - 1).max() < 0.05


def test_a_row_without_keys() -> None:
    scores, v = drawn("normal")
    scores[1] = -np.inf
    with np.errstate(all="ignore"):
        out, lse, _ = run(scores, v, 0.001)
    assert lse[1] == -np.inf and (out[1] == 0).all() and np.isfinite(out[0]).all()
