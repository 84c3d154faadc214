"""The protocol of the Hopper backward, played without a GPU in random orders (tools/gpu/roles_backward.py)."""
from __future__ import annotations

import ctypes
import inspect
import itertools
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import Grads
from fastattn.gpu.rows.launch import padded_rows
from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import backward as backward_sm90
from fastattn.gpu.sm90 import dq_sums
from fastattn.gpu.sm90 import launch as launch_sm90
from fastattn.gpu.sm90.config import choose_backward as tiling
from fastattn.gpu.spec import BackwardCall, Spec, make_backward_spec
from fastattn.masks import row_bounds
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import Sequence, view, whole, with_bounds
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import edited, playing
from tests.tools.gpu.roles_backward import BackwardPlay
from tests.tools.gpu.roles_pair import PairPlay

DK, DV, DQ = 1 << 44, 1 << 45, 1 << 46


def backward(q: Any, k: Any, o: Operands, packed: bool, deterministic: bool = False, **options: Any) -> BackwardCall:
    problem, o = make_problem("attention_backward", o, packed=packed, **options)
    lse, out = view(*problem.lse_shape, dtype="int32"), view(*problem.out_shape)
    return BackwardCall(problem, o, out, out, lse, None, Grads(replace(q, ptr=DQ), replace(k, ptr=DK), replace(o.v, ptr=DV)), deterministic)


def dense(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dim: int, dim_v: int = 0, bias: bool = False,
          mask: Any = None, **options: Any) -> BackwardCall:
    q, k, v = view(batch, seqlen_q, heads, dim), view(batch, seqlen_k, heads_k, dim), view(batch, seqlen_k, heads_k, dim_v or dim)
    given = view(batch, heads, seqlen_q, seqlen_k) if bias else None
    return backward(q, k, Operands(q, k, v, given, mask), False, **options)


def kernel(spec: Spec, config: Any, change: Any) -> Any:
    """The kernel, with a place of its text changed, or of that of its sums of dQ."""
    makers = {maker.__name__: maker for maker in (dq_sums.make_dq_sums, dq_sums.make_dq_pair, dq_sums.make_dq_warpgroup)}
    of_sums = [name for name, maker in makers.items() if change is not None and change[0] in inspect.getsource(maker)]
    with ExitStack() as patches:
        for name, maker in makers.items():
            where = backward_sm90 if hasattr(backward_sm90, name) else dq_sums
            patches.enter_context(mock.patch.object(where, name, edited(maker, change if name in of_sums else None)))
        return edited(backward_sm90.make_backward, None if of_sums else change)(spec, config)[0]


def play(call: BackwardCall, seed: int, change: Any = None, far: bool = False, mask: Any = None, **tuning: Any) -> list[BackwardPlay]:
    """A launch, block by block; `change` edits the kernel's text first. far: the call has far rows. mask: the elements of its mask."""
    spec = launch_sm90.with_bias_tiles(make_backward_spec(call), call.operands.bias, 128)
    of_keys, p = launch_sm90._key_tiles(call, spec), call.problem
    config, memory, made = replace(tiling(spec, p.seqlen_k, of_keys), **tuning), Memory(), []
    played = PairPlay if config.pair else BackwardPlay
    arguments = launch_sm90.backward_program(spec, config).arguments
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k):
        memory.allow(x)
    if mask is not None:
        call = with_bounds(call, mask, config.block_m, memory, by_keys=True)
    with (playing(played(config, 0, seed), memory) as machine,
          packed.table(call, 128, machine.launcher(), 0, True) as table):
        heads, together = call.problem.num_heads_k, 1 if config.pair else packed.head_group(call, True)
        tiles = packed.most_tiles(call, 128, True)
        own = ("q", "k", "v", "dout", "rows", 0, int(far), 1, 0, padded_rows(call), table, tiles, together, heads, 1.0,
               0, 0, 0, 0, *["bias"] * spec.bias_tiles)
        values = namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.values(call, own))  # type: ignore[misc]
        # blocks past the end look at an entry that is not there before they know, and go
        count = ctypes.c_int32.from_address(table + (call.problem.batch + 1) * packed.ENTRY).value if call.problem.packed else tiles
        for block in range(0, count, 1 + config.pair):
            made.append(played(config, block, seed * 100 + block))
            with playing(made[-1], memory):
                made[-1].run(kernel(spec, config, change), values)
    return made


def check(call: BackwardCall, made: list[BackwardPlay], sequences: list[Sequence]) -> None:
    """Each block of keys has used every block of queries that attends to it once, for dK and dV. Each block of queries
    has got all of its dQ from every block of keys that it attends to."""
    p, block_m = call.problem, made[0].config.block_m
    results = {(pointer, key): (kind, rows) for one in made for kind, pointer, key, end, rows in one.results if key < end}
    sums = [(q, k) for one in made for (_, k), q in one.sums.items()]
    expected_sums = []
    for (plane, q_start, seqlen_q, k_start, seqlen_k), head_k in itertools.product(sequences, range(p.num_heads_k)):
        bounds = [row_bounds(row, seqlen_q, seqlen_k, p.mask.left, p.mask.right, p.mask.top_left) for row in range(seqlen_q)]
        heads = range(head_k * p.group, head_k * p.group + p.group)
        for first in range(0, seqlen_k, 128):
            end = min(first + 128, seqlen_k)
            attended = sorted({row // block_m for row, (lo, hi) in enumerate(bounds) if lo < end and first < hi and lo < hi})
            order = attended[::-1] if made[0].config.down else attended
            if made[0].config.pair and first == 0 and not made[0].config.down:      # a thread block's own one is the last
                order = attended[::-1]
            blocks = [(q_start + m * block_m, head, plane) for head in heads for m in order]
            expected_sums += [(block, (k_start + first, head_k, plane)) for block in blocks] * (block_m // 16 * made[0].config.dim // 8)
            for key, (pointer, kind, dim) in itertools.product(range(first, end, 16), ((DK, "dK", p.head_dim), (DV, "dV", p.head_dim_v))):
                at = pointer + 2 * dim * ((plane * p.seqlen_k + k_start) * p.num_heads_k + head_k)
                assert results.pop((at, key)) == (kind if blocks else "0", tuple(blocks))
    assert not results
    if made[0].config.one_tile:
        assert not sums
        check_rows(call, {at: of for one in made for at, of in one.stored.items()}, block_m, made[0].config.pair)
    else:
        assert sorted(sums) == sorted(expected_sums) if not call.deterministic else not sums


def check_rows(call: BackwardCall, stored: dict[Any, Any], block_m: int, pair: bool) -> None:
    """dQ that is stored as it is: each band of 16 rows once, from its own block of queries and its head's keys."""
    p = call.problem
    for plane, head, row in itertools.product(range(p.batch), range(p.num_heads), range(0, p.seqlen_q, 16)):
        at = DQ + 2 * p.head_dim * (plane * p.seqlen_q * p.num_heads + head)
        block = row // block_m * block_m
        keys = tuple((first, head // p.group, plane) for first in ((0, 128) if block or p.mask.right is None else (0,)))
        assert stored.pop((at, row)) == ((block, head, plane), keys if pair else keys[0])
    assert not stored


CASES = {
    "64": dense(1, 300, 200, 2, 1, 64), "64 causal": dense(2, 300, 300, 1, 1, 64, causal=True), "128": dense(1, 200, 300, 2, 2, 128),
    "128 causal": dense(1, 300, 300, 2, 1, 128, causal=True), "128 window": dense(1, 400, 400, 1, 1, 128, window=(70, 20)),
    "one query": dense(2, 1, 130, 2, 1, 128), "no queries for some keys": dense(1, 64, 300, 1, 1, 128, causal="top_left"),
    "deterministic": dense(1, 200, 200, 1, 1, 128, causal=True, deterministic=True), "softcap": dense(1, 200, 200, 1, 1, 64, softcap=3.0),
    "dropout": dense(1, 200, 200, 2, 1, 128, dropout_p=0.1, seed=1), "bias": dense(2, 300, 200, 2, 1, 64, bias=True),
    "bias causal": dense(1, 400, 400, 2, 1, 128, bias=True, causal=True),
    "192 and 128": dense(1, 300, 300, 2, 1, 192, 128, causal=True, deterministic=True),
    "40": dense(1, 300, 200, 1, 1, 40), "80": dense(1, 130, 200, 2, 1, 80), "96 causal": dense(1, 200, 200, 1, 1, 96, causal=True),
    "one tile": dense(2, 300, 100, 2, 1, 64), "one tile causal": dense(2, 77, 77, 2, 2, 64, causal=True),
    "one tile, few queries": dense(1, 20, 128, 2, 2, 32, causal=True), "not one tile": dense(1, 200, 100, 1, 1, 64, causal=True),
    "two tiles": dense(2, 197, 197, 2, 2, 64), "two tiles of 32": dense(1, 129, 256, 3, 3, 32), "no pair": dense(1, 257, 256, 1, 1, 64),
    "two tiles causal": dense(2, 200, 200, 2, 2, 64, causal=True),
    "40 softcap": dense(1, 100, 200, 1, 1, 40, softcap=3.0), "no queries for some keys, 64": dense(1, 64, 400, 2, 1, 64, causal="top_left"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_once(name: str) -> None:
    for seed in range(3):
        check(CASES[name], play(CASES[name], seed), whole(CASES[name].problem))


@pytest.mark.parametrize(("dim", "of_heads"), [(64, 1), (128, 1), (128, 2)])
def test_blocks_outside_a_boolean_mask(dim: int, of_heads: int) -> None:
    """A tile of keys visits the blocks of queries from the first to the last with one that attends to it in any head, for every head."""
    draw, rows, keys = np.random.default_rng(dim), 500, 400
    mask = (draw.random((1, of_heads, 10, 8)) < 0.15).repeat(50, 2).repeat(50, 3)
    mask[..., 128:256] = False
    call = dense(1, rows, keys, 2, 1, dim, mask=view(1, 2, rows, keys, dtype="bool") if of_heads == 2
                 else view(1, 1, rows, keys, dtype="bool"))
    for seed in range(2):
        made = play(call, seed, mask=mask)
        block_m = made[0].config.block_m
        found = {(pointer, key): (kind, rows) for one in made for kind, pointer, key, _, rows in one.results}
        assert {key for _, key in found} >= set(range(0, keys, 16))
        for (pointer, key), (kind, blocks) in found.items():
            first = key // 128 * 128
            used = np.flatnonzero(np.add.reduceat(mask[0, ..., first:first + 128].any(axis=(0, 2)), np.arange(0, rows, block_m)))
            expected = [(m * block_m, head, 0) for head in (0, 1) for m in range(used[0], used[-1] + 1)] if len(used) else []
            assert (kind, list(blocks)) == (({DK: "dK", DV: "dV"}[pointer] if expected else "0"), expected)


@pytest.mark.parametrize("name", [name for name, call in CASES.items() if tiling(make_backward_spec(call)).apart])
def test_calls_with_far_rows(name: str) -> None:
    """One block of queries after the other, nothing overlaps with the block before."""
    for seed in range(2):
        check(CASES[name], play(CASES[name], seed, far=True), whole(CASES[name].problem))


SPLIT = {"split": True, "halves": False}


@pytest.mark.parametrize(("name", "tuning"), [
    ("64", SPLIT), ("64 causal", SPLIT), ("40", SPLIT), ("no queries for some keys, 64", SPLIT),
    ("128 causal", {"crowded": True}), ("128 causal", {"q_stages": 2}), ("128 causal", {"down": False}), ("64", {"down": True})], ids=str)
def test_other_orders(name: str, tuning: dict[str, Any]) -> None:
    for seed in range(3):
        check(CASES[name], play(CASES[name], seed, **tuning), whole(CASES[name].problem))


def test_long_causal_calls_begin_with_the_first_queries() -> None:
    spec = make_backward_spec(CASES["128 causal"])
    assert tiling(spec, 32767).down and not tiling(spec, 32768).down and not tiling(replace(spec, right=False), 100).down


@pytest.mark.parametrize(("dim", "causal", "tuning"), [(64, True, {}), (128, False, {}), (128, True, {}), (64, True, SPLIT),
                                                       (64, False, SPLIT)])
def test_packed_sequences(dim: int, causal: bool, tuning: dict[str, Any]) -> None:
    lengths_q, lengths_k = [130, 0, 64, 5], [130, 40, 0, 200]
    cu = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    q, k = view(int(cu[0][-1]), 2, dim), view(int(cu[1][-1]), 1, dim)
    o = Operands(q, k, k, None, None, None, None, *(view(5, ptr=x.ctypes.data, dtype="int32") for x in cu))
    call = backward(q, k, o, True, causal=causal)
    sequences = [(0, int(cu[0][i]), lengths_q[i], int(cu[1][i]), lengths_k[i]) for i in range(4)]
    for seed, far in itertools.product(range(2), (False, True)):
        check(call, play(call, seed, far=far, **tuning), sequences)


MUTANTS = {
    "dS not waited for": ("                    ds_full.wait(base, int32(other ^ 1))\n", ""),
    "dO not waited for": ("            do_ring.wait_full_nth(base, j)\n", ""),
    "Q overwritten": ("                q_ring.wait_empty(base, stage, phase)\n", ""),
    "dO overwritten": ("                do_ring.wait_empty_nth(base, j)\n", ""),
    "dO never released": ("                do_ring.release(base, int32(other ^ 1), lane)\n", ""),
    "dQ stored early": ("        wait_read()\n        warp()\n", "        warp()\n"),
    "Q of another block": ("before)\n                wgmma.commit()\n                if OWN_DQ:\n                    hold(base)\n",
                           "stage)\n                wgmma.commit()\n                if OWN_DQ:\n                    hold(base)\n"),
    "dS without a meeting": ("        barrier(int32(DS_BARRIER + w), int32(WARPGROUP))    # dK", "        # dK"),
    "dS over a bias": ("                bias_read.wait(base, other)\n", "                pass\n"),
    "bias over dS": ("DS + stage * DS_BYTES, row", "DS, row"),
    "bias of other keys": ("DS + stage * DS_BYTES, row, k_row, int32(head)", "DS + stage * DS_BYTES, row, row, int32(head)"),
}


FAR_MUTANTS = {
    "Q never released": ("        q_ring.release(base, walk.stage, lane)\n", ""),
    "dO never released": ("        do_ring.release(base, last, lane)\n", ""),
    "Q of the block before": ("        stage, phase = q_ring.next(walk.stage, walk.phase)\n",
                              "        stage, phase = walk.stage, walk.phase\n"),
    "Q released early": ("        if OWN_DQ:\n            ds_full.wait(base, last)\n            send_dq(a, base, w, thread, walk",
                         "        q_ring.release(base, walk.stage, lane)\n        if OWN_DQ:\n            ds_full.wait(base, last)\n"
                         "            send_dq(a, base, w, thread, walk"),
}


# of the warpgroup of dQ
SPLIT_MUTANTS = {
    "dS not waited for": ("                ds_ring.wait_full_nth(base, j)\n", ""),
    "dS overwritten": ("            ds_ring.wait_empty_nth(base, j)\n", "            pass\n"),
    "dS never released": ("                ds_ring.release(base, buffer, own_lane())\n", ""),
    "dQ stored early": ("        wait_read()\n        warp()\n", "        warp()\n"),
    "dQ in the order of the keys": ("j, m = int32(j + 1), next_block(m)\n", "j, m = int32(j + 1), int32(m + 1)\n"),
}


@pytest.mark.parametrize("mutant", SPLIT_MUTANTS)
def test_faults_of_the_warpgroup_of_dq_are_found(mutant: str) -> None:
    call = CASES["64 causal"]
    with pytest.raises((AssertionError, AttributeError)):
        for seed in range(20):
            check(call, play(call, seed, SPLIT_MUTANTS[mutant], **SPLIT), whole(call.problem))


PAIR_MUTANTS = {
    "not cleared": ("        if CAUSAL:\n", "        if CAUSAL and False:\n"),
    "given to itself": ("int32(1 - cluster.rank())))\n", "int32(cluster.rank())))\n"),
    "given too early": ("        if PAIR:\n            cluster.wait() ", "        if PAIR and False:\n            cluster.wait() "),
    "not waited for": ("        cluster.wait()\n        store_rows", "        store_rows"),
    "never told": ("            cluster.arrive()        # what", "            pass        # what"),
}


@pytest.mark.parametrize("mutant", PAIR_MUTANTS)
def test_faults_of_a_pair_are_found(mutant: str) -> None:
    call = CASES["two tiles causal" if mutant == "not cleared" else "two tiles"]
    with pytest.raises((AssertionError, AttributeError, KeyError)):
        for seed in range(20):
            check(call, play(call, seed, PAIR_MUTANTS[mutant]), whole(call.problem))


@pytest.mark.parametrize("mutant", FAR_MUTANTS)
def test_faults_with_far_rows_are_found(mutant: str) -> None:
    call = CASES["128 causal"]
    with pytest.raises((AssertionError, AttributeError)):
        for seed in range(20):
            check(call, play(call, seed, FAR_MUTANTS[mutant], True), whole(call.problem))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    call = CASES["bias causal" if "bias" in mutant else "128 causal"]
    with pytest.raises((AssertionError, AttributeError)):
        for seed in range(20):
            check(call, play(call, seed, MUTANTS[mutant]), whole(call.problem))
