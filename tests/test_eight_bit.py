"""8-bit q, k and v: the reference and the CPU engine against float64 of the numbers that they stand for, the options, and the errors."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_backward
from fastattn.arrays.view import EIGHT_BIT, LARGEST, numpy_dtype
from fastattn.tolerance import distance
from tests.tools.eight_bit import CASES, Quantised, by_name, dequantised, exact, limit

Array = np.ndarray[Any, Any]
E4M3, E5M2 = (numpy_dtype(name) for name in EIGHT_BIT)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_against_float64(name: str, engine: str) -> None:
    case: Quantised = by_name(name)
    out, lse = case.call(engine=engine)
    want, want_lse = exact(case)
    assert out.dtype == numpy_dtype(case.out_name) and lse.dtype == (np.float64 if case.dtype == "float64" else np.float32)
    assert distance(dequantised(out, case.kwargs.get("out_scale")), want) <= limit(case, want, P=None), name
    finite = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), finite)
    np.testing.assert_allclose(lse[finite], want_lse[finite], rtol=1e-5, atol=1e-5)


def test_out_and_layout() -> None:
    case = by_name("gqa")
    want, _ = case.call()
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in case.args)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), want.dtype)
    assert attention(q, k, v, layout="bhsd", out=out, **case.kwargs) is out
    np.testing.assert_array_equal(out.swapaxes(1, 2), want)


def test_numbers_lists_and_arrays_are_the_same_scales() -> None:
    case = by_name("plain")
    want, _ = case.call()
    for made in (float, np.float32, np.asarray, lambda x: np.full((1,), x), lambda x: [x], lambda x: np.full((2, 2), x, np.float32)):
        for name in ("q_scale", "k_scale", "v_scale"):
            out = attention(*case.args, **(case.kwargs | {name: made(np.float32(case.kwargs[name]))}))
            np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), rtol=2.0**-7, atol=2.0**-9)


def test_repeated_calls_use_the_scales_of_each_call() -> None:
    q, k, v = (np.ones((1, 16, 1, 16), np.float32).astype(E4M3) for _ in range(3))
    for scale in (1.0, 2.0, 1.0, 2.0, 0.5):
        assert (attention(q, k, v, v_scale=scale).astype(np.float32) == scale).all()
        assert (attention(q, k, v, v_scale=np.full((1, 1), scale, np.float32)).astype(np.float32) == scale).all()
    for _ in range(3):
        assert attention(q, k, v).dtype.name == "bfloat16"
        assert attention(q, k, v, out_dtype="float32").dtype == np.float32


def test_8_bit_output_saturates() -> None:
    q, k, v = (np.ones((1, 16, 1, 16), np.float32).astype(E4M3) for _ in range(3))
    for engine in ("cpu", "reference"):
        out = attention(q, k, v, v_scale=1e4, out_dtype="float8_e4m3fn", engine=engine)
        assert out.dtype == E4M3 and (out.astype(np.float32) == LARGEST["float8_e4m3fn"]).all()
        out = attention(q, k, v, v_scale=1e4, out_dtype=E4M3, out_scale=100.0, engine=engine)
        assert (out.astype(np.float32) == 96).all() or (out.astype(np.float32) == 104).all()


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    case = by_name("batch_head_scales")
    want, want_lse = case.call()
    tensors = [torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn) for x in case.args]
    scales = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in case.kwargs.items()}
    out, lse = attention(*tensors, return_lse=True, **scales)
    assert out.dtype == torch.bfloat16
    np.testing.assert_array_equal(out.view(torch.int16).numpy(), want.view(np.int16))
    np.testing.assert_array_equal(lse.numpy(), want_lse)


def test_explain_names_the_engine() -> None:
    case = by_name("plain")
    assert fastattn.explain(attention, *case.args, **case.kwargs).engine == "cpu"


def test_registered_engines_never_see_8_bits() -> None:
    def forward(*_: Any) -> None:
        raise AssertionError("called")
    case = by_name("plain")
    with fastattn.register_engine("eight_bit_test", forward, None, lambda problem: None, "cpu").activate():
        case.call(engine=None)
        with pytest.raises(fastattn.UnsupportedError, match="8-bit operands are for the built-in engines"):
            case.call(engine="eight_bit_test")


# ---------------------------------------------------------------- errors
WIDE = np.ones((2, 6, 4, 8), np.float32)
Q, K = WIDE.astype(E4M3), WIDE[:, :, :2].astype(E4M3)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_e5m2": ({"q": WIDE.astype(E5M2)}, TypeError, "q has dtype float8_e5m2; expected float8_e4m3fn or float32 or .*; of 8-bit floats q"),
    "v_wide": ({"v": WIDE[:, :, :2]}, TypeError, r"v has dtype float32; expected float8_e4m3fn or float8_e5m2, because q has dtype "
               r"float8_e4m3fn; quantize_fp8\(v\) gives it, and its scale"),
    "only_k": ({"q": WIDE, "v": WIDE[:, :, :2]}, TypeError, "v has dtype float32; expected float8_e4m3fn or .*, because k has dtype"),
    "wide": ({"q": WIDE, "k": WIDE, "v": WIDE, "v_scale": 1.0}, ValueError,
             "v_scale is given, and k has dtype float32; expected v_scale beside 8-bit k and v only"),
    "wide_dtype": ({"q": WIDE, "k": WIDE, "v": WIDE, "out_dtype": "float16"}, ValueError,
                   "out_dtype is float16, and q has dtype float32; expected None, q's dtype, or float32 beside float16 and bfloat16"),
    "q_scale": ({"q": WIDE, "q_scale": 1.0}, ValueError,
                "q_scale is given, and q has dtype float32; expected None, because only 8-bit operands have scales"),
    "shape": ({"q_scale": np.ones(4, np.float32)}, ValueError,
              r"q_scale has shape \(4,\); expected a number, \(1,\), \(num_heads_k,\) = \(2,\) or .*; "
              "query heads use their key head's q_scale"),
    "zero": ({"k_scale": 0.0}, ValueError, "k_scale is 0.0; expected a positive finite number"),
    "infinite": ({"k_scale": np.inf}, ValueError, "k_scale is inf; expected a positive finite number"),
    "negative": ({"v_scale": np.float32([1, -1])}, ValueError,
                 "v_scale has -1.0 for batch entry 0, head 1; expected a positive finite number"),
    "text": ({"v_scale": "big"}, TypeError, "v_scale is 'big'; expected a positive finite number"),
    "integers": ({"v_scale": np.ones(2, np.int32)}, TypeError, "v_scale has dtype int32; expected float32;"),
    "doubles": ({"v_scale": np.ones(2)}, TypeError, "v_scale has dtype float64; expected float32;"),
    "out_dtype": ({"out_dtype": "int32"}, ValueError, "out_dtype is int32; expected bfloat16 or float16 or float32 or float8_e4m3fn"),
    "out_scale": ({"out_scale": 2.0}, ValueError, "out_scale is given; expected out_dtype='float8_e4m3fn' beside it; the output's"),
    "out_scales": ({"out_scale": np.ones(2, np.float32), "out_dtype": E4M3}, ValueError,
                   r"out_scale has shape \(2,\); expected a number or \(1,\)"),
    "factor": ({"v_scale": 1e30, "out_scale": 1e-30, "out_dtype": E4M3}, ValueError, "v_scale is 1e.30 with out_scale = 1e-30"),
    "out": ({"out": np.zeros(WIDE.shape, np.float32)}, TypeError, "out has dtype float32; expected bfloat16"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, error, text = ERRORS[name]
    with pytest.raises(error, match=r"^attention\(\): " + text):
        attention(**({"q": Q, "k": K, "v": K} | change))


def test_there_is_no_backward() -> None:
    lse = np.zeros((2, 4, 6), np.float32)
    with pytest.raises(TypeError, match=r"^attention_backward\(\): q has dtype float8_e4m3fn; .*; 8-bit operands have no backward"):
        attention_backward(WIDE, Q, K, K, WIDE, lse)
    with pytest.raises(TypeError, match=r"^attention_backward\(\): k has dtype float8_e4m3fn; .*; 8-bit operands have no backward"):
        attention_backward(WIDE, WIDE, K, K, WIDE, lse)


def test_a_scale_in_the_memory_of_out() -> None:
    scale = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="out shares memory with v_scale"):
        attention(Q[:1, :1, :2, :1], K[:1, :1, :, :1], K[:1, :1, :, :1], v_scale=scale[:2], out_dtype="float32",
                  out=scale[:2].reshape(1, 1, 2, 1))
