"""Starts the ranks of each size, one process each, and collects the rows of rank 0."""
from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import Case

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 560           # of all ranks of one size


def devices() -> int:
    """CUDA devices of this machine. SystemExit where there are none."""
    from fastattn.arrays.streams import check, driver

    try:
        return int(check(driver().cuDeviceGetCount(), "cuDeviceGetCount"))
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"no CUDA device: {error}; --device cpu measures on this machine's processor") from None


def run(cases: list[Case], sizes: list[int], device: str, seconds: float = SECONDS, leave: int = 0) -> Iterator[dict[str, Any]]:
    """The rows, as they are measured. A size whose ranks fail gives a row with a note. leave: multiprocessors that forwards leave free."""
    count = 1 if device == "cpu" else devices()
    for size in sizes:
        if device != "cpu" and size > count:
            yield {"name": "all", "ranks": size, "note": f"this machine has {count} CUDA devices"}
            continue
        yield from _of_size(cases, size, device, count, seconds, leave)


def _of_size(cases: list[Case], size: int, device: str, count: int, seconds: float, leave: int) -> Iterator[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    job = json.dumps({"device": device, "leave": leave, "cases": [asdict(case) for case in cases]})
    same = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_NVLS_ENABLE": "0"}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")       # a rank sees its own alone
    ranks = [subprocess.Popen([sys.executable, "-m", "bench.distributed.worker", job], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                              env=os.environ | same | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": visible[rank % len(visible)]})
             for rank in range(size)]
    timer = threading.Timer(seconds, lambda: [rank.kill() for rank in ranks])
    timer.start()
    try:
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            if line.startswith("{"):
                yield json.loads(line)
        ended = [rank.wait() for rank in ranks]
        if any(ended):
            yield {"name": "all", "ranks": size, "note": f"the ranks ended with status {', '.join(map(str, ended))}"}
    finally:
        timer.cancel()
        for rank in ranks:
            rank.kill()


def versions() -> str:
    found = []
    for name in ("fastattn", "nccl4py", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "numba-cuda", "numpy"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
