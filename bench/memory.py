"""Peak memory of one call, beyond its inputs and results."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from . import rivals
from .case import ITEMSIZE, Case
from .rivals import Runner
from .timing import wall


def extra(case: Case, implementation: str, threads: int) -> dict[str, float | str]:
    """Megabytes and seconds of one call in this process, which must be fresh: {"megabytes": ..., "seconds": ..., "label": ...}.

    A tiny call first loads the library; it is too small to grow the workspaces. Then Linux's record of the peak
    resident size is reset, so only the measured call counts. Needs Linux.
    """
    maker = rivals.MAKERS.get(implementation, rivals.make_fastattn)
    small = replace(case, batch=1, num_heads=1, seqlen=16)
    maker(small, rivals.make_inputs(small), threads).call()
    runner: Runner = maker(case, rivals.make_inputs(case), threads)
    shapes = (case.shape_q, case.shape_q, case.shape_k, case.shape_k)[: 4 if case.backward else 1]  # out, dq, dk, dv
    results = sum(math.prod(shape) for shape in shapes) * ITEMSIZE[case.dtype]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    seconds = wall(runner.call)
    return {"megabytes": max(0, _status("VmHWM") - before - results) / 1e6, "seconds": seconds, "label": runner.label}


def _status(field: str) -> int:
    """Bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
