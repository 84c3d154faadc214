"""The CPU engine writes every element of its results, also where a length is 0, and both ways to dbias agree."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.arrays import convert
from fastattn.arrays.view import Output

Array = np.ndarray[Any, Any]


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN."""
    allocate = convert.allocate

    def filled(*arguments: Any) -> Output:
        output = allocate(*arguments)
        output.view.numpy()[...] = np.nan
        return output

    monkeypatch.setattr(convert, "allocate", filled)


def agree(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            x, y = (np.asarray(z, np.float64) for z in (a, b))
            top = np.abs(y[np.isfinite(y)]).max(initial=1)
            np.testing.assert_allclose(x, y, rtol=0.02, atol=0.02 * top)


def made(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32).astype(dtype)


def biases(batch: int, heads: int, rows: int, keys: int) -> Iterator[tuple[int, ...]]:
    yield from itertools.product(*({1, n} for n in (batch, heads, rows, keys)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k", "heads", "heads_k"), [
    (0, 5, 7, 4, 2), (2, 0, 7, 4, 2), (2, 5, 0, 4, 2), (2, 0, 0, 4, 2), (2, 5, 7, 0, 2), (0, 0, 0, 0, 1), (2, 5, 1, 4, 2), (1, 1, 1, 1, 1),
    (1, 100, 200, 2, 1), (2, 0, 300, 4, 2), (2, 130, 0, 2, 2)])
def test_dense_results_are_written(batch: int, seqlen_q: int, seqlen_k: int, heads: int, heads_k: int, dtype: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    sizes = ((seqlen_q, heads), (seqlen_k, heads_k), (seqlen_k, heads_k), (seqlen_q, heads))
    q, k, v, dout = (made((batch, s, n, 16), dtype) for s, n in sizes)
    sinks = made((heads,))
    for bias_shape in biases(batch, heads, seqlen_q, seqlen_k):
        bias = made(bias_shape, dtype)
        for options in ({}, {"causal": True}, {"window": (3, 1)}):
            results = []
            for engine in ("cpu", "reference"):
                kwargs: dict[str, Any] = {"bias": bias, "sinks": sinks, "engine": engine} | options
                out, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
                kwargs |= {"need_dbias": True, "dlse": np.ones_like(lse)}
                results.append([out, lse, *fastattn.attention_backward(dout, q, k, v, out, lse, **kwargs)])
            agree(*results)


PACKED: dict[str, tuple[list[int], list[int], list[int] | None]] = {
    "none": ([0], [0], None), "all_empty": ([0, 0, 0], [0, 0, 0], None), "no_queries": ([0, 0, 0], [0, 9, 11], None),
    "no_keys": ([0, 4, 9], [0, 0, 0], None), "outside": ([0, 4, 9], [0, 6, 9], None),
    "empty_among": ([0, 0, 5, 5, 9, 9], [0, 4, 4, 8, 9, 9], None),
    "used": ([0, 4, 9], [0, 6, 11], [2, 0]), "used_none": ([0, 4, 9], [0, 6, 11], [0, 0]), "long": ([0, 3, 200], [0, 300, 420], [210, 5]),
}


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("name", PACKED)
def test_packed_results_are_written(name: str, beyond: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also rows outside sequences, keys past seqused_k, empty sequences, and dbias beyond the lengths."""
    poisoned(monkeypatch)
    cu_q, cu_k, used = (None if x is None else np.array(x, np.int32) for x in PACKED[name])
    assert cu_q is not None and cu_k is not None
    total_q, total_k = int(cu_q[-1]) + beyond, int(cu_k[-1]) + beyond
    most_q, most_k = int(np.diff(cu_q).max(initial=0)) + beyond, int(np.diff(cu_k).max(initial=0)) + beyond
    q, k, v, dout = (made((n, h, 16)) for n, h in ((total_q, heads), (total_k, 2), (total_k, 2), (total_q, heads)))
    sinks = made((heads,))
    for bias_shape in biases(len(cu_q) - 1, heads, most_q, most_k):
        results = []
        for engine in ("cpu", "reference"):
            kwargs: dict[str, Any] = {"bias": made(bias_shape), "sinks": sinks, "engine": engine, "seqused_k": used, "max_seqlen_q": most_q,
                                      "max_seqlen_k": most_k, "causal": beyond > 0}
            out, lse = fastattn.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **kwargs)
            results.append([out, lse, *fastattn.attention_varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, need_dbias=True, **kwargs)])
        agree(*results)


# ---------------------------------------------------------------- every way to dbias
@pytest.mark.parametrize("bias_shape", sorted(biases(2, 2, 800, 300)))
@pytest.mark.parametrize(("dtype", "bias_dtype"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32"),
                                                   ("float64", "float32")])
def test_both_ways_to_dbias_agree(bias_shape: tuple[int, ...], dtype: str, bias_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate pass for dbias gives the same bits as sums in the main pass, for any number of threads."""
    import ml_dtypes

    from fastattn.cpu import dbias

    poisoned(monkeypatch)
    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v, dout = (made((2, s, n, 32), kind) for s, n in ((800, 2), (300, 1), (300, 1), (800, 2)))
    bias = made(bias_shape, bias_dtype)
    options: dict[str, Any] = {"causal": True, "softcap": 8.0, "dropout_p": 0.2, "seed": 3,
                               "mask": np.random.default_rng(1).random((1, 2, 800, 300)) < 0.9}
    out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, **options)
    options |= {"bias": bias, "need_dbias": True, "dlse": made(lse.shape, lse.dtype)}
    before, found = fastattn.get_num_threads(), []
    try:
        for threads, most in ((1, 1 << 40), (3, 1 << 40), (1, 0), (3, 0)):
            fastattn.set_num_threads(threads)
            monkeypatch.setattr(dbias, "SUMS_BYTES", most)
            found.append(fastattn.attention_backward(dout, q, k, v, out, lse, **options))
    finally:
        fastattn.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    expected = fastattn.attention_backward(dout, q, k, v, out, lse, engine="reference", **options).dbias
    agree([found[0].dbias], [expected])
