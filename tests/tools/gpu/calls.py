"""Calls made without a GPU: arrays that are addresses only, and a backward whose kernels run in Python."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastattn import Grads, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import ITEMSIZE, View, contiguous
from fastattn.gpu.config import GROUP
from fastattn.gpu.spec import BackwardCall, Call, make_backward_spec, make_spec
from fastattn.problem import Operands, Problem, make_problem
from tests.tools.gpu import interpreter
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import Inputs

Sequence = tuple[int, int, int, int, int]       # plane, q_start, seqlen_q, k_start, seqlen_k


def view(*shape: int, ptr: int = 1 << 20, dtype: str = "bfloat16") -> View:
    return View(ptr, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, ("cuda", 0))


def whole(p: Problem) -> list[Sequence]:
    return [(batch, 0, p.seqlen_q, 0, p.seqlen_k) for batch in range(p.batch)]


def host_view(x: Any) -> Any:
    return None if x is None else convert.view(x, "test", "x")


def with_bounds(call: Any, mask: np.ndarray[Any, Any], block: int, memory: Memory, by_keys: bool = False) -> Any:
    """The call with the bounds of its boolean mask's blocks in place of the mask, as rows/mask_words.py lays them out; without words.

    mask: (batch, num_heads, rows, keys), or with one head for all.
    """
    lines = mask.swapaxes(2, 3) if by_keys else mask
    batch, heads, count, columns = lines.shape
    groups, found = range(0, count, GROUP), np.zeros((batch, heads, -(-count // GROUP), 2), np.int32)
    for b, h, n in np.ndindex(found.shape[:3]):
        used = np.flatnonzero(np.add.reduceat(lines[b, h, groups[n]:groups[n] + GROUP].any(axis=0), np.arange(0, columns, block)))
        found[b, h, -1 - n] = (used[0], used[-1] + 1) if len(used) else (1 << 30, 0)        # the first group's are the last
    x = host_view(found)
    memory.allow(x)
    memory.kept.append(found)
    plane = found[0, 0].nbytes
    strides = (plane * heads, plane * (heads > 1), *((0, 16) if by_keys else (16, 0)))
    return replace(call, operands=replace(call.operands, mask=View(x.ptr + plane, call.operands.mask.shape, strides, "int32")))


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


def interpreted(inputs: Inputs, arch: str = "sm_90a", family: str = "sm90") -> tuple[Any, Any, list[str]]:
    """(out, lse, kernels) of a forward whose kernels are run from their PTX (interpreter.py)."""
    swap, kwargs = inputs.kwargs.get("layout") == "bhsd", {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    memory = interpreter.Memory()

    def placed(x: Any) -> Any:
        return None if x is None else memory.place(x, convert.view(x, "test", "x"))
    arrays = {name: placed(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    q, k, v = (placed(x.swapaxes(1, 2) if swap else x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": placed(inputs.args[3]), "cu_seqlens_k": placed(inputs.args[4])}
        kwargs |= {f"max_seqlen_{side}": int(np.diff(cu).max(initial=0)) for side, cu in (("q", inputs.args[3]), ("k", inputs.args[4]))}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in
                ((problem.out_shape, inputs.args[0].dtype), (problem.lse_shape, np.float32)))
    launcher = interpreter.Launcher(memory, arch)
    with gpu.use(family):
        gpu.family(family).prepare(Call(problem, o, out, lse), make_spec(problem, o, True), launcher)(Call(problem, o, out, lse), 0)
    result = memory.read(out, inputs.args[0].dtype)
    return result.swapaxes(1, 2) if swap else result, memory.read(lse, np.float32), launcher.launched
