"""triton_attention and its 8-bit modes against the formula in float64 of the dequantised operands, in every library that has float8."""
from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn.compat import float8
from fastattn.compat.vllm import (
    FP8_MAX,
    FP8_MIN,
    MetaData,
    check_and_maybe_quantize_qkv,
    maybe_quantize_fp8,
    scale_fp8,
    triton_attention,
    triton_attention_rocm,
)
from tests.tools.devices import requires_gpu
from tests.tools.formulas import CU_K, CU_Q, LENGTHS_K, LENGTHS_Q, Array, expected, formula, normal, visible

FLOAT8 = ml_dtypes.float8_e4m3fn
DTYPES = {"float8_e4m3fn": FLOAT8, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
BATCH, L, S, HEADS, SHARED, D = 2, 9, 33, 4, 2, 24
LIBRARIES = ["numpy", "torch", "jax"]
Q_SCALES, K_SCALES, V_SCALES = (np.float32([0.011, 0.007, 0.02, 0.004]), np.float32([0.013, 0.0051]), np.float32([0.009, 0.03]))


def to(library: str, x: Any, device: str = "cpu") -> Any:
    """A NumPy array as one of the library's, bits unchanged."""
    if library == "numpy" or not isinstance(x, np.ndarray):
        return x
    if library == "jax":
        return pytest.importorskip("jax").numpy.asarray(x)
    torch = pytest.importorskip("torch")
    if x.dtype.name in ("bfloat16", "float8_e4m3fn"):
        whole = torch.from_numpy(x.view(np.int16 if x.itemsize == 2 else np.uint8).copy())
        return whole.view(getattr(torch, x.dtype.name)).to(device)
    return torch.from_numpy(x.copy()).to(device)


def of(x: Any) -> Array:
    """Any library's array in float64."""
    y: Array = x.double().cpu().numpy() if hasattr(x, "double") else np.asarray(x).astype(np.float64)
    return y


def name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def eight_bit(*shapes: tuple[int, ...]) -> list[Array]:
    """q, k and v over the range of float8_e4m3fn."""
    shapes = shapes or ((BATCH, HEADS, L, D), (BATCH, SHARED, S, D), (BATCH, SHARED, S, D))
    return [(60 * x).astype(FLOAT8) for x in normal(*shapes)]


def per_head(scale: Any, heads: int) -> Array:
    """A scale for each of the query heads, (heads, 1, 1)."""
    values = np.asarray(scale, np.float64).reshape(-1)
    return values.repeat(heads // values.size).reshape(heads, 1, 1)


def exact(q: Array, k: Array, v: Array, scales: tuple[Any, Any, Any], seen: Any = True, bias: Any = 0.0, sm_scale: float = 1.0) -> Array:
    """(batch, heads, L, D) arrays, the formula of what they stand for."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    q, k, v = q, k.repeat(group, axis=1), v.repeat(group, axis=1)
    descales = [1.0 if scale is None else per_head(scale, q.shape[1]) for scale in scales]
    return formula(*(x * scale for x, scale in zip((q, k, v), descales, strict=True)), seen, bias, sm_scale)


def error(got: Any, want: Array) -> float:
    assert of(got).shape == want.shape and np.isfinite(of(got)).all()
    return float(np.linalg.norm((of(got) - want).ravel()) / np.linalg.norm(want.ravel()))


def rounded(got: Any, want: Array, noise: float = 1e-3) -> bool:
    """Whether `got` is `want` clamped and rounded to float8_e4m3fn.

    Allowed are half a step (2**-4 of the power of two below, at least 2**-10) and the rounding of the sums before it,
    `noise` of the largest.
    """
    assert name(got) == "float8_e4m3fn" and of(got).shape == want.shape
    largest, clamped = np.abs(want).max(), want.clip(FP8_MIN, FP8_MAX)
    half = 2.0 ** (np.floor(np.log2(np.maximum(np.maximum(np.abs(of(got)), np.abs(clamped)), 2.0**-6))) - 4)
    return bool((np.abs(of(got) - clamped) <= half + noise * largest).all())


# ---------------------------------------------------------------- modes, scales, layouts
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "numbers": (0.011, 0.013, 0.009),
    "elements": (np.float32([0.011]), np.array(0.013), np.float32([[0.009]])),
    "heads": (Q_SCALES, K_SCALES, V_SCALES),
    "mixed": (Q_SCALES, 0.013, np.float32([0.009])),
    "mixed back": (np.float32(0.011), K_SCALES.astype(np.float64), V_SCALES.astype(np.float16)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_8_bit_operands_with_every_kind_of_scale(library: str, kind: str) -> None:
    q, k, v = eight_bit()
    scales = KINDS[kind]
    arrays, given = [to(library, x) for x in (q, k, v)], [to(library, x) for x in scales]
    want = exact(q, k, v, scales, sm_scale=0.3)
    for dtype, allowed in (("float32", 1e-3), ("float16", 2e-3), ("bfloat16", 5e-3)):
        out, encoded = triton_attention_rocm(*arrays, None, MetaData(0.3, "bhsd", dtype, 0, 0, None, None, *given, 0.5))
        assert encoded is None and name(out) == dtype and type(out) is type(arrays[0])
        assert error(out, want) < allowed
    out, _ = triton_attention_rocm(*arrays, None, MetaData(0.3, "bhsd", None, L, S, None, None, *given, o_scale=0.004))
    assert rounded(out, want / 0.004)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_8_bit_keys_and_values_with_a_wider_q(dtype: str, library: str, kind: str) -> None:
    _, k, v = eight_bit()
    q = normal((BATCH, HEADS, L, D))[0].astype(DTYPES[dtype])
    _, *scales = KINDS[kind]
    arrays = [to(library, x) for x in (q, k, v)]
    want = exact(q, k, v, (None, *scales))
    metadata = MetaData(layout="bhsd", output_dtype=dtype)
    metadata.set_eight_bit_params(None, *(to(library, x) for x in scales), p_scale=None, p_descale=None, o_scale=None)
    out, _ = triton_attention_rocm(*arrays, None, metadata)
    assert name(out) == dtype
    assert error(out, want) < {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("length", [L, S + 5])
def test_bias_and_alibi_are_not_scaled_and_causal_is_bottom_right(library: str, layout: str, length: int) -> None:
    """With bias and slopes of the other 16-bit dtype, and fully masked rows."""
    q, k, v = eight_bit((BATCH, HEADS, length, D), (BATCH, SHARED, S, D), (BATCH, SHARED, S, 17))
    bias = normal((1, HEADS, length, S), seed=5)[0].astype(ml_dtypes.bfloat16)
    slopes = np.float32([[0.5, 0.25, 0.125, 0]] * BATCH).astype(ml_dtypes.bfloat16)
    distance = np.abs(np.arange(length)[:, None] + S - length - np.arange(S))
    all_added = bias.astype(np.float64) - slopes.astype(np.float64)[:, :, None, None] * distance
    scales = (Q_SCALES, K_SCALES, 0.009)
    want = exact(q, k, v, scales, visible(length, S, right=0), all_added, 0.4)
    arrays = [to(library, x if layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    metadata = MetaData(0.4, layout, "float32", length, S, None, None, *(to(library, x) for x in scales))
    metadata.need_bias(to(library, bias), length, S)
    metadata.need_alibi(to(library, slopes), BATCH, HEADS)
    metadata.need_causal()
    out, _ = triton_attention_rocm(*arrays, None, metadata)
    assert error(out, want if layout == "bhsd" else want.swapaxes(1, 2)) < 1e-3


def test_scales_on_a_device_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one element: the host does not read it, so it cannot be folded into
    softmax_scale. It multiplies q instead, in float16."""
    torch = pytest.importorskip("torch")
    q, k, v = eight_bit()
    monkeypatch.setattr(float8, "device", lambda *_: 0)
    monkeypatch.setattr(float8, "view", None)
    for scales in ([np.float32([0.011]), np.float32([0.013]), np.float32([0.009])], [Q_SCALES, np.float32([0.013]), V_SCALES],
                   [np.float32([3e-5]), np.float32([2e-5]), np.float32([1e-6])]):
        given = [torch.from_numpy(x) for x in scales]
        o_scale = torch.tensor([float(scales[2].max()) / 2])
        arrays = [to("torch", x) for x in (q, k, v)]
        out, _ = triton_attention_rocm(*arrays, None, MetaData(1.0, "bhsd", "float32", 0, 0, None, None, *given, torch.tensor([0.5])))
        assert error(out, exact(q, k, v, tuple(scales))) < 1e-3
        out, _ = triton_attention_rocm(*arrays, None, MetaData(1.0, "bhsd", None, 0, 0, None, None, *given, o_scale=o_scale))
        assert rounded(out, exact(q, k, v, tuple(scales)) / o_scale.item())
        beside = normal(q.shape)[0].astype(np.float16)
        metadata = MetaData(layout="bhsd", output_dtype=torch.float16, k_descale=given[1], v_descale=given[2])
        out, _ = triton_attention_rocm(to("torch", beside), *arrays[1:], None, metadata)
        assert error(out, exact(beside, k, v, (None, *scales[1:]))) < 2e-3
        scaled, found = scale_fp8(arrays[0].float())
        assert error(of(scaled) * found.item(), of(arrays[0])) < 0.04
        assert (of(maybe_quantize_fp8(arrays[0].half(), found)) == of(scaled)).all()


def test_a_scale_that_is_a_number_costs_no_accuracy_and_p_is_not_8_bit() -> None:
    """Against the original's arithmetic: P * p_scale rounded to 8 bits."""
    q, k, v = eight_bit()
    scales = (0.011, 0.013, 0.009)
    want = exact(q, k, v, scales)
    out, _ = triton_attention_rocm(q, k, v, None, MetaData(1.0, "bhsd", np.float32, 0, 0, None, None, *scales, 1 / 448))
    scores = (q.astype(np.float64) @ k.repeat(2, axis=1).swapaxes(2, 3).astype(np.float64)) * 0.011 * 0.013
    P = np.exp(scores - scores.max(axis=-1, keepdims=True))
    rough = (P * 448).astype(np.float32).astype(FLOAT8).astype(np.float64) / 448 @ v.repeat(2, axis=1).astype(np.float64) * 0.009
    rival = error(rough / P.sum(axis=-1, keepdims=True), want)
    assert error(out, want) < 5e-4 < rival / 8


# ---------------------------------------------------------------- triton_attention: packed
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_packed_calls_quantise_operands_that_are_not_8_bit(library: str) -> None:
    q, k, v = (x.astype(DTYPES["bfloat16"]) for x in normal((16, 4, 16), (20, 2, 16), (20, 2, 16)))
    bias = normal((5, 4, 7, 9), seed=3)[0]
    cu = [to(library, x) for x in (CU_Q, CU_K)]
    scales = (Q_SCALES, 0.0125, np.float32([0.01]), np.float32([0.5]))
    given = tuple(to(library, x) for x in scales)
    q8, k8, v8 = check_and_maybe_quantize_qkv(q, k, v, scales)
    assert q8.dtype == k8.dtype == v8.dtype == FLOAT8 and (q8.view(np.uint8) != maybe_quantize_fp8(q, 0.011).view(np.uint8)).any()
    deq = [x.astype(np.float64) * y for x, y in ((q8, Q_SCALES.astype(np.float64)[:, None]), (k8, 0.0125), (v8, np.float64(scales[2][0])))]
    want = expected(*deq, right=0, bias=bias, scale=0.25)
    arrays = [to(library, x) for x in (q, k, v)]
    options = {"sm_scale": 0.25, "bias": to(library, bias.astype(np.float32)), "fp8_scales": given}
    out, nothing = triton_attention(*arrays, None, *cu, 7, 9, True, **options)
    assert nothing is None and name(out) == "bfloat16" and error(out, want) < 5e-3, "the dtype in which q came"
    ready, half = [to(library, x) for x in (q8, k8, v8)], to(library, np.zeros(want.shape, np.float16))
    triton_attention(*ready, half, *cu, 0, 0, True, **options)
    assert error(half, want) < 1e-3, "operands that are 8-bit already, longest sequences that are found"
    divided, _ = triton_attention(*arrays, None, *cu, 7, 9, True, **options, input_scale=0.004)
    assert name(divided) == "bfloat16" and np.abs(of(divided)).max() <= 448 and error(divided, (want / 0.004).clip(-448, 448)) < 5e-3
    o = to(library, np.zeros(want.shape, FLOAT8))
    result, _ = triton_attention(*arrays, o, *cu, 7, 9, True, **options, input_scale=to(library, np.float32([0.004])))
    assert result is o and rounded(o, want / np.float64(np.float32(0.004)))
    already, _ = triton_attention(*ready, None, *cu, 7, 9, True, **options)
    assert rounded(already, want)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_packed_keys_and_values_of_8_bits(library: str) -> None:
    q, k, v = (x.astype(np.float16) for x in normal((16, 4, 16), (20, 2, 16), (20, 2, 16)))
    arrays, cu = [to(library, x) for x in (q, k, v)], [to(library, x) for x in (CU_Q, CU_K)]
    _, k8, v8 = check_and_maybe_quantize_qkv(q, k, v, (None, K_SCALES, 0.01, None))
    want = expected(q.astype(np.float64), k8 * K_SCALES.astype(np.float64)[:, None], v8.astype(np.float64) * 0.01, right=0, scale=1.0)
    out, _ = triton_attention(*arrays, None, *cu, 7, 9, True, fp8_scales=(None, to(library, K_SCALES), 0.01, None))
    assert name(out) == "float16" and error(out, want) < 2e-3
    out, _ = triton_attention(*arrays, None, *cu, 7, 9, True, fp8_scales=[None, to(library, K_SCALES), 0.01, 1.0], input_scale=0.003)
    assert error(out, (want / 0.003).clip(-448, 448)) < 2e-3, "the original ignores the scale of the output here"


def test_without_scales_it_is_fastattn() -> None:
    q, k, v = (x.astype(np.float32) for x in normal((16, 4, 7), (20, 2, 7), (20, 2, 5)))
    o = np.empty((16, 4, 5), np.float32)
    out, nothing = triton_attention(q, k, v, o, CU_Q, CU_K, 7, 9, True, 0.5)
    assert out is o and nothing is None
    np.testing.assert_array_equal(o, fastattn.attention_varlen(q, k, v, CU_Q, CU_K, causal=True, softmax_scale=0.5))
    metadata = MetaData(return_encoded_softmax=True, max_seqlens_q=max(LENGTHS_Q), max_seqlens_k=max(LENGTHS_K))
    metadata.set_varlen_params(CU_Q, CU_K)
    out, encoded = triton_attention_rocm(q, k, v, None, metadata)
    np.testing.assert_array_equal(out, fastattn.attention_varlen(q, k, v, CU_Q, CU_K, softmax_scale=1.0))
    assert encoded.shape == (5, 4, 7, 9)
    q, k, v = (x[None] for x in (q, k, v))
    out, _ = triton_attention_rocm(q, k, v, None, MetaData(layout="bshd", causal=True))
    np.testing.assert_array_equal(out, fastattn.attention(q, k, v, causal=True, softmax_scale=1.0))


def test_encoded_softmax_of_8_bit_operands() -> None:
    q, k, v = eight_bit()
    metadata = MetaData(0.5, "bhsd", "float16", 0, 0, None, None, Q_SCALES, K_SCALES, 1.0, causal=True)
    metadata.return_encoded_softmax = True
    out, encoded = triton_attention_rocm(q, k, v, None, metadata)
    assert encoded.shape == (BATCH, HEADS, L, S)
    assert error(encoded.astype(np.float64) @ v.repeat(2, axis=1).astype(np.float64), of(out)) < 1e-2


# ---------------------------------------------------------------- outputs and quantisation
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_o_receives_the_output_and_its_dtype_decides(library: str) -> None:
    q, k, v = eight_bit()
    arrays = [to(library, x) for x in (q, k, v)]
    for dtype in DTYPES:
        want = exact(q, k, v, (0.011, 0.013, 1.0))
        wide = to(library, np.zeros((BATCH, HEADS, L, 2 * D), DTYPES[dtype]))
        o = wide[..., ::2]                                  # strided
        for output_dtype in (None, "bfloat16"):
            metadata = MetaData(1.0, "bhsd", output_dtype, 0, 0, None, None, 0.011, 0.013, 1.0)
            assert triton_attention_rocm(*arrays, o, metadata)[0] is o
            assert rounded(o, want) if dtype == "float8_e4m3fn" else error(o, want) < 5e-3
            assert (of(wide)[..., 1::2] == 0).all()


def test_output_saturates() -> None:
    q, k, v = eight_bit()
    out, _ = triton_attention_rocm(q, k, v, None, MetaData(1.0, "bhsd", None, 0, 0, None, None, 0.01, 0.01, 1.0, o_scale=0.01))
    assert (np.abs(of(out)) == 448).sum() > out.size / 2 and rounded(out, exact(q, k, v, (0.01, 0.01, 1.0)) / 0.01)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quantisation(library: str, dtype: str) -> None:
    t = (normal((3, 5, 4, 8))[0] * 100).astype(DTYPES[dtype])
    t[0, 0, 0, :4] = 1000, -1000, np.inf, 0
    for scale in (0.5, np.float32([0.75]), np.float32([0.5, 0.3, 2.0, 1.0])):
        want = (t.astype(np.float32) / (scale[:, None] if np.size(scale) > 1 else np.float32(scale))).clip(FP8_MIN, FP8_MAX).astype(FLOAT8)
        got = maybe_quantize_fp8(to(library, t), to(library, scale))
        assert name(got) == "float8_e4m3fn" and maybe_quantize_fp8(got, None) is got
        np.testing.assert_array_equal(of(got), want.astype(np.float64))
        given = scale if isinstance(scale, float) else to(library, scale)
        scaled, kept = scale_fp8(to(library, t), given)
        assert kept is given and (of(scaled) == of(got)).all()
    t[0, 0, 0, 2] = -2000
    scaled, found = scale_fp8(to(library, t))
    assert found.shape == (1,) and name(found) == "float32" and float(found[0]) == np.float32(2000 / 448)
    assert of(scaled).min() == -448 and error(of(scaled) * float(found[0]), t.astype(np.float64)) < 0.04
    scaled, found = scale_fp8(to(library, np.zeros_like(t)))
    assert float(found[0]) == 1.0 and (of(scaled) == 0).all()


# ---------------------------------------------------------------- errors
def test_signatures_are_the_originals() -> None:
    assert list(inspect.signature(triton_attention).parameters) == [
        "q", "k", "v", "o", "cu_seqlens_q", "cu_seqlens_k", "max_seqlens_q", "max_seqlens_k", "causal", "sm_scale", "bias", "fp8_scales",
        "input_scale"]
    assert list(inspect.signature(MetaData).parameters)[:19] == [
        "sm_scale", "layout", "output_dtype", "max_seqlens_q", "max_seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "q_descale", "k_descale",
        "v_descale", "p_scale", "o_scale", "bias", "seqlen_q", "seqlen_k", "alibi_slopes", "alibi_batch", "alibi_nheads", "causal"]


SCALES: dict[str, Any] = {"q_descale": 1.0, "k_descale": 1.0, "v_descale": 1.0}
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "layout is None; expected 'bshd' or 'bhsd', because cu_seqlens_q is None; packed arrays need", {"layout": None}),
    (ValueError, "layout is 'thd'; expected 'bshd' or 'bhsd'", {"layout": "thd"}),
    (ValueError, "layout is 'bhsd'; expected 'thd' or None, because cu_seqlens_q is given", {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}),
    (ValueError, "cu_seqlens_k is None; expected cumulative lengths", {"cu_seqlens_q": CU_Q}),
    (ValueError, "k_descale is None; expected a scale, because q_descale is given; 1.0 is", {"k_descale": None}),
    (ValueError, "v_descale is None; expected a scale", {"v_descale": None}),
    (ValueError, "q_descale is None; expected a scale, because k_descale is given", {"q_descale": None}),
    (ValueError, "k_descale is None; expected a scale, because q is float8_e4m3fn",
     dict.fromkeys(("q_descale", "k_descale", "v_descale"))),
    (ValueError, r"k_descale has shape \(3,\); expected a positive number, or a tensor of 1 element or of one for each of 2 heads",
     {"k_descale": np.ones(3, np.float32)}),
    (ValueError, r"o_scale has shape \(4,\); expected a positive number, or a tensor of 1 element\.", {"o_scale": np.ones(4, np.float32)}),
    (ValueError, r"p_scale has shape \(2,\); expected .* 4 heads", {"p_scale": np.ones(2, np.float32)}),
    (ValueError, r"p_scale has the value 0\.0; expected positive finite numbers", {"p_scale": 0}),
    (ValueError, "q_descale has the value nan", {"q_descale": np.float32([1, 2, 3, np.nan])}),
    (TypeError, "q_descale is 'high'; expected a positive number", {"q_descale": "high"}),
    (TypeError, r"q_descale is True; expected a positive number", {"q_descale": True}),
    (TypeError, "q_descale has dtype int64; expected float32", {"q_descale": np.ones(1, np.int64)}),
    (TypeError, "v has dtype float16; expected float8_e4m3fn, because v_descale is given; maybe_quantize_fp8",
     {"v": np.ones((2, 2, 33, 24), np.float16)}),
    (TypeError, "q has dtype float32; expected float8_e4m3fn, because q_descale is given; .*q_descale=None",
     {"q": np.ones((2, 4, 9, 24), np.float32)}),
    (TypeError, "k has dtype float8_e5m2; expected float8_e4m3fn", {"k": np.ones((2, 2, 33, 24), ml_dtypes.float8_e5m2)}),
    (ValueError, "q has 3 axes", {"q": np.ones((4, 9, 24), FLOAT8)}),
    (ValueError, "k has 3 heads; expected a divisor of q's 4 heads", {"k": np.ones((2, 3, 33, 24), FLOAT8)}),
    (ValueError, "k has head_dim 23", {"k": np.ones((2, 2, 33, 23), FLOAT8)}),
    (ValueError, "max_seqlens_q is 8; expected q's, 9", {"max_seqlens_q": 8}),
    (ValueError, "seqlen_k is 34; expected k's, 33", {"seqlen_k": 34}),
    (ValueError, "alibi_nheads is 2; expected q's heads, 4", {"alibi_nheads": 2}),
    (ValueError, "bias has shape", {"bias": np.ones((1, 4, 9, 32), np.float32)}),
    (TypeError, "sm_scale is 'x'; expected a finite number", {"sm_scale": "x"}),
    (TypeError, "output_dtype is int32; expected float32 or .* or float8_e4m3fn", {"output_dtype": np.int32}),
    (TypeError, "output_dtype is <object", {"output_dtype": object()}),
    (TypeError, "o has dtype int8", {"o": np.ones((2, 4, 9, 24), np.int8)}),
    (ValueError, "o has shape", {"o": np.ones((2, 4, 9, 23), FLOAT8)}),
    (ValueError, "o is read-only", {"o": np.broadcast_to(np.ones(1, FLOAT8), (2, 4, 9, 24))}),
]


@pytest.mark.parametrize(("kind", "text", "changes"), WRONG, ids=[text[:40] for _, text, _ in WRONG])
def test_errors_name_the_argument(kind: type[Exception], text: str, changes: dict[str, Any]) -> None:
    given = {**dict(zip("qkv", eight_bit(), strict=True)), "o": None, "layout": "bhsd", **SCALES, **changes}
    with pytest.raises(kind, match=r"^triton_attention_rocm\(\): " + text):
        triton_attention_rocm(*(given.pop(argument) for argument in "qkvo"), MetaData(**given))


WRONG_PACKED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "cu_seqlens_q is None; expected cumulative lengths .*MetaData", {"cu_seqlens_q": None, "cu_seqlens_k": None}),
    (ValueError, "max_seqlens_k is 8; expected at least the longest sequence of cu_seqlens_k, 9", {"max_seqlens_k": 8}),
    (ValueError, r"fp8_scales is 1\.0; expected a tuple \(q_scale, k_scale, v_scale, p_scale\)", {"fp8_scales": 1.0}),
    (ValueError, r"fp8_scales\[1\] \(k_descale\) is None; expected the scale that k is divided by; scale_fp8\(k\)",
     {"fp8_scales": (1.0, None, 1.0, 1.0)}),
    (ValueError, r"fp8_scales\[2\] \(v_descale\) has shape \(3,\)", {"fp8_scales": (1.0, 1.0, np.ones(3, np.float32), 1.0)}),
    (ValueError, r"fp8_scales\[3\] \(p_scale\) has the value -1", {"fp8_scales": (1.0, 1.0, 1.0, -1.0)}),
    (ValueError, r"input_scale has the value 0\.0", {"input_scale": 0.0, "fp8_scales": (1.0,) * 4}),
    (ValueError, r"fp8_scales\[1\] \(k_descale\) is None; expected a scale, because input_scale is given", {"input_scale": 0.1}),
    (TypeError, "q has dtype int32; expected float32", {"q": np.ones((16, 4, 16), np.int32), "fp8_scales": (1.0,) * 4}),
    (TypeError, "o has dtype float16; expected q's dtype, float32, because no scale is given", {"o": np.ones((16, 4, 16), np.float16)}),
]


@pytest.mark.parametrize(("kind", "text", "changes"), WRONG_PACKED, ids=[text[:40] for _, text, _ in WRONG_PACKED])
def test_errors_of_packed_calls(kind: type[Exception], text: str, changes: dict[str, Any]) -> None:
    q, k, v = (x.astype(np.float32) for x in normal((16, 4, 16), (20, 2, 16), (20, 2, 16)))
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlens_q": 7, "max_seqlens_k": 9}
    given = {"q": q, "k": k, "v": v, "o": None, **lengths, **changes}
    with pytest.raises(kind, match=r"^triton_attention\(\): " + text):
        triton_attention(**given)


def test_errors_of_quantisation() -> None:
    t = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"^maybe_quantize_fp8\(\): scale is None; expected the scale that t is divided by; scale_fp8"):
        maybe_quantize_fp8(t, None)
    with pytest.raises(ValueError, match=r"^scale_fp8\(\): t has shape \(0, 4\); expected elements"):
        scale_fp8(t[:0])
    with pytest.raises(TypeError, match=r"^scale_fp8\(\): t is a list"):
        scale_fp8([1.0])
    with pytest.raises(TypeError, match=r"^triton_attention_rocm\(\): metadata is a builtins dict; expected a fastattn"):
        triton_attention_rocm(t, t, t, None, {"layout": "bshd"})    # type: ignore[arg-type]


def test_errors_of_libraries_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class ndarray:                                          # as CuPy's, which has no float8
        __module__ = "cupy"
        dtype, shape = np.dtype(np.float16), (16, 4, 16)

    x = ndarray()
    with pytest.raises(TypeError, match=r"^triton_attention\(\): q is a cupy ndarray, whose library has no float8_e4m3fn; expected an "
                                        r"array of NumPy .*, torch or JAX; torch\.from_dlpack\(q\) shares its memory"):
        triton_attention(x, x, x, None, CU_Q, CU_Q, 7, 7, fp8_scales=(1.0,) * 4)
    q, k, v = eight_bit()
    places = {id(q): 0}
    monkeypatch.setattr(float8, "device", lambda x, *_: places.get(id(x)))
    with pytest.raises(ValueError, match=r"q_descale is in host memory; expected q's device, \('cuda', 0\); a copy"):
        triton_attention_rocm(q, k, v, None, MetaData(layout="bhsd", **{**SCALES, "q_descale": Q_SCALES}))
    places = {id(K_SCALES): 1}
    with pytest.raises(ValueError, match=r"k_descale is on device \('cuda', 1\); expected q's device, host memory"):
        triton_attention_rocm(q, k, v, None, MetaData(layout="bhsd", **{**SCALES, "k_descale": K_SCALES}))


def test_torch_errors() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (to("torch", x) for x in eight_bit())
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(TypeError, match=r"k_descale requires grad.*k_descale\.detach"):
        triton_attention_rocm(q, k, v, None, MetaData(layout="bhsd", **{**SCALES, "k_descale": scale}))
    with pytest.raises(ValueError, match="o is a numpy ndarray"):
        triton_attention_rocm(q, k, v, np.zeros((2, 4, 9, 24), FLOAT8), MetaData(layout="bhsd", **SCALES))
    with pytest.raises(TypeError, match="k has dtype float8_e4m3fnuz; expected float8_e4m3fn"):
        triton_attention_rocm(q, k.float().to(torch.float8_e4m3fnuz), v, None, MetaData(layout="bhsd", **SCALES))


# ---------------------------------------------------------------- on a GPU
def on_gpu() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    return torch


@requires_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["qkv", "float16", "bfloat16"])
def test_cuda_tensors(mode: str, kind: str) -> None:
    on_gpu()
    q, k, v = eight_bit((2, 4, 130, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    if mode != "qkv":
        q = normal(q.shape)[0].astype(DTYPES[mode])
    scales = (KINDS[kind][0] if mode == "qkv" else None, *KINDS[kind][1:])
    want = exact(q, k, v, scales, visible(130, 300, right=0), sm_scale=0.2)
    arrays, given = [to("torch", x, "cuda") for x in (q, k, v)], [to("torch", x, "cuda") for x in scales]
    out, _ = triton_attention_rocm(*arrays, None, MetaData(0.2, "bhsd", "float32", 0, 0, None, None, *given, causal=True))
    assert out.is_cuda and error(out, want) < (1.5e-2 if mode == "bfloat16" else 2e-3)
    out, _ = triton_attention_rocm(*arrays, None, MetaData(0.2, "bhsd", None, 0, 0, None, None, *given, o_scale=0.004, causal=True))
    assert rounded(out, want / 0.004, 1e-2 if mode == "bfloat16" else 1e-3)


@requires_gpu
def test_a_cuda_graph_follows_scales_on_the_device() -> None:
    """Quantisation, attention and the output's rounding are captured: nothing
    waits for the host, and a replay uses new scales."""
    torch = on_gpu()
    lengths = (100, 7, 0, 61)
    cu = torch.tensor([0, 100, 107, 107, 168], dtype=torch.int32, device="cuda")
    q, k, v = (torch.from_numpy(x).to("cuda", torch.bfloat16) for x in normal((168, 4, 64), (168, 2, 64), (168, 2, 64)))
    scales = [torch.tensor(x, device="cuda") for x in ([0.011], [0.013, 0.01], [0.01], [0.5])]
    input_scale, o = torch.tensor([0.004], device="cuda"), torch.zeros((168, 4, 64), dtype=torch.float8_e4m3fn, device="cuda")

    def run() -> None:
        triton_attention(q, k, v, o, cu, cu, max(lengths), max(lengths), True, 0.125, fp8_scales=tuple(scales), input_scale=input_scale)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()                                               # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for factor in (1.0, 1.5):
        for scale in (*scales[:3], input_scale):
            scale.mul_(factor)
        o.zero_()
        graph.replay()
        replayed = of(o)
        run()
        assert (replayed == of(o)).all() and np.abs(replayed).max() > 1
    q8, k8, v8 = (of(x) for x in check_and_maybe_quantize_qkv(q, k, v, tuple(scales)))
    deq = [x * of(scale)[:, None] for x, scale in zip((q8, k8, v8), scales, strict=False)]
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        parts = [x[rows].swapaxes(0, 1)[None] for x in deq]
        want = exact(*parts, (None, None, None), visible(n, n, right=0), sm_scale=0.125)[0].swapaxes(0, 1) / of(input_scale)
        assert n == 0 or rounded(o[rows], want)
        start += n
