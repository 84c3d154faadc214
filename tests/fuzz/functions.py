"""score_mod and mask_mod of a Spec: the function as a user writes it, the arrays that it holds, and its formula in float64 with its error.

A function is known by a name. `held` makes its arrays; `given` is what the call gets, around those arrays in whatever library they are by
then. The formulas know nothing of the package: `changed` is what a score becomes, `seen` which pairs a mask lets through.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastattn

from .spec import Spec

Array = np.ndarray[Any, Any]
Arrays = tuple[Any, ...]
BLOCK = (24, 40)                                # rows and keys of a block of Spec.block_mask


class Place(NamedTuple):
    """Of all pairs of sequence b: axes (num_heads, rows, keys)."""

    b: int
    h: Array
    q: Array
    k: Array


class Changed(NamedTuple):
    """Scores after a function. `slope`: the derivative by the score. `parts`, of each array: the indices of the element that a pair reads,
    the derivative by it, and how far that may be off."""

    x: Array
    error: Array
    slope: Any
    slope_error: Any
    parts: tuple[tuple[tuple[Any, ...], Any, Any], ...] = ()


class Score(NamedTuple):
    """`arrays` of (random numbers, the Spec, the arithmetic's dtype); `make` closes over them, or takes them as `captured`; `formula` of
    (scores, their error, eps, places, arrays, the Spec)."""

    arrays: Callable[[np.random.Generator, Spec, Any], Arrays]
    make: Callable[[Spec, Arrays], Callable[..., Any]]
    captured: bool
    formula: Callable[[Array, Array, float, Place, Arrays, Spec], Changed]


def _no_arrays(random: np.random.Generator, s: Spec, real: Any) -> Arrays:
    return ()


def _heads(s: Spec) -> int:
    return max(s.num_heads, 1)


def _number(s: Spec) -> int:
    """A number that a function holds: another in each problem, so that it becomes a run-time number."""
    return 1 + s.seed % 7


# ---------------------------------------------------------------- scores
def _relative(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    at = p.h, np.clip(p.q - p.k + 4, 0, 8)
    more = arrays[0][at]
    return Changed(x + more, error + eps * (np.abs(x) + 2 * np.abs(more)), 1.0, 0.0, ((at, 1.0, 0.0),))


def _rated(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    """A factor of the head, at most 1 because scores may be as large as numbers get, and a summand of the key in 16 bits."""
    rate, more = arrays[0][p.h], arrays[1][p.k % 7]
    return Changed(x * rate + more, error * rate + 2 * eps * (np.abs(x * rate) + np.abs(more)), rate, 0.0,
                   (((p.h,), x, error), ((p.k % 7,), 1.0, 0.0)))


def _capped(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    """As softcap in formula.py; and the derivative by the cap, tanh(y) - y (1 - tanh(y)**2)."""
    cap = arrays[0]
    y, e = x / cap, error / cap + 2 * eps * np.abs(x / cap)
    tanh, slope = np.tanh(y), 1 / np.cosh(y) ** 2
    far, saturated = 1 / np.cosh(np.maximum(np.abs(y) - e, 0)) ** 2, np.abs(y) > (11 if eps > 1e-10 else 21)
    slope_error = np.minimum(0.8 * e, far) + 4 * eps * np.where(saturated, slope, 1)
    spread = np.maximum(np.abs(np.tanh(y + e) - tanh), np.abs(np.tanh(y - e) - tanh))
    by_cap = tanh - np.where(saturated, 0, y) * slope
    return Changed(cap * tanh, cap * (spread + 8 * eps), slope, slope_error,
                   (((), by_cap, np.minimum(e, 2) + 8 * eps * (1 + np.where(saturated, 0, np.abs(y)))),))


def _slopes(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    far, slopes = np.abs(p.q - p.k), arrays[0][p.h]
    return Changed(x - slopes * far, error + eps * (np.abs(x) + 3 * slopes * far), 1.0, 0.0, (((p.h,), -far, 0.0),))


def _gated(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    rate = np.where((p.q + p.k) % 3 == 0, _number(s) / 8, 1.0)
    return Changed(x * rate, error * rate + eps * np.abs(x * rate), rate, 0.0)


def _positive(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    """A kink: near it the slope is either side's."""
    return Changed(np.maximum(x, 0), error, np.where(x > 0, 1.0, 0.0), np.where(np.abs(x) <= error, 1.0, 0.0))


def _bounded(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    size = 1 + np.abs(x)
    near = 1 + np.maximum(np.abs(x) - error, 0)             # the steepest place that a rounded score may be at
    return Changed(x / size, np.minimum(error / (size * near), 2) + 4 * eps, 1 / size**2,
                   np.minimum(2 * error / (near * near * size), 2) + 8 * eps / size)


def _holes(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    """-inf from the function itself, which is not a mask: also for all keys of a row."""
    shut = ((3 * p.q + p.k) % 5 == p.h) | (p.q % 6 == 5)
    return Changed(np.where(shut, -np.inf, x), error, np.where(shut, 0.0, 1.0), 0.0)


def _constant(x: Array, error: Array, eps: float, p: Place, arrays: Arrays, s: Spec) -> Changed:
    """A score that does not depend on q and k, whose gradients are 0."""
    at = np.broadcast_arrays(p.h, p.k % 9)
    more = np.broadcast_to(arrays[0][tuple(at)], x.shape)
    return Changed(more, eps * np.abs(more), 0.0, 0.0, ((tuple(at), 1.0, 0.0),))


def _gate(n: int) -> Callable[..., Any]:
    return lambda x, b, h, q, k: np.where((q + k) % 3 == 0, x * (n / 8), x)


SCORES: dict[str, Score] = {
    "relative": Score(lambda random, s, real: (random.standard_normal((_heads(s), 9)).astype(real),),
                      lambda s, held: lambda x, b, h, q, k, t: x + t[h, np.clip(q - k + 4, 0, 8)], True, _relative),
    "rated": Score(lambda random, s, real: (random.uniform(0.5, 1, _heads(s)).astype(real), random.standard_normal(7).astype(np.float16)),
                   lambda s, held: lambda x, b, h, q, k, rate, more: x * rate[h] + more[k % 7], True, _rated),
    "capped": Score(lambda random, s, real: (np.array(random.uniform(1, 6), real),),
                    lambda s, held: lambda x, b, h, q, k, cap: cap * np.tanh(x / cap), True, _capped),
    "slopes": Score(lambda random, s, real: (random.choice([0.5, 0.25, 0.0625, 0.03], _heads(s)).astype(real),),
                    lambda s, held: lambda x, b, h, q, k: x - held[0][h] * abs(q - k), False, _slopes),
    "gated": Score(_no_arrays, lambda s, held: _gate(_number(s)), False, _gated),
    "positive": Score(_no_arrays, lambda s, held: lambda x, b, h, q, k: np.maximum(x, 0), False, _positive),
    "bounded": Score(_no_arrays, lambda s, held: lambda x, b, h, q, k: x / (1 + abs(x)), False, _bounded),
    "holes": Score(_no_arrays, lambda s, held: lambda x, b, h, q, k: np.where(((3 * q + k) % 5 == h) | (q % 6 == 5), -np.inf, x), False,
                   _holes),
    "constant": Score(lambda random, s, real: (random.standard_normal((_heads(s), 9)).astype(real),),
                      lambda s, held: lambda x, b, h, q, k: held[0][h, k % 9], False, _constant),
}


def has_arrays(name: str) -> bool:
    """Whether the score_mod of this name has gradients beside that of the score."""
    return SCORES[name].arrays is not _no_arrays


# ---------------------------------------------------------------- masks
class Mask(NamedTuple):
    """`arrays` of (random numbers, the Spec); `make` closes over them; `formula` of (places, arrays, the Spec)."""

    arrays: Callable[[np.random.Generator, Spec], Arrays]
    make: Callable[[Spec, Arrays], Callable[..., Any]]
    formula: Callable[[Place, Arrays, Spec], Array]


def _documents(random: np.random.Generator, s: Spec) -> Arrays:
    """Of each position its document. The last positions are left out: every index is cut to the array."""
    longest = max(s.full[2:])
    return (np.sort(random.integers(0, 4, (max(s.sequences, 1), max(1, longest - longest // 9))), axis=1).astype(np.int32),)


def _same_document(p: Place, arrays: Arrays, s: Spec) -> Array:
    [held] = arrays
    last = held.shape[1] - 1
    return np.asarray(held[p.b, np.minimum(p.q, last)] == held[p.b, np.minimum(p.k, last)])


def _window(n: int) -> Callable[..., Any]:
    return lambda b, h, q, k: abs(q - k) < n


MASKS: dict[str, Mask] = {
    "document": Mask(_documents, lambda s, held: lambda b, h, q, k: held[0][b, q] == held[0][b, k], _same_document),
    "prefix": Mask(lambda random, s: (random.integers(0, 40, max(s.sequences, 1)).astype(np.int32),),
                   lambda s, held: lambda b, h, q, k: (q >= k) | (k < held[0][b]),
                   lambda p, held, s: (p.q >= p.k) | (p.k < held[0][p.b])),
    "dilated": Mask(lambda random, s: (), lambda s, held: lambda b, h, q, k: (q - k) % 3 == 0, lambda p, held, s: (p.q - p.k) % 3 == 0),
    "sliding": Mask(lambda random, s: (), lambda s, held: _window(8 * _number(s)),
                    lambda p, held, s: np.abs(p.q - p.k) < 8 * _number(s)),
    "heads": Mask(lambda random, s: (), lambda s, held: lambda b, h, q, k: np.where(h % 2 == 1, q >= k, (k & 3) != 0),
                  lambda p, held, s: np.where(p.h % 2 == 1, p.q >= p.k, p.k % 4 != 0)),
    "rows": Mask(lambda random, s: (), lambda s, held: lambda b, h, q, k: (q % 4 != 1) & (k >= 2),
                 lambda p, held, s: (p.q % 4 != 1) & (p.k >= 2)),
    "chosen": Mask(lambda random, s: (random.random((_heads(s), max(s.full[3], 1))) < 0.6,),
                   lambda s, held: lambda b, h, q, k: held[0][h, k], lambda p, held, s: np.asarray(held[0][p.h, p.k])),
    "nothing": Mask(lambda random, s: (), lambda s, held: lambda b, h, q, k: k < 0, lambda p, held, s: p.k < 0),
}


# ---------------------------------------------------------------- of a Spec
def held(random: np.random.Generator, s: Spec, real: Any) -> dict[str, Array]:
    """The arrays of its functions and of its blocks, by name."""
    found: dict[str, Array] = {}
    if s.score_mod is not None:
        found |= {f"score_mod{n}": x for n, x in enumerate(SCORES[s.score_mod].arrays(random, s, real))}
    if s.mask_mod is not None:
        found |= {f"mask_mod{n}": x for n, x in enumerate(MASKS[s.mask_mod].arrays(random, s))}
    if s.block_mask == "blocks":
        counts = [-(-n // size) for n, size in zip(s.full[2:], BLOCK, strict=True)]
        found["blocks"] = random.random((random.choice([1, max(s.sequences, 1)]), random.choice([1, _heads(s)]), *counts)) < 0.7
    return found


def arrays_of(argument: str, arrays: dict[str, Any]) -> Arrays:
    """Those of "score_mod" or "mask_mod", in their order."""
    return tuple(x for name, x in arrays.items() if name.startswith(argument))


def given(s: Spec, arrays: dict[str, Any]) -> dict[str, Any]:
    """The functions as options of the call, around arrays that are on its device."""
    found: dict[str, Any] = {}
    if s.score_mod is not None:
        own = arrays_of("score_mod", arrays)
        found["score_mod"] = SCORES[s.score_mod].make(s, own)
        if SCORES[s.score_mod].captured:
            found["captured"] = own
    mask = None if s.mask_mod is None else MASKS[s.mask_mod].make(s, arrays_of("mask_mod", arrays))
    if s.block_mask is not None:
        found["block_mask"] = fastattn.block_mask(mask, s.sequences or None, s.num_heads or None, *s.full[2:], blocks=arrays.get("blocks"),
                                                  block=BLOCK)
    elif mask is not None:
        found["mask_mod"] = mask
    return found


def _places(s: Spec, b: int, rows: int, keys: int) -> Place:
    return Place(b, np.arange(s.num_heads)[:, None, None], np.arange(rows)[:, None], np.arange(keys))


def changed(s: Spec, b: int, arrays: dict[str, Array], x: Array, error: Array, eps: float) -> Changed:
    """The scores (num_heads, rows, keys) of sequence b after score_mod."""
    assert s.score_mod is not None
    own = tuple(y.astype(np.float64) for y in arrays_of("score_mod", arrays))
    return SCORES[s.score_mod].formula(x, error, eps, _places(s, b, *x.shape[1:]), own, s)


def seen(s: Spec, b: int, arrays: dict[str, Array], rows: int, keys: int) -> Array:
    """(num_heads, rows, keys), broadcast: which pairs of sequence b the mask_mod and the blocks let through."""
    found = np.ones((1, 1, 1), bool)
    if s.mask_mod is not None:
        found = found & MASKS[s.mask_mod].formula(_places(s, b, rows, keys), arrays_of("mask_mod", arrays), s)
    if s.block_mask == "blocks":
        blocks = np.broadcast_to(arrays["blocks"], (max(s.sequences, 1), _heads(s), *arrays["blocks"].shape[2:]))
        found = found & blocks[b][:s.num_heads, np.arange(rows)[:, None] // BLOCK[0], np.arange(keys) // BLOCK[1]]
    return found
