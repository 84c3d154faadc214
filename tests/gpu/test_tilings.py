"""Which tiling a call gets, where measurements chose between several (docs/log-gpu.md). Nothing is compiled."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.flex.operands import Flex
from fastattn.gpu.precompile import Want, absent_device, sources
from fastattn.gpu.runtime.packed import head_group
from tests.tools.gpu.flex import MASKS, SCORES, call_of

DEVICE = absent_device("sm_90a")


def keys(**settings: Any) -> list[str]:
    return [source.key for source in sources(*Want(**settings).call(), DEVICE)]


FORWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "197 rows": ({"head_dim": 64, "seqlen_q": 197}, "sm90 128x48 stages 2 out 4 optimistic turns blocks 2"),
    "257 rows": ({"head_dim": 64, "seqlen_q": 257}, "sm90 64x64 stages 2 out 4 optimistic blocks 3"),
    "384 rows": ({"head_dim": 64, "seqlen_q": 384}, "sm90 192x128 stages 2 out 4 optimistic turns"),
    "one step of keys": ({"head_dim": 32, "seqlen_q": 128}, "sm90 128x128 stages 2 out 4 optimistic turns"),
    "many queries over few keys": ({"head_dim": 40, "seqlen_q": 4096, "seqlen_k": 77}, "sm90 192x128 stages 2 out 4 optimistic turns"),
    "causal, 1024": ({"head_dim": 64, "causal": True, "seqlen_q": 1024}, "sm90 64x64 stages 2 out 4 optimistic blocks 3"),
    "causal, 2048": ({"head_dim": 64, "causal": True, "seqlen_q": 2048}, "sm90 192x128 stages 2 out 4 optimistic turns"),
    "window of 128": ({"head_dim": 64, "causal": True, "window": (127, 0), "sinks": "float32", "seqlen_q": 8192},
                      "sm90 64x64 stages 2 out 4 optimistic blocks 3"),
    "window of 4096": ({"head_dim": 64, "window": (4095, 0), "seqlen_q": 8192}, "sm90 192x128 stages 2 out 4 optimistic turns"),
    "few keys, dropout": ({"head_dim": 64, "dropout": True, "seqlen_q": 257}, "sm90 128x128 stages 2 out 4 optimistic turns"),
    "729 rows of 72": ({"head_dim": 72, "seqlen_q": 729}, "sm90 192x112 stages 2 out 4 optimistic turns whole_rows"),
    "256 rows of 72": ({"head_dim": 72, "seqlen_q": 256}, "sm90 128x128 stages 2 out 4 optimistic turns"),
    "causal, 80": ({"head_dim": 80, "causal": True, "seqlen_q": 2048}, "sm90 128x128 stages 2 out 4 optimistic turns"),
    "64k causal": ({"causal": True, "seqlen_q": 65536}, "sm90 128x160 stages 2 out 4 optimistic turns"),
    "32k causal": ({"causal": True, "seqlen_q": 32768}, "sm90 128x128 stages 2 out 4 optimistic turns"),
    "32 rows over 512 keys": ({"head_dim": 32, "seqlen_q": 32, "seqlen_k": 512, "batch": 128}, "sm80 32x64 warps 2 stages 1 blocks 8"),
    "33 rows over 256 keys": ({"head_dim": 32, "seqlen_q": 33, "seqlen_k": 256, "batch": 128}, "sm80 64x64 warps 4 stages 1 blocks 4"),
    "33 rows over 257 keys": ({"head_dim": 32, "seqlen_q": 33, "seqlen_k": 257, "batch": 128},
                              "sm90 64x64 stages 2 out 4 optimistic blocks 3"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    settings, expected = FORWARDS[name]
    [key] = keys(**settings)
    family, tiling = expected.split(maxsplit=1)
    assert key.startswith(f"forward_{family} ") and key.endswith(f"| {tiling}")


ONE_TILE: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "fewer queries": {"causal": True, "seqlen_q": 70},
    "top left": {"causal": "top_left", "seqlen_q": 200}, "many queries": {"seqlen_q": 4096}, "128 keys": {"seqlen_k": 128},
    "groups": {"num_heads_k": 4}, "dropout": {"dropout": True},
    "alibi": {"alibi": "float32", "causal": True}, "bias": {"bias": "bfloat16", "dbias": False},
    "dbias": {"bias": "bfloat16", "seqlen_k": 104}}
SEVERAL: dict[str, dict[str, Any]] = {
    "129 keys": {"seqlen_k": 129}, "rows without keys": {"causal": True, "seqlen_q": 101}, "window": {"window": (30, 0)},
    "mask": {"mask": True}, "packed": {"packed": True}, "head_dim": {"head_dim": 72}, "softcap": {"softcap": True},
    "float32": {"out_dtype": "float32"}, "rows beyond int32": {"seqlen_q": 2**28, "head_dim": 8}}


@pytest.mark.parametrize("name", [*ONE_TILE, *SEVERAL])
def test_sums_of_dq_only_where_tiles_are_several(name: str) -> None:
    """Without them dQ of a row that attends no key of the only tile would have no owner."""
    settings = {"head_dim": 64, "seqlen_q": 100, "seqlen_k": 100, "backward": True, **(ONE_TILE | SEVERAL)[name]}
    found = keys(**settings)
    one = name in ONE_TILE
    assert any(key.startswith("round_dq") for key in found) == (not one)
    assert any(key.startswith("backward_sm90 ") and " one_tile" in key for key in found) == one
    assert (" accum" in next(key for key in found if key.startswith("preprocess"))) == (not one)


@pytest.mark.parametrize(("settings", "split"), [
    ({"head_dim": 48}, True), ({"head_dim": 16, "causal": True}, True), ({"head_dim": 40, "num_heads_k": 4}, True),
    ({"seqlen_q": 200, "seqlen_k": 400}, True), ({"seqlen_q": 200, "seqlen_k": 150, "causal": True}, True),
    ({}, False), ({"seqlen_q": 257}, False), ({"seqlen_q": 197, "num_heads_k": 4}, False), ({"seqlen_q": 128, "seqlen_k": 400}, False),
    ({"head_dim": 32, "packed": True}, False), ({"head_dim": 32, "dropout": True}, False), ({"head_dim": 32, "deterministic": True}, False),
    ({"head_dim": 32, "seqlen_k": 100}, False), ({"head_dim": 72, "seqlen_q": 197}, False)], ids=str)
def test_a_warpgroup_for_dq_where_it_is_faster(settings: dict[str, Any], split: bool) -> None:
    [key] = [key for key in keys(**{"head_dim": 64, "backward": True} | settings) if key.startswith("backward_sm90 ")]
    assert key.endswith(" split") == split


PAIR: dict[str, dict[str, Any]] = {
    "197 rows": {"seqlen_q": 197}, "129 rows, 256 keys": {"seqlen_q": 129, "seqlen_k": 256},
    "head_dim 40": {"seqlen_q": 256, "head_dim": 40},
    "causal": {"seqlen_q": 200, "causal": True}}
NO_PAIR: dict[str, dict[str, Any]] = {
    "257 rows": {"seqlen_q": 257}, "257 keys": {"seqlen_q": 197, "seqlen_k": 257}, "128 rows": {"seqlen_q": 128, "seqlen_k": 200},
    "128 keys": {"seqlen_q": 200, "seqlen_k": 128}, "head_dim 72": {"seqlen_q": 197, "head_dim": 72},
    "groups": {"seqlen_q": 197, "num_heads_k": 4}, "causal, fewer keys": {"seqlen_q": 200, "seqlen_k": 150, "causal": True}} | {
    name: {"seqlen_q": 197, name: value} for name, value in {
        "window": (30, 0), "mask": True, "packed": True, "dropout": True, "softcap": True, "deterministic": True,
        "alibi": "float32", "bias": "bfloat16", "out_dtype": "float32"}.items()}


@pytest.mark.parametrize("name", [*PAIR, *NO_PAIR])
def test_two_tiles_of_keys_are_a_pair(name: str) -> None:
    found, pair = keys(**{"head_dim": 64, "backward": True} | (PAIR | NO_PAIR)[name]), name in PAIR
    assert any(key.startswith("backward_sm90 ") and key.endswith(" one_tile pair") for key in found) == pair
    assert not pair or not any(key.startswith("round_dq") or " accum" in key for key in found)


@pytest.mark.parametrize(("seqlen", "block"), [(256, 64), (320, 80), (512, 80), (700, 80)])
def test_steps_of_dq_alone(seqlen: int, block: int) -> None:
    """Steps of 64 keys where those of 80 have much more padding."""
    [key] = [key for key in keys(head_dim=160, seqlen_q=seqlen, backward=True) if key.startswith("backward_sm90_dq")]
    assert f"| 128x{block} " in key


def test_heads_together_where_one_fills_the_cache() -> None:
    for seqlen, heads_k, expected in ((32768, 8, 8), (65536, 8, 8), (65536, 16, 4), (65536, 1, 8), (65536, 32, 1)):
        call, _ = Want(causal=True, seqlen_q=seqlen, batch=1, num_heads=32, num_heads_k=heads_k).call()
        assert head_group(call) == expected


def test_the_longest_tiles_of_a_mask_mod_come_first_as_under_a_causal_mask() -> None:
    """One head after the other, the last head's longest tiles started when most others had ended: half of such a tile's time."""
    for backward in (False, True):
        call, _ = Want(causal=True, batch=2, num_heads=4, lse=not backward, backward=backward).call()
        for score, mask, expected in ((None, "causal", head_group(call, backward)), ("alibi", None, 1)):
            assert head_group(call_of(SCORES.get(score or ""), MASKS.get(mask or ""), backward=backward)[0], backward) == expected
        assert head_group(call, backward) > 1
    call, _ = call_of(None, None, few=4096)
    blocks = Flex(None, None, (64, 64))
    assert head_group(call) == 1 < head_group(replace(call, problem=replace(call.problem, flex=blocks)))
