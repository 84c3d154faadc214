"""The protocol of the Hopper forward of wide float32 heads, played without a GPU (tools/gpu/roles_float.py)."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu.spec import Call
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import view, whole
from tests.tools.gpu.roles_float import OUT, check, play


def dense(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dim: int, dim_v: int | None = None, **options: Any) -> Call:
    mask = options.pop("mask", None)
    q, k, v = (view(batch, n, h, d, dtype="float32", ptr=at << 36)
               for at, n, h, d in ((0, seqlen_q, heads, dim), (1, seqlen_k, heads_k, dim), (2, seqlen_k, heads_k, dim_v or dim)))
    problem, o = make_problem("attention", Operands(q, k, v, None, mask), packed=False, **options)
    return Call(problem, o, view(batch, seqlen_q, heads, dim_v or dim, dtype="float32", ptr=OUT), None)


CASES = {
    "512": dense(1, 100, 110, 2, 1, 512), "512 causal": dense(1, 130, 130, 1, 1, 512, causal=True),
    "320": dense(1, 70, 200, 1, 1, 320),
    "576": dense(1, 70, 50, 1, 1, 576, 512),
    "320 40": dense(1, 64, 70, 1, 1, 320, 40), "256 causal": dense(1, 200, 200, 2, 1, 256, causal=True),
    "192": dense(2, 129, 1, 1, 1, 192, 128),
    "128": dense(1, 150, 140, 2, 1, 128), "64 causal": dense(2, 130, 130, 1, 1, 64, causal=True), "96": dense(1, 64, 70, 2, 2, 96, 40),
    "window": dense(1, 200, 300, 1, 1, 160, window=(60, 10)), "dropout": dense(1, 64, 100, 1, 1, 512, dropout_p=0.1, seed=1),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_once(name: str) -> None:
    check(play(CASES[name], 0), whole(CASES[name].problem))


def test_one_consumer() -> None:
    call = CASES["128"]
    check(play(call, 1, stages=2, consumers=1), whole(call.problem))


def test_two_stages() -> None:
    call = CASES["512"]
    check(play(call, 1, stages=2, block_n=32), whole(call.problem))


@pytest.mark.parametrize("name", ["192", "320"])
def test_splits_store_maxima_and_sums(name: str) -> None:
    """Where a call's keys are split, behind the maxima of all rows: a play's maxima are 0 and its sums 1."""
    call = CASES[name]
    p, made = call.problem, play(call, 0, partial=True)
    check(made, whole(p))
    step = made.config.block_m
    rows = [row for first in range(0, p.seqlen_q, step) for row in range(first, first + step, 16)]
    assert made.lse == {(batch, head, row): (sums, sums) for sums in (0, 1) for head in range(p.num_heads) for row in rows
                        for batch in range(sums * p.batch, (sums + 1) * p.batch)}


@pytest.mark.parametrize("dim", [128, 320])
def test_packed_sequences(dim: int) -> None:
    lengths_q, lengths_k = [70, 0, 5], [60, 40, 100]
    cu = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    q, k = view(int(cu[0][-1]) + 7, 1, dim, dtype="float32"), view(int(cu[1][-1]), 1, dim, dtype="float32", ptr=1 << 36)
    v = view(*k.shape, dtype="float32", ptr=2 << 36)
    o = Operands(q, k, v, None, None, None, None, *(view(4, ptr=x.ctypes.data, dtype="int32") for x in cu))
    problem, o = make_problem("attention_varlen", o, packed=True, causal=True)
    call = Call(problem, o, view(*q.shape, dtype="float32", ptr=OUT), None)
    sequences = [(0, int(cu[0][i]), lengths_q[i], int(cu[1][i]), lengths_k[i]) for i in range(3)]
    check(play(call, 0), [*sequences, (0, int(cu[0][-1]), 7, 0, 0)])


@pytest.mark.parametrize(("dim", "causal"), [(128, False), (320, True)])
def test_blocks_outside_a_boolean_mask(dim: int, causal: bool) -> None:
    """A tile visits the blocks from the first to the last that the mask leaves any of its rows, or one if there is none."""
    draw, rows, keys = np.random.default_rng(dim), 150, 350
    mask = (draw.random((1, 1, 3, 5)) < 0.3).repeat(50, 2).repeat(70, 3)
    mask[:, :, :50] = False
    call = dense(1, rows, keys, 1, 1, dim, causal=causal, mask=view(1, 1, rows, keys, dtype="bool"))
    seen = mask[0, 0] & (np.tri(rows, keys, keys - rows, dtype=bool) if causal else True)
    made = play(call, 0, mask=mask)
    for address, blocks in made.rows.items():
        row, block_n = (address - OUT) // 4 // dim, made.config.block_n
        if row % 64 == 0 and (address - OUT) // 4 % dim == 0:
            visited = sorted(block.row // block_n for block in blocks)
            attended = np.flatnonzero(np.add.reduceat(seen[row:row + 64].any(axis=0), np.arange(0, keys, block_n)))
            assert visited == list(range(visited[0], visited[-1] + 1)) and set(attended) <= set(visited)
            assert len(attended) or len(visited) <= 2


MUTANTS = {
    "a slot filled while it is read": ("            ring.wait_empty(base, stage, int32(phase ^ 1))\n            wgmma",
                                       "            wgmma"),
    "a slot not filled by all": ("            barrier(int32(FILLED), int32(WARPGROUP))\n", ""),
    "K not waited for": ("                ring.wait_full(base, stage, phase)\n                acc_s = chunk(base, acc_s, stage, own, half)",
                         "                acc_s = chunk(base, acc_s, stage, own, half)"),
    "V not waited for": ("            ring.wait_full(base, stage, phase)\n            clear_tail", "            clear_tail"),
    "K released early": ("            if SHARED:\n                half = own_warpgroup()",
                         "            ring.release(base, stage, lane)\n            if SHARED:\n                half = own_warpgroup()"),
    "the other's panel passed unseen": ("        ring.wait_full(base, stage, phase)\n        ring.release(base, stage, lane)\n\n",
                                        "        ring.release(base, stage, lane)\n\n"),
    "the other's half not waited for": ("            barrier(int32(BOTH), int32(THREADS))\n", ""),
    "the own half overwritten": ("            barrier(int32(TAKEN + w), int32(THREADS))", "            w"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant: str) -> None:
    """The play finds a fault in the protocol in some order."""
    for seed in range(8):
        try:
            play(CASES["128" if mutant.startswith("a slot") else "512"], seed, MUTANTS[mutant], stages=2)
        except (AssertionError, KeyError):
            return
    pytest.fail("no play found it")
