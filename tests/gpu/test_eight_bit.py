"""8-bit operands on the GPU. Through 16-bit kernels: the copies that widen operands and scale the output run in Python, around the kernels
on plain threads (tools/gpu/emulator.py). With a GPU every problem of tools/eight_bit.py runs on every family.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu
from tests.tools.eight_bit import CASES, Quantised, by_name, dequantised, exact, limit
from tests.tools.problems import Case

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import attention, attention_varlen, gpu
from fastattn.arrays.view import EIGHT_BIT, numpy_dtype
from fastattn.explanation import _catch
from fastattn.gpu import eight_bit
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.spec import Call, make_spec
from fastattn.tolerance import distance
from tests.tools.gpu.cases import families_here, to_host, torch, using
from tests.tools.gpu.emulator import Memory, emulated

Array = np.ndarray[Any, Any]
SMALL: dict[str, Any] = {"num_heads": 4, "num_heads_k": 2, "seqlen_q": 9, "seqlen_k": 12, "head_dim": 5}
EMULATED = [
    Quantised("small", Case("small_eight", causal=True, **SMALL)),
    Quantised("small_scales", Case("small_eight_scales", **SMALL), axis="batch_head"),
    Quantised("small_e5m2", Case("small_eight_e5m2", **SMALL), dtypes=("float8_e5m2", "float8_e4m3fn"), axis="head", out_dtype="float16"),
    Quantised("small_float16_q", Case("small_eight_q", "float16", **SMALL), "float16", "head"),
    Quantised("small_float32_q", Case("small_eight_q32", "float32", **SMALL), "float32"),
    Quantised("small_float64_q", Case("small_eight_q64", "float64", **SMALL), "float64", "head"),
    Quantised("small_out_8", Case("small_eight_out", **SMALL), out_dtype="float8_e4m3fn", out_scale=0.01),
    Quantised("small_packed", Case("small_eight_packed", lengths_q=(3, 0, 6), lengths_k=(4, 3, 5), spare=2, num_heads=4, num_heads_k=2,
                                   head_dim=5), axis="head"),
    Quantised("small_features", Case("small_eight_features", softcap=3.0, bias=(2, 1, 9, 12), sinks=True, alibi="heads", **SMALL)),
]


def host_call(case: Quantised) -> tuple[Call, Array, Array]:
    """The case as a call of the GPU engine in host memory, and its results."""
    function: Any = attention_varlen if case.lengths else attention
    caught = _catch(function, (*case.args, *case.lengths), {**case.kwargs, "return_lse": True})
    operands, out, lse, _ = caught.where
    return Call(caught.problem, operands, out, lse), out.numpy(), lse.numpy()


def run_in_python(call: Call) -> list[str]:
    memory = Memory()
    for x in call.views:
        memory.allow(x)
    with emulated(memory) as machine:
        family = eight_bit.Widening(gpu.family("simt"))
        family.prepare(call, make_spec(call.problem, call.operands, True), machine.launcher())(call, 0)
    return machine.launched


@pytest.mark.parametrize("name", [case.name for case in EMULATED])
def test_in_python(name: str) -> None:
    case = next(case for case in EMULATED if case.name == name)
    call, out, lse = host_call(case)
    out[...], lse[...] = 0, np.nan
    launched = run_in_python(call)
    assert sum("rescale" in key for key in launched) >= 2
    want, want_lse = exact(case)
    # a scaled q is rounded to 11 bits, and so is the output's sum
    assert distance(dequantised(out, case.kwargs.get("out_scale")), want) <= 2 * limit(case, want, P=None) + 2.0**-9 * np.linalg.norm(want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-3, atol=2e-3)


def test_scales_of_each_sequence_in_python() -> None:
    """Packed arrays with scales (sequences, num_heads_k)."""
    base = next(case for case in EMULATED if case.name == "small_packed")
    scale = np.float32([[1, 2], [3, 4], [0.5, 8]])
    case = replace(base, made={"args": base.args, "lengths": base.lengths, "kwargs": {**base.kwargs, "v_scale": scale}})
    call, out, _ = host_call(case)
    run_in_python(call)
    want = attention_varlen(*case.args, *case.lengths, engine="reference", **case.kwargs)
    np.testing.assert_allclose(out.astype(np.float32), want.astype(np.float32), rtol=2.0**-6, atol=1e-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_copies_are_compiled(arch: str, packed: bool) -> None:
    pairs = [(dtype, wide) for dtype in EIGHT_BIT for wide in ("float16", "bfloat16")]
    pairs += [("float16", "bfloat16"), ("float16", "float8_e4m3fn"), ("bfloat16", "bfloat16"), ("float32", "float16")]
    for dtype, target in pairs:
        source = eight_bit.rescale_source(dtype, target, packed)
        assert compiler.complaints(compiler.build(source, arch)[1]) == [], source.key


def test_which_family_runs_them() -> None:
    """With any feature, head size and scale a family of tensor cores takes the call, as it takes it in 16 bits."""
    for name in ("plain", "features", "packed", "head_dim_256", "dropout", "float16_q", "e5m2", "mixed", "out_8", "out_float32"):
        case = by_name(name)
        function: Any = attention_varlen if case.lengths else attention
        for arch, family in (("sm_80", "sm80"), ("sm_90a", "sm90")):
            found = fastattn.explain(function, *case.args, *case.lengths, device=arch, **case.kwargs)
            assert found.engine == family, (name, str(found))
            assert any("rescale" in key for key in found.kernels) or any("8bit" in key for key in found.kernels), (name, str(found))


# ---------------------------------------------------------------- on a device
def on_the_device(x: Any) -> Any:
    if not isinstance(x, np.ndarray) or x.dtype.name not in EIGHT_BIT:
        return torch().as_tensor(x).cuda() if isinstance(x, np.ndarray) and x.dtype.name != "bfloat16" else \
            torch().from_numpy(x.view(np.int16)).view(torch().bfloat16).cuda() if isinstance(x, np.ndarray) else x
    return torch().from_numpy(x.view(np.uint8)).view(getattr(torch(), x.dtype.name)).cuda()


def host(x: Any) -> Array:
    if str(x.dtype).startswith("torch.float8"):
        return x.view(torch().uint8).cpu().numpy().view(numpy_dtype(str(x.dtype).removeprefix("torch.")))
    return to_host(x)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_on_the_device(name: str) -> None:
    case = by_name(name)
    function: Any = attention_varlen if case.lengths else attention
    kwargs = {key: on_the_device(x) for key, x in case.kwargs.items()}
    args = [on_the_device(x) for x in (*case.args, *case.lengths)]
    want, want_lse = exact(case)
    for family in families_here():
        try:
            with using(family):
                out, lse = function(*args, return_lse=True, **kwargs)
        except fastattn.UnsupportedError:
            continue
        out, lse = host(out), host(lse)
        assert distance(dequantised(out, case.kwargs.get("out_scale")), want) <= 2 * limit(case, want, P="float8_e4m3fn"), family
        finite = np.isfinite(want_lse)
        np.testing.assert_array_equal(np.isfinite(lse), finite)
        np.testing.assert_allclose(lse[finite], want_lse[finite], rtol=5e-3, atol=5e-3)
