"""Kernels run from their PTX, without a GPU: the text that Numba makes, all threads of all blocks at once as NumPy arrays.

What emulator.py does for the text of kernels on plain threads, this does for those with mma.sync, whose helpers are instructions. It also
says what a GPU would not: accesses outside the arrays or not aligned, and instructions of a whole warp that a part of it comes to.
Arithmetic is rounded as on the device, but for exponentials, which are more exact, and mma.sync: its sums are exact and then cut off.

Threads run a basic block at a time, those that are farthest behind first, so that the lanes of a warp meet again after a branch.
"""
from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastattn.gpu.precompile import absent_device
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from tests.tools.gpu.builds import build
from tests.tools.gpu.interpreter_arithmetic import TYPES, Arithmetic, require_known
from tests.tools.gpu.interpreter_copies import Copies
from tests.tools.gpu.interpreter_memory import BASE, Array, Memory, Shared
from tests.tools.gpu.numbers import cut_off, floats_of
from tests.tools.gpu.ptx_text import Body, Instruction, parse

RANK = 24                                       # bits of an address in a block of a cluster
MOST_BLOCKS = 2_000_000                         # basic blocks that are run before a kernel counts as hanging
_LETTERS = {"l": np.uint64, "q": np.int64, "i": np.int32, "I": np.uint32, "f": np.float32, "d": np.float64}


# ---------------------------------------------------------------- running
class Run(Arithmetic, Copies):
    """One launch of a kernel."""

    def __init__(self, body: Body, memory: Memory, grid: int, threads: int, shared: int, values: dict[str, Any], cluster: int = 1) -> None:
        self.body, self.memory, self.values = body, memory, values
        self.count, self.threads, self.cluster = grid * threads, threads, cluster
        assert grid % cluster == 0, "a cluster is not whole"
        number = np.arange(self.count)
        self.thread, self.block = (number % threads).astype(np.uint32), number // threads
        end, self.arrays = shared, dict[str, int]()         # the address of each
        for name, size in body.shared.items():
            self.arrays[name], end = -(-end // 16) * 16, -(-end // 16) * 16 + size
        self.shared = Shared(grid, end)
        self.special: dict[str, Any] = {
            "%tid.x": self.thread, "%ctaid.x": self.block.astype(np.uint32), "%laneid": self.thread & 31, "%ntid.x": np.uint32(threads),
            "%nctaid.x": np.uint32(grid), "%dynamic_smem_size": np.uint32(shared),
            "%cluster_ctarank": (self.block % cluster).astype(np.uint32)}
        self.registers: dict[str, Array] = {}

    # -------------------------------------------------------- registers
    def get(self, name: Any, active: Array, kind: str) -> Any:
        dtype = TYPES.get(kind, np.bool_)
        if isinstance(name, (int, np.floating)):
            if isinstance(name, np.floating):
                return name if dtype is type(name) else name.view(f"u{name.itemsize}")
            size = np.dtype(dtype).itemsize
            return np.array(name & ((1 << 8 * size) - 1), f"u{size}").view(dtype)[()] if dtype is not np.bool_ else bool(name)
        if name in self.special:
            x = self.special[name]
            return (x[active] if np.ndim(x) else x)
        if name not in self.registers:
            assert name.startswith("_cudapy_smem"), f"{name} was never written"
            return dtype(self.arrays.get(name, 0))
        x = self.registers[name]
        x = x if len(active) == self.count else x[active]
        if dtype is np.bool_ or x.dtype == dtype:
            return x
        if x.itemsize == np.dtype(dtype).itemsize:
            return x.view(dtype)
        return x.view(f"u{x.itemsize}").astype(f"u{np.dtype(dtype).itemsize}").view(dtype)     # a narrower part of a register

    def put(self, name: str, active: Array, value: Any) -> None:
        if name == "_":
            return
        value = np.asarray(value)
        if len(active) == self.count:
            self.registers[name] = np.ascontiguousarray(np.broadcast_to(value, self.count))
            return
        held = self.registers.get(name)
        if held is None or held.itemsize != value.itemsize or (held.dtype == np.bool_) != (value.dtype == np.bool_):
            held = np.zeros(self.count, value.dtype)
        held = held.copy()
        held[active] = value.view(held.dtype) if value.ndim else value.astype(value.dtype).reshape(1).view(held.dtype)[0]
        self.registers[name] = held

    def warps(self, active: Array, what: str) -> Array:
        """The active lanes as (warps, 32)."""
        assert len(active) % 32 == 0, f"{what}: not all lanes of a warp are here"
        lanes = active.reshape(-1, 32)
        assert (lanes[:, 0] % 32 == 0).all() and (lanes == lanes[:, :1] + np.arange(32)).all(), f"{what}: lanes of a warp are missing"
        return lanes

    # -------------------------------------------------------- the loop
    def go(self) -> None:
        at, waiting, last = np.zeros(self.count, np.int64), np.zeros(self.count, bool), len(self.body.blocks)
        self.arrived, self.clustered = np.zeros(self.count, np.int64), np.zeros(self.count, bool)
        self.named = np.zeros(self.count, np.int64)
        for _ in range(MOST_BLOCKS):
            ready = ~waiting & ~self.clustered & (self.named == 0) & (at < last)
            if not ready.any():
                assert not self.clustered.any() and not self.named.any(), "a barrier of a cluster or of warps to which not all threads come"
                if not waiting.any():
                    return
                per_block = (waiting | (at >= last)).reshape(-1, self.threads)
                assert per_block.all(), "a barrier to which not all threads come"
                waiting[:] = False
                continue
            here = int(at[ready].min())
            active = np.flatnonzero(ready & (at == here))
            at[active] = here + 1
            for instruction in self.body.blocks[here]:
                op = instruction.op
                if op.startswith("bra"):
                    chosen = self.guarded(instruction, active)
                    at[chosen] = self.body.labels[instruction.operands[0]]
                elif op in ("ret", "exit"):
                    at[self.guarded(instruction, active)] = last
                    self.release_clusters(at, last)
                elif op.startswith("barrier.cluster.wait"):
                    self.clustered[active] = True
                    self.release_clusters(at, last)
                elif op.startswith("bar.sync") and len(instruction.operands) == 2:
                    self.come_to(*instruction.operands, active)
                elif op.startswith("bar.sync"):
                    waiting[active] = True
                    self.release(waiting, at, last)
                else:
                    chosen = self.guarded(instruction, active)
                    if len(chosen):
                        self.execute(instruction, chosen)
        raise AssertionError("the kernel does not end")

    def release(self, waiting: Array, at: Array, last: int) -> None:
        """Let the blocks go on whose threads all wait."""
        by_block = waiting.reshape(-1, self.threads)
        done = (by_block | (at >= last).reshape(-1, self.threads)).all(axis=1)
        by_block[done] = False

    def come_to(self, number: Any, threads: Any, active: Array) -> None:
        """A named barrier, which goes on when so many threads of a block wait there."""
        self.named[active] = self.get(number, active, "u32")
        wanted = np.unique(np.broadcast_to(self.get(threads, active, "u32"), len(active))).item()
        by_block = self.named.reshape(-1, self.threads)
        for which in np.unique(self.named[active]):
            assert which > 0, "barrier 0 is that of the block"
            there = by_block == which
            assert (there.sum(axis=1) <= wanted).all(), "too many threads at a barrier"
            by_block[there & (there.sum(axis=1, keepdims=True) == wanted)] = 0

    def release_clusters(self, at: Array, last: int) -> None:
        """Let the threads go on that wait for their cluster, all of whose threads have arrived as often, or ended."""
        shape = -1, self.threads * self.cluster
        least = np.where(at >= last, 1 << 60, self.arrived).reshape(shape).min(axis=1, keepdims=True)
        self.clustered &= (self.arrived.reshape(shape) > least).reshape(-1)

    def guarded(self, instruction: Instruction, active: Array) -> Array:
        if not instruction.guard:
            return active
        flags = np.broadcast_to(self.get(instruction.guard, active, "pred"), len(active))
        return active[~flags if instruction.inverted else flags]

    def execute(self, i: Instruction, active: Array) -> None:
        base = i.op.split(".")[0]
        try:
            require_known(i.op)
            getattr(self, f"_{base}")(i.op.split("."), i.operands, active)
        except Exception as error:
            error.add_note(f"in {i.op} {i.operands}")
            raise

    # -------------------------------------------------------- instructions
    def _mov(self, op: list[str], x: list[Any], active: Array) -> None:
        if isinstance(x[0], list):
            word = self.get(x[1], active, op[-1])
            half = 4 * word.itemsize
            for n, name in enumerate(x[0]):
                self.put(name, active, (word >> word.dtype.type(n * half)).astype(f"u{word.itemsize // 2}"))
        elif isinstance(x[1], list):
            half, whole = ("u16", np.uint32) if op[-1][1:] == "32" else ("u32", np.uint64)
            low, high = (np.asarray(self.get(y, active, half)).astype(whole) for y in x[1])
            self.put(x[0], active, low | high << whole(4 * np.dtype(whole).itemsize))
        else:
            self.put(x[0], active, self.get(x[1], active, op[-1]))

    def _cvta(self, op: list[str], x: list[Any], active: Array) -> None:
        self.put(x[0], active, self.get(x[1], active, "u64"))

    def _shfl(self, op: list[str], x: list[Any], active: Array) -> None:
        """The distance may be in a register, and a predicate beside the result, as Numba writes it."""
        self.warps(active, "shfl")
        assert op[2] == "bfly"
        distance = np.unique(np.broadcast_to(self.get(x[2], active, "u32"), len(active))).item()
        value = np.broadcast_to(self.get(x[1], active, "b32"), len(active)).reshape(-1, 32)
        self.put(x[0].partition("|")[0], active, value[:, np.arange(32) ^ distance].reshape(-1))

    def _vote(self, op: list[str], x: list[Any], active: Array) -> None:
        self.warps(active, "vote")
        flags = np.broadcast_to(self.get(x[1], active, "pred"), len(active)).reshape(-1, 32)
        if op[2] == "ballot":
            found: Any = (flags.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            found = flags.any(axis=1) if op[2] == "any" else flags.all(axis=1)
        self.put(x[0], active, np.repeat(found, 32))

    def _barrier(self, op: list[str], x: list[Any], active: Array) -> None:
        assert op[1:3] == ["cluster", "arrive"]
        self.arrived[active] += 1

    def _mapa(self, op: list[str], x: list[Any], active: Array) -> None:
        """An address in the cluster has the block's rank, and 1, above RANK bits."""
        rank = np.broadcast_to(self.get(x[2], active, "u32"), len(active))
        assert (rank < self.cluster).all()
        self.put(x[0], active, self.get(x[1], active, "u32") | ((rank + np.uint32(1)) << np.uint32(RANK)))

    def _bar(self, op: list[str], x: list[Any], active: Array) -> None:
        self.warps(active, "bar.warp")

    def _fence(self, op: list[str], x: list[Any], active: Array) -> None:
        pass

    _membar = _griddepcontrol = _prefetch = _fence

    # -------------------------------------------------------- memory
    def address(self, x: Any, active: Array, shared: bool) -> Array:
        base = np.broadcast_to(self.get(x[1], active, "u32" if shared else "u64"), len(active))
        return base.astype(np.int64) + x[2]

    def places(self, op: list[str], x: Any, active: Array) -> tuple[Array, Any, list[Array]]:
        """(The memory as numbers of the type, the type, indices of each of the vector's elements)."""
        shared, dtype, block = "shared" in op or "shared::cluster" in op, TYPES[op[-1]], self.block[active]
        size, vector = np.dtype(dtype).itemsize, next((int(y[1:]) for y in op if re.fullmatch(r"v\d", y)), 1)
        at = self.address(x, active, shared)
        assert not (at % (size * vector)).any(), "misaligned vector"
        if "shared::cluster" in op:
            block, at = block // self.cluster * self.cluster + (at >> RANK) - 1, at & ((1 << RANK) - 1)
        memory = self.shared.bytes if shared else self.memory.bytes
        return memory.view(dtype), dtype, [self.shared.words(at + k * size, size, block) if shared
                                           else self.memory.words(at + k * size, size) for k in range(vector)]

    def _ld(self, op: list[str], x: list[Any], active: Array) -> None:
        if op[1] == "param":
            self.put(x[0], active, widened(op[-1], x[0], np.asarray(self.values[x[1][1]])))
            return
        memory, _, places = self.places(op, x[1], active)
        for name, place in zip(x[0] if isinstance(x[0], list) else [x[0]], places, strict=True):
            self.put(name, active, widened(op[-1], name, memory[place]))

    def _st(self, op: list[str], x: list[Any], active: Array) -> None:
        memory, _, places = self.places(op, x[0], active)
        for name, place in zip(x[1] if isinstance(x[1], list) else [x[1]], places, strict=True):
            memory[place] = self.get(name, active, op[-1])

    def _atom(self, op: list[str], x: list[Any], active: Array) -> None:
        memory, _, [places] = self.places(op, x[1], active)
        given, old = np.broadcast_to(self.get(x[2], active, "u32"), len(active)), np.zeros(len(active), np.uint32)
        for n, place in enumerate(places):
            old[n] = memory[place]
            memory[place] = (0 if old[n] >= given[n] else old[n] + np.uint32(1)) if "inc" in op else old[n] + given[n]
        self.put(x[0], active, old)

    # -------------------------------------------------------- mma.sync
    def _mma(self, op: list[str], x: list[Any], active: Array) -> None:
        """m16n8k16 and m16n8k8 of 16-bit operands (PTX ISA 9.7.14.5.8, figures of the fragments)."""
        count, kind, depth = len(self.warps(active, "mma")), op[-2], 16 if "m16n8k16" in op else 8
        words = [[np.broadcast_to(self.get(name, active, "b32"), len(active)).reshape(count, 32) for name in names] for names in x[:4]]
        lane = np.arange(32)
        g, c = lane // 4, lane % 4
        a, b, acc = np.zeros((count, 16, depth)), np.zeros((count, depth, 8)), np.zeros((count, 16, 8))
        for n, word in enumerate(words[1]):
            for half in range(2):
                value = floats_of(word >> np.uint32(16 * half) & np.uint32(0xFFFF), kind)
                a[:, g + 8 * (n % 2), 2 * c + half + 8 * (n // 2)] = value
        for n, word in enumerate(words[2]):
            for half in range(2):
                b[:, 2 * c + half + 8 * n, g] = floats_of(word >> np.uint32(16 * half) & np.uint32(0xFFFF), kind)
        for n, word in enumerate(words[3]):
            acc[:, g + 8 * (n // 2), 2 * c + n % 2] = word.view(np.float32)
        with np.errstate(all="ignore"):
            out = cut_off(acc + a @ b)
        for n, name in enumerate(x[0]):
            self.put(name, active, np.ascontiguousarray(out[:, g + 8 * (n // 2), 2 * c + n % 2]).reshape(-1))


def widened(kind: str, register: str, x: Array) -> Array:
    """What a load leaves in a register that is longer than the number: the sign of a signed one is extended (PTX ISA, ld)."""
    if kind[0] == "s" and (x.itemsize < 4 or register.startswith("%rd")):
        return x.view(f"i{x.itemsize}").astype(np.int64 if register.startswith("%rd") else np.int32)
    return x.astype(np.uint32) if x.itemsize == 1 else x


# ---------------------------------------------------------------- a device
parsed = functools.lru_cache(50)(parse)         # what runs a Body does not change it


class Launcher(Listing):
    """A Launcher whose kernels run here. `launched`: their keys."""

    def __init__(self, memory: Memory, arch: str = "sm_90a") -> None:
        super().__init__(absent_device(arch))
        self.memory, self.arch, self.launched = memory, arch, list[str]()
        self.zeros = memory.take(4 * 65536)
        memory.bytes[self.zeros - BASE:self.zeros - BASE + 4 * 65536] = 0

    def load(self, source: compiler.Source) -> Any:
        body = parsed(build(source, self.arch, "ptx")[0].decode().rstrip("\0"))
        shared = source.make()[1]

        def launch(grid: int, values: list[Any], stream: int) -> None:
            self.launched.append(source.key)
            numbers = [_LETTERS[letter](value) for (_, letter), value in zip(source.fields, values, strict=True)]
            if grid:
                Run(body, self.memory, grid, source.threads, shared, dict(zip(body.params, numbers, strict=True)), source.cluster).go()
        return SimpleNamespace(launch=launch)

    @contextlib.contextmanager
    def temporary(self, size: int, stream: int) -> Iterator[int]:  # type: ignore[override]
        at = self.memory.take(size)
        yield at
        self.memory.valid[at - BASE:at - BASE + size] = False

    def arrivals(self, captured: bool) -> int:
        return self.zeros
