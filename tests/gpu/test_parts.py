"""The kernel that splits float32 operands into three bfloat16 parts, run in Python: all operands of a call in one launch."""
from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest

from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import Grads
from fastattn.gpu.rows.parts import as_parts
from fastattn.gpu.spec import BackwardCall, Call
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Machine, Memory, emulated, replaced

Array = np.ndarray[Any, Any]
NARROW = NUMPY["bfloat16"]


def three(x: Array) -> list[Array]:
    high = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    middle = (x - high).astype(NARROW)
    return [high.astype(NARROW), middle, (x - high - middle.astype(np.float32)).astype(NARROW)]


def expected(x: Array) -> Array:
    """Rows of x padded to whole panels, high parts first."""
    *shape, dim = x.shape
    rows = np.zeros((*shape, -(-dim // 64) * 64), np.float32)
    rows[..., :dim] = x
    return np.concatenate(three(rows), axis=-1)


def store_parts(machine: Machine) -> Any:
    def store(address: int, apart: int, numbers: tuple[float, ...], keep: int) -> None:
        for n, part in enumerate(three(np.array(numbers, np.float32))):
            if keep:
                machine.memory.check(address + n * apart, 16)
                ctypes.memmove(address + n * apart, part.ctypes.data, 16)
    return store


@pytest.mark.parametrize("which", ["forward", "backward", "keys alone"])
@pytest.mark.parametrize(("dim", "dim_v", "key"), [
    (64, 64, "q 1 whole k 1 whole v 1 whole"), (128, 40, "q 2 whole k 2 whole v 1 whole"), (21, 72, "q 1 k 1 v 2 whole")])
def test_one_launch_splits_all_operands(dim: int, dim_v: int, key: str, which: str) -> None:
    """Heads before rows in memory, keys shared by query heads, more rows than a thread block has."""
    draw, backward, whole_q = np.random.default_rng(0), which == "backward", which == "keys alone"

    def random(*shape: int) -> Array:
        return (draw.standard_normal(shape) * np.exp2(draw.integers(-30, 30, shape))).astype(np.float32)
    q, k, v = random(2, 4, 9, dim).swapaxes(1, 2), random(2, 23, 2, dim), random(2, 2, 23, dim_v).swapaxes(1, 2)
    dout = random(2, 9, 4, dim_v)
    arrays = {"q": q, "k": k, "v": v} | ({"dout": dout} if backward else {})
    views, memory = {name: host_view(x) for name, x in arrays.items()}, Memory()
    for x in views.values():
        memory.allow(x)
    problem, operands = make_problem("test", Operands(views["q"], views["k"], views["v"]), packed=False)
    call: Any = Call(problem, operands, views["q"], None)
    if backward:
        call = BackwardCall(problem, operands, views["dout"], views["dout"], views["q"], None, Grads(*[views["q"]] * 3), False)
    with (emulated(memory) as machine, replaced(("rows.split",), machine.names() | {"store_parts": store_parts(machine)}),
          as_parts(call, machine.launcher("sm_90a"), 0, whole_q) as split):
        found = {"q": split.operands.q, "k": split.operands.k, "v": split.operands.v} | ({"dout": split.dout} if backward else {})
        if whole_q:
            assert found.pop("q") is views["q"]
        for name in found:
            x = arrays[name]
            size = math.prod(found[name].shape)
            got = np.frombuffer((ctypes.c_uint16 * size).from_address(found[name].ptr), np.uint16).reshape(found[name].shape)
            assert found[name].dtype == "bfloat16" and (got == expected(x).view(np.uint16)).all(), name
    [launched] = machine.launched
    assert launched == f"split {key[key.index('k '):] if whole_q else key}" + f" dout {-(-dim_v // 64)} whole" * backward + " early"
