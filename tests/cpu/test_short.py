"""The forward of short sequences (short.pxi). It gives the bits of the general loop, which a call with a mask takes."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import cpu

Array = np.ndarray[Any, Any]
# batch, heads, key heads, queries, keys, head_dim of q and k, of v
SHAPES = [
    (1, 4, 4, 16, 16, 32, 32),
    (2, 12, 12, 32, 32, 32, 32),
    (1, 4, 2, 49, 49, 64, 64),          # a group in one task, keys past a vector
    (1, 4, 1, 64, 96, 64, 64),          # a block of each query head
    (1, 2, 2, 300, 77, 40, 64),         # several blocks of rows; head_dim is no multiple of a vector
    (1, 2, 2, 9, 1, 16, 16),            # one key
    (1, 2, 2, 33, 256, 130, 128),       # a whole tile; sums over head_dim in parts
]


def arrays(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[Array]:
    b, h, hk, m, n, d, dv = shape
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(size).astype(dtype) for size in ((b, m, h, d), (b, n, hk, d), (b, n, hk, dv))]


def general(*qkv: Array, **options: Any) -> Any:
    """The call by the general loop: a mask of ones leaves all scores as they are."""
    return fastattn.attention(*qkv, mask=np.ones((1, 1, 1, 1), bool), **options)


def same(got: Any, expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True)


def heads_first(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(shape: tuple[int, ...], dtype: str) -> None:
    for layout in ("bshd", "bhsd"):
        qkv = arrays(shape, dtype)
        if layout == "bhsd":
            qkv = [heads_first(x) for x in qkv]
        out, lse = general(*qkv, layout=layout, return_lse=True)
        same(fastattn.attention(*qkv, layout=layout, return_lse=True), (out, lse))
        same([fastattn.attention(*qkv, layout=layout)], [out])


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": "top_left"}, {"window": (None, 3)}, {"causal": True, "diagonal": -20},
                                     {"causal": True, "diagonal": 5}], ids=str)
def test_bits_of_causal_masks(options: dict[str, Any]) -> None:
    """Also where panels of rows attend nothing, and where a mask begins within a vector of keys."""
    for shape in SHAPES:
        for dtype in ("float32", "float64"):
            qkv = arrays(shape, dtype)
            out, lse = general(*qkv, return_lse=True, **options)
            same(fastattn.attention(*qkv, return_lse=True, **options), (out, lse))
            same([fastattn.attention(*qkv, **options)], [out])


def test_keys_after_every_row_are_never_read() -> None:
    q, k, v = arrays((1, 2, 2, 24, 64, 32, 32), "float32")
    expected = fastattn.attention(q, k, v, causal="top_left")
    k[:, 24:], v[:, 24:] = np.nan, np.inf
    same([fastattn.attention(q, k, v, causal="top_left")], [expected])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4, 1e38])
def test_bits_of_scores_of_any_size(scale: float) -> None:
    """Beyond 2^16 bits the maximum is subtracted before scaling."""
    q, k, v = arrays((1, 3, 3, 32, 40, 32, 32), "float32")
    same(fastattn.attention(q, k, v, softmax_scale=scale, return_lse=True), general(q, k, v, softmax_scale=scale, return_lse=True))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", range(3))
def test_bits_of_numbers_that_are_not_finite(which: int, value: float) -> None:
    """In one row of q, one key or one value: what other rows get stays finite."""
    qkv = arrays((1, 2, 2, 20, 37, 32, 32), "float32")
    qkv[which][0, 5, 1] = value
    with np.errstate(all="ignore"):
        same(fastattn.attention(*qkv, return_lse=True), general(*qkv, return_lse=True))
    assert np.isfinite(fastattn.attention(*qkv)[:, :, 0]).all()


def test_keys_that_weigh_nothing_in_float32() -> None:
    """All scores -inf: the rows attend nothing, and are 0 with an lse of -inf, as in the general loop."""
    q, k, v = arrays((1, 1, 1, 12, 24, 32, 32), "float32")
    q[:], k[:] = 0, 0
    q[0, 3, 0, 0], k[..., 0] = np.inf, -1
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    same((out, lse), general(q, k, v, return_lse=True))
    assert (out[0, 3] == 0).all() and lse[0, 0, 3] == -np.inf and np.isfinite(np.delete(lse, 3, -1)).all()


def test_arrays_in_memory_of_others() -> None:
    """Rows far apart, key heads that are one, and an out with gaps: nothing else is written."""
    q, k, v = arrays((2, 4, 1, 24, 32, 32, 32), "float32")
    wide = np.zeros((3, 2, 24, 4, 48), np.float32)
    wide[0, ..., :32] = q
    memory = np.full((2, 24, 4, 48), 7, np.float32)
    got = fastattn.attention(wide[0, ..., :32], k, v, out=memory[..., 8:40])
    same([got], [general(q, k, v)])
    assert (memory[..., :8] == 7).all() and (memory[..., 40:] == 7).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_threads(threads: int) -> None:
    before = cpu.get_num_threads()
    qkv = arrays((8, 12, 12, 32, 32, 32, 32), "float32")
    try:
        cpu.set_num_threads(threads)
        same([fastattn.attention(*qkv)], [general(*qkv)])
    finally:
        cpu.set_num_threads(before)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call took the short way."""
    found, prepare = list[bool](), cpu._engine.prepare

    def recorded(*arguments: Any) -> Any:
        ready = prepare(*arguments)
        found.append(ready.one_tile)
        return ready
    monkeypatch.setattr(cpu._engine, "prepare", recorded)
    return found


def test_which_calls_are_short(ways: list[bool]) -> None:
    q, k, v = arrays((1, 4, 2, 32, 48, 32, 32), "float32", seed=1)
    few = q[:, :8]
    for options in ({}, {"causal": True}, {"return_lse": True}, {"window": (None, 4)}, {"softmax_scale": 0.5}):
        fastattn.attention(q, k, v, **options)
    assert ways == [True] * 5
    for options in ({"window": (4, None)}, {"softcap": 3.0}, {"dropout_p": 0.5, "seed": 1}, {"sinks": np.zeros(4)},
                    {"alibi_slopes": np.ones(4)}, {"mask": np.ones((1, 1, 1, 1), bool)}):
        fastattn.attention(q, k, v, **options)
    fastattn.attention(few, k, v)                                       # dot products with rows of K
    fastattn.attention(*[x.astype(np.float16) for x in (q, k, v)])      # converted while they are packed
    fastattn.attention(q[..., ::2], k[..., ::2], v[..., ::2])           # rows with gaps
    fastattn.attention(q, k, v[..., :30])                               # rows of v that are no whole vectors
    long = arrays((1, 1, 1, 9, 300, 32, 32), "float32")
    fastattn.attention(*long)
    assert not any(ways[5:]) and len(ways) == 16
