"""What only the CPU engine has: row_bounds in C, instruction sets, threads
and forks, memory, and the path for few queries."""
from __future__ import annotations

import importlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import cpu
from fastattn.cpu import levels, plan
from fastattn.masks import block_bounds, row_bounds
from tests.tools.compare import EPS, Judge
from tests.tools.problems import BY_NAME, NUMPY, Case, Inputs
from tests.tools.processes import EXTRA, not_sanitized, printed, run

Array = np.ndarray[Any, Any]
compiled: Any = importlib.import_module(f"fastattn.cpu.isa.{cpu.instruction_set()}")


# ---------------------------------------------------------------- bounds
def bounds(count: int) -> Iterator[tuple[int, int, int | None, int | None, bool]]:
    """Random (seqlen_q, seqlen_k, left, right, top_left), small and huge."""
    draw = random.Random(0)
    for _ in range(count):
        top = draw.choice((4, 40, 2**31 - 1))
        counts = [draw.choice((None, 0, draw.randint(0, top))) for _ in range(2)]
        yield draw.randint(1, top), draw.randint(0, top), counts[0], counts[1], draw.random() < 0.5


def test_row_bounds_are_the_same_in_c() -> None:
    draw = random.Random(1)
    for seqlen_q, seqlen_k, left, right, top_left in bounds(20_000):
        for row in (0, seqlen_q - 1, draw.randrange(seqlen_q)):
            arguments = (row, seqlen_q, seqlen_k, left, right, top_left)
            assert compiled.row_bounds(*arguments) == row_bounds(*arguments), arguments


def test_block_bounds_agree_with_row_bounds() -> None:
    """A skipped block masks every pair, a full block none, and every other block has pairs of both kinds."""
    draw = random.Random(2)
    for seqlen_q, seqlen_k, left, right, top_left in (b for b in bounds(6000) if max(b[:2]) <= 40):
        first, block_n = draw.randrange(seqlen_q), draw.choice((1, 3, 8, 16))
        last = draw.randint(first + 1, seqlen_q)
        rows = [row_bounds(row, seqlen_q, seqlen_k, left, right, top_left) for row in range(first, last)]
        visible = np.array([[lo <= key < hi for key in range(-(-seqlen_k // block_n) * block_n)] for lo, hi in rows], bool)
        n_min, full_min, full_max, n_max = block_bounds(first, last, block_n, seqlen_q, seqlen_k, left, right, top_left)
        where = (first, last, block_n, seqlen_q, seqlen_k, left, right, top_left)
        assert n_min <= full_min <= full_max <= n_max or n_min == n_max, where
        for block in range(visible.shape[1] // block_n):
            pairs = visible[:, block * block_n:(block + 1) * block_n]
            assert pairs.any() == (n_min <= block < n_max), (where, block)
            assert pairs.all() == (full_min <= block < full_max), (where, block)


# ---------------------------------------------------------------- instruction sets
@pytest.mark.parametrize("level", levels.available())
def test_isa_can_be_forced(level: str) -> None:
    if importlib.util.find_spec(f"fastattn.cpu.isa.{level}") is None and "FASTATTN_LEVELS" in os.environ:
        pytest.skip("not built: FASTATTN_LEVELS")
    assert printed("from fastattn import cpu; print(cpu.instruction_set())", FASTATTN_ISA=level) == level


def test_unknown_isa_is_an_error() -> None:
    done = run("import numpy, fastattn; x = numpy.ones((1, 1, 1, 1)); fastattn.attention(x, x, x)", FASTATTN_ISA="sse9")
    assert done.returncode == 1
    assert f"ValueError: FASTATTN_ISA is 'sse9'; expected one that this CPU has: {', '.join(levels.available())}." in done.stderr


def test_an_engine_that_is_not_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "built", list)
    monkeypatch.delitem(sys.modules, "fastattn.cpu")
    with pytest.raises(ImportError, match=r"fastattn's compiled CPU engine is missing: install fastattn with pip"):
        importlib.import_module("fastattn.cpu")


# ---------------------------------------------------------------- threads
@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, None, 1025, 2**31 - 1, 2**31, 10**30])
def test_bad_number_of_threads(n: Any) -> None:
    before = fastattn.get_num_threads()
    with pytest.raises(ValueError, match=rf"set_num_threads\(\): n is {n!r}; expected an integer from 1 to 1024\."):
        fastattn.set_num_threads(n)
    assert fastattn.get_num_threads() == before


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("5,2", 5), ("100000", 1024), ("many", None), ("0", None), ("", None)])
def test_threads_from_the_environment(asked: str, threads: int | None) -> None:
    code = "import fastattn; print(fastattn.get_num_threads())"
    assert printed(code, OMP_NUM_THREADS=asked) == (printed(code) if threads is None else str(threads))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_from_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    assert printed(f"import os; os.sched_setaffinity(0, [{one}]); import fastattn; print(fastattn.get_num_threads())") == "1"


def _agrees(inputs: Inputs, expected: tuple[Any, ...]) -> bool:
    out, lse = inputs.forward("cpu")
    got = (out, lse, *inputs.backward(out, lse, "cpu"))
    return all(x is y is None or np.array_equal(x, y, equal_nan=True) for x, y in zip(got, expected, strict=True))


@not_sanitized
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_among_threads() -> None:
    """Children are forked while other threads run the engine. Each runs forward and backward and gets the same bits."""
    inputs = BY_NAME["seqlen_513"].make()
    out, lse = inputs.forward("cpu")
    expected = (out, lse, *inputs.backward(out, lse, "cpu"))
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not _agrees(inputs, expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os._exit(0 if _agrees(inputs, expected) else 3)
            assert _wait(child) == 0, "the child got other bits, crashed or hung"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def _wait(child: int) -> int:
    """Exit status of a child; one that takes over a minute is killed."""
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    try:
        return os.waitpid(child, 0)[1]
    finally:
        timer.cancel()


# ---------------------------------------------------------------- memory


@not_sanitized
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("problem", ["2, 2, 'float32', causal=True", "16, 4, 'bfloat16', window=(200, 0)",
                                     "16, 16, 'float64', window=(50, 0)",
                                     "8, 8, 'float32', window=(50, 0), bias=np.ones((10240, 1), np.float32), need_dbias=True",
                                     "4, 4, 'float16', window=(100, 100), dropout_p=0.1, seed=1, mask=np.ones((1, 10240), bool)"])
def test_no_memory_of_size_seqlen_squared(problem: str) -> None:
    """Beyond inputs and results a call stays under 64 MB at 10240 tokens, where one head's scores alone would be 420 MB."""
    forward, backward = map(int, printed(f"{EXTRA}print(*both(10240, {problem}))").split())
    print(f"extra: forward {forward / 1e6:.1f} MB, backward {backward / 1e6:.1f} MB")
    assert forward < 64e6 and backward < 64e6


# ---------------------------------------------------------------- short queries read K and V in place
KEYS = 3203                                                     # several splits, the last one short
DECODE: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": (2, 1, 1, KEYS)},
    "mask_of_heads": {"mask": (1, 8, 1, KEYS)},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3, "dlse": True},
    "all": {"mask": (2, 8, 1, KEYS), "sinks": True, "dropout_p": 0.2, "alibi": "heads", "softcap": 4.0, "window": (2900, 0)},
}


def judged(inputs: Inputs, backward: bool = True) -> tuple[Any, Any]:
    judge = Judge(inputs)
    out, lse = inputs.forward("cpu")
    judge.forward(out, lse)
    if backward:
        judge.backward(inputs.backward(out, lse, "cpu"))
    return out, lse


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[plan.Plan]:
    """Every Plan of a forward call from now on."""
    made: list[plan.Plan] = []
    original = plan.plan_forward

    def spy(*arguments: Any) -> plan.Plan:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(plan, "plan_forward", spy)
    return made


def in_place(dtype: str) -> bool:
    """Whether this instruction set reads the dtype without packing."""
    return dtype in ("float32", "float64") or bool(compiled.vector_length(dtype, True)[1])


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("features", DECODE)
def test_decode(features: str, head_dim: int, dtype: str, plans: list[plan.Plan]) -> None:
    judged(Case(f"decode_{features}", dtype, num_heads=8, num_heads_k=1, seqlen_q=1, seqlen_k=KEYS, head_dim=head_dim,
                **DECODE[features]).make(), backward=head_dim == 64)
    assert plans[0].direct == in_place(dtype) and plans[0].splits > 1


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("heads", "heads_k", "seqlen_q"), [(2, 2, 8), (4, 2, 3), (8, 8, 1)])
def test_a_few_queries(heads: int, heads_k: int, seqlen_q: int, dtype: str, plans: list[plan.Plan]) -> None:
    case = Case("few", dtype, num_heads=heads, num_heads_k=heads_k, seqlen_q=seqlen_q, seqlen_k=700, head_dim=64, head_dim_v=128,
                causal=True, mask=(2, heads, seqlen_q, 700), sinks=True, memory="transposed")
    judged(case.make(), backward=False)
    assert plans[0].direct == in_place(dtype)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("heads", "heads_k", "seqlen_q"), [(8, 2, 1), (6, 3, 4), (5, 5, 2)])
@pytest.mark.parametrize("features", [
    {}, {"mask": (1, 1, 1, 2500)},
    {"sinks": True, "dropout_p": 0.2, "alibi": "heads", "softcap": 4.0, "window": (2100, 0), "bias": (2, 1, 1, 2500)}])
def test_decode_of_all_heads_at_once(features: dict[str, Any], heads: int, heads_k: int, seqlen_q: int, dtype: str,
                                     plans: list[plan.Plan]) -> None:
    case = Case("heads", dtype, num_heads=heads, num_heads_k=heads_k, seqlen_q=seqlen_q, seqlen_k=2500, head_dim=64, head_dim_v=128)
    judged(replace(case, **features).make(), backward=False)
    assert plans[0].all_heads == (in_place(dtype) and "mask" not in features) and plans[0].splits > 1


@pytest.mark.parametrize("dtype", NUMPY)
def test_decode_with_masked_splits(dtype: str) -> None:
    """The keys of whole splits are masked and hold NaN; in sequence 1 all keys are."""
    inputs = Case("hidden_splits", dtype, num_heads=8, num_heads_k=1, seqlen_q=1, seqlen_k=KEYS, head_dim=64, mask=(2, 1, 1, KEYS)).make()
    inputs.kwargs["mask"][:, :, :, :2600] = False
    inputs.kwargs["mask"][1] = False
    inputs.args[1][:, :2600] = inputs.args[2][:, :2600] = np.nan
    inputs.args[1][1] = inputs.args[2][1] = np.nan
    out, lse = judged(inputs, backward=False)
    assert (out[1] == 0).all() and (lse[1] == -np.inf).all()


# ---------------------------------------------------------------- extreme scores
SHAPES: dict[str, dict[str, Any]] = {
    "tiles": {"seqlen_q": 40, "seqlen_k": 90, "head_dim": 64},
    "features": {"seqlen_q": 40, "seqlen_k": 90, "head_dim": 64, "causal": True, "softcap": 5.0, "alibi": "heads"},
    "decode": {"seqlen_q": 1, "seqlen_k": 300, "head_dim": 64, "num_heads": 8, "num_heads_k": 1},
}


def lowest(dtype: str) -> float:
    finfo: Any = ml_dtypes.finfo
    return float(finfo(NUMPY[dtype]).min)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias_dtype", [None, "float32"])
def test_lowest_number_as_a_mask(bias_dtype: str | None, shape: str, dtype: str) -> None:
    """finfo.min in an additive mask masks a key. In a whole row it masks none: all its keys are equal."""
    sizes = SHAPES[shape]
    inputs = Case("lowest", dtype, bias=(sizes["seqlen_q"], sizes["seqlen_k"]), bias_dtype=bias_dtype, **sizes).make()
    bias = inputs.kwargs["bias"]
    bias[np.random.default_rng(0).random(bias.shape) < 0.4] = lowest(bias_dtype or dtype)
    judged(inputs)
    bias[:] = lowest(bias_dtype or dtype)
    out, lse = inputs.forward("cpu")
    expected, expected_lse = inputs.forward("reference")
    np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), atol=8 * EPS[dtype])
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    for x in inputs.backward(out, lse, "cpu"):                  # lse has no room for log(row_sum): the probabilities are not the forward's
        assert x is None or not np.isnan(x.astype(np.float64)).any()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [100.0, 10_000.0])
def test_huge_scores(size: float, shape: str, dtype: str) -> None:
    """q and k scaled until the largest score is about `size`: one key has nearly
    all weight, and exponents are far out of range."""
    inputs = Case("huge", dtype, **SHAPES[shape]).make()
    q, k, _ = inputs.args
    wide = np.repeat(k.astype(np.float64), q.shape[2] // k.shape[2], axis=2)
    factor = np.sqrt(size * np.sqrt(q.shape[3]) / np.abs(np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), wide)).max())
    q[...], k[...] = q * q.dtype.type(factor), k * k.dtype.type(factor)
    judged(inputs)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, -2.0])
def test_scales_that_are_not_positive(scale: float, shape: str, dtype: str) -> None:
    judged(Case("scale", dtype, softmax_scale=scale, sinks=True, dropout_p=0.1, **SHAPES[shape]).make())


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (300, 20)}], ids=["full", "causal", "window"])
def test_maxima_that_rise_from_tile_to_tile(mask: dict[str, Any], dtype: str) -> None:
    """Scores that rise along the keys, within a tile and from tile to tile: not at all, by what a maximum may lag
    behind, and by far more.

    The largest v stays finite under a maximum that lags."""
    inputs = Case("rise", dtype, seqlen_q=70, seqlen_k=600, num_heads=1, head_dim=64, dropout_p=0.1, **mask).make()
    q, k, v = inputs.args
    q[..., 0] = np.linspace(0, 8, 70)[:, None]
    k[..., 0] = np.linspace(0, 150, 600)[:, None]
    judged(inputs, backward=False)
    value = -lowest(dtype) * 0.98 / (1 if dtype == "float16" else 600)
    v[...] = value
    del inputs.kwargs["dropout_p"], inputs.kwargs["seed"]
    out, _ = inputs.forward("cpu")
    np.testing.assert_allclose(out.astype(np.float64) / value, 1, rtol=2.0**-6)


# ---------------------------------------------------------------- NaN and infinity in the inputs
MASKS: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": (5, 3)}, "mask": {"mask": (2, 1, 70, 70)},
    "decode": {"seqlen_q": 5, "seqlen_k": 300, "num_heads_k": 2, "causal": True},
}
ROW, KEY = 3, 40                                                # the row of q and the key that are NaN, in sequence 0, head 0


def nan_rows(x: Any) -> Array:
    """(batch, heads, rows) of out or lse."""
    found: Array = np.isnan(np.asarray(x, np.float64))
    return found.any(axis=3).swapaxes(1, 2) if found.ndim == 4 else found


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_attend_to_it(operand: str, mask: str, dtype: str) -> None:
    """NaN in q or k makes exactly the rows NaN that attend to it. In v, 0 * NaN is
    NaN, so rows of the same tile and head may be NaN too."""
    case = Case("nan", dtype, **({"seqlen_q": 70, "head_dim": 64} | MASKS[mask]))
    inputs = case.make()
    q, k, v = inputs.args
    left, right = case.window or (None, 0 if case.causal else None)
    attends = np.zeros((*q.shape[:1], q.shape[2], q.shape[1]), bool)
    for row in range(q.shape[1]):
        lo, hi = row_bounds(row, q.shape[1], k.shape[1], left, right)
        attends[0, 0, row] = row == ROW if operand == "q" else lo <= KEY < hi
    if "mask" in inputs.kwargs and operand != "q":
        attends[0, 0] &= inputs.kwargs["mask"][0, 0, :, KEY]
    assert attends.any() and (mask in ("full", "decode") or not attends[0, 0].all())
    {"q": q, "k": k, "v": v}[operand][0, ROW if operand == "q" else KEY, 0, 7] = np.nan
    out, lse = inputs.forward("cpu")
    got = nan_rows(out)
    if operand == "v":
        assert got[attends].all() and not got[1].any() and not got[0, 1:].any()
        assert not np.isnan(lse).any()
    else:
        np.testing.assert_array_equal(got, attends)
        np.testing.assert_array_equal(nan_rows(lse), attends)


def kinds(x: Any) -> Array:
    """1, -1 and 2 for +inf, -inf and NaN, 0 for numbers."""
    x = np.asarray(x, np.float64)
    return np.asarray(np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0)))


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", ["tiles", "decode"])
@pytest.mark.parametrize(("operand", "values"), [("v", [np.inf]), ("v", [-np.inf]), ("v", [np.inf, -np.inf]), ("k", [np.inf]),
                                                 ("q", [np.inf])])
def test_infinity_gives_what_the_reference_gives(operand: str, values: list[float], shape: str, dtype: str) -> None:
    """An infinite value that every row attends to gives an infinite output, two of unlike sign NaN. A score of +inf
    makes its row NaN. One of
    -inf masks its key, or makes the row NaN as well, because products of split factors have no -inf."""
    inputs = Case("inf", dtype, **SHAPES[shape]).make()
    x = dict(zip("qkv", inputs.args, strict=True))[operand]
    for n, value in enumerate(values):
        x[0, n, 0, 3] = value
    expected, expected_lse = map(kinds, inputs.forward("reference"))
    assert expected.any()
    out, lse = map(kinds, inputs.forward("cpu"))
    if operand == "v":
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(lse, expected_lse)
    else:
        assert (out[expected == 2] == 2).all() and (lse[expected_lse == 2] == 2).all()
        assert set(np.unique(out)) <= {0, 2} and not out[1].any()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", ["tiles", "decode"])
def test_the_largest_values_stay_finite(shape: str, dtype: str) -> None:
    """The sum over keys of p * v, p <= 1, is formed before the division. So v may be the largest float16; in a dtype
    with the range of the
    sums, the largest number divided by the number of keys."""
    inputs = Case("largest", dtype, **SHAPES[shape]).make()
    value = -lowest(dtype) * 0.98 / (1 if dtype == "float16" else inputs.args[1].shape[1])
    inputs.args[2][...] = value
    out, _ = inputs.forward("cpu")
    np.testing.assert_allclose(out.astype(np.float64) / value, 1, rtol=2.0**-6)
