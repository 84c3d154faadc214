"""`connect`: a group from what the environment says, without a communicator of the caller's."""
from __future__ import annotations

import atexit
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import message
from .group import group as group_of
from .messages import TIMEOUT, Group, RankError
from .sockets import SocketGroup

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")
_LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def connect(device: str | int | None = None, *, timeout: float = TIMEOUT) -> Group:
    """A group of all processes of this program.

    Parameters
    ----------
    device : "cpu", int or None
        "cpu": for host arrays. A number: for arrays on this CUDA device, over NCCL. None: the CUDA device of the process's local rank where
        nccl4py is installed, else "cpu".
    timeout : float, default 600
        Seconds until a rank, or a message, that does not come raises RankError.

    Returns
    -------
    Group
        Of one rank where the environment names no others.

    Raises
    ------
    RankError
        Ranks do not come.
    ImportError
        nccl4py is missing.

    Notes
    -----
    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name the ranks, as torchrun and others set them: rank 0 listens there, and ranks connect
    with each other over TCP. Otherwise, in a process of mpiexec, mpi4py is used. An error that ends a rank ends all ranks. One NCCL
    identifier, 128 bytes, goes round in the same way; host arrays travel over these connections.

    Examples
    --------
    >>> import fastattn.distributed as fd
    >>> group = fd.connect("cpu")
    >>> group.rank, group.size
    (0, 1)
    """
    environment = os.environ
    number = _device(device, environment)
    control = None
    if "WORLD_SIZE" in environment:
        rank, size, port = [_integer(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
        control = SocketGroup(rank, size, environment.get("MASTER_ADDR", "127.0.0.1"), port, timeout)
        _end_together(control)
    elif any(name in environment for name in _MPI):
        from mpi4py import MPI

        group = group_of(MPI.COMM_WORLD, timeout=timeout)
        if number is None:
            return group
        return _nccl(number, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, lambda words: MPI.COMM_WORLD.bcast(words), timeout, None)
    if control is None:
        control = SocketGroup(0, 1, "", 0, timeout)
    if number is None:
        return control
    return _nccl(number, control.rank, control.size, lambda words: _told_by_first(control, words), timeout, control)


def _device(device: Any, environment: Mapping[str, str]) -> int | None:
    """The CUDA device of this process; None for host arrays."""
    if device == "cpu":
        return None
    if device is None:
        if importlib.util.find_spec("nccl") is None:
            return None
        return next((int(environment[name]) for name in _LOCAL if name in environment), 0)
    if not isinstance(device, int):
        raise TypeError(message("connect", "device", f"is {device!r}", "'cpu', the number of a CUDA device, or None"))
    return device


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise RankError(f"connect(): {name} is {text!r} in the environment; expected a number beside WORLD_SIZE, as torchrun sets it.")
    return int(text)


def _told_by_first(control: SocketGroup, words: bytes | None) -> bytes:
    """Rank 0's bytes, in every rank."""
    if control.rank:
        return control.receive(0)
    for rank in range(1, control.size):
        control.send(rank, words or b"")
    return words or b""


def _nccl(device: int, rank: int, size: int, tell: Any, timeout: float, control: SocketGroup | None) -> Group:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")      # multicast gains nothing for messages between two ranks
    try:
        import nccl.core as nccl
        from cuda.core import Device
    except ImportError as error:
        raise ImportError(f"connect(): CUDA arrays need nccl4py, which cannot be loaded ({error}): pip install 'nccl4py[cu13]'; "
                          "connect('cpu') needs nothing.") from error
    from .nccl import NcclGroup

    Device(device).set_current()
    identifier = tell(bytes(nccl.get_unique_id()) if rank == 0 else None)
    comm = nccl.Communicator.init(size, rank, nccl.UniqueId.from_bytes(identifier))
    return NcclGroup(comm, timeout, control)


def _end_together(control: SocketGroup) -> None:
    """An error that ends this process, or a thread of it, ends the other ranks; a process that ends without one says goodbye."""
    before, before_thread = sys.excepthook, threading.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        control.abort(f"{kind.__name__}: {error}")
        before(kind, error, trace)

    def thread_hook(arguments: Any) -> None:
        if arguments.exc_type is not SystemExit:
            control.abort(f"{arguments.exc_type.__name__}: {arguments.exc_value}")
        before_thread(arguments)
    sys.excepthook, threading.excepthook = hook, thread_hook
    atexit.register(control.close)
