"""One rank: reads the cases (JSON) from its first argument, measures them with the others, and rank 0 prints a line of JSON for each.

Arrays on a device are fastattn's own, so no other library is needed. `seconds` are wall times of a call from barrier to barrier, the median
of several; `one` is the same call on one rank while the others wait.
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn
import fastattn.distributed as fd
from fastattn.arrays.streams import Stream, check, driver, on_device
from fastattn.arrays.view import View, contiguous, size_of
from fastattn.distributed import checks
from fastattn.distributed.memory import Memory, cut, memory_of
from fastattn.distributed.spans import spans_of

from .cases import ERROR_ROWS, Case
from .trace import Trace

RUNS, LEAST = 5, 0.3            # runs of a timing, one of a long sequence, and seconds that all of them take at least
EACH = 16                       # of a long result every so many rows are compared; bounds of chunks are multiples of it
BLOCK = 1 << 22                 # random numbers that are drawn; arrays repeat them, with a shift


class Rank:
    """The group, the memory and the stream of this process."""

    def __init__(self, device: str) -> None:
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

    def numbers(self, x: Any, step: int) -> Any:
        """Every step-th row of a result (1, rows, heads, dim), on the host, as float32."""
        if self.stream is None:
            return x[:, ::step].astype(np.float32)
        view = x.view() if hasattr(x, "view") else x
        part = View(view.ptr, (1, -(-view.shape[1] // step), *view.shape[2:]), (view.strides[0], view.strides[1] * step, *view.strides[2:]),
                    view.dtype, view.device, view)
        wide = self.memory.empty(part.shape, "float32")
        self.memory.copy(wide, part)
        return np.frombuffer(self.memory.download(wide), np.float32).reshape(part.shape)

    def seconds(self, call: Callable[[], Any], together: bool = True, runs: int = RUNS) -> float:
        """The median of several runs. `together`: of all ranks, from barrier to barrier."""
        wait, found, start = self.barrier if together else self.synchronize, list[float](), time.perf_counter()
        call()
        while len(found) < runs:
            wait()
            begin = time.perf_counter()
            call()
            wait()
            found.append(time.perf_counter() - begin)
            if not together and len(found) == runs and time.perf_counter() - start < LEAST:
                runs += 1
        return statistics.median(found)


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


def measure(rank: Rank, case: Case) -> dict[str, Any]:
    """A row of the table; errors in every rank are those of the worst."""
    group, size = rank.group, rank.group.size
    shard = "zigzag" if case.window is None else "contiguous"
    spans = [(span.start, span.stop) for span in spans_of(case.seqlen, size, group.rank, shard)] if size > 1 else [(0, case.seqlen)]
    shapes = {"q": case.heads, "k": case.heads_k, "v": case.heads_k, "dout": case.heads}
    whole_shape = {name: (1, case.seqlen, heads, case.head_dim) for name, heads in shapes.items()}
    masks: dict[str, Any] = {"causal": True, "window": None if case.window is None else (case.window - 1, None)}
    of_call = masks | rank.keywords
    of_group = of_call | {"group": group, "seqlen": case.seqlen, "shard": shard, "method": case.method, "pieces": case.pieces}
    q, k, v, dout = [rank.array(shape, case.dtype, n, spans) for n, shape in enumerate(whole_shape.values())]
    out, lse = fd.attention(q, k, v, return_lse=True, **of_group)
    runs = RUNS if case.seqlen <= ERROR_ROWS else 1
    forward = rank.seconds(lambda: fd.attention(q, k, v, return_lse=True, **of_group), runs=runs)
    backward = rank.seconds(lambda: fd.attention_backward(dout, q, k, v, out, lse, **of_group), runs=runs)
    grads = fd.attention_backward(dout, q, k, v, out, lse, **of_group)
    marks = rank.trace.of(rank, lambda: (fd.attention(q, k, v, return_lse=True, **of_group),
                                         fd.attention_backward(dout, q, k, v, out, lse, **of_group)))
    row: dict[str, Any] = {"name": case.name, "ranks": size, "forward": forward, "backward": backward, "trace": marks}
    if case.seqlen <= ERROR_ROWS:
        row |= beside_one(rank, case, whole_shape, spans, of_call, {"out": out, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv})
    texts = checks.everyones(group, json.dumps({key: x for key, x in row.items() if key != "trace"}), False) if size > 1 else []
    for other in [json.loads(text[1:]) for text in texts]:
        for name, x in other.get("errors", {}).items():
            row["errors"][name] = max(row["errors"][name], x)
    return row


def beside_one(rank: Rank, case: Case, shapes: dict[str, tuple[int, ...]], spans: list[tuple[int, int]], of_call: dict[str, Any],
               mine: dict[str, Any]) -> dict[str, Any]:
    """The same on one rank: its times while the others wait, and the root mean square of the difference over that of the result."""
    row: dict[str, Any] = {"errors": {}}
    for turn in range(rank.group.size):
        rank.barrier()
        if turn == rank.group.rank:
            _alone(rank, case, shapes, spans, of_call, mine, row)
    rank.barrier()
    return row


def _alone(rank: Rank, case: Case, shapes: dict[str, tuple[int, ...]], spans: list[tuple[int, int]], of_call: dict[str, Any],
           mine: dict[str, Any], row: dict[str, Any]) -> None:
    q, k, v, dout = [rank.array(shape, case.dtype, n, [(0, case.seqlen)]) for n, shape in enumerate(shapes.values())]
    out, lse = fastattn.attention(q, k, v, return_lse=True, **of_call)
    if rank.group.rank == 0:
        row["one_forward"] = rank.seconds(lambda: fastattn.attention(q, k, v, return_lse=True, **of_call), False)
        row["one_backward"] = rank.seconds(lambda: fastattn.attention_backward(dout, q, k, v, out, lse, **of_call), False)
    grads = fastattn.attention_backward(dout, q, k, v, out, lse, **of_call)
    each = 1 if case.seqlen < 8192 else EACH
    rows = np.concatenate([np.arange(*span) for span in spans])[::each] // each
    for name, x in (("out", out), ("dq", grads.dq), ("dk", grads.dk), ("dv", grads.dv)):
        found, wanted = rank.numbers(mine[name], each), rank.numbers(x, each)
        difference = (found - wanted[:, rows]).astype(np.float64)
        row["errors"][name] = float(np.sqrt((difference**2).mean() / (wanted.astype(np.float64) ** 2).mean()))


def main() -> None:
    job = json.loads(sys.argv[1])
    rank = Rank(job["device"])
    if job["device"] == "cpu":
        fastattn.set_num_threads(max((os.cpu_count() or 1) // rank.group.size, 1))
    for case in [Case(**settings) for settings in job["cases"]]:
        if (case.method == "ulysses" and case.heads_k < rank.group.size) or (rank.group.size == 1 and case.seqlen > ERROR_ROWS):
            continue
        row = measure(rank, case)
        if rank.group.rank == 0:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
