"""Single elements of any dtype in global memory, and vectors of 16 bytes or less in shared memory (PTX ISA 9.7.9.8, 9.7.9.11).

`compute` is the dtype of the arithmetic, "float32" or "float64": loads convert to it, stores from it.
"""
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ...arrays.view import ITEMSIZE
from ..dsl.asm import F32, F64, I32, emit, instruction, pack
from .memory import half_to_float, halves
from .widen import make_widen

_LETTER = {"float32": "f", "float64": "d"}
_BITS = {"float32": "f32", "float64": "f64", "float16": "b16", "bfloat16": "b16"}
# 8-bit floats in instructions that every architecture has. t: the byte. As a float16 of the same exponent bits, e4m3fn is 2**-8 of itself;
# e5m2 is the upper byte of a float16.
_BYTE_TO_F32 = {
    "float8_e4m3fn": ".reg .pred n; .reg .b32 m, s; .reg .b16 h; and.b32 m, t, 127; setp.eq.u32 n, m, 127; shl.b32 m, m, 7; "
                     "and.b32 s, t, 128; shl.b32 s, s, 8; or.b32 m, m, s; cvt.u16.u32 h, m; cvt.f32.f16 $0, h; mul.f32 $0, $0, 0f43800000; "
                     "@n mov.b32 $0, 0x7FC00000;",
    "float8_e5m2": ".reg .b32 m; .reg .b16 h; shl.b32 m, t, 8; cvt.u16.u32 h, m; cvt.f32.f16 $0, h;"}


class _Byte(NamedTuple):
    """How float32 becomes an 8-bit float: the largest number, the smallest normal one, the float32 whose last bit is the step of the
    subnormal ones, bits of the mantissa that go, what is subtracted from the exponent, and NaN."""

    most: int
    normal: int
    magic: int
    shift: int
    bias: int
    nan: int


_BYTES = {"float8_e4m3fn": _Byte(0x43E00000, 0x3C800000, 0x46800000, 20, (127 - 7) << 3, 0x7F),
          "float8_e5m2": _Byte(0x47600000, 0x38800000, 0x43000000, 21, (127 - 15) << 2, 0x7E)}
_TO_COMPUTE = {("float16", "float32"): "cvt.f32.f16 $0, t;", ("bfloat16", "float32"): "mov.b32 $0, {z, t};",
               ("float64", "float32"): "cvt.rn.f32.f64 $0, t;", ("float32", "float64"): "cvt.f64.f32 $0, t;",
               ("float16", "float64"): "cvt.f64.f16 $0, t;"}
_FROM_COMPUTE = {("float32", "float16"): "cvt.rn.f16.f32", ("float32", "bfloat16"): "cvt.rn.bf16.f32",
                 ("float32", "float64"): "cvt.f64.f32", ("float64", "float32"): "cvt.rn.f32.f64"}

# load_flag(address, inside): one byte; 0 without an access if `inside` is 0
load_flag = instruction("{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }", "lr", "r")


@cache
def rounded_product(compute: str) -> Any:
    """x * y, rounded by itself: never fused with a following addition."""
    letter = _LETTER[compute]
    return instruction(f"mul.rn.{_BITS[compute]} $0, $1, $2;", 2 * letter, letter, pure=True)


@cache
def load_if(dtype: str, compute: str) -> Any:
    """load(address, inside): an element of `dtype` in global memory; 0 without an access if `inside` is 0."""
    guard = ".reg .pred p; setp.ne.b32 p, $2, 0;"
    if dtype in _BYTES:
        text = f"{{ {guard} .reg .b32 t; mov.b32 t, 0; @p ld.global.u8 t, [$1]; {_BYTE_TO_F32[dtype]} }}"
        return instruction(text, "lr", "f")
    bits = _BITS[dtype]
    if dtype == compute:
        text = f"{{ {guard} mov.b{bits[1:]} $0, 0; @p ld.global.{bits} $0, [$1]; }}"
    else:
        text = (f"{{ {guard} .reg .{bits} t; .reg .b16 z; mov.b16 z, 0; mov.b{bits[1:]} t, 0; @p ld.global.{bits} t, [$1]; "
                f"{_TO_COMPUTE[dtype, compute]} }}")
    return instruction(text, "lr", _LETTER[compute])


@cache
def load_chunk(dtype: str) -> Any:
    """load(address, inside): the 16 bytes at an aligned global address, converted to a tuple of 16, 8, 4 or 2 numbers; zeros without an
    access if `inside` is 0."""
    wide = dtype == "float64"
    words, letter, zero, kind = (2, "d", "0d0000000000000000", F64) if wide else (4, "r", "0", I32)
    bits, count = "f64" if wide else "b32", 16 // ITEMSIZE[dtype]
    widen = make_widen("float16", dtype, False) if dtype in _BYTES else None
    clear = "".join(f" mov.{bits} ${k}, {zero};" for k in range(words))
    to = ", ".join(f"${k}" for k in range(words))
    text = (f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0;{clear} @p ld.global.v{words}.{bits} {{{to}}}, [${words}]; }}")
    constraints = ",".join([f"={letter}"] * words + ["l", "r", "~{memory}"])

    @intrinsic
    def load(typingctx: Any, address: Any, inside: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, ir.LiteralStructType([kind] * words), text, constraints, list(args))
            given = [builder.extract_value(value, k) for k in range(words)]
            if dtype == "float32":
                given = [builder.bitcast(x, F32) for x in given]
            elif widen is not None:
                pairs = [pair for x in given for pair in widen(builder, x)]
                given = [half_to_float(builder, half, "float16") for x in pairs for half in halves(builder, x)]
            elif dtype != "float64":
                given = [half_to_float(builder, half, dtype) for x in given for half in halves(builder, x)]
            return pack(builder, given)
        number = types.float64 if wide else types.float32
        return signature(types.UniTuple(number, count), types.uint64, types.int32), generate
    return load


@cache
def load_shared_chunk(dtype: str) -> Any:
    """load(address): the 16 bytes at a shared address, a multiple of 16, as eight float32 of a 16-bit `dtype`."""
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
            value = emit(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,r,~{memory}", [args[0]])
            words = [builder.extract_value(value, k) for k in range(4)]
            return pack(builder, [half_to_float(builder, half, dtype) for x in words for half in halves(builder, x)])
        return signature(types.UniTuple(types.float32, 8), types.int32), generate
    return load


@cache
def store(dtype: str, compute: str) -> Any:
    """store(address, value): round to an element of `dtype` in global memory. 8-bit floats saturate, and NaN stays."""
    if dtype in _BYTES:
        return _store_byte(dtype, compute)
    if dtype == compute:
        return instruction(f"st.global.{_BITS[dtype]} [$0], $1;", "l" + _LETTER[compute])
    bits = _BITS[dtype]
    return instruction(f"{{ .reg .{bits} t; {_FROM_COMPUTE[compute, dtype]} t, $1; st.global.{bits} [$0], t; }}", "l" + _LETTER[compute])


def _store_byte(dtype: str, compute: str) -> Any:
    """`store` of an 8-bit float, rounded to nearest even."""
    most, normal, magic, shift, bias, nan = _BYTES[dtype]
    given = "mov.f32 x, $1;" if compute == "float32" else "cvt.rn.f32.f64 x, $1;"
    text = (f"{{ .reg .pred n, z; .reg .f32 x, a, c; .reg .b32 s, b, u, t; {given} mov.b32 s, x; shr.u32 s, s, 24; and.b32 s, s, 128; "
            f"abs.f32 a, x; setp.nan.f32 n, a, a; min.f32 a, a, 0f{most:08X}; setp.lt.f32 z, a, 0f{normal:08X}; "
            f"add.rn.f32 c, a, 0f{magic:08X}; mov.b32 t, c; sub.u32 t, t, {magic}; "
            f"mov.b32 b, a; shr.u32 u, b, {shift}; and.b32 u, u, 1; add.u32 b, b, u; add.u32 b, b, {(1 << (shift - 1)) - 1}; "
            f"shr.u32 b, b, {shift}; sub.u32 b, b, {bias}; selp.b32 b, t, b, z; selp.b32 b, {nan}, b, n; or.b32 b, b, s; "
            "st.global.u8 [$0], b; }")
    return instruction(text, "l" + _LETTER[compute])


@cache
def store_shared(compute: str) -> Any:
    """store(address, value): at a shared address."""
    return instruction(f"st.shared.{_BITS[compute]} [$0], $1;", "r" + _LETTER[compute])


@cache
def load_shared(compute: str, count: int) -> Any:
    """load(address): a tuple of `count` (1, 2 or 4) neighbours at a shared address, a multiple of their size."""
    kind, numba_kind = (F64, types.float64) if compute == "float64" else (F32, types.float32)
    letter = _LETTER[compute]
    text = f"ld.shared.{_BITS[compute]} $0, [$1];" if count == 1 else \
        f"ld.shared.v{count}.{_BITS[compute]} {{{', '.join(f'${k}' for k in range(count))}}}, [${count}];"
    constraints = ",".join([f"={letter}"] * count + ["r", "~{memory}"])

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if count == 1:
                return pack(builder, [emit(builder, kind, text, constraints, [args[0]])])
            value = emit(builder, ir.LiteralStructType([kind] * count), text, constraints, [args[0]])
            return pack(builder, [builder.extract_value(value, k) for k in range(count)])
        return signature(types.UniTuple(numba_kind, count), types.int32), generate
    return load
