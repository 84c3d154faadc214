"""Kernels on plain threads run in Python, without a GPU: the text of the kernel itself, one greenlet or thread for each of a block's.

Inside `emulated()` the helpers of the GPU modules are ordinary functions, instructions are replaced by reads and writes of host memory, and
a kernel that `Machine.launcher` loads runs here. Numbers are Python's, so it checks what is computed and from where, not rounding. It also
checks what a GPU would not say: accesses outside the arrays, shared memory that was never written or that two threads use between
the same barriers, vectors that are not aligned.
"""
from __future__ import annotations

import _thread
import bisect
import contextlib
import ctypes
import functools
import importlib
import itertools
import math
import struct
from collections import namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from fastattn.arrays.view import EIGHT_BIT, ITEMSIZE, LARGEST, View, numpy_dtype
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.runtime.launcher import Listing
from tests.tools.gpu import traced

try:
    import greenlet
except ImportError:
    greenlet = None  # type: ignore[assignment]

MODULES = ("dsl.inline", "tile.mask", "tile.dropout", "tile.scalar", "tile.schedule", "rows.preprocess", "simt.threads", "simt.pairs",
           "simt.dbias", "simt.forward", "simt.backward", "rows.transform", "rows.merge", "rows.groups", "rows.quantize",
           "rows.rescale", "rows.transpose_8bit", "rows.accumulate", "rows.merge_into", "tile.words", "tile.pages", "simt.captured",
           "flex.staged", "flex.pairs", "flex.sums", "flex.bitmap", "flex.interval", "flex.rounding", "flex.fixed", "sm90.seen_queries",
           "tile.requests", "decode.places", "decode.units")
_C = {"float32": ctypes.c_float, "float64": ctypes.c_double, "float16": ctypes.c_uint16, "bfloat16": ctypes.c_uint16}
_C |= dict.fromkeys(EIGHT_BIT, ctypes.c_uint8)


class Memory:
    """What may be touched in global memory: ranges [begin, end) of addresses."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.kept: list[Any] = []
        self.last = (0, 0)                                      # the range that was touched last

    def allow(self, x: View | None) -> None:
        if x is not None and 0 not in x.shape:
            bisect.insort(self.ranges, x.bytes_range())

    @contextlib.contextmanager
    def temporary(self, size: int, stream: int) -> Iterator[int]:
        array = np.full(size + 256, 0xFF, np.uint8)             # NaN in every float
        self.kept.append(array)
        address = -(-array.ctypes.data // 256) * 256
        bisect.insort(self.ranges, (address, address + size))
        yield address
        self.ranges.remove((address, address + size))
        self.last = (0, 0)

    def check(self, address: int, size: int) -> None:
        assert address % size == 0, f"misaligned access of {size} bytes"
        low, high = self.last
        if low <= address and address + size <= high:
            return
        at = bisect.bisect_right(self.ranges, (address, 1 << 63))
        # ranges may overlap: views of one array
        found = [(low, high) for low, high in self.ranges[:at] if low <= address and address + size <= high]
        assert found, "access outside the arrays"
        self.last = found[0]


def decode(value: Any, dtype: str) -> float:
    if dtype in EIGHT_BIT:
        return float(np.uint8(value).view(numpy_dtype(dtype)))
    if dtype == "bfloat16":
        return float(struct.unpack("f", struct.pack("I", value << 16))[0])
    return float(np.uint16(value).view(np.float16)) if dtype == "float16" else float(value)


def encode(x: float, dtype: str) -> Any:
    if dtype in EIGHT_BIT:
        return int(np.clip(np.float32(x), -LARGEST[dtype], LARGEST[dtype]).astype(numpy_dtype(dtype)).view(np.uint8))
    if dtype == "bfloat16":
        import ml_dtypes
        return int(np.array(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16))
    return int(np.array(x, np.float32).astype(np.float16).view(np.uint16)) if dtype == "float16" else x


class Block:
    """The threads of one block, one at a time: a thread runs to its next barrier, then the next one does."""

    def __init__(self, threads: int) -> None:
        self.threads, self.current, self.epoch = threads, 0, 0
        self.shared: dict[int, tuple[Any, int, int]] = {}       # address -> (value, epoch, thread) of its last store
        self.reader: dict[int, tuple[int, int]] = {}            # thread -1: several
        self.arrays: dict[int, list[Any]] = {}
        self.calls = [0] * threads
        self.posted: dict[int, Any] = {}
        self.turns: Fibres | Threads = Threads(self) if greenlet is None else Fibres(self)

    def run(self, body: Callable[[Any], None], arguments: Any) -> None:
        self.turns.run(lambda: body(arguments))

    def barrier(self) -> None:
        self.turns.barrier()

    # -------------------------------------------------------- shared memory
    def put(self, address: int, value: Any) -> None:
        held, epoch, thread = self.shared.get(address, (None, -1, 0))
        assert epoch != self.epoch or thread == self.current or held == value, f"race at shared address {address}"     # all store one mark
        epoch, thread = self.reader.get(address, (-1, 0))
        assert epoch != self.epoch or thread == self.current, f"race at shared address {address}"
        self.shared[address] = (value, self.epoch, self.current)

    def get(self, addresses: range) -> tuple[Any, ...]:
        """The values there. Nine of ten operations of a kernel are these, so they are written to be fast."""
        shared, reader, now, me, mine, found = self.shared, self.reader, self.epoch, self.current, (self.epoch, self.current), []
        for address in addresses:
            cell = shared.get(address)
            assert cell is not None, f"shared address {address} was never written"
            assert cell[1] != now or cell[2] == me, f"race at shared address {address}"
            seen = reader.get(address)
            if seen is None or seen[0] != now:
                reader[address] = mine
            elif seen[1] != me:
                reader[address] = (now, -1)
            found.append(cell[0])
        return tuple(found)

    def array(self, shape: Any, kind: Any) -> Any:
        n, self.calls[self.current] = self.calls[self.current], self.calls[self.current] + 1
        return self.arrays.setdefault(n, [math.nan] * shape) if shape else None


class Fibres:
    """A block's threads as greenlets: a turn costs a twentieth of one of Python's threads, whose locks the kernel of the host wakes."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def run(self, body: Callable[[], None]) -> None:
        """An error of a thread is raised here."""
        block, self.rounds = self.block, greenlet.getcurrent()
        waiting = {n: greenlet.greenlet(body) for n in range(block.threads)}
        while waiting:
            for block.current, fibre in list(waiting.items()):
                fibre.switch()
                if fibre.dead:
                    del waiting[block.current]
            block.epoch += 1

    def barrier(self) -> None:
        self.rounds.switch()


class Threads:
    """The same with threads of Python, where greenlet is not installed."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.turns = [_thread.allocate_lock() for _ in range(block.threads)]      # thread n waits for turns[n]
        self.finished, self.done = 0, _thread.allocate_lock()
        for lock in (*self.turns, self.done):
            lock.acquire()
        self.error: BaseException | None = None

    def run(self, body: Callable[[], None]) -> None:
        def thread(n: int) -> None:
            self.turns[n].acquire()
            try:
                if self.error is None:
                    body()
            except BaseException as error:
                self.error = self.error or error
            self.finished += 1
            if self.finished == self.block.threads:
                self.done.release()
            else:
                self.next(n)
        for n in range(self.block.threads):     # threading.Thread would wait for the start of each
            _thread.start_new_thread(thread, (n,))
        self.turns[0].release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def next(self, n: int) -> None:
        following = (n + 1) % self.block.threads
        if following == 0:
            self.block.epoch += 1
        self.block.current = following
        self.turns[following].release()

    def barrier(self) -> None:
        n = self.block.current
        self.next(n)
        self.turns[n].acquire()
        if self.error is not None:
            raise RuntimeError("another thread failed")


class Index:
    """threadIdx or blockIdx."""

    def __init__(self, x: Callable[[], int]) -> None:
        self._x = x

    @property
    def x(self) -> int:
        return self._x()


class Machine:
    """One emulated device: the fake instructions, and what stands for numba.cuda."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.block, self.index = memory, Block(1), 0
        self.launched: list[str] = []

    # -------------------------------------------------------- cuda
    @property
    def cuda(self) -> Any:
        machine = self

        def local(shape: Any, kind: Any) -> Any:
            return dict.fromkeys(indices(shape), math.nan if kind is real else 0)

        def shuffle(mask: int, value: Any, step: int) -> Any:
            block, me = machine.block, machine.block.current
            block.posted[me] = value
            block.barrier()
            other = block.posted[(me & ~31) | ((me ^ step) & 31)]
            block.barrier()
            return other
        return SimpleNamespace(threadIdx=Index(lambda: machine.block.current), blockIdx=Index(lambda: machine.index),
                               local=SimpleNamespace(array=local), shared=SimpleNamespace(array=lambda *a: machine.block.array(*a)),
                               syncthreads=lambda: machine.block.barrier(), shfl_xor_sync=shuffle)

    def launcher(self, arch: str = "sm_80") -> Any:
        """A Launcher whose kernels run here."""
        return _Launcher(self, arch)

    def load(self, source: Any) -> Any:
        """A kernel that runs here."""
        (kernel, shared_memory), names = source.make(), [name for name, _ in source.fields]
        arguments = namedtuple("arguments", names)  # type: ignore[misc]

        def launch(grid: int, values: list[Any], stream: int) -> None:
            assert 0 < grid < 2**31 and len(values) == len(names)
            self.launched.append(source.key)
            for self.index in range(grid):
                self.block = Block(source.threads)
                self.block.run(kernel, arguments(*values))
                used = max(self.block.shared, default=0)
                assert used < max(shared_memory, 1), f"{source.key} uses {used} bytes of {shared_memory}"
        return SimpleNamespace(launch=launch)

    # -------------------------------------------------------- instructions
    def load_if(self, dtype: str, compute: str) -> Any:
        kind, size = _C[dtype], ITEMSIZE[dtype]

        def load(address: int, inside: int) -> float:
            if not inside:
                return 0.0
            self.memory.check(address, size)
            return decode(kind.from_address(address).value, dtype)
        return load

    def load_chunk(self, dtype: str) -> Any:
        one, size = self.load_if(dtype, ""), ITEMSIZE[dtype]

        def load(address: int, inside: int) -> Any:
            assert not inside or address % 16 == 0
            return tuple(one(address + k * size, inside) for k in range(16 // size))
        return load

    def store_chunk(self, dtype: str) -> Any:
        one, size = self.store(dtype, ""), ITEMSIZE[dtype]

        def put(address: int, values: Any) -> None:
            assert address % 16 == 0 and len(values) == 16 // size
            for k, value in enumerate(values):
                one(address + k * size, value)
        return put

    def store(self, dtype: str, compute: str) -> Any:
        kind, size = _C[dtype], ITEMSIZE[dtype]

        def put(address: int, value: float) -> None:
            self.memory.check(address, size)
            kind.from_address(address).value = encode(value, dtype)
        return put

    def copy_bytes(self, size: int) -> Any:
        def copy(to: int, source: int) -> None:
            assert to % size == source % size == 0
            self.memory.check(to, size)
            self.memory.check(source, size)
            ctypes.memmove(to, source, size)
        return copy

    def any_lane(self, x: int) -> int:
        """In blocks of one warp: a vote of all lanes."""
        block = self.block
        block.posted[block.current] = x
        block.barrier()
        found = any(block.posted[n] for n in range(32))
        block.barrier()
        return int(found)

    def load_flag(self, address: int, inside: int) -> int:
        if not inside:
            return 0
        self.memory.check(address, 1)
        return int(ctypes.c_uint8.from_address(address).value)

    def load_b32(self, address: int) -> int:
        self.memory.check(address, 4)
        return int(ctypes.c_int32.from_address(address).value)

    def load_b32_if(self, address: int, inside: int) -> int:
        return self.load_b32(address) if inside else 0

    def store_b32(self, address: int, value: int) -> None:
        self.memory.check(address, 4)
        ctypes.c_int32.from_address(address).value = value

    def store_zero16(self, address: int) -> None:
        assert address % 16 == 0
        for k in range(4):
            self.store_b32(address + 4 * k, 0)

    def store_words(self, address: int, *words: int) -> None:
        assert address % 16 == 0
        for k, word in enumerate(words):
            self.store_b32(address + 4 * k, word)

    def load_shared(self, compute: str, count: int) -> Any:
        size = ITEMSIZE[compute]

        def load(address: int) -> Any:
            assert address % (size * count) == 0, "misaligned vector"
            return self.block.get(range(address, address + size * count, size))
        return load

    def names(self) -> dict[str, Any]:
        """What stands for the names that the modules import."""
        def store_shared(compute: str) -> Any:
            return lambda address, value: self.block.put(address, value)
        arithmetic = SimpleNamespace(**vars(math) | {"exp": exp} | traced.FUNCTIONS)
        return {"cuda": self.cuda, "inline": lambda f: f, "divide": lambda x, y: x // y, "opaque": lambda x: x, "math": arithmetic,
                "wait_for_previous": lambda: None, "let_next_start": lambda: None,
                "int32": int32, "int64": int, "uint64": int, "uint32": lambda x: int(x) & 0xFFFFFFFF, "float32": real, "float64": real,
                "uint8": None, "load_if": self.load_if, "load_chunk": self.load_chunk, "store": self.store, "load_flag": self.load_flag,
                "copy_bytes": self.copy_bytes, "load_b32": self.load_b32, "load_b32_if": self.load_b32_if,
                "store_b32": self.store_b32, "store_zero16": self.store_zero16, "load_shared": self.load_shared,
                "store_shared": store_shared, "rounded_product": lambda compute: lambda x, y: x * y,
                "shared_address": lambda array: 0, "load_shared_b32": lambda at: self.block.get(range(at, at + 1))[0],
                "store_shared_b32": lambda at, value: self.block.put(at, value),
                "store_chunk": self.store_chunk, "load_f32": lambda at: self.load_if("float32", "float32")(at, 1),
                "store_f32": self.store("float32", "float32"), "store_words": self.store_words, "transpose_bytes": transpose_bytes,
                "add_chunk": lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
                "scale_chunk": lambda x, factor: tuple(a * factor for a in x),
                "join_chunks": lambda x, y: (*x, *y), "any_lane": self.any_lane, **traced.names(self.memory)}


_marks = itertools.count(1)


class _Launcher(Listing):
    def __init__(self, machine: Machine, arch: str) -> None:
        super().__init__(absent_device(arch))
        self.machine = machine

    def load(self, source: Any) -> Any:
        return self.machine.load(source)

    def temporary(self, size: int, stream: int) -> Any:
        return self.machine.memory.temporary(size, stream)

    def clear(self, memory: int, size: int, stream: int) -> None:
        self.machine.memory.check(memory, 1)
        ctypes.memset(memory, 0, size)

    def mark(self) -> int:
        return next(_marks)


@functools.cache
def indices(shape: Any) -> list[Any]:
    """All indices of an array: a local one is a dict, whose elements are Python's numbers and which has no others."""
    return list(range(shape)) if isinstance(shape, int) else list(itertools.product(*map(range, shape)))


def int32(x: Any) -> int:
    x = int(x)
    assert -(2**31) <= x < 2**31, f"{x} does not fit 32 bits"
    return x


def transpose_bytes(*words: int) -> Any:
    """ptx.wgmma_8bit.transpose_bytes."""
    return tuple(int(x) for x in np.array(words, np.int32).view(np.uint8).reshape(4, 4).T.copy().view(np.int32).ravel())


def real(x: Any) -> float:
    return float(x)


def exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@contextlib.contextmanager
def emulated(memory: Memory) -> Iterator[Machine]:
    machine = Machine(memory)
    with replaced(MODULES, machine.names()):
        yield machine


@contextlib.contextmanager
def replaced(modules: tuple[str, ...], names: dict[str, Any]) -> Iterator[None]:
    """Names that the modules of fastattn.gpu import stand for something else; other helpers are the functions they are made of."""
    with contextlib.ExitStack() as stack:
        for module in [importlib.import_module(f"fastattn.gpu.{name}") for name in modules]:    # all before any is changed
            for name, value in list(vars(module).items()):
                if name in names:
                    stack.enter_context(mock.patch.object(module, name, names[name]))
                elif hasattr(value, "py_func"):
                    stack.enter_context(mock.patch.object(module, name, value.py_func))
        yield
