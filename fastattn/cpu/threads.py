"""How many threads a call may use, and whose.

As many as the process may run on, unless OMP_NUM_THREADS or set_num_threads says otherwise, and at most MAX_THREADS. A
call uses fewer if the system makes no more or if there are fewer tasks (tasks.h).

They are the engine's own, or, where PyTorch is loaded, PyTorch's (borrowed.h). FASTATTN_BORROW=0 forbids that.
"""
from __future__ import annotations

import ctypes
import operator
import os
import sys
from collections.abc import Callable

from ..errors import message

MAX_THREADS = 1024      # more than today's machines have processors; pool.h counts helpers in 12 bits
SWITCH = "FASTATTN_BORROW"


def _cgroup_limit() -> float:
    """CPUs that the control group grants (cgroup v2 cpu.max, v1 cfs quota). Infinity without a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()[:2]
        return float("inf") if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as q, open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as p:
            limit = float(q.read()) / float(p.read())
        return limit if limit > 0 else float("inf")
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")


def _default() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return min(int(asked), MAX_THREADS)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, max(1.0, _cgroup_limit()), MAX_THREADS)))


_threads = _default()


def get_num_threads() -> int:
    """The number of threads that a call on the CPU may use.

    Returns
    -------
    int
        The last value passed to set_num_threads; before, OMP_NUM_THREADS, or the CPUs that this process may use
        (affinity and container limit). At most 1024.
    """
    return _threads


def set_num_threads(n: int) -> None:
    """Set how many threads a call on the CPU may use, from now on, in this process.

    Results do not depend on it. A call uses fewer threads for small work, or if the system makes no more.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Raises
    ------
    ValueError
        If n is anything else.
    """
    global _threads
    try:
        count = 0 if isinstance(n, bool) else operator.index(n)
    except TypeError:
        count = 0
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(message("set_num_threads", "n", f"is {n!r}", f"an integer from 1 to {MAX_THREADS}"))
    _threads = count


# ---------------------------------------------------------------- PyTorch's threads
_borrow: Callable[[int, int], None] | None = None       # the engine's function, until PyTorch is loaded


def borrow_with(borrow: Callable[[int, int], None]) -> None:
    """Let calls run on PyTorch's threads as soon as it is loaded, unless FASTATTN_BORROW=0. `borrow`: the engine's function."""
    global _borrow
    setting = os.environ.get(SWITCH) or "1"
    if setting not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {setting!r}; expected 0 or 1.")
    if setting == "1":
        _borrow = borrow


def threads_of_call() -> int:
    """get_num_threads(), for a call that starts now: it may be the first one after PyTorch was loaded."""
    global _borrow
    borrow = _borrow                        # another thread may set it to None meanwhile
    if borrow is not None and "torch._C" in sys.modules:
        entries = [_address(name) for name in ("GOMP_parallel", "omp_get_max_threads")]
        if all(entries):                    # PyTorch has other threads on macOS
            borrow(*entries)
        _borrow = None
    return _threads


def _address(function: str) -> int:
    """The address of a C function whose name is global in this process, as those of PyTorch's OpenMP runtime are; or 0."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), function), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0
