"""The order of a score's sum on plain threads, which its rounding depends on: kernels run in Python (tools/gpu/emulator.py).

A backward of float32 heads over 128 takes the lse of the tensor cores' scores. Its P = exp(S - lse) then has the rounding of both.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from fastattn.gpu.spec import Call, make_spec
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import families_of, host_view, run
from tests.tools.gpu.cases import LARGE, using
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import BY_NAME, Inputs

Array = np.ndarray[Any, Any]
SLICE, HUGE, SCALE = 64, 2.0**30, 2.0**-6
P = np.exp([4.0, 0]) / np.exp([4.0, 0]).sum()
V = np.arange(32.0).reshape(2, 16)


class Given(Inputs):
    """The forward's results are exact."""

    def forward(self, engine: str | None = None) -> tuple[Any, Any]:
        return (P @ V)[None, None, None], np.full((1, 1, 1), np.log(np.exp([4.0, 0]).sum()))


def inputs_of() -> Given:
    """One row and two keys of three slices of head_dim. The first key's products are 2**60, 4 each, and -2**60: the 4s are lost in a
    chain, which is rounded to multiples of 256, but not in the sum of 64 of them."""
    q, k = np.zeros(3 * SLICE), np.zeros((2, 3 * SLICE))
    q[[0, -1]], q[SLICE:2 * SLICE] = HUGE, 2
    k[0] = q
    k[0, -1] = -HUGE
    return Given((q[None, None, None], k[None, :, None], V[None, :, None]), {"softmax_scale": SCALE}, np.ones((1, 1, 1, 16)), None)


def test_forward() -> None:
    inputs, memory, out, lse = inputs_of(), Memory(), np.full((1, 1, 1, 16), np.nan), np.full((1, 1, 1), np.nan)
    problem, o = make_problem("test", Operands(*map(host_view, inputs.args)), packed=False, **inputs.kwargs)
    call = Call(problem, o, host_view(out), host_view(lse))
    for x in (o.q, o.k, o.v, call.out, call.lse):
        memory.allow(x)
    with emulated(memory) as machine:
        gpu.family("simt").prepare(call, make_spec(problem, o, True), machine.launcher())(call, 0)
    expected = inputs.forward()
    np.testing.assert_allclose(out, expected[0], rtol=1e-12)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-12)


def test_backward() -> None:
    grads, _ = run(inputs_of())
    np.testing.assert_allclose(grads.dv[0, :, 0], np.repeat(P[:, None], 16, axis=1), rtol=1e-12)


@pytest.mark.parametrize(("name", "device", "family", "families"), [
    ("scale_large_few_queries_float32", "sm_90a", "any", ("sm90", "simt")),
    ("scale_large_few_queries_float32", "sm_80", "any", ("simt", "simt")),
    ("float_huge_128", "sm_90a", "any", ("sm90", "sm90")),
    ("float_huge_256", "sm_90a", "any", ("sm90", "simt")),
    ("float_huge_256", "sm_90a", "simt", ("simt", "simt"))])
def test_families_of_both_directions(name: str, device: str, family: str, families: tuple[str, str]) -> None:
    """Where they differ, gpu/test_backward.py judges P by what docs/contracts.md says of an lse that belongs to other scores."""
    inputs = ({case.name: case for case in LARGE} | BY_NAME)[name].make()
    with using(family):
        assert families_of(inputs.packed, list(inputs.args), inputs.kwargs, device) == families
