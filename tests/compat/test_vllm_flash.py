"""vllm_flash_attn's function over caches in pages and over packed keys."""
from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat.vllm_flash import flash_attn_varlen_func
from tests.tools.caches import Case


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_pages(library: str) -> None:
    """With sinks and a window, into an `out`."""
    call = Case("vllm pages", append=False, rows=(5, 1, 30), keys=(9, 1, 50), sinks=True, alibi="heads",
                options={"window": (7, 0), "softcap": 3.0}).make()
    right, lse = call.run(return_lse=True)
    call.judge(right, lse)

    def to(x: Any) -> Any:
        return pytest.importorskip("torch").from_numpy(x) if library == "torch" else x
    q, k, v = (to(x) for x in call.arrays[:3])
    given = {name: to(call.options[name]) for name in ("cu_seqlens_q", "block_table", "alibi_slopes")}
    out = to(np.full(right.shape, np.nan, np.float32))
    keys = to(call.options["cache_seqlens"])
    result, top = flash_attn_varlen_func(q, k, v, 30, max_seqlen_k=50, seqused_k=keys, **given, causal=True,
                                         window_size=[7, -1], softcap=3.0, s_aux=to(call.options["sinks"]), out=out,
                                         return_softmax_lse=True, scheduler_metadata=object(), fa_version=3)
    assert result is out and np.array_equal(np.asarray(out), right) and np.array_equal(np.asarray(top), lse)


def test_8_bit_pages_with_expanded_scales() -> None:
    call = Case("vllm pages of 8 bits", append=False, rows=(2, 1), keys=(9, 30), dtype="bfloat16").make()
    k8, v8 = (fastattn.quantize_fp8(np.nan_to_num(x)) for x in call.arrays[1:3])
    scales = {f"{name}_descale": np.broadcast_to(x[1], (2, 2)) for name, x in (("k", k8), ("v", v8))}
    given = {name: call.options[name] for name in ("cu_seqlens_q", "block_table")}
    out = flash_attn_varlen_func(call.arrays[0], k8[0], v8[0], 2, max_seqlen_k=0, seqused_k=call.options["cache_seqlens"], causal=True,
                                 num_splits=1, **given, **scales)
    right = fastattn.attention_with_kvcache(call.arrays[0], k8[0], v8[0], **call.options, k_scale=float(k8[1][0]), v_scale=float(v8[1][0]),
                                            num_splits=1)
    assert out.tobytes() == right.tobytes()


def test_packed_keys() -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((n, heads, 16), np.float32) for n, heads in ((12, 4), (30, 2), (30, 2)))
    cu_q, cu_k = np.array([0, 5, 12], np.int32), np.array([0, 12, 30], np.int32)
    out = flash_attn_varlen_func(q, k, v, 7, cu_q, 18, cu_k, np.array([12, 9], np.int32), causal=True)
    right = fastattn.attention_varlen(q, k, v, cu_q, cu_k, seqused_k=np.array([12, 9], np.int32), causal=True)
    assert np.array_equal(out, right)


def test_the_signature_is_the_originals() -> None:
    assert list(inspect.signature(flash_attn_varlen_func).parameters)[:13] == [
        "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "seqused_k", "q_v", "dropout_p", "softmax_scale",
        "causal", "window_size"]


Q, PAGES = np.ones((3, 2, 8), np.float32), np.ones((4, 2, 2, 8), np.float32)


@pytest.mark.parametrize(("text", "more"), [
    ("q_v is given; expected None; fastattn.compat.flash_attn.flash_attn_with_kvcache has it", {"q_v": Q}),
    ("dropout_p is given; expected 0", {"dropout_p": 0.1}),
    ("cp_world_size is given; expected 1", {"cp_world_size": 2}),
    ("seqused_k is None; expected the keys of each sequence, because block_table is given", {"seqused_k": None}),
    ("cu_seqlens_k is given; expected None, because block_table is given", {"cu_seqlens_k": [0, 3]}),
    ("cu_seqlens_k is None; expected where each sequence's keys begin", {"block_table": None}),
    ("seqused_k has 9 for request 0; expected a count from 0 to 4", {"seqused_k": [9]}),
    ("window_size is (-2, 0); expected counts of keys", {"window_size": (-2, 0)})])
def test_errors(text: str, more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"seqused_k": [3], "block_table": [[0, 3]], "max_seqlen_q": 3, "cu_seqlens_q": [0, 3], "max_seqlen_k": 3}
    with pytest.raises(ValueError) as raised:
        flash_attn_varlen_func(Q, PAGES, PAGES, **{**given, **more})
    assert str(raised.value).startswith(f"flash_attn_varlen_func(): {text}"), raised.value
