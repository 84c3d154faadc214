"""Kernels of gpu/rows run from their PTX at odd sizes: numbers, and that each access is aligned and inside the arrays.

The text of these kernels also runs in Python (emulator.py), in their own tests. But what is inlined there as PTX, vectors and guarded
loads, runs only here. Those of a backward and of caches: test_nothing.py, test_caches.py, test_widened_caches.py.
"""
from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn.arrays import convert
from fastattn.arrays.view import View, numpy_dtype
from fastattn.compat.multi_head import transform_bias_rescale_qkv, transform_bias_rescale_qkv_backward
from fastattn.gpu import eight_bit
from fastattn.gpu.rows import accumulate_launch, launch, mask_words, merge_launch, parts, quantize_launch
from fastattn.gpu.spec import Call
from fastattn.problem import Operands
from fastattn.quantize import scale_shape
from tests.tools.gpu import interpreter
from tests.tools.gpu.interpreter_memory import BASE
from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]
SHAPES = [(1, 1, 1, 1), (2, 63, 3, 24), (1, 65, 1, 255), (1, 3, 3, 576), (65, 3, 40)]
LAYOUTS = ["plain", "gaps", "whole gaps", "swapped", "every other", "one off"]
DRAW = np.random.default_rng(0)


def drawn(shape: tuple[int, ...], dtype: str, layout: str = "plain") -> Array:
    """Normal numbers, in a way in which they may lie in memory."""
    def normal(*sizes: int) -> Array:
        return DRAW.standard_normal(sizes).astype(np.float32).astype(NUMPY[dtype] if dtype in NUMPY else numpy_dtype(dtype))
    if layout in ("gaps", "whole gaps"):
        return normal(*shape[:-1], shape[-1] + (3 if layout == "gaps" else 16))[..., :shape[-1]]
    if layout == "swapped":
        return np.ascontiguousarray(normal(*shape).swapaxes(-2, -3)).swapaxes(-2, -3)
    if layout == "every other":
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
    return normal(math.prod(shape) + 1)[1:].reshape(shape) if layout == "one off" else normal(*shape)


class Machine:
    """Arrays in the interpreter's memory."""

    def __init__(self) -> None:
        self.memory = interpreter.Memory()
        self.launcher = interpreter.Launcher(self.memory)

    def __call__(self, *arrays: Array) -> list[View]:
        return [self.memory.place(x, convert.view(x, "test", "x")) for x in arrays]

    def read(self, x: View, dtype: Any) -> Array:
        return self.memory.read(x, NUMPY[dtype] if dtype in NUMPY else numpy_dtype(dtype))


def close(x: Array, y: Array, error: float) -> None:
    np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=error, atol=error / 8)


def states(shape: tuple[int, ...], dtype: str, layout: str, count: int) -> tuple[list[Array], list[Array]]:
    """Results of parts. Some rows have no key in one part, and NaN; a row has none in any part."""
    outs = [drawn(shape, dtype, layout) for _ in range(count)]
    lses = [5 * drawn((*shape[:-3], shape[-2], shape[-3]), "float32") for _ in range(count)]
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        lse[..., -1] = [-np.inf, np.inf][n % 2]
        lse[..., 0, n % lse.shape[-1]] = -np.inf
        out.swapaxes(-2, -3)[lse == -np.inf] = np.nan
    return outs, lses


@pytest.mark.parametrize(("dtype", "target", "count"), [("float16", "float16", 2), ("bfloat16", "float32", 3), ("float32", "float32", 1)])
def test_merge(dtype: str, target: str, count: int) -> None:
    for shape in SHAPES:
        for layout in LAYOUTS[count % 2::2]:
            (outs, lses), machine = states(shape, dtype, layout, count), Machine()
            out, lse = machine(drawn(shape, target, layout), np.full_like(lses[0], np.nan))
            launch.merge_states(machine(*outs), machine(*lses), out, lse, machine.launcher, 0)
            right = fastattn.merge_states([x.astype(NUMPY[target]) for x in outs], lses, layout="thd" if len(shape) == 3 else "bshd")
            close(machine.read(out, target), right[0], 1e-2 if target == "float16" else 1e-5)
            close(machine.read(lse, "float32"), right[1], 1e-5)


def test_merge_in_place() -> None:
    for shape in SHAPES:
        for layout in LAYOUTS:
            (outs, lses), machine = states(shape, "float32", layout, 2), Machine()
            right = fastattn.merge_states(outs, lses, layout="thd" if len(shape) == 3 else "bshd")
            out, part, lse, part_lse = machine(*outs, *lses)
            merge_launch.merge_into(part, part_lse, out, lse, machine.launcher, 0)
            close(machine.read(out, "float32"), right[0], 1e-5)
            close(machine.read(lse, "float32"), right[1], 1e-5)


def parts_of(x: Array) -> Array:
    """The first part is cut off, the others are rounded (ptx/parts.py)."""
    wide = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 64) * 64), np.float32)
    wide[..., :x.shape[-1]] = x
    high = (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    middle = (wide - high).astype(NUMPY["bfloat16"])
    low = (wide - high - middle.astype(np.float32)).astype(NUMPY["bfloat16"])
    return np.concatenate([high, middle.astype(np.float32), low.astype(np.float32)], axis=-1)


@pytest.mark.parametrize(("dims", "layouts"), [((255, 576), LAYOUTS), ((24, 1), ("plain", "one off")), ((132, 40), ("plain", "gaps"))])
def test_split(dims: tuple[int, int], layouts: tuple[str, ...]) -> None:
    for layout in layouts:
        machine, arrays = Machine(), [drawn((2, 65 if dims[0] < 255 else 3, 3, dim), "float32", layout) for dim in dims]
        views = dict(zip("kv", machine(*arrays), strict=True))
        sizes = [2 * math.prod(parts.parts_view(x, 0).shape) for x in views.values()]
        split = {name: parts.parts_view(x, machine.memory.take(size)) for (name, x), size in zip(views.items(), sizes, strict=True)}
        parts._split(views, split, machine.launcher, 0)
        for x, found in zip(arrays, split.values(), strict=True):
            np.testing.assert_array_equal(machine.read(found, "bfloat16").astype(np.float32), parts_of(x))


@pytest.mark.parametrize(("dtype", "target", "axis"), [("float16", "float8_e4m3fn", None), ("float32", "float8_e5m2", "batch_head")])
def test_quantize(dtype: str, target: str, axis: Any) -> None:
    for shape in SHAPES[:4]:
        for layout in LAYOUTS:
            x, machine = drawn(shape, dtype, layout), Machine()
            source, out, scale = machine(x, drawn(shape, target), np.zeros(scale_shape(convert.view(x, "test", "x"), axis), np.float32))
            quantize_launch.quantize(source, out, scale, machine.launcher, 0)
            right = fastattn.quantize_fp8(x, axis, target)
            np.testing.assert_array_equal(machine.read(out, target).astype(np.float32), right[0].astype(np.float32))
            np.testing.assert_array_equal(machine.read(scale, "float32"), right[1])


@pytest.mark.parametrize(("dtype", "target"), [("float8_e4m3fn", "bfloat16"), ("float16", "float8_e4m3fn")])
def test_rescale(dtype: str, target: str) -> None:
    """Rows of packed sequences, some of which are empty, and of a batch."""
    cu = np.array([0, 0, 10, 10, 60], np.int32)
    for shape in SHAPES:
        packed = len(shape) == 3
        sequence = np.searchsorted(cu[1:-1], np.arange(shape[0]), side="right")
        scales = (DRAW.random((4 if packed else shape[0], shape[-2])) + 0.5).astype(np.float32)
        factors = scales[sequence][..., None] if packed else scales[:, None, :, None]
        for layout in LAYOUTS:
            x, machine = drawn(shape, dtype, layout), Machine()
            source, out, lengths, scale = machine(x, drawn(shape, target), cu, scales)
            operands = SimpleNamespace(cu_seqlens_q=lengths if packed else None)
            call: Any = SimpleNamespace(operands=operands, problem=SimpleNamespace(batch=4))
            eight_bit.rescale(call, source, out, (scale, None), machine.launcher, 0, 1, 2.0)
            close(machine.read(out, target), 2 * x.astype(np.float32) * factors, 2.0**-3 if "float8" in target else 2.0**-8)


@pytest.mark.parametrize(("dtype", "target", "add"), [("float32", "float32", True), ("float32", "bfloat16", False),
                                                      ("float16", "float32", True)])
def test_accumulate(dtype: str, target: str, add: bool) -> None:
    for shape in SHAPES:
        for n, layout in enumerate(LAYOUTS):
            x, y, machine = drawn(shape, dtype, layout), drawn(shape, target, LAYOUTS[n // 2]), Machine()
            out, source = machine(y, x)
            accumulate_launch.accumulate(out, source, add, machine.launcher, 0)
            right = (y.astype(np.float32) * add + x.astype(np.float32)).astype(NUMPY[target])
            np.testing.assert_array_equal(machine.read(out, target), right)


@pytest.mark.parametrize(("dtype", "packed"), [("float32", False), ("bfloat16", True)])
def test_transform(dtype: str, packed: bool) -> None:
    """Packed: sequences of no row, and rows of no sequence."""
    cu, error = np.array([0, 0, 30, 30, 64], np.int32), 1e-5 if dtype == "float32" else 2e-2
    for heads, dim, layout in ((3, 24, "plain"), (1, 1, "gaps"), (1, 255, "plain"), (1, 40, "whole gaps")):
        shape, lengths = (67, 3 * heads * dim) if packed else (2, 65, 3 * heads * dim), {"cu_seqlens": cu} if packed else {}
        qkv, bias = drawn((*shape[:-1], 1, shape[-1]), dtype, layout)[..., 0, :], drawn((1, 1, shape[-1]), dtype, layout)[0, 0]
        right, machine = transform_bias_rescale_qkv(qkv, bias, heads, **lengths), Machine()
        results = machine(*(np.full(x.shape, np.nan, x.dtype) for x in right))
        [length] = machine(cu) if packed else [None]
        launch.transform(*machine(qkv, bias), length, *results, dim**-0.5, machine.launcher, 0)
        for found, x in zip(results, right, strict=True):
            close(machine.read(found, dtype), x, error)
        grads = [drawn(x.shape, dtype, layout) for x in right]
        dqkv, dbias = machine(np.full(shape, np.nan, NUMPY[dtype]), np.full(shape[-1], np.nan, NUMPY[dtype]))
        launch.transform_backward(*machine(*grads), length, dqkv, dbias, dim**-0.5, machine.launcher, 0)
        right = transform_bias_rescale_qkv_backward(*grads, **lengths, **({"total": 67} if packed else {}))
        close(machine.read(dqkv, dtype), right[0], error)
        close(machine.read(dbias, dtype), right[1], 8 * error)


def test_sum_groups() -> None:
    for heads, keys, *dims in ((1, 1, 1, 24), (3, 63, 40, 24), (1, 65, 255, 64), (3, 3, 576, 512)):
        for layout in LAYOUTS:
            sums, machine = [drawn((3, keys, heads, -(-max(dims) // 16) * 16), "float32") for _ in range(2)], Machine()
            grads = machine(*(drawn((1, keys, heads, dim), "bfloat16", layout) for dim in dims))
            first, second = machine(*sums)
            launch.sum_groups(first, second, *grads, machine.launcher, 0)
            for x, found, dim in zip(sums, grads, dims, strict=True):
                right = (x[0] + x[1] + x[2])[..., :dim].astype(NUMPY["bfloat16"])
                np.testing.assert_array_equal(machine.read(found, "bfloat16")[0], right)


def words_of(x: View, machine: Machine, shape: tuple[int, ...], width: int, by_keys: bool) -> Array:
    """The mask, by lines, that words stand for (rows/mask_words.py)."""
    batch, heads, lines, columns = shape
    by_line, by_block = x.strides[:1:-1] if by_keys else x.strides[2:]
    planes = np.ix_(*map(np.arange, (batch, heads, lines, -(-columns // width), 4)))
    at = x.ptr - BASE + sum(n * by for n, by in zip(planes, (*x.strides[:2], by_line, by_block, 4), strict=True))
    words, found = machine.memory.bytes.view(np.uint32)[at // 4], np.zeros((*at.shape[:4], width), bool)
    for t, j, bit in np.ndindex(4, width // 8, 2):
        found[..., 8 * j + 2 * t + bit] = words[..., t] >> np.uint32(2 * j + bit) & np.uint32(1)
    return found.reshape(batch, heads, lines, -1)


@pytest.mark.parametrize(("width", "by_keys"), [(64, False), (128, True)])
def test_pack_mask(width: int, by_keys: bool) -> None:
    def mask(*shape: int) -> Array:
        return DRAW.random(shape) < 0.4
    for batch, heads, rows, keys in ((1, 1, 1, 1), (1, 3, 63, 65), (1, 1, 65, 140)):
        shape = batch, heads, rows, keys
        for given in (mask(*shape), mask(batch, heads, rows, keys + 5)[..., :keys], mask(batch, heads, keys, rows).swapaxes(2, 3),
                      mask(rows, 1), mask(keys), mask(batch * heads * rows * keys + 1)[1:].reshape(shape)):
            x, machine = np.broadcast_to(given, shape), Machine()
            [view] = machine(x)
            call: Any = Call(SimpleNamespace(packed=False), Operands(view, view, view, mask=view), view, None)  # type: ignore[arg-type]
            lines = x.swapaxes(2, 3) if by_keys else x
            with mask_words.mask_words(call, width, machine.launcher, 0, by_keys) as packed:
                found = words_of(packed.operands.mask, machine, lines.shape, width, by_keys)
            np.testing.assert_array_equal(found[..., :lines.shape[3]], lines)
