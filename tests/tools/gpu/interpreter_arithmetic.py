"""Arithmetic for interpreter.py: each instruction with the modifiers that change its number. One that it does not know is refused."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.tools.gpu.numbers import bits_of, clipped, compare, floats_of, flushed, halves_of_bytes, halves_times

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {"s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
                         "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f32": np.float32, "f64": np.float64, "u8": np.uint8,
                         "b8": np.uint8}
_KINDS = {*TYPES, "pred", "f16", "bf16", "f16x2", "bf16x2", "e4m3x2"}
_COMPARISONS = "lt le gt ge eq ne lo ls hi hs num nan ltu leu gtu geu equ neu"
_MODIFIERS = {
    "add": "rn ftz sat", "sub": "rn ftz sat", "mul": "rn ftz sat lo hi wide", "mad": "lo hi wide", "fma": "rn rm ftz sat", "min": "ftz NaN",
    "max": "ftz NaN", "and": "", "or": "", "xor": "", "not": "", "neg": "ftz", "abs": "ftz", "div": "rn full approx ftz", "rem": "",
    "shl": "", "shr": "", "selp": "", "setp": f"{_COMPARISONS} and or ftz", "cvt": "rn rni rmi rzi rpi sat relu ftz", "ex2": "approx ftz",
    "lg2": "approx ftz", "rcp": "approx rn ftz", "sqrt": "approx rn ftz", "copysign": "", "prmt": "", "bfi": "", "bfind": "shiftamt",
    "bfe": "", "brev": ""}
_WHOLE: dict[str, Callable[[Any], Any]] = {"rmi": np.floor, "rni": np.rint, "rzi": np.trunc, "rpi": np.ceil}


@functools.cache
def require_known(name: str) -> None:
    """Refuse an instruction of this file with a modifier that is not computed here."""
    base, *modifiers = name.split(".")
    if base in _MODIFIERS:
        others = set(modifiers) - _KINDS - set(_MODIFIERS[base].split())
        assert not others, f"the interpreter does not know {' and '.join(sorted(others))} of {name}"


class Arithmetic:
    """What computes registers from registers. x: the operands, the result first."""

    get: Any
    put: Any

    def _binary(self, function: Callable[[Any, Any], Any], op: list[str], x: list[Any], active: Array) -> None:
        kind = op[-1]
        a, b = (self._given(op, y, active) for y in x[1:3])
        with np.errstate(all="ignore"):
            out = np.asarray(function(a, b)).astype(TYPES.get(kind, np.bool_), copy=False)
        self.put(x[0], active, self._result(op, out))

    def _given(self, op: list[str], x: Any, active: Array) -> Any:
        value = self.get(x, active, op[-1])
        return flushed(value) if "ftz" in op else value

    def _result(self, op: list[str], value: Any) -> Any:
        value = flushed(value) if "ftz" in op else value
        return clipped(value) if "sat" in op else value

    def _unary(self, function: Callable[[Any], Any], op: list[str], x: list[Any], active: Array) -> None:
        with np.errstate(all="ignore"):
            self.put(x[0], active, self._result(op, function(self._given(op, x[1], active))))

    # -------------------------------------------------------- sums, products, quotients
    def _add(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.add, op, x, active)

    def _sub(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.subtract, op, x, active)

    def _mul(self, op: list[str], x: list[Any], active: Array) -> None:
        if op[-1] == "f16x2":
            self.put(x[0], active, halves_times(*[np.broadcast_to(self.get(y, active, "u32"), len(active)) for y in x[1:]]))
        elif op[1:] in (["hi", "s64"], ["hi", "u64"]):
            out = np.asarray(self.get(x[1], active, op[2])).astype(object) * np.asarray(self.get(x[2], active, op[2])).astype(object)
            self.put(x[0], active, (out >> 64).astype(TYPES[op[2]]))
        elif op[1] in ("wide", "hi"):
            kind, bits = op[2], int(op[2][1:])
            wide = TYPES[f"{kind[0]}{2 * bits}"]
            out = self.get(x[1], active, kind).astype(wide) * self.get(x[2], active, kind).astype(wide)
            self.put(x[0], active, out if op[1] == "wide" else (out >> wide(bits)).astype(TYPES[kind]))
        else:
            self._binary(np.multiply, op, x, active)

    def _mad(self, op: list[str], x: list[Any], active: Array) -> None:
        self._mul(op, ["mad.product", x[1], x[2]], active)
        kind = op[-1] if op[1] != "wide" else f"{op[-1][0]}{2 * int(op[-1][1:])}"
        self._binary(np.add, [kind], [x[0], "mad.product", x[3]], active)

    def _fma(self, op: list[str], x: list[Any], active: Array) -> None:
        """float32 in float64, float64 in as many bits as there are; rm: rounded down."""
        wide, real = (np.longdouble, np.float64) if op[-1] == "f64" else (np.float64, np.float32)
        a, b, c = (np.asarray(self._given(op, y, active)).astype(wide) for y in x[1:])
        with np.errstate(all="ignore"):
            exact = a * b + c
            value = exact.astype(real)
            if "rm" in op:
                value = np.where(value > exact, np.nextafter(value, real(-np.inf)), value)
        self.put(x[0], active, self._result(op, value))

    def _div(self, op: list[str], x: list[Any], active: Array) -> None:
        """Quotients of integers are cut off."""
        def cut(a: Any, b: Any) -> Any:
            return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)) if op[-1][0] == "s" else a // b
        self._binary(np.divide if op[-1][0] == "f" else cut, op, x, active)

    def _rem(self, op: list[str], x: list[Any], active: Array) -> None:
        """It has the sign of what is divided."""
        self._binary(np.fmod, op, x, active)

    # -------------------------------------------------------- smaller, larger, sign
    def _min(self, op: list[str], x: list[Any], active: Array) -> None:
        """Of a NaN and a number the number, but with the modifier NaN."""
        self._binary(np.fmin if op[-1][0] == "f" and "NaN" not in op else np.minimum, op, x, active)

    def _max(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.fmax if op[-1][0] == "f" and "NaN" not in op else np.maximum, op, x, active)

    def _neg(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(np.negative, op, x, active)

    def _abs(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(np.abs, op, x, active)

    def _copysign(self, op: list[str], x: list[Any], active: Array) -> None:
        """The sign of the first operand, the size of the second."""
        self._binary(lambda sign, size: np.copysign(size, sign), op, x, active)

    # -------------------------------------------------------- bits
    def _and(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.bitwise_and, op, x, active)

    def _or(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.bitwise_or, op, x, active)

    def _xor(self, op: list[str], x: list[Any], active: Array) -> None:
        self._binary(np.bitwise_xor, op, x, active)

    def _not(self, op: list[str], x: list[Any], active: Array) -> None:
        self.put(x[0], active, np.invert(self.get(x[1], active, op[-1])))

    def _shift(self, function: Any, op: list[str], x: list[Any], active: Array) -> None:
        kind = op[-1]
        wide, distance = 8 * np.dtype(TYPES[kind]).itemsize, self.get(x[2], active, "u32")
        value = self.get(x[1], active, kind)
        out = function(value, np.minimum(distance, wide - 1).astype(value.dtype))
        left = TYPES[kind](0) if kind[0] != "s" or function is np.left_shift else np.where(value < 0, -1, 0).astype(value.dtype)
        self.put(x[0], active, np.where(distance >= wide, left, out))

    def _shl(self, op: list[str], x: list[Any], active: Array) -> None:
        self._shift(np.left_shift, op, x, active)

    def _shr(self, op: list[str], x: list[Any], active: Array) -> None:
        self._shift(np.right_shift, op, x, active)

    def _prmt(self, op: list[str], x: list[Any], active: Array) -> None:
        """Each digit of the selector names a byte of both words; its upper bit: eight times the byte's sign."""
        a, b, selector = (np.broadcast_to(self.get(y, active, "u32"), len(active)).astype(np.uint64) for y in x[1:])
        both, out = a | b << np.uint64(32), np.zeros(len(active), np.uint64)
        for n in range(4):
            digit = selector >> np.uint64(4 * n)
            byte = both >> np.uint64(8) * (digit & np.uint64(7)) & np.uint64(0xFF)
            sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
            out |= np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * n)
        self.put(x[0], active, out.astype(np.uint32))

    def _bfi(self, op: list[str], x: list[Any], active: Array) -> None:
        kind, start, length = op[-1], x[3], x[4]
        ones = ((1 << length) - 1) << start
        word, into = self.get(x[1], active, kind), self.get(x[2], active, kind)
        number = into.dtype.type
        self.put(x[0], active, (into & ~number(ones)) | (word << number(start) & number(ones)))

    def _bfe(self, op: list[str], x: list[Any], active: Array) -> None:
        """`length` bits from `first` on, both below 256; what is past bit 31 is 0."""
        if op[-1] != "u32":
            raise NotImplementedError(op[-1])
        word, first, length = (np.broadcast_to(self.get(y, active, "u32"), len(active)).astype(np.uint64) for y in x[1:])
        first, length = np.minimum(first & np.uint64(255), np.uint64(32)), np.minimum(length & np.uint64(255), np.uint64(32))
        self.put(x[0], active, (word >> first & (np.uint64(1) << length) - np.uint64(1)).astype(np.uint32))

    def _bfind(self, op: list[str], x: list[Any], active: Array) -> None:
        word = np.broadcast_to(self.get(x[1], active, "u32"), len(active))
        top = np.array([int(w).bit_length() - 1 for w in word])
        self.put(x[0], active, np.where(top < 0, -1, 31 - top if "shiftamt" in op else top).astype(np.int32).view(np.uint32))

    def _brev(self, op: list[str], x: list[Any], active: Array) -> None:
        word = np.broadcast_to(self.get(x[1], active, "u32"), len(active))
        self.put(x[0], active, np.array([int(f"{int(w):032b}"[::-1], 2) for w in word], np.uint32))

    # -------------------------------------------------------- predicates
    def _selp(self, op: list[str], x: list[Any], active: Array) -> None:
        self.put(x[0], active, np.where(self.get(x[3], active, "pred"), self.get(x[1], active, op[-1]), self.get(x[2], active, op[-1])))

    def _setp(self, op: list[str], x: list[Any], active: Array) -> None:
        found = compare(op[1], self._given(op, x[1], active), self._given(op, x[2], active))
        if op[2] in ("and", "or"):
            other = self.get(x[3], active, "pred")
            found = found & other if op[2] == "and" else found | other
        self.put(x[0], active, np.broadcast_to(found, len(active)))

    # -------------------------------------------------------- other types, functions
    def _cvt(self, op: list[str], x: list[Any], active: Array) -> None:
        to, kind = op[-2], op[-1]
        rounded = next((function for name, function in _WHOLE.items() if name in op), None)
        if kind == "e4m3x2":
            self.put(x[0], active, halves_of_bytes(np.broadcast_to(self.get(x[1], active, "u16"), len(active))))
        elif to in ("bf16x2", "f16x2"):
            high, low = (bits_of(np.broadcast_to(self.get(y, active, "f32"), len(active)), to).astype(np.uint32) for y in x[1:])
            if "relu" in op:
                high, low = (np.where(y >> np.uint32(15), np.uint32(0), y) for y in (high, low))
            self.put(x[0], active, low | high << np.uint32(16))
        elif to in ("bf16", "f16"):
            assert kind == "f32" or (to, kind) == ("f16", "f64"), "the interpreter does not know it"
            self.put(x[0], active, bits_of(np.broadcast_to(self.get(x[1], active, kind), len(active)), to))
        elif kind in ("bf16", "f16"):
            assert to in ("f32", "f64")
            self.put(x[0], active, floats_of(self.get(x[1], active, "u16"), kind).astype(TYPES[to]))
        elif rounded is not None and kind[0] == "f":
            value = rounded(np.asarray(self._given(op, x[1], active)))
            if to[0] != "f":        # out of range: the nearest number of the type; NaN: 0
                value, limits = np.nan_to_num(value.astype(np.longdouble), nan=0.0, posinf=2.0**65, neginf=-2.0**65), np.iinfo(TYPES[to])
                value = np.clip(value, np.longdouble(limits.min), np.longdouble(limits.max))
            self.put(x[0], active, self._result(op, value.astype(TYPES[to])))
        else:
            assert "sat" not in op or (to, kind) == ("f32", "f32")
            with np.errstate(over="ignore"):
                self.put(x[0], active, self._result(op, np.asarray(self._given(op, x[1], active)).astype(TYPES[to])))

    def _ex2(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(np.exp2, op, x, active)

    def _lg2(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(np.log2, op, x, active)

    def _rcp(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(lambda y: TYPES[op[-1]](1) / y, op, x, active)

    def _sqrt(self, op: list[str], x: list[Any], active: Array) -> None:
        self._unary(np.sqrt, op, x, active)
