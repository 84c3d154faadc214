"""The operations of a program: what each takes, what it gives, and what it is in NumPy.

Integers are 32 bits and wrap. What NumPy leaves to the machine is defined here, the same for every engine:

- x // 0 and x % 0 of integers are 0; -2**31 // -1 is -2**31. The sign of % is the divisor's, as in Python.
- A shift by a number outside of 0 to 31 gives 0, and shr of a negative number -1.
- "int" of a float cuts the fraction off and stays within 32 bits; NaN gives 0.
- min and max give NaN where an operand is NaN, or the other operand: engines may differ there.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

FLOAT, INT, BOOL = "f", "i", "b"
LOW, HIGH = -(2**31), 2**31 - 1
Array = Any                             # an ndarray or a NumPy scalar


class Op(NamedTuple):
    """`of`: "number" takes integers or floats, "real" makes floats of what it takes, "logic" refuses floats,
    "whole" also takes booleans as integers, "any" takes all. Operands are brought to one kind first, as NumPy would.
    """

    function: Callable[..., Array]
    of: Literal["number", "real", "logic", "whole", "any"] = "number"
    compares: bool = False              # gives a boolean


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(np.asarray(x).dtype)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, x.dtype.type(1)) / (1 + small)


def _floordiv(x: Array, y: Array) -> Array:
    """In 64 bits, so that -2**31 // -1 wraps instead of trapping."""
    return np.where(y == 0, 0, np.floor_divide(x.astype(np.int64), np.where(y == 0, 1, y))).astype(np.int32)


def _mod(x: Array, y: Array) -> Array:
    return np.where(y == 0, 0, np.mod(x.astype(np.int64), np.where(y == 0, 1, y))).astype(np.int32)


def _shl(x: Array, y: Array) -> Array:
    inside = (y >= 0) & (y < 32)
    return np.where(inside, np.left_shift(x, np.where(inside, y, 0)), 0).astype(np.int32)


def _shr(x: Array, y: Array) -> Array:
    return np.right_shift(x, np.where((y >= 0) & (y < 32), y, 31)).astype(np.int32)


OPS: dict[str, Op] = {
    "add": Op(np.add), "sub": Op(np.subtract), "mul": Op(np.multiply), "div": Op(np.divide, "real"),
    "floordiv": Op(_floordiv, "whole"), "mod": Op(_mod, "whole"),
    "neg": Op(np.negative), "abs": Op(np.abs), "min": Op(np.minimum), "max": Op(np.maximum),
    "exp": Op(np.exp, "real"), "exp2": Op(np.exp2, "real"), "log": Op(np.log, "real"), "log2": Op(np.log2, "real"),
    "tanh": Op(np.tanh, "real"), "sigmoid": Op(_sigmoid, "real"), "erf": Op(_erf, "real"), "sqrt": Op(np.sqrt, "real"),
    "sin": Op(np.sin, "real"), "cos": Op(np.cos, "real"), "floor": Op(np.floor, "real"), "round": Op(np.rint, "real"),
    "reciprocal": Op(np.reciprocal, "real"),
    "lt": Op(np.less, "any", True), "le": Op(np.less_equal, "any", True), "eq": Op(np.equal, "any", True),
    "ne": Op(np.not_equal, "any", True),
    "and": Op(np.bitwise_and, "logic"), "or": Op(np.bitwise_or, "logic"), "xor": Op(np.bitwise_xor, "logic"),
    "not": Op(np.invert, "logic"), "shl": Op(_shl, "whole"), "shr": Op(_shr, "whole"),
    "where": Op(np.where, "any"),
}
COMMUTES = ("add", "mul", "min", "max", "and", "or", "xor", "eq", "ne")


def kind_of(dtype: str) -> str:
    """The kind of an element that is loaded from an array of this dtype."""
    return BOOL if dtype == "bool" else INT if dtype in ("int32", "int64") else FLOAT


def numpy_type(kind: str, real: Any) -> np.dtype[Any]:
    return np.dtype(real if kind == FLOAT else np.int32 if kind == INT else np.bool_)


def whole(x: Array) -> Array:
    """"int" of floats."""
    return np.nan_to_num(np.trunc(x), nan=0.0, posinf=HIGH, neginf=LOW).clip(LOW, HIGH).astype(np.int64).astype(np.int32)


def wrapped(x: int) -> int:
    """A Python integer in 32 bits."""
    return (x - LOW) % 2**32 + LOW
