"""Probes of gpu/test_intrinsics.py: float32 operands that Hopper's kernel splits itself."""
from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint8, uint64

from fastattn.gpu.ptx import cp_async, mbarrier, memory, wgmma, wgmma_float
from fastattn.gpu.ptx.sync import fence_async, warp
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import Array, add, as_matrix, normal, same
from tests.tools.gpu.probes_parts import EXACT, hard, parts, rows_of_parts
from tests.tools.gpu.probes_tiles import BAR, PANEL, SHARED, begin, load_panels, save_at
from tests.tools.problems import NUMPY

COLUMNS, ROWS = 64, 16


def split_rows() -> Any:
    """The A operands of 16 rows of 64 columns, of which the last 6 do not exist, by one warp."""
    def kernel(a):
        base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
        lane = int32(cuda.threadIdx.x)
        for n in range(ROWS * COLUMNS // 4 // 32):
            i = int32(32 * n + lane)
            row, piece = int32(i >> 4), int32(i & 15)
            to = int32(base + row * 256 + ((piece ^ ((row & 3) << 1)) << 4))
            left = int32(min(max(a.n - 4 * piece, 0), 4))
            if row & 1 == 0:
                wgmma_float.copy16_if(to, uint64(a.src + uint64(16 * i)), int32(4 * left))
            else:
                for k in range(4):
                    wgmma_float.copy4_if(int32(to + 4 * k), uint64(a.src + uint64(16 * i + 4 * k)), int32(4 if k < left else 0))
        cp_async.wait_all()
        warp()
        row = f.lane_row(lane)
        for half in range(2):
            words = wgmma_float.load_parts(int32(base + row * 256 + (lane & 3) * 8 + 128 * half), int32((row & 3) * 32), 256)
            for k in range(24):
                memory.store_b32(uint64(a.dst + uint64(4 * (32 * (24 * half + k) + lane))), words[k])
    return kernel


def check_split_rows(launch: Any) -> None:
    x = hard(ROWS, COLUMNS)
    got = launch(x, x, dst=np.zeros((2, 2, 3, 4, 32), np.int32), n=58)
    x[:, 58:] = 0
    lane = np.arange(32)
    for half, step, register in np.ndindex(2, 2, 4):
        row, column = lane // 4 + 8 * (register % 2), 32 * half + 16 * step + 2 * (lane % 4) + 8 * (register // 2)
        for part, expected in enumerate(parts(x)):
            words = got[half, step, part, register]
            low, high = (words << 16).view(np.float32), (words & np.int32(-65536)).view(np.float32)
            same(low, expected[row, column].astype(np.float32))
            same(high, expected[row, column + 1].astype(np.float32))


add("wgmma_float.load_parts wgmma_float.copy16_if wgmma_float.copy4_if memory.emit_load_shared_pair",
    "cp.async.cg.shared.global; cp.async.ca.shared.global; ld.shared.v2.f32; prmt.b32", split_rows, check_split_rows,
    name="wgmma_float.load_parts", shared=ROWS * COLUMNS * 4 + 1024)


def split_lines() -> Any:
    """Panels of the parts of rows 0 to 3 and 16 to 19, of which the last two do not exist, by one warp."""
    def kernel(a):
        base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
        lane = int32(cuda.threadIdx.x)
        line, piece = int32(lane >> 3), int32(lane & 7)
        at, rows, columns = uint64(a.src + uint64(256 * line + 32 * piece)), int32(18 - line), int32(a.n - 8 * piece)
        x = wgmma_float.load_lines(at, int64(256), rows, columns, 0, 1)
        y = wgmma_float.load_lines(at, int64(256), rows, columns, 1, 1)
        wgmma_float.store_lines(x, int32(base + 128 * line + ((piece ^ line) << 4)), 4096, 0)
        wgmma_float.store_lines(y, int32(base + 128 * line + ((piece ^ line) << 4)), 4096, 1)
        warp()
        for part in range(3):
            for row in range(2):
                for k in range(4):
                    at = int32(part * 4096 + row * 2048 + 128 * k + 4 * lane)
                    memory.store_b32(uint64(a.dst + uint64(4 * (32 * (8 * part + 4 * row + k) + lane))), memory.load_shared_b32(base + at))
    return kernel


def check_split_lines(launch: Any) -> None:
    x = hard(20, COLUMNS)
    got = launch(x, x, dst=np.zeros((3, 8, 8, 8), NUMPY["bfloat16"]), n=60)
    x[:, 60:], x[18:] = 0, 0
    rows, places = np.indices((8, 8))
    for part, expected in enumerate(parts(x)):
        chunks = expected[[0, 1, 2, 3, 16, 17, 18, 19]].reshape(8, 8, 8)
        same(got[part][rows, places ^ (rows % 4)].astype(np.float32), chunks.astype(np.float32))


add("wgmma_float.load_lines wgmma_float.store_lines memory.emit_load16_if", "@p ld.global.v4.b32; st.shared.v4.b32", split_lines,
    check_split_lines, name="wgmma_float.load_lines", shared=3 * 4096 + 1024)


def product() -> Any:
    """A B^T of 64 x 64 float32, split in registers, and the parts of 64 x 64; and B A^T of the parts of both."""
    A = 6 * PANEL

    def kernel(a):
        base = begin(1)
        thread = int32(cuda.threadIdx.x)
        if thread == 0:
            mbarrier.arrive_expect(int32(base + BAR), int32(3 * PANEL))
            load_panels(a.map_a, base, 0, 3)
        line, piece = int32(thread >> 3), int32(thread & 7)
        at = uint64(a.other + uint64(256 * line + 32 * piece))
        x = wgmma_float.load_lines(at, int64(256), int32(64 - line), int32(64 - 8 * piece), 0, 4)
        wgmma_float.store_lines(x, int32(base + 3 * PANEL + 128 * line + ((piece ^ (line & 7)) << 4)), PANEL, 0)
        for n in range(8):
            i = int32(128 * n + thread)
            row, piece = int32(i >> 4), int32(i & 15)
            to = int32(base + A + row * 256 + ((piece ^ ((row & 3) << 1)) << 4))
            wgmma_float.copy16_if(to, uint64(a.other + uint64(16 * i)), int32(16))
        cp_async.wait_all()
        fence_async()
        cuda.syncthreads()
        mbarrier.wait(int32(base + BAR), int32(0))
        row, acc, first = int32((thread >> 5) * 16 + f.lane_row(int32(thread & 31))), f.zeros(32), int32(int32(thread >> 5) * 64)
        for half in range(2):
            q = wgmma_float.load_parts(int32(base + A + row * 256 + (thread & 3) * 8 + 128 * half), int32((row & 3) * 32), 256)
            wgmma.fence()
            one = wgmma_float.qk(f.zeros(32), q, wgmma.k_major(int32(base + 64 * half)), PANEL)
            wgmma.commit()
            acc = f.add(acc, wgmma.wait_all(one))
        save_at(a.dst, first, acc, 32)
        wgmma.fence()
        both = wgmma_float.kq_chunks(f.zeros(64), wgmma.k_major(base), wgmma.k_major(int32(base + 3 * PANEL)), 64, 0, 64, 64)
        wgmma.commit()
        save_at(a.dst, int32(first + 32), f.sum_parts(wgmma.wait_all(both), 2), 32)
    return kernel


def check_product(launch: Any) -> None:
    """A backward's S^T has the bits of the forward's S."""
    x: Array = normal(64, 64)
    y = normal(1, 64, 1, 64, seed=1)
    got = launch(rows_of_parts(y), x, dst=np.zeros((4, 64, 32), np.float32), maps=[("src", 64)])
    first, second = (np.concatenate([as_matrix(tile[n:n + 32]) for tile in got]) for n in (0, 32))
    np.testing.assert_allclose(first, x.astype(np.float64) @ y[0, :, 0].astype(np.float64).T, **EXACT)
    same(first, second.T)


add("wgmma_float.qk wgmma_float.kq_chunks fragments.sum_parts", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", product,
    check_product, name="wgmma_float.qk", threads=128, shared=SHARED)
