"""The GPU engine's forward through the public functions: every named problem on every kernel family against the reference, and a fuzzer."""
from __future__ import annotations

import numpy as np
import pytest
from compare import Judge
from gpu import requires_gpu
from gpu_cases import (
    LARGE,
    PROFILES,
    SMALL,
    TIMES,
    Array,
    device_arguments,
    families_here,
    for_family,
    function_of,
    fuzz_cases,
    judged,
    kernels,
    must_take,
    on_device,
    pairs,
    to_host,
    torch,
    wanted,
)
from gpu_poison import poison
from problems import CASES, Case, Inputs

from fastattn import UnsupportedError, gpu

pytestmark = [requires_gpu, pytest.mark.gpu]
__all__ = ["LARGE", "Judge", "device_arguments", "families_here", "for_family", "forward", "function_of", "kernels", "to_host", "torch",
           "wanted"]        # for test_gpu_promises


def forward(inputs: Inputs, family: str) -> tuple[Array, Array]:
    """(out, lse) of the family, written into memory that held NaN, as does all that it is given besides."""
    args, kwargs = device_arguments(inputs)
    q, v = inputs.args[0], inputs.args[2]
    out = on_device(np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype))
    poison()
    with gpu.use(*wanted(family)):
        given, lse = function_of(inputs)(*args, **kwargs, out=out, return_lse=True)
    assert given is out
    return to_host(out), to_host(lse)


REFUSED: dict[tuple[str, str], str] = {}


def check(case: Case, family: str) -> None:
    case = for_family(case, family)
    inputs, judge = judged(case)
    try:
        out, lse = forward(inputs, family)
    except UnsupportedError as error:
        assert not must_take(case, family), f"{family} refuses {case}: {error}"
        assert family in str(error)
        REFUSED[family, case.name] = str(error)
        return
    judge.forward(out, lse)


@pairs(CASES)
def test_agrees_with_reference(case: Case, family: str) -> None:
    check(case, family)


@pairs(LARGE)
def test_several_tiles(case: Case, family: str) -> None:
    check(case, family)


@pairs(SMALL)
def test_small(case: Case, family: str) -> None:
    """What the sanitizers run too (gpu_sanitize.sh)."""
    check(case, family)


@pytest.mark.parametrize("family", families_here())
@pytest.mark.parametrize("profile", PROFILES)
def test_fuzz(profile: str, family: str) -> None:
    """FASTATTN_FUZZ=10: ten times as many."""
    for case in fuzz_cases(profile, int(12 * TIMES)):
        try:
            check(case, family)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_refusals() -> None:
    """Runs after the cases: what a forced family refused, and why."""
    for (family, name), reason in sorted(REFUSED.items()):
        print(f"{family} refuses {name}: {reason}")
    assert not [key for key in REFUSED if key[0] in ("any", "simt")]
