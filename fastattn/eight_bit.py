"""What 8-bit operands add to a Problem: their dtypes, their scales, and the dtype of the output.

q, k and v stand for q * q_scale, k * k_scale and v * v_scale. Scales that are numbers are part of the Problem: those of q
and k of its softmax_scale, that of v and the output's of `factor`. Scales that are arrays are operands.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import words
from .arrays.dlpack import address
from .arrays.view import EIGHT_BIT, FLOATS, LARGEST, View
from .options import ONE_SCALE, Check, EightBitOptions

Array = np.ndarray[Any, Any]
OF_Q = "float8_e4m3fn"                                      # q is e4m3: its range is enough, and its mantissa has one bit more
OUT = ("bfloat16", "float16", "float32", OF_Q)              # dtypes of the output


@dataclass(frozen=True, slots=True)
class EightBit:
    """8-bit k and v, beside a q of 8 or more bits.

    The output is multiplied by `factor`, v_scale / out_scale of those that are numbers, and by those that are operands.
    """

    dtype_k: str
    dtype_v: str
    out_dtype: str
    factor: float = 1.0


# ---------------------------------------------------------------- checks
def check_dtypes(check: Check, q: View, k: View, v: View) -> None:
    """q, k and v have one dtype of FLOATS; or k and v are 8-bit floats, and q is float8_e4m3fn or of FLOATS."""
    if q.dtype in EIGHT_BIT:
        check.dtype("q", q, (OF_Q, *FLOATS), f"of 8-bit floats q takes {OF_Q}")
    else:
        check.dtype("q", q, FLOATS)
    eight = q.dtype in EIGHT_BIT or k.dtype in EIGHT_BIT or v.dtype in EIGHT_BIT
    for name, x in (("k", k), ("v", v)):
        if eight and x.dtype not in EIGHT_BIT:
            first, dtype = next((n, y.dtype) for n, y in (("q", q), ("k", k), ("v", v)) if y.dtype in EIGHT_BIT)
            raise check.type(name, f"has dtype {x.dtype}", f"{' or '.join(EIGHT_BIT)}, because {first} has dtype {dtype}",
                             f"quantize_fp8({name}) gives it, and its scale")
        if not eight and x.dtype != q.dtype:
            check.dtype(name, x, FLOATS)
            raise check.type(name, f"has dtype {x.dtype}", f"q's dtype, {q.dtype}", words.like(name, x.source, "q"))


def refuse_backward(check: Check, q: View, k: View, v: View) -> None:
    """TypeError where an operand of a backward is 8-bit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype in EIGHT_BIT:
            raise check.type(name, f"has dtype {x.dtype}", " or ".join(FLOATS), "8-bit operands have no backward")


def make_eight_bit(check: Check, q: View, k: View, v: View, given: EightBitOptions | None, names: tuple[str, str]) -> EightBit | None:
    """The EightBit of checked operands; None where k and v are not 8-bit, and then out_dtype is not looked at. `names` are those of k and
    v in the call."""
    e = given or EightBitOptions(())
    if k.dtype not in EIGHT_BIT:
        scales = [name for name in e.given if name != "out_dtype"]
        if scales:
            name = scales[0]
            raise check.value(name, f"is given, and {names[0]} has dtype {k.dtype}", f"{name} beside 8-bit {' and '.join(names)} only",
                              "quantize_fp8 makes 8-bit keys and values")
        return None
    if "q_scale" in e.given and q.dtype not in EIGHT_BIT:
        raise check.value("q_scale", f"is given, and q has dtype {q.dtype}", "None, because only 8-bit operands have scales")
    own = "bfloat16" if q.dtype in EIGHT_BIT else q.dtype
    name = e.out_dtype or own
    if name not in (*OUT, own):
        raise check.value("out_dtype", f"is {name}", " or ".join(dict.fromkeys((*OUT, own))))
    if "out_scale" in e.given and name not in EIGHT_BIT:
        raise check.value("out_scale", "is given", f"out_dtype={OF_Q!r} beside it", f"the output's dtype is {name}")
    factor = e.v_scale / e.out_scale
    most = float(np.finfo(np.float32).max)
    if not 1 / most < factor < most:
        raise check.value("v_scale", f"is {e.v_scale} with out_scale = {e.out_scale}", "v_scale / out_scale in float32's range")
    return EightBit(k.dtype, v.dtype, name, factor)


def read_scales(check: Check, scales: dict[str, View], batch: int, num_heads_k: int, entry: str) -> dict[str, Any]:
    """Scales, those of q, k and v broadcast to (batch, num_heads_k). In host memory they are private copies, whose values are checked.
    `entry`: the call's word for what a batch consists of."""
    ready = {}
    for name, x in scales.items():
        shapes = ((), (1,)) if name == "out_scale" else ((), (1,), (num_heads_k,), (batch, num_heads_k))
        if x.shape not in shapes:
            axes = "a number or (1,)" if name == "out_scale" else \
                f"a number, (1,), (num_heads_k,) = ({num_heads_k},) or (batch, num_heads_k) = {shapes[-1]}"
            raise check.value(name, f"has shape {x.shape}", axes, "query heads use their key head's q_scale" if name == "q_scale" else "")
        check.dtype(name, x, ("float32",))
        x = x.broadcast_to((1,) if name == "out_scale" else (batch, num_heads_k))
        ready[name] = _private(check, name, x, entry) if x.device[0] == "cpu" else x
    return ready


def _private(check: Check, argument: str, scale: View, entry: str) -> View:
    own = np.array(scale.numpy(), order="C")
    wrong = ~(np.isfinite(own) & (own > 0))
    if wrong.any():
        b, h = (int(i) for i in np.argwhere(wrong)[0])
        raise check.value(argument, f"has {own[b, h]} for {entry} {b}, head {h}", f"{ONE_SCALE} for each")
    return View(address(own), own.shape, own.strides, "float32", owner=(scale.source, own))


def saturated(x: Array, dtype: str) -> Array:
    """x, cut to the range of an 8-bit dtype; any other dtype's as it is. NaN stays."""
    return np.clip(x, -LARGEST[dtype], LARGEST[dtype]) if dtype in LARGEST else x
