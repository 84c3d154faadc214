"""The GPU engine's forward through the public functions: every named problem on every kernel family against the reference, and a fuzzer."""
from __future__ import annotations

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import UnsupportedError
from tests.tools.devices import requires_gpu
from tests.tools.gpu.cases import (
    LARGE,
    PROFILES,
    SMALL,
    TIMES,
    asks_lse,
    families_here,
    for_family,
    forward,
    fuzz_cases,
    judged,
    must_take,
    pairs,
    short_pairs,
    wanted,
)
from tests.tools.problems import CASES, Case

pytestmark = [requires_gpu, pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


REFUSED: dict[tuple[str, str], str] = {}


def check(case: Case, family: str) -> None:
    case = for_family(case, family)
    inputs, judge = judged(case)
    try:
        out, lse = forward(inputs, family, asks_lse(case))
    except UnsupportedError as error:
        assert not must_take(case, family), f"{family} refuses {case}: {error}"
        assert wanted(family)[0] in str(error)
        REFUSED[family, case.name] = str(error)
        return
    judge.forward(out, lse)


@pairs(CASES)
def test_agrees_with_reference(case: Case, family: str) -> None:
    check(case, family)


@short_pairs
def test_short(case: Case, family: str) -> None:
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
