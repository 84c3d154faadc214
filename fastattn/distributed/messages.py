"""What a method needs of a group of ranks: its size, this rank, and one exchange of messages at a time."""
from __future__ import annotations

from typing import NamedTuple, Protocol

from ..arrays.streams import Stream
from ..arrays.view import View


class Message(NamedTuple):
    """A contiguous View that goes to a rank, or comes from one."""

    view: View
    rank: int


class Pending(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Until it returns, buffers that are sent must stay as they are, and those that are received hold nothing. CUDA: the call's stream
        waits, not the host.
        """


class Group(Protocol):
    """Ranks that compute one attention together. `reads`: the memory that they can exchange, "cpu", "cuda" or "" for both.

    All messages of an exchange are under way together. Between two ranks messages match by their order. A rank that has no message in an
    exchange leaves it out.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def reads(self) -> str: ...

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        """Start an exchange. CUDA: behind what is on `stream`, the call's, now."""

    def abort(self, reason: str) -> None:
        """End what is under way in all ranks: they raise RankError, or end."""


class RankError(RuntimeError):
    """Another rank failed, ranks do not agree, or a message did not come in time."""


class Done:
    """An exchange without messages."""

    def wait(self) -> None:
        pass


def exchange(group: Group, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
    """Start an exchange; messages without bytes are left out, at both ends."""
    give, take = [m for m in give if 0 not in m.view.shape], [m for m in take if 0 not in m.view.shape]
    return group.exchange(give, take, stream) if give or take else Done()


TIMEOUT = 600.0         # seconds until a message that does not come is an error
