"""Every element of every result is written, for all lengths, used keys, empty tiles, heads and sequences, and no launch has an empty grid.

Kernels on plain threads run in Python (tools/gpu/emulator.py) on memory that holds NaN. With a GPU all families run on poisoned memory
(tools/gpu/poison.py).
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.tools.compare import Judge
from tests.tools.devices import requires_gpu
from tests.tools.problems import Case, Inputs

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import UnsupportedError, gpu
from fastattn.arrays import convert, streams
from fastattn.gpu import precompile
from fastattn.gpu.rows.launch import dbias_sums
from fastattn.gpu.runtime import compile, workspace
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.spec import Call, Spec, make_spec
from fastattn.gpu.tile import gradients
from fastattn.problem import Operands, make_problem
from tests.tools.gpu import cases as gpu_cases
from tests.tools.gpu import poison as gpu_poison
from tests.tools.gpu.calls import run
from tests.tools.gpu.emulator import Memory, emulated, replaced

SMALL: dict[str, Any] = {"seqlen_q": 9, "head_dim": 5, "num_heads": 2, "num_heads_k": 1}
FEATURES: dict[str, Any] = {"sinks": True, "dlse": True}
# what leaves rows, keys, tiles, sequences or heads without work
EDGES = [Case(f"edge_{name}", **{**SMALL, **settings}) for name, settings in {
    "no_heads": {"num_heads": 0}, "no_heads_all": {"num_heads": 0, "bias": (2, 1, 9, 9), **FEATURES},
    "no_batch": {"batch": 0, "bias": (1, 2, 9, 9), **FEATURES},
    "no_queries": {"seqlen_q": 0, "seqlen_k": 7, "bias": (1, 2, 1, 7), **FEATURES},
    "no_keys": {"seqlen_k": 0, "bias": (1, 2, 9, 1), **FEATURES}, "no_keys_plain": {"seqlen_k": 0},
    "unattended_keys": {"batch": 1, "seqlen_k": 70, "causal": "top_left", "bias": (1, 2, 9, 70)},
    "unattended_keys_window": {"batch": 1, "seqlen_k": 70, "window": (2, 3)},
    "rows_without_keys": {"batch": 1, "seqlen_q": 70, "seqlen_k": 7, "causal": True},
    "packed_used": {"lengths_q": (9, 0, 4), "lengths_k": (70, 5, 0), "used_k": (66, 0, 0), "spare": 3},
    "packed_used_none": {"lengths_q": (3, 4), "lengths_k": (70, 5), "used_k": (0, 0), "bias": (2, 1, 4, 70)},
    "packed_no_queries": {"lengths_q": (0, 0), "lengths_k": (3, 70), "spare": 3, "bias": (1, 2, 1, 70), **FEATURES},
    "packed_no_keys": {"lengths_q": (3, 4), "lengths_k": (0, 0), "spare": 2, **FEATURES},
    "packed_no_rows": {"lengths_q": (0,), "lengths_k": (7,), "bias": (2, 1, 7), **FEATURES},
    "packed_none": {"lengths_q": (), "spare": 4, **FEATURES}, "packed_none_no_heads": {"lengths_q": (), "spare": 4, "num_heads": 0},
    "packed_bias_beyond": {"lengths_q": (3, 9), "lengths_k": (70, 2), "bias": (2, 2, 9, 70)},
}.items()]


def view(x: Any) -> Any:
    return None if x is None else convert.view(x, "test", "x")


def emulated_forward(inputs: Inputs) -> tuple[Any, Any]:
    kwargs = dict(inputs.kwargs)
    arrays = {name: view(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    if inputs.packed:
        arrays |= {"cu_seqlens_q": view(inputs.args[3]), "cu_seqlens_k": view(inputs.args[4])}
    problem, o = make_problem("test", Operands(*map(view, inputs.args[:3]), **arrays), packed=inputs.packed, **kwargs)
    out, lse = np.full(problem.out_shape, np.nan, inputs.args[0].dtype), np.full(problem.lse_shape, np.nan, "float32")
    memory = Memory()
    call = Call(problem, o, view(out), view(lse))
    for x in (*(getattr(o, name) for name in o.__slots__), call.out, call.lse):
        memory.allow(x)
    if out.size:
        with emulated(memory) as machine:
            gpu.family("simt").prepare(call, make_spec(problem, o, True), machine.launcher())(call, 0)
    return out, lse


@pytest.mark.parametrize("case", EDGES, ids=[case.name for case in EDGES])
def test_emulated_kernels_write_every_element(case: Case) -> None:
    inputs = case.make()
    out, lse = emulated_forward(inputs)
    grads, _ = run(inputs)
    written = {"out": out, "lse": lse, **{name: x for name, x in grads._asdict().items() if x is not None}}
    assert not [name for name, x in written.items() if np.isnan(x).any()]
    if case.num_heads:
        judge = Judge(inputs)
        judge.forward(out, lse)
        judge.backward(grads)
    else:
        assert not any(x.any() for x in grads if x is not None)


def test_keys_past_the_used_ones_are_stored_as_zeros() -> None:
    """The Hopper backward: 0 times a factor would keep the NaN of a row of V that no row attends to."""
    stored: list[Any] = []
    names = {"make_pack": lambda *_: lambda acc: acc, "store_rows": lambda *values: stored.append(values),
             "scale_seen_rows": lambda acc, *factors: tuple(x * factor if factor else 0.0 for x, factor in zip(acc, factors, strict=True)),
             "inline": lambda f: f, "int32": int, "uint64": int, "float32": float, "thread_col": lambda lane: 2 * (lane & 3)}
    with replaced(("tile.gradients",), names):
        for packed in (True, False):
            store = gradients.make_store(Spec("float16", 128, 128, packed=packed), 128)
            store((2.0, float("nan")), 0, 256, 100, 0, 40, 48, 60)
    [(halves, _, _, rows0, rows1, _), dense] = stored
    assert halves == (2.0, 0.0) and (rows0, rows1) == (1, 1) and np.isnan(dense[0][1])


def test_no_launch_of_an_empty_grid() -> None:
    launched: list[Any] = []
    kernel = compile.Kernel.__new__(compile.Kernel)
    kernel._launch = lambda *values: launched.append(values) or (0,)     # type: ignore[func-returns-value]
    kernel.launch(0, [], 0)
    assert not launched


def test_empty_dbias_needs_no_sums() -> None:
    empty = np.empty((1, 2, 0, 5), np.float32)
    launcher = Listing(precompile.absent_device("sm_90a"))
    with mock.patch.object(launcher, "temporary") as temporary, dbias_sums(view(empty), launcher, 0) as sums:
        assert sums == (0, 0, 0, 0)
    assert not temporary.called and not launcher.sources


def test_tensor_cores_refuse_what_has_no_query() -> None:
    call, _ = precompile.Want("float16", 64, backward=True).call()
    q = replace(call.operands.q, shape=(4, 4096, 0, 64))
    nothing = replace(call, operands=replace(call.operands, q=q))
    assert gpu.family("sm80").refuses(call, precompile.absent_device("sm_80")) is None
    assert gpu.family("sm80").refuses(nothing, precompile.absent_device("sm_80")) == "there are no query rows"


# ---------------------------------------------------------------- on a device
DIMS = (64, 160)            # of one kernel for all gradients, and of one for each
ON_DEVICE = [replace(case, name=f"{case.name}_{dim}", dtype="bfloat16", head_dim=dim) for case in EDGES for dim in DIMS]


def results(inputs: Inputs, families: tuple[str, ...]) -> dict[str, Any]:
    """out, lse and the gradients of the families, written into poisoned memory."""
    (q, k, v, *lengths), kwargs = gpu_cases.device_arguments(inputs)
    with gpu.use(*families):
        gpu_poison.poison()
        out, lse = gpu_cases.function_of(inputs)(q, k, v, *lengths, **kwargs, return_lse=True)
        dlse = None if inputs.dlse is None else gpu_cases.on_device(inputs.dlse)
        dout, bias = gpu_cases.on_device(inputs.dout), inputs.kwargs.get("bias")
        function: Any = fastattn.attention_varlen_backward if inputs.packed else fastattn.attention_backward
        gpu_poison.poison()
        grads = function(dout, q, k, v, out, lse, *lengths, **kwargs, dlse=dlse, need_dbias=bias is not None)
    return {name: gpu_cases.to_host(x) for name, x in {"out": out, "lse": lse, **grads._asdict()}.items() if x is not None}


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("family", gpu_cases.families_here())
@pytest.mark.parametrize("case", ON_DEVICE, ids=[case.name for case in ON_DEVICE])
def test_every_element_is_written(case: Case, family: str) -> None:
    inputs = case.make()
    try:
        written = results(inputs, gpu_cases.wanted(family))
    except UnsupportedError as error:
        assert family in str(error) and family not in ("any", "simt")
        pytest.skip(str(error))
    assert not [name for name, x in written.items() if np.isnan(x.astype(np.float64)).any()]
    if case.used_k is not None:
        cu = inputs.args[4]
        for n, used in enumerate(case.used_k):
            for name in ("dk", "dv"):
                assert not written[name][cu[n] + used:cu[n + 1]].astype(np.float64).any()


@requires_gpu
@pytest.mark.gpu
def test_poison_is_what_the_next_call_gets() -> None:
    torch = gpu_cases.torch()
    for size in (300, 70_000, 5_000_000):
        gpu_poison.poison()         # again: what compares a size writes into memory that may be the next one's
        if torch is not None:
            assert bool((torch.empty(size, dtype=torch.uint8, device="cuda") == gpu_poison.BYTE).all())
        host = np.zeros(size, np.uint8)
        with streams.on_device(0), workspace.temporary(size, 0, streams.LEGACY) as memory:
            streams.check(streams.driver().cuMemcpyDtoH(host.ctypes.data, memory, size), "cuMemcpyDtoH")
        assert (host == gpu_poison.BYTE).all()
