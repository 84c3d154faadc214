"""What the host does in a distributed call of one rank, without a GPU and without other ranks:

    python -m tests.tools.gpu.rank_cost [--case "gather 32k 32/8"] [--ranks 2] [--rank 0] [--profile]

cuda-bindings loads a driver whose functions do nothing (host_cost.py), and NCCL is replaced by a group that sends nothing. What is left is
Python: microseconds until the first exchange is under way, until the first attention kernel is, and of the whole call; and what is
launched, sent and allocated. Medians of many calls.
"""
from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tools.gpu.host_cost import DRIVER

CALLS = 200


class Marks:
    """When things happened in a call, and how often."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.count = Counter[str]()

    def note(self, name: str) -> None:
        self.first.setdefault(name, time.perf_counter())
        self.count[name] += 1

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Noted when it ends."""
        def run(*arguments: Any, **keywords: Any) -> Any:
            found = work(*arguments, **keywords)
            self.note(name)
            return found
        return run


class Comm:
    """A communicator of nccl4py, and the functions of its bindings; sends nothing."""

    is_valid, ptr = True, 0x5000

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.nranks, self.device = rank, size, type("Device", (), {"device_id": 0})

    def nothing(self, *arguments: Any, **keywords: Any) -> int:
        return 0

    Comm = send = recv = group_start = group_end = get_async_error = abort = nothing


def posed(marks: Marks) -> None:
    """Kernels are not compiled, and what is launched, sent and allocated is noted."""
    from fastattn.distributed import device as memory
    from fastattn.distributed.nccl import NcclGroup
    from fastattn.distributed.run import Run
    from fastattn.gpu.runtime import cache, workspace
    from fastattn.gpu.runtime import compile as compiler

    compiler.binary = lambda source, arch, announce=True: cache.Binary(b"none", 1024, "")
    kernel: Any = compiler.Kernel
    kernel.enqueue = marks.around("launches", kernel.enqueue)
    for owner, name, noted in ((NcclGroup, "exchange", "exchanges"), (Run, "forward", "attention"), (Run, "backward", "attention"),
                               (memory.Buffer, "__init__", "buffers"), (memory.Event, "__init__", "events"),
                               (workspace, "allocate", "workspaces")):
        setattr(owner, name, marks.around(noted, getattr(owner, name)))


def calls(name: str, rank: int, size: int, marks: Marks) -> dict[str, Callable[[], Any]]:
    """The forward and the backward of a case of `bench distributed`."""
    from bench.distributed.calls import Calls, rows_of
    from bench.distributed.cases import cases
    from fastattn.arrays.device_array import DeviceArray
    from fastattn.arrays.streams import Stream
    from fastattn.distributed import nccl

    found = [case for case in cases("full", "cuda") if case.name == name]
    if not found:
        raise SystemExit(f"no case {name!r}; python -m bench distributed --list shows them")
    case, comm = found[0], Comm(rank, size)
    posed(marks)
    sys.modules["nccl.bindings.nccl"] = comm        # type: ignore[assignment]
    stream, batch = Stream(0x60, 0), () if case.documents else (1,)
    rows = sum(stop - start for start, stop in rows_of(case, size, rank))
    q, k, v, dout = [DeviceArray((*batch, rows, heads, case.head_dim), case.dtype, stream)
                     for heads in (case.heads, case.heads_k, case.heads_k, case.heads)]
    of_rank = Calls(case, nccl.NcclGroup(comm, 1e9), {"stream": stream.handle})
    out, lse = of_rank.forward(q, k, v)
    return {"forward": lambda: of_rank.forward(q, k, v), "backward": lambda: of_rank.backward(dout, q, k, v, out, lse)}


def measure(given: argparse.Namespace) -> None:
    marks = Marks()
    found = calls(given.case, given.rank, given.ranks, marks)
    gc.disable()
    for name, call in found.items():
        for _ in range(5):
            call()
        times = list[tuple[float, ...]]()
        for _ in range(CALLS):
            marks.first.clear()
            marks.count.clear()
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            times.append((marks.first.get("exchanges", end) - begin, marks.first["attention"] - begin, end - begin))
        exchange, attention, whole = [1e6 * statistics.median(column) for column in zip(*times, strict=True)]
        counts = ", ".join(f"{n} {what}" for what, n in sorted(marks.count.items()))
        print(f"{given.case}, rank {given.rank} of {given.ranks}, {name}: exchange {exchange:.0f} us, attention {attention:.0f} us, "
              f"all {whole:.0f} us; {counts}")
        if given.profile:
            with cProfile.Profile() as profiler:
                for _ in range(CALLS):
                    call()
            pstats.Stats(profiler).sort_stats(given.profile).print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="gather 32k 32/8", help="a name of python -m bench distributed --list")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--profile", default="", metavar="ORDER", help="also print a profile, in pstats' order tottime or cumtime")
    given = parser.parse_args()
    if os.environ.get("FASTATTN_RANK_COST"):
        measure(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "driver.c")
        source.write_text(DRIVER, encoding="utf-8")
        subprocess.run(["cc", "-O2", "-w", "-shared", "-fPIC", "-o", f"{folder}/libcuda.so.1", str(source)], check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "FASTATTN_RANK_COST": "1"}
        raise SystemExit(subprocess.run([sys.executable, "-m", "tests.tools.gpu.rank_cost", *sys.argv[1:]], env=environment,
                                        check=False).returncode)


if __name__ == "__main__":
    main()
