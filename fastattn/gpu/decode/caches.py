"""Calls of attention_with_kvcache that the split-key kernel runs. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from dataclasses import replace

from ...arrays.view import View
from ..runtime.launcher import Launcher
from ..spec import Call, Launch, Spec, make_spec
from . import shared
from .config import MOST_DIM, SLICE
from .launch import KeyCache, prepare


def slices_of(head_dim: int, head_dim_v: int) -> list[tuple[int, int]]:
    """(first column, columns) of each slice of the values."""
    width = SLICE if head_dim > MOST_DIM else MOST_DIM
    return [(first, min(width, head_dim_v - first)) for first in range(0, head_dim_v, width)]


def _sliced(call: Call, first: int, columns: int) -> Call:
    """The call of some columns of the values and of the output."""
    def part(x: View) -> View:
        return View(x.ptr + first * x.strides[-1], (*x.shape[:-1], columns), x.strides, x.dtype, x.device)
    return Call(replace(call.problem, head_dim_v=columns), replace(call.operands, v=part(call.operands.v)), part(call.out), call.lse)


def prepare_caches(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """`prepare` for a call of attention_with_kvcache."""
    def table(call: Call) -> View:
        assert call.operands.cache is not None
        return call.operands.cache.block_table
    p = call.problem
    assert p.cache is not None
    contiguous = table(call).device != call.operands.k.device       # the host made its table: request b has row b
    cache, slices = KeyCache(p.cache.append, None if contiguous else table, p.cache.num_splits), slices_of(p.head_dim, p.head_dim_v)
    if keys := shared.keys_of(call):
        return shared.prepare(call, spec, launcher, cache, keys)
    if len(slices) == 1:
        return prepare(call, spec, launcher, cache)
    each = list[tuple[int, int, Launch]]()
    for first, columns in slices:
        part = _sliced(call, first, columns)
        each.append((first, columns, prepare(part, make_spec(part.problem, part.operands, spec.lse), launcher, cache)))

    def launch(call: Call, stream: int) -> None:
        for first, columns, one in each:
            one(_sliced(call, first, columns), stream)
    return launch
