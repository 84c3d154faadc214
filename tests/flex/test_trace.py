"""What a function becomes: its lines, the arrays and numbers that it holds, and what is refused."""
from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fastattn import block_mask
from fastattn.flex.evaluate import evaluate, places
from fastattn.flex.ops import HIGH, LOW, OPS
from fastattn.flex.program import COLUMN, ELEMENT, ROW, TILE, Captured, Program
from fastattn.flex.trace import Traced, trace, traced

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((3, 9)).astype(np.float32)
OFFSET = 2
PLACES = places(1, 3, 5, 6)
SCORE = RNG.standard_normal((3, 5, 6))


def mod(function: Callable[..., Any], *captured: Any) -> Traced:
    return traced("attention", "score_mod", function, captured)


def value(t: Traced, score: Any = SCORE) -> np.ndarray[Any, Any]:
    return np.broadcast_to(evaluate(t.program, PLACES | {"score": score}, [np.asarray(x) for x in t.arrays], t.numbers)[0], SCORE.shape)


def plainly(function: Callable[..., Any], score: Any = SCORE) -> np.ndarray[Any, Any]:
    return np.broadcast_to(function(score, *(PLACES[name] for name in ("batch", "head", "q", "k"))), SCORE.shape)


# ---------------------------------------------------------------- formulas
FORMULAS: list[Callable[..., Any]] = [
    lambda s, b, h, q, k: s + 1, lambda s, b, h, q, k: 30 * np.tanh(s / 30), lambda s, b, h, q, k: s * (q - k) / (h + 1),
    lambda s, b, h, q, k: np.where((q - k) % 3 == 1, s, -np.inf), lambda s, b, h, q, k: np.where((k - q) // 2 < -1, s, q),
    lambda s, b, h, q, k: np.minimum(np.maximum(s, -0.5), 0.5) + np.clip(q - k, -1, 2), lambda s, b, h, q, k: abs(s) ** 1.7 + s ** 3,
    lambda s, b, h, q, k: np.exp(s) + np.exp2(-s) + np.log(abs(s)) + np.log2(1 + q) + np.sqrt(k) + np.sin(s) * np.cos(q),
    lambda s, b, h, q, k: np.sign(s) + np.sign(q - k) + np.floor(s) - np.ceil(s) + np.trunc(3 * s) + np.rint(s),
    lambda s, b, h, q, k: s // 0.3 + s % 0.7 - (-s) % 0.7 + np.fmod(s, 0.2), lambda s, b, h, q, k: np.square(s) + np.reciprocal(s),
    lambda s, b, h, q, k: np.where((q >= k) & ~(h == 1) | (q == 2), s, 0),
    lambda s, b, h, q, k: s + ((q << 2) | (k & 3)) ** 2 - (k ^ h) + (q >> 1),
    lambda s, b, h, q, k: np.where(np.logical_and(q, k > 1) ^ np.logical_not(h), s, 1.0), lambda s, b, h, q, k: -s - -q + abs(-k),
    lambda s, b, h, q, k: np.where(k > 2, s, np.where(s > 0, 1, 2)), lambda s, b, h, q, k: 2.0 ** (-(h + 1.0)) * s,
    lambda s, b, h, q, k: np.logaddexp(s, 0.0) + np.log1p(np.exp(s)) + np.expm1(s),
    lambda s, b, h, q, k: s * True + (q > k), lambda s, b, h, q, k: s + b + divmod(q, 2)[1], lambda s, b, h, q, k: 7.0,
]


@pytest.mark.parametrize("number", range(len(FORMULAS)))
def test_numpys_words_mean_the_same(number: int) -> None:
    f = FORMULAS[number]
    with np.errstate(all="ignore"):
        assert np.allclose(value(mod(f)), plainly(f), rtol=1e-12, equal_nan=True)


def test_torchs_words_mean_the_same() -> None:
    torch = pytest.importorskip("torch")
    table = torch.from_numpy(TABLE)

    def f(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        capped = torch.clamp(score, min=-1.0).tanh() + torch.sigmoid(score) * torch.erf(score) + torch.rsqrt(1 + score.square())
        far = torch.abs(q - k).clamp(max=4).to(torch.int32)
        seen = torch.logical_and(q >= k, torch.logical_not(h == 2)) | (q == k).bool()
        masked = torch.where(seen, capped + table[h, far], torch.full_like(score, -float("inf")))
        return masked + torch.nn.functional.softplus(score) * b.float()
    x = torch.from_numpy(SCORE)
    places = [torch.from_numpy(np.ascontiguousarray(np.broadcast_to(PLACES[n], SCORE.shape))) for n in ("batch", "head", "q", "k")]
    want = f(x, places[0], *(p.long() for p in places[1:]))
    assert np.allclose(value(mod(f)), want.numpy(), rtol=1e-6)


def test_torchs_own_masks_can_be_joined() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    seen = flex.and_masks(lambda b, h, q, k: q >= k, flex.or_masks(lambda b, h, q, k: q - k < 2, lambda b, h, q, k: TABLE[h, k] > 0))
    p = traced("attention", "mask_mod", seen, (), True)
    q, k, h = PLACES["q"], PLACES["k"], PLACES["head"]
    assert np.array_equal(evaluate(p.program, PLACES, p.arrays)[0], (q >= k) & ((q - k < 2) | (TABLE[h, k] > 0)))


def test_integers_are_32_bits_and_defined_everywhere() -> None:
    ints = np.array([LOW, -7, -1, 0, 1, 5, 31, 32, HIGH], np.int32)
    x, y = np.meshgrid(ints, ints)
    for op, python in (("floordiv", operator.floordiv), ("mod", operator.mod)):
        want = [[0 if b == 0 else (python(a, b) - LOW) % 2**32 + LOW for a in ints.tolist()] for b in ints.tolist()]
        assert np.array_equal(OPS[op].function(x, y), want)
    assert OPS["shl"].function(np.int32(1), np.int32(32)) == 0 and OPS["shr"].function(np.int32(-8), np.int32(40)) == -1
    cast = traced("attention", "score_mod", lambda s, b, h, q, k: s.astype(int))
    got = evaluate(cast.program, {"score": np.array([np.nan, 1e20, -1e20, -2.7, 2.7])})[0]
    assert got.tolist() == [0, HIGH, LOW, -2, 2]


def test_indices_are_cut_to_the_array() -> None:
    t = mod(lambda s, b, h, q, k: s * 0 + TABLE[h - 1, 4 * (q - k)])
    q, k, h = PLACES["q"], PLACES["k"], PLACES["head"]
    assert np.array_equal(value(t), TABLE[np.clip(h - 1, 0, 2), np.clip(4 * (q - k), 0, 8)])
    last = mod(lambda s, b, h, q, k: TABLE[-1, -2] + TABLE.shape[1])
    assert np.allclose(value(last), TABLE[-1, -2] + 9.0)


def test_equal_formulas_are_one_program() -> None:
    one = trace(lambda s, b, h, q, k: s + abs(q - k) * 2.0)
    other = trace(lambda score, x, y, i, j: (lambda d: score + np.abs(d) * 2.0)(i - j))
    assert one == other and hash(one) == hash(other) and one != trace(lambda s, b, h, q, k: s + abs(q - k) * -2.0)
    assert trace(lambda s, b, h, q, k: s * 0.0).text != trace(lambda s, b, h, q, k: s * -0.0).text


def test_where_lines_can_be_computed() -> None:
    p = trace(lambda s, b, h, q, k, a, t: s * a[h] + np.sin(q) + t[b, k] + t[q, k], [("float32", 1), ("float32", 2)])
    by_op = {(x.op, x.value, x.args): c for x, c in zip(p.lines, p.classes, strict=True)}
    loads = {key[2]: c for key, c in by_op.items() if key[0] == "load"}
    assert sorted(loads.values()) == sorted([TILE, COLUMN, ELEMENT]) and [c for key, c in by_op.items() if key[0] == "sin"] == [ROW]
    assert p.used == {"score", "batch", "head", "q", "k"} and trace(lambda s, b, h, q, k: q).used == {"q"}


# ---------------------------------------------------------------- what a function holds
@dataclass
class Holder:
    table: Any
    scale: float

    def mod(self, score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score * self.scale + self.table[h, k]

    __call__ = mod


class Slots:
    __slots__ = ("table",)

    def __init__(self, table: Any) -> None:
        self.table = table


def of_default(s: Any, b: Any, h: Any, q: Any, k: Any, table: Any = TABLE, *, more: Any = TABLE) -> Any:
    return s + table[h, k] + more[h, q]


def of_global(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return helper(s, h, k)


def helper(s: Any, h: Any, k: Any) -> Any:
    return s + TABLE[h, k + OFFSET]


def first_argument(table: Any, s: Any, b: Any, h: Any, q: Any, k: Any, factor: float = 1.0) -> Any:
    return s * factor + table[h, k]


def holders() -> dict[str, tuple[Callable[..., Any], Any]]:
    local, slots, inside = TABLE * 2, Slots(TABLE), {"tables": [(TABLE,)]}
    space = types.SimpleNamespace(table=TABLE)
    module = types.ModuleType("somebodys_module")
    module.TABLE = TABLE  # type: ignore[attr-defined]
    h, q, k = PLACES["head"], PLACES["q"], PLACES["k"]
    return {
        "closure": (lambda s, b, h, q, k: s + local[h, k], SCORE + 2 * TABLE[h, k]),
        "default": (of_default, SCORE + TABLE[h, k] + TABLE[h, q]),
        "global of a function that is called": (of_global, SCORE + TABLE[h, k + 2]),
        "partial": (functools.partial(first_argument, TABLE, factor=2.0), 2 * SCORE + TABLE[h, k]),
        "bound": (Holder(TABLE, 3.0).mod, 3 * SCORE + TABLE[h, k]),
        "callable": (Holder(TABLE, 4.0), 4 * SCORE + TABLE[h, k]),
        "slots": (lambda s, b, h, q, k: s + slots.table[h, k], SCORE + TABLE[h, k]),
        "containers": (lambda s, b, h, q, k: s + inside["tables"][0][0][h][k], SCORE + TABLE[h, k]),
        "namespace": (lambda s, b, h, q, k: s + space.table[h, k], SCORE + TABLE[h, k]),
        "module": (lambda s, b, h, q, k: s + module.TABLE[h, k], SCORE + TABLE[h, k]),
        "no axes": ((lambda x: lambda s, b, h, q, k: s * x)(np.array(2.5)), 2.5 * SCORE),
    }


@pytest.mark.parametrize("name", holders())
def test_arrays_are_found_wherever_they_are(name: str) -> None:
    function, want = holders()[name]
    t = mod(function)
    assert len(t.arrays) == 1 and isinstance(t.arrays[0], np.ndarray)
    assert np.allclose(value(t), want, rtol=1e-6)
    assert np.allclose(value(mod(function)), want, rtol=1e-6)       # the second time it is known


def test_captured_come_first_and_closures_in_order_of_use() -> None:
    a, c, unused = (np.full(3, x, np.float32) for x in (1, 2, 3))

    def f(s: Any, b: Any, h: Any, q: Any, k: Any, given: Any, number: Any) -> Any:
        return s + c[h] * number + a[h] + (given[h] if unused is None else 0)
    given = np.arange(3)
    t = mod(f, given, 5)
    assert [x is y for x, y in zip(t.arrays, (given, c, a), strict=True)] == [True] * 3
    assert t.names == ("captured[0]", "c", "a") and t.program.arrays[0].dtype == "int64"


@pytest.mark.parametrize("own", [False, True], ids=["of its class", "of its own"])
def test_an_array_known_by_its_interface_alone(own: bool) -> None:
    """It has neither shape nor dtype."""
    class Named:
        pass

    def named(shape: tuple[int, ...], typestr: str) -> Any:
        made = Named()
        interface = {"shape": shape, "typestr": typestr, "data": (4096, False), "version": 3}
        (made if own else Named).__cuda_array_interface__ = interface
        return made
    table = named((4, 9), "<f2")
    for mod, captured in ((lambda s, b, h, q, k, t: s + t[h, k], (table,)), (lambda s, b, h, q, k: s + table[h, k], ())):
        found = traced("attention", "score_mod", mod, captured)
        assert found.arrays == (table,) and found.program.arrays == (Captured("float16", 2),)
    blocks = named((3, 4), "|b1")
    assert block_mask(None, None, None, 60, 80, block=20, blocks=blocks).blocks is blocks
    with pytest.raises(ValueError, match=re.escape("blocks has shape (3, 5)")):
        block_mask(None, None, None, 60, 80, block=20, blocks=named((3, 5), "|b1"))


def test_the_callers_objects_stay_as_they_are() -> None:
    holder = Holder(TABLE, 2.0)
    before = of_global.__globals__["TABLE"]
    mod(holder.mod), mod(of_global)
    assert holder.table is TABLE and of_global.__globals__["TABLE"] is before and type(holder.scale) is float


# ---------------------------------------------------------------- numbers
def of_number(x: Any) -> Callable[..., Any]:
    return lambda s, b, h, q, k: s * x + (q - k) // (h + 1)


def test_a_number_that_changes_becomes_an_argument() -> None:
    numbers = [2.5, 3.5, 4.5, float("nan")]
    found = [mod(of_number(x)) for x in numbers]
    assert found[0].numbers == () and found[1].numbers == (3.5,) and found[2].numbers == (4.5,)
    assert found[1].program == found[2].program == found[3].program != found[0].program
    assert np.allclose(value(found[2]), plainly(of_number(4.5)))
    assert mod(of_number(2.5)).program == found[1].program              # once changed, always an argument
    assert mod(of_number(7)).program.numbers == ()                      # an integer is another function: its arithmetic differs


def repeated(n: int, factor: float) -> Callable[..., Any]:
    def f(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        for _ in range(n):
            s = s * factor
        return s if factor < 10 else -s
    return f


def test_a_function_that_is_made_anew_is_known() -> None:
    """A lambda in a loop: traced once, whatever it holds."""
    from fastattn.flex import trace as tracing

    calls = [0]

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return plain_run(*arguments)
    plain_run = tracing._Tracing.run
    tracing._Tracing.run = counted  # type: ignore[method-assign]
    try:
        for _ in range(5):
            table = TABLE.copy()
            mod(lambda s, b, h, q, k: s + 17.25 * q)
            mod(lambda s, b, h, q, k, t: s + t[h, k] * 17.25, table)
            mod(lambda s, b, h, q, k: s - (lambda i, table=table: table[h, i])(k))      # noqa: B023
    finally:
        tracing._Tracing.run = plain_run  # type: ignore[method-assign]
    assert calls[0] == 6                # each twice, to see that it does not change


def test_a_number_that_python_must_know_stays_a_constant() -> None:
    for n, factor in ((1, 2.0), (2, 2.0), (3, 3.0), (3, 4.0), (2, 20.0)):
        t = mod(repeated(n, factor))
        assert t.numbers == () and np.allclose(value(t), SCORE * factor**n * (1 if factor < 10 else -1))


def test_an_attribute_that_changes_is_seen() -> None:
    holder = Holder(TABLE, 2.0)
    for scale in (2.0, 3.0, 4.0):
        holder.scale = scale
        assert np.allclose(value(mod(holder.mod)), SCORE * scale + TABLE[PLACES["head"], PLACES["k"]])
    holder.table = TABLE * 2
    assert mod(holder.mod).arrays[0] is holder.table


class Settings:
    factor, word = 2.0, "plus"


def of_class(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s * Settings.factor + (1 if Settings.word == "plus" else -1)


GLOBAL = {"factor": 2.0}


class Calling:
    """Its method reads a global through another method, and a property."""

    def inner(self, s: Any) -> Any:
        return s * GLOBAL["factor"]

    @property
    def shift(self) -> float:
        return GLOBAL["factor"]

    def mod(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.inner(s) + self.shift


def test_what_is_not_walked_is_never_stale() -> None:
    """Attributes of classes, and globals of methods that a method calls."""
    calling = Calling()
    for factor in (2.0, 3.0, 4.0):
        Settings.factor = GLOBAL["factor"] = factor
        Settings.word = "minus" if factor == 4.0 else "plus"
        assert np.allclose(value(mod(of_class)), SCORE * factor + (-1 if factor == 4.0 else 1))
        assert np.allclose(value(mod(calling.mod)), SCORE * factor + factor)
        assert np.allclose(value(mod(lambda s, b, h, q, k: calling.mod(s, b, h, q, k))), SCORE * factor + factor)


@pytest.mark.parametrize("word", ["plus", "minus"])
def test_what_is_no_number_is_a_constant(word: str) -> None:
    def make(word: str) -> Callable[..., Any]:
        return lambda s, b, h, q, k: s + 1 if word == "plus" else s - 1
    assert np.allclose(value(mod(make(word))), SCORE + (1 if word == "plus" else -1))


# ---------------------------------------------------------------- refusals
def branches(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    if s > 0:
        return s
    return -s


COUNTER = itertools.count()


def counts(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s * next(COUNTER)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "branch": (branches, r"branches on a value .* in line \d+ of test_trace.py, `if s > 0:`; expected .*numpy.where\(c, x, y\)"),
    "and": (lambda s, b, h, q, k: np.where(q > 1 and k > 1, s, 0), r"&, \| and ~ instead of and"),
    "chained": (lambda s, b, h, q, k: np.where(1 < q < 3, s, 0), "branches"),
    "math": (lambda s, b, h, q, k: math.tanh(s), r"numpy.tanh\(x\) instead of math.tanh"),
    "float": (lambda s, b, h, q, k: float(s), "makes a Python number"),
    "list": (lambda s, b, h, q, k: s + [1, 2, 3][q], "captured="),
    "range": (lambda s, b, h, q, k: s + sum(range(q)), "numpy.where instead of range"),
    "random": (lambda s, b, h, q, k: s + np.random.default_rng().random(), "gives another formula each time .* passed in captured="),
    "state": (counts, "gives another formula each time"),
    "whole array": (lambda s, b, h, q, k: s + TABLE, r"computes with all of TABLE .* as TABLE\[h, q\]"),
    "one index": (lambda s, b, h, q, k: s + TABLE[h], r"computes with all of TABLE"),
    "too many indices": (lambda s, b, h, q, k: s + TABLE[h, q, k], "gives 3 indices to TABLE, which has 2 axes"),
    "slice": (lambda s, b, h, q, k: s + TABLE[h, :3], "takes a slice of TABLE"),
    "float index": (lambda s, b, h, q, k: s + TABLE[h, s], r"indexes TABLE with a float .* x.astype\(int\)"),
    "bool index": (lambda s, b, h, q, k: s + TABLE[h, q > k], "indexes TABLE with a condition"),
    "len": (lambda s, b, h, q, k: s + len(TABLE), r"TABLE.shape\[0\]"),
    "loop": (lambda s, b, h, q, k: s + sum(x for x in TABLE), "iterates over TABLE"),
    "function of all": (lambda s, b, h, q, k: s + np.exp(TABLE)[h, q], "computes with all of TABLE"),
    "own array": (lambda s, b, h, q, k: s + np.ones(3), r"an array of shape \(3,\)"),
    "unknown": (lambda s, b, h, q, k: np.arctan2(s, 1), "calls numpy.arctan2, which tracing does not know .* it knows where"),
    "reduction": (lambda s, b, h, q, k: np.add.reduce(s), "calls numpy.add.reduce"),
    "bits of a float": (lambda s, b, h, q, k: s & 1, "applies `and` to a float"),
    "none": (lambda s, b, h, q, k: None, "returns None; .*a return statement"),
    "condition": (lambda s, b, h, q, k: q > k, "returns a condition; .* mask_mod="),
    "text": (lambda s, b, h, q, k: "s", "computes with a str"),
    "signature": (lambda s, b, h, q: s, r"takes \(s, b, h, q\); expected 5 arguments \(score, b, h, q_idx, kv_idx\), then nothing"),
    "integer": (lambda s, b, h, q, k: s + (q + 2**40), "integer 1099511627776; .* 32 bits; a float works"),
    "power": (lambda s, b, h, q, k: s + q**-2, "an integer to a negative power"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_where_and_what_to_write(name: str) -> None:
    function, text = REFUSED[name]
    with pytest.raises(TypeError, match=rf"(?s)^attention\(\): score_mod .*{text}"):
        mod(function)


def test_other_errors() -> None:
    with pytest.raises(TypeError, match=r"attention\(\): mask_mod returns a number; .* as q_idx >= kv_idx; score_mod= takes"):
        traced("attention", "mask_mod", lambda b, h, q, k: q - k, (), True)
    with pytest.raises(TypeError, match=r"score_mod is 3; expected a function \(score, b, h, q_idx, kv_idx\)"):
        mod(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"captured\[0\] is a list; expected an array or a number; numpy.asarray"):
        mod(lambda s, b, h, q, k, x: s, [1.0])
    with pytest.raises(TypeError, match=r"takes .* then 1 captured"):
        mod(lambda s, b, h, q, k: s, TABLE)
    with pytest.raises(ZeroDivisionError) as caught:
        mod(lambda s, b, h, q, k: s + 1 / 0)
    assert "score_mod, which attention() called to trace it" in caught.value.__notes__[0]


def test_programs_are_values() -> None:
    p = trace(lambda s, b, h, q, k: s + 1)
    assert isinstance(p, Program) and eval(p.text.split("const(;")[1].split(")")[0]) == 1.0
