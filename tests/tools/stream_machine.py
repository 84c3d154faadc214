"""CUDA devices that run nothing until the end, and then in a random order that streams and events allow.

Ranks are threads with a device each, whose memory is the host's. What they enqueue is kept; `Machine.run` then runs it: at each step a
random stream that can go on does one thing. New memory is NaN, and so is memory that is freed, once its stream gets there. So a transfer
that does not wait for what fills its buffer, or memory that is used again too early, gives wrong numbers.
"""
from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import engine, merging, reference
from fastattn.arrays import streams
from fastattn.arrays.view import CPU, View
from fastattn.distributed import device as distributed_device
from fastattn.distributed import packed_plan
from fastattn.problem import Operands
from tests.tools import fake_cuda

Step = Callable[[], bool]       # does its work, or returns False because something is not there yet


class Machine(fake_cuda.Driver):
    """The driver, and the work of all streams. Streams are (device, handle)."""

    CUmemAllocationType = types.SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = types.SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemPool_attribute = types.SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=4)
    CUstream_flags = types.SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUresult = types.SimpleNamespace(CUDA_ERROR_NOT_READY=600)

    def __init__(self, seed: int) -> None:
        self.random, self.lock, self.own = random.Random(seed), threading.RLock(), threading.local()
        super().__init__()
        self.queues: dict[tuple[int, int], deque[Step]] = {}
        self.happened: set[int] = set()
        self.recorded: dict[int, int] = {}                  # the last record of each event
        self.numbers = iter(range(1000, 1 << 30))
        self.kept: list[Any] = []
        self.mail: dict[Any, bytes] = {}
        self.pooled = Counter[int]()                        # allocations of buffers of each device

    @property
    def contexts(self) -> list[int]:  # type: ignore[override]
        if not hasattr(self.own, "contexts"):
            self.own.contexts = [0]
        return self.own.contexts  # type: ignore[no-any-return]

    @contexts.setter
    def contexts(self, x: list[int]) -> None:
        self.own.contexts = x

    def enqueue(self, stream: int, step: Step) -> None:
        with self.lock:
            self.queues.setdefault((self.contexts[-1], int(stream)), deque()).append(step)

    def run(self) -> None:
        """Until nothing is left. AssertionError where streams wait for each other for ever."""
        stuck = 0
        while any(self.queues.values()):
            key = self.random.choice([key for key, queue in self.queues.items() if queue])
            if self.queues[key][0]():
                self.queues[key].popleft()
                stuck = 0
            else:
                stuck += 1
                assert stuck < 10_000, f"streams wait for ever: {[key for key, queue in self.queues.items() if queue]}"

    # ------------------------------------------------------------ the driver
    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[int, int]:
        return 0, next(self.numbers)

    def cuCtxGetStreamPriorityRange(self) -> tuple[int, int, int]:
        return 0, 0, -5

    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        return 0, next(self.numbers)

    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        number = self.recorded[event] = next(self.numbers)
        self.enqueue(stream, lambda: self.happened.add(number) or True)  # type: ignore[func-returns-value]
        return (0,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        number = self.recorded[event]
        self.enqueue(stream, lambda: number in self.happened)
        return (0,)

    def cuEventQuery(self, event: int) -> tuple[int]:
        return (0 if self.recorded[event] in self.happened else 600,)

    def cuDeviceTotalMem(self, device: int) -> tuple[int, int]:
        return 0, 1 << 30

    def cuuint64_t(self, x: int) -> int:
        return x

    def CUmemPoolProps(self) -> Any:
        return types.SimpleNamespace(location=types.SimpleNamespace())

    def cuMemAllocAsync(self, size: int, stream: int) -> tuple[int, int]:
        array = np.full(size, 0xFF, np.uint8)
        self.kept.append(array)
        self.memory[array.ctypes.data] = array
        return 0, array.ctypes.data

    def cuMemAllocFromPoolAsync(self, size: int, pool: Any, stream: int) -> tuple[int, int]:
        self.pooled[self.contexts[-1]] += 1
        return self.cuMemAllocAsync(size, stream)

    def cuMemFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        array = self.memory[pointer]
        self.enqueue(stream, lambda: array.fill(0xFF) or True)  # type: ignore[func-returns-value]
        return (0,)

    def cuMemsetD8Async(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        self.enqueue(stream, lambda: ctypes.memset(pointer, value, size) or True)
        return (0,)

    def cuMemcpyHtoDAsync(self, to: int, x: int, size: int, stream: int) -> tuple[int]:
        words = ctypes.string_at(x, size)
        self.enqueue(stream, lambda: bool(ctypes.memmove(to, words, size)))
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        """Of a stream that waits for no other."""
        with self.lock:
            queue = self.queues[self.contexts[-1], int(stream)]
            while queue:
                assert queue.popleft()()
        return (0,)

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        return 0, next(self.numbers)

    def cuMemcpyAsync(self, to: int, x: int, size: int, stream: int) -> tuple[int]:
        self.enqueue(stream, lambda: bool(ctypes.memmove(to, x, size)))
        return (0,)


def on_host(x: View | None) -> Any:
    """The same memory as the host's. Work that is enqueued keeps no buffer, as a launched kernel does not."""
    return x if x is None else replace(x, device=CPU, owner=None)


class Comm:
    """A communicator of nccl4py."""

    is_valid, result = True, 0

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.nranks, self.ptr, self.device = rank, size, 100 + rank, types.SimpleNamespace(device_id=rank)
        self.given, self.taken = [0] * size, [0] * size

    def get_async_error(self) -> Any:
        return self.result

    def get_last_error(self) -> str:
        return "a peer is gone"

    def abort(self) -> None:
        self.is_valid = False


class Nccl:
    """nccl4py's bindings, nccl.bindings.nccl: grouped messages are one step of a stream, done when all of them have come."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.own = machine, threading.local()
        self.comms = [Comm(rank, size) for rank in range(size)]

    class Comm:
        """The bindings' kind of number."""

        def __init__(self, handle: int) -> None:
            self.handle = handle

    def group_start(self) -> None:
        self.own.batch = []

    def group_end(self) -> None:
        batch, sent, machine = self.own.batch, [False], self.machine

        def step() -> bool:
            if not sent[0]:
                for kind, key, ptr, count in batch:
                    if kind == "send":
                        machine.mail[key] = ctypes.string_at(ptr, count)
                sent[0] = True
            mine = [(key, ptr, count) for kind, key, ptr, count in batch if kind == "recv"]
            if any(key not in machine.mail for key, _, _ in mine):
                return False
            for key, ptr, count in mine:
                found = machine.mail.pop(key)
                assert len(found) == count, "messages do not match"
                ctypes.memmove(ptr, found, count)
            return True
        machine.enqueue(self.own.stream, step)

    def send(self, ptr: int, count: int, dtype: int, peer: int, comm: Nccl.Comm, stream: int) -> None:
        mine = self.comms[comm.handle - 100]
        self._add("send", (mine.rank, peer, mine.given[peer]), ptr, count, dtype, stream)
        mine.given[peer] += 1

    def recv(self, ptr: int, count: int, dtype: int, peer: int, comm: Nccl.Comm, stream: int) -> None:
        mine = self.comms[comm.handle - 100]
        self._add("recv", (peer, mine.rank, mine.taken[peer]), ptr, count, dtype, stream)
        mine.taken[peer] += 1

    def _add(self, kind: str, key: tuple[int, int, int], ptr: int, count: int, dtype: int, stream: int) -> None:
        assert dtype == 1, "bytes"
        self.own.batch.append((kind, key, ptr, count))
        self.own.stream = stream


@contextlib.contextmanager
def machine(monkeypatch: pytest.MonkeyPatch, seed: int, kept: int = 0) -> Iterator[Machine]:
    """Inside the context CUDA is a Machine, and attention is computed by the reference engine in its streams. `kept`: bytes of free buffers
    that are used again; others become NaN.
    """
    found = Machine(seed)
    cached = (streams._primary_context, distributed_device.transfer_stream, distributed_device.upload_stream,
              distributed_device.release_stream, distributed_device.pool,
              distributed_device.free_blocks, packed_plan.plan_of)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(packed_plan, "_cumulative", {})
    monkeypatch.setattr(streams, "driver", lambda: found)
    monkeypatch.setattr(streams, "ordinal_of", lambda pointer: found.devices[pointer])
    monkeypatch.setattr(distributed_device, "driver", lambda: found)
    monkeypatch.setattr(distributed_device, "most_kept", lambda device: kept)

    def accumulate(out: View, x: View, add: bool, stream: int) -> None:
        out, x = on_host(out), on_host(x)

        def step() -> bool:
            to = out.numpy()
            to[...] = to + x.numpy().astype(to.dtype) if add else x.numpy()
            return True
        found.enqueue(stream, step)

    def accumulate_rows(out: View, x: View, count: int, x_rows: int, out_rows: int, add: bool, stream: int) -> None:
        out, x = on_host(out), on_host(x)

        def step() -> bool:
            to, source = out.numpy(), x.numpy()
            numbers = [np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(rows)) if rows else np.arange(count)
                       for rows in (out_rows, x_rows)]
            to[numbers[0]] = source[numbers[1]].astype(to.dtype) + (to[numbers[0]] if add else 0)
            return True
        if count:
            found.enqueue(stream, step)

    def merge(outs: list[View], lses: list[View], out: View, lse: View, stream: int) -> None:
        all_out, all_lse = [on_host(x) for x in (*outs, out)], [on_host(x) for x in (*lses, lse)]
        host = merging.merge_views
        found.enqueue(stream, lambda: host(all_out[:-1], all_lse[:-1], all_out[-1], all_lse[-1]) or True)
    fake = types.SimpleNamespace(accumulate=accumulate, accumulate_rows=accumulate_rows, merge_states=merge)
    monkeypatch.setitem(engine._loaded, "gpu", fake)

    def of(o: Operands) -> Operands:
        return Operands(**{name: on_host(x) if isinstance(x := getattr(o, name), View) else x for name in o.__slots__})

    def forward(problem: Any, o: Operands, out: View, lse: View | None, stream: int) -> None:
        operands, results = of(o), [on_host(out), on_host(lse)]
        found.enqueue(stream, lambda: reference.forward(problem, operands, *results) or True)  # type: ignore[func-returns-value]

    def backward(problem: Any, o: Operands, *given: Any) -> None:
        operands, views, grads, stream = of(o), [on_host(x) for x in given[:4]], given[4], given[5]
        host = type(grads)(*[on_host(x) for x in grads])
        found.enqueue(stream, lambda: reference.backward(problem, operands, *views, host) or True)
    with fastattn.register_engine("machine", forward, backward, lambda problem: None, "cuda").activate():
        yield found
    for function in cached:
        function.cache_clear()


class DeviceInput:
    """A NumPy array as an array on a device, on a stream of its own."""

    def __init__(self, machine: Machine, array: Any, device: int) -> None:
        self.array = np.array(array, order="C")
        machine.kept.append(self.array)
        machine.devices[self.array.ctypes.data] = device
        self.__cuda_array_interface__ = {"shape": self.array.shape, "typestr": self.array.dtype.str, "version": 3, "strides": None,
                                         "data": (self.array.ctypes.data, False), "stream": None}


def content(x: Any) -> Any:
    """The numbers of a DeviceArray, once the machine has run."""
    return on_host(x.view()).numpy().copy()
