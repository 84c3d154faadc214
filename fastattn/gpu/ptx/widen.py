"""8-bit floats widened to 16 bits in registers, which is exact (PTX ISA 9.7.9.21).

An 8-bit number is a float16, and as such a bfloat16. NATIVE: since sm_89 an instruction widens two of them; before it takes seven.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from ..dsl.asm import I32, emit

# Of the upper bytes of two halves of a word: e4m3 as a float16 of the same bits is 2**-8 of itself. NaN, whose bits are then 480's, gets
# the exponent of a NaN
_E4M3 = (".reg .b32 m, s, n, c; mov.b32 c, 0x5C005C00; and.b32 m, t, 0x7F007F00; shr.u32 m, m, 1; "
         "add.u32 n, m, 0x00800080; and.b32 n, n, 0x40004000; shr.u32 n, n, 1; and.b32 s, t, 0x80008000; or.b32 m, m, s; "
         "mul.f16x2 m, m, c; or.b32 $0, m, n;")
_TO_BFLOAT16 = ("{ .reg .b16 x, y; .reg .f32 u, v; mov.b32 {x, y}, $1; cvt.f32.f16 u, x; cvt.f32.f16 v, y; cvt.rn.bf16x2.f32 $0, v, u; }")


def emit_permute(builder: Any, x: Any, y: Any, selector: int) -> Any:
    return emit(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [x, y], side_effect=False)


def make_widen(dtype: str, source: str, native: bool) -> Callable[[Any, Any], list[Any]]:
    """widen(builder, word): four 8-bit numbers of `source` as two registers of pairs of the 16-bit `dtype`, in order."""
    def halves(builder: Any, word: Any) -> list[Any]:
        if source == "float8_e4m3fn" and native:
            text = ("{ .reg .b16 x, y; mov.b32 {x, y}, $2; cvt.rn.f16x2.e4m3x2 $0, x; cvt.rn.f16x2.e4m3x2 $1, y; }")
            value = emit(builder, ir.LiteralStructType([I32] * 2), text, "=&r,=&r,r", [word], side_effect=False)
            return [builder.extract_value(value, k) for k in range(2)]
        upper = [emit_permute(builder, word, I32(0), selector) for selector in (0x1404, 0x3424)]
        if source == "float8_e5m2":
            return upper
        return [emit(builder, I32, f"{{ .reg .b32 t; mov.b32 t, $1; {_E4M3} }}", "=r,r", [x], side_effect=False) for x in upper]

    def widen(builder: Any, word: Any) -> list[Any]:
        pairs = halves(builder, word)
        return pairs if dtype == "float16" else [emit(builder, I32, _TO_BFLOAT16, "=r,r", [x], side_effect=False) for x in pairs]
    return widen
