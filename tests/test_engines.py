"""Every named problem on every engine against the reference, its arrays
before pages that end the process; and the promises about NaN, views, threads
and reused memory."""
from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from tests.tools.compare import Judge
from tests.tools.day import SEED
from tests.tools.guard import guarded_copy
from tests.tools.problems import BY_NAME, CASES, Case, Inputs

ENGINES = ("cpu",)
CASE_IDS = [case.name for case in CASES]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> Case:
    """Tests that take it run one after the other for each case."""
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def judge(case: Case) -> Judge:
    return Judge(case.make())


def test_agrees_with_reference(case: Case, judge: Judge, engine: str) -> None:
    inputs = case.make().map(guarded_copy)
    out, lse = inputs.forward(engine)
    judge.forward(out, lse)
    judge.backward(inputs.backward(guarded_copy(out), guarded_copy(lse), engine))


def test_reference_agrees_with_itself(case: Case, judge: Judge) -> None:
    """The reference on the inputs' own dtypes: only its outputs are rounded."""
    inputs = case.make()
    out, lse = inputs.forward("reference")
    judge.forward(out, lse)
    judge.backward(inputs.backward(out, lse, "reference"))


def _same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        if x is not None:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["everything_float32", "everything_packed", "decode_bfloat16", "causal_float16", "gqa_causal",
                                  "seqlen_513"])
def test_same_bits_every_run_and_any_threads(name: str) -> None:
    inputs = BY_NAME[name].make()
    before = fastattn.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            fastattn.set_num_threads(threads)
            out, lse = inputs.forward("cpu")
            results.append((out, lse, *inputs.backward(out, lse, "cpu")))
    finally:
        fastattn.set_num_threads(before)
    for result in results[1:]:
        _same(result, results[0])


def test_out_and_no_lse(engine: str) -> None:
    inputs = BY_NAME["causal_float32"].make()
    expected, _ = inputs.forward(engine)
    out = np.full_like(expected, np.nan)
    assert fastattn.attention(*inputs.args, **inputs.kwargs, out=out, engine=engine) is out
    np.testing.assert_array_equal(out, expected)
    strided = np.full((*expected.shape[:-1], 2 * expected.shape[-1]), 7, expected.dtype)
    fastattn.attention(*inputs.args, **inputs.kwargs, out=strided[..., ::2], engine=engine)
    np.testing.assert_array_equal(strided[..., ::2], expected)
    assert (strided[..., 1::2] == 7).all()


@pytest.mark.parametrize("memory", ["sliced", "transposed", "dim_first", "reversed"])
def test_views_give_the_same_bits(memory: str, engine: str) -> None:
    case = Case("views", seqlen_q=70, head_dim=64, causal=True)
    a, b = case.make(), replace(case, memory=memory).make()
    out, lse = a.forward(engine)
    _same(b.forward(engine), (out, lse))
    _same(b.backward(out, lse, engine), a.backward(out, lse, engine))


def test_inputs_are_not_written(engine: str) -> None:
    inputs = BY_NAME["everything_float32"].make()
    frozen = inputs.map(lambda x: x.copy())
    for x in (*frozen.args, *frozen.kwargs.values(), frozen.dout):
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    out, lse = frozen.forward(engine)
    frozen.backward(out, lse, engine)
    _same(frozen.args, inputs.args)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_masked_keys_never_reach_the_output(bad: float, dtype: str, engine: str) -> None:
    """A key that no row attends to may hold anything, as may a row that attends to nothing."""
    case = Case("hidden", dtype, num_heads=4, num_heads_k=2, seqlen_q=40, seqlen_k=90, head_dim=64, mask=(2, 1, 40, 90))
    inputs = case.make()
    inputs.kwargs["mask"][:, :, :, [3, 17, 64, 88, 89]] = False
    inputs.kwargs["mask"][:, :, [0, 21, 39], :] = False
    out, lse = inputs.forward(engine)
    grads = inputs.backward(out, lse, engine)
    q, k, v = inputs.args
    k[:, [3, 17, 64, 88, 89]] = v[:, [3, 17, 64, 88, 89]] = bad
    q[:, [0, 21, 39]] = inputs.dout[:, [0, 21, 39]] = bad
    poisoned = inputs.forward(engine)
    _same(poisoned, (out, lse))
    _same(inputs.backward(*poisoned, engine), grads)
    assert (out[:, [0, 21, 39]] == 0).all() and (lse[:, :, [0, 21, 39]] == -np.inf).all()


def test_nan_score_at_a_masked_position(engine: str) -> None:
    inputs = Case("nan_score", seqlen_q=40, bias=(40, 40), mask=(40, 40), causal=True).make()
    out, lse = inputs.forward(engine)
    grads = inputs.backward(out, lse, engine)
    hidden = ~inputs.kwargs["mask"] | ~np.tri(40, dtype=bool)
    inputs.kwargs["bias"][hidden] = np.nan
    poisoned = inputs.forward(engine)
    _same(poisoned, (out, lse))
    _same(inputs.backward(*poisoned, engine), grads)


def test_packed_equals_each_sequence_alone(engine: str) -> None:
    """A packed batch gives the bits of its sequences called alone, with dropout
    too, whose sequence number is accounted for."""
    inputs = BY_NAME["packed_dropout"].make()
    q, k, v, cu, _ = inputs.args
    out, _ = inputs.forward(engine)
    padded = np.zeros((2, 39, *q.shape[1:]), q.dtype), np.zeros((2, 39, *k.shape[1:]), k.dtype), np.zeros((2, 39, *v.shape[1:]), v.dtype)
    mask = np.zeros((2, 1, 1, 39), bool)
    for n in range(2):
        rows = slice(cu[n], cu[n + 1])
        for x, y in zip(padded, (q, k, v), strict=True):
            x[n, :cu[n + 1] - cu[n]] = y[rows]
        mask[n, ..., :cu[n + 1] - cu[n]] = True
    expected, _ = fastattn.attention(*padded, mask=mask, return_lse=True, engine=engine, **inputs.kwargs)
    for n in range(2):
        np.testing.assert_allclose(out[cu[n]:cu[n + 1]], expected[n, :cu[n + 1] - cu[n]], rtol=1e-5, atol=1e-6)


def test_backward_over_parts_of_the_keys(engine: str) -> None:
    """The parts are merged with merge_states; the backward of each part with the
    merged out and lse gives its share of the gradients."""
    inputs = Case("parts", seqlen_q=30, seqlen_k=64, head_dim=32, sinks=False).make()
    q, k, v = inputs.args
    out, lse = inputs.forward(engine)
    whole = inputs.backward(out, lse, engine)
    parts = [fastattn.attention(q, k[:, s], v[:, s], return_lse=True, engine=engine) for s in (slice(0, 20), slice(20, 64))]
    merged_out, merged_lse = fastattn.merge_states([p[0] for p in parts], [p[1] for p in parts])
    np.testing.assert_allclose(merged_out, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-5, atol=1e-6)
    shares = [fastattn.attention_backward(inputs.dout, q, k[:, s], v[:, s], merged_out, merged_lse, engine=engine)
              for s in (slice(0, 20), slice(20, 64))]
    np.testing.assert_allclose(shares[0].dq + shares[1].dq, whole.dq, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([s.dk for s in shares], axis=1), whole.dk, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([s.dv for s in shares], axis=1), whole.dv, rtol=1e-4, atol=1e-5)


def _leave_behind(value: float, dtype: str) -> None:
    """Calls whose inputs are all `value`, with every feature that stores something in a thread's workspace."""
    q, k, v = (np.full((2, 300, 4, dim), value, dtype) for dim in (96, 96, 80))
    for kwargs in ({}, {"dropout_p": 0.5, "seed": 1, "softcap": 3.0, "causal": True}):
        out, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
        fastattn.attention_backward(v, q, k, v, out, lse, **kwargs)


@pytest.mark.parametrize("value", [np.nan, 1e4])
def test_leftovers_of_earlier_calls_do_not_matter(value: float) -> None:
    """Half of the cases follow NaN, the others a large number; the next day it is the other way round."""
    for case in CASES[(SEED + (value == 1e4)) % 2::2]:
        inputs = case.make()
        out, lse = inputs.forward("cpu")
        grads = inputs.backward(out, lse, "cpu")
        _leave_behind(value, case.dtype if case.dtype in ("float64", "float16") else "float32")
        _same(inputs.forward("cpu"), (out, lse))
        _leave_behind(value, "float32")
        _same(inputs.backward(out, lse, "cpu"), grads)


def test_eight_callers_at_once(engine: str) -> None:
    cases = [BY_NAME[name].make() for name in ("causal_float32", "everything_float32", "packed_bfloat16", "decode_float16")]
    expected = [c.forward(engine) for c in cases]

    def work(n: int) -> None:
        for i in range(10):
            c = (n + i) % len(cases)
            out, lse = cases[c].forward(engine)
            _same((out, lse), expected[c])
            cases[c].backward(out, lse, engine)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def _child(inputs: Inputs, queue: Any) -> None:
    queue.put(inputs.forward("cpu"))


def test_forked_child() -> None:
    inputs = BY_NAME["causal_float32"].make()
    expected = inputs.forward("cpu")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(inputs, queue))
    child.start()
    try:
        _same(queue.get(timeout=60), expected)
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
