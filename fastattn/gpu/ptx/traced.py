"""Instructions of traced functions (gpu/flex): functions of float32, loads of captured arrays, sums of their gradients.

PTX ISA 9.7.3 (floating point), 9.7.9.8 (ld.global.nc), 9.7.13.6 (red).
"""
from __future__ import annotations

from functools import cache
from typing import Any

from ..dsl.asm import instruction

smallest = instruction("min.NaN.f32 $0, $1, $2;", "ff", "f", pure=True)        # NaN where one is NaN
largest = instruction("max.NaN.f32 $0, $1, $2;", "ff", "f", pure=True)
absolute = instruction("abs.f32 $0, $1;", "f", "f", pure=True)
root = instruction("sqrt.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
near_sine = instruction("sin.approx.ftz.f32 $0, $1;", "f", "f", pure=True)     # error 2**-20.5 for angles in [-pi, pi]
near_cosine = instruction("cos.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
# an int32 rounded to 0; numbers out of range are cut to it
whole_f32 = instruction("cvt.rzi.s32.f32 $0, $1;", "f", "r", pure=True)
whole_f64 = instruction("cvt.rzi.s32.f64 $0, $1;", "d", "r", pure=True)

# ld.global.nc: captured arrays are not written while a kernel runs
_HALF = {"float16": "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.f32.f16 $0, t; }",
         "bfloat16": "{ .reg .b16 t, z; mov.b16 z, 0; ld.global.nc.b16 t, [$1]; mov.b32 $0, {z, t}; }"}
_WIDE_HALF = {"float16": "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.f64.f16 $0, t; }",
              "bfloat16": "{ .reg .b16 t, z; .reg .f32 x; mov.b16 z, 0; ld.global.nc.b16 t, [$1]; mov.b32 x, {z, t}; cvt.f64.f32 $0, x; }"}
_INTEGERS = {
    "int32": "ld.global.nc.b32 $0, [$1];", "bool": "ld.global.nc.u8 $0, [$1];",
    "int64": "ld.global.nc.b32 $0, [$1];",      # int64: its low 32 bits
}
INTEGERS = tuple(_INTEGERS)


@cache
def rounded(mode: str, compute: str) -> Any:
    """A whole number: rmi rounds down, rpi up, rni to the nearest one, rzi to 0."""
    bits, letter = ("f64", "d") if compute == "float64" else ("f32", "f")
    return instruction(f"cvt.{mode}.{bits}.{bits} $0, $1;", letter, letter, pure=True)


@cache
def load_captured(dtype: str, compute: str) -> Any:
    """load(address): an element as a number of the arithmetic `compute`, or as an int32."""
    if dtype in _INTEGERS:
        return instruction(_INTEGERS[dtype], "l", "r", pure=True)
    wide = compute == "float64"
    text = {"float32": "{ .reg .f32 t; ld.global.nc.f32 t, [$1]; cvt.f64.f32 $0, t; }" if wide else "ld.global.nc.f32 $0, [$1];",
            "float64": "ld.global.nc.f64 $0, [$1];" if wide else "{ .reg .f64 t; ld.global.nc.f64 t, [$1]; cvt.rn.f32.f64 $0, t; }",
            **(_WIDE_HALF if wide else _HALF)}[dtype]
    return instruction(text, "l", "d" if wide else "f", pure=True)


@cache
def add_to(compute: str) -> Any:
    """add(address, value): a sum in global memory takes in a number, atomically."""
    return instruction(f"red.global.add.{'f64' if compute == 'float64' else 'f32'} [$0], $1;", "ld" if compute == "float64" else "lf")


# sums and maxima that have the same bits in any order; add_to_b64 wraps, and so takes negative numbers too
add_to_b64 = instruction("red.global.add.u64 [$0], $1;", "ll")
raise_b32 = instruction("red.global.max.s32 [$0], $1;", "lr")
load_b64 = instruction("ld.global.b64 $0, [$1];", "l", "l")
exponent_bits = instruction("{ .reg .b32 low, high; mov.b64 {low, high}, $1; bfe.u32 $0, high, 20, 11; }", "d", "r", pure=True)
or_b32 = instruction("red.global.or.b32 [$0], $1;", "lr")                       # or_b32(address, bits)
highest_bit = instruction("bfind.u32 $0, $1;", "r", "r", pure=True)             # -1 of 0
lowest_bit = instruction("{ .reg .b32 t; brev.b32 t, $1; bfind.shiftamt.u32 $0, t; }", "r", "r", pure=True)      # -1 of 0
count_bits = instruction("popc.b32 $0, $1;", "r", "r", pure=True)
