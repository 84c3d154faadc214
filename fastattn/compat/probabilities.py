"""The encoded softmax: attention's probabilities, negative where dropout drops them.

The attention kernels themselves compute it. If v holds columns of the identity matrix, `out` holds those columns of
P. So every mask, bias, window and length counts exactly as it does in attention, on any device. The columns are
computed in blocks of BLOCK keys. With dropout each block takes two calls: one without dropout for the values, and one
with all scores equal for the signs, because its zeros are the dropped elements.

Memory is O(L * S), the size of the result. Time is that of S / BLOCK attention calls, twice that with dropout. It is
meant for debugging and tests.
"""
from __future__ import annotations

from typing import Any, Literal

from .arrays import namespace, positions, shape_of, zeros
from .translate import Call, Lengths, forward, lengths

BLOCK = 256                                                 # the largest head_dim_v of every engine
STEP = 64                                                   # the last block is a multiple: the GPU engine compiles four kernels, not 256
_CALL = Call("encoded_softmax")


def encoded_softmax(q: Any, k: Any, *, causal: bool | str = False, window: tuple[int | None, int | None] | None = None,
                    softmax_scale: float | None = None, softcap: float | None = None, alibi_slopes: Any = None, bias: Any = None,
                    mask: Any = None, sinks: Any = None, dropout_p: float = 0.0, seed: int | None = None, offset: int = 0,
                    layout: Literal["bshd", "bhsd", "thd"] = "bshd", cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
                    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_k: Any = None) -> Any:
    """P of the call fastattn.attention(q, k, v, ...), or attention_varlen, with the same keywords.

    Parameters
    ----------
    q, k : array
        As in fastattn.attention.
    causal, window, softmax_scale, softcap, alibi_slopes, bias, mask, sinks, dropout_p, seed, offset
        As in fastattn.attention.
    layout : str
        "bshd" or "bhsd"; "thd" with cu_seqlens.
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k
        As in fastattn.attention_varlen, but both maxima are needed: they are axes of the result.

    Returns
    -------
    array
        (batch, num_heads, seqlen_q, seqlen_k), packed (sequences, num_heads, max_seqlen_q, max_seqlen_k), in q's
        dtype. The magnitudes are the probabilities before dropout. Where dropout drops, the value is negative, or
        -0.0. Rows that attend nothing are 0, and so is what lies outside a sequence.

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        As the fastattn function.

    Notes
    -----
    It is what flash_attn calls S_dmask and PyTorch the debug mask of its flash operator.
    """
    packed = lengths(_CALL, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    if (layout == "thd") != (packed is not None):
        raise _CALL.value("layout", f"is {layout!r}", "'thd' with cu_seqlens_q and cu_seqlens_k, 'bshd' or 'bhsd' without")
    return encode(_CALL, q, k, packed, layout, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap,
                  alibi_slopes=alibi_slopes, bias=bias, mask=mask, sinks=sinks, dropout_p=dropout_p, seed=seed, offset=offset)


def encode(call: Call, q: Any, k: Any, packed: Lengths | None, layout: str, *, dropout_p: float = 0.0, seed: int | None = None,
           offset: int = 0, **options: Any) -> Any:
    """`encoded_softmax` for another call, whose name errors carry. options: the other keywords of fastattn.attention."""
    dropout_p = call.plain("dropout_p", dropout_p, "a probability in [0, 1]")
    xp, shape = namespace(q, call.name, "q"), shape_of(k, call.name, "k")
    rank, keys = (4, 2 if layout == "bhsd" else 1) if packed is None else (3, 0)       # the axis of k that counts keys
    if len(shape) != rank:
        raise call.value(call.names.get("k", "k"), f"has shape {shape}", f"{rank} axes for layout {layout!r}")
    if packed is None:
        seqlen_k = shape[keys]
        index = positions(q, seqlen_k, call.name, "q")
    else:
        if packed.max_seqlen_q is None or packed.max_seqlen_k is None:
            name = "max_seqlen_q" if packed.max_seqlen_q is None else "max_seqlen_k"
            raise call.value(call.names.get(name, name), "is None", "the longest sequence, which is an axis of the probabilities")
        seqlen_k = packed.max_seqlen_k
        index = _inside(xp, positions(q, shape[0], call.name, "q"), packed.cu_seqlens_k)

    def columns(first: int, **keywords: Any) -> Any:
        """P for keys first to first + BLOCK: (batch, num_heads, seqlen_q, BLOCK), packed (num_heads, total_q, BLOCK)."""
        width = min(BLOCK, max(-(-(seqlen_k - first) // STEP), 1) * STEP)              # columns past the last key are 0; dropped below
        block = positions(q, width, call.name, "q") + first
        identity = xp.asarray(index[:, None] == block[None, :], dtype=q.dtype)         # (keys, BLOCK)
        axes = [1] * rank
        axes[keys], axes[-1] = identity.shape[0], identity.shape[1]
        v = xp.broadcast_to(identity.reshape(tuple(axes)), (*shape[:-1], identity.shape[1]))
        out, _ = forward(call, q, k, v, packed, return_lse=False, **({} if packed is not None else {"layout": layout}), **keywords)
        return out if layout == "bhsd" else out.swapaxes(-2, -3)

    blocks = []
    for first in range(0, max(seqlen_k, 1), BLOCK):
        P = columns(first, **options)
        if dropout_p:
            kept = columns(first, softmax_scale=0.0, dropout_p=dropout_p, seed=seed, offset=offset)
            P = xp.where(kept > 0, P, -P)
        blocks.append(P)
    P = xp.concatenate(blocks, -1)[..., :seqlen_k]
    return P if packed is None else _unpacked(call, xp, P, packed)


def _inside(xp: Any, rows: Any, cu_seqlens: Any) -> Any:
    """The index of each packed row in its sequence."""
    cu = xp.asarray(cu_seqlens, dtype=rows.dtype)
    return rows - cu[xp.searchsorted(cu, rows, side="right") - 1]


def _unpacked(call: Call, xp: Any, P: Any, packed: Lengths) -> Any:
    """(num_heads, total_q, keys) -> (sequences, num_heads, max_seqlen_q, keys), 0 in the rows past a sequence's end."""
    index = positions(P, packed.max_seqlen_q or 0, call.name, "q")
    cu = xp.asarray(packed.cu_seqlens_q, dtype=index.dtype)
    rows = cu[:-1, None] + index[None, :]
    rows = xp.where(rows < cu[1:, None], rows, P.shape[1])                             # one row of zeros after the last
    P = xp.concatenate([P, zeros(P, (P.shape[0], 1, P.shape[2]), call.name, "q")], 1)
    return P[:, rows].swapaxes(0, 1)
