"""Timing on a CUDA device, with torch's events."""
from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from .timing import Call

CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep, roughly
LONGEST_SLEEP = 0.02  # seconds
QUEUE = 64  # calls queued at once: far below what the driver accepts before it blocks the host
MOST_SETS = 16


def sets_of(input_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs to go round, so that they do not stay in the L2 cache."""
    return 1 if input_bytes > 2 * l2_bytes else min(MOST_SETS, -(-3 * l2_bytes // input_bytes))


class Events:
    """Where calls run and how they are timed. The tests have their own."""

    name = "cuda"

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.l2_bytes = int(getattr(self.torch.cuda.get_device_properties(0), "L2_cache_size", 60 << 20))

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def host_seconds(self, calls: Sequence[Call], repeats: int, finish: bool = False) -> float:
        """Seconds per call until it returns, on an idle device. finish: until the device has done them all."""
        self.synchronize()
        start = time.perf_counter()
        for n in range(repeats):
            calls[n % len(calls)]()
        if finish:
            self.synchronize()
        elapsed = time.perf_counter() - start
        self.synchronize()
        return elapsed / repeats

    def turn(self, calls: Sequence[Call], seconds: float) -> Callable[[], float]:
        """A turn of about `seconds` of device time. It returns device seconds per call, over several inputs if `calls` has several.

        The device sleeps while the host queues the calls. So only device time is measured, not what a library does
        before its kernels.
        """
        cuda = self.torch.cuda
        self.host_seconds(calls, 3)  # allocates
        host = self.host_seconds(calls, 3)
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))

        def timed(repeats: int) -> float:
            cuda._sleep(int(min(repeats * host * 1.5 + 50e-6, LONGEST_SLEEP) * CYCLES_PER_SECOND))
            begin.record()
            for n in range(repeats):
                calls[n % len(calls)]()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3 / repeats

        repeats = max(1, min(QUEUE, int(seconds / max(timed(3), 1e-7))))
        return lambda: timed(repeats)
