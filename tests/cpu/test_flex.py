"""The interpreter of traced functions: every operation and load, where lines run, bounds of masks; then what calls promise of them."""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_backward, attention_varlen, attention_varlen_backward, block_mask
from fastattn.arrays.convert import view
from fastattn.cpu import _engine, rowcode
from fastattn.flex.evaluate import evaluate
from fastattn.flex.ops import BOOL, FLOAT, INT, OPS
from fastattn.flex.program import Builder, Captured, Program
from fastattn.flex.trace import trace, traced
from tests.flex.programs import NUMPY, SHAPES, Tree, draw, names
from tests.flex.programs import run as value_of
from tests.tools.compare import close_captured
from tests.tools.guard import guarded_copy

MACHINE = rowcode.Machine(*_engine.machine())
RNG = np.random.default_rng(0)
COUNT = 200                             # keys of a row; not whole vectors
KEYS = np.arange(COUNT, dtype=np.int32)
SPECIAL = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 2, -2, 0.5, 1.5, 2.5, -0.5, -1.5, 1e38, -1e38, 100, -100, 88.5, -103, 3.5e9, -3.5e9,
           2**31, -2**31, 8388609, -4194304.5, 4194305, 126.9, -149]
REALS = np.resize([*RNG.standard_normal(100) * 8, *RNG.standard_normal(71) * 10.0 ** RNG.integers(-30, 30, 71), *SPECIAL], COUNT)
EDGES = [0, 1, -1, 2**31 - 1, -(2**31), -(2**31), 31, 32, -3, -1]
INTS = np.resize([*RNG.integers(-(2**31), 2**31, 90), *RNG.integers(-40, 40, 100), *EDGES], COUNT).astype(np.int32)
OPERANDS = {FLOAT: (REALS, RNG.permutation(REALS)), INT: (INTS, RNG.permutation(INTS)),
            BOOL: (RNG.random(COUNT) < 0.5, RNG.random(COUNT) < 0.5)}
OPERANDS[INT][1][COUNT - 4], OPERANDS[INT][0][COUNT - 4] = -1, -(2**31)
KINDS = {"number": FLOAT + INT, "real": FLOAT, "logic": INT + BOOL, "whole": INT, "any": FLOAT + INT + BOOL}
UNARY = ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "sqrt", "sin", "cos", "floor", "round", "reciprocal", "neg", "abs", "not")


def run(p: Program, arrays: list[Any], dtype: str, *, head: int = 0, q: int = 0, key: int = 0) -> list[Any]:
    views = [view(x, "test", "array") for x in arrays]
    real = 8 if dtype == "float64" else 4
    code = rowcode.assemble(p, tuple(map(rowcode.form_of, views)), (), MACHINE, real)
    outputs = _engine.run_program(code, rowcode.captured(views), dtype, 0, head, q, key, np.zeros(COUNT, dtype))
    kinds = [p.lines[n].kind for n in p.outputs]
    return [x.astype(f"i{real}").view(dtype) if kind == FLOAT else -x if kind == BOOL else x
            for x, kind in zip(outputs, kinds, strict=True)]


def of_arrays(op: str, arrays: list[Any]) -> Program:
    """The operation on elements of arrays, at index k."""
    b = Builder([Captured(str(x.dtype), 1) for x in arrays])
    k = b.add("input", (), INT, "k")
    return b.program(b.do(op, *[b.load(n, (k,)) for n in range(len(arrays))]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_operations_are_the_specification(op: str, dtype: str) -> None:
    """In float64 to 2 ulp, in float32 to 4: tanh of a level without fused products has most."""
    for kind in KINDS[OPS[op].of]:
        x, y = (a.astype(dtype) if kind == FLOAT else a for a in OPERANDS[kind])
        arrays = [x] if op in UNARY else [OPERANDS[BOOL][0], x, y] if op == "where" else [x, y]
        p = of_arrays(op, arrays)
        [got] = run(p, arrays, dtype)
        [exact] = evaluate(p, {"k": KEYS}, arrays)
        if got.dtype.kind != "f":
            np.testing.assert_array_equal(got, exact.astype(np.int64))
            continue
        with np.errstate(all="ignore"):
            want = exact.astype(dtype)
            finite = np.isfinite(want)
            off = np.abs(got.astype(np.longdouble) - exact)[finite] / np.spacing(np.abs(want[finite])).astype(np.longdouble)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        assert off.max() <= (2 if dtype == "float64" else 4), (kind, x[finite][np.argmax(off)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_casts(dtype: str) -> None:
    arrays = [REALS.astype(dtype), INTS, OPERANDS[BOOL][0]]
    b = Builder([Captured(str(x.dtype), 1) for x in arrays])
    x, i, c = (b.load(n, (b.add("input", (), INT, "k"),)) for n in range(3))
    p = b.program(b.to(x, INT), b.to(i, FLOAT), b.to(c, FLOAT), b.to(c, INT), b.to(i, BOOL), b.to(x, BOOL))
    for got, want in zip(run(p, arrays, dtype), evaluate(p, {"k": KEYS}, arrays), strict=True):
        np.testing.assert_array_equal(got, want.astype(got.dtype))


LOADED = {
    "float32": RNG.standard_normal((5, 7)).astype(np.float32), "float64": RNG.standard_normal((5, 7)),
    "float16": RNG.standard_normal((5, 7)).astype(np.float16), "bfloat16": RNG.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
    "int32": RNG.integers(-9, 9, (5, 7)).astype(np.int32), "int64": RNG.integers(-(2**40), 2**40, (5, 7)), "bool": RNG.random((5, 7)) < 0.5}
VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x, "reversed": lambda x: x[::-1, ::-1], "transposed": lambda x: x.T, "sliced": lambda x: x[1:4:2, 2:5],
    "broadcast": lambda x: np.broadcast_to(x[:1, :1], (4, 6)), "one": lambda x: x[:1, :1]}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("memory", VIEWS)
@pytest.mark.parametrize("element", LOADED)
def test_loads_are_cut_to_the_array(element: str, memory: str, far: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any dtype, any strides, any index, also of arrays too large for places of 32 bits."""
    if far:
        monkeypatch.setattr(rowcode, "LAST_PLACE", 0)
        rowcode.assemble.cache_clear()
    a = guarded_copy(VIEWS[memory](LOADED[element]), far == (dtype == "float32"))
    b = Builder([Captured(str(a.dtype), 2)])
    head, q, k = (b.add("input", (), INT, name) for name in ("head", "q", "k"))
    wild = b.do("mul", b.do("sub", k, b.const(100, INT)), b.const(2**24 + 1, INT))
    p = b.program(*[b.load(0, index) for index in ((head, k), (k, q), (wild, b.do("mod", k, b.const(9, INT))), (q, b.const(-1, INT)),
                                                   (b.do("sub", q, k), b.do("mul", wild, wild)))])
    inputs = {"head": np.int32(3), "q": np.int32(2), "k": KEYS + 64}
    for got, want in zip(run(p, [a], dtype, head=3, q=2, key=64), evaluate(p, inputs, [a], real=dtype), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want, COUNT).astype(got.dtype))
    if far:
        rowcode.assemble.cache_clear()


def test_lines_run_as_seldom_as_they_can() -> None:
    def mod(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any, doc: Any) -> Any:
        return s * slopes[h] + np.exp(slopes[q]) * np.where(doc[k] == doc[q], abs(q - k), 0)
    p = trace(mod, [("float32", 1), ("int32", 1)])
    forms = rowcode.Form("float32", (9,), (4,)), rowcode.Form("int32", (99,), (4,))
    code = rowcode.assemble(p, forms, (), MACHINE, 4)
    names = [MACHINE.ops[n] for n in code.lines["op"]]
    assert names[:code.once].count("f_load") == 1 and names[:code.once].count("i_load") == 1      # slopes[h], doc[k]
    by_row = [name for name, line in zip(names[code.once:], code.lines[code.once:], strict=True) if not line["flags"] & 1]
    assert by_row.count("f_exp") == 1 and by_row.count("i_load") == 1                             # exp(slopes[q]), doc[q]
    by_score = [name for name, line in zip(names[code.once:], code.lines[code.once:], strict=True) if line["flags"] & 1]
    assert sorted(by_score) == ["f_muladd", "f_of_i", "i_abs", "i_eq", "i_sub", "where"] or len(by_score) <= 8
    assert "f_load" not in by_score and "i_load" not in by_score and code.by_head


def test_registers_are_used_again() -> None:
    def chain(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        for n in range(60):
            s = np.tanh(s) * (n + 1) + np.sin(s)
        return s
    code = rowcode.assemble(trace(chain), (), (), MACHINE, 4)
    assert len(code.lines) > 180 and code.bytes < 65 * MACHINE.vector + 5 * MACHINE.keys * 4


MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, q, k: q >= k,
    "sliding": lambda b, h, q, k: (q >= k) & (q - k < 40),
    "document": lambda b, h, q, k: DOC[q] == DOC[k],
    "prefix": lambda b, h, q, k: (q >= k) | (k < 33),
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
    "powers of two": lambda b, h, q, k: ((q & 15) >= (k >> 2) % 8) ^ (q // 16 == k // 16),
    "neighbours": lambda b, h, q, k: (abs(q // 16 - k // 16) <= 1) & (abs(q % 16 - k % 16) <= 3),
    "heads": lambda b, h, q, k: np.where(h == 1, q >= k, ~(q - 9 < k) | SEEN[b, k]),
    "wraps": lambda b, h, q, k: (q + 2147483000) * 3 > k,
    "extremes": lambda b, h, q, k: np.minimum(q, k * 2) + np.maximum(-q, 40 - k) > abs(k - 100) - (q << 1),
    "floats": lambda b, h, q, k: np.sin(q * 0.1) < np.cos(k * 0.3),
    "never": lambda b, h, q, k: (q >= k) & (q < -1),
}
DOC = np.sort(RNG.integers(0, 6, 400)).astype(np.int32)
SEEN = RNG.random((3, 400)) < 0.5


@pytest.mark.parametrize("name", MASKS)
def test_bounds_are_right_and_of_use(name: str) -> None:
    t = traced("test", "mask_mod", MASKS[name], (), True)
    views = [view(x, "test", "array") for x in t.arrays]
    code = rowcode.assemble(t.program, tuple(map(rowcode.form_of, views)), t.numbers, MACHINE, 8, True)
    records, known = rowcode.captured(views), 0
    for _ in range(300):
        (q0, k0), (rows, keys) = RNG.integers(0, 300, 2), RNG.integers(1, 70, 2)
        b, h = RNG.integers(0, 3, 2)
        found = _engine.program_bounds(code, records, b, h, q0, q0 + rows, k0, k0 + keys)
        inputs = {"batch": np.int32(b), "head": np.int32(h), "q": np.arange(q0, q0 + rows, dtype=np.int32)[:, None],
                  "k": np.arange(k0, k0 + keys, dtype=np.int32)}
        pairs = evaluate(t.program, inputs, t.arrays, t.numbers)[0]
        assert {-1: not pairs.any(), 0: True, 1: bool(pairs.all())}[found]
        known += found != 0
    assert known > 60 or name in ("dilated", "powers of two", "heads", "floats", "neighbours", "extremes", "wraps")


# ---------------------------------------------------------------- calls
BATCH, HEADS, HEADS_K, ROWS, COLUMNS, DIM = 2, 4, 2, 230, 400, 24
TABLE = RNG.standard_normal((HEADS, 50)).astype(np.float32)
WEIGHTS = RNG.standard_normal(60).astype(np.float32)
BIAS = RNG.standard_normal((BATCH, HEADS, ROWS, COLUMNS)).astype(np.float32)
MODS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "table": (lambda s, b, h, q, k, t: s + t[h, np.minimum(abs(q - k), 49)], (TABLE,)),
    "shared": (lambda s, b, h, q, k, w: s * w[k % 60] + w[q % 7], (WEIGHTS,)),
    "bias": (lambda s, b, h, q, k, x: 0.5 * s + x[b, h, q, k], (BIAS,)),
    "number": (lambda s, b, h, q, k, x, y: x * np.tanh(s / x) * y[h, 0], (np.array(2.5, np.float32), TABLE)),
}


def arrays(dtype: Any = np.float32) -> list[Any]:
    shapes = (BATCH, ROWS, HEADS, DIM), (BATCH, COLUMNS, HEADS_K, DIM), (BATCH, COLUMNS, HEADS_K, DIM), (BATCH, ROWS, HEADS, DIM)
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


def gradients(q: Any, k: Any, v: Any, dout: Any, engine: str, **flex: Any) -> list[Any]:
    out, lse = attention(q, k, v, return_lse=True, engine=engine, **flex)
    g = attention_backward(dout, q, k, v, out, lse, engine=engine, need_dcaptured="captured" in flex, **flex)
    return [out, lse, g.dq, g.dk, g.dv, *(g.dcaptured or ())]


def same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def both(q: Any, k: Any, v: Any, dout: Any, *lengths: Any, need_dbias: bool = False, need_dcaptured: bool = False,
         **options: Any) -> list[list[Any]]:
    """out, lse and all gradients of the engine and of the reference. Both gradients are of the engine's out and lse, see contracts.md."""
    forward, backward = (attention_varlen, attention_varlen_backward) if lengths else (attention, attention_backward)
    states = [forward(q, k, v, *lengths, return_lse=True, engine=engine, **options) for engine in ("cpu", "reference")]
    found = []
    for engine, state in zip(("cpu", "reference"), states, strict=True):
        g = backward(dout, q, k, v, *states[0], *lengths, engine=engine, need_dbias=need_dbias, need_dcaptured=need_dcaptured, **options)
        found.append([*state, *[x for x in (*g, *(g.dcaptured or ())) if x is not None]])
    return found


def close(a: list[Any], b: list[Any], tolerance: float) -> None:
    for n, (x, y) in enumerate(zip(a, b, strict=True)):
        x, y = x.astype(np.float64), y.astype(np.float64)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        alive = np.isfinite(y)
        assert np.abs(x[alive] - y[alive]).max(initial=0) <= tolerance * max(1, np.abs(y[alive]).max(initial=0)), n


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in MASKS), ("sliding", "float64"), ("document", "float16"),
                                             ("dilated", "bfloat16"), ("floats", "bfloat16")])
def test_masks_over_many_tiles(name: str, dtype: str) -> None:
    given = arrays(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tolerance = {"float32": 3e-6, "float64": 1e-13, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    close(*both(*given, mask_mod=MASKS[name]), tolerance)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in MODS), ("table", "float64"), ("number", "float16"),
                                             ("shared", "bfloat16")])
def test_scores_over_many_tiles(name: str, dtype: str) -> None:
    given, (mod, captured) = arrays(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), MODS[name]
    tolerance = {"float32": 3e-6, "float64": 2e-7, "float16": 3e-3, "bfloat16": 3e-2}[dtype]       # dcaptured is float32
    flex: dict[str, Any] = {"score_mod": mod, "mask_mod": MASKS["prefix"]}
    got, want = both(*given, captured=captured, need_dcaptured=True, **flex)
    if dtype == "float64":
        close(got, want, tolerance)
        return
    close(got[:5], want[:5], tolerance)
    close_captured(tuple(got[5:]), attention_backward, tuple(given), captured, (got[0], got[1]), **flex)


@pytest.mark.parametrize("name", MODS)
def test_same_bits_for_any_threads(name: str) -> None:
    """Gradients of captured arrays too, whether tasks never meet or have sums of their own."""
    given, (mod, captured) = arrays(), MODS[name]
    before, results = fastattn.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            fastattn.set_num_threads(threads)
            results.append(gradients(*given, "cpu", score_mod=mod, captured=captured, mask_mod=MASKS["sliding"]))
    finally:
        fastattn.set_num_threads(before)
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_no_row_sees_is_not_read(rows: int, bad: float) -> None:
    """Keys and rows outside of the mask may hold anything: whole tiles of them, and single ones. Rows in place, packed, and in tiles."""
    q, k, v, dout = arrays()
    q, dout = q[:, :rows], dout[:, :rows]

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j % 5 != 2) & ((j < 20) | (j > 300)) & (i % 4 != 3)
    want = gradients(q, k, v, dout, "cpu", mask_mod=mask)
    j, i = np.arange(COLUMNS), np.arange(rows)
    hidden = (j % 5 == 2) | ((j >= 20) & (j <= 300))
    k[:, hidden] = v[:, hidden] = bad
    q[:, i % 4 == 3] = dout[:, i % 4 == 3] = bad
    same(gradients(q, k, v, dout, "cpu", mask_mod=mask), want)
    assert not want[0][:, i % 4 == 3].any() and not want[3][:, hidden].any()


def test_blocks_of_any_size() -> None:
    given = arrays()
    for rows, keys in ((7, 33), (128, 128), (500, 64)):
        blocks = RNG.random((BATCH, 1, -(-ROWS // rows), -(-COLUMNS // keys))) < 0.5
        mask = block_mask(MASKS["document"], None, None, ROWS, COLUMNS)
        joined = block_mask(None, BATCH, None, ROWS, COLUMNS, blocks=blocks, block=(rows, keys))
        for flex in ({"block_mask": joined}, {"block_mask": joined, "mask_mod": MASKS["dilated"]}, {"block_mask": mask}):
            close(*both(*given, **flex), 3e-6)


def test_packed_sequences_and_everything_else() -> None:
    q, k, v, dout = (x[0] for x in arrays())
    cu_q, cu_k, used = [0, 90, 90, 229], [0, 20, 120, 400], [20, 80, 275]
    more = {"softcap": 3.0, "alibi_slopes": np.abs(TABLE[:, 0]), "sinks": TABLE[:, 1].copy(), "dropout_p": 0.2, "seed": 5,
            "causal": True, "bias": RNG.standard_normal((1, HEADS, 139, 280)).astype(np.float32),
            "mask": RNG.random((3, 1, 139, 280)) < 0.8, "seqused_k": used}
    flex = {"score_mod": lambda s, b, h, q, k, t: s + t[h, (q + k + b) % 50] * np.where(s > 0, 1.0, 0.5), "captured": (TABLE,),
            "mask_mod": MASKS["dilated"]}
    close(*both(q, k, v, dout, cu_q, cu_k, need_dbias=True, need_dcaptured=True, **more, **flex), 5e-6)


def test_no_gradient_where_scores_do_not_depend_on_an_array() -> None:
    given = arrays()
    flex = {"score_mod": lambda s, b, h, q, k, t, w: s + np.floor(t[h, 0]) + 0 * k, "captured": (TABLE, WEIGHTS)}
    *_, table, weights = gradients(*given, "cpu", **flex)
    assert not table.any() and not weights.any() and weights.shape == WEIGHTS.shape


def test_arrays_of_many_axes() -> None:
    q, k, v, _ = arrays()
    x = np.ones((1,) * 9, np.float32)
    with pytest.raises(fastattn.UnsupportedError, match="arrays of at most 8 axes; reshape joins some of the 9"):
        attention(q, k, v, score_mod=lambda s, b, h, q, k, t: s * t[(0,) * 8 + (k,)], captured=(x,), engine="cpu")
    y = x.reshape(x.shape[1:])
    close([attention(q, k, v, score_mod=lambda s, b, h, q, k, t: s * t[(0,) * 7 + (k,)], captured=(y,))], [attention(q, k, v)], 3e-6)


def drawn(tree: Tree, held: dict[str, Any]) -> Callable[..., Any]:
    def mod(*places: Any) -> Any:
        return value_of(tree, NUMPY, dict(zip(("score", "b", "h", "q", "k")[5 - len(places):], places, strict=True)), held)
    return mod


@pytest.mark.parametrize("seed", range(24 * int(float(os.environ.get("FASTATTN_FUZZ", "1")) + 0.99)))
def test_random_functions_over_random_shapes(seed: int) -> None:
    """Several tiles and blocks, few rows, GQA, packed, beside masks and dropout; in float64, where a step of floor is at the same score."""
    rng = np.random.default_rng([7, seed])
    score, mask = draw(rng)
    held = {name: rng.uniform(0.3, 1.5, SHAPES[name]) for name in sorted(names(score))}
    rows, keys = (int(rng.choice([1, 3, 8, 40, 97, 200, 300])) for _ in range(2))
    heads, group, dim = int(rng.choice([1, 2])), int(rng.choice([1, 2, 5])), int(rng.choice([3, 16, 40]))
    flex: dict[str, Any] = {"score_mod": drawn(score, held), "mask_mod": drawn(mask, {})}
    more: dict[str, Any] = {"causal": bool(rng.random() < 0.3), "window": (int(rng.integers(0, 90)), None) if rng.random() < 0.2 else None}
    if rng.random() < 0.3:
        more |= {"dropout_p": 0.3, "seed": seed}
    if rng.random() < 0.3:
        blocks = rng.random((-(-rows // 16), -(-keys // 24))) < 0.7
        flex["block_mask"] = block_mask(None, None, None, rows, keys, blocks=blocks, block=(16, 24))
    shapes = (rows, heads * group, dim), (keys, heads, dim), (keys, heads, dim), (rows, heads * group, dim)
    q, k, v, dout = (guarded_copy(rng.standard_normal((2, *shape)), seed % 2 == 0) for shape in shapes)
    packed = [[0, rows, 2 * rows], [0, keys, 2 * keys]] if rng.random() < 0.4 else []
    if packed:
        q, k, v, dout = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout))
    close(*both(q, k, v, dout, *packed, need_dcaptured=bool(held), **flex, **more), 1e-10)
