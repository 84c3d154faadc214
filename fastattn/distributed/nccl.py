"""A group over nccl4py: CUDA arrays.

Messages go through the bindings that nccl4py brings. The communicator's own `send` and `recv` ask cuda-bindings on which device a buffer
is, which some versions answer with 0 for every device (NVIDIA/cuda-python issue 2928), and they take the host several times as long.

All messages of an exchange are one NCCL group on the device's stream of transfers, behind an event of the call's stream; the call's stream
waits for it when the buffers are used. The host never waits. A thread watches: an error of NCCL, or a transfer that takes too long, ends
the group. Transfers of a CUDA graph are not watched: their events are the graph's.
"""
from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any

from ..arrays.streams import Stream, capturing, on_device
from ..arrays.view import size_of
from ..errors import message
from .device import Event, relax, transfer_stream
from .messages import Message, Pending, RankError
from .sockets import SocketGroup

SUCCESS, IN_PROGRESS = 0, 7     # of ncclResult_t
BYTES = 1                       # of ncclDataType_t: ncclUint8
LOOK = 0.2              # seconds between two looks of the thread that watches


class NcclGroup:
    """`control`, if there is one, says when another rank ends; then this process ends too, because NCCL would wait for ever."""

    reads = "cuda"

    def __init__(self, comm: Any, timeout: float, control: SocketGroup | None = None) -> None:
        if not comm.is_valid:
            raise ValueError(message("group", "comm", "is a communicator without ranks", "one that Communicator.init has made"))
        self._nccl, self._comm, self._control = importlib.import_module("nccl.bindings.nccl"), comm, control
        self._handle = self._nccl.Comm(int(comm.ptr))           # the bindings' own kind of number
        self.rank, self.size, self.device = int(comm.rank), int(comm.nranks), int(comm.device.device_id)
        self.timeout, self.failed = timeout, ""
        self._under_way, self._lock = deque[tuple[float, Event]](), threading.Lock()
        if control is not None:
            control.on_failure = self._end_process
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True, name="fastattn NCCL watch").start()

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        if self.failed:
            raise RankError(self.failed)
        assert stream is not None and stream.device == self.device, "checks.check_memory lets no other array in"
        transfers, nccl, comm = transfer_stream(self.device), self._nccl, self._handle
        with on_device(self.device):
            Event(stream).wait(transfers)
            nccl.group_start()
            try:
                for view, to in give:
                    nccl.send(view.ptr, size_of(view), BYTES, to, comm, transfers.handle)
                for view, source in take:
                    nccl.recv(view.ptr, size_of(view), BYTES, source, comm, transfers.handle)
            finally:
                nccl.group_end()
            done, watched = Event(transfers), not capturing(transfers.handle)
        if watched:
            with self._lock:
                self._under_way.append((time.monotonic(), done))
        return _Exchange(stream, done, (give, take))

    def abort(self, reason: str) -> None:
        if self._control is not None:
            self._control.abort(reason)
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = reason
            print(f"fastattn.distributed: rank {self.rank} ends its group: {reason}", file=sys.stderr, flush=True)
            self._comm.abort()

    def _end_process(self, reason: str) -> None:
        """What is on the device would wait for ever, and so would the end of Python."""
        print(f"fastattn.distributed: rank {self.rank} ends: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def look(self) -> None:
        """End the group if something is wrong."""
        with self._lock:
            while self._under_way and self._under_way[0][1].happened:
                self._under_way.popleft()
            oldest = self._under_way[0][0] if self._under_way else None
        if oldest is not None and time.monotonic() - oldest > self.timeout:
            self._lost(f"a transfer has not ended in {self.timeout:g} seconds")
        elif self._comm.is_valid and self._failed_in_nccl():
            self._lost(f"NCCL: {self._comm.get_last_error()}")

    def _failed_in_nccl(self) -> bool:
        return int(self._comm.get_async_error()) not in (SUCCESS, IN_PROGRESS)

    def _lost(self, reason: str) -> None:
        if self._control is not None:
            self._control.abort(reason)         # ends this process too
        self._fail(reason)


def _watch(group: weakref.ref[NcclGroup]) -> None:
    """Looks at the group until it has failed or nobody has it."""
    relaxed = False
    while True:
        time.sleep(LOOK)
        found = group()
        if found is None or found.failed:
            return
        if not relaxed:
            relax()
            relaxed = True
        found.look()
        del found


class _Exchange:
    """`kept` are the messages, whose memory must not be used again before the call's stream has waited."""

    def __init__(self, stream: Stream, done: Event, kept: Any) -> None:
        self.stream, self.done, self.kept = stream, done, kept

    def wait(self) -> None:
        self.done.wait(self.stream)
        self.kept = None
