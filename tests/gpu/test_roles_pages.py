"""The Hopper forward over caches, played without a GPU in random orders (tools/gpu/roles_pages.py).

Keys in pages and in rows of a cache, lengths on the device, packed queries: every block of keys that a row attends to enters its output
once, from the pages that the table names.
"""
from __future__ import annotations

import itertools
from collections import namedtuple
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import caches, values
from fastattn.gpu.sm90 import forward as forward_sm90
from fastattn.gpu.sm90 import launch as launch_sm90
from fastattn.gpu.spec import make_spec
from fastattn.gpu.tile import pages as pages_module
from fastattn.masks import row_bounds
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import edited, playing
from tests.tools.gpu.roles_pages import OUT, PagesPlay, Requests, requests


def play(asked: Requests, seed: int, change: Any = None) -> PagesPlay:
    """A launch of two blocks. change: (the function that makes a part of the kernel, a place of its text, what stands there instead)."""
    call = asked.call
    spec = caches.spec_of(call, make_spec(call.problem, call.operands, False))
    config = caches.tiling(call, spec)
    box = config.box or config.block_n
    boxes, producers = {"q": config.block_m, "k": box, "v": box}, (0, values.SECOND) if config.wide_producer else (0,)
    made, memory = PagesPlay(config, spec.head_dim_v, (0, 1), seed, config.consumers, boxes, producers=producers), Memory()
    made.asked = asked
    arguments, o = launch_sm90.forward_program(spec, config).arguments, call.operands
    for x in (o.cu_seqlens_q, o.seqused_k, caches.pages_of(call)):
        memory.allow(x)
    with (playing(made, memory) as machine, packed.table(call, config.block_m, machine.launcher(), 0) as table,
          pytest.MonkeyPatch.context() as patch):
        if change is not None:
            module = {"make_forward": forward_sm90, "make_load_values": values}.get(change[0], pages_module)
            part = edited(getattr(module, change[0]), change[1:])
            for other in (module, forward_sm90):
                if hasattr(other, change[0]):
                    patch.setattr(other, change[0], part)
        kernel, _ = forward_sm90.make_forward(spec, config)
        own = ("q", "k", "v", "out", 4, table, packed.most_tiles(call, config.block_m), packed.head_group(call), *caches.values(call))
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    assert not any(made.counters.values()), "the counter is not as it was found"
    return made


def check(made: PagesPlay, asked: Requests) -> None:
    """Every 64 rows are stored once and have attended to all keys of their request."""
    p, block_n = asked.call.problem, made.config.block_n
    stored, columns = dict(made.stored), range(0, 64 * made.panels_v, 64)
    at = {divmod((address - OUT) // 2, p.num_heads * p.head_dim_v): keys for address, keys in made.rows.items()}
    starts = list(itertools.accumulate(asked.rows, initial=0))
    for (request, rows), head in itertools.product(enumerate(asked.rows), range(p.num_heads)):
        plane, q_start, seqlen_k = (0, starts[request], asked.lengths[request]) if p.packed else (request, 0, asked.lengths[request])
        for first in range(0, rows, 64):
            last = min(first + 64, rows)
            found = [stored.pop((q_start + first, head, plane, column), None) for column in columns]
            line = (starts[request] if p.packed else request * p.seqlen_q) + first
            found += [at.pop((line + row, head * p.head_dim_v), None) for row in range(0, last - first, 16)]
            keys = set(found) - {None}
            assert len(keys) == 1, f"rows {first} to {last} of request {request}, head {head} are not stored, or differently"
            blocks = keys.pop() or ()
            assert len(set(blocks)) == len(blocks)
            if seqlen_k:
                assert all(x.head == head // p.group and x.batch == request for x in blocks), "keys of another request or head"
            bounds = [row_bounds(row, rows, seqlen_k, p.mask.left, p.mask.right, False) for row in range(first, last)]
            attended = {n for lo, hi in bounds for n in range(lo // block_n, -(-hi // block_n)) if lo < hi}
            assert attended <= {x.row / block_n for x in blocks} or not seqlen_k
            assert len(blocks) <= max(len(attended), 1) + made.config.block_m // block_n + 1, "blocks that no row of the tile attends"
    assert all(row >= p.seqlen_q and not p.packed for row, _, _, _ in stored)     # outside the tensor, where TMA drops them


CASES = {
    "16": lambda: requests([300, 37, 0], 130, 16, 128), "64": lambda: requests([260, 129], 200, 64, 128, heads=4, heads_k=2),
    "128 full": lambda: requests([300, 128], 100, 128, 64, causal=False), "256": lambda: requests([600, 513], 90, 256, 128),
    "48": lambda: requests([300, 50], 130, 48, 128, stray=True), "32 window": lambda: requests([500, 70], 150, 32, 64, window=(100, 0)),
    "wide": lambda: requests([200, 10], 140, 32, 256), "stray": lambda: requests([300, 37, 1], 130, 16, 64, stray=True),
    "rows": lambda: requests([300, 37], 130, None, 128), "rows by index": lambda: requests([300, 37], 130, None, 64, batch_idx=True),
    "latent": lambda: requests([90, 200], 70, 64, 576), "packed": lambda: requests([300, 37, 0, 129], [130, 0, 70, 5], 16, 128, spare=9),
    "packed wide": lambda: requests([100, 257], [65, 130], 64, 256), "packed rows": lambda: requests([100, 257], [65, 130], None, 128),
    "packed narrow": lambda: requests([400, 257], [300, 30], 32, 64, causal=False),
    "more rows than keys": lambda: requests([40, 100], 130, 16, 128),
}


@pytest.mark.parametrize("name", CASES)
def test_every_key_once(name: str) -> None:
    asked = CASES[name]()
    for seed in range(2):
        check(play(asked, seed), asked)


@pytest.mark.parametrize(("lengths", "table"), [([-7, 2**31 - 1], 5), ([10**6, 0], -(2**31))])
def test_lengths_and_pages_that_do_not_exist(lengths: list[int], table: int) -> None:
    """Nothing outside of the table and the cache is read."""
    asked = requests([300, 300], 130, 16, 128)
    asked.kept[0][:], asked.kept[1][0, :] = lengths, table
    asked.known = False
    made = play(asked, 1)
    assert made.stored


MUTANTS = {
    "the page of another key": ("make_fill_pages", "page_of(pages, row) if", "page_of(pages, int32(row - BOX)) if"),
    "every box in one page": ("make_fill_pages", "            page, within = following\n", ""),
    "boxes over each other": ("make_fill_pages", "SLOTS + stage * BYTES + at,", "SLOTS + stage * BYTES,"),
    "fewer bytes than there are": ("make_fill_pages", "int32(BYTES))", "int32(BYTES // 2))"),
    "a slot in use": ("make_fill_pages", "        ring.wait_empty(base, stage, phase)\n", ""),
    "another request's pages": ("make_page_of", "int64(batch) * a.pages_batch", "int64(0) * a.pages_batch"),
    "entries behind the last key": ("make_page_of", "min(entry, pages.last)", "entry"),
    "pages that do not exist": ("make_page_of", "int32(min(uint32(page), uint32(pages.last_page)))", "page"),
    "values of another block": ("make_load_values", "load_v(a, base, it, row, head_k", "load_v(a, base, it, int32(row + BLOCK_N), head_k"),
    "a tile before its record": ("make_load_values", "            i = int32(i + 1)\n            records.wait(base, i)\n",
                                 "            i = int32(i + 1)\n"),
    "values of two producers": ("make_forward", "                elif not TWO_PRODUCERS:\n", "                else:\n"),
    "the tail cleared too early": ("make_forward", "            v_ring.wait_full(base, stage, phase)\n            clear_v",
                                   "            clear_v"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_are_found(mutant: str) -> None:
    asked = requests([300, 37, 400], 130, 16, 128, stray=True)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(20):
            check(play(asked, seed, MUTANTS[mutant]), asked)
