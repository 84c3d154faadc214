"""vllm.vllm_flash_attn for any array: `flash_attn_varlen_func`, over `fastattn.attention_with_kvcache` and `attention_varlen`.

Its caches hold the keys of a call already, those that its queries brought too. Rows that attend nothing have out 0 and lse -inf.
"""
from __future__ import annotations

from typing import Any

from ..api_packed import attention_varlen
from ..serving.api import attention_with_kvcache
from .translate import Call, pair, window

__all__ = ["flash_attn_varlen_func"]
_NAMES = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k", "lse": "softmax_lse", "window": "window_size", "sinks": "s_aux",
          "q_scale": "q_descale", "k_scale": "k_descale", "v_scale": "v_descale"}
_REFUSED = {"q_v": "fastattn.compat.flash_attn.flash_attn_with_kvcache has it, as qv",
            "cp_tot_seqused_k": "each rank's result has its lse, and fastattn.merge_states merges them"}


def flash_attn_varlen_func(q: Any, k: Any, v: Any, max_seqlen_q: int, cu_seqlens_q: Any, max_seqlen_k: int, cu_seqlens_k: Any = None,
                           seqused_k: Any = None, q_v: None = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
                           causal: bool = False, window_size: Any = None, softcap: float = 0.0, alibi_slopes: Any = None,
                           deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
                           return_softmax_lse: bool = False, out: Any = None, scheduler_metadata: Any = None, q_descale: Any = None,
                           k_descale: Any = None, v_descale: Any = None, num_splits: int = 0, fa_version: int = 2, s_aux: Any = None,
                           cp_world_size: int = 1, cp_rank: int = 0, cp_tot_seqused_k: None = None) -> Any:
    """vllm_flash_attn.flash_attn_varlen_func: packed queries over keys in pages, or over packed keys.

    Parameters
    ----------
    q : array
        (total_q, nheads, headdim).
    k, v : array
        With block_table the caches, (pages, page_size, nheads_k, headdim); else (total_k, nheads_k, headdim).
    max_seqlen_q, max_seqlen_k : int
        The longest sequences. With block_table max_seqlen_k is not needed.
    cu_seqlens_q, cu_seqlens_k : array
        (batch + 1,): where each sequence begins. cu_seqlens_k without block_table only.
    seqused_k : array, optional
        (batch,): keys of each sequence, those of this call's queries among them. With block_table it is needed.
    softmax_scale, causal, softcap, alibi_slopes
        As in fastattn.compat.flash_attn.flash_attn_func.
    window_size : pair of int, optional
        (left, right), -1 = no limit. None: no window.
    block_table : array, optional
        (batch, most pages of a sequence).
    return_softmax_lse : bool
        Return (out, softmax_lse), softmax_lse (nheads, total_q).
    out : array, optional
        Receives the output.
    q_descale, k_descale, v_descale : array (batch, nheads_k), optional
        Scales of 8-bit arrays. A view of one number that is expanded to that shape will do.
    num_splits : int
        0: chosen. 1: the same bits in any batch. Without block_table it changes nothing.
    s_aux : array, optional
        (nheads,): attention sinks.
    dropout_p, return_attn_probs, q_v, cp_world_size, cp_tot_seqused_k
        Refused if given.
    deterministic, scheduler_metadata, fa_version, cp_rank
        Change no result.

    Returns
    -------
    array, or tuple
        out of q's shape with v's headdim, or (out, softmax_lse).

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    call = Call("flash_attn_varlen_func", _NAMES if block_table is not None else {**_NAMES, "seqused_k": "seqused_k"})
    for name, refused, expected in (("q_v", q_v is not None, "None"), ("dropout_p", bool(dropout_p), "0"),
                                    ("return_attn_probs", bool(return_attn_probs), "False"), ("cp_world_size", cp_world_size != 1, "1"),
                                    ("cp_tot_seqused_k", cp_tot_seqused_k is not None, "None")):
        if refused:
            raise call.value(name, "is given", expected, _REFUSED.get(name, ""))
    options = {"causal": call.flag("causal", causal), "softmax_scale": softmax_scale, "alibi_slopes": alibi_slopes, "sinks": s_aux,
               "softcap": call.plain("softcap", softcap, "a number, 0 for no cap") or None, "out": out,
               "window": None if window_size is None else window(call, "window_size", *pair(call, "window_size", window_size)),
               "max_seqlen_q": call.length("max_seqlen_q", max_seqlen_q), "return_lse": call.flag("return_softmax_lse", return_softmax_lse),
               "q_scale": q_descale, "k_scale": k_descale, "v_scale": v_descale}
    if block_table is None:
        if cu_seqlens_k is None:
            raise call.value("cu_seqlens_k", "is None", "where each sequence's keys begin, because block_table is None")
        return call.run(attention_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=seqused_k,
                        max_seqlen_k=call.length("max_seqlen_k", max_seqlen_k), **options)
    if seqused_k is None:
        raise call.value("seqused_k", "is None", "the keys of each sequence, because block_table is given")
    if cu_seqlens_k is not None:
        raise call.value("cu_seqlens_k", "is given", "None, because block_table is given")
    splits = call.plain("num_splits", num_splits, "an integer, 0 to choose")
    return call.run(attention_with_kvcache, q, k, v, cache_seqlens=seqused_k, block_table=block_table, cu_seqlens_q=cu_seqlens_q,
                    num_splits=splits or None, **options)
