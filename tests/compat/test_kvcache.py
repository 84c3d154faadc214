"""flash_attn_with_kvcache: the original's conventions, FlashAttention-2's and -3's arguments."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat.flash_attn import flash_attn_with_kvcache
from tests.tools.caches import Case

ROTARY = Case("compat rotary", rotary=(16, True), rows=3)


def arguments(case: Case) -> tuple[list[Any], dict[str, Any]]:
    call = case.make()
    return call.arrays, call.options


def test_paged_with_rotary() -> None:
    """rotary_interleaved is the original's default, causal is not."""
    arrays, options = arguments(ROTARY)
    copies = [x.copy() for x in arrays]
    right, lse = fastattn.attention_with_kvcache(*copies, **options, return_lse=True)
    del options["rotary_interleaved"]
    out, softmax_lse = flash_attn_with_kvcache(*arrays, **options, causal=True, return_softmax_lse=True)
    assert np.array_equal(out, right) and np.array_equal(softmax_lse, lse)
    assert arrays[1].tobytes() == copies[1].tobytes() and arrays[2].tobytes() == copies[2].tobytes()


def test_defaults() -> None:
    """Not causal, no window, no cap, the whole cache; an int is every request's length."""
    q, k_cache, v_cache, *_ = arguments(Case("compat whole", page_size=None, append=False, rows=3, keys=(8, 8)))[0]
    k_cache, v_cache = k_cache[:, :8], v_cache[:, :8]
    right = fastattn.attention(q, k_cache, v_cache)
    np.testing.assert_allclose(flash_attn_with_kvcache(q, k_cache, v_cache), right, atol=2e-6)
    np.testing.assert_allclose(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=8, num_splits=2), right, atol=2e-6)
    cut = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=np.int32(5), window_size=(2, -1), softcap=3.0)
    np.testing.assert_allclose(cut, fastattn.attention(q, k_cache[:, :5], v_cache[:, :5], window=(2, None), softcap=3.0), atol=2e-6)


def test_arguments_of_flash_attention_3() -> None:
    """page_table, packed queries, scales; what tunes the original's kernels changes nothing."""
    arrays, options = arguments(Case("compat packed", rows=(3, 1, 9), dtype="bfloat16"))
    x8 = [fastattn.quantize_fp8(np.nan_to_num(x), "head") for x in arrays[1:3]]
    caches = [x.copy() for x, _ in x8]
    right = fastattn.attention_with_kvcache(arrays[0], *caches, *arrays[3:], **options, k_scale=x8[0][1], v_scale=x8[1][1])
    options["page_table"], cu = options.pop("block_table"), options["cu_seqlens_q"]
    out = flash_attn_with_kvcache(arrays[0], *[x for x, _ in x8], *arrays[3:], **options, causal=True, cu_seqlens_k_new=cu.copy(),
                                  k_descale=x8[0][1], v_descale=x8[1][1], pack_gqa=True, sm_margin=4, scheduler_metadata=object())
    assert out.tobytes() == right.tobytes()


Q, CACHE = np.ones((2, 3, 2, 8), np.float32), np.ones((2, 6, 2, 8), np.float32)


@pytest.mark.parametrize(("text", "more"), [
    ("cache_leftpad is given; expected None; a request's keys begin", {"cache_leftpad": [0, 0]}),
    ("qv is given; expected None; with one cache", {"qv": Q}),
    ("rotary_seqlens is given; expected None", {"rotary_seqlens": [1, 1]}),
    ("attention_chunk is given; expected 0", {"attention_chunk": 64}),
    ("page_table is given beside block_table; expected one of the two", {"page_table": [[0]], "block_table": [[0]]}),
    ("cu_seqlens_k_new is not cu_seqlens_q; expected the same lengths", {"cu_seqlens_k_new": [0, 3]}),
    ("cache_seqlens is None; expected the keys of each request", {"k": Q, "v": Q}),
    ("rotary_cos is given for 3 rows without causal and window_size; expected causal=True, or one row",
     {"k": Q, "v": Q, "rotary_cos": Q[0, :, 0], "rotary_sin": Q[0, :, 0], "cache_seqlens": 0}),
    ("cache_seqlens has 7 for request 0; expected a count from 0 to 6", {"cache_seqlens": 7}),
    ("page_table has 9 for request 1, entry 0; expected a page", {"page_table": [[0], [9]], "cache_seqlens": 2}),
    ("k_descale is given, and k_cache has dtype float32; expected k_descale beside", {"k_descale": np.ones((2, 2), np.float32)}),
    ("window_size is 3; expected a pair (left, right), -1 for no limit", {"window_size": 3})])
def test_errors(text: str, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as raised:
        flash_attn_with_kvcache(Q, CACHE.copy(), CACHE.copy(), **more)
    assert str(raised.value).startswith(f"flash_attn_with_kvcache(): {text}"), raised.value
