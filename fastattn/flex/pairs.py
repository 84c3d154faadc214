"""The functions of a call on all pairs of a sequence, in NumPy: what they mean."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.view import View
from .derivative import derivative
from .evaluate import Array, cut, evaluate, every_line, places
from .operands import FlexOperands


def seen(o: FlexOperands, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> Array:
    """(num_heads, seqlen_q, seqlen_k) bool, broadcast: True where mask_mod and the blocks let a row attend a key."""
    found = np.ones((1, 1, 1), bool)
    if o.flex.mask_mod is not None:
        arrays = [x.numpy() for x in o.mask_arrays]
        found = found & evaluate(o.flex.mask_mod, places(batch, num_heads, seqlen_q, seqlen_k), arrays, o.mask_numbers)[0]
    if o.blocks is not None and o.flex.block is not None:
        rows, keys = (np.arange(n) // size for n, size in zip((seqlen_q, seqlen_k), o.flex.block, strict=True))
        found = found & o.blocks.numpy()[batch][:, rows[:, None], keys]
    return found


def modified(o: FlexOperands, batch: int, score: Array) -> Array:
    """score_mod of scores (num_heads, seqlen_q, seqlen_k), in their dtype."""
    assert o.flex.score_mod is not None
    inputs = places(batch, *score.shape) | {"score": score}
    result = evaluate(o.flex.score_mod, inputs, [x.numpy() for x in o.score_arrays], o.score_numbers, score.dtype)[0]
    return np.broadcast_to(result, score.shape)


def gradients(o: FlexOperands, batch: int, score: Array, dS: Array,
              wanted: tuple[View | None, ...] | None) -> tuple[Array, list[tuple[int, Array]]]:
    """(dS of the scores before score_mod, [(number of an array, its gradient in this sequence)]).

    A pair whose dS is 0 passes nothing on, whatever the derivative is there.
    """
    assert o.flex.score_mod is not None
    asked = [] if wanted is None else [n for n, x in enumerate(wanted) if x is not None]
    d = derivative(o.flex.score_mod, asked)
    arrays, real = [x.numpy() for x in o.score_arrays], score.dtype
    lines = every_line(d.program, places(batch, *score.shape) | {"score": score}, arrays, o.score_numbers, real)

    def times(slope: Array) -> Array:
        return np.where(dS == 0, 0, dS * slope).astype(real)
    found: list[tuple[int, Array]] = []
    for n, out in zip(d.loads, d.program.outputs[2:], strict=True):
        load, part = d.program.lines[n], times(lines[out])
        total: Any = np.zeros(arrays[load.value].shape, real)
        at = [np.broadcast_to(cut(lines[m], size), score.shape) for m, size in zip(load.args, total.shape, strict=True)]
        if at:
            np.add.at(total, tuple(at), part)
        else:
            total = total + part.sum()
        found.append((load.value, total))
    return times(lines[d.program.outputs[1]]), found
