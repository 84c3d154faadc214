"""A group over TCP: host arrays between processes without MPI, and what NCCL's ranks learn of each other's end.

Every pair of ranks has one connection. A frame is its kind, its length and its bytes. A thread for each peer writes, another reads, so
nothing that a rank does keeps another from sending. A connection that ends before its rank has said goodbye ends the group.
"""
from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from ..arrays.streams import Stream
from ..arrays.view import View
from .memory import is_contiguous
from .messages import Message, Pending, RankError

_HEAD = struct.Struct("<cQ")
_DATA, _FAILED, _BYE = b"d", b"f", b"b"
_HELLO_BYTES = 4096
_TRY = 0.05             # seconds between two attempts to reach rank 0


class SocketGroup:
    """The group of one process. `failed`: why it has ended, "" while it has not."""

    reads = "cpu"

    def __init__(self, rank: int, size: int, host: str, port: int, timeout: float) -> None:
        self.rank, self.size, self.timeout, self.failed = rank, size, timeout, ""
        self.on_failure: Callable[[str], None] | None = None
        self._changed, self._leaving = threading.Condition(), False
        self._peers = {n: _Peer(self, n, s) for n, s in _mesh(rank, size, host, port, timeout).items()}

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        if self.failed:
            raise RankError(self.failed)
        written = [self._peers[to].write(_DATA, _bytes(view)) for view, to in give]
        return _Exchange(self, written, [(view, source, self._peers[source].expect()) for view, source in take])

    def send(self, rank: int, words: bytes) -> None:
        """Bytes for another rank's `receive`, in order with messages."""
        self._wait(self._peers[rank].write(_DATA, memoryview(words)).is_set, f"rank {rank} did not read")

    def receive(self, rank: int, number: int | None = None) -> bytes:
        """The message of this number, or the first that nobody has asked for."""
        peer = self._peers[rank]
        n = peer.expect() if number is None else number
        self._wait(lambda: n in peer.inbox or peer.left, f"a message of rank {rank} did not come")
        if n not in peer.inbox:
            raise RankError(f"rank {self.rank} waits for a message of rank {rank}, which has ended without an error")
        return bytes(peer.inbox.pop(n))

    def abort(self, reason: str) -> None:
        for peer in self._peers.values():
            peer.write(_FAILED, memoryview(f"rank {self.rank} failed: {reason}".encode()))
        self.fail(reason)

    def close(self) -> None:
        """Say goodbye. Other ranks may still read what was sent before."""
        self._leaving = True
        waiting = [peer.write(_BYE, memoryview(b"")) for peer in self._peers.values()]
        end = time.monotonic() + 5
        for done in waiting:
            done.wait(max(end - time.monotonic(), 0))

    def fail(self, reason: str) -> None:
        with self._changed:
            if self.failed or self._leaving:
                return
            self.failed = reason
            self._changed.notify_all()
        if self.on_failure is not None:
            self.on_failure(reason)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: ready() or bool(self.failed), self.timeout):
                raise RankError(f"rank {self.rank}: {what} in {self.timeout:g} seconds")
        if not ready():
            raise RankError(self.failed)

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Peer:
    """The connection with one other rank."""

    def __init__(self, group: SocketGroup, rank: int, connection: socket.socket) -> None:
        self.group, self.rank, self.connection, self.left = group, rank, connection, False
        self.inbox, self._arrived, self._expected = dict[int, bytearray](), 0, 0        # messages by their number
        self._outbox = queue.Queue[tuple[bytes, memoryview, threading.Event]]()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True, name=f"fastattn rank {rank}").start()

    def expect(self) -> int:
        """The number of the next message: exchanges are matched in the order in which they start, however they are waited for."""
        self._expected += 1
        return self._expected - 1

    def write(self, kind: bytes, words: memoryview) -> threading.Event:
        """Written when the Event is set; until then the bytes must stay."""
        done = threading.Event()
        self._outbox.put((kind, words, done))
        return done

    def _write(self) -> None:
        while True:
            kind, words, done = self._outbox.get()
            try:
                self.connection.sendall(_HEAD.pack(kind, words.nbytes))
                self.connection.sendall(words)
            except OSError as error:
                self.group.fail(f"rank {self.rank} cannot be reached: {error}")
            done.set()
            self.group.notify()

    def _read(self) -> None:
        try:
            while True:
                kind, length = _HEAD.unpack(_exactly(self.connection, _HEAD.size))
                words = _exactly(self.connection, length)
                if kind == _BYE:
                    self.left = True
                    self.group.notify()
                    return
                if kind == _FAILED:
                    self.group.fail(words.decode(errors="replace"))
                    return
                self.inbox[self._arrived] = words
                self._arrived += 1
                self.group.notify()
        except OSError as error:
            self.group.fail(f"rank {self.rank} has ended" + (f": {error}" if str(error) else ""))


class _Exchange:
    def __init__(self, group: SocketGroup, written: list[threading.Event], take: list[tuple[View, int, int]]) -> None:
        self.group, self.written, self.take = group, written, take

    def wait(self) -> None:
        for view, source, number in self.take:
            words, to = self.group.receive(source, number), _bytes(view)
            if len(words) != to.nbytes:
                reason = (f"rank {source} gives {len(words)} bytes where rank {self.group.rank} expects {to.nbytes}; "
                          "FASTATTN_CHECK_RANKS=1 says which argument differs")
                self.group.abort(reason)
                raise RankError(reason)
            to[:] = words
        for done in self.written:
            self.group._wait(done.is_set, "another rank did not read")


def _bytes(view: View) -> memoryview:
    assert is_contiguous(view)
    words: Any = view.numpy().reshape(-1).view("uint8")
    return memoryview(words)


def _exactly(connection: socket.socket, count: int) -> bytearray:
    """So many bytes. ConnectionError where the connection ends before."""
    found = bytearray(count)
    to, have = memoryview(found), 0
    while have < count:
        n = connection.recv_into(to[have:])
        if n == 0:
            raise ConnectionError
        have += n
    return found


# ---------------------------------------------------------------- how ranks find each other
def _mesh(rank: int, size: int, host: str, port: int, timeout: float) -> dict[int, socket.socket]:
    """A connection with every other rank. Rank 0 listens at host:port and tells all where the others listen."""
    if size == 1:
        return {}
    end = time.monotonic() + timeout
    found: dict[int, socket.socket] = {}
    with socket.create_server(("", port if rank == 0 else 0), backlog=size) as server:
        where = {rank: ("", server.getsockname()[1])}
        if rank == 0:
            _accept(server, found, size - 1, size, end, where)
            for connection in found.values():
                _tell(connection, {str(n): address for n, address in where.items()})
        else:
            found[0] = _reach(host, port, end)
            _tell(found[0], {"rank": rank, "size": size, "port": where[rank][1]})
            table = _hear(found[0])
            for n in range(1, rank):
                address, its_port = table[str(n)]
                found[n] = _reach(address, its_port, end)
                _tell(found[n], {"rank": rank, "size": size, "port": 0})
            _accept(server, found, size - 1, size, end, {})
    for connection in found.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def _accept(server: socket.socket, found: dict[int, socket.socket], count: int, size: int, end: float, where: dict[int, Any]) -> None:
    """Accept connections until there are `count`, and note where each rank listens."""
    while len(found) < count:
        server.settimeout(max(end - time.monotonic(), 0.001))
        try:
            connection, (address, *_) = server.accept()
        except TimeoutError:
            raise RankError(f"only {len(found) + 1} of {size} ranks have come") from None
        connection.settimeout(max(end - time.monotonic(), 0.001))
        hello = _hear(connection)
        if hello["size"] != size or hello["rank"] in found:
            raise RankError(f"rank {hello['rank']} of {hello['size']} has come, to a group of {size} ranks that has ranks {sorted(found)}")
        found[hello["rank"]] = connection
        where[hello["rank"]] = (address, hello["port"])


def _reach(host: str, port: int, end: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), max(end - time.monotonic(), 0.001))
        except OSError as error:
            if time.monotonic() > end:
                raise RankError(f"no rank answers at {host}:{port}: {error}") from None
            time.sleep(_TRY)


def _tell(connection: socket.socket, what: dict[str, Any]) -> None:
    words = json.dumps(what).encode()
    connection.sendall(len(words).to_bytes(4, "little") + words)


def _hear(connection: socket.socket) -> dict[str, Any]:
    with contextlib.suppress(ConnectionError):
        return dict(json.loads(_exactly(connection, int.from_bytes(_exactly(connection, 4), "little"))))
    raise RankError("a rank has ended while ranks were finding each other")
