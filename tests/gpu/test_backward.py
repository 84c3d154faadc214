"""The GPU engine's backward through the public functions: every named problem
on every kernel family that has one, and random ones.

Results are compared with the reference. out and lse are the reference's, so that the backward is judged alone. Also the promises about NaN,
equal bits from run to run, and memory.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import Grads, UnsupportedError, gpu
from tests.tools.compare import Judge
from tests.tools.devices import requires_gpu
from tests.tools.gpu.calls import families_of
from tests.tools.gpu.cases import (
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
    must_take,
    on_device,
    pairs,
    short_pairs,
    to_host,
    using,
    wanted,
)
from tests.tools.gpu.poison import poison
from tests.tools.problems import BY_NAME, CASES, Case, Inputs

pytestmark = [requires_gpu, pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
BACKWARD = True             # which kernels the fixture compiles
# simt runs what is small; several tiles of all features, not of every head size
LARGE_SIMT = {"tiles_64_129", "tiles_128_129_full", "large_gqa_64", "large_window_both_64", "large_bias_64", "large_bias_row_64",
              "large_bias_column_64", "large_more_queries_64", "large_dropout_64", "large_packed_used", "large_packed_all", "large_192_128",
              "wide_576_512"}
REFUSED: dict[tuple[str, str], str] = {}


def backward(inputs: Inputs, out: Array, lse: Array, family: str, deterministic: bool = False) -> Grads:
    """The gradients of the family, written into memory that held NaN."""
    (q, k, v, *lengths), kwargs = device_arguments(inputs)
    function: Any = fastattn.attention_varlen_backward if inputs.packed else fastattn.attention_backward
    dout, out_there, lse_there = on_device(inputs.dout), on_device(out), on_device(lse)
    dlse = None if inputs.dlse is None else on_device(inputs.dlse)
    bias = inputs.kwargs.get("bias")
    poison()
    with using(family):
        grads = function(dout, q, k, v, out_there, lse_there, *lengths, **kwargs, dlse=dlse, need_dbias=bias is not None,
                         deterministic=deterministic)
    return Grads(*(None if x is None else to_host(x) for x in grads))


def own_forward(inputs: Inputs, family: str) -> tuple[Array, Array]:
    (q, k, v, *lengths), kwargs = device_arguments(inputs)
    function: Any = fastattn.attention_varlen if inputs.packed else fastattn.attention
    with using(family):
        out, lse = function(q, k, v, *lengths, **kwargs, return_lse=True)
    return to_host(out), to_host(lse)


def reference_forward(inputs: Inputs) -> tuple[Array, Array]:
    out, lse = inputs.forward("reference")
    return np.asarray(out), np.asarray(lse)


def of_lse(case: Case, inputs: Inputs, lse: Array, family: str) -> float:
    """What docs/contracts.md says of P, where lse's rounding is not that of the score that it is subtracted from.

    It is not where that score has other bits than the forward's. Nor is it on tensor cores, whose scores are in units of log2 while lse is
    not: there the difference of a score of 1000 and its own lse is not 0. Beside 16-bit results that is nothing.
    """
    largest = 2.0**-24 * float(np.abs(lse[np.isfinite(lse)]).max())
    if case.name.startswith("decode_float32_huge"):         # several keys share a row whose scores are some 1000
        return 2 * largest
    with using(family):
        forward, back = families_of(inputs.packed, *device_arguments(inputs))
    in_log2 = case.dtype == "float32" and back in ("sm80", "sm90")
    return largest if forward != back or in_log2 else 0.0


def check(case: Case, family: str) -> None:
    case = for_family(case, family)
    inputs, judge = judged(case)
    # where scores are large, so is lse: rounded to float32 it is another softmax's than the one that the family's scores belong to
    own = case.name.startswith(("scale_large", "scale_huge", "float_huge", "decode_float32_huge"))
    try:
        out, lse = own_forward(inputs, family) if own else reference_forward(inputs)
        grads = backward(inputs, out, lse, family)
        judge.of_lse = of_lse(case, inputs, lse, family) if own else 0.0
    except UnsupportedError as error:
        assert not must_give(case, family), f"{family} refuses {case}: {error}"
        assert wanted(family)[0] in str(error)
        REFUSED[family, case.name] = str(error)
        return
    judge.backward(grads)


def must_give(case: Case, family: str) -> bool:
    """Whether a refusal of the backward is an error."""
    several = sum(map(bool, (case.bias, case.mask, case.dropout_p, case.softcap, case.alibi))) > 1
    if family == "sm90" and (several or (case.bias and case.dtype == "float32")):
        return False
    return must_take(case, family, backward=True) and not (family in ("sm80", "short") and case.bias)


def repeatable(inputs: Inputs, out: Array, lse: Array, family: str) -> Grads:
    """Deterministic gradients; skips the test where a tensor-core family has none."""
    try:
        return backward(inputs, out, lse, family, deterministic=True)
    except UnsupportedError as error:
        if family in ("any", "simt"):
            raise
        pytest.skip(str(error))


def same(a: Grads, b: Grads) -> None:
    for name, x, y in zip(Grads._fields, a, b, strict=True):
        if x is not None:
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8), name)


# ---------------------------------------------------------------- right numbers
@pairs(CASES, gpu.FAMILIES)
def test_agrees_with_reference(case: Case, family: str) -> None:
    check(case, family)


@short_pairs
def test_short(case: Case, family: str) -> None:
    check(case, family)


@pairs(LARGE, gpu.FAMILIES)
def test_several_tiles(case: Case, family: str) -> None:
    if family == "simt" and case.name not in LARGE_SIMT:
        pytest.skip("plain threads are judged by fewer of these")
    check(case, family)


@pairs([*SMALL, *(replace(BY_NAME[f"everything_{name}"], name=f"small_{name}") for name in ("float32", "packed"))], gpu.FAMILIES)
def test_small(case: Case, family: str) -> None:
    """What the sanitizers run too (gpu_sanitize.sh)."""
    check(case, family)


@pytest.mark.parametrize("family", families_here(gpu.FAMILIES))
@pytest.mark.parametrize("profile", PROFILES)
def test_fuzz(profile: str, family: str) -> None:
    """FASTATTN_FUZZ=10: ten times as many."""
    for n, case in enumerate(fuzz_cases(profile, int(6 * TIMES))):
        case = replace(case, dlse=n % 2 == 1)
        try:
            check(case, family)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


OWN_FORWARD = Case("own_forward", "bfloat16", num_heads=4, num_heads_k=2, seqlen_q=300, seqlen_k=420, head_dim=64, causal=True,
                   dropout_p=0.1, sinks=True, dlse=True)


@pytest.mark.parametrize("family", families_here(gpu.FAMILIES))
def test_after_its_own_forward(family: str) -> None:
    """What a training step does: out and lse are the GPU's."""
    case = BY_NAME["everything_float32"] if family in ("any", "simt") else OWN_FORWARD      # tensor cores do not take all at once
    inputs = case.make()
    args, kwargs = device_arguments(inputs)
    out, lse = function_of(inputs)(*args, **kwargs, return_lse=True)
    Judge(inputs).backward(backward(inputs, to_host(out), to_host(lse), family))


# ---------------------------------------------------------------- promises
PROMISED = [Case("promise_causal", "bfloat16", num_heads=4, num_heads_k=2, seqlen_q=300, seqlen_k=420, head_dim=64, causal=True),
            Case("promise_bias", "float16", seqlen_q=200, head_dim=64, bias=(1, 2, 200, 200), dropout_p=0.1, sinks=True, dlse=True),
            Case("promise_packed", "bfloat16", lengths_q=(70, 0, 133, 1), lengths_k=(90, 4, 130, 20), head_dim=64, spare=3)]


@pairs(PROMISED, gpu.FAMILIES)
def test_same_bits_every_run(case: Case, family: str) -> None:
    inputs = for_family(case, family).make()
    out, lse = reference_forward(inputs)
    first = repeatable(inputs, out, lse, family)
    for _ in range(5):
        same(repeatable(inputs, out, lse, family), first)


HIDDEN = Case("hidden", "bfloat16", num_heads=4, num_heads_k=2, seqlen_q=40, seqlen_k=90, head_dim=64, mask=(2, 1, 40, 90))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pairs([HIDDEN], ("simt",))     # tensor cores multiply by the 0 of what is masked
def test_masked_values_do_not_matter(case: Case, family: str, bad: float) -> None:
    """A key that no row attends to may hold anything, as may a row that attends to nothing."""
    if family == "any":
        pytest.skip("it is a family of the tensor cores here")
    inputs = case.make()
    inputs.kwargs["mask"][:, :, :, [3, 17, 64, 88, 89]] = False
    inputs.kwargs["mask"][:, :, [0, 21, 39], :] = False
    out, lse = reference_forward(inputs)
    before = repeatable(inputs, out, lse, family)
    q, k, v = inputs.args
    k[:, [3, 17, 64, 88, 89]] = v[:, [3, 17, 64, 88, 89]] = bad
    q[:, [0, 21, 39]] = inputs.dout[:, [0, 21, 39]] = bad
    same(repeatable(inputs, out, lse, family), before)
    assert (before.dq[:, [0, 21, 39]] == 0).all() and (before.dk[:, [3, 17, 64, 88, 89]] == 0).all()


NAN_SCORE = Case("nan_score", seqlen_q=40, bias=(40, 40), mask=(40, 40), causal=True)


@pairs([NAN_SCORE], gpu.FAMILIES)
def test_nan_score_at_a_masked_position(case: Case, family: str) -> None:
    inputs = for_family(case, family).make()
    out, lse = reference_forward(inputs)
    before = repeatable(inputs, out, lse, family)
    inputs.kwargs["bias"][~inputs.kwargs["mask"] | ~np.tri(40, dtype=bool)] = np.nan
    same(repeatable(inputs, out, lse, family), before)


def test_refusals() -> None:
    """Runs after the cases: what a forced family refused, and why."""
    for (family, name), reason in sorted(REFUSED.items()):
        print(f"{family} refuses {name}: {reason}")
    assert not [key for key in REFUSED if key[0] in ("any", "simt")]
