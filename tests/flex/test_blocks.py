"""block_mask: what its tiles see, against asking for every pair; its picture; its arguments."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastattn import BlockMask, and_masks, block_mask, or_masks
from fastattn.flex.evaluate import evaluate, places
from fastattn.flex.intervals import ALL, NONE, SOME, tile_states

RNG = np.random.default_rng(0)
DOC, TABLE = np.sort(RNG.integers(0, 6, 300)).astype(np.int32), RNG.integers(0, 4, (3, 64))
MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, q, k: q >= k,
    "sliding": lambda b, h, q, k: (q >= k) & (q - k < 70),
    "document": lambda b, h, q, k: DOC[q] == DOC[k],
    "prefix": lambda b, h, q, k: (q >= k) | (k < 45), "dilated": lambda b, h, q, k: ((q - k) % (h + 1) == 0) & (q != 5),
    "neighbours": lambda b, h, q, k: (abs(q // 16 - k // 16) <= 3) & (abs(q % 16 - k % 16) <= 3),
    "table": lambda b, h, q, k: TABLE[h, q // 8] <= TABLE[h, k // 8],
    "floats": lambda b, h, q, k: np.sqrt(q) * 1.5 > k**0.7,
    "xor": lambda b, h, q, k: (q > 100) ^ (k > 50),
    "batch": lambda b, h, q, k: q + 50 * b >= k,
    "where": lambda b, h, q, k: np.where(q > 128, k < 40, k >= 200),
    "shift": lambda b, h, q, k: (q >> 4) == (k >> 4),
    "wraps": lambda b, h, q, k: q * 2**26 > k * 2**25,
    "arithmetic": lambda b, h, q, k: np.minimum(-abs(q - k) * 2, k // 3) < np.maximum(q, 50) - 120,
    "everything": lambda b, h, q, k: q >= 0,
    "divided": lambda b, h, q, k: q / (h + 1.0) - np.exp(-k / 10) > 30,
    "outside": lambda b, h, q, k: DOC[2 * q - 100] <= DOC[k],
}


def by_pairs(mask: BlockMask, shape: tuple[int, int], block: tuple[int, int]) -> Any:
    """What its tiles see, of all pairs."""
    at = places(0, 3, *shape) | {"batch": np.arange(2)[:, None, None, None]}
    t = mask.traced
    assert t is not None
    full = np.broadcast_to(evaluate(t.program, at, t.arrays)[0], (2, 3, *shape))
    counts = []
    for x in (full, np.ones_like(full)):
        padded = np.pad(x.astype(int), [(0, 0), (0, 0), *[(0, -n % size) for n, size in zip(shape, block, strict=True)]])
        counts.append(padded.reshape(2, 3, padded.shape[2] // block[0], block[0], -1, block[1]).sum((3, 5)))
    return np.where(counts[0] == 0, NONE, np.where(counts[0] == counts[1], ALL, SOME))


@pytest.mark.parametrize("name", MASKS)
def test_tiles_against_pairs(name: str) -> None:
    for shape, block in (((300, 280), (32, 16)), ((128, 256), (64, 64)), ((7, 300), (4, 32))):
        mask = block_mask(MASKS[name], 2, 3, *shape, block=block)
        want = by_pairs(mask, shape, block)
        assert np.array_equal(mask.tiles(), want)
        assert mask.sparsity() == (want == NONE).mean() * 100
        t = mask.traced
        assert t is not None
        rough = tile_states(t.program, t.arrays, t.numbers, 2, 3, *shape, block, exact=False)
        assert ((rough == want) | (rough == SOME)).all()
        if name in ("causal", "sliding", "document", "prefix", "everything"):       # nearly nothing is left to ask
            assert (rough != want).mean() < 0.1


def test_planes_and_lengths() -> None:
    one = block_mask(MASKS["dilated"], None, 1, 100, 100, block=20)
    all_ = block_mask(MASKS["dilated"], 2, 3, 100, 100, block=20).tiles()
    assert one.tiles().shape == (1, 1, 5, 5) and np.array_equal(one.tiles()[0, 0], all_[1, 0])
    assert block_mask(MASKS["causal"], None, None, 0, 5).tiles().shape == (1, 1, 0, 1)


def test_blocks_of_an_array_and_other_tiles() -> None:
    blocks = RNG.random((3, 5, 4)) < 0.5
    both, alone = (block_mask(f, 2, 3, 90, 70, block=(20, 18), blocks=blocks) for f in (MASKS["causal"], None))
    seen = np.repeat(np.repeat(blocks, 20, 1), 18, 2)[:, :90, :70]
    for tile in ((20, 18), (10, 9), (32, 7), (90, 70)):
        for mask, pairs in ((both, seen & (np.arange(90)[:, None] >= np.arange(70))), (alone, seen)):
            got = mask.tiles(tile)
            assert got.shape[:2] == (2, 3)
            for h, m, n in np.ndindex(got.shape[1:]):
                inside = pairs[h, m * tile[0]:(m + 1) * tile[0], n * tile[1]:(n + 1) * tile[1]]
                assert (got[1, h, m, n] == NONE) <= (not inside.any()) and (got[1, h, m, n] == ALL) == inside.all()
                assert got[1, h, m, n] != NONE or not inside.any()


def test_masks_of_masks() -> None:
    seen = and_masks(MASKS["causal"], or_masks(MASKS["prefix"], MASKS["xor"]), MASKS["sliding"])
    by_hand = lambda b, h, q, k: (q >= k) & ((q >= k) | (k < 45) | ((q > 100) ^ (k > 50))) & (q - k < 70)      # noqa: E731
    want = block_mask(by_hand, None, None, 200, 200, block=32)
    assert np.array_equal(block_mask(seen, None, None, 200, 200, block=32).tiles(), want.tiles())
    for function in (and_masks, or_masks):
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\): masks are none; expected at least one function"):
            function()
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\): mask 1 is 3; expected a function"):
            function(MASKS["causal"], 3)  # type: ignore[arg-type]


def test_the_picture() -> None:
    mask = block_mask(MASKS["sliding"], None, None, 1000, 1000, block=64)
    assert str(mask).splitlines()[:4] == ["BlockMask(1000 x 1000, blocks of 64 x 64, one plane for all, of a function)", "▒" + "·" * 15,
                                          "▒▒" + "·" * 14, "▒▒▒" + "·" * 13]
    large = block_mask(MASKS["causal"], None, 8, 2**15, 2**15)
    rows = large.picture(head=3).splitlines()
    assert len(rows) <= 48 and rows[1][:3] == "█▒·" and "num_heads 8" in repr(large)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask_mod": None}, ValueError, r"mask_mod is None; .* or blocks=, a boolean array"),
    ({"mask_mod": 3}, TypeError, r"mask_mod is 3; expected a function \(b, h, q_idx, kv_idx\)"),
    ({"mask_mod": lambda b, h, q: q}, TypeError, r"mask_mod takes \(b, h, q\); expected 4 arguments"),
    ({"batch": 0}, ValueError, "batch is 0"), ({"seqlen_q": -1}, ValueError, "seqlen_q is -1"),
    ({"block": 0}, ValueError, r"block is 0; .* \(rows, keys\)"),
    ({"blocks": [[True]]}, TypeError, "blocks is a list; expected a boolean array"),
    ({"blocks": np.ones((1, 1))}, TypeError, r"blocks has dtype float64; expected bool.* blocks.astype\(bool\) works"),
    ({"blocks": np.ones((3, 1), bool)}, ValueError, r"blocks has shape \(3, 1\); .* = \(2, 3, 1, 1\)"),
    ({"device": "tpu"}, ValueError, "device is 'tpu'; expected 'cpu', 'cuda'"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_errors(number: int) -> None:
    changed, error, text = WRONG[number]
    arguments: dict[str, Any] = {"mask_mod": MASKS["causal"], "batch": 2, "num_heads": 3, "seqlen_q": 100, "seqlen_k": 100} | changed
    with pytest.raises(error, match=rf"^block_mask\(\): {text}"):
        block_mask(**arguments)


def test_a_mask_that_is_made_again_has_the_same_program() -> None:
    """What is kept with a program, as its text, is then computed once."""
    def make(planes: int | None, size: int) -> Any:
        return block_mask(lambda b, h, q, k: (q >= k) & (q - k < size + 0 * b), planes, None, 64, 64)
    assert make(None, 8).program is make(None, 8).program
    assert make(None, 8).program is not make(2, 8).program, "b counts in two planes"
    assert (make(None, 3).tiles((1, 1)) != make(None, 5).tiles((1, 1))).any()
