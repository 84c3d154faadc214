"""diagonal, dropout_at, dropout_heads and float32 results on the GPU: kernels run in Python or from their PTX, without a GPU.

tests/tools/problems.py has the cases that a GPU runs: test_forward.py, test_backward.py.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tools.problems import NUMPY, Case, Inputs

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.gpu.precompile import absent_device, sources
from fastattn.gpu.rows import launch as rows_launch
from fastattn.gpu.spec import Arguments, Call, make_spec
from fastattn.problem import Operands, make_problem
from tests.tools.compare import Judge
from tests.tools.gpu.calls import host_view, interpreted, operands_of, run
from tests.tools.gpu.emulator import Memory, emulated


def forward_call(inputs: Inputs) -> Call:
    kwargs = dict(inputs.kwargs)
    arrays = operands_of(kwargs, lambda x: None if x is None else host_view(x))
    if inputs.packed:
        arrays |= {"cu_seqlens_q": host_view(inputs.args[3]), "cu_seqlens_k": host_view(inputs.args[4])}
    problem, o = make_problem("test", Operands(*map(host_view, inputs.args[:3]), **arrays), packed=inputs.packed, **kwargs)
    out, lse = np.full(problem.out_shape, np.nan, NUMPY[problem.out_dtype]), np.full(problem.lse_shape, np.nan, np.float32)
    return Call(problem, o, host_view(out), host_view(lse))


def emulated_forward(inputs: Inputs) -> tuple[Any, Any]:
    """(out, lse) of simt's kernels, run in Python."""
    call, memory = forward_call(inputs), Memory()
    assert call.lse is not None
    for x in (*(getattr(call.operands, name) for name in call.operands.__slots__), call.out, call.lse):
        memory.allow(x)
    with emulated(memory) as machine:
        spec = make_spec(call.problem, call.operands, True)
        gpu.family("simt").prepare(call, spec, machine.launcher())(call, 0)
    return call.out.numpy(), call.lse.numpy()


BACKWARD = [
    Case("position_diagonal", batch=1, num_heads=2, num_heads_k=1, seqlen_q=20, seqlen_k=40, head_dim=8, diagonal=9, causal=True,
         window=(20, None), alibi="batch", dlse=True),
    Case("position_negative", batch=1, seqlen_q=40, seqlen_k=20, head_dim=4, diagonal=-13, window=(None, 5)),
    Case("position_packed", "float16", lengths_q=(20, 0, 9), lengths_k=(40, 8, 9), used_k=(36, 8, 3), head_dim=8, diagonal=4, causal=True,
         alibi="heads", dropout_p=0.3, dropout_at=(2, 1, 32, 48), dropout_heads=4),
    Case("position_diagonals", "bfloat16", num_heads=2, num_heads_k=1, lengths_q=(20, 0, 9), lengths_k=(40, 8, 9), head_dim=8,
         diagonal=(18, 1, -3), causal=True, window=(11, None), alibi="batch", spare=3, bias=(3, 1, 1, 40)),
    Case("position_dropout", batch=2, num_heads=2, seqlen_q=20, seqlen_k=40, head_dim=8, dropout_p=0.3, dropout_at=(2**31 - 1, 0, 16, 160),
         dropout_heads=3),
    Case("position_float32", "bfloat16", batch=1, num_heads=2, num_heads_k=1, seqlen_q=20, seqlen_k=40, head_dim=8, out_dtype="float32",
         causal=True, dlse=True),
]


@pytest.mark.parametrize("case", BACKWARD, ids=[case.name for case in BACKWARD])
def test_emulated_backward(case: Case) -> None:
    inputs = case.make()
    Judge(inputs).backward(run(inputs)[0])


def test_emulated_float32_dout() -> None:
    """A kernel in front rounds dout to q's dtype."""
    inputs = replace(BACKWARD[-1], name="position_dout").make()
    wide = Inputs(inputs.args, inputs.kwargs, inputs.dout.astype(np.float32), inputs.dlse)
    grads, launched = run(wide)
    assert launched[0] == "rescale float32 bfloat16"
    for got, expected in zip(grads, run(inputs)[0], strict=True):
        if expected is not None:
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", BACKWARD, ids=[case.name for case in BACKWARD])
def test_emulated_forward(case: Case) -> None:
    inputs = case.make()
    out, lse = emulated_forward(inputs)
    assert out.dtype == NUMPY[case.out_dtype or case.dtype]
    Judge(inputs).forward(out, lse)


DECODE = Case("interpreted_decode", "bfloat16", batch=1, num_heads=4, num_heads_k=1, seqlen_q=2, seqlen_k=600, head_dim=64, causal=True)


@pytest.mark.parametrize("settings", [{"diagonal": 400, "alibi": "heads"}, {"diagonal": 400, "window": (100, None)},
                                      {"out_dtype": "float32"}], ids=str)
def test_interpreted_decode(settings: dict[str, Any]) -> None:
    inputs = replace(DECODE, name=f"decode_{settings}", **settings).make()
    out, lse, launched = interpreted(inputs)
    assert [key.split()[0] for key in launched] == ["forward_decode"]
    assert out.dtype == NUMPY[settings.get("out_dtype", "bfloat16")]
    Judge(inputs).forward(out, lse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merge_into_the_first_part(dtype: str) -> None:
    """A float32 state and a 16-bit part, merged in place."""
    draw = np.random.default_rng(0)
    state, part = draw.standard_normal((2, 2, 3, 2, 5)).astype(np.float32)
    part = part.astype(NUMPY[dtype])
    lse, part_lse = draw.standard_normal((2, 2, 2, 3)).astype(np.float32)
    expected, expected_lse = fastattn.merge_states([state, part], [lse, part_lse])
    memory, views = Memory(), [host_view(x) for x in (state, part, lse, part_lse)]
    for x in views:
        memory.allow(x)
    with emulated(memory) as machine:
        rows_launch.merge_states(views[:2], views[2:], views[0], views[2], machine.launcher(), 0)
    assert machine.launched == ["merge float32", f"merge {dtype} float32"]
    np.testing.assert_allclose(state, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


@pytest.mark.parametrize(("family", "arch"), [("sm90", "sm_90a"), ("sm80", "sm_80"), ("simt", "sm_80")])
def test_a_diagonal_of_each_sequence(family: str, arch: str) -> None:
    """Every family has kernels for it, and they get the array's address."""
    call = forward_call(replace(BACKWARD[3], name="position_each", head_dim=64, bias=None).make())
    spec = make_spec(call.problem, call.operands, True)
    with gpu.use(family):
        [key] = [source.key for source in sources(call, spec, absent_device(arch)) if source.key.startswith("forward")]
    assert key.startswith(f"forward_{family}") and "diagonals" in key
    arguments = Arguments(spec)
    values = dict(zip([name for name, _ in arguments.fields], arguments.values(call), strict=True))
    x = call.operands.diagonals
    assert x is not None and (values["diagonals"], values["diagonals_step"]) == (x.ptr, x.strides[0])


def test_kernels_do_not_depend_on_the_position() -> None:
    """diagonal, dropout_at and dropout_heads are numbers that a kernel is launched with: no other kernels."""
    def keys(**settings: Any) -> list[str]:
        case = Case("keys", "bfloat16", seqlen_q=300, seqlen_k=700, head_dim=128, causal=True, dropout_p=0.2, **settings)
        call = forward_call(case.make())
        return [source.key for source in sources(call, make_spec(call.problem, call.operands, True), absent_device("sm_90a"))]
    assert keys() == keys(diagonal=30) == keys(dropout_at=(1, 2, 16, 32), dropout_heads=7)
