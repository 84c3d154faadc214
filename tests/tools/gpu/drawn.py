"""Calls of the fuzzer's problems (tests/fuzz), without a device: their arrays are host memory."""
from __future__ import annotations

from typing import Any

import numpy as np

from fastattn import Grads, gpu
from fastattn.dispatch import PLAIN, read
from fastattn.flex.operands import FlexOperands, functions_of
from fastattn.gpu.spec import AnyCall, BackwardCall, Call, make_backward_spec
from fastattn.problem import Operands, make_problem
from tests.fuzz import formula, functions
from tests.fuzz.inputs import Arguments, Inputs, arguments, swapped
from tests.tools.gpu import interpreter_tiles
from tests.tools.gpu.calls import host_view, operands_of
from tests.tools.problems import NUMPY


def _flex(x: Inputs, there: Arguments) -> FlexOperands | None:
    """The functions of a problem."""
    given = dict.fromkeys(("score_mod", "mask_mod", "captured", "block_mask")) | functions.given(x.spec, there.arrays)
    flex = functions_of(given["score_mod"], given["mask_mod"], given["captured"] or (), given["block_mask"])
    lengths = (*there.lengths, None, None) if x.spec.packed else None
    q, k, v = (there.arrays[name] for name in ("q", "k", "v"))
    layout = "thd" if x.spec.packed else x.spec.layout
    return None if flex is None else read("attention", layout, None, (q, k, v), PLAIN, lengths, None, flex)[1].flex


def calls(x: Inputs) -> list[AnyCall]:
    """The forward of a problem, and its backward if it has one."""
    s, there = x.spec, arguments(x)
    options = {name: y for name, y in there.options.items() if name not in ("layout", "dlse")}

    def canonical(array: Any) -> Any:
        return host_view(swapped(s, array))
    arrays = operands_of(options, host_view)
    if s.packed:
        arrays |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), map(host_view, there.lengths), strict=True))
    q, k, v, dout = (canonical(there.arrays[name]) for name in ("q", "k", "v", "dout"))
    problem, o = make_problem("test", Operands(q, k, v, **arrays, flex=_flex(x, there)), packed=s.packed, **options)
    out, lse = host_view(np.empty((*x.q.shape[:-1], s.head_dim_v), NUMPY[s.result])), host_view(np.empty(x.lse_shape, np.float32))
    found: list[AnyCall] = [Call(problem, o, out, lse if s.return_lse else None)]
    if s.backward:
        dbias = np.empty((1,) * (4 - x.bias.ndim) + x.bias.shape, x.bias.dtype) if x.bias is not None and s.need_dbias else None
        arrays_of_score = () if o.flex is None else o.flex.score_arrays
        captured: Any = tuple([host_view(np.empty(y.shape, NUMPY[y.dtype])) if y.dtype in NUMPY else None for y in arrays_of_score])
        captured = captured if s.need_dcaptured else None
        grads = Grads(*(host_view(np.empty(y.shape, NUMPY[s.result])) for y in (x.q, x.k, x.v)), host_view(dbias),
                      None if x.sinks is None else host_view(np.empty_like(x.sinks)), captured)
        dlse = None if x.dlse is None else host_view(x.dlse)
        found.append(BackwardCall(problem, o, dout, out, lse, dlse, grads, s.deterministic))
    return found


@np.errstate(all="ignore")
def interpreted_backward(x: Inputs, family: str) -> tuple[dict[str, Any], Any, Any, list[str]]:
    """(gradients, the out and lse that they are of, kernels) of a dense problem whose kernels are run from their PTX. No functions."""
    host, right, memory = calls(x)[1], formula.forward(x), interpreter_tiles.Memory()
    assert isinstance(host, BackwardCall)
    for view, exact in ((host.out, right["out"].exact), (host.lse, right["lse"].exact)):
        view.numpy()[...] = exact
    call, launcher = host.at([None if y is None else memory.place(y.numpy(), y) for y in host.views]), interpreter_tiles.Launcher(memory)
    gpu.family(family).backward(call, make_backward_spec(call), launcher, 0)
    found = {name: memory.read(y, NUMPY[y.dtype]) for name, y in zip(call.grads._fields, call.grads, strict=True) if y is not None}
    return found, host.out.numpy(), host.lse.numpy(), [key.split()[0] for key in launcher.launched]
