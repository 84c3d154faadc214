"""What stands for the operations of traced functions (fastattn/gpu/flex/ops.py, ptx/traced.py) in the emulator: Python's numbers."""
from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn.arrays.view import ITEMSIZE
from fastattn.flex.ops import OPS, wrapped

_INTEGERS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "bool": ctypes.c_uint8}


def _quiet(function: Callable[..., Any]) -> Callable[..., float]:
    """A function of NumPy on Python's floats, without warnings."""
    def call(*x: Any) -> float:
        with np.errstate(all="ignore"):
            return float(function(*(np.float64(v) for v in x)))
    return call


def _wrapping(function: Callable[..., int]) -> Callable[..., int]:
    """A function of Python's integers, in 32 bits."""
    return lambda *x: wrapped(function(*map(int, x)))


def _exact(name: str) -> Callable[..., Any]:
    """An operation of integers as the reference has it."""
    return lambda *x: int(OPS[name].function(*(np.int32(v) for v in x)))


FUNCTIONS = {name: _quiet(getattr(np, name)) for name in ("log", "log2", "exp2", "sqrt", "tanh", "sin", "cos")}
INTEGERS: dict[str, Callable[..., int]] = {
    **{name: _wrapping(f) for name, f in {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs, "and": operator.and_,
        "or": operator.or_, "xor": operator.xor, "not": operator.invert, "min": min, "max": max, "floordiv_natural": operator.floordiv,
        "mod_natural": operator.mod}.items()},
    **{name: _exact(name) for name in ("shl", "shr", "floordiv", "mod")}}


def element_of(pointer: int, by: int, index: int, count: int) -> int:
    assert count > 0
    return pointer + by * min(max(int(index), 0), count - 1)


def element_of_natural(pointer: int, by: int, index: int, count: int) -> int:
    assert index >= 0, "an index that is said to be never negative"
    return element_of(pointer, by, index, count)


def reciprocal(x: float) -> float:
    """As the instruction: a result below float32's normal numbers is 0."""
    return np.reciprocal(x) if abs(x) <= 2.0**126 else np.copysign(0.0, x)


def names(memory: Any) -> dict[str, Any]:
    """memory: the emulator's Memory, which checks every access."""
    def load_captured(dtype: str, compute: str) -> Any:
        from tests.tools.gpu.emulator import _C, decode

        kind, size = {**_C, **_INTEGERS}[dtype], ITEMSIZE[dtype]

        def load(address: int) -> Any:
            memory.check(address, size)
            value = kind.from_address(address).value
            return wrapped(value) if dtype in _INTEGERS else decode(value, dtype)
        return load

    def add_to(compute: str) -> Any:
        kind = {"float32": ctypes.c_float, "float64": ctypes.c_double}[compute]

        def add(address: int, value: float) -> None:
            memory.check(address, ITEMSIZE[compute])
            kind.from_address(int(address)).value += value
        return add

    def or_b32(address: int, bits: int) -> None:
        memory.check(address, 4)
        ctypes.c_uint32.from_address(address).value |= bits & 0xFFFFFFFF

    def add_to_b64(address: int, value: int) -> None:
        memory.check(address, 8)
        ctypes.c_int64.from_address(int(address)).value += value

    def load_b64(address: int) -> int:
        memory.check(address, 8)
        return ctypes.c_int64.from_address(int(address)).value

    def raise_b32(address: int, value: int) -> None:
        memory.check(address, 4)
        word = ctypes.c_int32.from_address(int(address))
        word.value = max(word.value, value)

    def whole(x: float) -> int:
        return 0 if x != x else int(min(max(x, -2.0**31), 2.0**31 - 1))
    return {"select": lambda c, x, y: x if c else y, "divided": _quiet(np.divide), "inverted": lambda x: not x, "flag": int,
            "below": lambda x, y: int(x) & 0xFFFFFFFF < int(y) & 0xFFFFFFFF,
            "as_bool": bool,
            "element_of": element_of, "element_of_natural": element_of_natural, "INTEGERS": INTEGERS, "load_captured": load_captured,
            "add_to": add_to, "rounded": lambda mode, compute: {"rmi": np.floor, "rni": np.rint}[mode], "whole_f32": whole,
            "whole_f64": whole, "exp2": FUNCTIONS["exp2"], "log2": FUNCTIONS["log2"], "reciprocal": _quiet(reciprocal),
            "quotient": _quiet(np.divide),
            "near_sine": FUNCTIONS["sin"], "near_cosine": FUNCTIONS["cos"], "rounded_turns": np.rint, "whole_near": np.rint,
            "fma": lambda x, y, z: x * y + z,
            "smallest": _quiet(np.minimum), "largest": _quiet(np.maximum), "absolute": abs, "root": FUNCTIONS["sqrt"],
            "_floordiv": INTEGERS["floordiv"], "_mod": INTEGERS["mod"], "or_b32": or_b32,
            "add_to_b64": add_to_b64, "load_b64": load_b64, "raise_b32": raise_b32,
            "exponent_bits": lambda x: int(np.float64(x).view(np.int64)) >> 52 & 0x7FF,
            "shift_left": _wrapping(operator.lshift), "highest_bit": lambda x: (x & 0xFFFFFFFF).bit_length() - 1,
            "count_bits": lambda x: (x & 0xFFFFFFFF).bit_count(),
            "lowest_bit": lambda x: ((x & -x) & 0xFFFFFFFF).bit_length() - 1}
