"""Results against float64, and the caches' bits, of every feature on both engines of host memory."""
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import fastattn
from tests.tools.caches import Case
from tests.tools.guard import guarded

DTYPES = ("float32", "float64", "float16", "bfloat16")
ROTARY = [Case(f"rotary {dim} {'pairs' if pairs else 'halves'} {dtype}", dtype=dtype, rotary=(dim, pairs), rotary_dtype=table, rows=rows)
          for dim, pairs, dtype, table, rows in (
              (32, False, "float32", "float32", 1), (32, True, "float32", "float32", 5), (16, False, "bfloat16", "bfloat16", 3),
              (2, True, "bfloat16", "float32", 1), (30, False, "float16", "float32", (4, 0, 2)), (8, True, "float64", "float64", 7),
              (24, False, "float64", "float32", (1, 1, 1)))]
CASES = [
    *[Case(f"decode {dtype}", dtype=dtype) for dtype in DTYPES],
    *[Case(f"prefill {dtype}", dtype=dtype, rows=45) for dtype in DTYPES],
    *[Case(f"page {n}", page_size=n, rows=3, dtype="bfloat16") for n in (1, 2, 7, 64, 100, 256)],
    Case("contiguous", page_size=None, rows=2),
    Case("contiguous, long", page_size=None, keys=(700, 3, 259), num_heads=2, num_heads_k=1, head_dim=16),
    Case("batch_idx", page_size=None, batch_idx=True, rows=4, dtype="float16"),
    Case("batch_idx, nothing new", page_size=None, batch_idx=True, append=False, rows=4),
    Case("nothing new", append=False, keys=(1, 37, 90)),
    Case("nothing new, more queries than keys", append=False, keys=(1, 0, 9), rows=12),
    Case("packed", rows=(5, 1, 30), spare=3),
    Case("packed, bfloat16", rows=(1, 0, 90), dtype="bfloat16", page_size=8),
    Case("packed, nothing new", rows=(5, 1, 30), append=False, keys=(9, 0, 50)),
    Case("packed, contiguous", rows=(5, 1, 30), page_size=None),
    Case("no request", keys=(), rows=1),
    Case("no query", rows=0),
    Case("no key", rows=3, append=False, keys=(0, 0)),
    Case("group of 8", num_heads=16, num_heads_k=2, rows=8),
    Case("one head", num_heads=1, num_heads_k=1),
    Case("values of another size", head_dim=24, head_dim_v=40, rows=2),
    Case("wide heads", head_dim=256, head_dim_v=256, rows=2, dtype="bfloat16", keys=(3, 80)),
    Case("not causal", options={"causal": False}, rows=6),
    Case("window", options={"window": (20, 0)}, rows=6),
    Case("window both ways", options={"window": (9, 2), "causal": False}, rows=6, dtype="bfloat16"),
    Case("window of far keys", options={"window": (5, None)}, keys=(300, 33), page_size=16),
    Case("softcap", options={"softcap": 2.0}, rows=2),
    Case("scale", options={"softmax_scale": -0.3}, rows=2),
    Case("alibi", alibi="heads", rows=2),
    Case("alibi by request, packed", alibi="batch", rows=(4, 2, 6)),
    Case("sinks", sinks=True, rows=2, dtype="float16"),
    Case("sinks and nothing seen", sinks=True, append=False, keys=(0, 5), rows=3),
    Case("all of it", sinks=True, alibi="batch", options={"softcap": 5.0, "window": (40, 0), "softmax_scale": 0.4}, rows=(3, 17, 1),
         rotary=(16, False), strided=True, dtype="bfloat16"),
    Case("bhsd", layout="bhsd", rows=5),
    Case("bhsd, one row, rotary", layout="bhsd", rotary=(32, True)),
    Case("strided", strided=True, rows=3),
    Case("strided bfloat16, contiguous cache", strided=True, dtype="bfloat16", page_size=None),
    Case("shared prefix", shared=2, keys=(33, 40, 64), rows=2),
    Case("shared prefix, split", shared=9, keys=(2310, 2400), rows=1, page_size=256, num_heads=2, num_heads_k=1, head_dim=16),
    Case("split, all heads", keys=(2200,), num_heads=4, num_heads_k=2, head_dim=64, page_size=16),
    *ROTARY,
]


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, engine: str) -> None:
    case.make().check(engine)


@pytest.mark.parametrize("splits", [1, 2, 5, 1000])
@pytest.mark.parametrize("case", [case for case in CASES if "float32" in case.dtype][::3], ids=lambda case: case.name)
def test_splits(case: Case, splits: int) -> None:
    case.make().check("cpu", num_splits=splits)


def test_tables_of_zeros_and_many_heads() -> None:
    """A key's head stride of 0: all heads share one row of memory."""
    call = Case("decode").make()
    one = np.broadcast_to(call.arrays[1][:, :, :1], call.arrays[1].shape)
    call.arrays[1:] = [one, call.arrays[2], None, None]
    call.case = replace(call.case, append=False, keys=(0, 37, 90))
    out, lse = call.run("cpu", return_lse=True)
    call.judge(out, lse)


@pytest.mark.parametrize("heads", [(8, 2), (3, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_pages_of_any_size_have_the_same_bits(dtype: str, heads: tuple[int, int]) -> None:
    """All heads at once, rows read in place: tiles in one page (16 and 48), across pages (3 and 24), and contiguous."""
    random, kind = np.random.default_rng(4), np.dtype(getattr(ml_dtypes, dtype, dtype))
    k, v = (random.standard_normal((1, 2736, heads[1], 64), np.float32).astype(kind) for _ in "kv")
    q = random.standard_normal((1, 1, heads[0], 64), np.float32).astype(ml_dtypes.bfloat16 if "float8" in dtype else kind)
    results = [fastattn.attention_with_kvcache(q, k, v, cache_seqlens=[2701], window=(2600, None), engine="cpu")]
    for size in (16, 48, 3, 24):
        table = random.permutation(2736 // size + 5)[:2736 // size].astype(np.int32)
        pages = []
        for x in (k, v):
            cache = guarded(x.nbytes + 5 * size * x[0, 0].nbytes).view(kind).reshape(-1, size, heads[1], 64)
            cache[table] = x.reshape(-1, size, heads[1], 64)
            pages.append(cache)
        results.append(fastattn.attention_with_kvcache(q, *pages, cache_seqlens=[2701], block_table=table[None], window=(2600, None),
                                                       engine="cpu"))
    assert all(x.tobytes() == results[0].tobytes() for x in results[1:])
    exact = fastattn.attention(*[x.astype(np.float64) for x in (q, k[:, :2701], v[:, :2701])], window=(2600, 0), engine="reference")
    assert np.linalg.norm(results[0].astype(np.float64) - exact) < np.linalg.norm(exact) * 2.0 ** (-9 if q.dtype.itemsize == 2 else -20)


def test_latent_cache() -> None:
    """head_dim 576 with head_dim_v 512 over one cache: values are the keys' first columns."""
    random = np.random.default_rng(0)
    latent = random.standard_normal((9, 16, 1, 576), np.float32)
    table = random.permutation(9)[:6].reshape(2, 3).astype(np.int32)
    q, new = random.standard_normal((2, 3, 8, 576), np.float32), random.standard_normal((2, 3, 1, 576), np.float32)
    out = fastattn.attention_with_kvcache(q, latent, latent[..., :512], new, new[..., :512], cache_seqlens=[40, 7], block_table=table)
    for b, keys in enumerate((43, 10)):
        rows = latent[table[b]].reshape(48, 1, 576)[None, :keys]
        assert (rows[0, -3:] == new[b]).all()
        exact = fastattn.attention(q[b:b + 1].astype(np.float64), rows.astype(np.float64), rows[..., :512].astype(np.float64), causal=True)
        np.testing.assert_allclose(out[b:b + 1], exact, atol=2e-6)


# ---------------------------------------------------------------- what serving does with it
def test_chunks_are_the_whole() -> None:
    """A prompt in chunks of any length gives what one call gives, the cache to the bit."""
    random = np.random.default_rng(1)
    q, k, v = random.standard_normal((3, 1, 70, 4, 32), np.float32)
    angle = random.uniform(0, 6, (70, 16)).astype(np.float32)
    table = np.array([[3, 0, 4, 1, 2]], np.int32)
    results = []
    for cuts in ((0, 70), (0, 1, 17, 18, 50, 70)):
        k_pages, v_pages = np.full((2, 5, 16, 4, 32), np.nan, np.float32)
        outs = [fastattn.attention_with_kvcache(q[:, a:b], k_pages, v_pages, k[:, a:b], v[:, a:b], cache_seqlens=[a], block_table=table,
                                                rotary_cos=np.cos(angle), rotary_sin=np.sin(angle))
                for a, b in pairwise(cuts)]
        results.append((np.concatenate(outs, axis=1), k_pages, v_pages))
    (whole, *caches), (parts, *others) = results
    np.testing.assert_allclose(parts, whole, atol=2e-6)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(caches, others, strict=True))


def test_speculative_rows_are_written_over() -> None:
    """Rejected proposals stay in the cache until the next call writes over them; they change nothing."""
    random = np.random.default_rng(2)
    k_pages, v_pages = random.standard_normal((2, 6, 8, 2, 16), np.float32)
    table = np.array([[5, 1, 2]], np.int32)
    fresh = k_pages.copy(), v_pages.copy()
    q, k, v = random.standard_normal((3, 1, 5, 2, 16), np.float32)
    fastattn.attention_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=[10], block_table=table)
    accepted = 2                                            # of five proposals
    fastattn.attention_with_kvcache(q[:, :2], *fresh, k[:, :2], v[:, :2], cache_seqlens=[10], block_table=table)
    again = [fastattn.attention_with_kvcache(q[:, 2:4] * 2, *caches, k[:, 2:4] + 1, v[:, 2:4] - 1, cache_seqlens=[10 + accepted],
                                             block_table=table) for caches in ((k_pages, v_pages), fresh)]
    assert np.array_equal(*again)



BITS = [Case("bits decode", keys=(900, 3, 2500), num_heads=8, num_heads_k=2, head_dim=64),
        Case("bits decode bfloat16", keys=(900, 3, 2500), num_heads=8, num_heads_k=2, head_dim=64, dtype="bfloat16"),
        Case("bits packed", keys=(300, 3, 40), rows=(1, 150, 9), dtype="bfloat16", num_heads=8),
        Case("bits packed window", keys=(300, 3, 40), rows=(8, 300, 25), options={"window": (60, 0)}),
        Case("bits packed float16", keys=(300, 3, 0), rows=(30, 8, 130), dtype="float16", alibi="heads")]


@pytest.mark.parametrize("case", BITS, ids=lambda case: case.name)
def test_one_split_has_the_same_bits_in_any_batch(case: Case) -> None:
    """Alone or in a batch, packed or not, with any width of the table, in pages or not, on any number of threads."""
    call = case.make()
    q, k_pages, v_pages, k, v = call.arrays
    table, keys = call.options["block_table"], call.options["cache_seqlens"]
    rest = {name: x for name, x in call.options.items() if name in ("window", "alibi_slopes")}
    out = call.run(num_splits=1)
    threads = fastattn.get_num_threads()
    for b, n in enumerate(case.lengths):
        mine = [call.rows_of(x, b) for x in (q, k, v)]
        wide = np.concatenate([table[b:b + 1], np.full((1, 5), -9, np.int32)], axis=1)
        try:
            fastattn.set_num_threads(1)
            alone = fastattn.attention_with_kvcache(mine[0][None], k_pages, v_pages, mine[1][None], mine[2][None],
                                                    cache_seqlens=keys[b:b + 1], block_table=wide, num_splits=1, **rest)[0]
        finally:
            fastattn.set_num_threads(threads)
        assert alone.tobytes() == np.ascontiguousarray(call.rows_of(out, b)).tobytes()
        packed = fastattn.attention_with_kvcache(mine[0], k_pages, v_pages, mine[1], mine[2], cache_seqlens=keys[b:b + 1], block_table=wide,
                                                 cu_seqlens_q=[0, n], num_splits=1, **rest)
        assert packed.tobytes() == alone.tobytes()
        after = int(keys[b]) + n
        rows = [np.full((1, after + 11, *x.shape[2:]), np.nan, x.dtype) for x in (k_pages, v_pages)]
        for j in range(after):
            for x, pages in zip(rows, (k_pages, v_pages), strict=True):
                x[0, j] = pages[call.row(b, j)]
        contiguous = fastattn.attention_with_kvcache(mine[0][None], *rows, cache_seqlens=[after], num_splits=1, **rest)
        assert contiguous.tobytes() == alone.tobytes()
