"""The packed functions: signatures and documentation."""
from __future__ import annotations

from typing import Any, Never

from ..problem import Grads
from ..signature import strict, unknown_arguments
from ..types import A, Array, Causal, EngineName, Integer, Lengths, Number, PerHead, Window
from .packed import Whole, backward, forward, prepare


@strict
def attention_varlen(q: A, k: Array, v: Array, cu_seqlens: Lengths, *more: Never, group: Any = None, cu_seqlens_k: Lengths | None = None,
                     shard: str = "zigzag", method: Any = "auto", causal: Causal = False, window: Window | None = None,
                     softmax_scale: Number | None = None, softcap: Number | None = None, alibi_slopes: PerHead | None = None,
                     bias: Array | None = None, mask: Array | None = None, sinks: PerHead | None = None, dropout_p: Number = 0.0,
                     seed: Integer | None = None, offset: Integer = 0, return_lse: bool = False, stream: Any = None,
                     engine: EngineName | None = None, **unknown: Never) -> Any:
    """`fastattn.attention_varlen` of packed sequences whose rows lie on several ranks. Every rank of the group calls it.

    Parameters
    ----------
    q : array (rows, num_heads, head_dim)
        This rank's rows: ``shard(x, group, 0, cu_seqlens=cu_seqlens)`` cuts them out of a whole packed array. Every sequence is cut by
        itself, so lengths need not divide by anything.
    k, v : array (rows of keys, num_heads_k, head_dim or head_dim_v)
        This rank's keys and values, cut in the same way.
    cu_seqlens : array (sequences + 1,)
        Cumulative lengths of the whole sequences, in host memory, the same in every rank.
    group : group or communicator
        As in `attention`.
    cu_seqlens_k : array (sequences + 1,), optional
        Those of the keys, if they differ.
    shard : {"zigzag", "contiguous"}, default "zigzag"
        As in `shard`.
    method : {"auto", "gather", "ring", "ulysses"}
        As in `attention`. "gather" and "ring" call an engine once for each sequence if there is dropout, bias or mask.
    causal, window, softmax_scale, softcap, dropout_p, seed, offset : optional
        As in `fastattn.attention_varlen`, inside each sequence.
    alibi_slopes, sinks, bias, mask : optional
        As in `fastattn.attention_varlen`: whole, the same in every rank.
    return_lse, stream, engine : optional
        As in `fastattn.attention_varlen`.

    Returns
    -------
    out : array (rows, num_heads, head_dim_v)
        This rank's rows.
    lse : array (num_heads, rows)
        Only with ``return_lse``.

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
    >>> import fastattn
    >>> import fastattn.distributed as fd
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 4, 8))
    >>> cu = [0, 5, 62, 100]
    >>> whole = fastattn.attention_varlen(q, k, v, cu, cu, causal=True)
    >>> def work(group):
    ...     mine = [fd.shard(x, group, 0, cu_seqlens=cu) for x in (q, k, v)]
    ...     out = fd.attention_varlen(*mine, cu, group=group, causal=True)
    ...     return np.allclose(out, fd.shard(whole, group, 0, cu_seqlens=cu), atol=1e-12)
    >>> fd.threads(2, work)
    [True, True]
    """
    if more or unknown:
        raise unknown_arguments(attention_varlen, more, unknown)
    whole = Whole("distributed.attention_varlen", group, cu_seqlens, cu_seqlens_k, shard, method)
    options = causal, window, softmax_scale, softcap, dropout_p, seed, offset
    ready, _ = prepare(whole, options, stream, engine, (q, k, v), (bias, mask, alibi_slopes, sinks))
    return forward(ready, bool(return_lse))


@strict
def attention_varlen_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, cu_seqlens: Lengths, *more: Never,
                              group: Any = None, cu_seqlens_k: Lengths | None = None, shard: str = "zigzag", method: Any = "auto",
                              causal: Causal = False, window: Window | None = None, softmax_scale: Number | None = None,
                              softcap: Number | None = None, alibi_slopes: PerHead | None = None, bias: Array | None = None,
                              mask: Array | None = None, sinks: PerHead | None = None, dropout_p: Number = 0.0,
                              seed: Integer | None = None, offset: Integer = 0, dlse: Array | None = None, need_dbias: bool = False,
                              deterministic: bool = False, stream: Any = None, engine: EngineName | None = None,
                              **unknown: Never) -> Grads[A]:
    """Gradients of `attention_varlen`, of this rank's rows. Every rank of the group calls it.

    Parameters
    ----------
    dout, out : array (rows, num_heads, head_dim_v)
        Gradient of this rank's out, and that out.
    q, k, v : array
        The forward's.
    lse : array (num_heads, rows)
        The forward's, with ``return_lse=True``.
    cu_seqlens : array (sequences + 1,)
        The forward's.
    group, cu_seqlens_k, shard, method : optional
        As in `attention_varlen`. The method may be another than the forward's.
    causal, window, softmax_scale, softcap, alibi_slopes, bias, mask, sinks, dropout_p, seed, offset : optional
        The forward's, with the same values.
    dlse : array (num_heads, rows), optional
        Gradient of lse, in every rank or in none.
    need_dbias, deterministic : bool, default False
        As in `fastattn.attention_varlen_backward`.
    stream, engine : optional
        As in `attention_varlen`.

    Returns
    -------
    Grads
        dq, dk and dv of this rank's rows; dbias and dsinks, whole, the sums over all ranks.

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
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 96, 4, 8))
    >>> cu = [0, 32, 96]
    >>> def work(group):
    ...     mine = [fd.shard(x, group, 0, cu_seqlens=cu) for x in (q, k, v, dout)]
    ...     out, lse = fd.attention_varlen(*mine[:3], cu, group=group, return_lse=True)
    ...     return fd.attention_varlen_backward(mine[3], *mine[:3], out, lse, cu, group=group).dv.shape
    >>> fd.threads(2, work)
    [(48, 4, 8), (48, 4, 8)]
    """
    if more or unknown:
        raise unknown_arguments(attention_varlen_backward, more, unknown)
    whole = Whole("distributed.attention_varlen_backward", group, cu_seqlens, cu_seqlens_k, shard, method)
    options = causal, window, softmax_scale, softcap, dropout_p, seed, offset
    ready, given = prepare(whole, options, stream, engine, (q, k, v), (bias, mask, alibi_slopes, sinks), (dout, out, lse, dlse),
                           bool(need_dbias), bool(deterministic))
    assert given is not None
    return backward(ready, given)
