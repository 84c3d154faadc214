"""The protocol of the Hopper forward on 8-bit operands, played without a GPU (tools/gpu/roles_8bit.py), and what stands around it: the
transposition of V in Python, the order of its keys, and the choice of the kernel.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.arrays import convert
from fastattn.arrays.view import ITEMSIZE, numpy_dtype
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.ptx.wgmma_8bit import KEY_OF
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import launch_8bit
from fastattn.gpu.sm90.config_8bit import Forward8BitConfig, choose_forward_8bit
from fastattn.gpu.spec import Call, Spec
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import view, whole
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.gpu.roles_8bit import check, play

OUT = 1 << 40
E4M3 = "float8_e4m3fn"


def dense(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dim: int, **options: Any) -> Call:
    q, k = view(batch, seqlen_q, heads, dim, dtype=E4M3), view(batch, seqlen_k, heads_k, dim, dtype=E4M3)
    problem, o = make_problem("attention", Operands(q, k, k), packed=False, **options)
    return Call(problem, o, view(batch, seqlen_q, heads, dim, dtype="bfloat16", ptr=OUT), None)


CASES = {
    "64": dense(2, 300, 500, 2, 1, 64), "64 causal": dense(1, 390, 390, 4, 2, 64, causal=True), "128": dense(1, 257, 400, 2, 2, 128),
    "128 causal": dense(1, 400, 400, 3, 1, 128, causal=True), "128 window": dense(1, 600, 600, 1, 1, 128, window=(100, 30)),
    "128 one key": dense(2, 129, 1, 2, 1, 128), "128 more queries": dense(1, 400, 100, 1, 1, 128, causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_block_once(name: str) -> None:
    for seed in range(3):
        check(play(CASES[name], seed), CASES[name], whole(CASES[name].problem))


IN_ORDER = {"ahead": False, "gather": 2, "stages": 2}       # of D128 with a causal mask
SCORES_AHEAD = {"ahead": True, "gather": 1, "stages": 4}     # of D128 without a mask


@pytest.mark.parametrize("tuning", [IN_ORDER, {**IN_ORDER, "stages": 4, "block_n": 64}, {**IN_ORDER, "stages": 1}, SCORES_AHEAD,
                                    {**IN_ORDER, "gather": 1, "block_m": 64}, {**SCORES_AHEAD, "stages": 2},
                                    {**SCORES_AHEAD, "block_m": 64}], ids=str)
def test_other_tilings(tuning: dict[str, Any]) -> None:
    for seed in range(2):
        check(play(CASES["128 causal"], seed, **tuning), CASES["128 causal"], whole(CASES["128 causal"].problem))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float32"])
def test_output_from_registers(dtype: str) -> None:
    """Each row once, with the blocks that the stores of 16 bits have."""
    call = CASES["128 causal"]
    out = view(*call.out.shape, dtype=dtype, ptr=OUT)
    assert call.problem.eight_bit is not None
    other = replace(call, problem=replace(call.problem, eight_bit=replace(call.problem.eight_bit, out_dtype=dtype)), out=out)
    made = play(other, 0)
    size, (rows, heads) = ITEMSIZE[dtype], call.out.shape[1:3]
    found = {divmod((address - OUT) // size // 128, heads): keys for address, keys in made.rows.items()}
    assert not made.stored and set(found) == {(row, head) for row in range(0, rows, 16) for head in range(heads)}
    for (row, _), keys in found.items():
        assert set(range(0, row + 1, made.config.block_n)) <= {key.row for key in keys}


@pytest.mark.parametrize(("dim", "causal"), [(64, False), (128, True)])
def test_packed_sequences(dim: int, causal: bool) -> None:
    lengths_q, lengths_k = [130, 0, 64, 200, 5], [130, 40, 0, 90, 300]
    cu = [np.cumsum([0, *lengths]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    q, k = view(int(cu[0][-1]) + 70, 2, dim, dtype=E4M3), view(int(cu[1][-1]), 1, dim, dtype=E4M3)      # 70 rows of no sequence
    o = Operands(q, k, k, None, None, None, None, *(view(6, ptr=x.ctypes.data, dtype="int32") for x in cu))
    problem, o = make_problem("attention_varlen", o, packed=True, causal=causal)
    call = Call(problem, o, view(*q.shape, dtype="bfloat16", ptr=OUT), None)
    block_n = choose_forward_8bit(launch_8bit.spec_of(call)).block_n
    starts = [(int(cu[1][i]), int(cu[1][i]) // block_n + i) for i in range(5)] + [(0, 0)]
    sequences = [(0, int(cu[0][i]), lengths_q[i], int(cu[1][i]), lengths_k[i]) for i in range(5) if lengths_k[i]]
    for seed in range(2):
        made = play(call, seed, starts=starts)
        made.stored = {key: keys for key, keys in made.stored.items() if not _without_keys(key[0], cu[0], lengths_k)}
        check(made, call, sequences)


def _without_keys(row: int, cu: Any, lengths_k: list[int]) -> bool:
    """Whether a row is of a sequence without keys, or of none."""
    i = int(np.searchsorted(cu, row, "right")) - 1
    return i >= len(lengths_k) or lengths_k[i] == 0


ALONE = "        acc_s = wgmma.wait_all(issue_first(base, w, stage))\n"
K_AND_ALONE = "        k_ring.wait_full(base, stage, phase)\n" + ALONE
MUTANTS = {
    "K not waited for": (K_AND_ALONE + "        release_k", ALONE + "        release_k"),
    "Q not waited for": ("        q_ring.wait_full_nth(base, i)\n" + K_AND_ALONE + "        release_k",
                         K_AND_ALONE + "        release_k"),
    "V not waited for": ("        v_ring.wait_full(base, stage, parity)\n", ""),
    "K released early": ("            acc_s = wgmma.wait_all_but_one(acc_s)\n",
                         "            release_k(base, stage, n_block, tile.n_min, lane)\n"
                         "            acc_s = wgmma.wait_all_but_one(acc_s)\n"),
    "K released before the vote": ("                lags = int32(1) if max(part0, part1) > LIMIT else int32(0)\n",
                                   "                release_k(base, stage, n_block, tile.n_min, lane)\n"
                                   "                lags = int32(1) if max(part0, part1) > LIMIT else int32(0)\n"),
    "Q overwritten": ("        q_ring.wait_empty_nth(base, i)\n", ""),
    "wrong V": ("issue_last(base, sums, p, before, parity,", "issue_last(base, sums, p, stage, parity,"),
    "V of another block": ("                load_v(a, base, it, int32(block + n), head_k, map_batch)\n                it = int32(it + 1)\n"
                           "            going", "                load_v(a, base, it, int32(block + n + 1), head_k, map_batch)\n"
                           "                it = int32(it + 1)\n            going"),
    "scores of another block again": ("wgmma.wait_all(issue_first(base, w, stage))\n        max0",
                                      "wgmma.wait_all(issue_first(base, w, int32(stage ^ 1)))\n        max0"),
    "a sum lost": ("                acc_o = add_columns(acc_o, sums, 0)\n", "                acc_o = acc_o\n"),
    "a sum added early": ("place_in_sum(int32(n_block + 1), tile) == GATHER - 1:", "place_in_sum(int32(n_block + 1), tile) == 0:"),
    "a sum begun late": ("mma_o(sums, p, base, stage, place_in_sum(n_block, tile))", "mma_o(sums, p, base, stage, int32(1))"),
    "a sum not waited for": ("                    sums = wgmma.wait_all(product)\n                    sum0",
                             "                    sums = product\n                    sum0"),
}
AHEAD = {
    "K not waited for": (K_AND_ALONE + "        k_ring", ALONE + "        k_ring"),
    "Q not waited for": ("        q_ring.wait_full_nth(base, i)\n" + K_AND_ALONE + "        k_ring",
                         K_AND_ALONE + "        k_ring"),
    "second K not waited for": ("        k_ring.wait_full_nth(base, second)\n", ""),
    "next K not waited for": ("                k_ring.wait_full_nth(base, int32(it + 1))\n", "                pass\n"),
    "first V not waited for": ("        v_ring.wait_full(base, stage, phase)\n        bank", "        bank"),
    "V not waited for": ("                v_ring.wait_full(base, stage, phase)\n                second", "                second"),
    "V not waited for, maxima": ("                v_ring.wait_full(base, stage, phase)\n                acc_s", "                acc_s"),
    "P V not waited for": ("                    lags = int32(0)\n                    bank = wgmma.wait_all(product)",
                           "                    lags = int32(0)\n                    bank = product"),
    "next scores not waited for": ("                    bank = wgmma.wait_all(bank)\n                    sum0", "                    sum0"),
    "wrong V": ("issue_o(base, bank, p, before, n_block)", "issue_o(base, bank, p, stage, n_block)"),
    "scores twice": ("            after, _ = k_ring.use(int32(it + 1))\n", "            after, _ = k_ring.use(it)\n"),
    "banks mixed up": ("            acc_o, odd, even, p,", "            acc_o, even, odd, p,"),
    "a product lost": ("                acc_o = add_columns(acc_o, bank, 0)\n                bank", "                bank"),
    "K released before the vote": ("                lags = int32(1) if max(part0, part1) > LIMIT else lags\n",
                                   "                release_k(base, stage, n_block, tile.n_min, lane)\n"
                                   "                lags = int32(1) if max(part0, part1) > LIMIT else lags\n"),
    "scores of another block again": ("wgmma.wait_all(issue_s(base, w, acc_s, stage, n_block))",
                                      "wgmma.wait_all(issue_s(base, w, acc_s, int32(stage ^ 1), n_block))"),
}


@pytest.mark.parametrize(("ahead", "mutant"), [*((False, x) for x in MUTANTS), *((True, x) for x in AHEAD)])
def test_faults_are_found(ahead: bool, mutant: str) -> None:
    call = CASES["128 causal"]
    change, tuning = (AHEAD[mutant], SCORES_AHEAD) if ahead else (MUTANTS[mutant], IN_ORDER)
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(play(call, seed, change, **tuning), call, whole(call.problem))


# ---------------------------------------------------------------- the transposed V
def transposed(v: Any, lengths: list[int] | None, config: Forward8BitConfig, scales: dict[str, Any]) -> tuple[Any, Any]:
    """(bytes of the transposed V, (batch, key head, 2) scales) that the kernel writes, run in Python."""
    heads, dim = v.shape[-2:]
    o = Operands(convert.view(v, "test", "q"), convert.view(v, "test", "k"), convert.view(v, "test", "v"))
    if lengths is not None:
        cu = np.cumsum([0, *lengths]).astype(np.int32)
        o.cu_seqlens_q = o.cu_seqlens_k = convert.view(cu, "test", "cu")
    problem, o = make_problem("test", o, packed=lengths is not None)
    for name, x in scales.items():
        setattr(o, name, convert.view(x, "test", name).broadcast_to((problem.batch, heads)))
    call, memory = Call(problem, o, o.q, None), Memory()
    place = launch_8bit.transposed(call, config, 0)
    vt, table = np.full(int(np.prod(place.shape)) + 64, 0xFF, np.uint8), np.full((problem.batch, heads, 2), np.nan, np.float32)
    for x in (*call.views, *(convert.view(y, "test", "x") for y in (vt.view(np.int32), table))):
        memory.allow(x)
    address = -(-vt.ctypes.data // 16) * 16
    with emulated(memory) as machine:
        launch_8bit.transpose(call, config, address, table.ctypes.data, machine.launcher(), 0)
    return vt[address - vt.ctypes.data:][:int(np.prod(place.shape))].reshape((*place.shape[:-3], heads, -1, dim, config.panel)), table


@pytest.mark.parametrize(("dim", "block_n", "lengths"), [(64, 64, None), (64, 192, None), (128, 128, None), (64, 64, [70, 0, 3, 64, 1])])
def test_transposed_v_in_python(dim: int, block_n: int, lengths: list[int] | None) -> None:
    config, draw = Forward8BitConfig(block_m=128, block_n=block_n), np.random.default_rng(0)
    shape = (2, 70, 2, dim) if lengths is None else (sum(lengths) + 2, 2, dim)
    v = draw.integers(0, 127, shape, np.uint8).view(numpy_dtype(E4M3))
    batch = 2 if lengths is None else len(lengths)
    k_scale, v_scale = draw.uniform(1, 2, (batch, 2)).astype(np.float32), draw.uniform(1, 2, 2).astype(np.float32)
    got, table = transposed(v, lengths, config, {"k_scale": k_scale, "v_scale": v_scale})
    order = (np.array(KEY_OF) + 32 * np.arange(block_n // 32)[:, None]).ravel()
    sequences = [(b, v[b], 0) for b in range(2)] if lengths is None else [
        (0, v[start:start + n], start // block_n + i)
        for i, (start, n) in enumerate(zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False))]
    for b, keys, first in sequences:
        blocks = -(-len(keys) // block_n)
        padded = np.zeros((blocks * block_n, 2, dim), np.uint8)
        padded[:len(keys)] = keys.view(np.uint8)
        for n in range(blocks):
            want = padded[n * block_n:][order].reshape(block_n // config.panel, config.panel, 2, dim).transpose(2, 0, 3, 1)
            plane = got[b] if lengths is None else got
            panels = block_n // config.panel
            np.testing.assert_array_equal(plane[:, (first + n) * panels:(first + n + 1) * panels], want)
    np.testing.assert_allclose(table[..., 0], dim**-0.5 * np.log2(np.e) * k_scale, rtol=1e-6)
    np.testing.assert_allclose(table[..., 1], np.broadcast_to(v_scale, (batch, 2)), rtol=1e-6)


def test_order_of_keys() -> None:
    """KEY_OF is the accumulator's columns as the A operand of the next product takes them: a lane has the same keys in both."""
    assert sorted(KEY_OF) == list(range(32))
    for place, key in enumerate(KEY_OF):
        assert place % 16 // 4 == key % 8 // 2              # the lane of its quad: 4 c + i of the operand, 8 j + 2 c + e of the accumulator


@pytest.mark.parametrize(("dim", "dtype"), [(64, "float8_e4m3fn"), (128, "float8_e4m3fn"), (128, "float32"), (64, "float16")])
def test_every_output_is_compiled(dim: int, dtype: str) -> None:
    """Beside those of test_compile.py, which are bfloat16; and with K and V of different dtypes."""
    spec = Spec("float8_e4m3fn", dim, dim, left=dim == 128, right=True, packed=True, out_dtype=dtype)
    program = launch_8bit.forward_program(spec, choose_forward_8bit(spec), "float8_e5m2", "float8_e4m3fn")
    assert compiler.complaints(compiler.build(program.source, "sm_90a")[1]) == []


def test_what_is_refused() -> None:
    hopper = absent_device("sm_90a")
    assert launch_8bit.refuses(CASES["128"], hopper) is None
    assert launch_8bit.refuses(CASES["128"], absent_device("sm_80")) is not None
    for name, call in {"head sizes": dense(1, 64, 64, 1, 1, 96), "features": dense(1, 64, 64, 1, 1, 64, softcap=3.0),
                       "features ": dense(1, 64, 64, 1, 1, 64, dropout_p=0.5, seed=1), "no keys": dense(1, 64, 0, 1, 1, 64),
                       "features  ": dense(1, 64, 64, 1, 1, 64, softmax_scale=-1.0)}.items():
        assert name.strip() in (launch_8bit.refuses(call, hopper) or ""), name
