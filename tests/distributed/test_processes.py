"""Ranks that are processes: MPI, TCP, torch.distributed. All cases, and what happens when a rank fails."""
from __future__ import annotations

import re
import time

import pytest

from tests.tools.rank_processes import needs_mpi, of_environment, of_mpi

ILL = """
import numpy as np, os, sys, fastattn.distributed as fd
if "{transport}" == "mpi":
    from mpi4py import MPI
    group = fd.group(MPI.COMM_WORLD, timeout=60)
else:
    group = fd.connect("cpu", timeout=60)
x = np.ones((1, 64, 2, 8))
fd.attention(x, x, x, group=group)
if group.rank == 1:
    {fails}
fd.attention(x, x, x, group=group)
print("went on")
"""
FAILURES = {"exit": "sys.exit(3)", "error": "raise RuntimeError('this rank is ill')", "killed": "os.kill(os.getpid(), 9)",
            "thread": "import threading, time; threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)"}


@needs_mpi
@pytest.mark.parametrize("cases", ["ranks", "packed_ranks"])
@pytest.mark.parametrize("size", [2, 4])
def test_mpi(size: int, cases: str) -> None:
    status, output = of_mpi(size, "-m", f"tests.tools.{cases}", "mpi")
    assert status == 0 and output.count("done") == size and "rank" not in output, output         # mpiexec may mix lines


def test_tcp() -> None:
    assert of_environment(2, "-m", "tests.tools.ranks", "connect") == [(0, "done\n")] * 2


def test_torch() -> None:
    pytest.importorskip("torch")
    for status, output in of_environment(2, "-m", "tests.tools.ranks", "torch", "e"):
        assert status == 0 and output.splitlines()[-1] == "done" and "rank" not in output.replace("Rank", ""), output


@needs_mpi
def test_the_example_has_the_losses_of_one_rank() -> None:
    """examples/train_over_ranks.py: a rank alone, two over MPI, two over TCP."""
    for package in ("tqdm", "safetensors"):
        pytest.importorskip(package)
    arguments = "examples/train_over_ranks.py", "--steps", "2", "--context", "256"
    status, output = of_mpi(2, *arguments)
    alone, *two = of_environment(1, *arguments) + of_environment(2, *arguments) + [(status, output)]
    losses = [re.findall(r"loss ([.0-9]+) at first, ([.0-9]+) after", text) for _, text in (alone, *two)]
    assert [len(found) for found in losses] == [1, 1, 1, 2], losses
    for at_first, after in [pair for found in losses for pair in found]:
        assert abs(float(at_first) - float(losses[0][0][0])) < 1e-3 and abs(float(after) - float(losses[0][0][1])) < 1e-3
    assert float(losses[0][0][1]) < float(losses[0][0][0])


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["error", "killed", "thread"])
def test_a_rank_of_mpi_that_fails_ends_all(kind: str, size: int) -> None:
    start = time.monotonic()
    status, output = of_mpi(size, "-c", ILL.format(transport="mpi", fails=FAILURES[kind]), seconds=20)
    assert status != 0 and "went on" not in output and time.monotonic() - start < 20
    if kind == "error":
        assert "RuntimeError: this rank is ill" in output


@pytest.mark.parametrize("kind", ["error", "killed", "exit"])
def test_a_rank_of_tcp_that_fails_ends_all(kind: str) -> None:
    (status, output), (failed, _) = of_environment(2, "-c", ILL.format(transport="connect", fails=FAILURES[kind]), seconds=20)
    assert status == 1 and failed != 0 and "went on" not in output
    assert {"error": "RankError: rank 1 failed: RuntimeError: this rank is ill", "killed": "RankError: rank 1 ",
            "exit": "RankError: rank 0 waits for a message of rank 1, which has ended without an error"}[kind] in output


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_mpi_that_disagree_all_raise(size: int) -> None:
    code = """
import numpy as np, fastattn.distributed as fd
from mpi4py import MPI
group, x = fd.group(MPI.COMM_WORLD, timeout=60), np.ones((1, 64, 2, 8))
try:
    fd.attention(x, x, x, group=group, causal=group.rank == 1)
except fd.RankError as error:
    assert str(error).startswith("distributed.attention(): ranks do not agree: causal is False in rank 0, True in rank 1"), error
    print("raised", flush=True)
fd.attention(x, x, x, group=group)
print("went on", flush=True)
"""
    status, output = of_mpi(size, "-c", code, seconds=20, FASTATTN_CHECK_RANKS="1")
    assert status == 0 and output.count("raised") == output.count("went on") == size, output


LATE = """
import numpy as np, time, fastattn.distributed as fd
if "{transport}" == "mpi":
    from mpi4py import MPI
    group = fd.group(MPI.COMM_WORLD, timeout=1)
else:
    group = fd.connect("cpu", timeout=1)
x = np.ones((1, 64, 2, 8))
if group.rank == group.size - 1:
    time.sleep(60)
fd.attention(x, x, x, group=group)
"""


@needs_mpi
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_of_mpi_that_is_late_ends_all(size: int) -> None:
    status, output = of_mpi(size, "-c", LATE.format(transport="mpi"), seconds=20)
    assert status != 0 and "messages of other ranks did not come in 1 seconds" in output


def test_a_rank_of_tcp_that_is_late() -> None:
    """The others raise; it raises too when it comes."""
    (status, output), (late, of_late) = of_environment(2, "-c", LATE.format(transport="connect").replace("60", "5"), seconds=20)
    assert status == 1 and "a message of rank 1 did not come in 1 seconds" in output
    assert late == 1 and "RankError: rank 0 failed: RankError" in of_late


@needs_mpi
@pytest.mark.parametrize("longer", [0, 1])
def test_different_lengths_of_messages_are_found(longer: int) -> None:
    code = f"""
import numpy as np, fastattn.distributed as fd
from mpi4py import MPI
group, x = fd.group(MPI.COMM_WORLD, timeout=20), np.ones((1, 64, 4, 8))
part = x[..., :8 if group.rank == {longer} else 4]
fd.attention(part, part, x, group=group)
print("went on")
"""
    status, output = of_mpi(2, "-c", code, seconds=20)
    assert status != 0 and "went on" not in output
    assert "bytes that rank" in output or "bytes where rank" in output, output
    assert "FASTATTN_CHECK_RANKS=1 says which argument differs" in output


def test_ranks_that_do_not_come() -> None:
    code = """
import os, fastattn.distributed as fd
os.environ["WORLD_SIZE"] = "2"
try:
    fd.connect("cpu", timeout=1)
except fd.RankError as error:
    print(error)
"""
    assert of_environment(1, "-c", code, seconds=20) == [(0, "only 1 of 2 ranks have come\n")]
