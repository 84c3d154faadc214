"""8-bit operands of the CPU engine: which kernels read them, and 8-bit output, which is rounded behind them.

A tile of 8-bit K or V is converted when it is packed, which is exact. The kernels multiply the scales: those of q and k into the scores,
that of v into the rows of the output (forward.pxi).
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..arrays.dlpack import address
from ..arrays.view import EIGHT_BIT, View, numpy_dtype
from ..eight_bit import saturated
from ..problem import Problem


def for_kernels(problem: Problem, out: View) -> tuple[Problem, View]:
    """The problem with the dtype of its kernels, and the memory that they write: `out`, or a copy of more bits if out has 8."""
    wide = {problem.dtype, problem.out_dtype}.difference(EIGHT_BIT)
    dtype = wide.pop() if len(wide) == 1 else problem.compute_dtype         # 16 bits only where neither q nor out has more
    if problem.out_dtype in EIGHT_BIT:
        memory = np.empty(problem.out_shape, numpy_dtype(problem.compute_dtype))
        out = View(address(memory), memory.shape, memory.strides, problem.compute_dtype, owner=memory)
    return replace(problem, dtype=dtype), out


@np.errstate(all="ignore")
def store(wide: View, out: View) -> None:
    """Write 8-bit output: saturated, and rounded once."""
    out.numpy()[...] = saturated(wide.numpy(), out.dtype)
