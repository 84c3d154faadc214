"""Probes of gpu/test_intrinsics.py: mma.sync straight from global memory. They also run from their PTX, without a GPU."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint8, uint32, uint64

from fastattn.gpu.decode.config import page_division
from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import cluster, cp_async, direct, direct_parts, memory, scalar
from fastattn.gpu.ptx.mma import KIND
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import HALVES, Array, add, as_matrix, normal
from tests.tools.gpu.probes_parts import EXACT
from tests.tools.gpu.probes_tiles import save_at
from tests.tools.problems import NUMPY

DIM = 112                   # columns, of 128 that chunks would have
PITCH = 4 * 128 + 16
OUT = 2 * 16 * 16           # numbers before O: S twice


def products(dtype: str, KEYS: int) -> Callable[[], Any]:
    """S = Q K^T and O = S V of 16 queries and KEYS keys, of which there are n; S with Q in registers and in shared memory."""
    FLOAT = dtype == "float32"
    CHUNK, COUNT = (4, KEYS // 2) if FLOAT else (8, KEYS // 2)
    CHUNKS, CHUNKS_V, ROW = 32 // CHUNK, 16 // CHUNK, DIM * (4 if FLOAT else 2)
    WHOLE, WHOLE_V = DIM // (4 * CHUNK), DIM // (8 * CHUNK)
    load_rows, load_columns = direct.make_loads(KEYS == 16)
    if FLOAT:
        keep_q, kept_qk, pv = direct_parts.keep_q, direct_parts.qk, direct_parts.pv
    else:
        (qk, pv), (keep_q, kept_qk) = direct.make_products(dtype), direct.make_kept(dtype)
    to_half, read, store_output = f.make_pack(dtype), scalar.load_shared("float32", 1), direct.make_store_output(16 // CHUNK)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c, last = int32(lane >> 2), int32(lane & 3), int32(a.n - 1)
            base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
            chunk, left, left_v = uint64(16 * c), int32(DIM // CHUNK - c), int32(DIM // CHUNK - g)
            q0 = load_rows(uint64(a.src + chunk), int64(ROW), g, int32(15), 8, CHUNKS, left, WHOLE, int32(0))
            q1 = load_rows(uint64(a.src + chunk), int64(ROW), int32(g + 8), int32(15), 8, CHUNKS, left, WHOLE, int32(0))
            k = load_rows(uint64(a.other + chunk), int64(ROW), g, last, KEYS, CHUNKS, left, WHOLE, int32(0))
            v = load_columns(uint64(a.other + uint64(KEYS * ROW + 16 * g)), int64(ROW), int32(2 * c), last, KEYS, CHUNKS_V, left_v,
                             WHOLE_V, int32(0))
            keep_q(int32(base + 16 * lane), q0, q1)
            acc_s = kept_qk(f.zeros(COUNT), int32(base + 16 * lane), k)
            save_at(a.dst, 0, acc_s, COUNT)
            if not FLOAT:
                save_at(a.dst, COUNT, qk(f.zeros(COUNT), q0, q1, k), COUNT)
            cuda.syncwarp()
            store_output(pv(f.zeros(64), to_half(acc_s), v), int32(base + g * PITCH + 8 * CHUNK * c), PITCH)
            cuda.syncwarp()
            for row in range(16):
                for part in range(4):
                    column = int32(32 * part + lane)
                    at = uint64(a.dst + uint64(4 * (OUT + 128 * row + column)))
                    memory.store_f32(at, read(int32(base + row * PITCH + 4 * column))[0])
        return kernel
    return make


def check_products(dtype: str, KEYS: int) -> Callable[[Any], None]:
    close: dict[str, Any] = EXACT if dtype == "float32" else {"rtol": 1e-5, "atol": 1e-4}

    def scores(registers: Array) -> Array:
        wide = np.zeros((8, 32), np.float32)
        wide[:KEYS // 2] = registers.reshape(-1, 32)
        return as_matrix(wide)[:, :KEYS]

    def check(launch: Any) -> None:
        q, k, v = (normal(16, DIM, seed=s).astype(NUMPY[dtype]) for s in (0, 1, 2))
        for n in (KEYS, KEYS - 3, 1):
            there = np.minimum(np.arange(KEYS), n - 1)      # the last row where there is none
            got = launch(q, np.stack([k[:KEYS], v[:KEYS]]), dst=np.zeros(OUT + 16 * 128, np.float32), n=n)
            s = scores(got[:16 * KEYS])
            if dtype != "float32":
                np.testing.assert_array_equal(s, scores(got[16 * KEYS:32 * KEYS]))
            np.testing.assert_allclose(s, q.astype(np.float64) @ k[there].astype(np.float64).T, **close)
            p, o = s.astype(NUMPY[dtype]).astype(np.float64), got[OUT:].reshape(16, 128)
            np.testing.assert_allclose(o[:, :DIM], p @ v[there].astype(np.float64), rtol=1e-5, atol=1e-4 if dtype == "float32" else 1e-3)
            assert (o[:, DIM:] == 0).all()
    return check


for KEYS in (8, 16):
    depth, hint = f"m16n8k{KEYS}", ".L1::no_allocate" * (KEYS == 16)
    for dtype in HALVES:
        add("direct.make_loads direct.keys_of direct.make_products direct.make_kept direct.kept_operands direct.make_store_output "
            "direct.store_operand direct.load_operand mma.multiply",
            f"ld.global.nc{hint}.v4.b32; prmt.b32; mma.sync.aligned.{depth}.row.col.f32.{KIND[dtype]}; st.shared.v4.b32",
            products(dtype, KEYS), check_products(dtype, KEYS), name=f"direct.make_products {dtype} {KEYS}", shared=16 * PITCH + 16)
    add("direct_parts.keep_q direct_parts.qk direct_parts.pv", f"mma.sync.aligned.{depth}.row.col.f32.bf16.bf16; ld.shared.v4.b32",
        products("float32", KEYS), check_products("float32", KEYS), name=f"direct_parts {KEYS}", shared=32 * 512 * 3 // 2 + 16)


RING = 8192                 # bytes of 16 rows of 128 16-bit columns, twice


def copied(parts: int) -> Callable[[], Any]:
    """Rows and columns by way of shared memory: the words that loads give. V is waited for after K, as a group of its own. Lanes copy each
    part themselves."""
    (copy_rows, take_rows), (copy_columns, take_columns) = direct.make_copies()
    load_rows, load_columns = direct.make_loads(True)
    k_there, v_there = cp_async.wait_group(1), cp_async.wait_group(0)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c, last = int32(lane >> 2), int32(lane & 3), int32(a.n - 1)
            ring = int32(((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16) + 16 * lane)
            chunk, chunk_v = uint64(a.src + uint64(16 * c)), uint64(a.src + uint64(16 * g))
            left, left_v = int32(DIM // 8 - c), int32(DIM // 8 - g)
            for part in range(parts):
                copy_rows(ring, chunk, int64(2 * DIM), g, last, 16, 4, left, 3, int32(0), int32(part), parts)
            cp_async.commit()
            for part in range(parts):
                copy_columns(int32(ring + 4096), chunk_v, int64(2 * DIM), int32(2 * c), last, 16, 2, left_v, 1, int32(0), int32(part),
                             parts)
            cp_async.commit()
            k_there()
            save_words(a.dst, 0, take_rows(ring, 16, 4), 32)
            v_there()
            save_words(a.dst, 32, take_columns(int32(ring + 4096), 16, 2), 32)
            save_words(a.dst, 64, load_rows(chunk, int64(2 * DIM), g, last, 16, 4, left, 3, int32(0)), 32)
            save_words(a.dst, 96, load_columns(chunk_v, int64(2 * DIM), int32(2 * c), last, 16, 2, left_v, 1, int32(0)), 32)
        return kernel
    return make


@inline
def save_words(dst, first, words, count):
    """Word k of a lane to row first + k, a column for each lane."""
    at = uint64(dst + uint64(4 * (32 * first + int32(cuda.threadIdx.x))))
    for k in range(count):
        memory.store_b32(uint64(at + uint64(128 * k)), words[k])


def pages() -> Any:
    """A lane's row in pages of five rows of 48 bytes: its address."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        found = direct.Pages(a.other, int64(4), int64(1000), int32(6), int32(5), uint32(PAGE_MAGIC), uint32(PAGE_SHIFT))
        at = direct.row_in_page(a.src, int64(48), lane, found)
        memory.store_b32(uint64(a.dst + uint64(4 * lane)), int32(at - a.src))
    return kernel


PAGE_MAGIC, PAGE_SHIFT = page_division(5)


def check_pages(launch: Any) -> None:
    table, row = np.array([3, 0, 5, -1, 2, 99, 1], np.int32), np.arange(32)
    there = np.where((table < 0) | (table > 6), 6, table)
    got = launch(np.zeros(4, np.int32), table, dst=np.zeros(32, np.int32), n=0)
    np.testing.assert_array_equal(got, there[row // 5] * 1000 + row % 5 * 48)


add("direct.row_in_page", "ld.global.nc.b32", lambda: pages(), check_pages)


def check_copied(launch: Any) -> None:
    for n in (16, 11, 1):
        got = launch(np.arange(8 * DIM, dtype=np.int32), np.zeros(4, np.int32), dst=np.full(128 * 32, -1, np.int32), n=n)
        assert (got[:64 * 32] == got[64 * 32:]).all() and (got != -1).any()


for parts in (1, 2):
    add("direct.make_copies cp_async.commit cp_async.wait_group",
        "cp.async.cg.shared.global; cp.async.commit_group; cp.async.wait_group 1; ld.shared.v4.b32",
        copied(parts), check_copied, name=f"direct.make_copies {parts}", shared=RING + 16)


def sent() -> Any:
    """Each lane sends six numbers to the place of the opposite lane. A block without a cluster is one of its own."""
    def kernel(a):
        lane, base = int32(cuda.threadIdx.x), int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        cluster.arrive()
        cluster.wait()
        to = cluster.address_in(int32(base + 32 * (31 - lane)), int32(0))
        at = uint64(a.src + uint64(24 * lane))
        cluster.store_four(to, memory.load_f32(at), memory.load_f32(uint64(at + uint64(4))),
                           memory.load_f32(uint64(at + uint64(8))), memory.load_f32(uint64(at + uint64(12))))
        cluster.store_two(int32(to + 16), memory.load_f32(uint64(at + uint64(16))), memory.load_f32(uint64(at + uint64(20))))
        cluster.arrive()
        cluster.wait()
        for k in range(6):
            memory.store_b32(uint64(a.dst + uint64(24 * lane + 4 * k)), memory.load_shared_b32(int32(base + 32 * lane + 4 * k)))
    return kernel


def check_sent(launch: Any) -> None:
    x = normal(32, 6)
    np.testing.assert_array_equal(launch(x, np.zeros(4, np.int32), dst=np.zeros((32, 6), np.float32), n=0), x[::-1])


add("cluster.arrive cluster.wait cluster.address_in cluster.store_four cluster.store_two",
    "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mapa.shared::cluster.u32; st.shared::cluster.v4.f32; "
    "st.shared::cluster.v2.f32", lambda: sent(), check_sent, name="direct cluster", shared=1024 + 16)
