"""Every bad argument of attention_with_kvcache has its error, which names the request where one is at fault. Nothing is written."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.engine import load

Arguments = dict[str, Any]


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def paged() -> Arguments:
    """Two requests with 5 and 9 keys in pages of 4, which bring 3 each."""
    return {"q": ones(2, 3, 4, 8), "k_cache": ones(7, 4, 2, 8), "v_cache": ones(7, 4, 2, 6), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 6),
            "cache_seqlens": np.array([5, 9], np.int32), "block_table": np.array([[0, 1, 9], [2, 3, 4]], np.int32)}


def contiguous() -> Arguments:
    return {"q": ones(2, 3, 4, 8), "k_cache": ones(2, 12, 2, 8), "v_cache": ones(2, 12, 2, 6), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 6),
            "cache_seqlens": [5, 9]}


def packed() -> Arguments:
    return paged() | {"q": ones(4, 4, 8), "k": ones(4, 2, 8), "v": ones(4, 2, 6), "cu_seqlens_q": [0, 3, 4]}


def rotary() -> Arguments:
    return paged() | {"rotary_cos": ones(12, 2), "rotary_sin": ones(12, 2)}


def readonly(*shape: int) -> Any:
    x = ones(*shape)
    x.flags.writeable = False
    return x


COS = "rotary_cos has shape "
Bad = tuple[Callable[[], Arguments], Arguments, type[Exception], str]
BAD: dict[str, Bad] = {
    "q_rank": (paged, {"q": ones(3, 4, 8)}, ValueError, "q has 3 axes, shape (3, 4, 8); expected 4 axes (batch, seqlen_q, num_heads, "
               "head_dim); cu_seqlens_q packs queries."),
    "cache_rank": (paged, {"k_cache": ones(7, 4, 16)}, ValueError, "k_cache has 3 axes, shape (7, 4, 16); expected 4 axes"),
    "cache_dtype": (paged, {"k_cache": ones(7, 4, 2, 8, dtype=np.float16)}, TypeError,
                    "k_cache has dtype float16; expected q's dtype, float32"),
    "q_dtype": (paged, {"q": ones(2, 3, 4, 8, dtype=np.int32)}, TypeError, "q has dtype int32; expected float32"),
    "cache_shapes": (paged, {"v_cache": ones(7, 5, 2, 6)}, ValueError, "v_cache has shape (7, 5, 2, 6); expected k_cache's shape but for"),
    "head_dim": (paged, {"k_cache": ones(7, 4, 2, 9)}, ValueError, "k_cache has head_dim 9; expected q's head_dim, 8."),
    "heads": (paged, {"k_cache": ones(7, 4, 3, 8), "v_cache": ones(7, 4, 3, 6)}, ValueError, "k_cache has 3 heads; expected a divisor of"),
    "wide": (paged, {"q": ones(2, 3, 4, 600), "k_cache": ones(7, 4, 2, 600)}, ValueError,
             "head_dim is 600; expected an integer in [1, 576]"),
    "shared_number": (paged, {"shared_prefix": -1}, ValueError,
                      "shared_prefix is -1; expected an integer in [0, 2147483647]; 0 shares nothing."),
    "shared_type": (paged, {"shared_prefix": 1.5}, TypeError, "shared_prefix is 1.5"),
    "shared_contiguous": (contiguous, {"shared_prefix": 4}, ValueError,
                          "shared_prefix is 4 without block_table; expected None or 0; a table names the pages that requests share."),
    "shared_pages": (paged, {"shared_prefix": 8, "block_table": [[0, 1, 9], [0, 3, 4]]}, ValueError,
                     "shared_prefix is 8, and block_table has page 3 for request 1, entry 1; expected the first request's there, 1; "
                     "4 keys are shared up to it."),
    "v_alone": (paged, {"k": None}, ValueError, "k is None; expected keys of q's rows, because v is given."),
    "k_alone": (paged, {"v": None}, ValueError, "v is None; expected values of q's rows, because k is given."),
    "k_rows": (paged, {"k": ones(2, 2, 2, 8)}, ValueError, "k has shape (2, 2, 2, 8); expected the shape = (2, 3, 2, 8)."),
    "k_dtype": (paged, {"k": ones(2, 3, 2, 8, dtype=np.float64)}, TypeError, "k has dtype float64; expected float32"),
    "readonly": (paged, {"v_cache": readonly(7, 4, 2, 6)}, ValueError, "v_cache is read-only; expected a writable array."),
    "one_row": (paged, {"k_cache": np.broadcast_to(ones(1, 4, 2, 8), (7, 4, 2, 8))}, ValueError, "k_cache is read-only"),
    "causal": (paged, {"causal": "top_left"}, ValueError, "causal is 'top_left'; expected True or False; the diagonal is bottom-right"),
    # lengths
    "seqlens_missing": (paged, {"cache_seqlens": None}, TypeError, "cache_seqlens is a NoneType; expected a NumPy array"),
    "seqlens_shape": (paged, {"cache_seqlens": [5]}, ValueError, "cache_seqlens has shape (1,); expected (batch,) = (2,)."),
    "seqlens_dtype": (paged, {"cache_seqlens": np.ones(2)}, TypeError, "cache_seqlens has dtype float64; expected int32 or int64"),
    "seqlens_negative": (paged, {"cache_seqlens": [5, -1]}, ValueError, "cache_seqlens has -1 for request 1; expected a count from 0 to 9"),
    "no_room": (paged, {"cache_seqlens": [5, 10]}, ValueError,
                "cache_seqlens has 10 for request 1, which appends 3; expected a count from 0 "
                "to 9, because its part of the cache has 12 rows."),
    "far": (paged, {"cache_seqlens": [2**31 - 1, 0]}, ValueError, "cache_seqlens has 2147483647 for request 0, which appends 3; expected"),
    "overflow": (paged, {"cache_seqlens": [2**63 - 1, 0]}, ValueError, "cache_seqlens has 9223372036854775807 for request 0"),
    "too_many": (paged, {"block_table": np.zeros((2, 0), np.int32), "cache_seqlens": [0, 0]}, ValueError,
                 "cache_seqlens has 0 for request 0, "
                 "which appends 3; expected room for them, its part of the cache has 0 rows."),
    "no_room_contiguous": (contiguous, {"cache_seqlens": [5, 10]}, ValueError, "cache_seqlens has 10 for request 1, which appends 3"),
    "no_keys": (contiguous, {"k": None, "v": None, "cache_seqlens": [13, 0]}, ValueError, "cache_seqlens has 13 for request 0; expected a "
                "count from 0 to 12"),
    # tables
    "table_shape": (paged, {"block_table": np.zeros((3, 3), np.int32)}, ValueError,
                    "block_table has shape (3, 3); expected (batch, pages of"),
    "table_rank": (paged, {"block_table": np.zeros(3, np.int32), "cache_seqlens": [0, 0], "k": None, "v": None}, ValueError,
                   "block_table has shape (3,)"),
    "table_dtype": (paged, {"block_table": np.zeros((2, 3), np.float32)}, TypeError,
                    "block_table has dtype float32; expected int32 or int64"),
    "page": (paged, {"block_table": np.array([[0, 1, 9], [2, 7, 4]])}, ValueError,
             "block_table has 7 for request 1, entry 1; expected a page "
             "of k_cache, from 0 to 6, because the request has 12 keys."),
    "page_negative": (paged, {"block_table": np.array([[0, -1, 9], [2, 3, 4]])}, ValueError, "block_table has -1 for request 0, entry 1"),
    "page_twice": (paged, {"block_table": np.array([[0, 3, 9], [2, 5, 3]])}, ValueError,
                   "block_table sends key 9 of request 1 to page 3, row "
                   "1, and so key 5 of request 0; expected another row of the cache for each new key"),
    "both": (paged, {"cache_batch_idx": [0, 1]}, ValueError, "cache_batch_idx is given beside block_table; expected one of the two"),
    "no_index": (contiguous, {"k_cache": ones(5, 12, 2, 8), "v_cache": ones(5, 12, 2, 6)}, ValueError, "k_cache has 5 rows of keys for 2 "
                 "requests; expected one for each request; cache_batch_idx names each request's, and block_table its pages."),
    "index_shape": (contiguous, {"cache_batch_idx": [0]}, ValueError, "cache_batch_idx has shape (1,); expected (batch,) = (2,)."),
    "index_dtype": (contiguous, {"cache_batch_idx": np.ones(2)}, TypeError, "cache_batch_idx has dtype float64; expected int32 or int64"),
    "index": (contiguous, {"cache_batch_idx": [0, 2]}, ValueError,
              "cache_batch_idx has 2 for request 1; expected a row of k_cache, from 0 to"),
    "index_twice": (contiguous, {"cache_batch_idx": [1, 1]}, ValueError,
                    "cache_batch_idx has 1 for requests 0 and 1; expected another row for"),
    # packed
    "packed_layout": (packed, {"layout": "bhsd"}, ValueError, "layout is 'bhsd'; expected nothing, because cu_seqlens_q packs q."),
    "layout": (paged, {"layout": "thd"}, ValueError, "layout is 'thd'; expected 'bshd' or 'bhsd'."),
    "packed_rank": (packed, {"q": ones(2, 3, 4, 8)}, ValueError, "q has 4 axes, shape (2, 3, 4, 8); expected 3 axes (total_q, num_heads"),
    "packed_lengths": (packed, {"cu_seqlens_q": [0, 3, 2]}, ValueError, "cu_seqlens_q starts [0, 3, 2], entry 2 is 2; expected cumulative"),
    "packed_batch": (packed, {"cu_seqlens_q": [0, 1, 2, 3]}, ValueError, "cache_seqlens has shape (2,); expected (batch,) = (3,)."),
    "packed_max": (packed, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2; expected at least the longest sequence"),
    "dense_max": (paged, {"max_seqlen_q": 3}, ValueError, "max_seqlen_q is 3; expected nothing, because cu_seqlens_q is None"),
    # rotary
    "cos_alone": (rotary, {"rotary_sin": None}, ValueError, "rotary_sin is None; expected an array of rotary_cos's shape"),
    "rotary_without_k": (rotary, {"k": None, "v": None}, ValueError, "rotary_cos is given, and k is None; expected k and v"),
    "rotary_dim": (rotary, {"rotary_cos": ones(12, 5), "rotary_sin": ones(12, 5)}, ValueError,
                   COS + "(12, 5); expected (positions, rotary_dim "
                   "/ 2), rotary_dim at most head_dim = 8."),
    "rotary_shapes": (rotary, {"rotary_sin": ones(12, 1)}, ValueError,
                      "rotary_sin has shape (12, 1); expected rotary_cos's shape = (12, 2)."),
    "rotary_short": (rotary, {"rotary_cos": ones(11, 2), "rotary_sin": ones(11, 2)}, ValueError, "rotary_cos has 11 positions; expected at "
                     "least 12, the keys of request 1 after the call."),
    "rotary_dtype": (rotary, {"rotary_cos": ones(12, 2, dtype=np.float16)}, TypeError, "rotary_cos has dtype float16; expected float32"),
    "interleaved": (paged, {"rotary_interleaved": True}, ValueError,
                    "rotary_interleaved is True; expected rotary_cos and rotary_sin beside it."),
    # options
    "splits": (paged, {"num_splits": 0}, ValueError,
               "num_splits is 0; expected an integer in [1, 2147483647]; None lets the engine choose."),
    "splits_type": (paged, {"num_splits": 1.5}, TypeError, "num_splits is 1.5; expected an integer"),
    "slopes": (paged, {"alibi_slopes": [1.0]}, ValueError, "alibi_slopes has shape (1,); expected (4,) or (2, 4)"),
    "sinks": (paged, {"sinks": [1.0]}, ValueError, "sinks has shape (1,)"),
    "window": (paged, {"window": 3}, ValueError, "window is 3"),
    "out_shape": (paged, {"out": ones(2, 3, 4, 8)}, ValueError, "out has shape (2, 3, 4, 8); expected the shape = (2, 3, 4, 6)."),
    "engine": (paged, {"engine": "sm90"}, ValueError, "engine is 'sm90' but q is on device ('cpu', 0)"),
    "keyword": (paged, {"mask": ones(2, 3)}, TypeError, "mask is no keyword of it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str) -> None:
    make, changed, kind, text = BAD[name]
    given = {**make(), **changed}
    kept = {n: given[n].copy() for n in ("k_cache", "v_cache")}
    with pytest.raises(kind) as raised:
        fastattn.attention_with_kvcache(**given)
    assert str(raised.value).startswith(f"attention_with_kvcache(): {text}"), raised.value
    assert all((given[n] == x).all() for n, x in kept.items())


@pytest.mark.parametrize("make", [paged, contiguous, packed, rotary])
def test_right(make: Callable[[], Arguments]) -> None:
    """What the bad ones are made of works."""
    fastattn.attention_with_kvcache(**make())


def test_shared_memory() -> None:
    given = contiguous()
    whole = given["k_cache"]
    with pytest.raises(ValueError, match="k shares memory with k_cache, which the call writes; expected memory of its own"):
        fastattn.attention_with_kvcache(**{**given, "k": whole[:, :3]})
    with pytest.raises(ValueError, match="out shares memory with v_cache; expected memory of its own"):
        fastattn.attention_with_kvcache(**{**given, "v_cache": (memory := ones(2, 12, 4, 6))[:, :, :2], "out": memory[:, :3]})
    with pytest.raises(ValueError, match="out shares memory with v; expected"):
        fastattn.attention_with_kvcache(**{**given, "v": (memory := ones(2, 3, 4, 6))[:, :, :2], "out": memory})


@pytest.mark.parametrize(("changes", "text"), [
    ({"cache_seqlens": [5, 10]}, "cache_seqlens has 10 for request 1, which appends 3; expected a count from 0 to 9"),
    ({"block_table": [[0, 1, 9], [2, 3, 7]]}, "block_table has 7 for request 1, entry 2; expected a page of k_cache, from 0 to 6"),
    ({"block_table": [[0, 1, 9], [0, 1, 1]]}, "block_table sends key 9 of request 1 to page 1, row 1"),
    ({"block_table": [[0, 1, 9], [1, 3, 4]], "shared_prefix": 5}, "shared_prefix is 5, and block_table has page 1 for request 1, entry 0"),
    ({"block_table": None, "cache_seqlens": [1, 0], "cache_batch_idx": [0, 0]}, "cache_batch_idx has 0 for requests 0 and 1")], ids=str)
def test_values_that_a_device_has(changes: Arguments, text: str) -> None:
    """What FASTATTN_CHECK=1 checks: lengths and tables are copies, all other arrays stay where they are."""
    from fastattn.arrays import convert
    from fastattn.serving.problem import Given, check_values

    changes, shared = {name: x for name, x in changes.items() if name != "shared_prefix"}, changes.get("shared_prefix")
    given = {name: None if x is None else convert.view(np.asarray(x), "test", name) for name, x in {**paged(), **changes}.items()}
    here = Given(**{**dict.fromkeys(Given._fields), **given})
    away = {name: replace(x, device=("cuda", 0)) for name, x in given.items() if name in ("q", "k_cache", "v_cache", "k", "v")}
    with pytest.raises(ValueError) as raised:
        check_values("attention_with_kvcache", here._replace(**away), None, shared)
    assert str(raised.value).startswith(f"attention_with_kvcache(): {text}"), raised.value
    check_values("attention_with_kvcache", here._replace(**away, **{
        name: convert.view(np.asarray(x), "test", name) for name, x in paged().items() if name in changes}, cache_batch_idx=None), None)


def test_layout_of_shapes_is_said() -> None:
    given = contiguous() | {"layout": "bhsd", "q": ones(2, 4, 3, 8), "k": ones(2, 3, 2, 8)}
    with pytest.raises(ValueError, match="k has shape") as raised:
        fastattn.attention_with_kvcache(**given)
    assert raised.value.__notes__ == ["Shapes of q, k and v in this message are in the order (batch, seqlen, num_heads, head_dim)."]


def test_engines_that_take_no_caches() -> None:
    """Another package's engine that knows no caches is not given any; the GPU's say so themselves."""
    with fastattn.register_engine("plain", lambda *given: None, None, lambda problem: None, "cpu"), \
            pytest.raises(fastattn.UnsupportedError, match="plain: it takes no key and value caches"), fastattn.use_engine("plain"):
        fastattn.attention_with_kvcache(**paged())
    given = paged()
    try:
        load("gpu", "test")
    except ImportError:
        return
    found = fastattn.explain(fastattn.attention_with_kvcache, **given, device="sm_90a")
    assert found.engine is None and found.reasons["simt"] == "it reads no caches"
    assert "rows are not whole, aligned pieces of 16 bytes" in found.reasons["sm80"]
    read_only = {**given, "k": None, "v": None, "q": ones(2, 3, 4, 8).astype(np.float16), "k_cache": ones(7, 4, 2, 8).astype(np.float16),
                 "v_cache": ones(7, 4, 2, 8).astype(np.float16)}
    found = fastattn.explain(fastattn.attention_with_kvcache, **read_only, device="sm_90a")
    assert found.engine == "sm90" and found.kernels[0].startswith("forward_decode") and "paged" in found.kernels[0]
    appended = {**read_only, "k": ones(2, 3, 2, 8).astype(np.float16), "v": ones(2, 3, 2, 8).astype(np.float16)}
    found = fastattn.explain(fastattn.attention_with_kvcache, **appended, device="sm_90a")
    assert [kernel.split()[0] for kernel in found.kernels] == ["append", "forward_decode"]
    assert fastattn.explain(fastattn.attention_with_kvcache, **given).engine == "cpu"
