"""Arithmetic without a Python operator: approximate functions, packed conversions (PTX ISA 9.7.3, 9.7.9.21)."""
from __future__ import annotations

from typing import Any

from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, emit, instruction, pack, unpack

exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)          # 2 ulp; -inf gives 0
log2 = instruction("lg2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f", "f", pure=True)    # 1 ulp
# rounded by itself: never fused with a following addition
product = instruction("mul.rn.f32 $0, $1, $2;", "ff", "f", pure=True)
fma = instruction("fma.rn.f32 $0, $1, $2, $3;", "fff", "f", pure=True)         # x * y + z, rounded once
fmax = instruction("max.f32 $0, $1, $2;", "ff", "f", pure=True)                # of NaN and a number it gives the number
shift_left = instruction("shl.b32 $0, $1, $2;", "rr", "r", pure=True)         # of an int32, without widening to 64 bits
CONVERT = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}


def emit_max(builder: Any, a: Any, b: Any) -> Any:
    return emit(builder, F32, "max.f32 $0, $1, $2;", "=f,f,f", [a, b], side_effect=False)


def emit_min_nan(builder: Any, a: Any, b: Any) -> Any:
    """The smaller one; NaN where one is NaN."""
    return emit(builder, F32, "min.NaN.f32 $0, $1, $2;", "=f,f,f", [a, b], side_effect=False)


def emit_product(builder: Any, a: Any, b: Any) -> Any:
    return emit(builder, F32, "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], side_effect=False)


def emit_exp2(builder: Any, a: Any) -> Any:
    return emit(builder, F32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [a], side_effect=False)


# 2**f - 1 = f * (c1 + c2 f + c3 f**2) on [-0.5, 0.5], relative error of 2**f at most 1.1e-4; none for f = 0. Of degree 2: 2.0e-3
_EXP2 = {3: (0.69328293, 0.24221097, 0.05500893), 2: (0.703, 0.24)}
_TO_INTEGER = 1.5 * 2.0**23     # added to a float32 below 2**22, it leaves the nearest integer in the last bits


def emit_exp2_polynomial(builder: Any, a: Any, degree: int = 3) -> Any:
    """exp2 of a number below 127 without ex2, relative error as of _EXP2: eight instructions of the FMA units, or seven. 0 for -127 and
    below, and for NaN."""
    y = emit_max(builder, a, F32(-127.0))
    shifted = emit(builder, F32, "add.rn.f32 $0, $1, $2;", "=f,f,f", [y, F32(_TO_INTEGER)], side_effect=False)
    whole = emit(builder, F32, "add.rn.f32 $0, $1, $2;", "=f,f,f", [shifted, F32(-_TO_INTEGER)], side_effect=False)
    f = builder.fsub(y, whole)
    *lower, power = (F32(c) for c in (1.0, *_EXP2[degree]))
    for c in reversed(lower):
        power = emit_fma(builder, power, f, c)
    exponent = builder.shl(builder.bitcast(shifted, I32), I32(23))
    return builder.bitcast(builder.add(builder.bitcast(power, I32), exponent), F32)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return emit(builder, F32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], side_effect=False)


def emit_abs(builder: Any, a: Any) -> Any:
    return emit(builder, F32, "abs.f32 $0, $1;", "=f,f", [a], side_effect=False)


def emit_pack_half(builder: Any, low: Any, high: Any, dtype: str, positive: bool = False) -> Any:
    """Two float32 rounded to 16 bits, in one 32-bit register. `positive`: negative values become 0."""
    convert = CONVERT[dtype].replace("cvt.rn.", "cvt.rn.relu.") if positive else CONVERT[dtype]
    return emit(builder, I32, f"{convert} $0, $1, $2;", "=r,f,f", [high, low], side_effect=False)


@intrinsic
def turn(typingctx: Any, x: Any, y: Any, c: Any, s: Any) -> Any:
    """x * c + y * s, number by number of tuples of float32. Both products are rounded before the sum, as NumPy does."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = [unpack(builder, z, x.count) for z in args]
        sums = [builder.fadd(emit_product(builder, a, b), emit_product(builder, d, e)) for a, d, b, e in zip(*rows, strict=True)]
        return pack(builder, sums)
    return signature(x, x, y, c, s), generate
