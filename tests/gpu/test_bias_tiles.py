"""Which biases the Hopper kernels copy by TMA. No GPU is needed."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want

BIAS = Want("bfloat16", 64, bias="bfloat16", seqlen_q=304)


def keys(want: Want, strides: tuple[int, ...] | None = None, ptr: int | None = None) -> list[str]:
    """The kernels of a call, of whose bias this is the address or these are the strides."""
    call, spec = want.call()
    bias = call.operands.bias
    if bias is not None:
        bias = replace(bias, strides=strides or bias.strides, ptr=ptr or bias.ptr)
        call = replace(call, operands=replace(call.operands, bias=bias))
    return [source.key for source in precompile.sources(call, spec, precompile.absent_device("sm_90a"))]


def has_tiles(*given: Any) -> bool:
    return any("bias_tiles" in key for key in keys(*given))


@pytest.mark.parametrize("changes", [{}, {"one_bias": True}, {"causal": True}, {"mask": True}, {"seqlen_k": 200}, {"backward": True},
                                     {"backward": True, "head_dim": 128, "dbias": False}, {"dtype": "float16", "bias": "float16"}], ids=str)
def test_copied(changes: dict[str, Any]) -> None:
    want = replace(BIAS, **changes)
    assert has_tiles(want)
    assert not [key for key in keys(want) if "bias_tiles" in key and ("bias_pairs" in key or "bias_whole" in key)]


@pytest.mark.parametrize("changes", [{"bias": "float32"}, {"packed": True}, {"seqlen_k": 301}, {"softcap": True}, {"dropout": True},
                                     {"alibi": "float32"}, {"head_dim": 128}, {"backward": True, "deterministic": True},
                                     {"backward": True, "head_dim": 160}], ids=str)
def test_loaded_by_threads(changes: dict[str, Any]) -> None:
    assert not has_tiles(replace(BIAS, **changes))


def test_addresses_and_strides() -> None:
    row = 304 * 2
    assert has_tiles(BIAS, (0, 0, row, 2)) and has_tiles(BIAS, (0, row * 304, 2 * row, 2))
    for strides in ((0, 0, 0, 2), (0, 0, row, 4), (0, 0, row + 8, 2), (0, row * 304 + 2, row, 2), (0, 0, -row, 2)):
        assert not has_tiles(BIAS, strides), strides
    assert not has_tiles(BIAS, None, (1 << 20) + 8)
