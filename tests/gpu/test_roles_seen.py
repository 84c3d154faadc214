"""The protocol of the Hopper forward under a mask_mod, played without a GPU in random orders (tools/gpu/roles.py).

A tile goes through the blocks of keys that its line of the bitmap shows, each once, and through no others; a tile that sees nothing has
one.
"""
from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.flex.operands import Flex, FlexOperands
from fastattn.flex.trace import trace
from fastattn.gpu.flex.launch import Layout
from fastattn.gpu.rows.launch import padded_rows
from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import backward as backward_sm90
from fastattn.gpu.sm90 import forward as forward_sm90
from fastattn.gpu.sm90 import launch as launch_sm90
from fastattn.gpu.sm90 import seen
from fastattn.gpu.sm90.config import choose_forward as tiling
from fastattn.gpu.sm90.config_traced import SMALL, backward_ladder
from fastattn.gpu.spec import BackwardCall, Call, make_backward_spec, make_spec
from fastattn.masks import block_bounds, query_bounds
from fastattn.problem import Grads, Operands, make_problem
from tests.tools.gpu.calls import host_view, view
from tests.tools.gpu.emulator import Memory, replaced
from tests.tools.gpu.roles import Play, edited, playing
from tests.tools.gpu.roles_backward import BackwardPlay

OUT, DK, DV = 1 << 40, 1 << 44, 1 << 45
Array = np.ndarray[Any, Any]
MASK = trace(lambda b, h, q, k: q >= k, mask=True)


def words_of(kinds: Array) -> Array:
    """The bitmap of kinds (batch, heads, lines, tiles): 0 empty, 1 partial, 2 full."""
    count = -(-kinds.shape[-1] // 32)
    padded = np.zeros((*kinds.shape[:-1], count * 32), np.int64)
    padded[..., :kinds.shape[-1]] = kinds
    bits = 1 << np.arange(32, dtype=np.uint64)
    pieces = padded.reshape(*kinds.shape[:-1], count, 32)
    return np.stack([((pieces >= kind) * bits).sum(-1) for kind in (1, 2)], -1).astype(np.uint32)


def play(call: Call, kinds: Array, seed: int, change: Any = None, of: Any = (forward_sm90, seen.make_seen), **tuning: Any) -> Play:
    """A launch of two blocks. kinds: of each tile, with one plane for all heads or one for each. of: a module, the function
    in it that is changed."""
    user, function = of
    spec = make_spec(call.problem, call.operands, False)
    config = replace(tiling(spec, call.problem.seqlen_k), **tuning)
    boxes = {"q": config.block_m, "k": config.block_n, "v": config.block_n}
    made, memory = Play(config, spec.head_dim_v, (0, 1), seed, config.consumers, boxes, spec.parts), Memory()
    arguments, words = launch_sm90.forward_program(spec, config).arguments, words_of(kinds)
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k, host_view(words.view(np.int32))):
        memory.allow(x)
    layout = Layout(*kinds.shape)
    with playing(made, memory) as machine, packed.table(call, config.block_m, machine.launcher(), 0) as table:
        with mock.patch.object(user, function.__name__, edited(function, change)):
            kernel, _ = forward_sm90.make_forward(spec, config)
        own = ("q", "k", "v", "out", 4, table, packed.most_tiles(call, config.block_m), packed.head_group(call),
               *layout.values(words.ctypes.data))
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    assert not any(made.counters.values()), "the counter is not as it was found"
    return made


def check(made: Play, call: Call, kinds: Array) -> None:
    """Each tile of each head has gone through the blocks that its line shows, inside those of the structural mask."""
    p, (block_m, block_n) = call.problem, (made.config.block_m, made.config.block_n)
    tiles = -(-p.seqlen_q // block_m)
    for batch, head, m in itertools.product(range(p.batch), range(p.num_heads), range(tiles)):
        first, last = m * block_m, min((m + 1) * block_m, p.seqlen_q)
        bounds = block_bounds(first, last, block_n, p.seqlen_q, p.seqlen_k, p.mask.left, p.mask.right, p.mask.top_left)
        line = kinds[min(batch, kinds.shape[0] - 1), min(head, kinds.shape[1] - 1), m]
        wanted = [n for n in range(bounds[0], bounds[3]) if line[n]]
        for row in range(first, last, 64):
            found = [made.stored.get((row, head, batch, column)) for column in range(0, 64 * made.panels_v, 64)]
            assert len(set(found)) == 1 and found[0] is not None, f"rows from {row} of head {head} are not stored, or differently"
            blocks = [place.row // block_n for place in found[0]]
            assert blocks == (sorted(wanted, reverse=True) or [max(bounds[3] - 1, 0)]), (row, head, blocks, wanted)
            assert all(place.head == head // p.group and place.batch == batch for place in found[0])


def dense(batch: int, rows: int, keys: int, heads: int, heads_k: int, dim: int, **options: Any) -> Call:
    q, k = view(batch, rows, heads, dim, dtype="float16"), view(batch, keys, heads_k, dim, dtype="float16")
    problem, o = make_problem("attention", Operands(q, k, k, flex=FlexOperands(Flex(None, MASK))), packed=False, **options)
    return Call(problem, o, view(batch, rows, heads, dim, dtype="float16", ptr=OUT), None)


def drawn(call: Call, seed: int, planes: tuple[int, int], most: float = 0.5, side: int = 128) -> Array:
    """Kinds of tiles of 128 x 128; a line in four is empty, a line in four full."""
    draw = np.random.default_rng(seed)
    p = call.problem
    kinds = draw.choice(3, (*planes, -(-p.seqlen_q // side), -(-p.seqlen_k // side)), p=(1 - most, most / 2, most / 2))
    kinds[draw.random(kinds.shape[:-1]) < 0.25] = 0
    kinds[draw.random(kinds.shape[:-1]) < 0.25] = 2
    return kinds


CASES = {"many tiles": (dense(2, 600, 900, 2, 1, 128), (1, 2)),
         "causal beside it": (dense(1, 900, 900, 2, 2, 128, causal=True), (1, 1)),
         "a window beside it": (dense(2, 700, 700, 1, 1, 128, window=(200, 100)), (2, 1)),
         "words": (dense(1, 200, 5000, 1, 1, 128), (1, 1))}


@pytest.mark.parametrize("name", CASES)
def test_every_seen_block_once(name: str) -> None:
    call, planes = CASES[name]
    for seed in range(3):
        kinds = drawn(call, seed, planes)
        check(play(call, kinds, seed), call, kinds)


@pytest.mark.parametrize("tuning", [{"stages": 4}, {"stages": 1}, {"turns": False}, {"optimistic": False}], ids=str)
def test_other_tilings(tuning: dict[str, Any]) -> None:
    call, planes = CASES["many tiles"]
    kinds = drawn(call, 1, planes)
    check(play(call, kinds, 1, **tuning), call, kinds)


def test_small_tiles() -> None:
    """Those of fine masks, two blocks of which share a multiprocessor."""
    call, planes = CASES["many tiles"]
    own = {f.name: getattr(SMALL, f.name) for f in fields(SMALL)}
    for seed in range(2):
        kinds = drawn(call, seed, planes, side=64)
        check(play(call, kinds, seed, **own), call, kinds)


LOAD_K = "                load_k(a, base, it, row, head_k, map_batch, m_block, head)\n                load_v("
# ---------------------------------------------------------------- the backward
def backward(batch: int, rows: int, keys: int, heads: int, heads_k: int, dim: int, **options: Any) -> BackwardCall:
    q, k, v = (view(batch, n, h, dim) for n, h in ((rows, heads), (keys, heads_k), (keys, heads_k)))
    problem, o = make_problem("attention_backward", Operands(q, k, v, flex=FlexOperands(Flex(None, MASK))), packed=False, **options)
    lse, out = view(*problem.lse_shape, dtype="int32"), view(*problem.out_shape)
    return BackwardCall(problem, o, out, out, lse, None, Grads(q, replace(k, ptr=DK), replace(v, ptr=DV)), False)


def play_backward(call: BackwardCall, kinds: Array, seed: int, change: Any = None, **tuning: Any) -> list[BackwardPlay]:
    """A launch, block by block. kinds: of each tile of keys by blocks of queries."""
    spec = make_backward_spec(call)
    config, memory, made = replace(backward_ladder(spec, call.problem.seqlen_k)[0], **tuning), Memory(), []
    arguments, words, tiles = launch_sm90.backward_program(spec, config).arguments, words_of(kinds), packed.most_tiles(call, 128, True)
    memory.allow(host_view(words.view(np.int32)))
    own = ("q", "k", "v", "dout", "rows", 0, 0, 1, 0, padded_rows(call), 0, tiles, packed.head_group(call, True), call.problem.num_heads_k,
           1.0, 0, 0, 0, 0, *Layout(*kinds.shape).values(words.ctypes.data))
    values = namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.values(call, own))  # type: ignore[misc]
    for block in range(tiles):
        made.append(BackwardPlay(config, block, seed * 100 + block))
        with playing(made[-1], memory) as machine, replaced(("sm90.seen_queries",), {"load_b32": machine.load_b32}):
            made[-1].run(edited(backward_sm90.make_backward, change)(spec, config)[0], values)
    return made


def check_backward(call: BackwardCall, made: list[BackwardPlay], kinds: Array) -> None:
    """dK and dV of a tile of keys are made of the blocks of queries that its lines show, head after head, and dQ has got its part."""
    p, block_m = call.problem, made[0].config.block_m
    results = {(pointer, key): (kind, rows) for one in made for kind, pointer, key, end, rows in one.results if key < end}
    sums = [(q, k) for one in made for (_, k), q in one.sums.items()]
    for batch, head_k, first in itertools.product(range(p.batch), range(p.num_heads_k), range(0, p.seqlen_k, 128)):
        bounds = query_bounds(first, min(first + 128, p.seqlen_k), block_m, p.seqlen_q, p.seqlen_k, p.mask.left, p.mask.right,
                              p.mask.top_left)
        blocks = [(m * block_m, head, batch) for head in range(head_k * p.group, (head_k + 1) * p.group)
                  for m in range(bounds[0], bounds[3])
                  if kinds[min(batch, kinds.shape[0] - 1), min(head, kinds.shape[1] - 1), first // 128, m]]
        for key, (pointer, kind) in itertools.product(range(first, min(first + 128, p.seqlen_k), 16), ((DK, "dK"), (DV, "dV"))):
            at = pointer + 2 * p.head_dim * (batch * p.seqlen_k * p.num_heads_k + head_k)
            assert results.pop((at, key)) == (kind if blocks else "0", tuple(blocks)), (first, blocks)
        for block in [(block, (first, head_k, batch)) for block in blocks] * (block_m // 16 * made[0].config.dim // 8):
            sums.remove(block)
    assert not results and not sums


def drawn_by_keys(call: BackwardCall, seed: int, planes: tuple[int, int]) -> Array:
    draw, p = np.random.default_rng(seed), call.problem
    kinds = draw.choice(3, (*planes, -(-p.seqlen_k // 128), -(-p.seqlen_q // 64)), p=(0.5, 0.25, 0.25))
    kinds[draw.random(kinds.shape[:-1]) < 0.3] = 0
    return kinds


BACKWARDS = {"two heads": (backward(1, 500, 300, 2, 1, 128), (1, 2)),
             "causal beside it": (backward(2, 300, 300, 2, 2, 128, causal=True), (1, 1)),
             "many words": (backward(1, 2300, 130, 1, 1, 64), (1, 1))}


@pytest.mark.parametrize("name", BACKWARDS)
@pytest.mark.parametrize("crowded", [False, True])
def test_every_seen_block_of_queries_once(name: str, crowded: bool) -> None:
    call, planes = BACKWARDS[name]
    for seed in range(2):
        kinds = drawn_by_keys(call, seed, planes)
        check_backward(call, play_backward(call, kinds, seed, block_m=64, crowded=crowded), kinds)


BACKWARD_MUTANTS = {
    "told of the block before": ("                    if SEEN:\n                        seen.tell(base, stage, head, found)\n", ""),
    "dQ of this block's rows": ("seen.row(a, base, before, batch)", "seen.row(a, base, stage, batch)"),
    "a block too few": ("        while walk.j < count:\n", "        while walk.j < count - 1:\n"),
    "tiles that see nothing": ("                m_max = m_max if seen.count(a, batch, head_k, n_block, m_min, m_max) > 0 else m_min\n",
                               "                m_max = m_max\n"),
}


@pytest.mark.parametrize("mutant", BACKWARD_MUTANTS)
def test_faults_of_the_backward_are_found(mutant: str) -> None:
    call, planes = BACKWARDS["two heads"]
    with pytest.raises((AssertionError, KeyError, ValueError)):
        for seed in range(10):
            kinds = drawn_by_keys(call, seed, planes)
            check_backward(call, play_backward(call, kinds, seed, BACKWARD_MUTANTS[mutant], block_m=64), kinds)


LOAD, SEEN = (forward_sm90, seen.make_load_seen), (forward_sm90, seen.make_seen)
MUTANTS = {
    "the number of the block before": (LOAD, "                seen.tell(base, it, found, after)\n" + LOAD_K, LOAD_K),
    "V of another block": (LOAD, "                load_v(a, base, it, row, head_k, map_batch)\n                it, found",
                           "                load_v(a, base, it, int32(row + BLOCK_N), head_k, map_batch)\n                it, found"),
    "a block is left out": (LOAD, "it, found = int32(it + 1), after",
                            "it, found = int32(it + 1), after if after < 0 else next_down(line, n_min)[0]"),
    "nothing for a tile that sees nothing": (LOAD, "                found = int32(2 * (ahead_max - 1)) if found < 0 else found\n", ""),
    "the first block of the structural mask": (SEEN, "int32((found >> 1) + 1), after", "int32(0), after"),
    "the block after this one is that of another slot": (SEEN, "load_shared_b32(int32(base + BLOCKS + 8 * stage + 4))",
                                                         "load_shared_b32(int32(base + BLOCKS + 8 * (stage ^ 1) + 4))"),
    "the line of the tile before": (LOAD, "next_down(until(ahead, ahead_max), n_min)", "next_down(line, n_min)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    call, planes = CASES["many tiles"]
    of, *change = MUTANTS[mutant]
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(20):
            kinds = drawn(call, seed, planes)
            check(play(call, kinds, seed, tuple(change), of), call, kinds)
