"""Calls that are parts of a larger problem: with diagonal, dropout_at, dropout_heads and float32 results they add up to the whole.

Rows, keys, heads and batch entries are cut; every feature that depends on a position is on. Errors of these arguments are here too.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_backward, attention_varlen, dropout_mask, merge_states
from tests.tools.compare import Judge, norm
from tests.tools.problems import NUMPY, Case, Inputs

Array = np.ndarray[Any, Any]
BATCH, ROWS, KEYS, HEADS, HEADS_K = 3, 50, 80, 4, 2
DROPOUT: dict[str, Any] = {"dropout_p": 0.3, "seed": 11, "offset": 2}
OPTIONS: dict[str, Any] = {"causal": True, "window": (45, None), **DROPOUT}
ENGINES = ("cpu", "reference")


class Whole:
    """A problem of float64, its result and its gradients."""

    def __init__(self, engine: str) -> None:
        draw, self.engine = np.random.default_rng(4), engine
        self.q, self.dout = draw.standard_normal((2, BATCH, ROWS, HEADS, 8))
        self.k, self.v = draw.standard_normal((2, BATCH, KEYS, HEADS_K, 8))
        self.slopes = draw.uniform(0.02, 0.5, (BATCH, HEADS))
        more: dict[str, Any] = {**OPTIONS, "alibi_slopes": self.slopes, "engine": engine}
        self.out, self.lse = attention(self.q, self.k, self.v, **more, return_lse=True)
        self.grads = attention_backward(self.dout, self.q, self.k, self.v, self.out, self.lse, **more)

    def part(self, batches: slice = np.s_[:], rows: slice = np.s_[:], keys: slice = np.s_[:], heads: slice = np.s_[:]) -> Any:
        """(out, lse, gradients) of a part; the gradients with the out and lse of the whole. Slices begin at even heads."""
        b, i, j, h = (s.start or 0 for s in (batches, rows, keys, heads))
        heads_k = slice(h // 2, None if heads.stop is None else heads.stop // 2)
        more: dict[str, Any] = {**OPTIONS, "alibi_slopes": self.slopes[batches, heads], "engine": self.engine, "dropout_at": (b, h, i, j),
                                "dropout_heads": HEADS, "diagonal": KEYS - ROWS + i - j}
        q, dout, out = (x[batches, rows, heads] for x in (self.q, self.dout, self.out))
        k, v = (x[batches, keys, heads_k] for x in (self.k, self.v))
        found = attention(q, k, v, **more, return_lse=True)
        return (*found, attention_backward(dout, q, k, v, out, self.lse[batches, heads, rows], **more))


def same(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module", params=ENGINES)
def whole(request: pytest.FixtureRequest) -> Whole:
    return Whole(request.param)


def test_rows(whole: Whole) -> None:
    """Chunked prefill: each chunk attends all keys, and nothing is cut off."""
    parts = [whole.part(rows=rows) for rows in (np.s_[0:16], np.s_[16:32], np.s_[32:])]
    same(np.concatenate([p[0] for p in parts], 1), whole.out)
    same(np.concatenate([p[1] for p in parts], 2), whole.lse)
    same(np.concatenate([p[2].dq for p in parts], 1), whole.grads.dq)
    for name in ("dk", "dv"):
        same(sum(getattr(p[2], name) for p in parts), getattr(whole.grads, name))


def test_keys(whole: Whole) -> None:
    """A step of a ring: each call has a part of the keys, and the states are merged."""
    parts = [whole.part(keys=keys) for keys in (np.s_[0:32], np.s_[32:48], np.s_[48:])]
    out, lse = merge_states([p[0] for p in parts], [p[1] for p in parts])
    same(out, whole.out)
    same(lse, whole.lse)
    same(sum(p[2].dq for p in parts), whole.grads.dq)
    for name in ("dk", "dv"):
        same(np.concatenate([getattr(p[2], name) for p in parts], 1), getattr(whole.grads, name))


@pytest.mark.parametrize("cut", [lambda at: {"heads": np.s_[at:at + 2]}, lambda at: {"batches": np.s_[at // 2 + 1:at // 2 + 2]}],
                         ids=["heads", "batches"])
def test_heads_and_batches(whole: Whole, cut: Callable[[int], dict[str, slice]]) -> None:
    for at in (0, 2):
        chosen = cut(at)
        batches, heads = chosen.get("batches", np.s_[:]), chosen.get("heads", np.s_[:])
        heads_k = slice(at // 2, at // 2 + 1) if "heads" in chosen else np.s_[:]
        out, lse, grads = whole.part(**chosen)
        same(out, whole.out[batches, :, heads])
        same(lse, whole.lse[batches, heads])
        same(grads.dq, whole.grads.dq[batches, :, heads])
        same(grads.dk, whole.grads.dk[batches, :, heads_k])


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_chunks(engine: str) -> None:
    """One call computes a chunk of each sequence, whose diagonals differ. Chunks that were cut off computed something else before."""
    draw = np.random.default_rng(5)
    lengths, starts, size = (37, 5, 70), (20, 0, 48), (17, 5, 22)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = draw.standard_normal((3, cu[-1], 2, 8))
    more: dict[str, Any] = {"causal": True, "window": (30, None), "alibi_slopes": [0.3, 0.1], "engine": engine}
    expected = attention_varlen(q, k, v, cu, cu, **more)
    rows = np.concatenate([cu[n] + np.arange(start, start + count) for n, (start, count) in enumerate(zip(starts, size, strict=True))])
    cu_q = np.concatenate([[0], np.cumsum(size)]).tolist()
    for diagonal in (list(starts), np.array(starts, np.int32), np.array(starts, np.int64)):
        same(attention_varlen(q[rows], k, v, cu_q, cu, diagonal=diagonal, **more), expected[rows])
    one = attention_varlen(q[:17], k[:37], v[:37], [0, 17], [0, 37], diagonal=np.array(20), **more)     # a 0-d array is a number
    same(one, attention_varlen(q[:17], k[:37], v[:37], [0, 17], [0, 37], diagonal=[20], **more))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_diagonal_of_its_own_is_what_names_say(engine: str) -> None:
    q, k = np.random.default_rng(6).standard_normal((2, 1, 40, 2, 8))
    for seqlen in (40, 25):
        bottom, top = ({"causal": name, "window": (9, None), "engine": engine} for name in ("bottom_right", "top_left"))
        same(attention(q[:, :seqlen], k, k, causal=True, window=(9, None), diagonal=40 - seqlen, engine=engine),
             attention(q[:, :seqlen], k, k, **bottom))
        same(attention(q[:, :seqlen], k, k, causal=True, window=(9, None), diagonal=0, engine=engine),
             attention(q[:, :seqlen], k, k, **top))


def test_repeated_calls_see_another_position() -> None:
    """Calls that differ in their position alone are not taken for each other, also where they repeat."""
    q, k = np.random.default_rng(7).standard_normal((2, 1, 16, 2, 8), np.float32)
    for _ in range(4):
        for diagonal, at in ((0, None), (5, (0, 0, 0, 16)), (5, (0, 0, 16, 0)), (-3, (1, 0, 0, 0))):
            more: dict[str, Any] = {"diagonal": diagonal, "causal": True, "dropout_at": at, **DROPOUT}
            np.testing.assert_allclose(attention(q, k, k, **more), attention(q, k, k, **more, engine="reference"), atol=1e-6)


# ---------------------------------------------------------------- dropout_mask
def test_dropout_mask_of_a_part() -> None:
    whole = dropout_mask(3, 6, 70, 90, **DROPOUT)
    part = dropout_mask(2, 3, 30, 40, **DROPOUT, dropout_at=(1, 2, 32, 48), dropout_heads=6)
    np.testing.assert_array_equal(part, whole[1:, 2:5, 32:62, 48:88])
    np.testing.assert_array_equal(dropout_mask(2, 4, 20, 20, **DROPOUT, dropout_heads=6), whole[:2, :4, :20, :20])
    large = dropout_mask(1, 1, 16, 16, **DROPOUT, dropout_at=(2**31 - 1, 2**31 - 2, 2**31 - 16, 2**31 - 16), dropout_heads=2**31 - 1)
    assert 0 < large.sum() < large.size


# ---------------------------------------------------------------- float32 results
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_results_are_not_rounded(dtype: str, engine: str) -> None:
    case = Case("wide", dtype, seqlen_q=90, num_heads=4, num_heads_k=2, head_dim=64, causal=True)
    inputs = case.make()
    wide = Inputs(inputs.args, {**inputs.kwargs, "out_dtype": "float32"}, inputs.dout, None)
    out, lse = wide.forward(engine)
    rounded, _ = inputs.forward(engine)
    assert out.dtype == np.float32 and rounded.dtype == NUMPY[dtype]
    if engine == "cpu":                                     # the reference's is rounded twice here
        np.testing.assert_array_equal(out.astype(NUMPY[dtype]), rounded)
    judge = Judge(inputs)
    assert norm(out - judge.exact[0]) < norm(rounded.astype(np.float64) - judge.exact[0]) / 1.5
    exact = judge.exact_inputs.backward(*judge.exact, "reference")
    grads, coarse = wide.backward(out, lse, engine), inputs.backward(rounded, lse, engine)
    for name in ("dq", "dk", "dv"):
        got, old, right = getattr(grads, name), getattr(coarse, name), getattr(exact, name)
        assert got.dtype == np.float32 and norm(got - right) < norm(old.astype(np.float64) - right)


@pytest.mark.parametrize("engine", ENGINES)
def test_dout_and_out_of_either_dtype(engine: str) -> None:
    """The same numbers as float32 are the same problem."""
    inputs = replace(Case("either", "bfloat16", seqlen_q=40, head_dim=32, num_heads=2), causal=True).make()
    q, k, v = inputs.args
    out, lse = inputs.forward(engine)
    more: dict[str, Any] = {"causal": True, "out_dtype": "float32", "engine": engine}
    expected = attention_backward(inputs.dout, q, k, v, out, lse, **more)
    for dout, given in ((inputs.dout.astype(np.float32), out), (inputs.dout, out.astype(np.float32)),
                        (inputs.dout.astype(np.float32), out.astype(np.float32))):
        for a, b in zip(attention_backward(dout, q, k, v, given, lse, **more), expected, strict=True):
            if b is not None:
                np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError, match=r"dout has dtype float32; expected bfloat16"):
        attention_backward(inputs.dout.astype(np.float32), q, k, v, out, lse, causal=True)


# ---------------------------------------------------------------- merge_states
def states(dtype: str, count: int) -> tuple[list[Array], list[Array]]:
    draw = np.random.default_rng(8)
    outs = [draw.standard_normal((2, 5, 3, 8), np.float32).astype(NUMPY[dtype]) for _ in range(count)]
    return outs, [draw.standard_normal((2, 3, 5), np.float32) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merge_of_mixed_dtypes(dtype: str) -> None:
    outs, lses = states(dtype, 3)
    expected, _ = merge_states([x.astype(np.float64) for x in outs], [x.astype(np.float64) for x in lses])
    mixed, lse = merge_states([outs[0].astype(np.float32), *outs[1:]], lses)
    assert mixed.dtype == np.float32 and lse.dtype == np.float32
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    same_dtype, _ = merge_states(outs, lses)
    assert same_dtype.dtype == NUMPY[dtype]
    into = np.empty(expected.shape, np.float32)
    assert merge_states(outs, lses, out=into)[0] is into
    np.testing.assert_allclose(into, expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_merge_in_place(layout: Any) -> None:
    """A running float32 state takes one part after the other."""
    outs, lses = states("bfloat16", 4)
    expected, expected_lse = merge_states([x.astype(np.float32) for x in outs], lses)
    if layout == "bhsd":
        outs = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in outs]
    out, lse = outs[0].astype(np.float32), lses[0].copy()
    for part, part_lse in zip(outs[1:], lses[1:], strict=True):
        found = merge_states([out, part], [lse, part_lse], layout=layout, out=out, lse=lse)
        assert found[0] is out and found[1] is lse
    np.testing.assert_allclose(out if layout == "bshd" else out.swapaxes(1, 2), expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)


def test_merge_refuses() -> None:
    (a, b), (x, y) = states("float32", 2)
    half, wide = a.astype(np.float16), a.astype(np.float64)
    both = np.zeros((2, 10, 3, 8), np.float32)
    for error, text, keywords in (
            (TypeError, r"outs\[1\] has dtype float64; expected float32 or float16 or bfloat16", {"outs": [a, wide]}),
            (TypeError, r"outs\[1\] has dtype float32; expected float64", {"outs": [wide, a]}),
            (ValueError, r"out shares memory with a part; expected memory of its own, or outs\[0\] itself", {"out": b}),
            (ValueError, r"out shares memory with a part", {"outs": [both[:, :5], b], "out": both[:, 1:6]}),
            (ValueError, r"lse shares memory with a part; expected memory of its own, or lses\[0\] itself", {"lse": y}),
            (TypeError, r"out has dtype float16; expected float32", {"out": half}),
            (TypeError, r"out has dtype float64; expected float16 or float32", {"outs": [half, half], "out": wide}),
            (ValueError, r"out has shape \(2, 4, 3, 8\); expected the shape = \(2, 5, 3, 8\)", {"out": a[:, :4].copy()}),
            (TypeError, r"lse has dtype float64; expected float32", {"lse": x.astype(np.float64)})):
        with pytest.raises(error, match=rf"merge_states\(\): {text}"):
            merge_states(keywords.get("outs", [a, b]), [x, y], out=keywords.get("out"), lse=keywords.get("lse"))


# ---------------------------------------------------------------- errors
Q, K = np.zeros((2, 6, 4, 8), np.float32), np.zeros((2, 9, 2, 8), np.float32)
P, ROWS_K = np.zeros((10, 4, 8), np.float32), np.zeros((12, 2, 8), np.float32)
ERRORS: dict[str, tuple[dict[str, Any], type, str]] = {
    "top_left": ({"causal": "top_left", "diagonal": 3}, ValueError,
                 "causal is 'top_left' beside diagonal; expected causal=True beside diagonal; diagonal=0 is what 'top_left' means."),
    "diagonal_float": ({"diagonal": 1.5}, TypeError, r"diagonal is 1.5; expected an integer in \[-1073741824, 1073741824\]"),
    "diagonal_far": ({"diagonal": 2**31}, ValueError, "diagonal is 2147483648; expected an integer in"),
    "diagonal_array": ({"diagonal": np.zeros(2, np.int32)}, TypeError, "diagonal is array.*; only attention_varlen takes one for each"),
    "at_without_dropout": ({"dropout_at": (0, 0, 0, 0)}, ValueError,
                           r"dropout_at is \(0, 0, 0, 0\) without dropout; expected None, because dropout_p = 0.0."),
    "heads_without_dropout": ({"dropout_heads": 4}, ValueError, "dropout_heads is 4 without dropout; expected None"),
    "at_three": ({**DROPOUT, "dropout_at": (1, 2, 3)}, ValueError,
                 r"dropout_at is \(1, 2, 3\); expected four counts \(batch, head, row, column\)."),
    "at_number": ({**DROPOUT, "dropout_at": 16}, ValueError, "dropout_at is 16; expected four counts"),
    "at_negative": ({**DROPOUT, "dropout_at": (0, 0, -16, 0)}, ValueError, r"dropout_at\[2\] is -16; expected an integer in \[0, 2147"),
    "at_row": ({**DROPOUT, "dropout_at": (0, 0, 40, 0)}, ValueError, r"dropout_at\[2\] is 40; expected a multiple of 16; 32 is the one"),
    "at_column": ({**DROPOUT, "dropout_at": (0, 0, 0, 7)}, ValueError, r"dropout_at\[3\] is 7; expected a multiple of 16; 0 is the one"),
    "heads_few": ({**DROPOUT, "dropout_at": (0, 3, 0, 0), "dropout_heads": 6}, ValueError,
                  r"dropout_heads is 6; expected at least dropout_at's head \+ num_heads = 7."),
    "heads_missing": ({**DROPOUT, "dropout_at": (0, 1, 0, 0)}, ValueError,
                      r"dropout_heads is None, which means 4; expected at least dropout_at's head \+ num_heads = 5."),
    "out_dtype": ({"out_dtype": "float16"}, ValueError,
                  "out_dtype is float16, and q has dtype float32; expected None, q's dtype, or float32 beside float16 and bfloat16"),
    "out_dtype_unknown": ({"out_dtype": "int7"}, ValueError, "out_dtype is int7, and q has dtype float32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    keywords, kind, text = ERRORS[name]
    out, lse = np.zeros_like(Q), np.zeros((2, 4, 6), np.float32)
    with pytest.raises(kind, match=rf"attention\(\): {text}"):
        attention(Q, K, K, **keywords)
    with pytest.raises(kind, match=rf"attention_backward\(\): {text}"):
        attention_backward(Q, Q, K, K, out, lse, **keywords)
    packed = {**keywords, "diagonal": np.zeros(3, np.int32)} if name == "diagonal_array" else keywords
    text = r"diagonal has shape \(3,\); expected a number or \(number of sequences,\) = \(2,\)." if name == "diagonal_array" else text
    with pytest.raises(ValueError if name == "diagonal_array" else kind, match=rf"attention_varlen\(\): {text}"):
        attention_varlen(P, ROWS_K, ROWS_K, [0, 4, 10], [0, 7, 12], **packed)


def test_errors_of_packed_diagonals() -> None:
    for diagonal, kind, text in (([1, 2**30 + 1], ValueError, "diagonal has 1073741825 for sequence 1; expected an integer in"),
                                 (np.zeros(2), TypeError, "diagonal has dtype float64; expected int32 or int64")):
        with pytest.raises(kind, match=rf"attention_varlen\(\): {text}"):
            attention_varlen(P, ROWS_K, ROWS_K, [0, 4, 10], [0, 7, 12], diagonal=diagonal)
    with pytest.raises(ValueError, match="causal is 'top_left' beside diagonal"):
        attention_varlen(P, ROWS_K, ROWS_K, [0, 4, 10], [0, 7, 12], diagonal=[1, 2], causal="top_left")
    with pytest.raises(ValueError, match=r"dropout_heads is 2; expected at least dropout_at's head \+ num_heads = 3"):
        dropout_mask(1, 3, 4, 4, **DROPOUT, dropout_heads=2)


def test_scales_beside_wide_operands_are_refused_as_before() -> None:
    with pytest.raises(ValueError, match="q_scale is given, and k has dtype float32"):
        fastattn.attention(Q, K, K, q_scale=2.0, out_dtype="float32")
