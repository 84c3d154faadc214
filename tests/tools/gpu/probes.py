"""Probes of gpu/test_intrinsics.py: scalars, shared words and fragments.

A probe is a kernel of one warp or a few, the instructions that must stand in its PTX, and a check that launches it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from numba import cuda, float32, int32, int64, uint8, uint32, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import arith, cp_async, memory, scalar, sync
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.tile import bits as b
from fastattn.gpu.tile import fragments as f
from fastattn.gpu.tile import stores
from fastattn.gpu.tile.dropout import philox
from fastattn.philox import keep_mask
from fastattn.problem import Dropout
from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]
C = 64                      # columns of the test fragments: 16 x C, COUNT registers a thread
COUNT = C // 2
BITS = C // 4               # of a word for one of the two rows
FIELDS = "src:l other:l dst:l map_a:l map_b:l map_c:l n:i"
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Probe:
    """`make()` gives the kernel; `check(launch)` runs it: launch(src, other, dst, n, maps) returns what the kernel made of dst."""

    covers: tuple[str, ...]
    text: tuple[str, ...]
    make: Callable[[], Any]
    check: Callable[[Callable[..., Array]], None]
    threads: int = 32
    shared: int = 0

    def source(self, name: str) -> compiler.Source:
        fields = tuple((field[:-2], field[-1]) for field in FIELDS.split())
        return compiler.Source(f"test {name}", lambda: (self.make(), self.shared), fields, self.threads)


PROBES: dict[str, Probe] = {}


def add(covers: str, text: str, make: Callable[[], Any], check: Callable[[Any], None], name: str = "", threads: int = 32,
        shared: int = 0) -> None:
    """`covers`: names, `text`: instructions separated by ';'."""
    words = tuple(covers.split())
    PROBES[name or words[0]] = Probe(words, tuple(t.strip() for t in text.split(";") if t.strip()), make, check, threads, shared)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- scalars
def inlined(function: Any) -> Any:
    """A lambda as something that kernels can call; intrinsics are that already."""
    return inline(function) if isinstance(function, FunctionType) else function


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


def square_less(product: Any) -> Any:
    """2**12 + 1 squared is 2**24 + 2**13 + 1: the last bit is lost where the product is rounded."""
    return lambda x: product(x, x) - float32(2**24 + 2**13)


for _name, _product in (("arith.product", arith.product), ("scalar.rounded_product", scalar.rounded_product("float32"))):
    add(_name, "mul.rn.f32", unary(square_less(_product)), check_unary(np.full(32, 2.0**12 + 1), lambda x: 0 * x, 0), name=_name)
add("arith.fma", "fma.rn.f32", unary(lambda x: arith.fma(x, x, float32(-(2**24 + 2**13)))),
    check_unary(np.full(32, 2.0**12 + 1), lambda x: 0 * x + 1, 0))
add("memory.load_f32 memory.store_f32", "ld.global.f32; st.global.f32", unary(lambda x: x),
    lambda launch: same(launch(normal(32), dst=normal(32)), normal(32)))


def same(a: Array, b: Array) -> None:
    np.testing.assert_array_equal(a, b)


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


# ---------------------------------------------------------------- fragments: 16 x C, one warp
_gather, _to_float = f.make_gather("float32"), f.make_unpack("float32", False)
LANE, REGISTER = np.arange(32)[None, :], np.arange(COUNT)[:, None]
ROW, COL = LANE // 4 + 8 * (REGISTER // 2 % 2), 2 * (LANE % 4) + 8 * (REGISTER // 4) + REGISTER % 2


def as_matrix(registers: Array) -> Array:
    """(registers, lanes) -> 16 x columns."""
    count = registers.shape[0]
    m = np.empty((16, 2 * count), registers.dtype)
    m[ROW[:count], COL[:count]] = registers
    return m


def first_elements() -> Any:
    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        lane = int32(thread & 31)
        at = uint64(a.dst + uint64(12 * thread))
        memory.store_b32(at, f.thread_row(thread, lane))
        memory.store_b32(uint64(at + uint64(4)), f.lane_row(lane))
        memory.store_b32(uint64(at + uint64(8)), f.thread_col(lane))
    return kernel


def check_first_elements(launch: Any) -> None:
    thread = np.arange(128)
    rows = thread % 32 // 4
    same(launch(dst=np.zeros((128, 3), np.int32)), np.stack([thread // 32 * 16 + rows, rows, thread % 4 * 2], 1).astype(np.int32))


add("fragments.thread_row fragments.lane_row fragments.thread_col", "", first_elements, check_first_elements, threads=128)


@inline
def load(pointer, lane):
    at = uint64(pointer + uint64(4 * (f.lane_row(lane) * C + f.thread_col(lane))))
    return _to_float(_gather(at, uint64(at + uint64(32 * C)), int64(4), int32(C), int32(C), COUNT))


@inline
def save(pointer, lane, acc):
    for k in range(COUNT):
        memory.store_f32(uint64(pointer + uint64(4 * (32 * k + lane))), acc[k])


def on_fragment(change: Any) -> Callable[[], Any]:
    """dst = change(acc, lane, row, col, n) of the fragment in src."""
    change = inlined(change)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            save(a.dst, lane, change(load(a.src, lane), lane, f.lane_row(lane), f.thread_col(lane), a.n))
        return kernel
    return make


def expect(function: Callable[[Array, Array, Array], Array], rtol: float = 0.0, n: int = 0) -> Callable[[Any], None]:
    """The result is function(matrix, rows, columns)."""
    def check(launch: Any) -> None:
        x, (rows, cols) = normal(16, C), np.indices((16, C))
        got = as_matrix(launch(x, dst=np.zeros((COUNT, 32), np.float32), n=n))
        np.testing.assert_allclose(got, function(x, rows, cols), rtol=rtol)
    return check


minus_inf = np.float32(-np.inf)
add("fragments.make_gather fragments.make_unpack", "ld.global.b32", on_fragment(lambda acc, lane, row, col, n: acc),
    expect(lambda x, r, c: x))
add("fragments.zeros", "st.global", on_fragment(lambda acc, lane, row, col, n: f.zeros(COUNT)), expect(lambda x, r, c: 0 * x))
add("fragments.own_zeros", "mov; st.global", on_fragment(lambda acc, lane, row, col, n: f.own_zeros(COUNT)), expect(lambda x, r, c: 0 * x))
add("fragments.zeros_packed", "st.global", on_fragment(lambda acc, lane, row, col, n: f.add(
    acc, _to_float(f.zeros_packed(COUNT)))), expect(lambda x, r, c: x))
add("fragments.scale_rows", "mul", on_fragment(lambda acc, lane, row, col, n: f.scale_rows(acc, float32(row), float32(row + 8))),
    expect(lambda x, r, c: x * r.astype(np.float32)))
add("fragments.scale_seen_rows", "selp", on_fragment(lambda acc, lane, row, col, n: f.scale_seen_rows(
    f.scale_rows(acc, float32(np.inf) if row == 0 else float32(1), float32(1)), float32(row), float32(row + 8))),
    expect(lambda x, r, c: x * r.astype(np.float32)))
add("fragments.exp2_minus arith.emit_fma", "fma.rn.f32; ex2.approx.ftz.f32",
    on_fragment(lambda acc, lane, row, col, n: f.exp2_minus(acc, float32(1.5), float32(1.25), float32(row), float32(row + 8))),
    expect(lambda x, r, c: np.exp2(np.where(r < 8, 1.5, 1.25) * x - r), rtol=2e-6))
add("fragments.keep_below", "selp",
    on_fragment(lambda acc, lane, row, col, n: f.keep_below(acc, int32(row + n - col), int32(row + 8 + n - col))),
    expect(lambda x, r, c: np.where(c < r + 20, x, minus_inf), n=20))
add("fragments.keep_interval", "selp", on_fragment(
    lambda acc, lane, row, col, n: f.keep_interval(acc, int32(row - col), int32(row + n - col), int32(row + 8 - col),
                                                   int32(row + 8 + n - col))),
    expect(lambda x, r, c: np.where((r <= c) & (c < r + 20), x, minus_inf), n=20))
add("fragments.add", "add",
    on_fragment(lambda acc, lane, row, col, n: f.add(acc, f.scale_rows(acc, float32(2), float32(4)))),
    expect(lambda x, r, c: x * np.where(r < 8, 3, 5), rtol=3e-7))
add("fragments.scale_add", "fma.rn.f32",
    on_fragment(lambda acc, lane, row, col, n: f.scale_add(acc, float32(8), f.scale_rows(acc, float32(2), float32(4)))),
    expect(lambda x, r, c: x * np.where(r < 8, 10, 12), rtol=3e-7))


def _position(x, row, col, factor):
    return x + factor * float32(int32(row * 100 + col))


_apply = f.elementwise(_position)
add("fragments.elementwise", "fma", on_fragment(lambda acc, lane, row, col, n: _apply(acc, row, col, (float32(0.5),))),
    expect(lambda x, r, c: x + 0.5 * (100 * r + c), rtol=1e-6))
_draw = f.make_draw(philox, COUNT, EARLY=True)
DROPOUT = Dropout(0.3, 0x0123_4567_89AB_CDEF, 5)
THRESHOLD = DROPOUT.threshold
add("fragments.drop fragments.make_draw sync.emit_opaque", "mul; mov.b32", on_fragment(lambda acc, lane, row, col, n: f.drop(
    acc, _draw(int32(2), int32(3), lane, n, uint32(5), uint32(0x89AB_CDEF), uint32(0x0123_4567)), uint32(THRESHOLD << 16))),
    expect(lambda x, r, c: np.where(keep_mask(DROPOUT, range(4), 7, 48, 48 + C)[3, 4][32:, 48:], x, 0), n=3 * 7 + 4))


def rows_of(function: Any) -> Callable[[], Any]:
    """dst[2 lane + r] = function(acc)[r]: something of each of the thread's two rows."""
    function = inlined(function)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            pair = function(load(a.src, lane))
            for r in range(2):
                memory.store_f32(uint64(a.dst + uint64(4 * (2 * lane + r))), pair[r])
        return kernel
    return make


def expect_rows(function: Callable[[Array], Array], rtol: float = 0.0) -> Callable[[Any], None]:
    """function((..., columns of a thread or all)) along the last axis."""
    def check(launch: Any) -> None:
        x = normal(16, C)
        got = launch(x, dst=np.zeros((32, 2), np.float32))
        own = x.reshape(2, 8, C // 8, 4, 2).transpose(1, 3, 0, 2, 4).reshape(8, 4, 2, C // 4)
        np.testing.assert_allclose(got.reshape(8, 4, 2), function(own), rtol=rtol, atol=1e-6 if rtol else 0)
    return check


add("fragments.row_max", "max.f32", rows_of(lambda acc: f.row_max(acc, float32(0.9), float32(2.5))),
    expect_rows(lambda own: np.maximum(own.max(-1), np.array([0.9, 2.5], np.float32))))
add("fragments.row_sum", "add", rows_of(f.row_sum), expect_rows(lambda own: own.sum(-1), rtol=1e-5))


def quads() -> Any:
    def kernel(a):
        at = uint64(4 * cuda.threadIdx.x)
        x = memory.load_f32(uint64(a.src + at))
        memory.store_f32(uint64(a.dst + at), f.quad_max(x))
        memory.store_f32(uint64(a.dst + at + uint64(128)), f.quad_sum(x))
    return kernel


def check_quads(launch: Any) -> None:
    x = normal(32).reshape(8, 4)
    got = launch(x, dst=np.zeros((2, 32), np.float32))
    same(got[0], x.max(1).repeat(4))
    np.testing.assert_allclose(got[1], x.sum(1).repeat(4), rtol=1e-6, atol=1e-6)


add("fragments.quad_max fragments.quad_sum sync.emit_shuffle_xor", "shfl.sync.bfly.b32", quads, check_quads)


def gathers(dtype: str, pairs: bool, squeeze: bool = False) -> Callable[[], Any]:
    """A 10 x 37 tile of an operand of `dtype` with rows of 44: what lies outside is not read and is 0. Squeezed: packed as it arrives."""
    size = NUMPY[dtype].itemsize
    gather, plain, to_float = f.make_gather_pairs() if pairs else None, f.make_gather(dtype), f.make_unpack(dtype, pairs or squeeze)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            at = uint64(a.other + uint64(size * (44 * row + col)))
            limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
            if pairs:
                tile = gather(at, uint64(at + uint64(8 * 44 * size)), limit0, limit1, COUNT)
            else:
                tile = plain(at, uint64(at + uint64(8 * 44 * size)), int64(size), limit0, limit1, COUNT)
            if squeeze:
                save(a.dst, lane, to_float(f.pairs_of(tile)))
            else:
                save(a.dst, lane, to_float(tile))
        return kernel
    return make


def bits() -> Any:
    """The same of a mask, a word of bits for each of a thread's rows: what is hidden or lies outside becomes -inf."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        row, col = f.lane_row(lane), f.thread_col(lane)
        at = uint64(a.other + uint64(44 * row + col))
        limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
        words = b.line_bits(at, int64(1), limit0, BITS), b.line_bits(uint64(at + uint64(8 * 44)), int64(1), limit1, BITS)
        save(a.dst, lane, b.keep_words(load(a.src, lane), words))
    return kernel


def transposed_bits() -> Any:
    """Four lines a lane, whose bytes are next to each other: of a mask (37, 128), columns by lines."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        words = b.lines_bits(uint64(a.src + uint64(4 * lane)), int64(128), a.n, BITS)
        memory.store_b32(uint64(a.dst + uint64(16 * lane)), words[0])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 4)), words[1])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 8)), words[2])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 12)), words[3])
    return kernel


def check_transposed_bits(launch: Any) -> None:
    x = np.random.default_rng(3).choice([0, 0, 1, 128, 255], (37, 128)).astype(np.uint8)
    columns = [8 * (k // 2) + k % 2 for k in range(BITS)]
    same(launch(x, dst=np.zeros(128, np.int32), n=37), sum((x[c] != 0).astype(np.int32) << k for k, c in enumerate(columns) if c < 37))


add("bits.lines_bits", "@p ld.global.b32", transposed_bits, check_transposed_bits)


def check_gathers(dtype: str, n: int) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(16, C)
        operand = normal(10, 44, seed=2) > 0 if dtype == "bool" else normal(10, 44, seed=2).astype(NUMPY[dtype])
        inside = np.zeros((16, C), operand.dtype)
        inside[:10, :n] = operand[:, :n]
        got = as_matrix(launch(x, operand, dst=np.zeros((COUNT, 32), np.float32), n=n))
        same(got, np.where(inside, x, minus_inf) if dtype == "bool" else inside.astype(np.float32))
    return check


for _dtype in ("float32", *HALVES):
    add("fragments.make_gather fragments.make_unpack memory.emit_load_if memory.halves memory.half_to_float",
        {"float32": "@p ld.global.b32"}.get(_dtype, "@p ld.global.u16"), gathers(_dtype, False),
        check_gathers(_dtype, 37), name=f"fragments.gather_{_dtype}")
for _dtype in HALVES:
    add("fragments.pairs_of", "@p ld.global.u16", gathers(_dtype, False, squeeze=True), check_gathers(_dtype, 37),
        name=f"fragments.squeeze_{_dtype}")
add("bits.line_bits bits.keep_words", "@p ld.global.u8", bits, check_gathers("bool", 37))
for _dtype in HALVES:
    add("fragments.make_gather_pairs fragments.make_unpack", "@p ld.global.b32", gathers(_dtype, True), check_gathers(_dtype, 38),
        name=f"fragments.gather_pairs_{_dtype}")


def whole_gathers(dtype: str) -> Callable[[], Any]:
    """As gathers, of rows of 72, eight columns a load."""
    gather, to_float = f.make_gather_whole(), f.make_unpack_whole(dtype)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            at = uint64(a.other + uint64(2 * (72 * row + col)))
            limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
            save(a.dst, lane, to_float(gather(at, uint64(at + uint64(8 * 72 * 2)), limit0, limit1, col, COUNT), col))
        return kernel
    return make


def check_whole_gathers(dtype: str, n: int) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        operand = normal(10, 72, seed=2).astype(NUMPY[dtype])
        inside = np.zeros((16, C), np.float32)
        inside[:10, :n] = operand[:, :n].astype(np.float32)
        same(as_matrix(launch(normal(16, C), operand, dst=np.zeros((COUNT, 32), np.float32), n=n)), inside)
    return check


for _dtype in HALVES:
    add("fragments.make_gather_whole fragments.make_unpack_whole fragments.transpose_quad memory.emit_load16_if",
        "@p ld.global.v4.b32; shfl.sync.bfly.b32", whole_gathers(_dtype), check_whole_gathers(_dtype, 40),
        name=f"fragments.gather_whole_{_dtype}")


def rows_out(dtype: str, pairs: bool) -> Callable[[], Any]:
    """The fragment, packed, into rows of PITCH elements: rows < 11 and, element by element, columns < n."""
    to_half = f.make_pack(dtype)
    PITCH = C + 8 if pairs else C + 2

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            packed = to_half(load(a.src, lane))
            at = uint64(a.dst + uint64(2 * (PITCH * row + col)))
            next_row = uint64(at + uint64(16 * PITCH))
            if pairs:
                stores.store_whole_rows(packed, at, next_row, int32(1), int32(row + 8 < 11), lane)
            else:
                stores.store_rows(packed, at, next_row, int32(1), int32(row + 8 < 11), int32(a.n - col))
        return kernel
    return make


def check_rows_out(dtype: str, pairs: bool) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, n = normal(16, C), 33
        pitch = C + 8 if pairs else C + 2
        expected = np.full((16, pitch), 7, NUMPY[dtype])
        width = C if pairs else n
        expected[:11, :width] = x[:11, :width].astype(NUMPY[dtype])
        same(launch(x, dst=np.full((16, pitch), 7, NUMPY[dtype]), n=n), expected)
    return check


for _dtype in HALVES:
    add("fragments.make_pack stores.store_rows memory.emit_store_halves_if arith.emit_pack_half",
        f"{arith.CONVERT[_dtype]}; @p st.global.b16", rows_out(_dtype, False),
        check_rows_out(_dtype, False), name=f"stores.store_rows_{_dtype}")
    add("fragments.make_pack stores.store_whole_rows memory.emit_store16_if",
        f"{arith.CONVERT[_dtype]}; shfl.sync.bfly.b32; @p st.global.v4.b32", rows_out(_dtype, True),
        check_rows_out(_dtype, True), name=f"stores.store_whole_rows_{_dtype}")
