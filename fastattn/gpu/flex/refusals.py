"""Which calls with a score_mod or a mask_mod a kernel family does not run. Plain threads run all."""
from __future__ import annotations

from ..spec import AnyCall, BackwardCall
from ..traced import mask_of
from .derived import rate_of

MOST_DIM, MOST_DIM_BACKWARD = 256, 128      # of Hopper: larger heads share rows between warpgroups, and have a kernel for each gradient


def refuses_traced(family: str, call: AnyCall) -> str | None:
    """None, or why the family does not run the functions of the call."""
    o, p = call.operands.flex, call.problem
    if o is None:
        return None
    if p.eight_bit is not None:
        return "8-bit operands have no functions; 16-bit ones have"
    if family == "simt":
        return None
    if p.dtype == "float32":
        return "functions of float32 calls run on plain threads"
    for name, x in o.views.items():
        if x.dtype == "float64":
            return f"{name} is float64, which tensor-core kernels do not read; float32 works"
    return _REFUSALS[family](call)


def _refuses_sm90(call: AnyCall) -> str | None:
    p = call.problem
    dim = max(p.head_dim, p.head_dim_v)
    if isinstance(call, BackwardCall):
        if dim > MOST_DIM_BACKWARD:
            return f"head_dim is {dim}, over {MOST_DIM_BACKWARD} with functions"
        if call.deterministic:
            return "its kernel of dq alone has no functions"
        if p.packed and call.operands.flex is not None and mask_of(call.operands.flex) is not None:
            return "its tiles of packed sequences do not skip blocks of queries"
        return _refuses_softcap(call)
    return f"head_dim is {dim}, over {MOST_DIM} with functions" if dim > MOST_DIM else None


def _refuses_sm80(call: AnyCall) -> str | None:
    return _refuses_softcap(call) if isinstance(call, BackwardCall) else None


def _refuses_softcap(call: BackwardCall) -> str | None:
    flex = call.problem.flex
    if flex is not None and flex.score_mod is not None and rate_of(flex.score_mod) != 1.0 and call.problem.score.softcap is not None:
        return "a softcap beside a score_mod has no registers; the function may have it: cap * tanh(score / cap)"
    return None


_REFUSALS = {"sm90": _refuses_sm90, "sm80": _refuses_sm80}
