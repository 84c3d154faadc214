"""The public functions about who owns which rows."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.convert import Caller
from ..lengths import read_lengths
from ..options import LENGTH, Check
from ..types import A, Integer, Lengths
from .checks import group_of, shard_of
from .memory import cut, memory_of
from .messages import Message, exchange
from .spans import Sequences, Spans, parts, spans_of, total


def chunks(seqlen: Integer, size: Integer, rank: Integer, shard: str = "zigzag") -> list[tuple[int, int]]:
    """The rows that a rank owns of a sequence. Pure arithmetic: a data loader needs no group.

    Parameters
    ----------
    seqlen : int
        Rows of the whole sequence.
    size, rank : int
        Number of ranks, and one of them.
    shard : {"zigzag", "contiguous"}, default "zigzag"
        "zigzag": chunks r and 2 size - 1 - r of 2 size. "contiguous": chunk r of size.

    Returns
    -------
    list of (int, int)
        [start, stop) of each chunk, in the order of the rank's local rows. Bounds are multiples of 128 where chunks have 256 rows or
        more, else of 16; the last chunk ends with the sequence. A chunk may be empty.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range or no number.

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> fd.chunks(1000, 2, 0), fd.chunks(1000, 2, 1)
    ([(0, 256), (752, 1000)], [(256, 496), (496, 752)])
    """
    check = Check("distributed.chunks")
    n, p = check.integer("seqlen", seqlen, *LENGTH), check.integer("size", size, 1, 2**20)
    return [(a, b) for a, b in spans_of(n, p, check.integer("rank", rank, 0, p - 1), shard_of(check, shard))]


def _local(call: str, seqlen: Any, cu_seqlens: Any, size: int, rank: int, shard: Any) -> Spans:
    """The rows that a rank owns, of a sequence or of packed ones."""
    check = Check(call)
    how = shard_of(check, shard)
    if cu_seqlens is None:
        return spans_of(check.integer("seqlen", seqlen, *LENGTH), size, rank, how)
    return sequences_of(check, "cu_seqlens", cu_seqlens, size, how).spans(rank)


def sequences_of(check: Check, argument: str, cu_seqlens: Any, size: int, shard: str) -> Sequences:
    """Packed sequences from cumulative lengths in host memory."""
    from ..arrays.convert import small

    found = small(cu_seqlens, None, check.call, argument)
    _, lengths = read_lengths(check, argument, found)
    if lengths is None:
        raise check.value(argument, f"is on device {found.device}", "an array in host memory or a list, the same in every rank",
                          "what a rank sends depends on it")
    if lengths.ndim != 1 or not lengths.size or lengths[0] != 0 or (np.diff(lengths) < 0).any():
        raise check.value(argument, f"is {lengths.tolist()[:8]}", "cumulative lengths: 0 first, never decreasing")
    return Sequences(tuple(lengths.tolist()), size, shard)


def positions(seqlen: Integer | None, group: Any, *, shard: str = "zigzag", cu_seqlens: Lengths | None = None) -> np.ndarray[Any, Any]:
    """The positions in their sequence of this rank's rows: for rotary embeddings, labels, rows of a bias.

    Parameters
    ----------
    seqlen : int or None
        Rows of the whole sequence; None with cu_seqlens.
    group : group or communicator
        As in `attention`.
    shard : {"zigzag", "contiguous"}, default "zigzag"
        As in `chunks`.
    cu_seqlens : array (sequences + 1,), optional
        Cumulative lengths of packed sequences, in host memory.

    Returns
    -------
    numpy.ndarray (rows,)
        int64.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range or no number.

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> fd.threads(2, lambda group: fd.positions(64, group)[[0, 16]].tolist())
    [[0, 48], [16, 32]]
    """
    ranks = group_of(Check("distributed.positions"), group)
    spans = _local("distributed.positions", seqlen, cu_seqlens, ranks.size, ranks.rank, shard)
    rows = np.concatenate([np.arange(span.start, span.stop) for span in spans] or [np.arange(0)])
    if cu_seqlens is not None:
        starts = np.asarray(sequences_of(Check("distributed.positions"), "cu_seqlens", cu_seqlens, ranks.size, shard).starts)
        rows = rows - starts[np.searchsorted(starts, rows, "right") - 1]
    return rows


def shard(x: A, group: Any, axis: int = 1, *, shard: str = "zigzag", cu_seqlens: Lengths | None = None, stream: Any = None) -> A:
    """This rank's rows of a whole array, as an array of its own. Nothing is sent.

    Parameters
    ----------
    x : array
        Its axis `axis` is the whole sequence, or packed sequences.
    group : group or communicator
        As in `attention`.
    axis : int, default 1
        0 for packed arrays.
    shard : {"zigzag", "contiguous"}, default "zigzag"
        As in `chunks`.
    cu_seqlens : array (sequences + 1,), optional
        Cumulative lengths of packed sequences, in host memory. Every sequence is cut by itself, and sequence n is dealt out from rank n on.
        Local rows are the first chunks of all sequences, then their second chunks.
    stream : int or stream, optional
        As in `fastattn.attention`.

    Returns
    -------
    array
        Contiguous, of x's library.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit the array.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn.distributed as fd
    >>> fd.threads(2, lambda group: fd.shard(np.arange(64), group, 0)[::16].tolist())
    [[0, 48], [16, 32]]
    """
    call, ranks = "distributed.shard", group_of(Check("distributed.shard"), group)
    caller = Caller(call, "bshd", stream, "x", x)
    view, axis = caller.first, _axis(Check(call), caller.first.shape, axis)
    spans = _local(call, view.shape[axis], cu_seqlens, ranks.size, ranks.rank, shard)
    _fits(Check(call), view.shape[axis], cu_seqlens)
    result = caller.allocate((*view.shape[:axis], total(spans), *view.shape[axis + 1:]), view.dtype, view)
    memory = memory_of(caller.stream)
    for part in parts(spans):
        memory.copy(cut(result.view, axis, part.rows), cut(view, axis, slice(*part.span)))
    return result.finish()  # type: ignore[no-any-return]


def unshard(x: A, group: Any, seqlen: Integer | None = None, axis: int = 1, *, shard: str = "zigzag", cu_seqlens: Lengths | None = None,
            stream: Any = None) -> A:
    """The whole array from the rows of all ranks, in every rank. Every rank of the group calls it.

    Parameters
    ----------
    x : array
        This rank's rows.
    group : group or communicator
        As in `attention`.
    seqlen : int, optional
        Rows of the whole sequence. Default: as many in every rank as in this one; with cu_seqlens their last entry.
    axis : int, default 1
        Of the rows; 0 for packed arrays.
    shard, cu_seqlens, stream : optional
        As in `shard`.

    Returns
    -------
    array
        Contiguous, of x's library.

    Raises
    ------
    ValueError, TypeError, RankError
        An argument does not fit the array, or another rank fails.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn.distributed as fd
    >>> fd.threads(2, lambda group: fd.unshard(fd.shard(np.arange(100), group, 0), group, 100, 0).tolist() == list(range(100)))
    [True, True]
    """
    call = "distributed.unshard"
    check = Check(call)
    ranks = group_of(check, group)
    caller = Caller(call, "bshd", stream, "x", x)
    view, axis = caller.first, _axis(check, caller.first.shape, axis)
    if seqlen is None and cu_seqlens is None:
        seqlen = view.shape[axis] * ranks.size
    spans = [_local(call, seqlen, cu_seqlens, ranks.size, rank, shard) for rank in range(ranks.size)]
    if view.shape[axis] != total(spans[ranks.rank]):
        raise check.value("x", f"has {view.shape[axis]} rows on axis {axis}", f"this rank's {total(spans[ranks.rank])}",
                          "" if seqlen is None else f"seqlen is taken to be {seqlen}")
    rows = sum(total(own) for own in spans) if cu_seqlens is None else int(
        sequences_of(check, "cu_seqlens", cu_seqlens, ranks.size, shard).starts[-1])
    rest, memory = (*view.shape[:axis], *view.shape[axis + 1:]), memory_of(caller.stream)
    first = view.permute((axis, *[n for n in range(len(view.shape)) if n != axis]))
    mine = memory.empty(first.shape, view.dtype)
    memory.copy(mine, first)
    kept = {rank: mine if rank == ranks.rank else memory.empty((total(own), *rest), view.dtype) for rank, own in enumerate(spans)}
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    exchange(ranks, [Message(mine, rank) for rank in others], [Message(kept[rank], rank) for rank in others], caller.stream).wait()
    result = caller.allocate((*view.shape[:axis], rows, *view.shape[axis + 1:]), view.dtype, view)
    to = result.view.permute((axis, *[n for n in range(len(view.shape)) if n != axis]))
    for rank, own in enumerate(spans):
        for part in parts(own):
            memory.copy(cut(to, 0, slice(*part.span)), cut(kept[rank], 0, part.rows))
    return result.finish()  # type: ignore[no-any-return]


def _axis(check: Check, shape: tuple[int, ...], axis: Any) -> int:
    n = check.integer("axis", axis, -len(shape), len(shape) - 1)
    return n % len(shape)


def _fits(check: Check, rows: int, cu_seqlens: Any) -> None:
    last = rows if cu_seqlens is None else sequences_of(check, "cu_seqlens", cu_seqlens, 1, "zigzag").starts[-1]
    if last != rows:
        raise check.value("x", f"has {rows} rows", f"the last of cu_seqlens, {last}")
