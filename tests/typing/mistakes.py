"""Mistakes of users: a type checker finds an error in every line that ends in `# wrong`, and in no other.

`test_types.py` runs mypy and pyright on it; nothing runs the program.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from fastattn import attention, attention_backward, attention_varlen, attention_varlen_backward, attention_with_kvcache
from fastattn.compat.flash_attn import flash_attn_func
from fastattn.compat.sdpa import scaled_dot_product_attention

Array = np.ndarray[tuple[int, int, int, int], np.dtype[np.float32]]


def mistakes(q: Array, cu: np.ndarray[tuple[int], np.dtype[np.int32]], lse: np.ndarray[Any, Any]) -> None:
    attention("q", 3, None)  # wrong
    attention(q, q, [[[[1.0]]]])  # wrong
    attention(q, q)  # wrong
    attention(q, q, q, True)  # wrong
    attention(q, q, q, casual=True)  # wrong
    attention(q, q, q, is_causal=True)  # wrong
    attention(q, q, q, causal="bottom_left")  # wrong
    attention(q, q, q, engine="cud")  # wrong
    attention(q, q, q, layout="sbhd")  # wrong
    attention(q, q, q, layout="thd")  # wrong
    attention(q, q, q, window=5)  # wrong
    attention(q, q, q, window=(1, 2, 3))  # wrong
    attention(q, q, q, window=(1.5, None))  # wrong
    attention(q, q, q, softmax_scale="0.5")  # wrong
    attention(q, q, q, seed=1.5)  # wrong
    attention(q, q, q, bias=[[0.0]])  # wrong
    attention(q, q, q, max_seqlen_q=3)  # wrong
    attention(q, q, q, need_dbias=True)  # wrong
    a: Array = attention(q, q, q, return_lse=True)  # wrong
    b: tuple[Array, Any] = attention(q, q, q)  # wrong
    attention(q, q, q, return_lse=True).mean()  # wrong
    x, y, z = attention(q, q, q, return_lse=True)  # wrong
    attention_varlen(q, q, q, cu)  # wrong
    attention_varlen(q, q, q, cu, 3)  # wrong
    attention_varlen(q, q, q, cu, cu, layout="bshd")  # wrong
    attention_varlen(q, q, q, cu, cu, max_seqlen=3)  # wrong
    attention_with_kvcache(q, q, q)  # wrong
    attention_with_kvcache(q, q, q, cache_seqlens=3)  # wrong
    attention_with_kvcache(q, q, q, cache_seqlens=[3], causal="top_left")  # wrong
    attention_with_kvcache(q, q, q, cache_seqlens=[3], mask=q)  # wrong
    attention_backward(q, q, q, q)  # wrong
    attention_backward(q, q, q, q, q, lse, casual=True)  # wrong
    attention_backward(q, q, q, q, q, lse, layout="thd")  # wrong
    print(attention_backward(q, q, q, q, q, lse).dw)  # wrong
    c: str = attention_backward(q, q, q, q, q, lse).dq  # wrong
    attention_varlen_backward(q, q, q, q, q, lse, cu, cu, causal="left")  # wrong
    scaled_dot_product_attention(q, q, 3)  # wrong
    flash_attn_func(q, q, q, is_causal=True)  # wrong
    flash_attn_func(q, q, 3, causal=True)  # wrong
    d: str = flash_attn_func(q, q, q, causal=True)  # wrong
    print(a, b, c, d, x, y, z)
