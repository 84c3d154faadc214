"""A group over mpi4py: NumPy arrays and CPU tensors."""
from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np

from ..arrays.streams import Stream
from ..arrays.view import View
from ..errors import message
from .messages import Message, Pending, RankError

PIECE = 1 << 30         # bytes: MPI before version 4 counts in 32 bits
LOOK = 0.0002           # seconds between two looks at messages under way, once they have taken as long


class MpiGroup:
    """Its communicator is a duplicate, so that no message of the caller's is taken for one of ours."""

    reads = "cpu"

    def __init__(self, comm: Any, timeout: float) -> None:
        mpi = sys.modules["mpi4py.MPI"]
        if comm == mpi.COMM_NULL or comm.Is_inter():
            raise ValueError(message("group", "comm", "is empty or joins two groups", "an intracommunicator", "MPI.COMM_WORLD works"))
        self._mpi, self._comm, self._timeout, self.rank, self.size = mpi, comm.Dup(), timeout, comm.rank, comm.size
        _end_all_on_errors(self._comm)

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        requests = [self._comm.Irecv(part, source) for view, source in take for part in self._pieces(view)]
        requests += [self._comm.Isend(part, to) for view, to in give for part in self._pieces(view)]
        return _Exchange(self, requests)

    def _pieces(self, view: View) -> list[Any]:
        words = view.numpy().reshape(-1).view(np.uint8)
        return [[words[first:first + PIECE], self._mpi.BYTE] for first in range(0, words.size, PIECE)]

    def abort(self, reason: str) -> None:
        print(f"fastattn.distributed: rank {self.rank} ends all ranks: {reason}", file=sys.stderr, flush=True)
        self._comm.Abort(1)


class _Exchange:
    def __init__(self, group: MpiGroup, requests: list[Any]) -> None:
        self.group, self.requests = group, requests

    def wait(self) -> None:
        test, start = self.group._mpi.Request.Testall, time.monotonic()
        while not test(self.requests):
            waited = time.monotonic() - start
            if waited > self.group._timeout:
                raise RankError(f"rank {self.group.rank}: messages of other ranks did not come in {self.group._timeout:g} seconds")
            if waited > LOOK:           # more ranks than processors: let the others run
                time.sleep(LOOK)


_ends: list[Any] = []       # the communicator that is aborted by an error nobody catches


def _end_all_on_errors(comm: Any) -> None:
    """An error that ends this process, or a thread of it, ends all ranks. Without this MPI waits for them at its end, for ever."""
    _ends.append(comm)
    if len(_ends) > 1:
        return
    before, before_thread = sys.excepthook, threading.excepthook

    def end() -> None:
        sys.stderr.flush()
        sys.stdout.flush()
        if not sys.modules["mpi4py.MPI"].Is_finalized():
            _ends[0].Abort(1)

    def hook(kind: Any, error: Any, trace: Any) -> None:
        before(kind, error, trace)
        end()

    def thread_hook(arguments: Any) -> None:
        before_thread(arguments)
        if arguments.exc_type is not SystemExit:
            end()
    sys.excepthook, threading.excepthook = hook, thread_hook
