"""What is made of a program: its derivative, its lowered form, its text."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastattn.flex.derivative import Derivative, derivative
from fastattn.flex.evaluate import cut, evaluate, every_line, places
from fastattn.flex.lower import lower
from fastattn.flex.program import Program, renumbered
from fastattn.flex.trace import trace

RNG = np.random.default_rng(0)
TABLE, SLOPES, LIMIT = RNG.standard_normal((3, 7)), np.array([0.5, 1.0, 0.25]), np.array(1.5)
PLACES = places(1, 3, 5, 6)
SCORE = RNG.standard_normal((3, 5, 6))
F = Callable[..., Any]

FUNCTIONS: dict[str, tuple[F, list[Any]]] = {
    "alibi": (lambda s, b, h, q, k, m: s - m[h] * abs(q - k), [SLOPES]),
    "softcap": (lambda s, b, h, q, k: 20 * np.tanh(s / 20), []),
    "table": (lambda s, b, h, q, k, t: s * t[h, 0] + t[h, np.minimum(abs(q - k), 4)], [TABLE]),
    "limits": (lambda s, b, h, q, k, x: np.minimum(np.maximum(s, -x), x) + np.clip(s, -0.3, 0.4), [LIMIT]),
    "ratio": (lambda s, b, h, q, k, t: np.where(s > 0, s * t[h, q] / (1 + s * s), np.sqrt(1 + s * s) * t[h, k]) + np.sin(s) * t[h, k] ** 2,
              [TABLE]),
    "logs": (lambda s, b, h, q, k, m: np.log(1 + np.exp(s)) + np.log2(m[h] + abs(s)) + np.exp2(-s), [SLOPES]),
    "powers": (lambda s, b, h, q, k, m: (1 + s * s) ** m[h] + s ** 3 - 1 / (2 + s) + abs(s) ** 1.5, [SLOPES]),
    "whole": (lambda s, b, h, q, k, m: np.floor(s) * m[h] + s % 0.7 + s // m[h] + np.rint(s) + np.sign(s) * s, [SLOPES]),
    "cosine": (lambda s, b, h, q, k, m: np.cos(s * m[h]) * s + q, [SLOPES]),
    "constant": (lambda s, b, h, q, k, m: m[h] * q, [SLOPES]),
}


def traced(name: str) -> tuple[Program, list[Any]]:
    f, arrays = FUNCTIONS[name]
    return trace(f, [("float64", x.ndim) for x in arrays]), arrays


def gradients(d: Derivative, score: Any, arrays: list[Any], weights: Any) -> tuple[Any, list[Any]]:
    """The score's derivative, and what the weighted sum of scores has as gradients of the arrays."""
    lines = every_line(d.program, PLACES | {"score": score}, arrays)
    found = [np.zeros(x.shape) for x in arrays]
    for n, out in zip(d.loads, d.program.outputs[2:], strict=True):
        load = d.program.lines[n]
        at = tuple([np.broadcast_to(cut(lines[m], size), score.shape) for m, size in zip(load.args, arrays[load.value].shape, strict=True)])
        np.add.at(found[load.value], at or ..., weights * lines[out] if at else (weights * lines[out]).sum())
    return np.broadcast_to(lines[d.program.outputs[1]], score.shape), found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_differences(name: str) -> None:
    p, arrays = traced(name)
    d, weights, e = derivative(p), RNG.standard_normal(SCORE.shape), 1e-6
    slope, grads = gradients(d, SCORE, arrays, weights)

    def total(score: Any, arrays: list[Any]) -> Any:
        return np.broadcast_to(evaluate(p, PLACES | {"score": score}, arrays)[0], SCORE.shape)
    assert np.allclose((total(SCORE + e, arrays) - total(SCORE - e, arrays)) / (2 * e), slope, atol=1e-7)
    for number, a in enumerate(arrays):
        for at in np.ndindex(a.shape):
            moved = []
            for side in (e, -e):
                other = [x.copy() for x in arrays]
                other[number][at] += side
                moved.append((weights * total(SCORE, other)).sum())
            assert abs((moved[0] - moved[1]) / (2 * e) - grads[number][at]) < 1e-6, (number, at)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("exact", [False, True])
def test_lowered_programs_mean_the_same(name: str, exact: bool) -> None:
    p, arrays = traced(name)
    d = derivative(p).program
    want = evaluate(d, PLACES | {"score": SCORE}, arrays)
    low = lower(d, exact=exact)
    for a, b in zip(evaluate(low, PLACES | {"raw": SCORE / 0.5, "scale": 0.5}, arrays), want, strict=True):
        assert np.allclose(a, b, rtol=1e-9, atol=1e-9)
    left = {x.op for x in low.lines}
    assert exact or not left & {"exp", "log", "tanh", "sigmoid", "erf"}
    assert "score" not in low.used


def test_lowered_erf_and_sigmoid() -> None:
    torch = pytest.importorskip("torch")
    p = trace(lambda s, b, h, q, k: torch.erf(s) + torch.sigmoid(2 * s))
    x = np.linspace(-6, 6, 997)
    assert np.abs(evaluate(lower(p, raw=False), {"score": x})[0] - evaluate(p, {"score": x})[0]).max() < 2e-7
    got = evaluate(derivative(p).program, {"score": x})[1]
    y = torch.tensor(x, requires_grad=True)
    (torch.erf(y) + torch.sigmoid(2 * y)).sum().backward()
    assert np.allclose(got, y.grad.numpy(), atol=1e-12)


def test_factors_of_a_tile_become_one() -> None:
    low = lower(trace(lambda s, b, h, q, k: 30 * np.tanh(s / 30)))
    by_element = [x for x, c in zip(low.lines, low.classes, strict=True) if c == "element" and x.op == "mul"]
    assert len(by_element) == 2         # raw * (scale / 30 * 2 log2(e)), and the factor of the reciprocal


# ---------------------------------------------------------------- places where differentiating op by op gives NaN
NAN_FREE: dict[str, tuple[F, Any]] = {
    "log of a branch not taken": (lambda s: np.where(s > 0, np.log(s), 0), lambda s: np.where(s > 0, 1 / s, 0)),
    "sqrt at 0": (lambda s: np.where(s > 0, np.sqrt(s), s), lambda s: np.where(s > 0, 0.5 / np.sqrt(s), 1)),
    "division": (lambda s: np.where(s == 0, 1, np.sin(s) / s), lambda s: np.where(s == 0, 0, (np.cos(s) - np.sin(s) / s) / s)),
    "nested": (lambda s: np.where(s > 0, np.where(s > 1, np.log(s), np.sqrt(s)), 0),
               lambda s: np.where(s > 0, np.where(s > 1, 1 / s, 0.5 / np.sqrt(s)), 0)),
    "two branches share it": (lambda s: np.where(s > 0, np.log(s), 0) + np.where(s > 1, 2 * np.log(s), 0),
                              lambda s: np.where(s > 0, 1 / s, 0) + np.where(s > 1, 2 / s, 0)),
    "overflow": (lambda s: 1 / (1 + np.exp(-s * 1000)), lambda s: np.where(abs(s) > 0.7, 0, 250)),
    "0 * inf": (lambda s: 0 * (s > 9) * np.sqrt(s - s), lambda s: 0 * s),
    "abs under a root": (lambda s: np.sqrt(abs(s)), lambda s: np.where(s == 0, 0, np.sign(s) * 0.5 / np.sqrt(abs(s)))),
    "power": (lambda s: abs(s) ** 2.5, lambda s: 2.5 * np.sign(s) * abs(s) ** 1.5),
}


@pytest.mark.parametrize("name", NAN_FREE)
@np.errstate(all="ignore")
def test_derivatives_have_no_nan(name: str) -> None:
    f, want = NAN_FREE[name]
    s = np.array([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0]) if name != "overflow" else np.array([-800.0, -0.8, 0.0, 0.8, 800.0])
    for exact in (True, False):
        p = lower(derivative(trace(lambda score, b, h, q, k: f(score))).program, raw=False, exact=exact)
        got = np.broadcast_to(evaluate(p, {"score": s})[1], s.shape)
        assert np.isfinite(got).all() and np.allclose(got, want(s), rtol=1e-6), got


def test_only_asked_gradients_are_made() -> None:
    p, _ = traced("table")
    assert derivative(p, ()).loads == () and derivative(p, [0]).loads == derivative(p).loads != ()
    d = derivative(p)
    assert len(d.program.outputs) == 2 + len(d.loads) and d.arrays == (0, 0)


def test_programs_are_renumbered_and_cut() -> None:
    p = trace(lambda s, b, h, q, k, x, y: s + x[h] + y[h, k], [("float32", 1), ("float32", 2)])
    a = np.ones(3)
    moved = renumbered(p, (p.arrays[1], p.arrays[0]), (), {0: 1, 1: 0}, {})
    assert np.array_equal(evaluate(moved, PLACES | {"score": SCORE}, [TABLE, a])[0], evaluate(p, PLACES | {"score": SCORE}, [a, TABLE])[0])
    load = next(n for n, x in enumerate(p.lines) if x.op == "load" and x.value == 1)
    part = p.only(load)
    assert len(part.lines) == 3 and np.array_equal(evaluate(part, PLACES, [a, TABLE])[0], TABLE[PLACES["head"], PLACES["k"]])
