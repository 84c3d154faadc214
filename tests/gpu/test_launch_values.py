"""The fuzzer's problems for GPUs, prepared without one: each launch's numbers fit the fields of its kernel.

What the host computes for a launch is found wrong here, and not on the first machine with a GPU: numbers that leave their field, lengths
of zero, scales of every sign and size. A call's kernels are listed with their values, and nothing is compiled.
"""
from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import UnsupportedError, gpu
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.runtime import compile
from fastattn.gpu.runtime.launcher import Listing
from tests.fuzz.__main__ import today
from tests.fuzz.draw import draw
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.gpu.drawn import calls

COUNT = 900


class Checking(Listing):
    """A Listing that packs the values of each launch as a device would."""

    def load(self, source: compile.Source) -> Any:
        return Checked(super().load(source), source)


class Checked:
    def __init__(self, kernel: Any, source: compile.Source) -> None:
        self.kernel, self.source = kernel, source

    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        assert 0 <= grid < 2**31, f"{self.source.key}: {grid} thread blocks"
        assert len(values) == len(self.source.fields), self.source.key
        for (name, letter), value in zip(self.source.fields, values, strict=True):
            assert letter not in "fd" or np.isfinite(value), f"{self.source.key}: {name} is {value}"
        misaligned(self.source, values)
        struct.pack("@" + "".join(compile._LETTERS[letter] for _, letter in self.source.fields), *values)
        self.kernel.launch(grid, values, stream)


def misaligned(source: compile.Source, values: list[Any]) -> None:
    """Fail for a launch whose kernel loads several elements at once that are not aligned as one."""
    words, given = source.key.split(), dict(zip([name for name, _ in source.fields], values, strict=True))
    at = {name: given[name] for name in ("bias", "bias_batch", "bias_head", "bias_row") if "bias_pairs" in words or "bias_whole" in words}
    if at and "first_key" in given:         # a step may begin at any key that a split begins at
        at |= {name: given[name] * given["bias_col"] for name in ("first_key", "split_keys")}
    size = 16 if "bias_whole" in words else 4
    for name, byte in at.items():
        assert byte % size == 0, f"{source.key}: {name} is at byte {byte}, loads are of {size}"
    if words[0] == "forward_decode" or (words[0] == "preprocess" and "whole" in words):
        for name in {"q", "k", "v", "dout", "out"} & given.keys() - ({"out"} if words[0] == "forward_decode" else set()):
            assert given[name] % 16 == 0, f"{source.key}: {name} is at {given[name]}, loads are of 16 bytes"


def prepare(spec: Spec, arch: str) -> int:
    """How many kernels the calls of a problem launch; 0 where the family refuses them."""
    launcher = Checking(absent_device(arch))
    for call in calls(make(replace(spec, numbers="float"))):
        try:
            gpu._launch(call, launcher, (spec.engine,) if spec.engine else gpu.FAMILIES, 0)
        except UnsupportedError:
            return 0
    return len(launcher.sources)


def test_launches_of_random_problems() -> None:
    """The day's problems, every third of an architecture without wgmma."""
    launched = 0
    for index in range(0, COUNT * 16, 16):          # two problems of each kernel
        spec = draw(today(), index, "cuda")
        arch = "sm_80" if index % 3 == 0 and spec.engine != "sm90" else "sm_90a"
        if spec.call == "attention":
            try:
                launched += prepare(spec, arch)
            except Exception as error:
                error.add_note(f"on {arch}: {spec}")
                raise
    assert launched > COUNT, "most problems are refused: nothing was tested"


def test_pairs_of_a_bias_from_any_window() -> None:
    """Steps of the split-key kernel begin where the first row's window does."""
    for left in range(90, 98):
        for engine in ("sm90", "sm80"):
            for keys in (542, 544):
                spec = Spec(seed=1, dtype="float16", num_heads=2, seqlen_q=17, seqlen_k=keys, head_dim=32, head_dim_v=32, window=(left, 4),
                            bias=(17, keys), bias_dtype="float16", engine=engine, library="torch")
                assert prepare(spec, "sm_90a") == 1


@pytest.mark.parametrize("scale", [-0.2, 0.0, -1.0, 1e-46, 1e30, -1e9])
@pytest.mark.parametrize("engine", gpu.FAMILIES)
def test_launches_at_every_scale(engine: str, scale: float) -> None:
    for dtype in ("float16", "bfloat16"):
        spec = Spec(seed=1, dtype=dtype, batch=2, num_heads=2, num_heads_k=2, seqlen_q=70, seqlen_k=90, head_dim=64, head_dim_v=64,
                    causal=True, softmax_scale=scale, backward=True, engine=engine, library="torch")
        assert prepare(spec, "sm_90a") >= 3
