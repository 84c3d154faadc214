"""interpreter.py with the instructions of the kernels whose tiles are in shared memory: ldmatrix, movmatrix, sums in memory."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastattn.gpu.runtime import compile as compiler
from tests.tools.gpu import interpreter
from tests.tools.gpu.builds import build
from tests.tools.gpu.interpreter import _LETTERS
from tests.tools.gpu.interpreter_memory import BASE, Array, Memory

_LANE = np.arange(32)


class TileRun(interpreter.Run):
    """One launch of a kernel."""

    def _ldmatrix(self, op: list[str], x: list[Any], active: Array) -> None:
        """PTX ISA 9.7.14.5.15: lane l of each eight gives the address of a row of 16 bytes."""
        count = len(self.warps(active, "ldmatrix"))
        at = self.address(x[1], active, True)
        assert not (at % 16).any(), "ldmatrix: a row is not aligned"
        memory = self.shared.bytes.view(np.uint16)
        rows = np.stack([memory[self.shared.words(at + 2 * k, 2, self.block[active])] for k in range(8)], axis=-1).reshape(count, 4, 8, 8)
        if "trans" in op:
            rows = rows.swapaxes(2, 3)
        for n, name in enumerate(x[0]):
            low, high = (rows[:, n, _LANE // 4, 2 * (_LANE % 4) + half].astype(np.uint32) for half in range(2))
            self.put(name, active, (low | high << np.uint32(16)).reshape(-1))

    def _movmatrix(self, op: list[str], x: list[Any], active: Array) -> None:
        count = len(self.warps(active, "movmatrix"))
        word = np.broadcast_to(self.get(x[1], active, "b32"), len(active)).reshape(count, 32)
        tile = np.zeros((count, 8, 8), np.uint32)
        for half in range(2):
            tile[:, _LANE // 4, 2 * (_LANE % 4) + half] = word >> np.uint32(16 * half) & np.uint32(0xFFFF)
        tile = tile.swapaxes(1, 2)
        low, high = (tile[:, _LANE // 4, 2 * (_LANE % 4) + half] for half in range(2))
        self.put(x[0], active, (low | high << np.uint32(16)).reshape(-1))

    def _red(self, op: list[str], x: list[Any], active: Array) -> None:
        memory, dtype, places = self.places(op, x[0], active)
        names = x[1] if isinstance(x[1], list) else [x[1]]
        [add] = [combine for name, combine in (("add", np.add), ("or", np.bitwise_or), ("max", np.maximum)) if name in op]
        for name, place in zip(names, places, strict=True):
            add.at(memory, place, np.broadcast_to(self.get(name, active, op[-1]), len(active)).astype(dtype))


class Launcher(interpreter.Launcher):
    """A Launcher whose kernels run here."""

    def load(self, source: compiler.Source) -> Any:
        shared, body = source.make()[1], interpreter.parsed(build(source, self.arch, "ptx")[0].decode().rstrip("\0"))

        def launch(grid: int, given: list[Any], stream: int) -> None:
            self.launched.append(source.key)
            numbers = [_LETTERS[letter](value) for (_, letter), value in zip(source.fields, given, strict=True)]
            if grid:
                values = dict(zip(body.params, numbers, strict=True))
                TileRun(body, self.memory, grid, source.threads, shared, values, source.cluster).go()
        return SimpleNamespace(launch=launch)

    def clear(self, memory: int, size: int, stream: int) -> None:
        self.memory.bytes[memory - BASE:memory - BASE + size] = 0

    @contextlib.contextmanager
    def temporary(self, size: int, stream: int) -> Iterator[int]:  # type: ignore[override]
        with super().temporary(size, stream) as at:
            self.memory.bytes[at - BASE:at - BASE + size] = 0xFF        # NaN
            yield at


__all__ = ["Launcher", "Memory"]
