"""The Hopper kernel over latent caches, played without a GPU in random orders with numbers (tools/gpu/roles_latent.py)."""
from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu.decode import launch as decode
from fastattn.gpu.decode.config import TILE
from fastattn.gpu.sm90 import caches, launch_latent
from fastattn.gpu.sm90 import latent as latent_module
from fastattn.gpu.sm90.config_latent import ROWS, LatentConfig
from fastattn.gpu.spec import Spec, make_spec
from fastattn.masks import row_bounds
from tests.tools.gpu.calls import view
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import edited, playing
from tests.tools.gpu.roles_latent import LatentPlay, rows_of
from tests.tools.gpu.roles_pages import OUT, Requests, requests

PART, PART_ROWS = 1 << 42, 1 << 43
SMALL = LatentConfig(overhead=1)
Array = np.ndarray[Any, Any]


def asked(lengths: list[int], rows: int | list[int], page_size: int | None = 64, heads: int = 20, **options: Any) -> Requests:
    return requests(lengths, rows, page_size, 576, heads=heads, head_dim_v=512, **options)


def play(given: Requests, seed: int, splits: int, config: LatentConfig, change: Any = None, plan: Array | None = None) -> LatentPlay:
    """A launch. change: a place of the kernel's text, and what stands there instead. plan: entries of decode/plan.py."""
    call = given.call
    spec, config = make_spec(call.problem, call.operands, False), launch_latent.tiling(call, config)
    if call.problem.cache is not None:
        spec = caches.spec_of(call, spec)
    eight = call.problem.eight_bit
    if eight is not None:
        spec = replace(spec, cache_dtype=call.operands.k.dtype, out_dtype=eight.out_dtype)
    spec, planes = replace(spec, planned=plan is not None), call.problem.num_heads_k * decode.units_of(call.problem, ROWS)
    if plan is not None:
        planes = len(plan)
    made, memory = LatentPlay(config, given, tuple(range(planes * splits)), seed), Memory()
    arguments, o = launch_latent.latent_program(spec, config).arguments, call.operands
    table = None if plan is None else view(*plan.shape, ptr=plan.ctypes.data, dtype="int32")
    cached = call.problem.cache is not None
    for x in (o.cu_seqlens_q, o.seqused_k, caches.pages_of(call) if cached else None, table):
        memory.allow(x)
    with playing(made, memory):
        kernel, _ = edited(latent_module.make_latent, change)(spec, config)
        own = ("k", PART, PART_ROWS, (planes if plan is None else 1) * ROWS, splits, call.problem.num_heads_k, 1,
               *launch_latent.lengths_of(call), *([table.ptr] if table else []),
               *(decode.scales_of(call, eight.factor) if eight else []), *(caches.values(call)[3:] if cached else []))
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    return made


class Results:
    """What a play has stored, to be taken once."""

    def __init__(self, made: LatentPlay, splits: int) -> None:
        p = made.asked.call.problem
        self.outputs, self.floats, self.scale, self.splits = dict(made.outputs), dict(made.floats), p.score.softmax_scale, splits
        self.lines = p.num_heads_k * decode.units_of(p, ROWS) * ROWS

    def columns(self, address: int, half: int) -> Array:
        return np.concatenate([self.outputs.pop(address), self.outputs.pop(address + half)], axis=1)

    def take(self, address: int, line: int) -> Array:
        """Eight rows: finished ones at the address, or parts from that line on, merged."""
        if address in self.outputs:
            return self.columns(address, 512)
        tops, totals, parts = [], [], []
        for n in range(self.splits):
            at = line + n * self.lines
            if PART + at * 2048 in self.outputs:
                parts.append(self.columns(PART + at * 2048, 1024))
                tops.append(rows_of(self.floats.pop(PART_ROWS + 8 * at)) * self.scale)
                totals.append(rows_of(self.floats.pop(PART_ROWS + 8 * at + 4)))
        weights = np.exp(np.maximum(np.array(tops), -1e30) - np.maximum(np.max(tops, axis=0), -1e29))
        total = (weights * totals).sum(axis=0)[:, None]
        return (weights[:, :, None] * parts).sum(axis=0) / np.where(total == 0, 1, total)


def exact(q: Array, keys: Array, ends: Array, scale: float) -> Array:
    s = np.where(np.arange(len(keys)) < ends[:, None], q @ keys.T * scale, -np.inf)
    e = np.exp(s - np.maximum(s.max(axis=1, initial=-1e29), -1e29)[:, None])
    total = e.sum(axis=1, keepdims=True)
    return e @ keys[:, :512] / np.where(total == 0, 1, total)


def check(made: LatentPlay, splits: int) -> None:
    """Every row of every request, and of none, is stored once: of one split finished and of several in parts."""
    given, results = made.asked, Results(made, splits)
    p, unit, start = given.call.problem, 0, 0
    none = [] if not p.packed else [((p.total_q or 0) - sum(given.rows), 0)]
    for request, (rows, length) in enumerate([*zip(given.rows, given.lengths, strict=True), *none]):
        unit = start * p.group // ROWS + request if p.packed else unit
        count = rows * p.group
        for first, head_k in itertools.product(range(0, count, 8), range(p.num_heads_k)):
            lines = [divmod(min(r, count - 1), p.group) for r in range(first, first + 8)]
            ends = np.array([row_bounds(i, rows, length, None, p.mask.right, False)[1] for i, _ in lines])
            keys = made.keys[request][:length, head_k] if length else np.zeros((0, 576))
            q = np.array([made.q[start + i, head_k * p.group + n] for i, n in lines])
            (i, n), plane = lines[0], (unit + first // ROWS) * p.num_heads_k + head_k
            found = results.take(OUT + ((start + i) * p.num_heads + head_k * p.group + n) * 1024, plane * ROWS + first % ROWS)
            inside = min(8, count - first)
            np.testing.assert_allclose(found[:inside], exact(q, keys, ends, p.score.softmax_scale)[:inside], rtol=1e-6, atol=1e-9)
        start, unit = start + rows, unit + -(-count // ROWS)
    assert not results.outputs and not results.floats, "results of no row"


def arrays() -> Requests:
    """A call over arrays, of which every batch entry has all keys."""
    given = asked([145, 145], 2, None, heads=40)
    p, o = given.call.problem, given.call.operands
    given.call = replace(given.call, problem=replace(p, cache=None), operands=replace(o, cache=None, seqused_k=None))
    given.lengths[:] = [150, 150]
    return given


CASES = {
    "arrays": (arrays, 2, SMALL),
    "one split": (lambda: asked([200, 64, 1], 1), 1, SMALL), "splits": (lambda: asked([300, 37, 0], 2, 16, heads=40), 3, SMALL),
    "pages of 256": (lambda: asked([257, 100], 1, 256, heads=128), 2, SMALL),
    "rows of the cache": (lambda: asked([150, 90], 2, None, causal=False), 1, SMALL),
    "by index": (lambda: asked([50, 190], 2, None, batch_idx=True), 2, SMALL),
    "packed": (lambda: asked([150, 37, 0, 129], [7, 0, 3, 1], 32, spare=2, stray=True), 2, SMALL),
    "key heads": (lambda: asked([130, 66], 2, heads=6, heads_k=2), 1, SMALL),
    "more rows than keys": (lambda: asked([3, 70], 9, heads=8), 1, SMALL),
    "8 bits": (lambda: asked([300, 37, 0], 2, cache_dtype="float8_e4m3fn"), 2, SMALL),
    "32 keys": (lambda: asked([200, 37], 2), 2, LatentConfig(block_n=32, stages=4, overhead=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    make, splits, config = CASES[name]
    check(play(make(), 0, splits, config), splits)


def test_planned_splits() -> None:
    """Two requests of two blocks of rows: one in two splits, the other in one. Results are at the lines of the plan's entries."""
    plan = np.array([[0, 0, 2, 2], [0, 1, 2, 2], [0, 1 << TILE, 2, 2], [0, (1 << TILE) + 1, 2, 2], [1, 0, 1, 2], [1, 1 << TILE, 1, 2],
                     [0, 0, 0, 0]], np.int32)
    given = asked([200, 70], 2, heads=40)
    made = play(given, 1, 1, SMALL, plan=plan)
    results, scale = Results(made, 2), given.call.problem.score.softmax_scale
    results.lines = ROWS
    for request, tile, entry in ((0, 0, 0), (0, 1, 2), (1, 0, 4), (1, 1, 5)):
        for first in range(0, ROWS if tile == 0 else 16, 8):
            lines = [divmod(ROWS * tile + r, 40) for r in range(first, first + 8)]
            keys = made.keys[request][:given.lengths[request], 0]
            q, ends = np.array([made.q[2 * request + i, n] for i, n in lines]), np.array([len(keys) - 1 + i for i, _ in lines])
            (i, n) = lines[0]
            found = results.take(OUT + ((2 * request + i) * 40 + n) * 1024, entry * ROWS + first)
            np.testing.assert_allclose(found, exact(q, keys, ends, scale), rtol=1e-6, atol=1e-9)
    assert not results.outputs and not results.floats


MUTANTS = {
    "a block that is not there": ("        low.wait_full(base, stage, phase)\n        wgmma.fence()\n        acc_s = more_qk",
                                  "        acc_s = more_qk"),
    "a slot in use": ("product = wgmma.wait_all_but_one(product)\n                low.release(base, low.use(before)[0], lane)",
                      "low.release(base, low.use(before)[0], lane)\n                product = wgmma.wait_all_but_one(product)"),
    "P in use": ("        taken.wait(base, int32((n & 1) ^ 1))\n", ""),
    "P that is not there": ("            ready.wait(base, int32(n & 1))\n            alpha0", "            alpha0"),
    "factors of another step": ("acc_o, p, n = rescale(product, alpha0, alpha1), to_half(acc_s)", "acc_o, p, n = product, to_half(acc_s)"),
    "values of another block": ("product = mma_low(base, acc_o, p, before)\n                hand_over",
                                "product = mma_low(base, acc_o, p, n)\n                hand_over"),
    "the tail not cleared": ("        if first + BLOCK_N > place.seqlen_k:", "        if first > place.seqlen_k:"),
    "a product in flight": ("                acc_s = wgmma.wait_all(acc_s)\n", ""),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    with pytest.raises((AssertionError, KeyError, TypeError)), np.errstate(all="ignore"):
        for seed in range(8):
            check(play(asked([200, 300], 1, 64, heads=8), seed, 1, SMALL, MUTANTS[mutant]), 1)


# ---------------------------------------------------------------- 8-bit keys
def test_8bit_keys_are_stored_where_tma_would() -> None:
    """All threads of the producers, one after the other: every 16 numbers of every key once, in their panel, swizzled; zeros behind the
    keys; no store before the slot is empty, none after it is said to be full."""
    from types import SimpleNamespace

    from fastattn.gpu.sm90 import latent_8bit
    from tests.tools.gpu.emulator import replaced
    low_at, high_at, k_row, page_bytes, keys = 1 << 20, 1 << 21, 576 + 64, 64 * 640, 100
    stored, log, lines = dict[int, Any](), list[Any](), set[int]()

    def ring(name: str) -> Any:
        return SimpleNamespace(use=lambda n: (n & 1, n >> 1 & 1),
                               wait_empty=lambda base, stage, phase: log.append((name, "empty", stage, phase)),
                               arrive_full=lambda base, stage: log.append((name, "full", stage)))

    def store(first: int, second: int, words: Any) -> None:
        for address, half in ((first, 0), (second, 1)):
            assert address not in stored, "stored twice"
            stored[address] = words and words + 8 * half
        log.append(("low" if first < high_at else "high", "store"))
    names = {"cuda": SimpleNamespace(syncwarp=lambda: None), "inline": lambda f: f, "int32": int, "int64": int, "uint64": int,
             "fence_async": lambda: None, "opaque": lambda x: x, "load_chunk_if": lambda address, inside: address if inside else 0,
             "make_store_chunk": lambda *_: store, "prefetch": lines.add,
             "make_page_of": lambda *_: (None, lambda pages, row: (7 - row // 64, 0)),
             "make_key_loads": lambda *_: (None, lambda *_: "pages")}
    a, place = (SimpleNamespace(k=5000, k_batch=page_bytes, k_row=k_row, k_head=576),
                SimpleNamespace(batch=0, seqlen_k=keys, first=0, end=99, head_k=0))
    spec = Spec("bfloat16", 576, 512, lengths=True, paged=True, cache_dtype="float8_e4m3fn")
    with replaced(("sm90.latent_8bit",), names):
        load = latent_8bit.make_load_8bit(spec, LatentConfig(), ring("low"), ring("high"), low_at, high_at)
        for thread in range(128):
            log.clear()
            load(a, 0, place, thread)
            whole = [("high", "empty", 0, 1), ("low", "empty", 0, 1), ("high", "empty", 1, 1), ("low", "empty", 1, 1)]
            assert [x for x in log if x[1] == "empty"] == whole
            assert [x for x in log if x[1] == "full"] == ([(*x[:1], "full", x[2]) for x in whole] if thread % 32 == 0 else [])
            parts = [list(group) for _, group in itertools.groupby(log, lambda x: x[0])]
            assert all(part[0][1] == "empty" and [x[1] for x in part[1:]].count("store") in (8, 10) for part in parts)
    for key, column in itertools.product(range(128), range(0, 576, 8)):
        block, row, first = key // 64, key % 64, column if column < 256 else column - 256
        slot = low_at + block * 4 * 8192 if column < 256 else high_at + block * 5 * 8192
        at = slot + first // 64 * 8192 + row * 128 + ((first % 64 // 8 ^ row & 7) << 4)
        assert stored.pop(at) == (a.k + (7 - block) * page_bytes + row * k_row + column if key < keys else 0)
    assert not stored
    second = a.k + 6 * page_bytes
    assert {x // 128 for x in lines} == {(second + row * k_row + byte) // 128 for row in range(35) for byte in range(0, 576, 128)}
