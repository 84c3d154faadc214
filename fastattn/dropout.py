"""`dropout_mask`: the mask that a call's dropout draws, for callers that need it as an array."""
from __future__ import annotations

import numpy as np

from .options import Check, read_options, read_position
from .problem import make_dropout
from .types import Integer, Number


def dropout_mask(batch: Integer, num_heads: Integer, seqlen_q: Integer, seqlen_k: Integer, *, dropout_p: Number, seed: Integer | None,
                 offset: Integer = 0, dropout_at: tuple[Integer, Integer, Integer, Integer] | None = None,
                 dropout_heads: Integer | None = None) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.bool_]]:
    """The dropout mask of a call: the exact elements that every engine keeps.

    Parameters
    ----------
    batch, num_heads, seqlen_q, seqlen_k : int
        The call's sizes. For packed arrays: the number of sequences and the longest ones.
    dropout_p, seed, offset, dropout_at, dropout_heads
        As in `attention`.

    Returns
    -------
    numpy.ndarray (batch, num_heads, seqlen_q, seqlen_k)
        bool, True = kept. Packed: entry n is sequence n, its first seqlen rows and columns.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range or no number.

    Notes
    -----
    Source: Philox4x32-10 of Salmon et al., SC 2011, addressed by position (fastattn/philox.py).

    Examples
    --------
    >>> from fastattn import dropout_mask
    >>> keep = dropout_mask(1, 2, 64, 64, dropout_p=0.25, seed=7)
    >>> keep.shape, bool(0.7 < keep.mean() < 0.8)
    ((1, 2, 64, 64), True)
    """
    from .philox import keep_mask

    check = Check("dropout_mask")
    shape = [check.integer(name, n, 0, 2**31 - 1) for name, n in (("batch", batch), ("num_heads", num_heads), ("seqlen_q", seqlen_q),
                                                                 ("seqlen_k", seqlen_k))]
    options = read_options(check.call, False, None, None, None, dropout_p, seed, offset)
    if dropout_at is not None or dropout_heads is not None:
        options, _ = read_position(check.call, options, None, dropout_at, dropout_heads)
    dropout = make_dropout(check, options.dropout_p, options.seed, options.offset, options.position, shape[1])
    if dropout is None:
        return np.ones(shape, bool)
    return keep_mask(dropout, range(shape[0]), shape[1], shape[2], shape[3])
