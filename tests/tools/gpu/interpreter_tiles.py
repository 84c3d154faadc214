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
        add = np.bitwise_or if "or" in op else np.add
        for name, place in zip(names, places, strict=True):
            add.at(memory, place, np.broadcast_to(self.get(name, active, op[-1]), len(active)).astype(dtype))

    def _shfl(self, op: list[str], x: list[Any], active: Array) -> None:
        """As Numba writes it: with a predicate, and the distance in a register."""
        name, distance = x[0].partition("|")[0], x[2]
        if not isinstance(distance, int):
            distance = int(np.unique(np.broadcast_to(self.get(distance, active, "u32"), len(active))).item())
        super()._shfl(op, [name, x[1], distance], active)

    def _copysign(self, op: list[str], x: list[Any], active: Array) -> None:
        """The sign of the first operand, the size of the second."""
        self._binary(lambda sign, size: np.copysign(size, sign), op, x, active)

    def _rcp(self, op: list[str], x: list[Any], active: Array) -> None:
        if op[-1] != "f64":
            super()._rcp(op, x, active)
            return
        with np.errstate(all="ignore"):
            self.put(x[0], active, 1 / np.asarray(self.get(x[1], active, "f64")))

    def _sqrt(self, op: list[str], x: list[Any], active: Array) -> None:
        self.put(x[0], active, np.sqrt(self.get(x[1], active, op[-1])))

    def _bfind(self, op: list[str], x: list[Any], active: Array) -> None:
        word = np.broadcast_to(self.get(x[1], active, "u32"), len(active))
        top = np.array([int(w).bit_length() - 1 for w in word])
        self.put(x[0], active, np.where(top < 0, -1, 31 - top if "shiftamt" in op else top).astype(np.int32).view(np.uint32))

    def _brev(self, op: list[str], x: list[Any], active: Array) -> None:
        word = np.broadcast_to(self.get(x[1], active, "u32"), len(active))
        self.put(x[0], active, np.array([int(f"{int(w):032b}"[::-1], 2) for w in word], np.uint32))

    def _min(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.minimum if "NaN" in op else np.fmin if op[-1][0] == "f" else np.minimum, op, x, active)

    def _max(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.maximum if "NaN" in op else np.fmax if op[-1][0] == "f" else np.maximum, op, x, active)

    def _fma(self, op: list[str], x: list[Any], active: Array) -> None:
        """float32 in float64, float64 in as many bits as there are; rm: rounded down."""
        wide, real = (np.longdouble, np.float64) if op[-1] == "f64" else (np.float64, np.float32)
        a, b, c = (np.asarray(self.get(y, active, op[-1])).astype(wide) for y in x[1:])
        with np.errstate(all="ignore"):
            exact = a * b + c
            value = exact.astype(real)
            if "rm" in op:
                value = np.where(value > exact, np.nextafter(value, real(-np.inf)), value)
            self.put(x[0], active, np.clip(value, real(0), real(1)) if "sat" in op else value)

    def _div(self, op: list[str], x: list[Any], active: Array) -> None:
        """Quotients of integers are cut off."""
        def cut(a: Any, b: Any) -> Any:
            return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)) if op[-1][0] == "s" else a // b
        self._binary(np.divide if op[-1][0] == "f" else cut, op, x, active)

    def _rem(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.fmod, op, x, active)

    def _cvt(self, op: list[str], x: list[Any], active: Array) -> None:
        if "sat" in op:
            assert op[-1] == op[-2] == "f32"
            self.put(x[0], active, np.clip(np.nan_to_num(self.get(x[1], active, "f32"), nan=0.0), np.float32(0), np.float32(1)))
            return
        whole = next((f for name, f in (("rmi", np.floor), ("rni", np.rint), ("rzi", np.trunc)) if name in op), None)
        if whole is None or op[-1] not in ("f32", "f64"):
            super()._cvt(op, x, active)
            return
        value = whole(np.asarray(self.get(x[1], active, op[-1])))
        if op[-2] == "s32":
            value = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=2.0**31 - 1, neginf=-2.0**31).clip(-2**31, 2**31 - 1)
        self.put(x[0], active, value.astype(interpreter._TYPES[op[-2]]))


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
