"""What the backward's kernels do, tested without a GPU: bounds by keys, where rows of packed sequences lie, tables of key tiles, and whole
calls of the kernels on plain threads, run in Python (tools/gpu/emulator.py).
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import Grads, UnsupportedError, gpu
from fastattn.arrays.view import View
from fastattn.gpu import precompile
from fastattn.gpu.rows import launch as rows_launch
from fastattn.gpu.rows import preprocess
from fastattn.gpu.runtime import packed
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.spec import BackwardCall, Spec, make_backward_spec
from fastattn.gpu.tile import mask, schedule
from fastattn.masks import query_bounds, row_bounds
from fastattn.problem import Operands, make_problem
from tests.tools.compare import Judge
from tests.tools.gpu.calls import host_view, run
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import BY_NAME, Case

LIMITS = [(left, right, top_left) for left, right in itertools.product((None, 0, 3, 40), (None, 0, 5, 100)) for top_left in (False, True)]
LENGTHS = [(1, 1), (7, 20), (20, 7), (33, 33), (64, 16), (16, 65), (0, 9)]


@pytest.mark.parametrize(("left", "right", "top_left"), LIMITS)
def test_query_bounds_say_what_the_rows_say(left: int | None, right: int | None, top_left: bool) -> None:
    for (seqlen_q, seqlen_k), block_m, block_n in itertools.product(LENGTHS, (1, 8, 16), (1, 8, 16)):
        bounds = [row_bounds(row, seqlen_q, seqlen_k, left, right, top_left) for row in range(seqlen_q)]
        for first in range(0, seqlen_k, block_n):
            last = min(first + block_n, seqlen_k)
            attends = [lo < last and first < hi and lo < hi for lo, hi in bounds]
            attends_all = [lo <= first and last <= hi for lo, hi in bounds]
            m_min, full_min, full_max, m_max = query_bounds(first, last, block_m, seqlen_q, seqlen_k, left, right, top_left)
            assert 0 <= m_min <= full_min <= full_max <= m_max <= -(-seqlen_q // block_m)
            for m in range(-(-seqlen_q // block_m)):
                rows = slice(m * block_m, (m + 1) * block_m)
                assert any(attends[rows]) == (m_min <= m < m_max), (seqlen_q, seqlen_k, first, m)
                if full_min <= m < full_max:
                    assert all(attends_all[rows]) and len(attends_all[rows]) == block_m
                elif all(attends_all[rows]) and len(attends_all[rows]) == block_m:
                    raise AssertionError(f"block {m} of keys {first} is full")


@pytest.mark.parametrize(("left", "right", "top_left"), LIMITS)
def test_query_bounds_on_the_device_are_the_same(left: int | None, right: int | None, top_left: bool) -> None:
    spec = Spec("float32", 64, 64, left=left is not None, right=right is not None)
    arguments = type("Arguments", (), {"left": left or 0, "right": right or 0})
    with emulated(Memory()):
        for block_m in (1, 8, 64):
            on_device = mask.make_query_bounds(spec, block_m)
            for (seqlen_q, seqlen_k), block_n in itertools.product(LENGTHS, (1, 8, 16)):
                for first in range(0, seqlen_k, block_n):
                    last = min(first + block_n, seqlen_k)
                    expected = query_bounds(first, last, block_m, seqlen_q, seqlen_k, left, right, top_left)
                    got = on_device(arguments, first, last, 0 if top_left else seqlen_k - seqlen_q, seqlen_q)
                    assert got == expected or (got[0] == got[3] and expected[0] == expected[3])


@pytest.mark.parametrize("padding", [64, 80, 128])
def test_sequences_of_a_line_never_meet(padding: int) -> None:
    """And each has room for its last tile of `padding` rows."""
    draw = random.Random(padding)
    with emulated(Memory()):
        padded_start = preprocess.make_padded_start(padding)
        for _ in range(300):
            lengths = [draw.choice([0, 1, draw.randrange(300), 128, 80]) for _ in range(draw.randrange(1, 20))]
            starts = [sum(lengths[:n]) for n in range(len(lengths))]        # the last: rows of no sequence
            batch, total = len(lengths) - 1, sum(lengths)
            line = (total + padding * (batch + 1)) // padding * padding
            ends = [*(padded_start(start, n) for n, start in enumerate(starts)), line]
            for n, length in enumerate(lengths):
                assert ends[n] % padding == 0 and ends[n] + -(-length // padding) * padding <= ends[n + 1]


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_the_table_has_every_tile_once(by_keys: bool, used: bool) -> None:
    draw, heads, block = random.Random(by_keys * 2 + used), 3, 16
    for _ in range(3):
        batch = draw.randrange(1, 40)
        length_q, length_k = ([draw.choice([0, 1, 16, draw.randrange(70)]) for _ in range(batch)] for _ in range(2))
        cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (length_q, length_k))
        used_k = np.array([draw.randint(0, n) for n in length_k], np.int32) if used else None
        total_q, total_k = int(cu_q[-1]) + 5, int(cu_k[-1]) + 33
        memory = Memory()
        for x in (cu_q, cu_k, used_k):
            memory.allow(host_view(x))
        blocks = (total_k if by_keys else total_q) // block + min(batch + 1, total_k if by_keys else total_q)
        with emulated(memory) as machine, memory.temporary(packed.table_bytes(batch, blocks), 0) as table:
            lengths = [word for x in (cu_q, cu_k, used_k) for word in ((x.ctypes.data, 4) if x is not None else (0, 0))]
            plan = machine.load(packed.plan_packed(used, block, by_keys))
            plan.launch(1, [table, *lengths, total_k, batch, heads, total_q, blocks], 0)
            spec = Spec("float32", 16, 16, packed=True)
            tile_at, num_tiles = schedule.make_tile_at(spec, block, by_keys), schedule.make_num_tiles(spec)
            a = type("Arguments", (), {"table": table, "batch": batch, "num_heads": heads, "num_heads_k": heads, "head_group": 2})
            tiles = [tile_at(a, t) for t in range(num_tiles(a))]
        starts, ends = (cu_k, total_k) if by_keys else (cu_q, total_q)
        expected = {(head, int(starts[n]) + first) for n in range(batch + 1) for head in range(heads)
                    for first in range(0, int(starts[n + 1] if n < batch else ends) - int(starts[n]), block)}
        got = [(tile[1], tile[5 if by_keys else 3] + tile[0] * block) for tile in tiles]
        assert len(got) == len(set(got)) and set(got) == expected
        for tile in tiles:
            _, _, b, q_start, seqlen_q, _, seqlen_k = tile[:7]
            if (tile[5] if by_keys else q_start) < starts[batch]:
                assert seqlen_q == length_q[b] and seqlen_k == (length_k[b] if used_k is None else used_k[b])
                assert not by_keys or tile[7] == length_k[b]
        assert len(tiles) <= heads * blocks


# ---------------------------------------------------------------- whole calls in Python
EMULATED = [
    *(BY_NAME[name] for name in ("no_keys_sinks", "no_queries", "empty_batch", "packed_none", "bias_2x1x1")),
    Case("emulated_all", num_heads=4, num_heads_k=2, batch=1, seqlen_q=20, seqlen_k=70, head_dim=5, head_dim_v=9, causal=True,
         window=(50, None), softcap=3.0, alibi="heads", bias=(4, 20, 70), mask=(1, 1, 20, 70), sinks=True, dropout_p=0.3, dlse=True,
         memory="reversed", layout="bhsd"),
    Case("emulated_packed", "bfloat16", num_heads=2, num_heads_k=1, lengths_q=(20, 0, 9), lengths_k=(70, 8, 9), used_k=(66, 8, 3), spare=4,
         head_dim=8, causal="top_left", bias=(1, 2, 1, 70), bias_dtype="float32", mask=(3, 1, 1, 70), dropout_p=0.2, sinks=True),
]


@pytest.mark.parametrize("case", EMULATED, ids=[case.name for case in EMULATED])
def test_emulated_backward(case: Case) -> None:
    inputs = case.make()
    grads, launched = run(inputs)
    Judge(inputs).backward(grads)
    assert "preprocess" in launched[0] if inputs.dout.size else True


def test_emulated_hidden_nan() -> None:
    """Rows that attend nothing, keys that nobody attends and biases at masked places may be NaN; with sinks such rows have an lse."""
    case = Case("emulated_hidden", batch=1, seqlen_q=20, seqlen_k=30, head_dim=4, mask=(1, 1, 20, 30), bias=(20, 30), sinks=True)
    inputs, results = case.make(), []
    inputs.kwargs["mask"][..., [3, 29]] = inputs.kwargs["mask"][:, :, [0, 19]] = False
    for bad in (0.5, np.nan):
        inputs.kwargs["bias"][~inputs.kwargs["mask"][0, 0]] = bad
        q, k, v = inputs.args
        k[:, [3, 29]] = v[:, [3, 29]] = q[:, [0, 19]] = inputs.dout[:, [0, 19]] = bad
        results.append(run(inputs)[0])
    for x, y in zip(*results, strict=True):
        assert x is None or np.array_equal(x, y)


@pytest.mark.parametrize(("family", "deterministic"), [("sm90", False), ("sm90", True), ("sm80", False), ("simt", False), ("simt", True)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_extra_memory_is_linear(head_dim: int, family: str, deterministic: bool) -> None:
    """At most 1.3 of dq in float32, and delta and lse, with 65536 queries."""
    held, most = 0, 0

    class Counting(Listing):
        @contextmanager
        def temporary(self, size: int, stream: int) -> Iterator[int]:
            nonlocal held, most
            held += size
            most = max(most, held)
            yield 1 << 20
            held -= size
    q = View(1 << 20, (1, 65536, 16, head_dim), (65536 * 32 * head_dim, 32 * head_dim, 2 * head_dim, 2), "bfloat16", ("cuda", 0))
    lse = View(1 << 20, (1, 16, 65536), (1 << 22, 1 << 18, 4), "float32", ("cuda", 0))
    problem, o = make_problem("test", Operands(q, q, q), packed=False, causal=True)
    call = BackwardCall(problem, o, q, q, lse, None, Grads(q, q, q), deterministic)
    module, device = gpu.family(family), precompile.absent_device("sm_90a")
    assert module.refuses(call, device) is None
    module.backward(call, make_backward_spec(call), Counting(device), 0)
    rows = 16 * 65536
    assert held == 0 and 2 * 4 * rows <= most <= 1.3 * 4 * rows * head_dim + 2 * 4 * rows


def test_choice_of_families() -> None:
    call, _ = precompile.Want("bfloat16", backward=True, deterministic=True).call()
    assert gpu.choose(call, precompile.absent_device("sm_90a")) is gpu.family("sm90")
    older = precompile.absent_device("sm_80")
    assert gpu.choose(call, older) is gpu.family("simt")
    with gpu.use("sm90", "sm80"), pytest.raises(UnsupportedError, match=r"sm90: it needs sm_90a.*sm80: its sums of dq come in any order"):
        gpu.choose(call, older)
    forward, _ = precompile.Want("bfloat16").call()
    assert gpu.choose(forward, older) is gpu.family("sm80")


def test_precompile_finds_the_backward() -> None:
    with gpu.use("simt"):
        keys = [source.key.split()[:2] for source in precompile.sources(
            *precompile.Want("float32", 64, packed=True, bias="float32", sinks="float32", backward=True).call(),
            precompile.absent_device("sm_80"))]
    assert keys == [["preprocess", "float32"], ["plan_packed", "BLOCK_N"], ["backward_simt", "dkdv"], ["plan_packed", "BLOCK_M"],
                    ["backward_simt", "dq"], ["dbias", "float32"], ["dsinks", "float32"]]
    assert all(want.backward for want in precompile.wants_of([64], ["float32"], ["backward+causal"]))


@pytest.mark.parametrize(("head_dim", "deterministic", "expected"), [
    (128, False, ["preprocess", "backward_sm90", "round_dq"]), (128, True, ["preprocess", "backward_sm90", "backward_sm90_dq"]),
    (256, False, ["preprocess", "backward_sm90_wide", "backward_sm90_wide", "backward_sm90_dq"])])
def test_kernels_of_hopper(head_dim: int, deterministic: bool, expected: list[str]) -> None:
    """Sums of dq in memory only where one kernel makes all three gradients."""
    call, spec = precompile.Want("bfloat16", head_dim, backward=True, deterministic=deterministic).call()
    sources = precompile.sources(call, spec, precompile.absent_device("sm_90a"))
    assert [source.key.split()[0] for source in sources] == expected
    assert ("accum" in sources[0].key.split()) == ("round_dq" in expected)
    assert all(source.make()[1] <= 227 * 1024 for source in sources)


def test_rows_count_for_dense_and_packed() -> None:
    dense, _ = precompile.Want(seqlen_q=130, batch=2, num_heads=3, backward=True).call()
    assert rows_launch.padded_rows(dense) == 256 and rows_launch.batch_heads(dense) == 6
    many, _ = precompile.Want(packed=True, seqlen_q=130, batch=2, num_heads=3, backward=True).call()
    assert rows_launch.padded_rows(many) == (260 + 3 * 128) // 128 * 128 and rows_launch.batch_heads(many) == 3
    assert packed.most_tiles(many, 64, by_keys=True) == 3 * (260 // 64 + 3)
