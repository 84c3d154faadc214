"""A child of `python -m bench paired`: measures the fastattn of one tree, a turn whenever the parent says so.

Orders are JSON lines on stdin. Each has one answer on stdout:

    {"do": "compile", "cases": [...]}   ->  {}                     first calls, which put kernels into the cache
    {"do": "prepare", "case": {...}}    ->  {}                     make inputs and warm up; drops the case before
    {"do": "turn"}                      ->  {"seconds": ...}       per call
    a failure                           ->  {"failed": reason}

The package `bench` is the parent's, whatever tree fastattn comes from; START arranges that.
"""
from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import rivals
from .case import Case
from .timing import Budget, Call, turn, wall

Turn = Callable[[], float]
# Run by python -c with the parent's tree and the child's. Modules of a loaded package are found next to it, so `bench`
# stays the parent's.
START = ("import sys; sys.path[0] = sys.argv[1]; import bench; sys.path[0] = sys.argv[2]; "
         "from bench import paired_worker; paired_worker.main(sys.argv[2])")
BUDGET = Budget(turn=0.01)      # seconds of a turn on a CPU
GPU_TURN = 0.02                 # seconds of a turn on a GPU
HOST_CALLS = 200


def on_processor(case: Case, threads: int, engine: str | None = None) -> Turn:
    """Warm up; return a function that measures a turn: seconds per call by the wall clock."""
    call = rivals.make_fastattn(case, rivals.make_inputs(case), threads, engine).call
    seconds = min(wall(call) for _ in range(3))
    return lambda: turn(call, seconds, BUDGET, wall)


def on_device(case: Case, device: Any, engine: str | None = None) -> Turn:
    """The same on a GPU, in device time. Cases of group "host" measure the time until the call returns."""
    from .gpu import rivals as gpu_rivals
    from .gpu.worker import more_inputs

    sets = [gpu_rivals.make_inputs(case, device.name), *more_inputs(case, device)]
    calls: list[Call] = [gpu_rivals.make_fastattn(case, x, engine).call for x in sets]
    if case.group == "host":
        return lambda: float(device.host_seconds(calls[:1], HOST_CALLS))
    measured: Turn = device.turn(calls, GPU_TURN)
    measured()
    return measured


class Worker:
    """Carries out the orders. `device` is None for a CPU."""

    def __init__(self, device: Any, threads: int, engine: str | None = None) -> None:
        self.device, self.threads, self.engine = device, threads, engine
        self.turn: Turn | None = None

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, f"_{order['do']}")(order)  # type: ignore[no-any-return]
        except Exception as error:      # report it; the other cases go on
            if self.device:
                self.device.synchronize()       # raises again if the device is lost; then this process must end
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}

    def _compile(self, order: dict[str, Any]) -> dict[str, Any]:
        from .gpu.worker import compile_ahead

        for case in order["cases"]:
            compile_ahead(Case.from_json(case), self.device)
        return {}

    def _prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        self.turn = None
        gc.collect()
        if self.device:
            self.device.release()
        case = Case.from_json(order["case"])
        self.turn = on_device(case, self.device, self.engine) if self.device else on_processor(case, self.threads, self.engine)
        return {}

    def _turn(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.turn
        return {"seconds": self.turn()}


def main(tree: str) -> None:
    """Carry out orders until stdin ends. The first line is {"gpu": ..., "threads": ..., "engine": ...}."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)       # compilers may print on stdout
    os.dup2(2, 1)
    import fastattn

    found = Path(str(fastattn.__file__)).resolve()
    if not found.is_relative_to(tree):
        raise SystemExit(f"fastattn was imported from {found.parent}, not from {tree}")
    job = json.loads(sys.stdin.readline())
    device: Any = None
    if job["gpu"]:
        from .gpu.device import Device

        device = Device()
    worker = Worker(device, job["threads"], job["engine"])
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers)
