"""The protocol of the Hopper kernels for dK alone and dV alone, played without a GPU in random orders (tools/gpu/roles_wide.py)."""
from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import Grads
from fastattn.gpu.sm90.config import slice_dim
from fastattn.gpu.sm90.config_alone import choose_wide
from fastattn.gpu.spec import BackwardCall, make_backward_spec
from fastattn.masks import row_bounds
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import Sequence, view, whole
from tests.tools.gpu.roles_wide import WidePlay, play

DK, DV = 1 << 44, 1 << 45


def call_of(q: Any, k: Any, v: Any, lengths: tuple[Any, ...] = (), **options: Any) -> BackwardCall:
    problem, o = make_problem("attention_backward", Operands(q, k, v, None, None, None, None, *lengths), packed=bool(lengths), **options)
    lse, out = view(*problem.lse_shape, dtype="int32"), view(*problem.out_shape)
    return BackwardCall(problem, o, out, out, lse, None, Grads(q, replace(k, ptr=DK), replace(v, ptr=DV)), False)


def dense(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dim: int, dim_v: int = 0, **options: Any) -> BackwardCall:
    q, k, v = view(batch, seqlen_q, heads, dim), view(batch, seqlen_k, heads_k, dim), view(batch, seqlen_k, heads_k, dim_v or dim)
    return call_of(q, k, v, **options)


def check(call: BackwardCall, part: str, seed: int, sequences: list[Sequence], change: Any = None) -> None:
    """Each block of keys has used every block of queries that attends to it once."""
    spec, p = replace(make_backward_spec(call), deterministic=False), call.problem
    config = choose_wide(spec, part)
    made: list[WidePlay] = play(call, spec, config, seed, sequences, change)
    block_m, block_n, slices = config.block_m, config.block_n, config.slices
    pointer, kind, dim = (DK, "dK", p.head_dim) if part == "dk" else (DV, "dV", p.head_dim_v)
    results = {(at, key): (of, rows) for one in made for of, at, key, end, rows in one.results if key < end}
    for (plane, q_start, seqlen_q, k_start, seqlen_k), head_k in itertools.product(sequences, range(p.num_heads_k)):
        bounds = [row_bounds(row, seqlen_q, seqlen_k, p.mask.left, p.mask.right, p.mask.top_left) for row in range(seqlen_q)]
        for first in range(0, seqlen_k, block_n):
            end = min(first + block_n, seqlen_k)
            attended = sorted({row // block_m for row, (lo, hi) in enumerate(bounds) if lo < end and first < hi and lo < hi})
            blocks = tuple((q_start + m * block_m, head_k * p.group + n, plane) for n in range(p.group) for m in attended)
            for key, n in itertools.product(range(first, end, 16), range(slices)):
                at = pointer + 2 * (dim * ((plane * p.seqlen_k + k_start) * p.num_heads_k + head_k) + n * slice_dim(dim, slices))
                assert results.pop((at, key)) == (kind if blocks else "0", blocks)
    assert not results


CASES = {
    "160": dense(1, 200, 200, 2, 1, 160), "192 causal": dense(1, 200, 300, 2, 1, 192, causal=True), "256": dense(2, 130, 150, 1, 1, 256),
    "256 softcap": dense(1, 200, 130, 2, 1, 256, softcap=3.0), "320 causal": dense(1, 200, 130, 2, 1, 320, causal=True),
    "384": dense(1, 200, 100, 4, 2, 384), "512 window": dense(1, 150, 150, 2, 1, 512, window=(40, 10)),
    "512 and 256": dense(1, 150, 70, 2, 1, 512, 256), "576 and 512": dense(1, 100, 70, 2, 1, 576, 512),
    "no queries for some keys": dense(1, 64, 200, 1, 1, 384, causal="top_left"),
}


@pytest.mark.parametrize("part", ["dk", "dv"])
@pytest.mark.parametrize("name", CASES)
def test_every_block_once(name: str, part: str) -> None:
    for seed in range(2):
        check(CASES[name], part, seed, whole(CASES[name].problem))


class Packed:
    """A packed call. `group` query heads share a key head."""

    def __init__(self, dims: tuple[int, int], group: int, lengths_q: list[int], lengths_k: list[int], **options: Any) -> None:
        self.cu = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
        rows, keys = (int(cu[-1]) for cu in self.cu)
        cu = tuple(view(len(x), ptr=x.ctypes.data, dtype="int32") for x in self.cu)
        self.call = call_of(view(rows, group, dims[0]), view(keys, 1, dims[0]), view(keys, 1, dims[1]), cu, **options)
        self.sequences = [(0, int(self.cu[0][i]), n, int(self.cu[1][i]), lengths_k[i]) for i, n in enumerate(lengths_q)]


@pytest.mark.parametrize("part", ["dk", "dv"])
@pytest.mark.parametrize("dims", [(160, 160), (256, 256), (320, 320), (360, 360), (512, 256), (256, 576), (576, 512)], ids=str)
def test_packed_sequences(dims: tuple[int, int], part: str) -> None:
    """Last blocks that are not whole: alone, behind others, and of one head after the other."""
    for group, causal in ((3, False), (1, True)):
        given = Packed(dims, group, [130, 0, 64, 5], [130, 40, 0, 70], causal=causal)
        check(given.call, part, group, given.sequences)


def two_heads() -> Packed:
    """Two heads of one block, of 16 queries, and one stage of dO: that of the second has no slot until the step that needs its Q."""
    return Packed((360, 360), 2, [16], [29], causal=True)


def test_one_block_of_each_head() -> None:
    given = two_heads()
    for seed in range(5):
        check(given.call, "dv", seed, given.sequences)


MUTANTS = {
    "the tail of Q waits for that of dO": ("    APART = PACKED and not DK and DO_STAGES == 1\n", "    APART = False\n"),
    "the tail of dO is not waited for": ("            do_tails.wait_full(base, stage_do, phase_do, before, end * BLOCK_M > seqlen_q)\n",
                                         "            do_ring.wait_full(base, stage_do, phase_do)\n"),
    "the tail of dO of another head": ("int32(head - 1 if first else head)", "int32(head)"),
    "the tail of another block": ("int32(queries.m_max if first else m)", "int32(m)"),
    "the tail of Q is not cleared": ("                        tails.publish(base, head, lane)\n                do_ring",
                                     "                do_ring"),
    "dO overwritten": ("                do_ring.wait_empty(base, stage_do, phase_do)\n", ""),
    "dO never released": (
        "            release(q_ring.empty(base, before) if DK else do_ring.empty(base, stage_do), lane)\n", "            pass\n"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    given = two_heads()
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(given.call, "dv", seed, given.sequences, MUTANTS[mutant])
