"""Scores of any finite size on the GPU: products and scales up to 1e30, biases of
-1e9 and of the lowest finite number, sinks as large.

Without a GPU: the code of the softmax and of the gradients runs on NumPy's float32, plans get inconsistent lengths, and merge_states gets
FlashAttention's empty rows. With a GPU: every kernel family against float64. Gradients know the softmax through lse alone. Where lse has no
bits left for the log of a sum, equal keys have P = 1 each.
"""
from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from tests.tools.problems import NUMPY, Inputs

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import UnsupportedError, gpu
from fastattn.arrays import convert
from fastattn.gpu.rows import launch as rows_launch
from fastattn.gpu.runtime import packed
from fastattn.gpu.spec import FAR_LSE, FAR_TOPS, LOG2E, BackwardCall, Spec, far_limits, make_backward_spec
from fastattn.gpu.tile import schedule, softmax
from fastattn.problem import Operands, make_problem
from tests.tools.devices import device_count, requires_gpu
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.gpu.emulator import Memory, emulated, replaced

Array = np.ndarray[Any, Any]
F = np.float32
LOST = {"float16": 2.0**-25}         # of a gradient below the smallest number
LEAST = {"float32": float(np.finfo(F).min), "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)}


# ---------------------------------------------------------------- the softmax's own lines, on float32 of numpy
def _exp2(x: Any) -> Any:
    with np.errstate(over="ignore", under="ignore"):
        return np.exp2(np.asarray(x, F)).astype(F)[()]


def _fma(x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32, rounded once: a product of two is exact in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.asarray(x, np.float64) * np.asarray(y, np.float64) + np.asarray(z, np.float64)).astype(F)[()]


def _fragment_exp2(acc: Array, scale0: Any, scale1: Any, *minus: Any) -> Array:
    return _exp2(_fma(acc, np.array([scale0, scale1], F)[:, None], -np.array(minus, F)[:, None]))


FRAGMENTS = {      # a fragment is two rows; one thread has all of a row
    "float32": F, "int32": int, "inline": lambda f: f, "exp2": _exp2, "log2": lambda x: F(np.log2(x)), "product": lambda x, y: F(x) * F(y),
    "fma": _fma,
    "quad_max": lambda x: x, "quad_sum": lambda x: x, "exp2_minus": _fragment_exp2, "row_sum": lambda acc: acc.sum(1, dtype=F),
    "row_max": lambda acc, *before: np.maximum(acc.max(1), np.array(before, F)),
}


def softmax_of(scores: Array, v: Array, scale: float, scaled: bool, tiles: int, hurry: bool, dtype: str = "float16") -> tuple[Array, Array]:
    """out and lse of two rows, tile by tile as a kernel does it; `hurry`: the optimistic step first. P is rounded to `dtype`."""
    beyond, power = far_limits(dtype, scale)
    a = SimpleNamespace(softmax_scale=F(scale), log2_scale=F(scale * LOG2E), far_beyond=F(beyond), far_scale=F(power))
    with replaced(("tile.softmax",), FRAGMENTS), np.errstate(all="ignore"):
        update, optimistic, finish = softmax.make_softmax(Spec(dtype, 64, 64, scaled=scaled))
        state, out = (F(-np.inf), F(-np.inf), F(0), F(0)), np.zeros((2, v.shape[1]), F)
        for acc, part in zip(np.split(scores.astype(F), tiles, 1), np.split(v, tiles), strict=True):
            p, *parts, lags = optimistic(a, acc, *state[:2]) if hurry else (acc, 0, 0, 1)
            if lags:
                p, *state, alpha0, alpha1 = update(a, acc, *state)
                out = out * np.array([alpha0, alpha1])[:, None]
            else:
                state = *state[:2], state[2] + parts[0], state[3] + parts[1]
            p = p.astype(NUMPY[dtype]).astype(F)
            assert np.isfinite(p).all(), "P is not finite in 16 bits"
            out = out + p @ part
        *factors, lse0, lse1 = finish(a, 0, *state)
    return out * np.array(factors)[:, None], np.array([lse0, lse1])


def exact_softmax(scores: Array) -> tuple[Array, Array]:
    top = scores.max(1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, p / total, 0), (top + np.log(total))[:, 0]


ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-20}       # of P; of float32 that of its exponent


@pytest.mark.parametrize("hurry", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [1.0, 300.0, 2800.0, 2850.0, 5e4, 1e7, 1e8, 1.8e8, 3e8, 1e9, 1e11, 1e19, 1e30, 3e38])
def test_softmax_of_any_size(size: float, scaled: bool, hurry: bool) -> None:
    """Rows around +-size, some differing by a few units in the last place,
    with fully masked keys; rising and falling."""
    draw = np.random.default_rng(int(np.log(size) * 100))
    scale = 1.0 if scaled else 0.125
    dtypes = ["bfloat16", "float32"] if size > 1e11 and not scaled else FAR_TOPS       # float16 has no such products
    for sign, dtype in itertools.product((1, -1), dtypes):
        base = np.nextafter(F(size), F(0)) * F(sign) if size > 1e38 else F(size * sign)
        step = max(np.spacing(abs(base)), F(0.05))
        scores = base - np.float64(sign) * step * draw.integers(0, 40, (2, 96))
        scores[:, draw.permutation(96)[:20]] = -np.inf
        scores[1] = np.sort(scores[1])
        products = (scores / scale if size < 1e30 else scores).astype(F)
        used = 1.0 if size >= 1e30 and not scaled else scale
        v = draw.standard_normal((96, 3)).astype(F)
        p, lse = exact_softmax(products.astype(np.float64) * F(used))
        got, got_lse = softmax_of(products, v, used, scaled, 6, hurry, dtype)
        np.testing.assert_allclose(got, p @ v, atol=1.5 * ROUNDING[dtype] * abs(v).max(), rtol=0)
        np.testing.assert_allclose(got_lse, lse, rtol=3e-7, atol=1e-5)


# ---------------------------------------------------------------- rows that become far, or no longer are
SCALES = [1.0, 0.125, 0.7, *(n**-0.5 for n in (48, 80, 96, 128, 192))]


@pytest.mark.parametrize("dtype", FAR_TOPS)
def test_far_limits(dtype: str) -> None:
    """What make_far, make_rise and the optimistic step count on, for factors of any size."""
    draw = np.random.default_rng(0)
    for scale in [*SCALES, 1e-30, 1e30, *2 ** draw.uniform(-99, 99, 1000)]:
        limit, power = far_limits(dtype, scale)
        factor, beyond = F(scale * LOG2E), F(limit)
        after = np.nextafter(beyond, F(np.inf))
        assert beyond == limit and np.log2(power) % 1 == 0
        assert float(beyond) * float(factor) <= float(beyond * factor) < FAR_TOPS[dtype]
        if scale > 1e-29:     # else no row is far
            assert float(after * factor) - float(beyond * factor) >= FAR_TOPS[dtype] * 2.0**-24     # a maximum that is no longer far
            least = 2.0**-48 if dtype == "float16" else 0       # of the difference of two sums of products
            assert max(float(after) - limit, least) * power >= 16
        rounding = [float(x * factor) - float(x) * float(factor) for x in (beyond * draw.random(1000)).astype(F)]
        assert np.abs(rounding).max() <= {"float16": 8, "bfloat16": 16, "float32": 16}[dtype]
        if dtype != "float16":
            assert power <= scale


def stepped(x: float, steps: Array) -> Array:
    """The float32 that many units in the last place above x, which is not 0."""
    bits = F(x).view(np.int32) & 0x7FFFFFFF
    return np.copysign((bits + np.sign(x).astype(int) * steps).astype(np.int32).view(F), F(x))


@pytest.mark.parametrize("hurry", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", FAR_TOPS)
def test_rows_around_the_limit(dtype: str, scaled: bool, hurry: bool) -> None:
    """Scores a few units in the last place around the limit, of either sign, rising, falling or in any order, beside an ordinary row."""
    draw = np.random.default_rng(0)
    for scale in [1.0] if scaled else SCALES:
        factor = float(F(scale * LOG2E))
        for sign, spread, order, near in itertools.product((1, -1), (1, 3, 40), (1, -1, 0), (1, 0.5, 0.25)):
            base = sign * near * far_limits(dtype, scale)[0]
            scores = np.array([stepped(base, draw.integers(-spread, spread + 1, 96)), draw.standard_normal(96) * 5 / factor], F)
            if order:
                scores = np.sort(scores)[:, ::order]
            scores[:, draw.permutation(96)[:draw.integers(60)]] = -np.inf
            v = draw.standard_normal((96, 3)).astype(F)
            p, lse = exact_softmax(scores.astype(np.float64) * F(scale))
            got, got_lse = softmax_of(scores, v, scale, scaled, 6, hurry, dtype)
            np.testing.assert_allclose(got, p @ v, atol=(1.5 * ROUNDING[dtype] + 96 * 2.0**-16) * abs(v).max(), rtol=0)
            np.testing.assert_allclose(got_lse, lse, rtol=3e-7, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_lse_of_one_key(scaled: bool) -> None:
    """It is the score itself, though P contains the rounding of another product: the backward's P of this key is then 1."""
    draw = np.random.default_rng(0)
    for scale, exponent in itertools.product([1.0] if scaled else SCALES, range(12, 32)):
        scores = np.full((2, 8), -np.inf, F)
        scores[:, 3] = 2.0**exponent / scale * draw.uniform(1, 2, 2) * (1, -1)
        out, lse = softmax_of(scores, np.eye(8, dtype=F), scale, scaled, 2, False, "bfloat16")
        np.testing.assert_array_equal(lse, scores[:, 3] * F(scale))
        np.testing.assert_allclose(out[:, 3], 1, rtol=2.0**-8)


@pytest.mark.parametrize("dtype", FAR_TOPS)
def test_parts_are_merged_in_the_same_units(dtype: str) -> None:
    """Two parts of a row's keys, each with its own maximum, as decode merges them: near, far, or one of each, or masked."""
    draw = np.random.default_rng(0)
    for scale, near, sign in itertools.product(SCALES, (2.0**-16, 2.0**-4, 0.5, 1.0, 2.0), (1, -1)):
        base = sign * near * far_limits(dtype, scale)[0]
        scores = np.array([stepped(base, draw.integers(-2, 3, 16)) for _ in range(2)], F)
        scores[0, :8] = -np.inf if near == 0.5 else scores[0, :8]
        beyond, power = far_limits(dtype, scale)
        a = SimpleNamespace(softmax_scale=F(scale), log2_scale=F(scale * LOG2E), far_beyond=F(beyond), far_scale=F(power))
        spec, state = Spec(dtype, 64, 64), (F(-np.inf), F(-np.inf), F(0), F(0))
        with replaced(("tile.softmax",), FRAGMENTS), np.errstate(all="ignore"):
            update, decay = softmax.make_softmax(spec)[0], softmax.make_decay(spec)
            parts = [update(a, acc, *state) for acc in np.split(scores, 2, 1)]
            for row in range(2):
                top = max(part[1 + row] for part in parts)
                factors = [decay(a, part[1 + row], top) for part in parts]
                total = sum(part[3 + row] * factor for part, factor in zip(parts, factors, strict=True))
                factor, lse = softmax.make_finish_row(spec)(a, 0, top, total)
                p = np.concatenate([part[0][row] * factor for part, factor in zip(parts, factors, strict=True)]) * factor
                expected, expected_lse = exact_softmax(scores[row:row + 1].astype(np.float64) * F(scale))
                np.testing.assert_allclose(p, expected[0], atol=16 * 2.0**-16)      # a key each that is one unit below the maximum
                np.testing.assert_allclose(lse, expected_lse[0], rtol=3e-7, atol=1e-5)


def test_a_fully_masked_row_next_to_an_ordinary_one() -> None:
    scores = np.array([[-np.inf] * 8, [-np.inf] * 4 + [-1e30] * 4])
    out, lse = softmax_of(scores, np.arange(8.0, dtype=F)[:, None], 1.0, True, 2, False)
    np.testing.assert_array_equal(out[:, 0], [0, 5.5])
    np.testing.assert_allclose(lse, [-np.inf, -1e30])


# ---------------------------------------------------------------- what gradients start with
@pytest.mark.parametrize("far", [True, False])
def test_lse_of_far_rows(far: bool) -> None:
    """Their lse in units of log2 is FAR_LSE, and they mark the call. A value next to 0 becomes 0, so that it cannot be mistaken for
    FAR_LSE."""
    lse = np.array([0.5, -2800, *([2900, -1e9, LEAST["float32"]] if far else [3, 2, 1]), 1e-38, -np.inf, np.inf, np.nan], F)[None, None]
    n = lse.shape[-1]
    x = np.ones((1, n, 1, 16), NUMPY["bfloat16"])
    views = [convert.view(array, "test", "x") for array in (x, lse)]
    memory = Memory()
    for view in views:
        memory.allow(view)
    problem, o = make_problem("test", Operands(*views[:1] * 3), packed=False)
    call = BackwardCall(problem, o, views[0], views[0], views[1], None, fastattn.Grads(*views[:1] * 3, None, None), False)
    marks = []
    for _ in range(2):
        with emulated(memory) as machine, rows_launch.preprocessed(call, make_backward_spec(call), machine.launcher("sm_90a"), 0) as rows:
            natural, log2 = (np.ctypeslib.as_array((ctypes.c_float * n).from_address(at)).copy() for at in (rows.lse, rows.log2))
            assert (ctypes.c_int32.from_address(rows.far).value == rows.mark) == far
            marks.append(rows.mark)
    assert marks[0] != marks[1], "a mark that memory may still hold"
    np.testing.assert_array_equal(natural, [*lse[0, 0, :6], np.inf, np.nan, np.nan])
    expected = [0.5 * LOG2E, -2800 * LOG2E, *([FAR_LSE] * 3 if far else LOG2E * lse[0, 0, 2:5]), 0, np.inf, np.nan, np.nan]
    np.testing.assert_allclose(log2, expected, rtol=1e-6)


# ---------------------------------------------------------------- inconsistent lengths; empty parts
@pytest.mark.parametrize("by_keys", [False, True])
def test_plan_of_inconsistent_lengths(by_keys: bool) -> None:
    """Cumulative lengths that fall and rise again would give more tiles than 32 bits can count. The plan writes no more
    than its table holds."""
    batch, total, heads, block = 2000, 2**22, 64, 16
    cu = np.tile(np.array([0, total], np.int64), batch // 2 + 1)[:batch + 1]
    blocks, memory = 50, Memory()
    memory.allow(convert.view(cu, "test", "x"))
    with emulated(memory) as machine, memory.temporary(packed.table_bytes(batch, blocks), 0) as table, \
            mock.patch.object(schedule, "SORTED", 0):
        lengths = [cu.ctypes.data, 8, cu.ctypes.data, 8, 0, 0]
        machine.load(packed.plan_packed(False, block, by_keys)).launch(1, [table, *lengths, total, batch, heads, total, blocks], 0)
        a = SimpleNamespace(table=table, batch=batch, num_heads=heads, num_heads_k=heads, head_group=1)
        spec = Spec("float32", 16, 16, packed=True)
        assert schedule.make_num_tiles(spec)(a) == blocks * heads
        tile_at = schedule.make_tile_at(spec, block, by_keys)
        for t in (0, blocks * heads - 1):
            n, head, _, q_start, seqlen_q, k_start, seqlen_k = tile_at(a, t)[:7]
            start, length = (k_start, seqlen_k) if by_keys else (q_start, seqlen_q)
            assert 0 <= head < heads and 0 <= start + n * block < start + length <= total


def test_merge_counts_infinite_lse_as_empty() -> None:
    draw = np.random.default_rng(0)
    outs = [draw.standard_normal((3, 2, 5)).astype(F) for _ in range(2)]
    lses = [draw.standard_normal((2, 3)).astype(F) for _ in range(2)]
    expected = {}
    for mark in (-np.inf, np.inf):
        lses[0][0, 1] = lses[1][1] = lses[0][1, 2] = mark
        out, lse = np.full((3, 2, 5), np.nan, F), np.full((2, 3), np.nan, F)
        memory, views = Memory(), [convert.view(x, "test", "x") for x in (*outs, *lses, out, lse)]
        for x in views:
            memory.allow(x)
        with emulated(memory) as machine:
            rows_launch.merge_states(views[:2], views[2:4], views[4], views[5], machine.launcher(), 0)
        expected[mark] = out, lse
    for x, y in zip(*expected.values(), strict=True):
        np.testing.assert_array_equal(x, y)
    assert expected[np.inf][1][1, 2] == -np.inf and (expected[np.inf][0][2, 1] == 0).all()


# ---------------------------------------------------------------- on a GPU, against float64
FAMILIES = ("sm90", "sm80", "simt", "decode")


def exact(inputs: Inputs) -> tuple[Array, Array, Array]:
    """P, lse and scores, (batch, head, row, column): scores are float32, as every kernel has them, all else is float64."""
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in inputs.args)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    kwargs = inputs.kwargs
    scores = q @ k.swapaxes(-1, -2) * np.float64(F(kwargs.get("softmax_scale", q.shape[-1] ** -0.5)))
    bias = kwargs.get("bias")
    with np.errstate(over="ignore"):
        scores = (scores + (0 if bias is None else bias.astype(np.float64))).astype(F).astype(np.float64)
    rows, keys = scores.shape[-2:]
    if kwargs.get("causal"):
        scores = np.where(np.arange(keys) <= np.arange(rows)[:, None] + keys - rows, scores, -np.inf)
    p, lse = exact_softmax(scores.reshape(-1, keys))
    p, lse = p.reshape(scores.shape), lse.reshape(scores.shape[:-1])
    sinks = kwargs.get("sinks")
    if sinks is not None:
        whole = np.logaddexp(lse, sinks.astype(np.float64)[:, None])
        p, lse = p * np.exp(lse - whole)[..., None], whole
    return p, lse, scores


def gradients(inputs: Inputs, p: Array, lse: Array, scores: Array) -> dict[str, Array]:
    """Gradients with P = exp(score - lse): where lse is the maximum itself for
    lack of bits, each key at the maximum has P = 1."""
    q, k, v, dout = (x.astype(np.float64).swapaxes(1, 2) for x in (*inputs.args, inputs.dout))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    p_lse = np.where((abs(lse) < 1e4)[..., None], p, np.exp(np.minimum(scores - lse.astype(F)[..., None], 0)))
    out = p @ v
    ds = p_lse * (dout @ v.swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True))
    scale = float(F(inputs.kwargs.get("softmax_scale", q.shape[-1] ** -0.5)))

    def keys(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)
    return {"dq": scale * ds @ k, "dk": keys(scale * ds.swapaxes(-1, -2) @ q), "dv": keys(p_lse.swapaxes(-1, -2) @ dout)}


def run(inputs: Inputs, family: str) -> None:
    """Forward and backward of a family against float64."""
    p, lse, scores = exact(inputs)
    kwargs = {name: on_device(x) if isinstance(x, np.ndarray) else x for name, x in inputs.kwargs.items()}
    args, names = [on_device(x) for x in inputs.args], ("sm80",) if family == "decode" else (family,)
    eps = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 1.5e-2}[inputs.dtype]     # scores of 1e4 are steps of 1e-3
    with gpu.use(*names):
        out, got_lse = fastattn.attention(*args, **kwargs, return_lse=True)
        v = np.repeat(inputs.args[2].astype(np.float64).swapaxes(1, 2), p.shape[1] // inputs.args[2].shape[2], 1)
        np.testing.assert_allclose(to_host(out).astype(np.float64).swapaxes(1, 2), p @ v, atol=eps * abs(v).max(), rtol=0)
        np.testing.assert_allclose(to_host(got_lse), lse, rtol=1e-6, atol=1e-4)
        if family == "decode":
            return
        try:
            grads = fastattn.attention_backward(on_device(inputs.dout), *args, out, got_lse, **kwargs)
        except UnsupportedError:
            pytest.skip("no backward")
    expected = gradients(inputs, p, lse, scores)
    q, k = (abs(x.astype(np.float64)).max() for x in inputs.args[:2])
    scale = abs(float(F(inputs.kwargs.get("softmax_scale", inputs.args[0].shape[-1] ** -0.5))))
    # dP - delta is 0 but for rounding where a key takes all
    sizes = {"dq": scale * k, "dk": scale * q, "dv": 1.0}
    for name, x in expected.items():
        got = to_host(getattr(grads, name)).astype(np.float64).swapaxes(1, 2)
        if sizes[name] < 1e3 or name == "dv":
            limit = 4 * eps * (abs(x).max() + sizes[name] * abs(inputs.dout.astype(np.float64)).max()) + LOST.get(inputs.dtype, 0.0)
            np.testing.assert_allclose(got, x, atol=limit, rtol=0, err_msg=name)
        else:
            assert not np.isnan(got).any(), name


def supported(family: str) -> bool:
    from fastattn.gpu.runtime.device import device
    return family != "sm90" or device_count() == 0 or device(0).arch == "sm_90a"


def make(family: str, dtype: str, seed: int, heads: int = 2, rows: int = 130, keys: int = 200, dim: int = 64, **kwargs: Any) -> Inputs:
    draw = np.random.default_rng(seed)
    if family == "decode":
        rows, keys = 2, 1000
    q, k, v, dout = (draw.standard_normal((1, n, heads, dim), dtype=F).astype(NUMPY[dtype]) for n in (rows, keys, keys, rows))
    return Inputs((q, k, v), kwargs, dout, None)


def dtypes(family: str) -> tuple[str, ...]:
    return ("float32", "bfloat16") if family == "simt" else ("float16", "bfloat16")


PRODUCTS = [pytest.param(family, dtype, causal, id=f"{family}-{dtype}{'-causal' * causal}")
            for family in FAMILIES for dtype in dtypes(family) for causal in (False, True) if causal or dtype != "bfloat16"]


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("family", "dtype", "causal"), PRODUCTS)
def test_products(family: str, dtype: str, causal: bool) -> None:
    """Key j has j + 1 parts of the largest product: the last key has all
    weight, or the first where products are negative."""
    if not supported(family):
        pytest.skip(f"no {family} here")
    for size, dim in itertools.product((1e4, 1e7, 1.9e8, 4e8, 1e11, 1e19, 1e30), (64, 128)):
        for sign in (1, -1):
            inputs = make(family, dtype, 1, dim=dim, causal=causal, softmax_scale=1.0)
            q, k, _ = inputs.args
            q[:] = 16 * sign
            k[:] = np.minimum(1 + np.arange(k.shape[1]), 256 if dtype == "bfloat16" else 2048)[:, None, None]
            if k.shape[1] > 256 and dtype == "bfloat16":        # the last exact one for each
                k[0, 256:] = 256
                k[0, -1] = 512
            inputs.kwargs["softmax_scale"] = size / (dim * 16)
            run(inputs, family)
    inputs = make(family, dtype, 2, causal=causal, softmax_scale=1.0)      # equal products
    inputs.args[0][:], inputs.args[1][:] = 5e4, 5e4
    inputs.dout[:] = 0
    run(inputs, family)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_far_rows_of_others_change_no_bit(family: str, dim: int) -> None:
    """dK and dV of a sequence, beside one that has far rows in some blocks of queries, and beside itself."""
    if not supported(family):
        pytest.skip(f"no {family} here")
    draw, found = np.random.default_rng(6), []
    q, k, v, dout = (draw.standard_normal((2, 700, 2, dim), dtype=F) for _ in range(4))
    for factor in (1, 1e4):
        q[0, 100:300] *= factor
        args = [on_device(x.astype(NUMPY["bfloat16"])) for x in (q, k, v)]
        with gpu.use(family):
            out, lse = fastattn.attention(*args, causal=True, return_lse=True)
            assert (abs(to_host(lse)) > 3000).any() == (factor > 1)
            grads = fastattn.attention_backward(on_device(dout.astype(NUMPY["bfloat16"])), *args, out, lse, causal=True)
        found.append([to_host(x).astype(F) for x in (grads.dk, grads.dv)])
    for ordinary, beside_far in zip(*found, strict=True):
        np.testing.assert_array_equal(ordinary[1], beside_far[1])
        assert np.isfinite(beside_far).all()


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales(family: str, causal: bool) -> None:
    """Negative ones, that make scores of products themselves, and large ones: many blocks of keys, whose maxima come late."""
    if not supported(family):
        pytest.skip(f"no {family} here")
    for dtype in dtypes(family):
        for scale in (-1.0, 4.0, -0.125, 1e-31, -1e-31):
            for rows, dim in ((17, 64), (130, 64), (130, 128), (130, 32)):
                run(make(family, dtype, 5, rows=rows, keys=534, dim=dim, causal=causal, softmax_scale=scale), family)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["sm90", "sm80", "simt"])
def test_biases(family: str, dtype: str, bias_dtype: str) -> None:
    """A bias on whole rows, left padding under a causal mask, and a key to which a bias gives all weight."""
    if not supported(family) or (dtype == "float32") != (family == "simt") or (bias_dtype == "bfloat16" and dtype != "bfloat16"):
        pytest.skip("not a call of this family")
    for value in (-1e4, -2e8, -1e9, -1e10, LEAST[bias_dtype], 3e38):
        for causal in (False, True):
            inputs = make(family, dtype, 3, causal=causal)
            bias = np.zeros((1, 1, 130, 200), F)
            if value > 0:
                bias[..., ::3, 7] = value
            else:
                bias[:, :, 5:70] = value
                bias[..., :90] = value
            inputs.kwargs["bias"] = bias.astype(NUMPY[bias_dtype])
            run(inputs, family)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_sinks(family: str) -> None:
    """The largest and the lowest finite sink. For a row that only its sink
    attends to, dout does not matter to dsinks."""
    if not supported(family):
        pytest.skip(f"no {family} here")
    dtype = dtypes(family)[0]
    inputs = make(family, dtype, 4, sinks=np.array([np.finfo(F).max, np.finfo(F).min], F))
    run(inputs, family)
    if family == "decode":
        return
    q, k, v, dout = (*inputs.args, inputs.dout)
    mask, found = np.ones((1, 1, 130, 200), bool), []
    mask[..., 9, :] = False
    for bad in (1.0, np.nan):
        dout[:, 9] = bad
        q_, k_, v_, dout_, mask_, sinks_ = (on_device(x) for x in (q, k, v, dout, mask, np.array([0.5, -1], F)))
        with gpu.use(family):
            out, lse = fastattn.attention(q_, k_, v_, mask=mask_, sinks=sinks_, return_lse=True)
            found.append(to_host(fastattn.attention_backward(dout_, q_, k_, v_, out, lse, mask=mask_, sinks=sinks_).dsinks))
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0]).all()
