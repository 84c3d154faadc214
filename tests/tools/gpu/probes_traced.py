"""Probes of gpu/test_intrinsics.py: the instructions of traced functions (ptx/traced.py)."""
from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, int32, int64, uint64

from fastattn.arrays.view import ITEMSIZE, numpy_dtype
from fastattn.gpu.ptx import memory, traced
from tests.tools.gpu.probes import Array, add, normal, same
from tests.tools.gpu.probes_scalar import check_unary, on_words, unary, words

NUMBERS = np.r_[0.5, -0.5, 1.5, 2.5, -2.5, 3e9, -3e9, np.linspace(-20, 20, 25)]
ANGLES = np.linspace(-np.pi, np.pi, 32)
add("traced.absolute", "abs.f32", unary(traced.absolute), check_unary(NUMBERS, np.abs, 0))
add("traced.root", "sqrt.approx.ftz.f32", unary(traced.root), check_unary(np.geomspace(1e-6, 1e9, 32), np.sqrt, 4))
add("traced.near_sine", "sin.approx.ftz.f32", unary(traced.near_sine), check_unary(ANGLES, np.sin, 0, 2.0**-20))
add("traced.near_cosine", "cos.approx.ftz.f32", unary(traced.near_cosine), check_unary(ANGLES, np.cos, 0, 2.0**-20))
for _mode, _rounding in (("rmi", np.floor), ("rni", np.rint)):
    add("traced.rounded", f"cvt.{_mode}.f32.f32", unary(traced.rounded(_mode, "float32")), check_unary(NUMBERS, _rounding, 0),
        name=f"traced.rounded_{_mode}")


def pair(function: Any) -> Any:
    def make() -> Any:
        def kernel(a):
            at = uint64(4 * cuda.threadIdx.x)
            memory.store_f32(uint64(a.dst + at), function(memory.load_f32(uint64(a.src + at)), memory.load_f32(uint64(a.other + at))))
        return kernel
    return make


def check_pair(function: Any) -> Any:
    def check(launch: Any) -> None:
        x, y = normal(32), normal(32, seed=1)
        x[0] = y[1] = np.nan
        same(launch(x, y, dst=np.zeros(32, np.float32)), function(x, y))
    return check


add("traced.smallest", "min.NaN.f32", pair(traced.smallest), check_pair(np.minimum))
add("traced.largest", "max.NaN.f32", pair(traced.largest), check_pair(np.maximum))


def whole() -> Any:
    def kernel(a):
        at = uint64(4 * cuda.threadIdx.x)
        x = memory.load_f32(uint64(a.src + at))
        memory.store_b32(uint64(a.dst + at), traced.whole_f32(x))
        memory.store_b32(uint64(a.dst + at + uint64(128)), traced.whole_f64(float64(x)))
    return kernel


def check_whole(launch: Any) -> None:
    x = NUMBERS.astype(np.float32)
    want = np.trunc(x.astype(np.float64)).clip(-2**31, 2**31 - 1).astype(np.int32)
    same(launch(x, dst=np.zeros(64, np.int32)), np.r_[want, want])


add("traced.whole_f32 traced.whole_f64", "cvt.rzi.s32.f32; cvt.rzi.s32.f64", whole, check_whole)


def loads(dtype: str) -> Any:
    load, size, is_float = traced.load_captured(dtype, "float32"), ITEMSIZE[dtype], dtype not in traced.INTEGERS

    def make() -> Any:
        def kernel(a):
            i = int32(cuda.threadIdx.x)
            value = load(uint64(a.src + uint64(size * i)))
            if is_float:
                memory.store_f32(uint64(a.dst + uint64(4 * i)), value)
            else:
                memory.store_b32(uint64(a.dst + uint64(4 * i)), value)
        return kernel
    return make


def check_loads(dtype: str) -> Any:
    def check(launch: Any) -> None:
        x = (100 * normal(32)).astype(numpy_dtype(dtype))
        kind: Any = np.int32 if dtype in traced.INTEGERS else np.float32
        raw: Array = x.view(np.int32) if x.nbytes % 4 == 0 else x
        same(launch(raw, dst=np.zeros(32, kind)), x.astype(kind))
    return check


for _dtype, _text in (("float32", "ld.global.nc.f32"), ("float16", "cvt.f32.f16"), ("bfloat16", "ld.global.nc.b16"),
                      ("int32", "ld.global.nc.b32"),
                      ("int64", "ld.global.nc.b32"), ("bool", "ld.global.nc.u8")):
    add("traced.load_captured", _text, loads(_dtype), check_loads(_dtype), name=f"traced.load_captured_{_dtype}")


def sums() -> Any:
    add_to = traced.add_to("float32")

    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        add_to(uint64(a.dst + uint64(4 * (lane & 1))), memory.load_f32(uint64(a.src + uint64(4 * lane))))
        traced.or_b32(uint64(a.dst + uint64(8)), int32(1 << lane))
    return kernel


def check_sums(launch: Any) -> None:
    x = np.arange(32, dtype=np.float32)
    same(launch(x, dst=np.zeros(3, np.float32)).view(np.int32), np.r_[np.float32([240, 256]).view(np.int32), np.int32(-1)])


add("traced.add_to traced.or_b32", "red.global.add.f32; red.global.or.b32", sums, check_sums)
def exact_sums() -> Any:
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        traced.add_to_b64(a.dst, uint64(int64(lane - 20)))
        traced.raise_b32(uint64(a.dst + uint64(8)), int32(lane ^ 5))
        memory.store_f64(uint64(a.dst + uint64(16)), float64(int64(traced.load_b64(a.src))))
        traced.raise_b32(uint64(a.dst + uint64(12)), traced.exponent_bits(float64(lane)))
    return kernel


def check_exact_sums(launch: Any) -> None:
    found = launch(np.full(32, -3, np.int64), dst=np.zeros(3, np.int64))
    total, last = np.int64([31 * 16 - 20 * 32]), np.float64([-3])
    same(found.view(np.int32), np.r_[total.view(np.int32), np.int32([31, 1023 + 4]), last.view(np.int32)])


add("traced.add_to_b64 traced.raise_b32 traced.load_b64 traced.exponent_bits",
    "red.global.add.u64; red.global.max.s32; ld.global.b64; bfe.u32", exact_sums, check_exact_sums)
add("traced.highest_bit", "bfind.u32", words(lambda i, x, n: traced.highest_bit(int32(i & x))),
    on_words(lambda x: [int(v).bit_length() - 1 for v in np.arange(32) & x]))
add("traced.lowest_bit", "brev.b32; bfind.shiftamt.u32", words(lambda i, x, n: traced.lowest_bit(int32(i & x))),
    on_words(lambda x: [(int(v) & -int(v)).bit_length() - 1 for v in np.arange(32) & x]))
add("traced.count_bits", "popc.b32", words(lambda i, x, n: traced.count_bits(x)),
    on_words(lambda x: [int(v).bit_count() for v in x.view(np.uint32)]))
