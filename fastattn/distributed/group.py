"""The group of a communicator: which transport it is for."""
from __future__ import annotations

from typing import Any

from ..errors import message
from .messages import TIMEOUT, Group


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
