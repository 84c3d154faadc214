"""quantize_fp8 in host memory: scales, rounding, special values, libraries and errors. gpu/test_quantize.py has the kernels."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastattn import quantize_fp8
from fastattn.arrays.view import EIGHT_BIT, LARGEST, numpy_dtype
from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]


def drawn(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    """Heads, and batch entries, of different magnitudes; those of the last two heads far apart where the dtype's range allows."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(shape) * 4.0 ** draw.integers(-4, 4, (*shape[:1], *(1,) * (len(shape) - 3), shape[-2], 1))
    if dtype != "float16" and shape[-2] > 2:
        x[..., -2:, :] *= np.array([1e-30, 1e30])[:, None]
    return x.astype(np.float32).astype(NUMPY[dtype])


@pytest.mark.parametrize("target", EIGHT_BIT)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("axis", "axes"), [(None, (0, 1, 2, 3)), ("head", (0, 1, 3)), ("batch_head", (1, 3))])
def test_scale_and_rounding(axis: Any, axes: tuple[int, ...], dtype: str, target: str) -> None:
    x = drawn((3, 7, 4, 16), dtype)
    x8, scale = quantize_fp8(x, axis, target)
    wide, most = x.astype(np.float64), LARGEST[target]
    assert x8.dtype == numpy_dtype(target) and scale.dtype == np.float32 and x8.shape == x.shape
    assert scale.shape == {None: (1,), "head": (4,), "batch_head": (3, 4)}[axis]
    s = scale.astype(np.float64).reshape((1, 1, 1, 1) if axis is None else (1, 1, 4, 1) if axis == "head" else (3, 1, 4, 1))
    top = np.abs(wide / s).max(axis=axes)
    assert (top > most / 2).all() and (top <= most * (1 + 1e-6)).all()
    step = 2.0**-4 if target == "float8_e4m3fn" else 2.0**-3
    error = np.abs(x8.astype(np.float64) * s - wide)
    assert (error <= np.maximum(step * np.abs(wide), s * (2.0**-10 if target == "float8_e4m3fn" else 2.0**-17)) * (1 + 1e-6)).all()


def test_layouts() -> None:
    x = drawn((2, 5, 3, 8))
    x8, scale = quantize_fp8(x, "batch_head")
    turned, same = quantize_fp8(np.ascontiguousarray(x.swapaxes(1, 2)), "batch_head", layout="bhsd")
    np.testing.assert_array_equal(turned.view(np.uint8), x8.swapaxes(1, 2).view(np.uint8))
    np.testing.assert_array_equal(scale, same)
    for layout in ("thd", "bshd"):
        packed, by_head = quantize_fp8(x[0], "head", layout=layout)
        assert packed.shape == (5, 3, 8) and by_head.shape == (3,)


@pytest.mark.parametrize("target", EIGHT_BIT)
def test_special_values(target: str) -> None:
    most = LARGEST[target]
    x = np.zeros((1, 2, 3, 4), np.float32)
    x8, scale = quantize_fp8(x, "head", target)
    assert (scale == 1).all() and (x8.astype(np.float32) == 0).all()
    x[0, 0, 0] = [np.inf, -np.inf, np.nan, 2.0]
    x8, scale = quantize_fp8(x, "head", target)
    np.testing.assert_array_equal(x8[0, 0, 0].astype(np.float32), [most, -most, np.nan, most])
    np.testing.assert_array_equal(scale, np.float32([2.0 / most, 1, 1]))
    for size, dtype in ((1e-45, np.float32), (1e-42, np.float32), (3.4e38, np.float32), (1e300, np.float64), (1e-300, np.float64)):
        x8, scale = quantize_fp8(np.full((1, 1, 1, 2), size, dtype), None, target)
        assert np.isfinite(scale).all() and (scale > 0).all()
        assert (x8.astype(np.float32) > 0).all() or size < 1e-45
    x8, scale = quantize_fp8(np.zeros((2, 0, 3, 4), np.float32), "batch_head", target)
    assert x8.shape == (2, 0, 3, 4) and (scale == 1).all() and scale.shape == (2, 3)


def test_torch_gives_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    x = drawn((2, 9, 3, 8))
    for axis in (None, "head", "batch_head"):
        for target in EIGHT_BIT:
            for kind in ("float32", "float16"):
                x8, scale = quantize_fp8(x.astype(kind), axis, target)
                other, other_scale = quantize_fp8(torch.from_numpy(x.astype(kind)), axis, getattr(torch, target))
                assert other.dtype == getattr(torch, target) and other_scale.dtype == torch.float32
                np.testing.assert_array_equal(other.view(torch.uint8).numpy(), x8.view(np.uint8))
                np.testing.assert_array_equal(other_scale.numpy(), scale)


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    x = drawn((2, 9, 3, 8))
    x8, scale = quantize_fp8(jax.numpy.asarray(x), "head", jax.numpy.float8_e4m3fn)
    want, want_scale = quantize_fp8(x, "head")
    assert isinstance(x8, jax.Array) and x8.dtype == jax.numpy.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(x8).view(np.uint8), want.view(np.uint8))
    np.testing.assert_array_equal(np.asarray(scale), want_scale)


X = np.ones((2, 3, 4, 8), np.float32)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "axis": ({"axis": "row"}, ValueError, r"^quantize_fp8\(\): axis is 'row'; expected None, 'head' or 'batch_head'\."),
    "dtype": ({"dtype": "float16"}, ValueError, "dtype is 'float16'; expected 'float8_e4m3fn' or 'float8_e5m2'"),
    "dtype_type": ({"dtype": np.float32}, ValueError, "dtype is <class 'numpy.float32'>; expected"),
    "layout": ({"layout": "sbhd"}, ValueError, "layout is 'sbhd'; expected 'bshd', 'bhsd' or 'thd'"),
    "rank": ({"x": X[0, 0]}, ValueError, r"x has shape \(4, 8\); expected 4 axes, or packed 3"),
    "packed": ({"layout": "thd"}, ValueError, "x has shape .*; expected 3 axes"),
    "packed_batch": ({"x": X[0], "axis": "batch_head"}, ValueError, "axis is 'batch_head' and x is packed; expected None or 'head'"),
    "twice": ({"x": X.astype(numpy_dtype("float8_e4m3fn"))}, TypeError, "x has dtype float8_e4m3fn; expected float32 or"),
    "integers": ({"x": X.astype(np.int32)}, TypeError, "x has dtype int32; expected float32 or"),
    "list": ({"x": [1.0]}, TypeError, "x is a list; expected"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, error, text = ERRORS[name]
    arguments = {"x": X} | change
    with pytest.raises(error, match=text):
        quantize_fp8(**arguments)
