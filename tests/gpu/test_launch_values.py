"""The fuzzer's problems for GPUs, prepared without one: each launch's numbers fit the fields of its kernel.

What the host computes for a launch is found wrong here, and not on the first machine with a GPU: numbers that leave their field, lengths
of zero, scales of every sign and size. A call's kernels are listed with their values, and nothing is compiled.
"""
from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import UnsupportedError, gpu
from fastattn.gpu.precompile import absent_device
from tests.fuzz.__main__ import today
from tests.fuzz.draw import draw
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.gpu.checking import Checking, first_tilings
from tests.tools.gpu.drawn import calls

COUNT = 900


def prepare(spec: Spec, arch: str) -> int:
    """How many kernels the calls of a problem launch; 0 where the family refuses them."""
    launcher = Checking(absent_device(arch))
    for call in calls(make(replace(spec, numbers="float"))):
        try:
            gpu._launch(call, launcher, (spec.engine,) if spec.engine else gpu.FAMILIES, 0)
        except UnsupportedError:
            return 0
    return len(launcher.sources)


@pytest.mark.slow
def test_launches_of_random_problems() -> None:
    """The day's problems, every third of an architecture without wgmma."""
    launched = 0
    with first_tilings():
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
