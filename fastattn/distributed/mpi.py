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
HINT = "FASTATTN_CHECK_RANKS=1 says which argument differs"


class MpiGroup:
    """Its communicator is a duplicate, so that no message of the caller's is taken for one of ours."""

    reads = "cpu"

    def __init__(self, comm: Any, timeout: float) -> None:
        mpi = sys.modules["mpi4py.MPI"]
        if comm == mpi.COMM_NULL or comm.Is_inter():
            raise ValueError(message("group", "comm", "is empty or joins two groups", "an intracommunicator", "MPI.COMM_WORLD works"))
        self._mpi, self._comm, self._timeout, self.rank, self.size = mpi, comm.Dup(), timeout, comm.rank, comm.size
        self.lost = list[Any]()         # requests that have not ended: MPI may still write to their memory
        _end_all_on_errors(self._comm)

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        expected = [(part, source) for view, source in take for part in self._pieces(view)]
        requests = [self._comm.Irecv(part, source) for part, source in expected]
        requests += [self._comm.Isend(part, to) for view, to in give for part in self._pieces(view)]
        return _Exchange(self, requests, [(part[0].size, source) for part, source in expected])

    def _pieces(self, view: View) -> list[Any]:
        words = view.numpy().reshape(-1).view(np.uint8)
        return [[words[first:first + PIECE], self._mpi.BYTE] for first in range(0, words.size, PIECE)]

    def abort(self, reason: str) -> None:
        print(f"fastattn.distributed: rank {self.rank} ends all ranks: {reason}", file=sys.stderr, flush=True)
        self._comm.Abort(1)


class _Exchange:
    """`expected`: bytes and rank of each message that is received; their requests come first."""

    def __init__(self, group: MpiGroup, requests: list[Any], expected: list[tuple[int, int]]) -> None:
        self.group, self.requests, self.expected = group, requests, expected

    def wait(self) -> None:
        try:
            self._wait()
        except RankError:
            self.group.lost.append(self.requests)
            raise

    def _wait(self) -> None:
        mpi, start = self.group._mpi, time.monotonic()
        arrived = [mpi.Status() for _ in self.requests]
        while not self._tested(arrived):
            waited = time.monotonic() - start
            if waited > self.group._timeout:
                raise RankError(f"rank {self.group.rank}: messages of other ranks did not come in {self.group._timeout:g} seconds")
            if waited > LOOK:           # more ranks than processors: let the others run
                time.sleep(LOOK)
        for status, (size, source) in zip(arrived, self.expected, strict=False):
            if status.Get_count(mpi.BYTE) != size:
                found = status.Get_count(mpi.BYTE)
                raise RankError(f"rank {source} gives {found} bytes where rank {self.group.rank} expects {size}; {HINT}")

    def _tested(self, arrived: list[Any]) -> bool:
        mpi, rank = self.group._mpi, self.group.rank
        try:
            return bool(mpi.Request.Testall(self.requests, arrived))
        except mpi.Exception as error:
            codes = [status.Get_error() for status in arrived]
            for code, (size, source) in zip(codes, self.expected, strict=False):
                if code != mpi.SUCCESS and mpi.Get_error_class(code) == mpi.ERR_TRUNCATE:
                    raise RankError(f"rank {source} gives more than the {size} bytes that rank {rank} expects; {HINT}") from error
            raise RankError(f"rank {rank}: MPI: {', '.join({mpi.Get_error_string(code) for code in codes} - {''}) or error}") from error


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
