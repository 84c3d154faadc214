"""The Problem of a call, made from the shapes of arrays alone: what is checked while JAX traces, and the shapes of results.

A traced array has no memory. Its View has a made-up address, which nothing reads: problem.py reads only lengths in host
memory, and those are passed as lengths in device memory are, unread, unless the caller gave numbers.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays.view import CPU, ITEMSIZE, Device, View, contiguous
from ..eight_bit import refuse_backward
from ..options import Check, Options
from ..problem import Operands, Problem, problem_of
from . import flex
from .record import Record

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
NUMBERS = ("seed", "offset")            # of the options those that may be arrays
TOKENS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")       # in the caller's layout
OPERANDS = ("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", *LENGTHS)
_ADDRESS = 1 << 20


def operands_of(record: Record, views: Mapping[str, View]) -> Operands:
    """The canonical Operands among the named Views of a call."""
    given: dict[str, Any] = {name: canonical(record, name, views[name]) for name in OPERANDS if name in views}
    return Operands(**given, flex=None if record.flex is None else flex.operands(record.flex, views))


def canonical(record: Record, name: str, view: View) -> View:
    """The View in the order (batch, seqlen, num_heads, dim)."""
    return view.bshd() if record.layout == "bhsd" and name in TOKENS else view


def problem(record: Record, options: Options, operands: Operands) -> tuple[Problem, Operands]:
    """problem_of, whose errors say in which order their shapes are. 8-bit operands are refused: a program may be differentiated."""
    refuse_backward(Check(record.call), operands.q, operands.k, operands.v)
    try:
        return problem_of(record.call, operands, options)
    except (TypeError, ValueError) as error:
        if record.layout == "bhsd":
            error.add_note("Shapes in this message are in the order (batch, seqlen, num_heads, head_dim).")
        raise


def traced_problem(record: Record, arrays: Mapping[str, Any], lengths: Mapping[str, View] | None = None) -> Problem:
    """The Problem of arrays that have a shape and a dtype; `lengths` are those whose numbers are known.

    ValueError or TypeError as the eager functions raise them.
    """
    device: Device = CPU if lengths else ("cuda", 0)

    def view(name: str, x: Any) -> View:
        dtype = str(x.dtype)
        return View(_ADDRESS, tuple(x.shape), contiguous(tuple(x.shape), ITEMSIZE.get(dtype, 1)), dtype, device, x)
    views = {name: view(name, x) for name, x in arrays.items() if name in OPERANDS or flex.is_operand(name)}
    return problem(record, record.options, operands_of(record, {**views, **(lengths or {})}))[0]
