"""flash_attn_with_kvcache: the original's conventions, FlashAttention-2's and -3's arguments."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
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


# ---------------------------------------------------------------- qv, seqused_q, cache_leftpad
def to(library: str, x: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(x) if library == "torch" and isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("lie", ["keys first", "values first", "apart"])
def test_qv_is_part_of_the_score(lie: str, append: bool, library: str) -> None:
    """Latent attention: values are keys too. In one array they are read in place; apart, the result and the caches are the same."""
    random = np.random.default_rng(5)
    latent, table = random.standard_normal((7, 4, 1, 16 + 40), np.float32), np.array([[3, 0, 5], [6, 1, 2]], np.int32)
    k_part, v_part = (np.s_[..., :16], np.s_[..., 16:]) if lie == "keys first" else (np.s_[..., 40:], np.s_[..., :40])
    q, qv = random.standard_normal((2, 3, 4, 16), np.float32), random.standard_normal((2, 3, 4, 40), np.float32)
    new = random.standard_normal((2, 3, 1, 56), np.float32) if append else None
    keys = np.array([9, 4], np.int32)
    source = to(library, latent)
    k_cache, v_cache = source[k_part], source[v_part]
    after = latent.copy()
    if new is not None:
        for b in range(2):
            for i in range(3):
                after[table[b, (keys[b] + i) // 4], (keys[b] + i) % 4] = new[b, i]
    if lie == "apart":
        k_cache, v_cache = k_cache + 0, v_cache + 0
    brought = () if new is None else (np.ascontiguousarray(new[k_part]), np.ascontiguousarray(new[v_part]))
    q_there, qv_there, *brought_there = [to(library, x) for x in (q, qv, *brought)]
    out, lse = flash_attn_with_kvcache(q_there, k_cache, v_cache, *brought_there, qv=qv_there, causal=True,
                                       cache_seqlens=to(library, keys), page_table=to(library, table), return_softmax_lse=True)
    assert np.array_equal(k_cache, after[k_part]) and np.array_equal(v_cache, after[v_part])
    for b in range(2):
        rows = after[table[b]].reshape(1, 12, 1, 56)[:, :keys[b] + 3 * append].astype(np.float64)
        wide = np.concatenate([x[b:b + 1] for x in ((q, qv) if lie == "keys first" else (qv, q))], axis=-1).astype(np.float64)
        right, right_lse = fastattn.attention(wide, rows, rows[v_part], causal=True, softmax_scale=56**-0.5, return_lse=True)
        np.testing.assert_allclose(np.asarray(out)[b], right[0], atol=3e-6)
        np.testing.assert_allclose(np.asarray(lse)[b], right_lse[0], atol=3e-6)


def test_a_latent_cache_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.compat import kvcache

    seen: list[Any] = []
    monkeypatch.setattr(kvcache, "attention_with_kvcache", lambda *_, **given: seen.append(given["k_cache"]))
    latent = np.ones((2, 6, 1, 24), np.float32)
    for keys, values in ((np.s_[..., :8], np.s_[..., 8:]), (np.s_[..., 16:], np.s_[..., :16])):
        flash_attn_with_kvcache(np.ones((2, 1, 4, 8), np.float32), latent[keys], latent[values], qv=np.ones((2, 1, 4, 16), np.float32))
        assert seen[-1].shape == latent.shape and seen[-1].ctypes.data == latent.ctypes.data and seen[-1].strides == latent.strides


def test_qv_with_a_rotation() -> None:
    """It turns q and k alone, wherever they lie."""
    random = np.random.default_rng(6)
    latent, angle = random.standard_normal((1, 8, 1, 24), np.float32), random.uniform(0, 6, (8, 4)).astype(np.float32)
    q, qv, k, v = (random.standard_normal((1, 2, heads, dim), np.float32) for heads, dim in ((4, 8), (4, 16), (1, 8), (1, 16)))
    outs, caches = [], []
    for keys, values in ((np.s_[..., :8], np.s_[..., 8:]), (np.s_[..., 16:], np.s_[..., :16])):
        one = np.empty_like(latent)
        one[keys], one[values] = latent[..., :8], latent[..., 8:]
        outs.append(flash_attn_with_kvcache(q, one[keys], one[values], k, v, np.cos(angle), np.sin(angle), cache_seqlens=[5], qv=qv,
                                            causal=True))
        caches.append((one[keys], one[values]))
    np.testing.assert_allclose(outs[0], outs[1], atol=3e-6)
    assert all(np.array_equal(a, b) for a, b in zip(*caches, strict=True))
    pages = [x.copy() for x in (latent[..., :8], latent[..., 8:])]
    fastattn.attention_with_kvcache(q, *pages, k, v, cache_seqlens=[5], rotary_cos=np.cos(angle), rotary_sin=np.sin(angle),
                                    rotary_interleaved=True)
    assert np.array_equal(caches[0][0], pages[0]) and np.array_equal(caches[0][1], pages[1])


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rows_that_are_not_used(library: str) -> None:
    """They are as if they were not there: nothing is appended for them, and the diagonal is the last used row's."""
    case = Case("compat seqused", rows=5, keys=(4, 20, 0, 33), alibi="batch")
    arrays, options = arguments(case)
    before = [x.copy() for x in arrays]
    used = np.array([5, 2, 0, 1], np.int32)
    given = {name: to(library, x) for name, x in options.items()}
    out, lse = flash_attn_with_kvcache(*[to(library, x) for x in arrays], **given, causal=True,
                                       seqused_q=to(library, used), return_softmax_lse=True)
    out, lse = np.asarray(out), np.asarray(lse)
    assert out.shape == before[0].shape and lse.shape == (4, 4, 5)
    for b, n in enumerate(used):
        q, k, v = (x[b:b + 1, :n] for x in (before[0], before[3], before[4]))
        mine = {name: x[b:b + 1] for name, x in options.items()}
        right, top = fastattn.attention_with_kvcache(q, before[1], before[2], k, v, **mine, return_lse=True)
        np.testing.assert_allclose(out[b, :n], right[0], atol=2e-6)
        np.testing.assert_allclose(lse[b, :, :n], top[0], atol=2e-6)
        assert (out[b, n:] == 0).all() and (lse[b, :, n:] == -np.inf).all()
    assert arrays[1].tobytes() == before[1].tobytes() and arrays[2].tobytes() == before[2].tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch", "device"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("index", [None, [3, 0, 1]])
def test_keys_that_begin_later(index: Any, append: bool, packed: bool, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each request alone with a cache that begins there. "device": lengths whose values the host does not see."""
    if library == "device":
        from fastattn.compat import kvcache

        monkeypatch.setattr(kvcache, "_counts", lambda call, caller, argument, x, batch: (None, x))
    random = np.random.default_rng(7)
    k_cache, v_cache = random.standard_normal((2, 4 if index else 3, 30, 2, 16), np.float32)
    pad, keys, rows = np.array([3, 0, 11], np.int32), np.array([20, 0 if append else 9, 11 if append else 30], np.int32), [4, 4, 4]
    for b, at in enumerate(index or range(3)):
        k_cache[at, :pad[b]] = v_cache[at, :pad[b]] = k_cache[at, keys[b]:] = v_cache[at, keys[b]:] = np.nan
    cu = np.array([0, *np.cumsum(rows)], np.int32) if packed else None
    q, k, v = (random.standard_normal((12, heads, 16) if packed else (3, 4, heads, 16), np.float32) for heads in (4, 2, 2))
    right, caches = np.empty_like(q), [k_cache.copy(), v_cache.copy()]
    for b, at in enumerate(index or range(3)):
        place = np.s_[4 * b:4 * b + 4] if packed else np.s_[b]
        own = [x[at:at + 1, pad[b]:] for x in caches]
        new = [x[place][None] for x in (k, v)] if append else []
        right[place] = fastattn.attention_with_kvcache(q[place][None], *own, *new, cache_seqlens=[keys[b] - pad[b]], window=(9, 0))[0]
    given = {name: to("torch" if library == "device" else library, x) for name, x in (
        ("cache_leftpad", pad), ("cache_seqlens", keys), ("cache_batch_idx", None if index is None else np.array(index, np.int32)),
        ("cu_seqlens_q", cu))}
    arrays = [to("numpy" if library == "numpy" else "torch", x) for x in (q, k_cache, v_cache, *((k, v) if append else ()))]
    out = flash_attn_with_kvcache(*arrays, **given, causal=True, window_size=(9, -1))
    np.testing.assert_allclose(np.asarray(out), right, atol=2e-6)
    assert k_cache.tobytes() == caches[0].tobytes() and v_cache.tobytes() == caches[1].tobytes()


def test_gaps_between_the_requests_of_a_cache() -> None:
    """A copy could be read, but not appended to."""
    wide = np.random.default_rng(8).standard_normal((2, 9, 2, 8), np.float32)
    q = np.ones((2, 1, 2, 8), np.float32)
    out = flash_attn_with_kvcache(q, wide[:, :6], wide[:, :6], cache_seqlens=5, cache_leftpad=[2, 0])
    np.testing.assert_allclose(out[:1], fastattn.attention(q[:1], wide[:1, 2:5], wide[:1, 2:5]), atol=2e-6)
    with pytest.raises(ValueError, match=r"k_cache has strides .* expected no gap between its requests, because k is appended"):
        flash_attn_with_kvcache(q, wide[:, :6], wide[:, :6], q, q, cache_seqlens=5, cache_leftpad=[2, 0])


def test_packed_keys_in_pages() -> None:
    """flash_attn_varlen_func with a block table."""
    call = Case("compat pages", append=False, rows=(5, 1, 30), keys=(9, 1, 50)).make()
    options, cu = call.options, np.concatenate([[0], np.cumsum(call.case.keys)]).astype(np.int32)
    right = call.run(window=(7, 0))
    out = flash_attn_varlen_func(*call.arrays[:3], options["cu_seqlens_q"], cu, 30, 50, causal=True, window_size=(7, 0),
                                 block_table=options["block_table"])
    assert np.array_equal(out, right)
    with pytest.raises(ValueError, match=r"flash_attn_varlen_func\(\): dropout_p is given beside block_table; expected one of the two"):
        flash_attn_varlen_func(*call.arrays[:3], options["cu_seqlens_q"], cu, 30, 50, 0.1, block_table=options["block_table"])


Q, CACHE = np.ones((2, 3, 2, 8), np.float32), np.ones((2, 6, 2, 8), np.float32)


@pytest.mark.parametrize(("text", "more"), [
    ("cache_leftpad is given beside block_table; expected one of the two",
     {"cache_leftpad": [0, 0], "block_table": [[0], [1]], "cache_seqlens": 2}),
    ("cache_leftpad is given beside rotary_cos; expected one of the two; rotate q and k before",
     {"cache_leftpad": [0, 0], "k": Q, "v": Q, "rotary_cos": Q[0, :, 0], "rotary_sin": Q[0, :, 0], "cache_seqlens": 0, "causal": True}),
    ("cache_leftpad has 5 for request 1; expected a row from 0 to its cache_seqlens, 4", {"cache_leftpad": [4, 5], "cache_seqlens": 4}),
    ("cache_leftpad has shape (3,), dtype int64; expected (2,), int32 or int64", {"cache_leftpad": [0, 0, 0]}),
    ("cache_seqlens has 4 for request 0; expected at most 3, because its part of the cache has 6 rows",
     {"cache_leftpad": [1, 0], "cache_seqlens": [4, 3], "k": Q, "v": Q}),
    ("seqused_q has 4 for request 1; expected a count from 0 to 3", {"seqused_q": [0, 4]}),
    ("seqused_q is given beside cu_seqlens_q; expected one of the two",
     {"q": Q[0], "seqused_q": [1, 1], "cu_seqlens_q": [0, 1, 3], "cache_seqlens": 2}),
    ("qv has shape (2, 3, 2, 4); expected out's shape, (2, 3, 2, 8)", {"qv": Q[..., :4]}),
    ("qv is given, and headdim + headdim_v is 608; expected at most 576", {"qv": np.ones((2, 3, 2, 600), np.float32),
                                                                          "v_cache": np.ones((2, 6, 2, 600), np.float32)}),
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
        flash_attn_with_kvcache(**{"q": Q, "k_cache": CACHE.copy(), "v_cache": CACHE.copy(), **more})
    assert str(raised.value).startswith(f"flash_attn_with_kvcache(): {text}"), raised.value
