"""A process of bench/busy.py: `python -m bench.busy_worker IMPLEMENTATION BESIDE THREADS`.

A line of JSON on stdin is a turn, a line on stdout its times.
"""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from . import rivals
from .case import Case
from .timing import wall


def operators(threads: int) -> Callable[[], object]:
    """What a model computes between two attentions: 2 to 4 ms of torch's operators, after which its threads stay awake."""
    import torch

    torch.set_num_threads(threads)
    a, b, x = torch.randn(512, 512), torch.randn(512, 512), torch.randn(1 << 20)
    return lambda: (torch.mm(a, b), torch.nn.functional.gelu(x))


def turn(call: Callable[[], object], before: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, three at least. The one before them is not counted: it wakes threads."""
    times: list[float] = []
    before()
    call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        before()
        times.append(1e3 * wall(call))
    return times


def main(implementation: str, beside: bool, threads: int) -> None:
    make = rivals.make_torch if implementation == "torch" else rivals.make_fastattn
    before = operators(threads) if beside else lambda: None
    case, call = None, before
    for line in sys.stdin:
        job = json.loads(line)
        wanted = Case.from_json(job["case"])
        if wanted != case:
            case, call = wanted, make(wanted, rivals.make_inputs(wanted), threads).call
        times = turn(call, before, job["seconds"])
        print(json.dumps((float(np.median(times)), float(np.mean(times)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]))
