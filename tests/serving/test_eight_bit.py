"""8-bit caches: bits of every code, numbers against float64, scales of every shape. test_quantize.py has quantize_fp8."""
from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import cpu
from tests.tools.guard import guarded_copy

Array = np.ndarray[Any, Any]
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BATCH, KEYS, HEADS, HEADS_K, DIM, PAGE = 3, (40, 0, 17), 4, 2, 32, 16


def error(got: Array, exact: Array) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - exact) / np.linalg.norm(exact))


def gathered(pages: Array, table: Array, n: int, scale: Array) -> Array:
    """(n, heads, dim) in float64, key by key."""
    return np.array([pages[table[j // PAGE], j % PAGE].astype(np.float64) for j in range(n)]).reshape(n, *pages.shape[2:]) * scale[:, None]


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("scales", ["none", "number", "one", "head", "batch"])
@pytest.mark.parametrize(("q_dtype", "dtype", "new"), [(q, x, new) for q, x in ((BF16, E4M3), (F16, E5M2), (E4M3, E4M3), (E4M3, E5M2))
                                                       for new in ("eight", "sixteen", "rotary") if (q, new) != (E4M3, "rotary")], ids=str)
def test_caches(engine: str, new: str, scales: str, q_dtype: Any, dtype: Any) -> None:
    random = np.random.default_rng(3)
    rows = 5
    table = random.permutation(12).reshape(BATCH, 4).astype(np.int32)

    def draw(*shape: int, to: Any) -> Array:
        return guarded_copy(random.standard_normal(shape, np.float32).astype(to))
    k_pages, v_pages = draw(12, PAGE, HEADS_K, DIM, to=dtype), draw(12, PAGE, HEADS_K, DIM, to=dtype)
    q = draw(BATCH, rows, HEADS, DIM, to=q_dtype)
    wide = BF16 if q_dtype is E4M3 else q_dtype
    k, v = (draw(BATCH, rows, HEADS_K, DIM, to=dtype if new == "eight" else wide) for _ in "kv")
    shape = {"none": None, "number": (), "one": (1,), "head": (HEADS_K,), "batch": (BATCH, HEADS_K)}[scales]
    given: dict[str, Any] = {}
    full = {name: np.ones((BATCH, HEADS_K)) for name in "qkv"}
    for name in "qkv" if q_dtype is E4M3 else "kv":
        if shape is not None:
            scale = random.uniform(0.1, 3, shape).astype(np.float32) if shape else float(np.float32(0.75))
            given[f"{name}_scale"], full[name] = scale, np.broadcast_to(np.asarray(scale, np.float64), (BATCH, HEADS_K))
    if new == "rotary":
        angle = random.uniform(0, 6, (64, DIM // 2)).astype(np.float32)
        given |= {"rotary_cos": np.cos(angle), "rotary_sin": np.sin(angle)}
    expected_k, expected_v = k_pages.copy(), v_pages.copy()
    turned = q.astype(np.float32)
    for b, n in enumerate(KEYS):
        for i in range(rows):
            at = table[b, (n + i) // PAGE], (n + i) % PAGE
            key, value = k[b, i].astype(np.float32), v[b, i].astype(np.float32)
            if new == "rotary":
                c, s, half = given["rotary_cos"][n + i], given["rotary_sin"][n + i], DIM // 2
                key = np.concatenate([key[:, :half] * c - key[:, half:] * s, key[:, :half] * s + key[:, half:] * c], axis=1)
                x = turned[b, i].copy()
                turned[b, i] = np.concatenate([x[:, :half] * c - x[:, half:] * s, x[:, :half] * s + x[:, half:] * c], axis=1)
            for pages, row, name in ((expected_k, key, "k"), (expected_v, value, "v")):
                row = row if new == "eight" else np.clip(row / full[name][b].astype(np.float32)[:, None], -LARGEST[dtype], LARGEST[dtype])
                pages[at] = row.astype(dtype)
    turned = turned.astype(q_dtype).astype(np.float64)
    out, lse = fastattn.attention_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=list(KEYS), block_table=table, engine=engine,
                                               return_lse=True, **given)
    assert k_pages.tobytes() == expected_k.tobytes() and v_pages.tobytes() == expected_v.tobytes()
    assert out.dtype == wide and lse.dtype == np.float32
    for b, n in enumerate(KEYS):
        key, value = gathered(k_pages, table[b], n + rows, full["k"][b]), gathered(v_pages, table[b], n + rows, full["v"][b])
        query = turned[b] * np.repeat(full["q"][b], HEADS // HEADS_K)[:, None]
        exact, exact_lse = fastattn.attention(query[None], key[None], value[None], causal=True, return_lse=True, engine="reference")
        assert error(out[b], exact[0]) < (2.0**-8 if wide is BF16 else 2.0**-11) and error(lse[b], exact_lse[0]) < 1e-6


def test_scales_of_one_request_and_one_head_are_no_number() -> None:
    """An array of (1, 1) is one of (batch, num_heads_k): its request has the same bits in any batch. A number is multiplied elsewhere."""
    random = np.random.default_rng(7)
    q = random.standard_normal((4, 7, 3, 96), np.float32).astype(BF16)
    k, v = (random.standard_normal((4, 80, 1, 96), np.float32).astype(E4M3) for _ in "kv")
    scales = random.uniform(0.1, 3, (2, 4, 1)).astype(np.float32)

    def run(b: slice) -> tuple[Array, Array]:
        out, lse = fastattn.attention_with_kvcache(q[b], k[b], v[b], cache_seqlens=np.array([66, 80, 13, 30])[b], k_scale=scales[0][b],
                                                   v_scale=scales[1][b], num_splits=1, return_lse=True, engine="cpu")
        return out, lse
    whole = run(np.s_[:])
    for b in range(4):
        assert all(one[0].tobytes() == x[b].tobytes() for one, x in zip(run(np.s_[b:b + 1]), whole, strict=True))


def test_rows_of_few_queries_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 16-bit ones are: no tile is converted before."""
    plans, original = list[Any](), cpu._planned
    monkeypatch.setattr(cpu, "_planned", lambda *given: plans.append(given[5]) or original(*given))
    cache, q = np.zeros((1, 2100, 2, 64), E4M3), np.zeros((1, 1, 8, 64), BF16)
    for x, k in ((q, cache), (q.astype(E4M3), cache), (q, cache.astype(BF16))):
        fastattn.attention_with_kvcache(x, k, k, cache_seqlens=[2100], engine="cpu")
    assert [(cut.direct, cut.all_heads) for cut in plans] == [(cpu._engine.vector_length("bfloat16", True)[1],) * 2] * 3


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_every_code_is_read(dtype: Any) -> None:
    """One key, whose value is the output: all 256 codes, by vectors and one by one, NaN where it is NaN."""
    codes = np.arange(256, dtype=np.uint8).view(dtype).reshape(1, 1, 1, 256)
    for dim, dim_v in ((256, 256), (7, 256)):
        values = codes[..., :dim_v]
        q, keys = np.zeros((1, 1, 1, dim), np.float16), np.zeros((1, 1, 1, dim), dtype)
        out = fastattn.attention_with_kvcache(q, keys, values, cache_seqlens=[1], engine="cpu")
        assert np.array_equal(out, values.astype(np.float16), equal_nan=True)
    for code in range(256):                                         # and as keys, in every place of a vector
        key, one = np.full((1, 1, 1, 64), 0, dtype), np.zeros((1, 1, 1, 64), np.float16)
        key[..., code % 64], one[..., code % 64] = codes[0, 0, 0, code], 1
        _, lse = fastattn.attention_with_kvcache(one, key, key, cache_seqlens=[1], softmax_scale=1.0, return_lse=True, engine="cpu")
        right = np.float32(codes[0, 0, 0, code])                    # a softmax over infinity is NaN
        np.testing.assert_allclose(lse.item(), np.nan if np.isinf(right) and right > 0 else right, rtol=1e-6, atol=1e-6)
    strided = np.zeros((1, 1, 1, 512), np.uint8)
    strided[..., ::2] = codes.view(np.uint8)
    out = fastattn.attention_with_kvcache(q, keys, strided.view(dtype)[..., ::2], cache_seqlens=[1], engine="cpu")
    assert np.array_equal(out, codes.astype(np.float16), equal_nan=True)


def test_torch_has_numpys_bits() -> None:
    torch: Any = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 16), np.float32)
    x8, scale = fastattn.quantize_fp8(x, "head")
    y8, other = fastattn.quantize_fp8(torch.from_numpy(x), "head")
    q = np.ones((2, 1, 8, 16), np.float16)
    out = fastattn.attention_with_kvcache(q, x8, x8, cache_seqlens=[5, 2], k_scale=scale, v_scale=scale)
    same = fastattn.attention_with_kvcache(torch.from_numpy(q), y8, y8, cache_seqlens=[5, 2], k_scale=other, v_scale=other)
    assert same.numpy().tobytes() == out.tobytes()


def test_errors_of_scales() -> None:
    ones, eight = np.ones((2, 4, 2, 8), BF16), np.ones((2, 4, 2, 8), E4M3)

    def fails(kind: type[Exception], text: str, *arrays: Any, **more: Any) -> None:
        with pytest.raises(kind) as raised:
            fastattn.attention_with_kvcache(*arrays, cache_seqlens=[1, 0], **more)
        assert str(raised.value).startswith(f"attention_with_kvcache(): {text}"), raised.value
    q = ones[:, :1]
    fails(ValueError, "k_scale is given, and k_cache has dtype bfloat16; expected k_scale beside 8-bit k_cache and v_cache only",
          q, ones, ones, k_scale=2.0)
    fails(ValueError, "q_scale is given, and q has dtype bfloat16; expected None, because only 8-bit", q, eight, eight, q_scale=2.0)
    fails(ValueError, "v_scale has shape (3,); expected a number, (1,), (num_heads_k,) = (2,) or", q, eight, eight, v_scale=[1.0, 2, 3])
    fails(ValueError, "v_scale has 0.0 for request 0, head 1; expected a positive finite", q, eight, eight, v_scale=[1.0, 0.0])
    fails(ValueError, "k_scale is nan; expected a positive finite number", q, eight, eight, k_scale=float("nan"))
    fails(TypeError, "k_scale has dtype float64; expected float32", q, eight, eight, k_scale=np.ones(2))
    fails(TypeError, "v_cache has dtype bfloat16; expected k_cache's dtype, float8_e4m3fn", q, eight, ones)
    fails(TypeError, "k_cache has dtype bfloat16; expected float8_e4m3fn or float8_e5m2", eight, ones, ones)
    fails(TypeError, "k_cache has dtype float8_e4m3fn; expected q's dtype, float32; 8-bit caches go with 16-bit and 8-bit q.",
          q.astype(np.float32), eight, eight)
    fails(TypeError, "k has dtype float32; expected float8_e4m3fn", q, eight, eight,
          np.ones((2, 1, 2, 8), np.float32), eight[:, :1].copy())
    angle = np.ones((4, 2), np.float32)
    fails(TypeError, "k is float8_e4m3fn, and rotary_cos is given; expected 16 bits", q, eight, eight, eight[:, :1].copy(),
          eight[:, :1].copy(), rotary_cos=angle, rotary_sin=angle)
