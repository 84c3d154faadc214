"""What a method needs of a group of ranks: its size, this rank, and one exchange of messages at a time."""
from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from ..arrays.streams import Stream
from ..arrays.view import View
from ..errors import message


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


def group(comm: Any, *, timeout: float = TIMEOUT) -> Group:
    """A group of ranks from a communicator.

    Parameters
    ----------
    comm : communicator
        Of mpi4py (host arrays), of nccl4py (CUDA arrays), a ProcessGroup of torch.distributed (what its backend takes), or an object with
        the methods of a group: `rank`, `size`, `reads`, `exchange`, `abort`.
    timeout : float, default 600
        Seconds until a message that does not come raises RankError.

    Returns
    -------
    Group
        What `group=` of the functions takes. It has `rank` and `size`.

    Raises
    ------
    TypeError
        comm is none of these.

    Notes
    -----
    With mpi4py, an error that ends a rank ends all ranks within a second, also under plain ``mpiexec python``.

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> def work(group):
    ...     return fd.group(group).rank, group.size
    >>> fd.threads(2, work)
    [(0, 2), (1, 2)]
    """
    if all(hasattr(comm, name) for name in ("exchange", "reads", "rank", "size")):
        return comm  # type: ignore[no-any-return]
    known = _made.get((id(comm), timeout))
    if known is not None and known[0] is comm:
        return known[1]
    made = _of_communicator(comm, timeout)
    _made[id(comm), timeout] = comm, made
    return made


_made: dict[tuple[int, float], tuple[Any, Group]] = {}      # one group for each communicator: a call may be given the communicator itself


def _of_communicator(comm: Any, timeout: float) -> Group:
    modules = {base.__module__.partition(".")[0] for base in type(comm).__mro__}
    if "mpi4py" in modules:
        from .mpi import MpiGroup

        return MpiGroup(comm, timeout)
    if "nccl" in modules:
        from .nccl import NcclGroup

        return NcclGroup(comm, timeout)
    if "torch" in modules:
        from .process_group import TorchGroup

        return TorchGroup(comm, timeout)
    raise TypeError(message("group", "comm", f"is {type(comm).__name__}", "a communicator of mpi4py or nccl4py, or a ProcessGroup of torch",
                            "fastattn.distributed.connect() makes a group without one"))
