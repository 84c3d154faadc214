"""The named problems: each feature alone, pairs, edge shapes. One list for every engine, the fuzzer's cases and the bench.

A Case says what the arguments look like; `make()` draws them from the case's own seed. Memory that no engine may read
(rows of no sequence, keys past seqused_k, gaps of strided views) is NaN, so that touching it shows.
"""
from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

import fastattn

Array = np.ndarray[Any, Any]
NUMPY = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "float16": np.dtype(np.float16),
         "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one problem: `args` are q, k, v and, packed, cu_seqlens_q and cu_seqlens_k."""

    args: tuple[Array, ...]
    kwargs: dict[str, Any]
    dout: Array
    dlse: Array | None

    @property
    def packed(self) -> bool:
        return len(self.args) == 5

    @property
    def dtype(self) -> str:
        return str(self.args[0].dtype.name)

    def forward(self, engine: str | None = None) -> tuple[Any, Any]:
        """(out, lse) of the public function."""
        function = fastattn.attention_varlen if self.packed else fastattn.attention
        out, lse = function(*self.args, **self.kwargs, return_lse=True, engine=engine)
        return out, lse

    def backward(self, out: Any, lse: Any, engine: str | None = None) -> fastattn.Grads:
        function: Any = fastattn.attention_varlen_backward if self.packed else fastattn.attention_backward
        q, k, v, *lengths = self.args
        grads: fastattn.Grads = function(self.dout, q, k, v, out, lse, *lengths, **self.kwargs, dlse=self.dlse, engine=engine,
                                         need_dbias=self.kwargs.get("bias") is not None)
        return grads

    def map(self, f: Callable[[Array], Any]) -> Inputs:
        """The same problem with every array passed through f: another dtype, library or device."""
        kwargs = {name: f(x) if isinstance(x, np.ndarray) else x for name, x in self.kwargs.items()}
        return Inputs(tuple(f(x) for x in self.args), kwargs, f(self.dout), None if self.dlse is None else f(self.dlse))

    def float64(self) -> Inputs:
        wide = self.map(lambda x: x.astype(np.float64) if x.dtype.kind not in "iub" or x.dtype == NUMPY["bfloat16"] else x)
        wide.kwargs.pop("out_dtype", None)
        return wide


@dataclass(frozen=True)
class Case:
    """One problem. `bias` and `mask` are shapes; lengths_q makes it packed; `memory` says how q, k, v and dout lie in memory."""

    name: str
    dtype: str = "float32"
    batch: int = 2
    num_heads: int = 2
    num_heads_k: int | None = None              # num_heads when None
    seqlen_q: int = 37
    seqlen_k: int | None = None                 # seqlen_q when None
    head_dim: int = 16
    head_dim_v: int | None = None               # head_dim when None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None                    # "heads" or "batch"
    bias: tuple[int, ...] | None = None
    bias_dtype: str | None = None               # dtype when None
    bias_inf: bool = False                      # some -inf, and row 1 all -inf
    bias_size: float = 1.0                      # standard deviation
    mask: tuple[int, ...] | None = None
    mask_kind: str = "random"                   # or "blocks": whole blocks hidden, beside single pairs; "hidden": everything
    mask_memory: str = "contiguous"             # or "queries": neighbouring queries are next to each other; "shifted": nothing aligned
    sinks: bool = False
    dropout_p: float = 0.0
    dropout_at: tuple[int, int, int, int] | None = None
    dropout_heads: int | None = None
    diagonal: int | tuple[int, ...] | None = None       # a tuple has a key for each sequence
    out_dtype: str | None = None
    dlse: bool = False
    layout: str = "bshd"
    memory: str = "contiguous"
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None    # lengths_q when None
    used_k: tuple[int, ...] | None = None
    spare: int = 0                              # rows after the last sequence

    @property
    def packed(self) -> bool:
        return self.lengths_q is not None

    @property
    def placed(self) -> bool:
        """Whether it has a keyword that fastattn.torch and fastattn.jax do not have."""
        return not (self.diagonal is None and self.dropout_at is None and self.dropout_heads is None and self.out_dtype is None)

    def make(self) -> Inputs:
        """The arguments, from a seed that is the case's name."""
        draw = _Draw(zlib.crc32(self.name.encode()), self)
        heads, heads_k = self.num_heads, self.num_heads_k or self.num_heads
        dim_v = self.head_dim_v or self.head_dim
        seqlen_k = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        if self.lengths_q is None:
            lead_q: tuple[int, ...] = (self.batch, self.seqlen_q)
            lead_k: tuple[int, ...] = (self.batch, seqlen_k)
        else:
            lengths_k = self.lengths_q if self.lengths_k is None else self.lengths_k
            lead_q, lead_k = (sum(self.lengths_q) + self.spare,), (sum(lengths_k) + self.spare,)
        q, dout = draw.normal(*lead_q, heads, self.head_dim), draw.normal(*lead_q, heads, dim_v)
        k, v = draw.normal(*lead_k, heads_k, self.head_dim), draw.normal(*lead_k, heads_k, dim_v)
        kwargs = self._numbers()
        kwargs.update(draw.features(len(self.lengths_q) if self.lengths_q is not None else self.batch))
        lse_shape = (heads, lead_q[0]) if self.packed else (self.batch, heads, self.seqlen_q)
        dlse = draw.random.standard_normal(lse_shape).astype("float64" if self.dtype == "float64" else "float32") if self.dlse else None
        lengths: tuple[Array, ...] = ()
        if self.lengths_q is not None:
            cu_q, cu_k = _cumulative(self.lengths_q), _cumulative(lengths_k)
            lengths = (cu_q, cu_k)
            if self.used_k is not None:
                kwargs["seqused_k"] = np.array(self.used_k, np.int32)
            _poison(q, cu_q, None)
            _poison(dout, cu_q, None)
            _poison(k, cu_k, self.used_k)
            _poison(v, cu_k, self.used_k)
        elif self.layout != "bshd":
            kwargs["layout"] = self.layout
        swap = self.layout == "bhsd" and not self.packed
        q, k, v, dout = (_laid(np.ascontiguousarray(x.swapaxes(1, 2)) if swap else x, self.memory) for x in (q, k, v, dout))
        return Inputs((q, k, v, *lengths), kwargs, dout, dlse)

    def _numbers(self) -> dict[str, Any]:
        names = ("causal", "window", "softmax_scale", "softcap", "diagonal", "out_dtype")
        kwargs: dict[str, Any] = {name: getattr(self, name) for name in names}
        kwargs = {name: x for name, x in kwargs.items() if x is not None and x is not False}
        if self.dropout_p:
            kwargs.update(dropout_p=self.dropout_p, seed=0x1234_5678_9ABC_DEF0, offset=3)
            kwargs.update({name: x for name in ("dropout_at", "dropout_heads") if (x := getattr(self, name)) is not None})
        if isinstance(self.diagonal, tuple):
            kwargs["diagonal"] = np.array(self.diagonal, np.int32)
        return kwargs


class _Draw:
    """Random arguments of one case."""

    def __init__(self, seed: int, case: Case) -> None:
        self.random, self.case = np.random.default_rng(seed), case

    def normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape, dtype=np.float32).astype(NUMPY[self.case.dtype])

    def features(self, batch: int) -> dict[str, Any]:
        c, random, features = self.case, self.random, dict[str, Any]()
        if c.alibi is not None:
            shape = (c.num_heads,) if c.alibi == "heads" else (batch, c.num_heads)
            features["alibi_slopes"] = random.uniform(0.02, 0.5, shape).astype(np.float32)
        if c.bias is not None:
            bias = (c.bias_size * random.standard_normal(c.bias)).astype(NUMPY[c.bias_dtype or c.dtype])
            if c.bias_inf:
                bias[random.random(c.bias) < 0.2] = -np.inf
                bias[..., 1 % max(c.bias[-2], 1):1 % max(c.bias[-2], 1) + 1, :] = -np.inf
            features["bias"] = bias
        if c.mask is not None:
            features["mask"] = self.mask(c.mask)
        if c.sinks:
            features["sinks"] = random.standard_normal(c.num_heads).astype("float64" if c.dtype == "float64" else "float32")
        return features

    def mask(self, shape: tuple[int, ...]) -> Array:
        """The boolean mask."""
        c, seen = self.case, self.random.random(shape) < 0.7
        if c.mask_kind == "hidden":
            seen[...] = False
        elif c.mask_kind == "blocks":           # of 50 queries and 70 keys: most tiles have some, and some rows see nothing
            rows, keys = (-(-n // size) for n, size in zip(shape[-2:], (50, 70), strict=True))
            coarse = self.random.random((*shape[:-2], rows, keys)) < 0.4
            seen &= coarse.repeat(50, -2)[..., :shape[-2], :].repeat(70, -1)[..., :shape[-1]]
        if c.mask_memory == "queries":
            seen = np.ascontiguousarray(seen.swapaxes(-1, -2)).swapaxes(-1, -2)
        elif c.mask_memory == "shifted":
            wider = np.zeros((*shape[:-1], shape[-1] + 3), bool)
            wider[..., 1:-2] = seen
            seen = wider[..., 1:-2]
        return seen


def _cumulative(lengths: tuple[int, ...]) -> Array:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _poison(x: Array, cu: Array, used: tuple[int, ...] | None) -> None:
    """NaN in the rows that belong to no sequence or lie past seqused_k."""
    x[cu[-1]:] = np.nan
    for n, count in enumerate(used or ()):
        x[cu[n] + count:cu[n + 1]] = np.nan


def _laid(x: Array, memory: str) -> Array:
    """The same values with other strides; gaps hold NaN."""
    if memory == "contiguous":
        return x
    if memory == "sliced":                      # part of wider rows, every second token
        base = np.full((*x.shape[:-3], 2 * x.shape[-3], x.shape[-2], x.shape[-1] + 3), np.nan, x.dtype)
        view = base[..., ::2, :, 1:x.shape[-1] + 1]
    elif memory == "transposed":                # heads before tokens in memory
        view = np.empty((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]), x.dtype).swapaxes(-2, -3)
    elif memory == "dim_first":                 # head_dim is the slow axis: nothing is contiguous along a row
        view = np.empty((x.shape[-1], *x.shape[:-1]), x.dtype)
        view = np.moveaxis(view, 0, -1)
    elif memory == "reversed":                  # negative strides
        view = np.empty_like(x)[..., ::-1, :, ::-1]
    else:
        raise ValueError(memory)
    view[...] = x
    return view


# ---------------------------------------------------------------- the list
def _dtypes() -> Iterator[Case]:
    for dtype in NUMPY:
        yield Case(f"plain_{dtype}", dtype)
        yield Case(f"causal_{dtype}", dtype, seqlen_q=70, causal=True, head_dim=64, dlse=True)
        yield Case(f"packed_{dtype}", dtype, lengths_q=(17, 0, 40, 1), causal=True, head_dim=32)
        yield Case(f"gqa_{dtype}", dtype, num_heads=4, num_heads_k=2, seqlen_q=19, seqlen_k=90, head_dim=64)
        yield Case(f"decode_{dtype}", dtype, num_heads=8, num_heads_k=1, seqlen_q=1, seqlen_k=1030, head_dim=64)


def _shapes() -> Iterator[Case]:
    for dim in (1, 3, 17, 40, 64, 80, 96, 128, 192, 256):
        yield Case(f"head_dim_{dim}", seqlen_q=33, head_dim=dim, batch=1)
    for dim in (3, 40, 256):
        yield Case(f"head_dim_{dim}_bfloat16", "bfloat16", seqlen_q=33, head_dim=dim, batch=1)
    for dim in (257, 512, 576):
        yield Case(f"head_dim_{dim}", seqlen_q=33, head_dim=dim, batch=1, num_heads=1)
    for dim, dim_v in ((16, 40), (64, 32), (1, 256), (192, 128), (576, 512)):
        yield Case(f"head_dim_{dim}_v_{dim_v}", seqlen_q=21, head_dim=dim, head_dim_v=dim_v, batch=1)
    for length in (1, 2, 5, 6, 7, 15, 16, 63, 64, 65, 191, 192, 193, 255, 256, 257, 513):
        yield Case(f"seqlen_{length}", seqlen_q=length, head_dim=32, causal=True, batch=1)
    yield Case("seqlen_257_full_float16", "float16", seqlen_q=257, head_dim=64, batch=1)
    yield Case("two_tiles", "float16", num_heads=3, seqlen_q=197, head_dim=64, dlse=True)
    yield Case("two_tiles_unequal", "bfloat16", num_heads=3, seqlen_q=129, seqlen_k=256, head_dim=40, head_dim_v=24, sinks=True)
    yield Case("two_tiles_far", "float16", num_heads=1, seqlen_q=256, seqlen_k=150, head_dim=64, softmax_scale=40.0)
    yield Case("rows_192", "bfloat16", num_heads=3, seqlen_q=190, seqlen_k=330, head_dim=72)
    yield Case("rows_192_packed", "float16", num_heads=3, lengths_q=(190, 5, 200), lengths_k=(100, 30, 330), head_dim=80, head_dim_v=96)
    yield Case("keys_513", seqlen_q=5, seqlen_k=513, batch=1)
    yield Case("queries_513", seqlen_q=513, seqlen_k=5, batch=1)
    yield Case("mqa", num_heads=5, num_heads_k=1)
    yield Case("gqa_causal", num_heads=6, num_heads_k=2, causal=True, seqlen_q=50)
    yield Case("decode_gqa8", num_heads=16, num_heads_k=2, batch=1, seqlen_q=1, seqlen_k=1500, head_dim=128)
    yield Case("decode_gqa8_bfloat16", "bfloat16", num_heads=16, num_heads_k=2, batch=1, seqlen_q=1, seqlen_k=1500, head_dim=128,
               causal=True)
    yield Case("decode_features", num_heads=8, num_heads_k=2, seqlen_q=2, seqlen_k=700, head_dim=64, causal=True, window=(300, None),
               softcap=5.0, alibi="heads", sinks=True)
    yield Case("empty_batch", batch=0, bias=(1, 2, 1, 37), sinks=True)
    yield Case("no_queries", seqlen_q=0, seqlen_k=9)
    yield Case("no_keys", seqlen_q=9, seqlen_k=0, dlse=True)
    yield Case("no_keys_sinks", seqlen_q=9, seqlen_k=0, sinks=True, dlse=True)
    yield Case("many_heads", batch=3, num_heads=24, seqlen_q=7, head_dim=8)


def _masks() -> Iterator[Case]:
    for causal in (True, "top_left"):
        for seqlen_q, seqlen_k in ((20, 45), (45, 20), (130, 300)):
            yield Case(f"causal_{causal}_{seqlen_q}_{seqlen_k}", seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, dlse=True)
    for window in ((0, 0), (None, 3), (5, None), (7, 2), (100, 100)):
        yield Case(f"window_{window[0]}_{window[1]}", seqlen_q=80, window=window)
    yield Case("window_causal", seqlen_q=200, window=(17, None), causal=True, head_dim=32)
    yield Case("window_beyond", seqlen_q=60, seqlen_k=10, window=(2, 2))
    yield Case("window_top_left", seqlen_q=30, seqlen_k=60, window=(4, 9), causal="top_left")
    for shape in ((2, 2, 37, 37), (37, 37), (2, 1, 1, 37), (1, 2, 37, 1)):
        yield Case(f"mask_{'x'.join(map(str, shape))}", mask=shape)
    yield Case("mask_blocks", seqlen_q=230, seqlen_k=310, mask=(2, 1, 230, 310), mask_kind="blocks", dlse=True)
    yield Case("mask_blocks_queries", seqlen_q=190, seqlen_k=270, mask=(1, 2, 190, 270), mask_kind="blocks", mask_memory="queries")
    yield Case("mask_shifted", seqlen_q=90, seqlen_k=133, mask=(90, 133), mask_memory="shifted")
    yield Case("mask_hidden", seqlen_q=70, seqlen_k=150, mask=(1, 1, 70, 150), mask_kind="hidden", sinks=True)
    yield Case("mask_padding_gqa", num_heads=4, num_heads_k=2, seqlen_q=140, seqlen_k=300, mask=(2, 1, 1, 300), mask_kind="blocks")
    yield Case("mask_causal_window", seqlen_q=70, mask=(70, 70), causal=True, window=(9, None))


def _scores() -> Iterator[Case]:
    yield Case("scale", softmax_scale=0.7)
    yield Case("scale_negative", softmax_scale=-0.2)
    yield Case("scale_zero", softmax_scale=0.0)
    for dtype in ("float32", "float64"):                        # the rounding of a score is felt: how a sum over head_dim is ordered
        yield Case(f"scale_large_few_queries_{dtype}", dtype, num_heads=6, num_heads_k=2, seqlen_q=3, seqlen_k=383, head_dim=255,
                   softmax_scale=0.26, causal=True)
        yield Case(f"scale_large_{dtype}", dtype, seqlen_q=9, seqlen_k=300, head_dim=255, softmax_scale=0.26)
    yield Case("alibi_far", alibi="heads", seqlen_q=900, seqlen_k=5, head_dim=24)       # most rows are far from every key: scores of -100
    yield Case("alibi_under_sink", alibi="heads", seqlen_q=600, seqlen_k=3, sinks=True)
    for seqlen_q, seqlen_k in ((20, 45), (45, 20), (5, 300)):
        yield Case(f"alibi_top_left_{seqlen_q}_{seqlen_k}", alibi="batch", seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal="top_left")
    yield Case("alibi_top_left_window_float16", "float16", alibi="heads", seqlen_q=70, seqlen_k=150, head_dim=64, causal="top_left",
               window=(40, None))
    yield Case("alibi_top_left_packed", alibi="heads", lengths_q=(13, 0, 33, 1, 20), lengths_k=(20, 5, 0, 17, 60), causal="top_left")
    yield Case("softcap", softcap=2.0)
    yield Case("softcap_bfloat16", "bfloat16", softcap=1.0, causal=True, head_dim=64)
    yield Case("alibi_heads", alibi="heads", seqlen_q=30, seqlen_k=51)
    yield Case("alibi_batch", alibi="batch", causal=True)
    for shape in ((2, 2, 37, 37), (1, 2, 37, 37), (2, 1, 37, 37), (2, 2, 1, 37), (2, 2, 37, 1), (37, 37), (2, 1, 1), (1, 37)):
        yield Case(f"bias_{'x'.join(map(str, shape))}", bias=shape)
    yield Case("bias_float32_bfloat16", "bfloat16", bias=(2, 37, 37), bias_dtype="float32")
    yield Case("bias_bfloat16", "bfloat16", bias=(2, 37, 37), causal=True)
    yield Case("bias_float16", "float16", bias=(1, 1, 37, 37))
    yield Case("bias_float64", "float64", bias=(2, 2, 37, 37), bias_dtype="float32")
    yield Case("bias_huge", bias=(2, 37, 300), bias_size=1e10, seqlen_k=300, dlse=True)
    yield Case("bias_huge_bfloat16", "bfloat16", bias=(37, 37), bias_dtype="float32", bias_size=1e30, sinks=True, causal=True)
    yield Case("scale_huge", softmax_scale=1e9, seqlen_k=300)
    yield Case("bias_inf", bias=(2, 2, 37, 37), bias_inf=True, dlse=True)
    yield Case("bias_inf_sinks", bias=(37, 37), bias_inf=True, sinks=True)
    yield Case("bias_windows", "bfloat16", batch=9, num_heads=100, seqlen_q=49, bias=(100, 49, 49), head_dim=32)
    yield Case("bias_few_keys", "float16", num_heads=4, num_heads_k=2, seqlen_q=100, seqlen_k=50, bias=(2, 4, 100, 50), causal=True,
               dlse=True, head_dim=64)
    yield Case("sinks", sinks=True, dlse=True)
    yield Case("sinks_bfloat16_gqa", "bfloat16", sinks=True, num_heads=4, num_heads_k=2, causal=True)
    yield Case("sinks_empty_rows", sinks=True, seqlen_q=30, seqlen_k=12, causal=True, dlse=True)
    for p in (0.1, 0.5, 1.0):
        yield Case(f"dropout_{p}", dropout_p=p, seqlen_q=50)
    yield Case("dropout_causal_gqa_bfloat16", "bfloat16", dropout_p=0.2, causal=True, num_heads=4, num_heads_k=2, seqlen_q=70, head_dim=64)
    yield Case("dropout_sinks_dlse", dropout_p=0.3, sinks=True, dlse=True, seqlen_k=90)


def _packed() -> Iterator[Case]:
    lengths_q, lengths_k = (13, 0, 33, 1, 20), (20, 5, 0, 17, 20)
    yield Case("packed_unequal", lengths_q=lengths_q, lengths_k=lengths_k)
    yield Case("packed_unequal_causal", lengths_q=lengths_q, lengths_k=lengths_k, causal=True, dlse=True)
    yield Case("packed_top_left", lengths_q=lengths_q, lengths_k=lengths_k, causal="top_left")
    yield Case("packed_window_gqa", num_heads=4, num_heads_k=2, lengths_q=(70, 3, 40), window=(6, 0))
    yield Case("packed_seqused", lengths_q=(5, 9, 30, 4), lengths_k=(20, 9, 30, 11), used_k=(13, 9, 0, 1), causal=True)
    yield Case("packed_seqused_alibi", lengths_q=(5, 19), lengths_k=(20, 30), used_k=(13, 17), alibi="batch")
    yield Case("packed_spare", lengths_q=(5, 9), spare=6, sinks=True, dlse=True)
    yield Case("packed_bias", lengths_q=(5, 19), bias=(2, 2, 19, 19), causal=True)
    yield Case("packed_mask_blocks", num_heads=4, num_heads_k=2, lengths_q=(150, 0, 70), lengths_k=(40, 210, 300), mask=(3, 4, 150, 300),
               mask_kind="blocks", causal=True)
    yield Case("packed_bias_mask", lengths_q=(15, 9), lengths_k=(4, 12), bias=(1, 2, 1, 12), mask=(2, 1, 15, 12))
    yield Case("packed_dropout", lengths_q=(15, 39), dropout_p=0.2)
    yield Case("packed_none", lengths_q=())
    yield Case("packed_decode", "bfloat16", num_heads=8, num_heads_k=1, lengths_q=(1, 1, 1), lengths_k=(300, 700, 5), head_dim=64,
               causal=True)
    yield Case("packed_sliced", lengths_q=(15, 9), memory="sliced")
    yield Case("packed_many", lengths_q=tuple(i % 7 for i in range(60)), num_heads=1, head_dim=8)


def _position() -> Iterator[Case]:
    for diagonal in (-50, -7, 0, 19, 33, 400):                  # rows that attend nothing, some, and everything
        yield Case(f"diagonal_{diagonal}_causal", diagonal=diagonal, causal=True, seqlen_q=70, seqlen_k=90, dlse=True)
        yield Case(f"diagonal_{diagonal}_alibi", diagonal=diagonal, alibi="batch", window=(40, 11), seqlen_q=30, seqlen_k=140, head_dim=40)
    yield Case("diagonal_window_bfloat16", "bfloat16", diagonal=100, window=(90, 0), num_heads=4, num_heads_k=2, seqlen_q=130, seqlen_k=300,
               head_dim=64)
    yield Case("diagonal_decode", "float16", diagonal=600, causal=True, window=(500, None), num_heads=8, num_heads_k=1, seqlen_q=3,
               seqlen_k=700, head_dim=64, alibi="heads")
    lengths_q, lengths_k = (13, 0, 33, 1, 20), (20, 5, 0, 17, 60)
    yield Case("diagonal_packed", lengths_q=lengths_q, lengths_k=lengths_k, diagonal=5, causal=True, alibi="heads", dlse=True)
    yield Case("diagonals_packed", lengths_q=lengths_q, lengths_k=lengths_k, diagonal=(-4, 2, 0, 9, 70), causal=True, dlse=True)
    yield Case("diagonals_packed_alibi", "bfloat16", lengths_q=(70, 9, 150), lengths_k=(150, 40, 90), used_k=(140, 0, 90), num_heads=4,
               num_heads_k=2, diagonal=(60, 3, -20), window=(80, 5), alibi="batch", head_dim=64)
    yield Case("dropout_at", dropout_p=0.3, dropout_at=(3, 1, 48, 2**31 - 32), dropout_heads=5, seqlen_q=70, seqlen_k=90)
    yield Case("dropout_at_bfloat16", "bfloat16", dropout_p=0.3, dropout_at=(2**31 - 1, 0, 16, 160), num_heads=4, num_heads_k=2,
               causal=True, diagonal=30, seqlen_q=90, seqlen_k=140, head_dim=64, sinks=True)
    yield Case("dropout_heads_packed", dropout_p=0.2, dropout_heads=7, dropout_at=(0, 2, 32, 0), lengths_q=(15, 39, 4),
               lengths_k=(20, 39, 70))
    for dtype in ("float16", "bfloat16"):
        yield Case(f"float32_out_{dtype}", dtype, out_dtype="float32", num_heads=4, num_heads_k=2, seqlen_q=70, seqlen_k=90, head_dim=64,
                   causal=True, dlse=True)
        yield Case(f"float32_out_decode_{dtype}", dtype, out_dtype="float32", num_heads=8, num_heads_k=1, seqlen_q=1, seqlen_k=1030,
                   head_dim=64)
    yield Case("float32_out_bhsd", "float16", out_dtype="float32", layout="bhsd", memory="sliced", bias=(2, 37, 37), sinks=True,
               head_dim=40)
    yield Case("float32_out_packed", "bfloat16", out_dtype="float32", lengths_q=(17, 0, 140, 1), lengths_k=(30, 4, 150, 70), causal=True,
               diagonal=(9, 0, 10, 69), dropout_p=0.2, dropout_at=(1, 0, 16, 0), head_dim=64, spare=5)
    yield Case("out_dtype_float32", out_dtype="float32")


def _memory() -> Iterator[Case]:
    yield Case("bhsd", layout="bhsd", causal=True)
    yield Case("bhsd_all", "bfloat16", layout="bhsd", num_heads=4, num_heads_k=2, bias=(4, 37, 37), sinks=True, causal=True)
    for memory in ("sliced", "transposed", "dim_first", "reversed"):
        yield Case(f"memory_{memory}", memory=memory, causal=True, seqlen_q=70)
        yield Case(f"memory_{memory}_bfloat16", "bfloat16", memory=memory, head_dim=40)
    yield Case("memory_bhsd_transposed", layout="bhsd", memory="transposed", head_dim=64)
    yield Case("memory_decode_sliced", memory="sliced", seqlen_q=1, seqlen_k=300, num_heads=4, num_heads_k=1, head_dim=64)


def _everything() -> Iterator[Case]:
    every = Case("everything", num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=70, head_dim=40, head_dim_v=24, causal=True,
                 window=(30, None), softcap=3.0, alibi="heads", bias=(2, 1, 45, 70), mask=(2, 1, 1, 70), sinks=True,
                 dropout_p=0.15, dlse=True)
    for dtype in NUMPY:
        yield replace(every, name=f"everything_{dtype}", dtype=dtype)
    yield replace(every, name="everything_packed", lengths_q=(45, 0, 20), lengths_k=(70, 8, 9), used_k=(60, 8, 3), bias=(3, 1, 45, 70),
                  mask=(3, 1, 1, 70))
    yield replace(every, name="everything_strided", memory="reversed", layout="bhsd")


CASES: list[Case] = [*_dtypes(), *_shapes(), *_masks(), *_scores(), *_packed(), *_position(), *_memory(), *_everything()]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)
