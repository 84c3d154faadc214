"""The protocol of the Hopper forward, played without a GPU in random orders (tools/gpu/roles.py).

Every block of keys that a row attends to enters its output exactly once, no role waits for ever, and none touches a buffer that another
owns.
"""
from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays.view import ITEMSIZE
from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import forward as forward_sm90
from fastattn.gpu.sm90 import launch as launch_sm90
from fastattn.gpu.sm90.config import ForwardSm90Config, slice_dim
from fastattn.gpu.sm90.config import choose_forward as tiling
from fastattn.gpu.spec import Call, make_spec
from fastattn.masks import row_bounds
from fastattn.problem import Operands, Problem, make_problem
from tests.tools.gpu.calls import Sequence, view, whole, with_bounds
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import Play, edited, playing

OUT = 1 << 40


def dense(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dim: int, dtype: str = "float16", bias: bool = False,
          mask: Any = None, **options: Any) -> Call:
    q, k = view(batch, seqlen_q, heads, dim, dtype=dtype), view(batch, seqlen_k, heads_k, dim, dtype=dtype)
    given = view(batch, heads, seqlen_q, seqlen_k, dtype=dtype) if bias else None
    problem, o = make_problem("attention", Operands(q, k, k, given, mask), packed=False, **options)
    return Call(problem, o, view(batch, seqlen_q, heads, dim, dtype=dtype, ptr=OUT), None)


def play(call: Call, seed: int, change: Any = None, mask: Any = None, **tuning: Any) -> Play:
    """A launch of two blocks; `change` edits the kernel's text first. mask: the elements of the call's mask."""
    spec = launch_sm90.with_bias_tiles(make_spec(call.problem, call.operands, False), call.operands.bias, 64)
    config: ForwardSm90Config = replace(tiling(spec, call.problem.seqlen_k), **tuning)
    boxes = {"q": config.block_m, "k": config.block_n, "v": config.block_n, "bias": config.block_m}
    made, memory = Play(config, spec.head_dim_v, (0, 1), seed, config.consumers, boxes, spec.parts), Memory()
    arguments = launch_sm90.forward_program(spec, config).arguments
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k):
        memory.allow(x)
    if mask is not None:
        call = with_bounds(call, mask, config.block_n, memory)
    with playing(made, memory) as machine, packed.table(call, config.block_m, machine.launcher(), 0) as table:
        kernel, _ = edited(forward_sm90.make_forward, change)(spec, config)
        own = "q", "k", "v", "out", 4, table, packed.most_tiles(call, config.block_m), packed.head_group(call), *["bias"] * spec.bias_tiles
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    assert not any(made.counters.values()), "the counter is not as it was found"
    return made


def check(made: Play, p: Problem, sequences: list[Sequence]) -> None:
    """Every 64 rows are stored once and have attended to all their keys."""
    block_n, columns, stored = made.config.block_n, range(0, 64 * made.panels_v, 64), dict(made.stored)
    slices = range(0, p.head_dim_v, slice_dim(p.head_dim_v, made.config.slices))
    at = {(address - OUT) // ITEMSIZE[p.dtype]: keys for address, keys in made.rows.items()}
    from_registers = {(*divmod(n // p.head_dim_v, p.num_heads), n % p.head_dim_v): keys for n, keys in at.items()}
    for (plane, q_start, seqlen_q, k_start, seqlen_k), head in itertools.product(sequences, range(p.num_heads)):
        for first in range(0, seqlen_q, 64):
            last = min(first + 64, seqlen_q)
            found = [stored.pop((q_start + first, head, plane, column), None) for column in columns]
            pieces = [from_registers.pop((plane * p.seqlen_q + q_start + row, head, column), None)
                      for row in range(first, last, 16) for column in slices]
            assert None not in pieces or not any(pieces), f"rows {first} to {last} of head {head} are stored in part"
            found += pieces
            keys = set(found) - {None}
            assert len(keys) == 1, f"rows {first} to {last} of head {head} are not stored, or differently"
            blocks = keys.pop() or ()
            assert len(set(blocks)) == len(blocks) and all(at.head == head // p.group and at.batch == plane for at in blocks)
            bounds = [row_bounds(row, seqlen_q, seqlen_k, p.mask.left, p.mask.right, p.mask.top_left) for row in range(first, last)]
            attended = {n for lo, hi in bounds for n in range(lo // block_n, -(-hi // block_n)) if lo < hi}
            assert attended <= {(at.row - k_start) / block_n for at in blocks}
            assert len(blocks) <= max(len(attended), 1) + made.config.block_m // block_n + 1, "blocks that no row of the tile attends"
    assert not from_registers
    assert all(row >= p.seqlen_q and not p.packed for row, _, _, _ in stored)     # outside the tensor, where TMA drops them


CASES = {
    "64": dense(2, 300, 300, 2, 1, 64), "64 causal": dense(1, 390, 390, 4, 2, 64, causal=True),
    "64 few keys": dense(2, 130, 70, 2, 2, 64, causal=True), "128": dense(1, 257, 400, 2, 2, 128),
    "128 causal": dense(1, 400, 400, 3, 1, 128, causal=True), "128 window": dense(1, 600, 600, 1, 1, 128, window=(100, 30)),
    "128 one key": dense(2, 129, 1, 2, 1, 128), "192": dense(1, 200, 250, 2, 1, 192), "256": dense(1, 300, 300, 2, 1, 256),
    "256 causal": dense(1, 400, 400, 2, 1, 256, causal=True), "256 more queries": dense(1, 400, 100, 1, 1, 256, causal=True),
    "512": dense(1, 130, 150, 2, 1, 512), "320 causal": dense(1, 200, 200, 2, 1, 320, causal=True), "576": dense(1, 70, 100, 1, 1, 576),
    "no keys": dense(1, 100, 0, 2, 2, 128), "dropout": dense(1, 200, 300, 2, 1, 128, dropout_p=0.1, seed=1),
    "softcap": dense(1, 200, 300, 2, 1, 64, softcap=5.0, causal=True),
    "bias": dense(2, 200, 304, 2, 1, 64, bias=True), "bias causal": dense(1, 400, 400, 2, 1, 32, bias=True, causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_once(name: str) -> None:
    for seed in range(3):
        check(play(CASES[name], seed), CASES[name].problem, whole(CASES[name].problem))


@pytest.mark.parametrize("tuning", [{"stages": 4, "block_n": 32}, {"stages": 1, "block_n": 64}, {"out_panels": 0}, {"turns": False},
                                    {"optimistic": False}, {"block_m": 64, "turns": False},
                                    {"block_m": 64, "turns": False, "blocks_per_sm": 2},
                                    {"block_n": 64, "optimistic": False, "blocks_per_sm": 2}], ids=str)
def test_other_tilings(tuning: dict[str, Any]) -> None:
    call = CASES["128 causal"]
    for seed in range(2):
        check(play(call, seed, **tuning), call.problem, whole(call.problem))


@pytest.mark.parametrize(("dim", "causal", "tuning"), [
    (64, False, {}), (64, True, {}), (128, True, {}), (256, True, {}), (512, True, {}),
    (64, True, {"block_m": 64, "block_n": 64, "turns": False, "blocks_per_sm": 3})])
def test_packed_sequences(dim: int, causal: bool, tuning: dict[str, Any]) -> None:
    lengths_q, lengths_k = [130, 0, 64, 200, 5], [130, 40, 0, 90, 300]
    cu = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    q, k = view(int(cu[0][-1]) + 70, 2, dim), view(int(cu[1][-1]), 1, dim)      # 70 rows of no sequence
    o = Operands(q, k, k, None, None, None, None, *(view(6, ptr=x.ctypes.data, dtype="int32") for x in cu))
    problem, o = make_problem("attention_varlen", o, packed=True, causal=causal)
    call = Call(problem, o, view(*q.shape, ptr=OUT), None)
    sequences = [(0, int(cu[0][i]), lengths_q[i], int(cu[1][i]), lengths_k[i]) for i in range(5)]
    for seed in range(2):
        check(play(call, seed, **tuning), problem, [*sequences, (0, int(cu[0][-1]), 70, 0, 0)])


@pytest.mark.parametrize(("dim", "causal"), [(64, False), (128, True), (256, False)])
def test_blocks_outside_a_boolean_mask(dim: int, causal: bool) -> None:
    """A tile visits the blocks from the first to the last that the mask leaves any of its rows, or one if there is none."""
    draw, rows, keys = np.random.default_rng(dim), 400, 700
    mask = (draw.random((1, 2, 8, 10)) < 0.15).repeat(50, 2).repeat(70, 3)
    mask[:, 1, :200] = False
    call = dense(1, rows, keys, 2, 1, dim, causal=causal, mask=view(1, 2, rows, keys, dtype="bool"))
    seen = mask[0] & (np.tri(rows, keys, keys - rows, dtype=bool) if causal else True)
    for seed in range(2):
        made = play(call, seed, mask=mask)
        block_m, block_n = made.config.block_m, made.config.block_n
        by_tma = {(row, head): blocks for (row, head, _, _), blocks in made.stored.items()}
        by_registers = {divmod((address - OUT) // ITEMSIZE["float16"] // dim, 2): blocks for address, blocks in made.rows.items()}
        stored = by_tma | {(row, head): blocks for (row, head), blocks in by_registers.items() if row % 64 == 0}
        visited = {at: sorted(block.row // block_n for block in blocks or ()) for at, blocks in stored.items()}
        assert {(row, head) for row, head in visited if row < rows} == set(itertools.product(range(0, rows, 64), range(2)))
        for (row, head), blocks in visited.items():
            first = row // block_m * block_m
            needed = np.flatnonzero(np.add.reduceat(mask[0, head, first:first + block_m].any(axis=0), np.arange(0, keys, block_n)))
            attended = np.flatnonzero(np.add.reduceat(seen[head, row:row + 64].any(axis=0), np.arange(0, keys, block_n)))
            assert blocks == list(range(blocks[0], blocks[-1] + 1)) and set(attended) <= set(blocks)
            assert (needed[0] <= blocks[0] and blocks[-1] <= needed[-1]) if len(needed) else len(blocks) == 1


MUTANTS = {
    "K not waited for": ("        k_ring.wait_full(base, stage, phase)\n        acc_s = issue_first", "        acc_s = issue_first"),
    "Q not waited for": ("        q_ring.wait_full_nth(base, i)\n", ""),
    "V not waited for": ("        v_ring.wait_full(base, before, parity)\n", ""),
    "K released early": ("            acc_s = wgmma.wait_all_but_one(acc_s)\n",
                         "            release_k(base, stage, n_block, after, tile.n_min, lane)\n"
                         "            acc_s = wgmma.wait_all_but_one(acc_s)\n"),
    "bias released early": ("                if not BIAS_TILES:\n                    release_k",
                            "                if True:\n                    release_k"),
    "the bias of other rows": ("int32(m_block * BLOCK_M), row, head, keys)", "int32(0), row, head, keys)"),
    "Q overwritten": ("        q_ring.wait_empty_nth(base, i)\n", ""),
    "Q never released": ("            if (after < 0) if SEEN else (n_block == n_min):\n                q_ring.arrive_empty(base, 0)\n", ""),
    "turn kept": ("        product = mma_o(acc_o, p, base, w, before)\n        wgmma.commit()\n        pass_turn(w)\n",
                  "        product = mma_o(acc_o, p, base, w, before)\n        wgmma.commit()\n"),
    "wrong V": ("            acc_s, product = issue(base, w, acc_o, p, stage, before, parity)\n",
                "            acc_s, product = issue(base, w, acc_o, p, stage, stage, parity)\n"),
    "O not waited for": ("                acc_o = wgmma.wait_all(issue_last(base, w, acc_o, p, stage, phase))\n",
                         "                acc_o = issue_last(base, w, acc_o, p, stage, phase)\n"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    call = CASES["bias causal" if "bias" in mutant else "128 causal"]
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(play(call, seed, MUTANTS[mutant]), call.problem, whole(call.problem))
