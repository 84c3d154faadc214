"""Which biases the Hopper kernels copy by TMA, and which calls one kernel of short sequences runs. No GPU is needed."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want
from fastattn.gpu.short import launch as short
from fastattn.gpu.spec import BackwardCall

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


SHORT = Want("bfloat16", 64, seqlen_q=64, backward=True)


def accepted(want: Want, **changes: Any) -> bool:
    call, _ = want.call()
    assert isinstance(call, BackwardCall)
    return short.accepts(replace(call, **changes))


@pytest.mark.parametrize("changes", [{}, {"seqlen_q": 1, "seqlen_k": 64}, {"seqlen_q": 128, "seqlen_k": 1}, {"head_dim": 40},
                                     {"dropout": True}, {"softcap": True, "causal": True}, {"bias": "bfloat16", "mask": True},
                                     {"num_heads_k": 4}, {"deterministic": True}], ids=str)
def test_short(changes: dict[str, Any]) -> None:
    want = replace(SHORT, **changes)
    assert accepted(want)
    for family in ("sm90", "sm80"):
        with gpu.use(family):
            names = ["pack_mask"] * want.mask + ["backward_short"] + ["round_dbias"] * bool(want.bias)
            assert [key.split()[0] for key in keys(want)] == names


@pytest.mark.parametrize("changes", [{"seqlen_k": 65}, {"seqlen_q": 129, "seqlen_k": 64}, {"head_dim": 65}, {"packed": True},
                                     {"sinks": "float32"}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 64}, {"dtype": "float32"},
                                     {"bias": "float32", "softcap": True}, {"bias": "float32", "deterministic": True}], ids=str)
def test_not_short(changes: dict[str, Any]) -> None:
    assert not accepted(replace(SHORT, **changes))


def test_gradients_of_any_rows() -> None:
    """The last axis of gradients is contiguous; rows may lie anywhere."""
    call, _ = SHORT.call()
    assert isinstance(call, BackwardCall)
    batch, row, head, item = call.grads.dq.strides
    for strides, taken in (((batch, row + 2, head, item), True), ((batch, row, head, 2 * item), False)):
        assert accepted(SHORT, grads=call.grads._replace(dk=replace(call.grads.dk, strides=strides))) is taken
