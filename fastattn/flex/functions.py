"""The functions of NumPy and torch, and the methods of their arrays, that a traced function may call: by name, on numbers.

Both libraries have most of them under one name. A TraceBuilder has the table, where values find them.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays import words
from .ops import BOOL, FLOAT, INT
from .refusal import RefusalError
from .values import TraceBuilder, Value, apply, line

MOST_POWER = 64                         # multiplications in place of a power, at most twice its logarithm


def _value(b: TraceBuilder, x: Any) -> Value:
    return Value(b, line(b, x))


def _plain(op: str, count: int) -> Callable[..., Value]:
    if count == 1:
        return lambda b, x: apply(op, _value(b, x))
    return lambda b, x, y: apply(op, _value(b, x), _value(b, y))


def _swapped(op: str) -> Callable[..., Value]:
    return lambda b, x, y: apply(op, _value(b, y), _value(b, x))


def _logical(op: str) -> Callable[..., Value]:
    def apply_logical(b: TraceBuilder, x: Any, y: Any) -> Value:
        return apply(op, _cast(b, x, BOOL), _cast(b, y, BOOL))
    return apply_logical


def _where(b: TraceBuilder, condition: Any, *xy: Any, **named: Any) -> Value:
    """numpy.where(c, x, y), torch's with input= and other=, and the method x.where(c, y)."""
    x, y = xy if len(xy) == 2 else (named.get("input", named.get("x")), named.get("other", named.get("y")))
    if isinstance(condition, Value) and condition.kind != BOOL and isinstance(x, Value) and x.kind == BOOL:
        condition, x = x, condition
    return apply("where", _value(b, condition), _value(b, x), _value(b, y))


def _cast(b: TraceBuilder, x: Any, kind: str) -> Value:
    return Value(b, b.to(line(b, x), kind))


def _to(b: TraceBuilder, x: Any, *args: Any, dtype: Any = None, **other: Any) -> Value:
    """x.to(dtype), x.astype(dtype), x.type(dtype): int, float and bool of any width. Where something else is asked for, as a device, x."""
    for arg in (dtype, *args):
        if isinstance(arg, Value):
            return _cast(b, x, arg.kind)
        name = "" if arg is None or isinstance(arg, bool) else words.dtype_of(arg)
        for prefix, kind in (("bool", BOOL), ("int", INT), ("uint", INT), ("long", INT), ("float", FLOAT), ("bfloat", FLOAT),
                             ("double", FLOAT), ("half", FLOAT)):
            if name.startswith(prefix):
                return _cast(b, x, kind)
    return _value(b, x)


def _clip(b: TraceBuilder, x: Any, *limits: Any, **named: Any) -> Value:
    low = next((named[n] for n in ("min", "a_min") if n in named), limits[0] if limits else None)
    high = next((named[n] for n in ("max", "a_max") if n in named), limits[1] if len(limits) > 1 else None)
    found = _value(b, x)
    if low is not None:
        found = apply("max", found, _value(b, low))
    return found if high is None else apply("min", found, _value(b, high))


def _power(b: TraceBuilder, x: Any, y: Any) -> Value:
    """A whole constant exponent by multiplications, 1/2 by sqrt; else exp2(y * log2(x)), for x >= 0."""
    x, exponent = _value(b, x), _value(b, y)
    constant = b.lines[exponent.n].value if b.lines[exponent.n].op == "const" else None
    if constant in (0.5, -0.5):
        root = apply("sqrt", x)
        return root if constant > 0 else apply("div", 1.0, root)
    if constant is not None and float(constant).is_integer() and abs(constant) <= MOST_POWER:
        if exponent.kind == FLOAT:
            x = _cast(b, x, FLOAT)
        elif constant < 0 and x.kind != FLOAT:
            raise RefusalError("has an integer to a negative power", "a float base works, as 2.0**-x")
        found = _whole_power(b, x, abs(int(constant)))
        return found if constant >= 0 else apply("div", 1.0, found)
    result = apply("exp2", apply("mul", exponent, apply("log2", x)))
    if x.kind != FLOAT and exponent.kind != FLOAT:
        return _cast(b, apply("round", result), INT)
    return apply("where", apply("eq", exponent, 0), 1.0, result) if constant is None else result


def _whole_power(b: TraceBuilder, x: Value, n: int) -> Value:
    found = None
    while n:
        if n & 1:
            found = x if found is None else apply("mul", found, x)
        n >>= 1
        if n:
            x = apply("mul", x, x)
    return Value(b, b.const(1, x.kind if x.kind != BOOL else INT)) if found is None else found


def _sign(b: TraceBuilder, x: Any) -> Value:
    x = _value(b, x)
    one = 1.0 if x.kind == FLOAT else 1
    return apply("where", apply("lt", 0, x), one, apply("where", apply("lt", x, 0), -one, 0 * one))


def _trunc(b: TraceBuilder, x: Any) -> Value:
    x = _value(b, x)
    return apply("where", apply("lt", x, 0), -apply("floor", -x), apply("floor", x))


def _float_mod(b: TraceBuilder, x: Any, y: Any) -> Value:
    """The remainder with the sign of x: numpy.fmod, torch.fmod."""
    x, y = _value(b, x), _value(b, y)
    return apply("sub", x, apply("mul", _trunc(b, apply("div", x, y)), y))


def _divide(b: TraceBuilder, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    found = apply("floordiv" if rounding_mode == "floor" else "div", _value(b, x), _value(b, y))
    return _trunc(b, found) if rounding_mode == "trunc" else found


def _log1p(b: TraceBuilder, x: Any) -> Value:
    return apply("log", apply("add", 1.0, _value(b, x)))


def _softplus(b: TraceBuilder, x: Any) -> Value:
    """max(x, 0) + log(1 + exp(-|x|)): for any x without overflow."""
    x = _value(b, x)
    return apply("add", apply("max", x, 0.0), _log1p(b, apply("exp", -apply("abs", x))))


def _full(value: Any) -> Callable[..., Value]:
    """x.new_ones(shape), torch.zeros_like(x): a constant of the kind asked for, or of x's."""
    def full(b: TraceBuilder, x: Any, *args: Any, dtype: Any = None, **other: Any) -> Value:
        found = _value(b, args[-1] if value is None else value)
        return _to(b, found, x if dtype is None and isinstance(x, Value) else dtype)
    return full


def _same(b: TraceBuilder, x: Any, *args: Any, **named: Any) -> Value:
    return _value(b, x)


def _is_nan(b: TraceBuilder, x: Any) -> Value:
    return apply("ne", _value(b, x), _value(b, x))


def _is_inf(b: TraceBuilder, x: Any) -> Value:
    return apply("eq", apply("abs", _value(b, x)), float("inf"))


_UNARY = {"exp": "exp", "exp2": "exp2", "log": "log", "log2": "log2", "sqrt": "sqrt", "sin": "sin", "cos": "cos", "tanh": "tanh",
          "sigmoid": "sigmoid", "expit": "sigmoid", "erf": "erf", "floor": "floor", "round": "round", "rint": "round", "abs": "abs",
          "absolute": "abs", "fabs": "abs", "neg": "neg", "negative": "neg", "invert": "not", "bitwise_not": "not"}
_BINARY = {"add": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul", "floor_divide": "floordiv",
           "floordiv": "floordiv", "remainder": "mod", "mod": "mod", "minimum": "min", "fmin": "min", "maximum": "max", "fmax": "max",
           "less": "lt", "lt": "lt", "less_equal": "le", "le": "le", "equal": "eq", "eq": "eq", "not_equal": "ne", "ne": "ne",
           "bitwise_and": "and", "and": "and", "bitwise_or": "or", "or": "or", "bitwise_xor": "xor", "xor": "xor",
           "left_shift": "shl", "lshift": "shl", "bitwise_left_shift": "shl", "right_shift": "shr", "rshift": "shr",
           "bitwise_right_shift": "shr", "min": "min", "max": "max"}
_REVERSED = {"radd": "add", "rsub": "sub", "rmul": "mul", "rtruediv": "div", "rdiv": "div", "rfloordiv": "floordiv", "rmod": "mod",
             "greater": "lt", "gt": "lt", "greater_equal": "le", "ge": "le", "rand": "and", "ror": "or", "rxor": "xor",
             "rlshift": "shl", "rrshift": "shr"}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _plain(op, 1) for name, op in _UNARY.items()},
    **{name: _plain(op, 2) for name, op in _BINARY.items()},
    **{name: _swapped(op) for name, op in _REVERSED.items()},
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    "where": _where, "power": _power, "pow": _power, "float_power": _power,
    "rpow": lambda b, x, y: _power(b, y, x),
    "logical_and": _logical("and"), "logical_or": _logical("or"), "logical_xor": _logical("xor"),
    "logical_not": lambda b, x: apply("not", _cast(b, x, BOOL)),
    "clip": _clip, "clamp": _clip, "clamp_min": lambda b, x, min: _clip(b, x, min), "clamp_max": lambda b, x, max: _clip(b, x, None, max),
    "sign": _sign, "sgn": _sign, "ceil": lambda b, x: -apply("floor", -_value(b, x)), "trunc": _trunc, "fix": _trunc, "fmod": _float_mod,
    "square": lambda b, x: _whole_power(b, _value(b, x), 2), "reciprocal": lambda b, x: apply("div", 1.0, _value(b, x)),
    "rsqrt": lambda b, x: apply("div", 1.0, apply("sqrt", _value(b, x))), "log1p": _log1p, "softplus": _softplus,
    "expm1": lambda b, x: apply("sub", apply("exp", _value(b, x)), 1.0),
    "log10": lambda b, x: apply("mul", apply("log2", _value(b, x)), 0.30102999566398120),
    "logaddexp": lambda b, x, y: apply("add", _value(b, y), _softplus(b, apply("sub", _value(b, x), _value(b, y)))),
    "relu": lambda b, x, inplace=False: apply("max", _value(b, x), 0.0),
    "silu": lambda b, x, inplace=False: apply("mul", _value(b, x), apply("sigmoid", _value(b, x))),
    "tan": lambda b, x: apply("div", apply("sin", _value(b, x)), apply("cos", _value(b, x))),
    "isnan": _is_nan, "isinf": _is_inf, "to": _to, "astype": _to, "type": _to, "type_as": _to,
    **{name: (lambda b, x, *args, kind=kind, **named: _cast(b, x, kind)) for name, kind in
       (("float", FLOAT), ("double", FLOAT), ("half", FLOAT), ("bfloat16", FLOAT), ("int", INT), ("long", INT), ("bool", BOOL))},
    "new_ones": _full(1), "new_zeros": _full(0), "new_full": _full(None), "new_tensor": _full(None),
    "ones_like": _full(1), "zeros_like": _full(0), "full_like": _full(None),
    **dict.fromkeys(("clone", "detach", "contiguous", "copy", "squeeze", "view_as", "expand_as", "asarray", "array", "positive"), _same),
}
