"""One rank: reads the cases (JSON) from its first argument, measures them with the others, and rank 0 prints a line of JSON for each.

Arrays on a device are fastattn's own, so no other library is needed. A time is that from a barrier until this rank's device has done its
work, the median of several, and of the ranks that of the slowest. `step` is a forward and a backward of several in a row, as in a training
loop, where the host goes ahead; `host` is when the call returns. `one` are the same of one rank while the others wait.
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

import fastattn
import fastattn.distributed as fd
from fastattn.arrays.streams import Stream, check, driver, on_device
from fastattn.arrays.view import View, contiguous, size_of
from fastattn.distributed import checks
from fastattn.distributed.memory import Memory, cut, memory_of

from .calls import Calls, Rows, rows_of
from .cases import ERROR_ROWS, Case
from .footprint import Footprint
from .trace import Trace

RUNS, LEAST = 5, 0.3            # runs of a timing, one of a long sequence, and seconds that all of them take at least
IN_A_ROW = 4                    # steps
EACH = 16                       # of a result every so many rows are compared
BLOCK = 1 << 22                 # random numbers that are drawn; arrays repeat them, with a shift
OF_ALL = ("forward", "backward", "step", "forward_host", "backward_host", "gib")      # of which a row has the largest of all ranks


class Rank:
    """The group, the memory and the stream of this process."""

    def __init__(self, device: str, leave: int = 0) -> None:
        self.leave = leave
        self.group = fd.connect("cpu" if device == "cpu" else 0, timeout=120)
        self.stream: Any = None
        if device != "cpu":
            self.index = 0                  # the one that this process sees
            with on_device(self.index):
                handle = int(check(driver().cuStreamCreate(driver().CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate"))
                keep_memory(self.index)
            self.stream = Stream(handle, self.index)
        self.memory: Memory = memory_of(self.stream)
        self.trace = Trace(self.stream)

    @property
    def keywords(self) -> dict[str, Any]:
        return {} if self.stream is None else {"stream": self.stream.handle}

    def synchronize(self) -> None:
        if self.stream is not None:
            with on_device(self.index):
                check(driver().cuCtxSynchronize(), "cuCtxSynchronize")

    @contextmanager
    def fewer_processors(self) -> Iterator[None]:
        """Forwards whose first call is inside have thread blocks for all multiprocessors but `leave`. Backwards are no such grids."""
        if not self.leave:
            yield
            return
        from fastattn.gpu.runtime.launcher import on_device as launcher_of

        launcher = launcher_of(self.index)
        whole = launcher.device
        launcher.device = replace(whole, num_sms=whole.num_sms - self.leave)
        try:
            yield
        finally:
            launcher.device = whole

    def barrier(self) -> None:
        self.synchronize()
        if self.group.size > 1:
            checks.everyones(self.group, "", False)

    def array(self, shape: tuple[int, ...], dtype: str, seed: int, rows: list[tuple[int, int]]) -> Any:
        """Rows of a whole random array (1, seqlen, heads, dim) that is the same in every rank."""
        _, _, heads, dim = shape
        block = np.random.default_rng(seed).standard_normal((BLOCK // (heads * dim), heads, dim), np.float32)
        words = as_bytes(block, dtype)
        own = sum(stop - start for start, stop in rows)
        to = self.memory.empty((1, own, heads, dim), dtype)
        first = 0
        source = typed(self.memory.upload(words), block.shape, dtype)
        for start, stop in rows:
            while start < stop:
                at = start % len(block)
                count = min(stop - start, len(block) - at)
                part = cut(source, 0, slice(at, at + count))
                self.memory.copy(cut(to, 1, slice(first, first + count)), View(part.ptr, (1, *part.shape), (0, *part.strides), dtype,
                                                                               part.device, part))
                start, first = start + count, first + count
        return to.numpy() if self.stream is None else to

    def numbers(self, x: Any, rows: Any) -> Any:
        """Some rows of a result (1, rows, heads, dim) or (rows, heads, dim), on the host, as float32."""
        view = memory_view(x)
        if len(view.shape) == 4:
            view = View(view.ptr, view.shape[1:], view.strides[1:], view.dtype, view.device, view)
        wide = self.memory.empty((len(rows), *view.shape[1:]), "float32")
        self.memory.move(wide, view, len(rows), None, self.memory.numbers(rows))
        return np.frombuffer(self.memory.download(wide), np.float32).reshape(wide.shape)

    def seconds(self, call: Callable[[], Any], together: bool = True, runs: int = RUNS) -> tuple[float, float]:
        """The medians of several runs of a call that has run before: until the device has done its work, and until it has returned."""
        found, host, start = list[float](), list[float](), time.perf_counter()
        while len(found) < runs:
            self.barrier() if together else self.synchronize()
            begin = time.perf_counter()
            call()
            host.append(time.perf_counter() - begin)
            self.synchronize()
            found.append(time.perf_counter() - begin)
            if not together and len(found) == runs and time.perf_counter() - start < LEAST:
                runs += 1
        return statistics.median(found), statistics.median(host)

    def times(self, forward: Callable[[], Any], backward: Callable[[], Any], together: bool, runs: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, call in (("forward", forward), ("backward", backward)):
            found[name], found[f"{name}_host"] = self.seconds(call, together, runs)

        def steps() -> None:
            for _ in range(IN_A_ROW):
                forward()
                backward()
        found["step"] = self.seconds(steps, together, max(runs // 2, 1))[0] / IN_A_ROW if runs > 1 else found["forward"] + found["backward"]
        return found


def memory_view(x: Any) -> View:
    if isinstance(x, np.ndarray):
        return View(x.ctypes.data, x.shape, x.strides, str(x.dtype), owner=x)
    return x.view() if hasattr(x, "view") else x  # type: ignore[no-any-return]


def keep_memory(device: int) -> None:
    """Results come from the driver's default pool, which would give memory back at each synchronization and map it again in each call."""
    d = driver()
    pool = check(d.cuDeviceGetDefaultMemPool(check(d.cuDeviceGet(device), "cuDeviceGet")), "cuDeviceGetDefaultMemPool")
    most = d.cuuint64_t(2**63)
    check(d.cuMemPoolSetAttribute(pool, d.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, most), "cuMemPoolSetAttribute")


def as_bytes(x: Any, dtype: str) -> bytes:
    if dtype == "bfloat16":
        import ml_dtypes

        return bytes(x.astype(ml_dtypes.bfloat16).tobytes())
    return bytes(x.astype(dtype).tobytes())


def typed(words: View, shape: tuple[int, ...], dtype: str) -> View:
    """Bytes as an array of a dtype."""
    item = size_of(words) // int(np.prod(shape))
    return View(words.ptr, shape, contiguous(shape, item), dtype, words.device, words)


def measure(rank: Rank, case: Case, known: dict[Case, dict[str, float]]) -> dict[str, Any]:
    """A row of the table: times and errors of the worst rank. `known`: the times of one rank, of cases that were measured."""
    group, size = rank.group, rank.group.size
    rows, footprint = rows_of(case, size, group.rank) if size > 1 else [(0, case.seqlen)], Footprint(rank.stream)
    q, k, v, dout = arrays(rank, case, rows)
    calls = Calls(case, group, rank.keywords)
    with rank.fewer_processors():
        out, lse = calls.forward(q, k, v)
    grads, runs = calls.backward(dout, q, k, v, out, lse), RUNS if case.seqlen <= ERROR_ROWS else 1
    row: dict[str, Any] = {"name": case.name, "ranks": size}
    row |= rank.times(lambda: calls.forward(q, k, v), lambda: calls.backward(dout, q, k, v, out, lse), True, runs)
    row |= {"gib": footprint.gib, "trace": []}
    if case.seqlen <= ERROR_ROWS:
        row["trace"] = rank.trace.of(rank, lambda: (calls.forward(q, k, v), calls.backward(dout, q, k, v, out, lse)))
        row |= beside_one(rank, case, rows, {"out": out, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}, known)
    texts = checks.everyones(group, json.dumps({key: x for key, x in row.items() if key != "trace"}), False) if size > 1 else []
    for other in [json.loads(text[1:]) for text in texts]:
        row |= {name: max(row[name], other[name]) for name in OF_ALL}
        for name, x in other.get("errors", {}).items():
            row["errors"][name] = max(row["errors"][name], x)
    return row


def arrays(rank: Rank, case: Case, rows: Rows) -> list[Any]:
    """q, k, v and dout of some rows."""
    found = [rank.array((1, case.seqlen, heads, case.head_dim), case.dtype, n, rows)
             for n, heads in enumerate((case.heads, case.heads_k, case.heads_k, case.heads))]
    if not case.documents:
        return found
    return [x[0] if isinstance(x, np.ndarray) else View(x.ptr, x.shape[1:], x.strides[1:], x.dtype, x.device, x) for x in found]


def beside_one(rank: Rank, case: Case, rows: Rows, mine: dict[str, Any], known: dict[Case, dict[str, float]]) -> dict[str, Any]:
    """The same on one rank: its times while the others wait, and the root mean square of the difference over that of the result."""
    row: dict[str, Any] = {"errors": {}}
    for turn in range(rank.group.size):
        rank.barrier()
        if turn == rank.group.rank:
            _alone(rank, case, rows, mine, row, known)
    rank.barrier()
    return row


def _alone(rank: Rank, case: Case, rows: Rows, mine: dict[str, Any], row: dict[str, Any], known: dict[Case, dict[str, float]]) -> None:
    q, k, v, dout = arrays(rank, case, [(0, case.seqlen)])
    calls = Calls(case, None, rank.keywords).lengths_on(lambda x: x if rank.stream is None else rank.memory.numbers(x))
    out, lse = calls.forward(q, k, v)
    grads = calls.backward(dout, q, k, v, out, lse)
    if rank.group.rank == 0:
        problem = replace(case, method="one", pieces=None, saved=False)
        if problem not in known:
            known[problem] = rank.times(lambda: calls.forward(q, k, v), lambda: calls.backward(dout, q, k, v, out, lse), False, RUNS)
        row |= {f"one_{name}": x for name, x in known[problem].items()}
    positions = np.concatenate([np.arange(*span) for span in rows])
    own = np.arange(0, len(positions), 1 if case.seqlen < 8192 else EACH)
    for name, x in (("out", out), ("dq", grads.dq), ("dk", grads.dk), ("dv", grads.dv)):
        found, wanted = rank.numbers(mine[name], own), rank.numbers(x, positions[own])
        difference = (found - wanted).astype(np.float64)
        row["errors"][name] = float(np.sqrt((difference**2).mean() / (wanted.astype(np.float64) ** 2).mean()))


def main() -> None:
    job = json.loads(sys.argv[1])
    rank, known = Rank(job["device"], job["leave"]), dict[Case, dict[str, float]]()
    if job["device"] == "cpu":
        fastattn.set_num_threads(max((os.cpu_count() or 1) // rank.group.size, 1))
    for case in [Case(**settings) for settings in job["cases"]]:
        if (case.method == "ulysses" and case.heads_k < rank.group.size) or (rank.group.size == 1 and case.seqlen > ERROR_ROWS):
            continue
        row = measure(rank, case, known)
        if rank.group.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
