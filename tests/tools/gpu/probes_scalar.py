"""Probes of gpu/test_intrinsics.py: scalars and words, in registers, in memory and shared."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, int32, uint8, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import arith, cp_async, memory, scalar, sync
from tests.tools.gpu.probes import Array, add, inlined, normal, same
from tests.tools.problems import NUMPY


def unary(function: Any) -> Callable[[], Any]:
    function = inlined(function)

    def make() -> Any:
        def kernel(a):
            at = uint64(4 * cuda.threadIdx.x)
            memory.store_f32(uint64(a.dst + at), function(memory.load_f32(uint64(a.src + at))))
        return kernel
    return make


def check_unary(x: Array, expected: Callable[[Array], Array], ulp: float, absolute: float = 0.0) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x32 = np.resize(x, 32).astype(np.float32)
        got, want = launch(x32, dst=np.zeros(32, np.float32)).astype(np.float64), expected(x32.astype(np.float64))
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        assert (np.abs(got - want)[finite] <= ulp * 2.0**-23 * np.abs(want[finite]) + absolute).all()
    return check


add("arith.exp2 arith.emit_exp2", "ex2.approx.ftz.f32", unary(arith.exp2),
    check_unary(np.r_[-np.inf, 0, 1, -1, np.linspace(-20, 20, 28)], np.exp2, 4))
add("arith.log2", "lg2.approx.ftz.f32", unary(arith.log2), check_unary(np.r_[1, 2, np.geomspace(1e-6, 1e9, 30)], np.log2, 4, 2.0**-22))
add("arith.reciprocal", "rcp.approx.ftz.f32", unary(arith.reciprocal),
    check_unary(np.r_[1, -3, np.geomspace(1e-9, 1e9, 30)], np.reciprocal, 2))
add("arith.quotient", "div.full.f32", unary(lambda x: arith.quotient(x, arith.fma(x, float32(0.5), float32(0)))),
    check_unary(np.r_[1, -3, 3e38, -3e38, np.geomspace(1e-30, 1e38, 28)], lambda x: 0 * x + 2, 4))


def square_less(product: Any) -> Any:
    """2**12 + 1 squared is 2**24 + 2**13 + 1: the last bit is lost where the product is rounded."""
    return lambda x: product(x, x) - float32(2**24 + 2**13)


for _name, _product in (("arith.product", arith.product), ("scalar.rounded_product", scalar.rounded_product("float32"))):
    add(_name, "mul.rn.f32", unary(square_less(_product)), check_unary(np.full(32, 2.0**12 + 1), lambda x: 0 * x, 0), name=_name)
add("arith.fma", "fma.rn.f32", unary(lambda x: arith.fma(x, x, float32(-(2**24 + 2**13)))),
    check_unary(np.full(32, 2.0**12 + 1), lambda x: 0 * x + 1, 0))
@inline
def turned(x):
    """A sum of two rounded products: the lost last bits of both. A fused one would keep one of them."""
    y = arith.turn((x, x), (x, -x), (x, x), (x, x))
    return y[0] - float32(2**25 + 2**14) + y[1]


add("arith.turn", "mul.rn.f32; add", unary(turned), check_unary(np.full(32, 2.0**12 + 1), lambda x: 0 * x, 0))


def copied(size: int) -> Callable[[], Any]:
    copy = memory.copy_bytes(size)

    def make() -> Any:
        def kernel(a):
            at = uint64(size * cuda.threadIdx.x)
            copy(uint64(a.dst + at), uint64(a.src + at))
        return kernel
    return make


for _size in (1, 2, 4, 8, 16):
    add("memory.copy_bytes", "ld.global; st.global", copied(_size), name=f"memory.copy_bytes_{_size}",
        check=lambda launch, n=_size: same(launch(np.arange(32 * n, dtype=np.uint8), dst=np.zeros(32 * n, np.uint8)),
                                           np.arange(32 * n, dtype=np.uint8)))
add("memory.load_f32 memory.store_f32", "ld.global.f32; st.global.f32", unary(lambda x: x),
    lambda launch: same(launch(normal(32), dst=normal(32)), normal(32)))


def words(function: Any) -> Callable[[], Any]:
    """dst[i] = function(i, src[i], n) on 32-bit integers."""
    function = inlined(function)

    def make() -> Any:
        def kernel(a):
            i = int32(cuda.threadIdx.x)
            at = uint64(4 * i)
            memory.store_b32(uint64(a.dst + at), int32(function(i, memory.load_b32(uint64(a.src + at)), a.n)))
        return kernel
    return make


def on_words(expected: Callable[[Array], Any], n: int = 0) -> Callable[[Any], None]:
    x = np.random.default_rng(1).integers(-2**31, 2**31, 32).astype(np.int32)
    return lambda launch: same(launch(x, dst=np.zeros(32, np.int32), n=n), np.broadcast_to(np.asarray(expected(x)).astype(np.int32), 32))


add("memory.load_b32 memory.store_b32", "ld.global.b32; st.global.b32", words(lambda i, x, n: x), on_words(lambda x: x))
add("sync.uniform", "shfl.sync.idx.b32", words(lambda i, x, n: sync.uniform(x)), on_words(lambda x: x[0]))
for _n, _any in ((17, 1), (32, 0)):
    add("sync.any_thread", "barrier.cta.red.or.pred",
        words(lambda i, x, n: sync.any_thread(int32(1), int32(32), int32(1) if i == n else int32(0))),
        on_words(lambda x, any_=_any: any_, _n), name=f"sync.any_thread_{_any}")
    add("sync.any_lane", "vote.sync.any.pred", words(lambda i, x, n: sync.any_lane(int32(1) if i == n else int32(0))),
        on_words(lambda x, any_=_any: any_, _n), name=f"sync.any_lane_{_any}")
add("sync.ballot", "vote.sync.ballot.b32", words(lambda i, x, n: sync.ballot(int32(x & 4))),
    on_words(lambda x: np.packbits(x & 4 != 0, bitorder="little").view(np.int32)[0]))
add("arith.shift_left", "shl.b32", words(lambda i, x, n: arith.shift_left(x, int32(3))), on_words(lambda x: x << 3))
add("sync.opaque", "mov.b32", words(lambda i, x, n: sync.opaque(x)), on_words(lambda x: x))
def early() -> Any:
    """Launched as any kernel: there is nothing to wait for, and no kernel that may start early."""
    def kernel(a):
        sync.wait_for_previous()
        sync.let_next_start()
        sync.take_turn()
        at = uint64(4 * cuda.threadIdx.x)
        memory.store_b32(uint64(a.dst + at), memory.load_b32(uint64(a.src + at)))
    return kernel


add("sync.wait_for_previous sync.let_next_start sync.take_turn", "griddepcontrol.wait; griddepcontrol.launch_dependents", early,
    on_words(lambda x: x))
add("sync.thread_index", "mov.u32; %tid.x", words(lambda i, x, n: sync.thread_index()), on_words(lambda x: np.arange(32)))


def make_max() -> Any:
    def kernel(a):
        at = uint64(4 * cuda.threadIdx.x)
        memory.store_f32(uint64(a.dst + at), arith.fmax(memory.load_f32(uint64(a.src + at)), memory.load_f32(uint64(a.other + at))))
    return kernel


def check_max(launch: Any) -> None:
    x, y = normal(32), normal(32, seed=1)
    x[0] = y[1] = np.nan
    x[2] = -np.inf
    same(launch(x, y, dst=np.zeros(32, np.float32)), np.fmax(x, y))


add("arith.fmax arith.emit_max", "max.f32", make_max, check_max)


def small_loads() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        memory.store_b32(uint64(a.dst + uint64(4 * i)), int32(memory.load_u8(uint64(a.src + uint64(i))) + 256 * memory.load_u16(
            uint64(a.other + uint64(2 * i)))))
        memory.store_b16(uint64(a.dst + uint64(128 + 2 * i)), memory.load_u16(uint64(a.other + uint64(2 * i))))
        memory.store_f64(uint64(a.dst + uint64(192 + 8 * i)), memory.load_f64(uint64(a.other + uint64(64 + 8 * i))))
    return kernel


def check_small_loads(launch: Any) -> None:
    b, h, d = np.arange(200, 232, dtype=np.uint8), np.arange(65000, 65032, dtype=np.uint16), np.arange(32) / 3
    got = launch(b, np.r_[h.view(np.uint8), d.view(np.uint8)], dst=np.zeros(448, np.uint8))
    same(got[:128].view(np.int32), b + 256 * h.astype(np.int32))
    same(got[128:192].view(np.uint16), h)
    same(got[192:].view(np.float64), d)


add("memory.load_u8 memory.load_u16 memory.store_b16 memory.load_f64 memory.store_f64",
    "ld.global.u8; ld.global.u16; st.global.b16; ld.global.f64; st.global.f64", small_loads, check_small_loads)


def guarded_load() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        at = uint64(4 * i)
        memory.store_b32(uint64(a.dst + at), memory.load_b32_if(uint64(a.src + at), int32(1) if i < a.n else int32(0)))
    return kernel


def check_guarded_load(launch: Any) -> None:
    x = np.arange(5, 37, dtype=np.int32)
    same(launch(x, dst=np.full(32, -1, np.int32), n=9), np.where(np.arange(32) < 9, x, 0))


add("memory.load_b32_if", "@p ld.global.b32", guarded_load, check_guarded_load)


def atomics() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        memory.store_b32(uint64(a.dst + uint64(8 + 4 * i)), memory.atomic_add_b32(a.dst, int32(3)))
        memory.fence_gpu()
        memory.store_b32(uint64(a.dst + uint64(136 + 4 * i)), memory.atomic_inc_wrap(uint64(a.dst + uint64(4)), int32(9)))
    return kernel


def check_atomics(launch: Any) -> None:
    got = launch(dst=np.zeros(66, np.int32))
    assert got[0] == 96 and got[1] == 32 % 10
    same(np.sort(got[2:34]), 3 * np.arange(32))
    same(np.sort(got[34:]), np.sort(np.arange(32) % 10))


add("memory.atomic_add_b32 memory.atomic_inc_wrap memory.fence_gpu", "atom.global.add.u32; atom.global.inc.u32; fence.acq_rel.gpu", atomics,
    check_atomics)


def shared_words() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        base = memory.shared_address(cuda.shared.array(0, uint8))
        memory.store_shared_zero16(int32(base + 16 * i))
        memory.store_shared_b32(int32(base + 16 * i + 4), memory.load_b32(uint64(a.src + uint64(4 * i))))
        sync.barrier(int32(1), int32(32))
        for k in range(4):
            memory.store_b32(uint64(a.dst + uint64(16 * i + 4 * k)), memory.load_shared_b32(int32(base + 16 * (31 - i) + 4 * k)))
    return kernel


def check_shared_words(launch: Any) -> None:
    x = np.arange(100, 132, dtype=np.int32)
    expected = np.zeros((32, 4), np.int32)
    expected[:, 1] = x[::-1]
    same(launch(x, dst=np.full(128, -1, np.int32)).reshape(32, 4), expected)


add("memory.shared_address memory.store_shared_zero16 memory.store_shared_b32 memory.load_shared_b32 sync.barrier",
    "cvta.to.shared.u64; st.shared.v4.b32; st.shared.b32; ld.shared.b32; bar.sync", shared_words, check_shared_words, shared=512)


def shared_long_words() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        base = memory.shared_address(cuda.shared.array(0, uint8))
        cp_async.store_shared_b64(int32(base + 8 * i), uint64(uint64(i) << uint64(33)))
        sync.barrier(int32(1), int32(32))
        word = cp_async.load_shared_b64(int32(base + 8 * (31 - i)))
        memory.store_b32(uint64(a.dst + uint64(4 * i)), int32(word >> uint64(32)))
    return kernel


add("cp_async.load_shared_b64 cp_async.store_shared_b64", "ld.shared.b64; st.shared.b64", shared_long_words,
    lambda launch: same(launch(dst=np.zeros(32, np.int32)), 2 * np.arange(32)[::-1]), shared=256)


def handover() -> Any:
    """Warps 1 to 3 write and go on, warp 0 waits for them; then registers move from one warpgroup to the other."""
    give, take = sync.decrease_registers(40), sync.increase_registers(200)

    def kernel(a):
        i = int32(cuda.threadIdx.x)
        base = memory.shared_address(cuda.shared.array(0, uint8))
        warpgroup = sync.uniform(int32(i >> 7))
        if warpgroup == 1:
            give()
            memory.store_shared_b32(int32(base + 4 * (i - 128)), int32(i * 7))
            sync.barrier_arrive(int32(2), int32(256))
        else:
            take()
            sync.barrier(int32(2), int32(256))
            sync.fence_async()
            memory.store_b32(uint64(a.dst + uint64(4 * i)), memory.load_shared_b32(int32(base + 4 * i)))
    return kernel


add("sync.barrier_arrive sync.fence_async sync.increase_registers sync.decrease_registers",
    "bar.arrive; fence.proxy.async.shared::cta; setmaxnreg.inc.sync.aligned.u32 200; setmaxnreg.dec.sync.aligned.u32 40", handover,
    lambda launch: same(launch(dst=np.zeros(128, np.int32)), 7 * np.arange(128, 256)), threads=256, shared=512)


def scalar_loads(dtype: str, compute: str) -> Callable[[], Any]:
    size, wide = NUMPY[dtype].itemsize, 4 if compute == "float32" else 8
    load, put_out = scalar.load_if(dtype, compute), scalar.store(compute, compute)

    def make() -> Any:
        def kernel(a):
            i = int32(cuda.threadIdx.x)
            put_out(uint64(a.dst + uint64(wide * i)), load(uint64(a.src + uint64(size * i)), int32(i < a.n)))
        return kernel
    return make


def check_scalar_loads(dtype: str, compute: str) -> Callable[[Any], None]:
    x = normal(32).astype(NUMPY[dtype])
    return lambda launch: same(launch(x, dst=np.ones(32, NUMPY[compute]), n=20), np.where(np.arange(32) < 20, x.astype(compute), 0))


for _dtype, _compute in (("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float32"),
                         ("float64", "float64"), ("float32", "float64"), ("float16", "float64")):
    add("scalar.load_if scalar.store", f"@p ld.global.{scalar._BITS[_dtype]}", scalar_loads(_dtype, _compute),
        check_scalar_loads(_dtype, _compute), name=f"scalar.load_if_{_dtype}_{_compute}")


def load_scalars(dtype: str) -> Callable[[], Any]:
    size, load, save = NUMPY[dtype].itemsize, memory.load_scalar(dtype), scalar.store(dtype, "float32") if dtype != "float64" else None

    def make() -> Any:
        def kernel(a):
            i = int32(cuda.threadIdx.x)
            x = load(uint64(a.src + uint64(size * i)))
            memory.store_f32(uint64(a.dst + uint64(4 * i)), x)
            if save is not None:
                save(uint64(a.other + uint64(size * i)), float32(x * float32(1.0)))
        return kernel
    return make


def check_load_scalars(dtype: str) -> Callable[[Any], None]:
    x = normal(32).astype(NUMPY[dtype])
    return lambda launch: same(launch(x, np.zeros(32, NUMPY[dtype]), dst=np.zeros(32, np.float32)), x.astype(np.float32))


for _dtype in NUMPY:
    add("memory.load_scalar memory.half_to_float scalar.store", "ld.global", load_scalars(_dtype), check_load_scalars(_dtype),
        name=f"memory.load_scalar_{_dtype}")


def scalar_shared(compute: str) -> Callable[[], Any]:
    size = 4 if compute == "float32" else 8
    put, one, four = scalar.store_shared(compute), scalar.load_shared(compute, 1), scalar.load_shared(compute, 2)
    load, save = scalar.load_if(compute, compute), scalar.store(compute, compute)

    def make() -> Any:
        def kernel(a):
            i = int32(cuda.threadIdx.x)
            base = memory.shared_address(cuda.shared.array(0, uint8))
            put(int32(base + size * i), load(uint64(a.src + uint64(size * i)), int32(1)))
            sync.barrier(int32(1), int32(32))
            pair = four(int32(base + size * 2 * (i // 2)))
            save(uint64(a.dst + uint64(size * i)), pair[0] + pair[1] + one(int32(base + size * (31 - i)))[0])
        return kernel
    return make


def check_scalar_shared(compute: str) -> Callable[[Any], None]:
    x = np.arange(32).astype(compute)
    pairs = x.reshape(16, 2).sum(1).repeat(2)
    return lambda launch: same(launch(x, dst=np.zeros(32, compute)), pairs + x[::-1])


for _compute in ("float32", "float64"):
    add("scalar.store_shared scalar.load_shared", "st.shared.f; ld.shared.f; ld.shared.v2.f", scalar_shared(_compute),
        check_scalar_shared(_compute), name=f"scalar.shared_{_compute}", shared=256)


def flags() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        memory.store_b32(uint64(a.dst + uint64(4 * i)), scalar.load_flag(uint64(a.src + uint64(i)), int32(i < 20)))
    return kernel


add("scalar.load_flag", "@p ld.global.u8", flags, lambda launch: same(
    launch(np.arange(1, 33, dtype=np.uint8), dst=np.full(32, 9, np.int32)), np.where(np.arange(32) < 20, np.arange(1, 33), 0)))
