"""Arithmetic without a Python operator: approximate functions, packed conversions (PTX ISA 9.7.3, 9.7.9.21)."""
from __future__ import annotations

from typing import Any

from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, emit, instruction, pack, unpack

exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)          # 2 ulp; -inf gives 0
log2 = instruction("lg2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", "f", "f", pure=True)    # 1 ulp
quotient = instruction("div.full.f32 $0, $1, $2;", "ff", "f", pure=True)       # 2 ulp, also where 1 / y is too small for a normal number
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
