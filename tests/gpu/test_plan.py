"""Splits planned on the device: every step of every request in one split, and what the plan does to times. Run from the kernel's PTX."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays import convert
from fastattn.gpu.decode import launch as launch_decode
from fastattn.gpu.decode.config import MOST_SPLITS, TILE, WAVES, choose_cached, plan_entries
from fastattn.gpu.precompile import Want
from fastattn.gpu.runtime import compile as compiler
from tests.tools.caches import Case
from tests.tools.gpu import interpreter
from tests.tools.gpu.calls import interpreted_serving

Array = np.ndarray[Any, Any]
STEP, OVERHEAD, HEADS_K, SLOTS = 64, 4, 8, 264


def plan_of(lengths: Array, room: int = 2**20, rows: int = 1, append: bool = False, window: int | None = None,
            heads_k: int = HEADS_K, group: int = 1) -> Array:
    """The plan's entries that are used: request, split, splits, steps of a split."""
    memory, batch, block_rows = interpreter.Memory(), len(lengths), 16 if group == 1 else 64
    program = launch_decode.plan_program(window is not None, True, False, STEP, OVERHEAD, block_rows, group > 1)
    entries = plan_entries(batch * -(-rows * group // block_rows), heads_k, SLOTS)
    at = memory.take(16 * entries)
    place = memory.place(lengths, convert.view(lengths, "test", "lengths"))
    given = {"plan": at, "entries": entries, "slots": SLOTS, "heads_k": heads_k, "lengths": place.ptr, "lengths_step": lengths.itemsize,
             "room": room, "appends": int(append), "seqlen_q": rows, "batch": batch, "left": window, "group": group}
    values = [given.get(name, 0) for name, _ in program.source.fields]
    interpreter.Launcher(memory).load(program.source).launch(1, values, 0)
    found = memory.bytes[at - interpreter.BASE:][:16 * entries].view(np.int32).reshape(entries, 4)
    used = found[:, 2] > 0
    assert not used[int(used.sum()):].any() and not found[int(used.sum()):].any()
    return found[used]


def steps_of(lengths: Array, room: int = 2**20, rows: int = 1, append: bool = False, window: int | None = None) -> Array:
    keys = np.minimum(np.clip(lengths.astype(np.int64), 0, room) + rows * append, room)
    first = np.maximum(keys - rows - window, 0) if window is not None else 0
    return -(-(keys - first) // STEP)


CASES: dict[str, tuple[Array, dict[str, Any]]] = {
    "ragged": (np.array([65536] + [512] * 255, np.int32), {}), "even": (np.full(16, 8192, np.int32), {}),
    "empty": (np.zeros(3, np.int32), {}), "one long": (np.array([2**20, 1], np.int32), {"append": True, "rows": 4}),
    "many": (np.random.default_rng(0).integers(0, 3000, 2048).astype(np.int32), {"heads_k": 1}),
    "wrong": (np.array([-5, 2**31 - 1, 700, -(2**31)], np.int32), {"room": 9000}),
    "window": (np.array([100000, 50, 3000], np.int32), {"window": 1000, "rows": 2}), "int64": (np.array([5000, 9, 70000]), {})}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_in_one_split(name: str) -> None:
    lengths, settings = CASES[name]
    plan = plan_of(lengths, **settings)
    steps = steps_of(lengths, **{key: x for key, x in settings.items() if key != "heads_k"})
    of_request = [plan[plan[:, 0] == b] for b in range(len(lengths))]
    for b, entries in enumerate(of_request):
        (splits,), (each,) = set(entries[:, 2]), set(entries[:, 3])
        assert sorted(entries[:, 1]) == list(range(splits)) and splits <= MOST_SPLITS
        assert (np.diff(np.flatnonzero(plan[:, 0] == b)) == 1).all()        # the results of a request's splits are neighbours
        assert splits == max(-(-steps[b] // each), 1) and each >= OVERHEAD
    several = plan[:, 2] > 1
    assert not several[int(several.sum()):].any()                           # what takes longest comes first


@pytest.mark.parametrize("name", ["ragged", "even", "empty", "one long"])
def test_blocks_of_rows_are_split_alike(name: str) -> None:
    """Of 128 heads and of several rows: the splits of a block of rows are neighbours, and every block has all of them."""
    lengths, settings = CASES[name]
    rows = settings.get("rows", 1)
    plan = plan_of(lengths, group=128, heads_k=1, **settings)
    steps = steps_of(lengths, **settings)
    for b in range(len(lengths)):
        own = plan[plan[:, 0] == b]
        (splits,), (each,) = set(own[:, 2]), set(own[:, 3])
        assert splits == max(-(-steps[b] // each), 1) and splits <= MOST_SPLITS
        assert own[:, 1].tolist() == [(tile << TILE) + n for tile in range(2 * rows) for n in range(splits)]
        assert (np.diff(np.flatnonzero(plan[:, 0] == b)) == 1).all()
    several = plan[:, 2] > 1
    assert not several[int(several.sum()):].any() and several.sum() <= 2 * WAVES * SLOTS


def test_long_requests_do_not_take_longer_than_their_bytes() -> None:
    """Blocks go to the first free slot, in order: the last one ends soon after the mean."""
    for name in ("ragged", "even", "many"):
        lengths, settings = CASES[name]
        plan, heads = plan_of(lengths, **settings), settings.get("heads_k", HEADS_K)
        steps, ends = steps_of(lengths), np.zeros(SLOTS)
        for request, split, _, each in plan:
            own = min(each, steps[request] - split * each) + OVERHEAD
            for _ in range(heads):
                ends[ends.argmin()] += own
        floor = steps.sum() * heads / SLOTS
        busy = (steps.sum() + OVERHEAD * len(lengths)) * heads / SLOTS       # with no request split
        assert ends.max() < 1.25 * busy, (name, ends.max(), busy, floor)
    alone = steps_of(CASES["ragged"][0])
    assert alone.max() > 10 * alone.sum() * HEADS_K / SLOTS                 # without splits the long one would decide


def test_what_is_planned() -> None:
    call, spec = Want(seqlen_q=1, seqlen_k=16384, num_heads=32, num_heads_k=8, batch=4).call()
    p = call.problem
    config = choose_cached(spec, p, None)
    assert launch_decode.plans(p, config, None)
    others: list[tuple[dict[str, int], int | None]] = [
        ({"batch": 1}, None), ({"seqlen_k": 8192}, None), ({"seqlen_q": 65}, None), ({}, 1), ({}, 5), ({"batch": 2048}, None)]
    for changes, splits in others:
        assert not launch_decode.plans(replace(p, **changes), config, splits)
    assert plan_entries(256, 8, SLOTS) * 8 < 256 * 8 + WAVES * SLOTS + 32


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiled(arch: str) -> None:
    assert compiler.complaints(compiler.build(launch_decode.plan_program(True, True, True, STEP, OVERHEAD, 16).source, arch)[1]) == []


@pytest.mark.parametrize("case", [
    Case("planned", dtype="bfloat16", keys=(900, 3, 0, 61), rows=2, rotary=(32, False)),
    Case("planned packed", dtype="bfloat16", keys=(900, 3, 0, 61), rows=(1, 40, 0, 2), spare=21, sinks=True),
    Case("planned window", dtype="float16", keys=(1500, 30), rows=1, append=False, options={"window": (900, 0)}, sinks=True)],
    ids=lambda case: case.name)
def test_attention_of_a_plan(case: Case) -> None:
    made = case.make()
    table = made.options["block_table"]
    wide = np.concatenate([table, np.full((len(table), 600), -1, np.int32)], axis=1)
    found = interpreted_serving(made, block_table=wide)
    assert found.kernels == ["append"] * case.append + ["plan_splits", "forward_decode"]
    made.judge(found.out, found.lse)
