"""Benchmark cases small enough for the reference engine, and a processor that stands in for a GPU."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.case import Bar, Case
from bench.results import Where
from fastattn.benchmark.timing import Call

TINY = Case("dense", 1, 2, 16, 8, causal=True, backward=True, against=("torch",), bars=(Bar("torch", "speedup", 1.5),))
WHERE = Where("2030-01-02", "A processor", "scalar", 1, "3.11", "numpy 2", "numpy matmul 9 GF/s")


class Processor:
    """A fake device for the GPU benchmark: CPU tensors and the wall clock."""

    name, l2_bytes = "cpu", 0

    def synchronize(self) -> None: ...
    def release(self) -> None: ...
    def poison(self, *like: Any) -> None: ...

    def clock_mhz(self, call: Call) -> int:
        return 1000

    def host_seconds(self, calls: Sequence[Call], repeats: int, finish: bool = False) -> float:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start

    def turn(self, calls: Sequence[Call], seconds: float) -> Callable[[], float]:
        return lambda: self.host_seconds(calls, 1)

    def extra_megabytes(self, call: Call) -> float:
        call()
        return 1.5

    def where(self) -> Where:
        return WHERE


def shrunk(case: Case) -> Case:
    """The same features at a size for the reference engine."""
    lengths = tuple(n // 256 + 1 for n in case.lengths[:3])
    case = replace(case, head_dim=16, num_heads=8 if case.num_heads_k else 2, num_heads_k=2 if case.num_heads_k else 0, kernels="")
    if case.seqlen == 1:
        return replace(case, batch=2, seqlen_k=40)
    return replace(case, batch=len(lengths) or 2, seqlen=max(lengths, default=24), lengths=lengths, window=case.window and 9)
