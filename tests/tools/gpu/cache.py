"""What tests of the kernel cache share: a kernel, an entry, and files of other users."""
from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from numba import cuda, int32, uint64

from fastattn.gpu.ptx.memory import store_b32
from fastattn.gpu.runtime import cache
from fastattn.gpu.runtime import compile as compiler

ARCH = "sm_80"
KEY, ELF = "ab" * 32, cache.Binary(b"\x7fELF and more", 48)
ME, MALLORY = 1000, 1001


def _kernel(a):
    store_b32(uint64(a.dst + uint64(4 * cuda.threadIdx.x)), int32(a.n))


SOURCE = compiler.Source("test cache", lambda: (_kernel, 48), (("dst", "l"), ("n", "i")), 32)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


class Owners:
    """A fake stat: the user is ME, and every file is root's unless given to another. Real owners will not do, because
    the tests may run as root."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of, self.fstat = dict[tuple[int, int], int](), os.fstat
        monkeypatch.setattr(os, "geteuid", lambda: ME)
        monkeypatch.setattr(os, "fstat", self.status)

    def give(self, path: Path, owner: int) -> None:
        status = path.lstat()
        self.of[status.st_dev, status.st_ino] = owner

    def status(self, descriptor: int) -> os.stat_result:
        real = self.fstat(descriptor)
        values = list(real[:10])
        values[4] = self.of.get((real.st_dev, real.st_ino), cache.ROOT)
        return os.stat_result(values)


def kept(folder: Path, mode: int = 0o755) -> Path:
    """A folder with one entry."""
    cache._make(folder, 0o755)
    entry = folder / f"{KEY}.cubin"
    entry.write_bytes(cache._packed(KEY, ELF))
    folder.chmod(mode)
    return entry


def aged(folder: Path, name: str, size: int, days: float) -> Path:
    """A file that was last used so many days ago."""
    path = folder / name
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - 86400 * days,) * 2)
    return path
