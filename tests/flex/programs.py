"""Random functions of a score and its place: the same tree runs on stand-ins, on NumPy's arrays and on torch's tensors.

    python -c "from tests.flex.programs import draw, shown; import numpy as np; print(shown(draw(np.random.default_rng(3)).score))"
"""
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Tree = tuple[Any, ...]
BATCH, HEADS, ROWS, KEYS = 2, 2, 6, 7
SHAPES = {"per head": (HEADS,), "table": (HEADS, 9), "of batch": (BATCH, 3), "number": (), "keys": (KEYS,)}


class Drawn(NamedTuple):
    """A score_mod and a mask_mod as trees."""

    score: Tree
    mask: Tree


class Words(NamedTuple):
    """What differs between libraries."""

    where: Callable[..., Any]
    minimum: Callable[..., Any]
    maximum: Callable[..., Any]
    tanh: Callable[..., Any]
    exp: Callable[..., Any]
    log: Callable[..., Any]
    sqrt: Callable[..., Any]
    sin: Callable[..., Any]
    cos: Callable[..., Any]
    floor: Callable[..., Any]
    real: Callable[..., Any]            # integers as floats


NUMPY = Words(np.where, np.minimum, np.maximum, np.tanh, np.exp, np.log, np.sqrt, np.sin, np.cos, np.floor, lambda x: x * 1.0)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod, "&": operator.and_,
              "|": operator.or_, "^": operator.xor, "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
              ">": operator.gt}


def torch_words(torch: Any) -> Words:
    """Logarithms and roots are kept away from what torch differentiates to NaN, where a tree does not take them."""
    def both(f: Any) -> Any:
        return lambda x, y: f(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64))
    return Words(lambda c, x, y: both(lambda x, y: torch.where(c, x, y))(x, y), both(torch.minimum), both(torch.maximum), torch.tanh,
                 torch.exp, lambda x: torch.log(torch.where(x > 0, x, 1.0)), lambda x: torch.sqrt(torch.where(x > 0, x, 1.0)), torch.sin,
                 torch.cos, torch.floor, lambda x: x.to(torch.float64))


# ---------------------------------------------------------------- drawing
def draw(rng: np.random.Generator) -> Drawn:
    score = ("cap", ("+", ("score",), _real(rng, 5)) if rng.random() < 0.8 else _real(rng, 6))
    return Drawn(score, ("|", _condition(rng, 4), (rng.choice(["<=", "=="]), ("k",), ("q",))))


def _choose(rng: np.random.Generator, *choices: Callable[[], Tree]) -> Tree:
    return choices[rng.integers(len(choices))]()


def _real(rng: np.random.Generator, depth: int) -> Tree:
    def real() -> Tree:
        return _real(rng, depth - 1)
    if depth <= 0 or rng.random() < 0.1:
        return _choose(rng, lambda: ("score",), lambda: ("score",), lambda: ("const", round(float(rng.uniform(-2, 2)), 2)),
                       lambda: ("load", "per head", ("h",)), lambda: ("load", "number"), lambda: ("real", _whole(rng, 1)),
                       lambda: ("load", "table", ("h",), _whole(rng, 2)), lambda: ("load", "of batch", ("b",), _whole(rng, 1)),
                       lambda: ("load", "keys", ("k",)))
    if rng.random() < 0.45:
        return (str(rng.choice(["+", "-", "*", "minimum", "maximum", "ratio"])), real(), real())
    if rng.random() < 0.3:
        return ("where", _condition(rng, depth - 1), real(), real())
    unary = ["tanh", "sin", "cos", "bell", "abs", "neg", "root", "guarded log", "guarded root", "square", "floor", "softplus"]
    return (str(rng.choice(unary)), real())


def _whole(rng: np.random.Generator, depth: int) -> Tree:
    if depth <= 0:
        return _choose(rng, lambda: ("q",), lambda: ("k",), lambda: ("h",), lambda: ("b",), lambda: ("const", int(rng.integers(0, 5))))
    if rng.random() < 0.3:
        return (str(rng.choice(["//", "%"])), _whole(rng, depth - 1), ("const", int(rng.integers(1, 4))))
    if rng.random() < 0.2:
        return ("abs", _whole(rng, depth - 1))
    return (str(rng.choice(["+", "-", "*", "&", "|", "^"])), _whole(rng, depth - 1), _whole(rng, depth - 1))


def _condition(rng: np.random.Generator, depth: int) -> Tree:
    if depth > 0 and rng.random() < 0.4:
        if rng.random() < 0.2:
            return ("not", _condition(rng, depth - 1))
        return (str(rng.choice(["&", "|", "^"])), _condition(rng, depth - 1), _condition(rng, depth - 1))
    return (str(rng.choice(["<", "<=", "==", "!=", ">"])), _whole(rng, min(depth, 2)), _whole(rng, min(depth, 1)))


# ---------------------------------------------------------------- running
def run(tree: Tree, w: Words, places: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """The value of a tree. `places` are score, b, h, q, k; indices of arrays are cut here, as the library cuts them."""
    op = tree[0]
    if op in places:
        return places[op]
    if op == "const":
        return tree[1]
    if op == "load":
        return _load(tree, w, places, arrays)
    x, *rest = [run(part, w, places, arrays) for part in tree[1:]]
    if op in ("<", "<=", "==", "!=", ">"):
        x = x + places["q"] * 0                             # so that a condition of constants is one of the library's too
    if op in _OPERATORS:
        return _OPERATORS[op](x, rest[0])
    if op in ("minimum", "maximum", "where"):
        return getattr(w, op)(x, *rest)
    if op == "real":
        return w.real(x + places["q"] * 0)
    if op in ("tanh", "sin", "cos", "floor"):
        return getattr(w, op)(w.real(x + places["score"] * 0))
    one: dict[str, Callable[[Any], Any]] = {
        "abs": abs, "neg": operator.neg, "square": lambda x: x * x * 0.25, "not": operator.invert,
        "cap": lambda x: 6 * w.tanh((x + 0 * places["score"]) / 6), "bell": lambda x: w.exp(-(x * x) + 0 * places["score"]),
        "root": lambda x: w.sqrt(1 + x * x + 0 * places["score"]), "ratio": lambda x: x / (1 + rest[0] * rest[0]),
        "guarded log": lambda x: w.where(x + 0 * places["score"] > 0.1, w.log(x + 0 * places["score"]), x),
        "guarded root": lambda x: w.where(x + 0 * places["score"] > 0, w.sqrt(x + 0 * places["score"]), -x),
        "softplus": lambda x: w.log(1 + w.exp(w.minimum(x, 20.0) + 0 * places["score"])),
    }
    return one[op](x)


def _load(tree: Tree, w: Words, places: dict[str, Any], arrays: dict[str, Any]) -> Any:
    array, index = arrays[tree[1]], [run(part, w, places, arrays) for part in tree[2:]]
    if not index:
        return array if w is NUMPY else array + 0
    if w is not NUMPY:
        index = [(i + 0 * places["q"]).clamp(0, n - 1) for i, n in zip(index, array.shape, strict=True)]
    return array[tuple(index)]


def names(tree: Tree) -> set[str]:
    """The arrays that a tree loads from."""
    found = {tree[1]} if tree[0] == "load" else set()
    return found.union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def shown(tree: Tree) -> str:
    return str(tree[1]) if tree[0] == "const" else f"{tree[0]}({', '.join(shown(x) if isinstance(x, tuple) else x for x in tree[1:])})"
