"""Ranks that are threads of this process: to try a program without MPI, and for tests. On CUDA they share one device or have one each."""
from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..arrays.streams import Stream
from ..arrays.view import View
from ..errors import message
from .messages import TIMEOUT, Message, Pending, RankError

T = TypeVar("T")


class _Letter(NamedTuple):
    """A View that a rank gives away, and the CUDA event after which it is filled."""

    view: View
    ready: Any


class _Board:
    """What the ranks share: letters and receipts by (from, to, number), and why the group has ended."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout, self.failed = size, timeout, ""
        self.changed, self.posted = threading.Condition(), dict[Any, Any]()

    def post(self, key: Any, x: Any) -> None:
        with self.changed:
            self.posted[key] = x
            self.changed.notify_all()

    def take(self, key: Any, what: str) -> Any:
        end = time.monotonic() + self.timeout
        with self.changed:
            while key not in self.posted:
                if self.failed:
                    raise RankError(self.failed)
                left = end - time.monotonic()
                if left <= 0:
                    raise RankError(f"{what} did not come in {self.timeout:g} seconds")
                self.changed.wait(left)
            return self.posted.pop(key)

    def fail(self, reason: str) -> None:
        with self.changed:
            self.failed = self.failed or reason
            self.changed.notify_all()


class ThreadGroup:
    """The group of one thread."""

    reads = ""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board, self.rank, self.size = board, rank, board.size
        self._given, self._taken = [0] * board.size, [0] * board.size       # messages to and from each rank

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        if self._board.failed:
            raise RankError(self._board.failed)
        ready = None
        if stream is not None:
            from .device import Event

            ready = Event(stream)
        sent, expected = list[tuple[Any, ...]](), list[tuple[View, tuple[Any, ...]]]()
        for view, to in give:
            key = (self.rank, to, self._given[to])
            self._given[to] += 1
            self._board.post(("letter", *key), _Letter(view, ready))
            sent.append(key)
        for view, source in take:
            expected.append((view, (source, self.rank, self._taken[source])))
            self._taken[source] += 1
        return _Exchange(self, sent, expected, stream, give)

    def abort(self, reason: str) -> None:
        self._board.fail(reason)


class _Exchange:
    """`kept` are the messages that are given, whose memory must not be used again before the call's stream has waited for the copies."""

    def __init__(self, group: ThreadGroup, sent: list[tuple[Any, ...]], expected: list[tuple[View, tuple[Any, ...]]],
                 stream: Stream | None, kept: Any) -> None:
        self.board, self.sent, self.expected, self.stream, self.rank = group._board, sent, expected, stream, group.rank
        self.kept = kept

    def wait(self) -> None:
        for view, key in self.expected:
            letter = self.board.take(("letter", *key), f"rank {self.rank}: a message of rank {key[0]}")
            if letter.view.shape != view.shape or letter.view.dtype != view.dtype:
                reason = (f"rank {key[0]} gives {letter.view.dtype} {letter.view.shape} where rank {self.rank} expects {view.dtype} "
                          f"{view.shape}; FASTATTN_CHECK_RANKS=1 says which argument differs")
                self.board.fail(reason)
                raise RankError(reason)
            self.board.post(("receipt", *key), self._copy(view, letter))
        for key in self.sent:
            done = self.board.take(("receipt", *key), f"rank {self.rank}: a receipt of rank {key[1]}")
            if done is not None:
                done.wait(self.stream)
        self.kept = None

    def _copy(self, view: View, letter: _Letter) -> Any:
        if self.stream is None:
            view.numpy()[...] = letter.view.numpy()
            return None
        from .device import copy_from

        return copy_from(view, letter.view, letter.ready, self.stream)


def threads(size: int, work: Callable[..., T], *arguments: Any, timeout: float = TIMEOUT) -> list[T]:
    """Run ``work(group, *arguments)`` in `size` threads, each with its own rank.

    Parameters
    ----------
    size : int
        Number of ranks.
    work : callable
        Called once a rank, with its group first.
    *arguments
        Further arguments of work.
    timeout : float, default 600
        Seconds until a message that does not come raises RankError.

    Returns
    -------
    list
        What the calls returned, in the order of ranks.

    Raises
    ------
    Exception
        The first error of a rank. It ends the other ranks.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> import fastattn.distributed as fd
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 4, 8))
    >>> def work(group):
    ...     mine = [fd.shard(x, group) for x in (q, k, v)]
    ...     return fd.unshard(fd.attention(*mine, group=group, seqlen=64, causal=True), group, 64)
    >>> out, same = fd.threads(2, work)
    >>> np.array_equal(out, same), np.array_equal(out, fastattn.attention(q, k, v, causal=True))
    (True, True)
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(message("threads", "size", f"is {size!r}", "a number of ranks, at least 1"))
    board, results, errors = _Board(size, timeout), list[Any]([None] * size), list[BaseException]()

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(board, rank), *arguments)
        except BaseException as error:      # of any kind: the others would wait for this rank
            errors.append(error)
            board.fail(f"rank {rank} failed: {type(error).__name__}: {error}")
    running = [threading.Thread(target=contextvars.copy_context().run, args=(run, rank), daemon=True) for rank in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    return results
