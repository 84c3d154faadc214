"""Random programs as the GPU kernels' stages, in Python's numbers (tools/gpu/traced.py), against the same programs in NumPy."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.flex.derivative import derivative
from fastattn.flex.evaluate import evaluate, places
from fastattn.flex.lower import lower
from fastattn.flex.trace import trace
from fastattn.gpu.flex import staged
from fastattn.gpu.flex.distance import by_distance
from tests.flex import programs
from tests.flex.programs import BATCH, HEADS, KEYS, ROWS, SHAPES, draw
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Memory, emulated

Array = np.ndarray[Any, Any]


def arguments(arrays: list[Array], memory: Memory, prefix: str) -> Any:
    """The kernel's arguments for these arrays."""
    found: dict[str, Any] = {}
    for n, x in enumerate(arrays):
        view = host_view(x)
        memory.allow(view)
        found[f"{prefix}{n}"] = view.ptr
        found |= {f"{prefix}{n}_by{axis}": stride for axis, stride in enumerate(view.strides)}
        found |= {f"{prefix}{n}_n{axis}": length for axis, length in enumerate(view.shape)}
    return SimpleNamespace(**found)


def by_stages(p: Any, arrays: list[Array], scores: Array, exact: bool) -> Array:
    """The outputs of all places, through tile, row, column and element: (outputs, BATCH, HEADS, ROWS, KEYS)."""
    memory, out = Memory(), np.zeros((len(p.outputs), *scores.shape))
    a = arguments(arrays, memory, "score")
    with emulated(memory), np.errstate(all="ignore"):
        made = staged.Staged(p, "score", staged.float64 if exact else None)
        tile_of, row_of, column_of, element_of = (made.functions[stage] for stage in staged.STAGES)
        for b, h in np.ndindex(BATCH, HEADS):
            tile = tile_of(a, b, h, 1.0)
            columns = [column_of(a, tile, b, h, k, 1.0) for k in range(KEYS)]
            for q in range(ROWS):
                row = row_of(a, tile, b, h, q, 1.0)
                for k in range(KEYS):
                    more = (q - k, float(q - k)) if made.distances else ()
                    out[:, b, h, q, k] = element_of(a, tile, row, columns[k], b, h, q, k, float(scores[b, h, q, k]), 1.0, *more)
    return out


@pytest.mark.parametrize("exact", [True, False], ids=["plain threads", "fragments"])
def test_random_programs(exact: bool) -> None:
    rng = np.random.default_rng(11)
    names, arrays = list(SHAPES), [rng.standard_normal(shape) for shape in SHAPES.values()]
    scores = rng.standard_normal((BATCH, HEADS, ROWS, KEYS))
    for n in range(60):
        tree = draw(np.random.default_rng(n)).score

        def score(s: Any, b: Any, h: Any, q: Any, k: Any, *given: Any, tree: Any = tree) -> Any:
            return programs.run(tree, programs.NUMPY, {"score": s, "b": b, "h": h, "q": q, "k": k}, dict(zip(names, given, strict=True)))
        p = derivative(trace(score, [("float64", x.ndim) for x in arrays])).program
        inputs = places(0, HEADS, ROWS, KEYS) | {"batch": np.arange(BATCH, dtype=np.int32)[:, None, None, None], "score": scores}
        want = [np.broadcast_to(x, scores.shape) for x in evaluate(p, inputs, arrays)]
        got = by_stages(p if exact else by_distance(lower(p)), arrays, scores, exact)
        for i, x in enumerate(want):
            finite = np.isfinite(x)
            assert np.array_equal(np.isnan(got[i]), np.isnan(x)), (n, i)
            near = np.abs(got[i][finite] - x[finite]) <= (1e-9 if exact else 1e-4) * (1 + np.abs(x[finite]))
            assert near.all(), (n, i, programs.shown(tree))


@pytest.mark.parametrize("score", [3.3e38, -3.3e38, 2.0**126, -1.5, 0.0])
def test_quotients_of_scores_of_any_size(score: float) -> None:
    """A bias of bfloat16's lowest number made s / (1 + abs(s)) 0: the reciprocal is below float32's normal numbers."""
    p = derivative(trace(lambda s, b, h, q, k: s / (1 + abs(s)))).program
    value, slope = by_stages(by_distance(lower(p)), [], np.full((BATCH, HEADS, ROWS, KEYS), score), False)[:, 0, 0, 0, 0]
    assert value == pytest.approx(score / (1 + abs(score))) and slope == pytest.approx(1 / (1 + abs(score))**2, rel=1e-6, abs=1e-30)


def distances(b: Any, h: Any, q: Any, k: Any) -> Any:
    """All that distance.py rewrites, and what it must leave."""
    near, side = abs(q - k) <= 3, (abs(q // 3 - k // 3) < 2) & (abs(k % 3 - q % 3) <= 1)
    return ((q >= k) & (k - q > -5) & near) | side | (k == q) | (abs(k - q) < 0) | (abs(q - k - 2) <= -1) | (abs(k - q) * 0.5 + (q - k) < 1)


def test_what_is_made_of_distances() -> None:
    p = trace(distances, mask=True)
    made = by_distance(lower(p))
    assert {line.value for line in made.lines if line.op == "input"} == {"q", "k", "behind", "apart"}
    assert any(line.op == "below" for line in made.lines) and not any(line.op == "float" for line in made.lines)
    scores = np.zeros((BATCH, HEADS, ROWS, KEYS))
    q, k = np.arange(ROWS)[:, None], np.arange(KEYS)
    assert np.array_equal(by_stages(made, [], scores, False)[0], np.broadcast_to(distances(0, 0, q, k), scores.shape))
