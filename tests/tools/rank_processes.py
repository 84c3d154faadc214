"""Programs whose ranks are processes of their own: of mpiexec, or started with RANK and WORLD_SIZE in their environment."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
                               reason="mpi4py or mpiexec is missing: pip install 'fastattn[distributed]'")


class Ended(Exception):
    """Some rank did not end in time."""


def environment(**more: str) -> dict[str, str]:
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("OMPI_", "PMI", "MPI_", "FASTATTN_CHECK"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])      # packages may be there, too
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def of_mpi(size: int, *arguments: str, seconds: float = 120, **more: str) -> tuple[int, str]:
    """(exit status, output) of `mpiexec -n size python arguments`."""
    command = [str(MPIEXEC), "-n", str(size), sys.executable, *arguments]
    running = subprocess.Popen(command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        running.terminate()         # mpiexec ends its ranks
        raise Ended(f"still running after {seconds} s") from None
    return running.returncode, output


def of_environment(size: int, *arguments: str, seconds: float = 120, **more: str) -> list[tuple[int, str]]:
    """(exit status, output) of each rank, a process with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    running = [subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=environment(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **more))
               for rank in range(size)]
    try:
        return [(process.returncode, output) for process in running for output in [process.communicate(timeout=seconds)[0]]]
    except subprocess.TimeoutExpired:
        raise Ended(f"still running after {seconds} s") from None
    finally:
        for process in running:
            with contextlib.suppress(OSError):
                process.kill()
