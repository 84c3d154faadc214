"""Philox4x32-10 against Random123's known answers, and the keep mask against its definition element by element."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.philox import keep_mask, philox4x32
from fastattn.problem import Dropout
from tests.tools.problems import BY_NAME

KNOWN = [("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
         ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
         ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1")]


def _words(text: str) -> np.ndarray[Any, Any]:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_random123_known_answers(counter: str, key: str, expected: str) -> None:
    np.testing.assert_array_equal(philox4x32(_words(counter), _words(key)), _words(expected))


def test_many_at_once() -> None:
    counters, keys = np.stack([_words(k[0]) for k in KNOWN]), np.stack([_words(k[1]) for k in KNOWN])
    np.testing.assert_array_equal(philox4x32(counters, keys), np.stack([_words(k[2]) for k in KNOWN]))


def test_mask_is_the_definition() -> None:
    """Element by element, from the definition in philox.py."""
    p, seed, offset, heads = 0.3, 0xFEDC_BA98_7654_3210, 9, 3
    keep = fastattn.dropout_mask(2, heads, 37, 41, dropout_p=p, seed=seed, offset=offset)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 36, 40), (0, 1, 8, 9), (1, 0, 17, 25), (0, 2, 31, 15), (1, 1, 5, 38), (0, 0, 24, 8)]:
        counter = np.array([(i // 16) * 8 + i % 8, (j // 16) * 4 + (j % 8) // 2, b * heads + h, offset], np.uint32)
        lane = ((i % 16) // 8) * 4 + ((j % 16) // 8) * 2 + j % 2
        word = int(philox4x32(counter, key)[lane // 2])
        assert keep[b, h, i, j] == ((word >> 16 * (lane % 2)) & 0xFFFF >= round(p * 65536)), (b, h, i, j)


def test_mask_does_not_depend_on_the_shape() -> None:
    """A larger problem and a single sequence of a batch drop the same elements."""
    dropout = Dropout(0.5, 42, 1)
    big = keep_mask(dropout, range(4), 2, 70, 90)
    np.testing.assert_array_equal(keep_mask(dropout, [2], 2, 33, 17)[0], big[2, :, :33, :17])
    assert not np.array_equal(big[0, 0], big[0, 1]) and not np.array_equal(big[0], big[1])
    assert keep_mask(dropout, [], 2, 5, 5).shape == (0, 2, 5, 5) and keep_mask(dropout, [0], 2, 0, 5).shape == (1, 2, 0, 5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    keep = fastattn.dropout_mask(1, 4, 256, 256, dropout_p=p, seed=1)
    assert abs(keep.mean() - (1 - p)) < 0.005
    assert not np.array_equal(keep, fastattn.dropout_mask(1, 4, 256, 256, dropout_p=p, seed=2))
    assert not np.array_equal(keep, fastattn.dropout_mask(1, 4, 256, 256, dropout_p=p, seed=1, offset=1))


def test_edges() -> None:
    assert fastattn.dropout_mask(1, 1, 20, 20, dropout_p=0.0, seed=None).all()
    assert not fastattn.dropout_mask(1, 1, 20, 20, dropout_p=1.0, seed=7).any()
    np.testing.assert_array_equal(fastattn.dropout_mask(1, 1, 20, 20, dropout_p=0.5, seed=-1),
                                  fastattn.dropout_mask(1, 1, 20, 20, dropout_p=0.5, seed=2**64 - 1))


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_an_engine_drops_these_elements(engine: str) -> None:
    """With v = identity the output is the dropped probability matrix itself: its zeros are the mask, packed and padded."""
    length, heads = 50, 3
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, length, heads, 8)).astype(np.float32) for _ in range(2))
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], (2, length, heads, length))
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 11, "offset": 5, "engine": engine}
    keep = fastattn.dropout_mask(2, heads, length, length, dropout_p=0.4, seed=11, offset=5)
    out = fastattn.attention(q, k, v, **options)
    np.testing.assert_array_equal(out.swapaxes(1, 2) != 0, keep)
    cut = 31                                                    # packed: the second sequence is shorter
    flat_q, flat_k = (np.concatenate([x[0], x[1, :cut]]) for x in (q, k))
    flat_v = np.concatenate([v[0], v[1, :cut]])
    cu = np.array([0, length, length + cut], np.int32)
    packed = fastattn.attention_varlen(flat_q, flat_k, flat_v, cu, cu, **options)
    np.testing.assert_array_equal(packed[:length].swapaxes(0, 1) != 0, keep[0])
    np.testing.assert_array_equal(packed[length:, :, :cut].swapaxes(0, 1) != 0, keep[1, :, :cut, :cut])


def test_named_problem_uses_it() -> None:
    kwargs = BY_NAME["dropout_0.5"].make().kwargs
    assert kwargs["dropout_p"] == 0.5 and kwargs["seed"] > 2**32
