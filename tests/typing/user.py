"""A user's program: a type checker finds no error in it. `test_types.py` runs mypy and pyright on it; nothing runs the program."""
from __future__ import annotations

from typing import Any, Unpack, assert_type

import numpy as np

import fastattn
from fastattn import (
    Grads,
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    attention_with_kvcache,
    merge_states,
    quantize_fp8,
)
from fastattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.compat.sdpa import scaled_dot_product_attention, scaled_dot_product_attention_backward
from fastattn.types import A, Array, DenseOptions

Singles = np.ndarray[tuple[Any, ...], np.dtype[np.float32]]
Halves = np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]
AnyArray = np.ndarray[Any, Any]


# ---------------------------------------------------------------- NumPy in, NumPy out
def forward(q: Singles, half: Halves, flag: bool) -> None:
    assert_type(attention(q, q, q), Singles)
    assert_type(attention(q, q, q, return_lse=False, causal=True, layout="bhsd", engine="cpu"), Singles)
    assert_type(attention(half, half, half, causal="top_left"), Halves)
    out, lse = attention(q, q, q, return_lse=True, out=q)
    assert_type(out, Singles)
    assert_type(lse, AnyArray)                              # three axes, float32 whatever q has: not q's type
    assert_type(attention(half, half, half, return_lse=True), tuple[Halves, AnyArray])
    maybe = attention(q, q, q, return_lse=flag)
    assert_type(maybe[0] if isinstance(maybe, tuple) else maybe, Singles)
    assert_type(merge_states([q, q], [lse, lse]), tuple[Singles, AnyArray])


def packed(q: Singles, cu: np.ndarray[tuple[int], np.dtype[np.int32]], flag: bool) -> None:
    assert_type(attention_varlen(q, q, q, cu, cu, max_seqlen_q=np.int64(8), seqused_k=[3, 4]), Singles)
    out, lse = attention_varlen(q, q, q, [0, 3, 7], (0, 3, 7), return_lse=True, layout="thd")
    assert_type(out, Singles)
    assert_type(lse, AnyArray)
    maybe = attention_varlen(q, q, q, cu, cu, return_lse=flag)
    assert_type(maybe[0] if isinstance(maybe, tuple) else maybe, Singles)
    assert_type(attention_varlen_backward(out, q, q, q, out, lse, cu, cu), Grads[Singles])


def serving(q: Singles, half: Halves, table: np.ndarray[tuple[int, int], np.dtype[np.int32]], flag: bool) -> None:
    assert_type(attention_with_kvcache(q, q, q, cache_seqlens=[3, 4]), Singles)
    assert_type(attention_with_kvcache(half, half, half, half, half, cache_seqlens=table[0], block_table=table, num_splits=1,
                                       shared_prefix=64), Halves)
    out, lse = attention_with_kvcache(half, half, half, None, None, cache_seqlens=(1,), k_scale=0.5, v_scale=[1.0, 2.0], return_lse=True)
    assert_type(out, Halves)
    assert_type(lse, AnyArray)
    maybe = attention_with_kvcache(q, q, q, cache_seqlens=[3], return_lse=flag)
    assert_type(maybe[0] if isinstance(maybe, tuple) else maybe, Singles)
    x8, scale = quantize_fp8(q, "head")
    attention_with_kvcache(half, x8, x8, cache_seqlens=[1], k_scale=scale)


def backward(q: Singles, lse: AnyArray) -> None:
    grads = attention_backward(q, q, q, q, q, lse, bias=q, need_dbias=True, deterministic=True)
    assert_type(grads, Grads[Singles])
    assert_type(grads.dk, Singles)
    dq, _, dv, _, _ = grads
    assert_type(dq, Singles)
    assert_type(dv, Singles)


def options_of_any_kind(q: Singles, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    """A NumPy scalar counts as a number; lists go where the documentation says so."""
    attention(q, q, q, softmax_scale=np.float32(0.5), softcap=30, window=(np.int64(3), None), dropout_p=np.float64(0.1), seed=np.int32(7))
    attention(q, q, q, causal=np.bool_(True), mask=mask, alibi_slopes=[0.5, 0.25], sinks=(0.0, 1.0), stream=None, engine=None)
    attention(q, q, q, causal="bottom_right", window=None, bias=None, offset=1)
    keep = fastattn.dropout_mask(1, 2, 3, 4, dropout_p=0.5, seed=0)
    assert_type(keep, np.ndarray[tuple[int, int, int, int], np.dtype[np.bool_]])


def wrapper(q: A, k: Array, v: Array, **options: Unpack[DenseOptions]) -> A:
    return attention(q, k, v, **options)


def compat(q: Singles, cu: AnyArray) -> None:
    assert_type(scaled_dot_product_attention(q, q, q, is_causal=True), Singles)
    assert_type(flash_attn_func(q, q, q, 0.0, causal=True), Singles)
    assert_type(flash_attn_func(q, q, q, softcap=3.0, return_attn_probs=True)[0], Singles)
    flash_attn_func(q, q, q, 0.0, None, True, (-1, -1), return_attn_probs=True)
    assert_type(flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, window_size=(3, 0)), Singles)
    out, lse = scaled_dot_product_attention(q, q, q, None, 0.0, True, return_lse=True)
    assert_type(out, Singles)
    assert_type(scaled_dot_product_attention_backward(out, q, q, q, out, lse).dq, Singles)


# ---------------------------------------------------------------- arrays of no library
class Exporter:
    def __dlpack__(self, *, stream: int | None = None) -> object:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        raise NotImplementedError


class OfCuda:
    __cuda_array_interface__: dict[str, Any] = {}           # noqa: RUF012


def others(x: Exporter, y: OfCuda, q: Singles) -> None:
    assert_type(attention(x, x, x), Exporter)
    assert_type(attention(x, q, q, return_lse=True), tuple[Exporter, Exporter])      # results are of q's kind
    assert_type(attention(y, y, y, return_lse=True), tuple[OfCuda, OfCuda])
    assert_type(attention_backward(y, y, y, y, y, y).dq, OfCuda)
