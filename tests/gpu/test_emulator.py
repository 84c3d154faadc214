"""tools/gpu/emulator.py itself: what it says of kernels that are wrong, with greenlets and with Python's threads."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from tests.tools.gpu import emulator
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Block, Memory, indices

KINDS = [*(["greenlets"] if emulator.greenlet is not None else []), "threads"]


def run(kind: str, body: Callable[[Block], None], threads: int = 3) -> Block:
    with pytest.MonkeyPatch.context() as patch:
        if kind == "threads":
            patch.setattr(emulator, "greenlet", None)
        block = Block(threads)
    assert type(block.turns).__name__ == {"greenlets": "Fibres", "threads": "Threads"}[kind]
    block.run(body, block)
    return block


def read(block: Block, address: int) -> Any:
    return block.get(range(address, address + 1))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_take_turns(kind: str) -> None:
    seen = []

    def body(block: Block) -> None:
        me = block.current
        for turn in range(2):
            assert block.current == me
            seen.append((turn, me, block.epoch))
            block.put(4 * me, me + turn)
            block.barrier()
            assert read(block, 4 * ((me + 1) % 3)) == (me + 1) % 3 + turn
            block.barrier()
    run(kind, body)
    assert seen == [(turn, n, 2 * turn) for turn in range(2) for n in range(3)]


def nobody_wrote(block: Block) -> None:
    read(block, 64)


def reads_too_early(block: Block) -> None:
    if block.current == 0:
        block.put(0, 1.0)
    else:
        read(block, 0)


def writes_too_early(block: Block) -> None:
    block.put(4 * block.current, 0.0)
    block.barrier()
    read(block, 0)
    if block.current == 2:
        block.put(0, 1.0)


def two_write(block: Block) -> None:
    block.put(0, float(block.current))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("body", "text"), [(nobody_wrote, "address 64 was never written"), (reads_too_early, "race at shared address 0"),
                                            (writes_too_early, "race at shared address 0"), (two_write, "race at shared address 0")])
def test_races_are_found(kind: str, body: Callable[[Block], None], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_stores_are_no_race(kind: str) -> None:
    block = run(kind, lambda block: block.put(8, 1.5))
    assert read(block, 8) == 1.5


def test_accesses_outside_are_found() -> None:
    memory, x, y = Memory(), np.zeros(4, np.float32), np.zeros(4, np.float32)
    for array in (x, y):
        memory.allow(host_view(array))
    for array in (x, y, x):
        at = array.ctypes.data
        for offset in (0, 12):
            memory.check(at + offset, 4)
        for offset in (-4, 16):
            with pytest.raises(AssertionError, match="outside the arrays"):
                memory.check(at + offset, 4)
        with pytest.raises(AssertionError, match="misaligned"):
            memory.check(at + 2, 4)
    with memory.temporary(64, 0) as at:
        memory.check(at + 60, 4)
    with pytest.raises(AssertionError, match="outside the arrays"):
        memory.check(at, 4)


def test_local_arrays_have_no_other_elements() -> None:
    assert indices(3) == [0, 1, 2] and indices((2, 2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
