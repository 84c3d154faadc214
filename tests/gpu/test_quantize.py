"""quantize_fp8's kernels: compiled for every architecture and run in Python (tools/gpu/emulator.py). With a GPU their bits are NumPy's."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu
from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn.arrays import convert
from fastattn.arrays.view import EIGHT_BIT, numpy_dtype
from fastattn.gpu.rows import quantize_launch
from fastattn.gpu.runtime import compile as compiler
from fastattn.quantize import scale_shape
from tests.tools.gpu.builds import build
from tests.tools.gpu.emulator import Memory, emulated

DTYPES = ["float16", "bfloat16", "float32", "float64"]
SHAPES = {None: (2, 70, 3, 5), "head": (1, 3, 2, 4), "batch_head": (3, 65, 2, 6)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype: str, arch: str) -> None:
    for target in EIGHT_BIT:
        sources = quantize_launch.magnitude_source(dtype), quantize_launch.scale_source(dtype, target), \
            quantize_launch.quantize_source(dtype, target)
        for source in sources:
            assert compiler.complaints(build(source, arch)[1]) == [], source.key


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize(("dtype", "target"), [("float16", "float8_e4m3fn"), ("bfloat16", "float8_e5m2"), ("float32", "float8_e4m3fn"),
                                               ("float64", "float8_e4m3fn")])
def test_in_python(dtype: str, target: str, axis: Any) -> None:
    shape, draw = SHAPES[axis], np.random.default_rng(0)
    wide = np.zeros((*shape[:-1], 2 * shape[-1]), NUMPY[dtype])
    x, want_nan = wide[..., ::2], 0
    x[...] = (draw.standard_normal(shape) * 2.0 ** draw.integers(-6, 6, (shape[0], 1, shape[2], 1))).astype(np.float32).astype(NUMPY[dtype])
    if axis == "head":
        x[0, 0, 0, :3], want_nan = [np.inf, np.nan, -np.inf], 1
        x[:, :, 1] = 0
    for view in (x, np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2), x[0]):
        if view.ndim == 3 and axis == "batch_head":
            continue
        found = convert.view(view, "test", "x")
        out, scale = np.zeros(view.shape, numpy_dtype(target)), np.full(scale_shape(found, axis), np.nan, np.float32)
        memory, views = Memory(), [found, convert.view(out, "test", "out"), convert.view(scale, "test", "scale")]
        for one in views:
            memory.allow(one)
        with emulated(memory) as machine:
            quantize_launch.quantize(*views, machine.launcher(), 0)
        assert machine.launched == [f"magnitude {dtype}", f"scale {dtype} {target}", f"quantize {dtype} {target}"]
        expected, expected_scale = fastattn.quantize_fp8(view, axis, target)
        np.testing.assert_allclose(scale, expected_scale, rtol=2e-7)
        assert np.isnan(out.astype(np.float32)).sum() == want_nan
        # Python's division is float64: a number between two may be rounded to the other one
        assert (out.view(np.uint8) != expected.view(np.uint8)).mean() < 1e-2


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("target", EIGHT_BIT)
@pytest.mark.parametrize("axis", SHAPES)
def test_on_the_device(axis: Any, target: str) -> None:
    torch = pytest.importorskip("torch")
    for kind in ("float16", "bfloat16", "float32"):
        x = torch.randn(SHAPES[axis], generator=torch.Generator().manual_seed(0)).to(getattr(torch, kind))
        want, want_scale = fastattn.quantize_fp8(x, axis, target)
        got, scale = fastattn.quantize_fp8(x.cuda(), axis, target)
        assert got.dtype == getattr(torch, target) and got.is_cuda
        assert torch.equal(scale.cpu(), want_scale)
        assert torch.equal(got.view(torch.uint8).cpu(), want.view(torch.uint8))
