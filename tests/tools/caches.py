"""Calls with key and value caches: a Case draws the arguments, and a formula of its own says what is right.

Memory that no engine may read is NaN: rows of the caches past a request's keys, pages of no request, gaps between rows. So using it
shows. Where an array ends, or for some calls where it begins, is a page that nobody may touch: reading past it ends the process, even if
the result does not show it.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import fastattn
from fastattn.arrays.view import numpy_dtype
from fastattn.tolerance import norm
from tests.tools.compare import close
from tests.tools.guard import guarded_arrays, guarded_copy
from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]
SUMS = (4e-2, 2e-3)             # of 8-bit products, the largest errors of out and lse: tests/tools/gpu/caches_8bit.py, PROMPTS


class Eight(NamedTuple):
    """What of a call has 8 bits: the caches, and perhaps q and the new keys and values. Other arrays have the case's 16-bit dtype."""

    cache: str
    scales: tuple[str, str, str] = ("none", "none", "none")     # of q, k and v: a number, or an array's shape; see `_Draw.scale`
    q: bool = False
    new: bool = False


@dataclass(frozen=True)
class Case:
    """One call. `keys` are those in the cache before it, `rows` the queries of each request; one number is for all of them."""

    name: str
    dtype: str = "float32"
    keys: tuple[int, ...] = (0, 37, 90)
    rows: int | tuple[int, ...] = 1             # a tuple packs the queries
    num_heads: int = 4
    num_heads_k: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None               # head_dim when None
    page_size: int | None = 16                  # None: contiguous
    batch_idx: bool = False
    append: bool = True
    shared: int = 0                             # the first so many pages of all requests are those of the first
    rotary: tuple[int, bool] | None = None      # rotary_dim, interleaved
    rotary_dtype: str = "float32"
    layout: str = "bshd"
    strided: bool = False                       # gaps between the rows of all arrays
    spare: int = 0                              # rows after the last request
    options: dict[str, Any] = field(default_factory=dict)
    alibi: str | None = None
    sinks: bool = False
    eight: Eight | None = None                  # 8-bit caches
    integers: str = "int32"                     # of lengths and tables: a dtype, or "list"

    @property
    def packed(self) -> bool:
        return isinstance(self.rows, tuple)

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.eight and self.eight.q else self.dtype

    @property
    def lengths(self) -> list[int]:
        """Query rows of each request."""
        return list(self.rows) if isinstance(self.rows, tuple) else [self.rows] * len(self.keys)

    def make(self) -> Call:
        return _Draw(self).call()


@dataclass
class Call:
    """The arguments of a Case. `arrays` are q, k_cache, v_cache, k, v; q, k and v are in the case's layout."""

    case: Case
    arrays: list[Any]
    options: dict[str, Any]
    table: Array                                # (batch, pages of a request): of a contiguous cache its rows

    def run(self, engine: str | None = None, **more: Any) -> Any:
        return fastattn.attention_with_kvcache(*self.arrays, **{**self.options, "engine": engine, **more})

    def row(self, b: int, key: int) -> tuple[int, int]:
        """Where a request's key is."""
        size = self.arrays[1].shape[1]
        return int(self.table[b, key // size]), key % size

    def rows_of(self, x: Array, b: int) -> Array:
        """A request's rows of q, k, v or out: (rows, heads, dim)."""
        if self.case.packed:
            start = sum(self.case.lengths[:b])
            return x[start:start + self.case.lengths[b]]
        return x[b].swapaxes(0, 1) if self.case.layout == "bhsd" else x[b]

    # ------------------------------------------------------------ what is right
    def turned(self, x: Array, b: int) -> Array:
        """Rows of a request, rotated and rounded once."""
        return self._turned(x, b).astype(x.dtype)

    def _turned(self, x: Array, b: int) -> Array:
        """And not rounded."""
        if self.case.rotary is None:
            return x
        dim, interleaved = self.case.rotary
        real = np.float64 if x.dtype == np.float64 else np.float32
        result = x.astype(real)
        for i in range(x.shape[0]):
            c, s = (self.options[name][self.case.keys[b] + i].astype(real) for name in ("rotary_cos", "rotary_sin"))
            for n in range(dim // 2):
                first, second = (2 * n, 2 * n + 1) if interleaved else (n, n + dim // 2)
                u, w = x[i, :, first].astype(real), x[i, :, second].astype(real)
                result[i, :, first], result[i, :, second] = u * c[n] - w * s[n], u * s[n] + w * c[n]
        return result

    def scale(self, name: str, b: int, real: Any) -> Array:
        """Of a request's key heads, (num_heads_k, 1)."""
        given = np.asarray(self.options.get(name, 1), np.float32)
        return np.broadcast_to(given[b] if given.ndim == 2 else given, self.case.num_heads_k).astype(real)[:, None]

    def cached(self, x: Array, b: int, dtype: Any, scale: str) -> Array:
        """New rows as the cache has them: rotated if they are keys, divided by their scale if the cache has fewer bits, rounded once."""
        wide = self._turned(x, b) if scale == "k_scale" else x
        if x.dtype == dtype or self.case.eight is None:
            return wide.astype(dtype)
        most = float(ml_dtypes.finfo(dtype).max)
        return np.clip(wide.astype(np.float32) / self.scale(scale, b, np.float32), -most, most).astype(dtype)

    def caches_after(self) -> tuple[Array, Array]:
        """What the caches must hold after the call, bit for bit."""
        k_cache, v_cache = self.arrays[1].copy(), self.arrays[2].copy()
        if self.case.append:
            for b, keys in enumerate(self.case.keys):
                k, v = (self.cached(self.rows_of(new, b), b, cache.dtype, name)
                        for new, cache, name in zip(self.arrays[3:], (k_cache, v_cache), ("k_scale", "v_scale"), strict=True))
                for i in range(len(k)):
                    k_cache[self.row(b, keys + i)], v_cache[self.row(b, keys + i)] = k[i], v[i]
        return k_cache, v_cache

    def expected(self, real: str = "float64", operand: str | None = None, widened: str | None = None) -> tuple[Array, Array]:
        """out and lse in `real`, with P rounded to `operand`: request by request, key by key. widened: to which K and V times their scales
        are rounded."""
        case, (k_cache, v_cache) = self.case, self.caches_after()
        shape = list(self.arrays[0].shape)
        shape[-1] = v_cache.shape[-1]
        out = np.zeros(shape, real)
        heads = case.num_heads
        lse = np.full((heads, shape[0]) if case.packed else (len(case.keys), heads, case.lengths[0] if case.keys else 0), -np.inf, real)
        for b, keys in enumerate(case.keys):
            q = self.turned(self.rows_of(self.arrays[0], b), b).astype(real)
            n, total = len(q), keys + (len(q) if case.append else 0)
            where = [self.row(b, j) for j in range(total)]
            k, v = (np.array([x[at] for at in where], x.dtype).reshape(total, *x.shape[2:]).astype(real) for x in (k_cache, v_cache))
            if case.eight is not None:
                q, k, v = (x * np.repeat(self.scale(name, b, real), x.shape[1] // case.num_heads_k, axis=0)
                           for x, name in ((q, "q_scale"), (k, "k_scale"), (v, "v_scale")))
                if widened is not None:
                    k, v = (x.astype(numpy_dtype(widened)).astype(real) for x in (k, v))
            for h in range(heads):
                o, top = self._head(q[:, h], k[:, h * case.num_heads_k // heads], v[:, h * case.num_heads_k // heads], b, h, operand)
                self.rows_of(out, b)[:, h] = o
                if case.packed:
                    start = sum(case.lengths[:b])
                    lse[h, start:start + n] = top
                else:
                    lse[b, h] = top
        return out, lse

    @np.errstate(all="ignore")
    def _head(self, q: Array, k: Array, v: Array, b: int, h: int, operand: str | None) -> tuple[Array, Array]:
        given, real = self.options, q.dtype
        scale = given.get("softmax_scale")
        score = q @ k.T * real.type(q.shape[1] ** -0.5 if scale is None else scale)
        if given.get("softcap"):
            score = real.type(given["softcap"]) * np.tanh(score / real.type(given["softcap"]))
        behind = np.arange(len(q))[:, None] + (len(k) - len(q)) - np.arange(len(k))
        slopes = given.get("alibi_slopes")
        if slopes is not None:
            score = score - np.asarray(slopes[h] if slopes.ndim == 1 else slopes[b, h]).astype(real) * np.abs(behind).astype(real)
        left, right = given.get("window") or (None, None)
        seen = np.ones(score.shape, bool) if left is None else behind <= left
        right = 0 if given.get("causal", True) else right
        seen = seen if right is None else seen & (-behind <= right)
        score = np.where(seen, score, -np.inf)
        sink = None if given.get("sinks") is None else given["sinks"][h].astype(real)
        top = score.max(axis=1, initial=-np.inf if sink is None else sink)
        zero = np.where(np.isfinite(top), top, 0)
        p = np.exp(score - zero[:, None])
        total = p.sum(axis=1) + (0 if sink is None else np.exp(sink - zero))
        p = np.where(total[:, None] == 0, 0, p / total[:, None])
        p = p if operand is None else p.astype(numpy_dtype(operand)).astype(real)
        return p @ np.where(seen.any(axis=0)[:, None], v, 0), zero + np.log(total)

    def judge(self, out: Any, lse: Any, rewritten: bool = False) -> None:
        """AssertionError where a result is farther from float64 than the rule of compare.py allows, or the caches' bits are wrong.

        rewritten: 8-bit caches were widened to q's 16 bits, with their scales; or, beside an 8-bit q, P has 8 bits. The naive rival does
        the same, and an 8-bit q has the errors of sums of 14 bits besides.
        """
        dtype = self.case.out_dtype
        compute = "float64" if dtype == "float64" else "float32"
        half, eight = dtype if dtype in ("float16", "bfloat16") else None, self.case.eight if rewritten else None
        products = half if eight is None or not eight.q else "float8_e4m3fn"
        exact, naive = self.expected(), self.expected("float32", products, half if eight is not None and not eight.q else None)
        of_sums = SUMS if eight is not None and eight.q else (0.0, 0.0)
        shrink = 2.0**-29 if dtype == "float64" else 1.0
        # a GPU's tanh is off by a few roundings of the cap, whatever the score
        capped = 2.0**-22 * min(self.case.options.get("softcap") or 0.0, 64.0) * shrink
        close("out", out, exact[0], naive[0], dtype, norm(exact[0]), shrink=shrink, nothing=(capped + of_sums[0]) * norm(exact[0]))
        size = float(np.sqrt(np.isfinite(exact[1]).sum()))
        close("lse", lse, exact[1], naive[1], compute, norm(exact[1]) + size, shrink=shrink,
              nothing=capped * size + of_sums[1] * (norm(exact[1]) + size))

    def check(self, engine: str | None = None, **more: Any) -> tuple[Any, Any]:
        """Run the call, into an `out` full of NaN, and judge results and caches."""
        k_cache, v_cache = self.caches_after()
        shape = list(self.arrays[0].shape)
        shape[-1] = v_cache.shape[-1]
        poisoned = np.full(shape, np.nan, NUMPY[self.case.out_dtype])
        before = self.expected_later()
        out, lse = self.run(engine, return_lse=True, out=poisoned, **more)
        assert out is poisoned
        for name, got, right in (("k_cache", self.arrays[1], k_cache), ("v_cache", self.arrays[2], v_cache)):
            assert got.tobytes() == right.tobytes(), f"{name}'s bits"
        before.judge(out, lse)
        return out, lse

    def expected_later(self) -> Call:
        """The same call with copies of what the call writes."""
        q, k_cache, v_cache, k, v = self.arrays
        return Call(self.case, [q, k_cache.copy(), v_cache.copy(), k, v], self.options, self.table)


class _Draw:
    def __init__(self, case: Case) -> None:
        self.case, self.random = case, np.random.default_rng(zlib.crc32(case.name.encode()))

    def normal(self, *shape: int, dtype: str | None = None) -> Array:
        x = self.random.standard_normal(shape, np.float32).astype(numpy_dtype(dtype or self.case.dtype))
        if not self.case.strided:
            return x
        wide = np.full((*shape[:-1], 2 * shape[-1] + 3), np.nan, x.dtype)
        view = wide[..., 1:1 + 2 * shape[-1]:2] if self.random.random() < 0.3 else wide[..., 3:3 + shape[-1]]
        view[...] = x
        return view

    def scale(self, shape: str) -> Any:
        """None, a number, or an array of a scale's shapes."""
        if shape in ("none", "number"):
            return None if shape == "none" else float(self.random.uniform(0.1, 3))
        heads, batch = self.case.num_heads_k, len(self.case.keys)
        return self.random.uniform(0.1, 3, {"one": (1,), "head": (heads,), "batch": (batch, heads)}[shape]).astype(np.float32)

    def call(self) -> Call:
        case, r = self.case, self.random
        eight = case.eight or Eight(case.dtype)
        q_dtype, new_dtype = "float8_e4m3fn" if eight.q else case.dtype, eight.cache if eight.new else case.dtype
        lengths, dim_v = case.lengths, case.head_dim_v or case.head_dim
        most = max([n + m for n, m in zip(case.keys, lengths, strict=True)], default=0)
        batch, size = len(case.keys), case.page_size or most + 2
        width = -(-most // size) + 1 if case.page_size else 1
        rows = batch * width + 3 if case.page_size or case.batch_idx else batch
        table = np.arange(batch)[:, None]
        if case.page_size or case.batch_idx:
            table = r.permutation(rows)[:batch * width].reshape(batch, width)
        table[:, :case.shared] = table[:1, :case.shared]
        k_cache, v_cache = (self.normal(rows, size, case.num_heads_k, n, dtype=eight.cache) for n in (case.head_dim, dim_v))
        used = {(int(table[b, j // size]), j % size) for b, n in enumerate(case.keys) for j in range(n)}
        for page in range(rows):
            for slot in range(size):
                if (page, slot) not in used:
                    k_cache[page, slot] = v_cache[page, slot] = np.nan
        lead = (sum(lengths) + case.spare,) if case.packed else (batch, lengths[0] if lengths else 0)

        def laid(heads: int, dim: int, dtype: str) -> Array:
            if case.layout == "bhsd" and not case.packed:
                return self.normal(lead[0], heads, lead[1], dim, dtype=dtype)
            return self.normal(*lead, heads, dim, dtype=dtype)
        options: dict[str, Any] = {"cache_seqlens": np.array(case.keys, np.int32), **case.options}
        if case.page_size:
            named = table.copy()
            for b, n in enumerate(case.keys):               # entries that no key needs name no page
                named[b, -(-(n + lengths[b]) // size):] = r.choice([-1, rows + 7])
            options["block_table"] = named.astype(np.int32)
        elif case.batch_idx:
            options["cache_batch_idx"] = table[:, 0].astype(np.int32)
        if case.packed:
            options["cu_seqlens_q"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        elif case.layout != "bshd":
            options["layout"] = case.layout
        if case.rotary is not None:
            angle = r.uniform(0, 6.3, (most + 2, case.rotary[0] // 2))
            dtype = NUMPY[case.rotary_dtype]
            options |= {"rotary_cos": np.cos(angle).astype(dtype), "rotary_sin": np.sin(angle).astype(dtype),
                        "rotary_interleaved": case.rotary[1]}
        if case.alibi:
            options["alibi_slopes"] = r.uniform(0.01, 0.5, (batch, case.num_heads)[case.alibi == "heads":]).astype(np.float32)
        if case.sinks:
            options["sinks"] = r.standard_normal(case.num_heads).astype(np.float32)
        q = laid(case.num_heads, case.head_dim, q_dtype)
        k, v = (laid(case.num_heads_k, n, new_dtype) for n in (case.head_dim, dim_v)) if case.append else (None, None)
        for name, shape in zip(("q_scale", "k_scale", "v_scale"), eight.scales, strict=True):
            if (scale := self.scale(shape)) is not None:
                options[name] = scale
        if case.integers != "int32":
            options |= {name: x.tolist() if case.integers == "list" else x.astype(case.integers) for name, x in options.items()
                        if isinstance(x, np.ndarray) and x.dtype == np.int32}
        ends = zlib.crc32(case.name.encode()) % 4 != 0
        arrays = [None if x is None else guarded_copy(x, ends) for x in (q, k_cache, v_cache, k, v)]
        return Call(case, arrays, guarded_arrays(options, ends), table)
