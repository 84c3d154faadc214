"""Calls made without a GPU: arrays that are addresses only, and a backward whose kernels run in Python."""
from __future__ import annotations

from typing import Any

import numpy as np

from fastattn import Grads, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import View, contiguous
from fastattn.gpu.spec import BackwardCall, make_backward_spec
from fastattn.problem import Operands, Problem, make_problem
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import Inputs

Sequence = tuple[int, int, int, int, int]       # plane, q_start, seqlen_q, k_start, seqlen_k


def view(*shape: int, ptr: int = 1 << 20, dtype: str = "bfloat16") -> View:
    return View(ptr, shape, contiguous(shape, 4 if dtype == "int32" else 2), dtype, ("cuda", 0))


def whole(p: Problem) -> list[Sequence]:
    return [(batch, 0, p.seqlen_q, 0, p.seqlen_k) for batch in range(p.batch)]


def host_view(x: Any) -> Any:
    return None if x is None else convert.view(x, "test", "x")


def run(inputs: Inputs) -> tuple[Grads, list[str]]:
    """The gradients that the simt kernels write, and the kernels."""
    swap, kwargs = inputs.kwargs.get("layout") == "bhsd", {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    out, lse = inputs.forward("reference")

    def canonical(x: Any) -> Any:
        return host_view(x.swapaxes(1, 2) if swap else x)
    arrays = {name: host_view(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    q, k, v = (canonical(x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": host_view(inputs.args[3]), "cu_seqlens_k": host_view(inputs.args[4])}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    grads = Grads(*(None if x is None else np.full(x.shape, np.nan, x.dtype)
                    for x in (*inputs.args[:3], inputs.kwargs.get("bias"), inputs.kwargs.get("sinks"))))
    dbias = None if grads.dbias is None else host_view(grads.dbias.reshape((1,) * (4 - grads.dbias.ndim) + grads.dbias.shape))
    places = Grads(canonical(grads.dq), canonical(grads.dk), canonical(grads.dv), dbias, host_view(grads.dsinks))
    call = BackwardCall(problem, o, canonical(inputs.dout), canonical(out), host_view(lse), host_view(inputs.dlse), places, False)
    memory = Memory()
    for x in (*(getattr(o, name) for name in o.__slots__), call.dout, call.out, call.lse, call.dlse, *places):
        memory.allow(x)
    with emulated(memory) as machine:
        gpu.family("simt").backward(call, make_backward_spec(call), machine.launcher(), 0)
    return grads, machine.launched
