"""The dense functions: signatures and documentation."""
from __future__ import annotations

from typing import Any, Never

from ..problem import Grads
from ..signature import strict, unknown_arguments
from ..types import A, Array, Causal, EngineName, Integer, Layout, Number, PerHead, Window
from .dense import Whole, backward, forward, prepare


@strict
def attention(q: A, k: Array, v: Array, *more: Never, group: Any = None, seqlen: Integer | None = None, seqlen_k: Integer | None = None,
              shard: str = "zigzag", method: Any = "auto", pieces: Integer | None = None, causal: Causal = False,
              window: Window | None = None, softmax_scale: Number | None = None, softcap: Number | None = None,
              alibi_slopes: PerHead | None = None, bias: Array | None = None, mask: Array | None = None, sinks: PerHead | None = None,
              dropout_p: Number = 0.0, seed: Integer | None = None, offset: Integer = 0, layout: Layout = "bshd",
              return_lse: bool = False, return_saved: bool = False, stream: Any = None, engine: EngineName | None = None,
              **unknown: Never) -> Any:
    """`fastattn.attention` of sequences whose rows lie on several ranks. Every rank of the group calls it.

    Parameters
    ----------
    q : array (batch, rows, num_heads, head_dim)
        This rank's rows, those of `chunks`; `shard` cuts them out of a whole array.
    k, v : array (batch, rows of keys, num_heads_k, head_dim or head_dim_v)
        This rank's keys and values, cut in the same way.
    group : group or communicator
        What `group`, `connect` or `threads` gave, or a communicator that `group` takes.
    seqlen, seqlen_k : int, optional
        Rows of the whole sequences. Default: as many in every rank as in this one; seqlen_k is seqlen where k has as many rows as q.
    shard : {"zigzag", "contiguous"}, default "zigzag"
        Who owns which rows, see `chunks`. Zigzag gives every rank the same work of a causal mask; contiguous sends least for a window.
    method : str or (int, int), default "auto"
        "gather": each rank receives the keys that its rows attend, of a window its halo, and computes whole calls: the bits of one rank.
        "ring": the keys of one rank at a time, and partial results in float32 that are merged: least memory. "ulysses": heads instead of
        rows, one key head a rank at least. (ulysses, ring): both. "auto": "gather" where its keys fit into 16 GiB, else "ring"; `explain`
        says why.
    pieces : int, optional
        "gather", "ulysses" and the backward of "ring" send so many groups of heads one after the other, and compute some while others are
        under way. Default: 2 on CUDA where half the heads keep a device busy, else 1; `explain` says it.
    causal, window, softmax_scale, softcap, dropout_p, seed, offset : optional
        As in `fastattn.attention`, for the whole sequences.
    alibi_slopes, sinks : optional
        Of all heads, the same in every rank.
    bias, mask : array that broadcasts to (batch, num_heads, rows, seqlen_k), optional
        This rank's rows, in their order, and all keys in the order of the sequence.
    layout, return_lse, stream, engine : optional
        As in `fastattn.attention`.
    return_saved : bool, default False
        Also return what this rank has received, so that `attention_backward` need not send it again: with "gather" the keys and values
        that its rows attend, with "ulysses" its heads of q, k and v. That is as much memory for each layer (`nbytes` says it).

    Returns
    -------
    out : array (batch, rows, num_heads, head_dim_v)
        This rank's rows.
    lse : array (batch, num_heads, rows)
        Only with ``return_lse``.
    saved : object
        Only with ``return_saved``, last.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `fastattn.attention`. All is checked before the first message.
    RankError
        Another rank failed, or its message did not come in time. With FASTATTN_CHECK_RANKS=1 in the environment of all ranks: their
        arguments do not fit together; then all raise it before anything is sent, and the group can go on.

    Notes
    -----
    CUDA: transfers run on a stream of their own, beside the computation. The host waits only where FASTATTN_CHECK_RANKS asks for it.

    Source: Liu, Zaharia, Abbeel, "Ring attention with blockwise transformers", 2023; Jacobs et al., "DeepSpeed Ulysses", 2023; Fang, Zhao,
    "USP", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> import fastattn.distributed as fd
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 100, 4, 8))
    >>> whole = fastattn.attention(q, k, v, causal=True)
    >>> def work(group):
    ...     mine = [fd.shard(x, group) for x in (q, k, v)]
    ...     out = fd.attention(*mine, group=group, seqlen=100, causal=True)
    ...     return np.array_equal(out, fd.shard(whole, group))
    >>> fd.threads(2, work)
    [True, True]
    """
    if more or unknown:
        raise unknown_arguments(attention, more, unknown)
    whole = Whole("distributed.attention", group, seqlen, seqlen_k, shard, method, pieces, bool(return_saved))
    options = causal, window, softmax_scale, softcap, dropout_p, seed, offset
    ready, _ = prepare(whole, options, layout, stream, engine, (q, k, v), (bias, mask, alibi_slopes, sinks))
    return forward(ready, bool(return_lse))


@strict
def attention_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, *more: Never, group: Any = None,
                       seqlen: Integer | None = None, seqlen_k: Integer | None = None, shard: str = "zigzag", method: Any = "auto",
                       pieces: Integer | None = None, causal: Causal = False, window: Window | None = None,
                       softmax_scale: Number | None = None, softcap: Number | None = None, alibi_slopes: PerHead | None = None,
                       bias: Array | None = None, mask: Array | None = None, sinks: PerHead | None = None, dropout_p: Number = 0.0,
                       seed: Integer | None = None, offset: Integer = 0, layout: Layout = "bshd", dlse: Array | None = None,
                       need_dbias: bool = False, deterministic: bool = False, saved: Any = None, stream: Any = None,
                       engine: EngineName | None = None, **unknown: Never) -> Grads[A]:
    """Gradients of `attention`, of this rank's rows. Every rank of the group calls it.

    Parameters
    ----------
    dout, out : array (batch, rows, num_heads, head_dim_v)
        Gradient of this rank's out, and that out.
    q, k, v : array
        The forward's.
    lse : array (batch, num_heads, rows)
        The forward's, with ``return_lse=True``.
    group, seqlen, seqlen_k, shard, method, pieces : optional
        As in `attention`. The method may be another than the forward's.
    causal, window, softmax_scale, softcap, alibi_slopes, bias, mask, sinks, dropout_p, seed, offset, layout : optional
        The forward's, with the same values.
    dlse : array (batch, num_heads, rows), optional
        Gradient of lse, in every rank or in none.
    need_dbias, deterministic : bool, default False
        As in `fastattn.attention_backward`.
    saved : optional
        What the forward returned with ``return_saved=True``. Then its method and pieces are the default, and only gradients are sent.
    stream, engine : optional
        As in `attention`.

    Returns
    -------
    Grads
        dq, dk and dv of this rank's rows. dbias of them, or, where one row of bias is for all, the sum over all ranks. dsinks: the sum over
        all ranks. Sums are float32 (float64) and always in the same order.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError, RankError
        As `attention`.

    Notes
    -----
    Source: as `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn.distributed as fd
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 64, 4, 8))
    >>> def work(group):
    ...     mine = [fd.shard(x, group) for x in (q, k, v)]
    ...     out, lse = fd.attention(*mine, group=group, causal=True, return_lse=True)
    ...     return fd.attention_backward(fd.shard(dout, group), *mine, out, lse, group=group, causal=True).dk.shape
    >>> fd.threads(2, work)
    [(1, 32, 4, 8), (1, 32, 4, 8)]
    """
    if more or unknown:
        raise unknown_arguments(attention_backward, more, unknown)
    whole = Whole("distributed.attention_backward", group, seqlen, seqlen_k, shard, method, pieces, False, saved)
    options = causal, window, softmax_scale, softcap, dropout_p, seed, offset
    ready, given = prepare(whole, options, layout, stream, engine, (q, k, v), (bias, mask, alibi_slopes, sinks), (dout, out, lse, dlse),
                           bool(need_dbias), bool(deterministic))
    assert given is not None
    return backward(ready, given)
