"""A program in NumPy: what its lines mean. The reference engine runs it, and tests hold every other engine to it."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .ops import FLOAT, OPS, numpy_type, whole
from .program import Program

Array = np.ndarray[Any, Any]


def cut(index: Any, length: int) -> Any:
    """An index of a captured array: below 0 it is 0, past the end the last one."""
    return np.minimum(np.maximum(index, 0), length - 1)


@np.errstate(all="ignore")
def every_line(p: Program, inputs: Mapping[str, Any], arrays: Sequence[Array] = (), numbers: Sequence[float] = (),
               real: Any = np.float64) -> list[Array]:
    """The values of all lines. Inputs broadcast against each other; floats are `real`, integers int32."""
    found: list[Array] = []
    for x in p.lines:
        args = [found[n] for n in x.args]
        if x.op == "const":
            value: Any = x.value
        elif x.op == "input":
            value = inputs[x.value]
        elif x.op == "number":
            value = numbers[x.value]
        elif x.op == "length":
            value = arrays[x.value[0]].shape[x.value[1]]
        elif x.op == "load":
            a = arrays[x.value]
            value = a[tuple([cut(i, n) for i, n in zip(args, a.shape, strict=True)])]
        elif x.op in ("float", "int"):
            value = whole(args[0]) if x.op == "int" and p.lines[x.args[0]].kind == FLOAT else args[0]
        else:
            value = OPS[x.op].function(*args)
        found.append(np.asarray(value).astype(numpy_type(x.kind, real), copy=False))
    return found


def evaluate(p: Program, inputs: Mapping[str, Any], arrays: Sequence[Array] = (), numbers: Sequence[float] = (),
             real: Any = np.float64) -> list[Array]:
    """The outputs; see `every_line`."""
    lines = every_line(p, inputs, arrays, numbers, real)
    return [lines[n] for n in p.outputs]


def places(batch: Any, num_heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Array]:
    """The inputs but for the score, for all pairs of a sequence: axes (num_heads, seqlen_q, seqlen_k)."""
    head, q, k = (np.arange(n, dtype=np.int32) for n in (num_heads, seqlen_q, seqlen_k))
    return {"batch": np.asarray(batch, np.int32), "head": head[:, None, None], "q": q[:, None], "k": k}


