"""The split-key kernel run from its PTX for drawn problems: each access is aligned and inside the arrays.

Its steps begin wherever the first row's window does, and a bias or a mask is read several columns at a time. So what is drawn is
windows of any size beside them, in the fuzzer's kinds of memory, whose arrays begin at any element. Numbers are judged elsewhere.
"""
from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from fastattn.arrays import convert
from fastattn.gpu.decode.config import FEW_KEYS
from tests.fuzz.__main__ import today
from tests.fuzz.found import FOUND
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.gpu import interpreter
from tests.tools.gpu.cases import HALVES
from tests.tools.gpu.drawn import calls

COUNT = 12
ONCE_WRONG = [spec for spec in FOUND if spec.dtype in HALVES and spec.call == "attention" and not spec.packed and spec.seqlen_k >= FEW_KEYS]


def drawn(seed: int, index: int) -> Spec:
    """Few queries and many keys with a window, and with a bias of 16 bits or a mask."""
    dice = random.Random(f"{seed}:{index}")
    rows, keys, dtype = dice.randint(1, 16), 256 + dice.randint(0, 70) * dice.choice([1, 2, 8]), dice.choice(HALVES)
    full = (dice.choice([1, rows]), keys)
    on = dice.choice([{"bias": full, "bias_dtype": dtype}] * 3 + [{"mask": full}])
    return Spec(seed=dice.randint(0, 2**31 - 1), dtype=dtype, num_heads=2, seqlen_q=rows, seqlen_k=keys, head_dim=16, head_dim_v=16,
                window=(dice.randint(0, 200), dice.choice([None, dice.randint(0, 20)])),
                memory=dice.choice(["plain", "plain", "gaps", "strange"]), **on)


def check(spec: Spec) -> list[str]:
    """Run the forward; the names of its kernels."""
    host, plain = (calls(make(one))[0] for one in (spec, replace(spec, memory="plain")))
    views = [*plain.views[:3], *host.views[3:]]         # q, k and v that are no whole vectors have another kernel
    memory = interpreter.Memory()
    call, launcher = host.at([None if x is None else memory.place(x.numpy(), x) for x in views]), interpreter.Launcher(memory)
    gpu._launch(call, launcher, ("sm80",), 0)
    return [key.split()[0] for key in launcher.launched]


@pytest.mark.parametrize("spec", ONCE_WRONG, ids=lambda spec: str(spec.seed))
def test_found(spec: Spec) -> None:
    assert check(spec) == ["forward_decode"]


@pytest.mark.parametrize("index", range(COUNT))
def test_drawn(index: int) -> None:
    spec = drawn(today(), index)
    try:
        kernels = check(spec)
    except Exception as error:
        error.add_note(str(spec))
        raise
    assert kernels[-1] == "forward_decode"


def test_what_lies_between_the_elements_of_an_array_is_outside() -> None:
    """Rows with gaps, heads before rows, a row that is repeated, and numbers backwards."""
    memory, whole = interpreter.Memory(), np.zeros((2, 4, 8), np.float16)
    for x in (whole[:, :, :5], whole.swapaxes(0, 1)[1:], np.broadcast_to(whole[:1, :1, 4:], (2, 4, 4)), whole[::-1, ::2, ::-2]):
        there = memory.place(x, convert.view(x, "test", "x"))
        used = {there.ptr + sum(n * by for n, by in zip(at, x.strides, strict=True)) for at in np.ndindex(x.shape)}
        for address in range(min(used) - 4, max(used) + 6, 2):
            with nullcontext() if address in used else pytest.raises(AssertionError, match="outside the arrays"):
                memory.words(np.array([address]), 2)
        for address in range(min(used) // 4 * 4, max(used), 4):         # words of two numbers
            with nullcontext() if {address, address + 2} <= used else pytest.raises(AssertionError, match="outside the arrays"):
                memory.words(np.array([address]), 4)
