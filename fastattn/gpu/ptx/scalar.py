"""Single elements of any dtype in global memory, and vectors of 16 bytes or less in shared memory (PTX ISA 9.7.9.8, 9.7.9.11).

`compute` is the dtype of the arithmetic, "float32" or "float64": values arrive as that and leave from that.
"""
from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from .asm import F32, F64, emit, instruction, pack

_LETTER = {"float32": "f", "float64": "d"}
_BITS = {"float32": "f32", "float64": "f64", "float16": "b16", "bfloat16": "b16"}
_TO_COMPUTE = {("float16", "float32"): "cvt.f32.f16 $0, t;", ("bfloat16", "float32"): "mov.b32 $0, {z, t};",
               ("float64", "float32"): "cvt.rn.f32.f64 $0, t;", ("float32", "float64"): "cvt.f64.f32 $0, t;",
               ("float16", "float64"): "cvt.f64.f16 $0, t;"}
_FROM_FLOAT32 = {"float16": "cvt.rn.f16.f32", "bfloat16": "cvt.rn.bf16.f32"}

# load_flag(address, inside): one byte, 0 and no access where `inside` is 0
load_flag = instruction("{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }", "lr", "r")


@cache
def load_if(dtype: str, compute: str) -> Any:
    """load(address, inside): an element of `dtype` in global memory, 0 and no access where `inside` is 0."""
    bits, guard = _BITS[dtype], ".reg .pred p; setp.ne.b32 p, $2, 0;"
    if dtype == compute:
        text = f"{{ {guard} mov.b{bits[1:]} $0, 0; @p ld.global.{bits} $0, [$1]; }}"
    else:
        text = (f"{{ {guard} .reg .{bits} t; .reg .b16 z; mov.b16 z, 0; mov.b{bits[1:]} t, 0; @p ld.global.{bits} t, [$1]; "
                f"{_TO_COMPUTE[dtype, compute]} }}")
    return instruction(text, "lr", _LETTER[compute])


@cache
def store(dtype: str, compute: str) -> Any:
    """store(address, value): rounded to an element of `dtype` in global memory."""
    if dtype == compute:
        return instruction(f"st.global.{_BITS[dtype]} [$0], $1;", "l" + _LETTER[compute])
    return instruction(f"{{ .reg .b16 t; {_FROM_FLOAT32[dtype]} t, $1; st.global.b16 [$0], t; }}", "lf")


@cache
def store_shared(compute: str) -> Any:
    """store(address, value) at a shared address."""
    return instruction(f"st.shared.{_BITS[compute]} [$0], $1;", "r" + _LETTER[compute])


@cache
def load_shared(compute: str, count: int) -> Any:
    """load(address): a tuple of `count` = 1, 2 or 4 neighbours at a shared address that is a multiple of their size."""
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
