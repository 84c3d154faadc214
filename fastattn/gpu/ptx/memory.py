"""Loads, stores and atomics by address: 64-bit global (uint64), 32-bit shared (int32) (PTX ISA 9.7.9.8, 9.7.9.11, 9.7.13.5)."""
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I16, I32, I64, VOID, emit, instruction

load_f32 = instruction("ld.global.f32 $0, [$1];", "l", "f")
load_f64 = instruction("ld.global.f64 $0, [$1];", "l", "d")
load_b32 = instruction("ld.global.b32 $0, [$1];", "l", "r")
# load_b32_if(address, inside): 0 without an access if `inside` is 0
load_b32_if = instruction("{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }", "lr", "r")
load_u16 = instruction("{ .reg .u16 t; ld.global.u16 t, [$1]; cvt.u32.u16 $0, t; }", "l", "r")
load_u8 = instruction("ld.global.u8 $0, [$1];", "l", "r")
store_f32 = instruction("st.global.f32 [$0], $1;", "lf")
store_f64 = instruction("st.global.f64 [$0], $1;", "ld")
store_b32 = instruction("st.global.b32 [$0], $1;", "lr")
store_words = instruction("st.global.v4.b32 [$0], {$1, $2, $3, $4};", "lrrrr")      # four words at an address that is a multiple of 16
store_zero16 = instruction("st.global.v4.b32 [$0], {0, 0, 0, 0};", "l")
store_b16 = instruction("{ .reg .b16 t; cvt.u16.u32 t, $1; st.global.b16 [$0], t; }", "lr")
load_shared_b32 = instruction("ld.shared.b32 $0, [$1];", "r", "r")
store_shared_b32 = instruction("st.shared.b32 [$0], $1;", "rr")
store_shared_zero16 = instruction("st.shared.v4.b32 [$0], {0, 0, 0, 0};", "r")
# both return the old value. atomic_inc_wrap(address, limit) adds 1 and wraps to 0 after `limit`
atomic_add_b32 = instruction("atom.global.add.u32 $0, [$1], $2;", "lr", "r")
atomic_inc_wrap = instruction("atom.global.inc.u32 $0, [$1], $2;", "lr", "r")
fence_gpu = instruction("fence.acq_rel.gpu;")


def copy_bytes(size: int) -> Any:
    """copy(to, source): 1, 2, 4, 8 or 16 bytes between global addresses that are multiples of `size`, as they are."""
    if size == 16:
        return instruction("{ .reg .b32 a, b, c, d; ld.global.v4.b32 {a, b, c, d}, [$1]; st.global.v4.b32 [$0], {a, b, c, d}; }", "ll")
    if size == 1:
        return instruction("{ .reg .u32 t; ld.global.u8 t, [$1]; st.global.u8 [$0], t; }", "ll")
    return instruction(f"{{ .reg .b{8 * size} t; ld.global.b{8 * size} t, [$1]; st.global.b{8 * size} [$0], t; }}", "ll")


@intrinsic
def shared_address(typingctx: Any, array: Any) -> Any:
    """The 32-bit shared address of a cuda.shared.array."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = emit(builder, I64, "cvta.to.shared.u64 $0, $1;", "=l,l", [builder.ptrtoint(data, I64)], side_effect=False)
        return builder.trunc(address, I32)
    return signature(types.int32, array), generate


def half_to_float(builder: Any, bits: Any, dtype: str) -> Any:
    """float32 of 16 bits (an i16 value) of float16 or bfloat16."""
    if dtype == "bfloat16":
        return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), F32)
    return emit(builder, F32, "cvt.f32.f16 $0, $1;", "=f,h", [bits], side_effect=False)


def halves(builder: Any, word: Any) -> tuple[Any, Any]:
    """Low and high 16 bits of a 32-bit value."""
    return builder.trunc(word, I16), builder.trunc(builder.lshr(word, I32(16)), I16)


def load_scalar(dtype: str) -> Any:
    """load(address): one element of `dtype` in global memory, as float32."""
    text = {"float32": "ld.global.f32 $0, [$1];", "float64": "{ .reg .f64 t; ld.global.f64 t, [$1]; cvt.rn.f32.f64 $0, t; }",
            "float16": "{ .reg .b16 t; ld.global.b16 t, [$1]; cvt.f32.f16 $0, t; }",
            "bfloat16": "{ .reg .b16 t, z; mov.b16 z, 0; ld.global.b16 t, [$1]; mov.b32 $0, {z, t}; }"}[dtype]
    return instruction(text, "l", "f")


def emit_load_shared_pair(builder: Any, address: Any, offset: int) -> list[Any]:
    """Load two neighbouring float32 at shared address + offset, a multiple of 8."""
    value = emit(builder, ir.LiteralStructType([F32, F32]), f"ld.shared.v2.f32 {{$0, $1}}, [$2+{offset}];", "=f,=f,r,~{memory}", [address])
    return [builder.extract_value(value, k) for k in range(2)]


def emit_load_pair(builder: Any, address: Any, offset: int) -> list[Any]:
    """Load two neighbouring float32 at global address + offset, a multiple of 8."""
    value = emit(builder, ir.LiteralStructType([F32, F32]), f"ld.global.v2.f32 {{$0, $1}}, [$2+{offset}];", "=f,=f,l,~{memory}", [address])
    return [builder.extract_value(value, k) for k in range(2)]


def emit_store_shared_vector(builder: Any, address: Any, offset: int, values: list[Any]) -> None:
    """Store four float32 at shared address + offset, a multiple of 16."""
    emit(builder, VOID, f"st.shared.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};", "r,f,f,f,f,~{memory}", [address, *values])


def emit_store_cluster_vector(builder: Any, address: Any, offset: int, values: list[Any]) -> None:
    """The same, in the shared memory of a block of the cluster. Since sm_90."""
    emit(builder, VOID, f"st.shared::cluster.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};", "r,f,f,f,f,~{memory}", [address, *values])


def emit_add_vector(builder: Any, address: Any, offset: int, values: list[Any]) -> None:
    """Add four float32 atomically to those at global address + offset, a multiple of 16. In any order with other adds. Since sm_90."""
    emit(builder, VOID, f"red.relaxed.gpu.global.add.v4.f32 [$0+{offset}], {{$1, $2, $3, $4}};", "l,f,f,f,f,~{memory}", [address, *values])


def emit_add_if(builder: Any, keep: Any, address: Any, value: Any) -> None:
    """Add a float32 atomically to that at a global address, if the 32-bit `keep` is not 0. In any order with other adds."""
    emit(builder, VOID, "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p red.relaxed.gpu.global.add.f32 [$0], $1; }", "l,f,r,~{memory}",
         [address, value, keep])


def emit_load_vector(builder: Any, address: Any, offset: int) -> list[Any]:
    """Load four float32 at global address + offset, a multiple of 16."""
    text = f"ld.global.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    value = emit(builder, ir.LiteralStructType([F32] * 4), text, "=f,=f,=f,=f,l,~{memory}", [address])
    return [builder.extract_value(value, k) for k in range(4)]


def emit_load_if(builder: Any, inside: Any, pointer: Any, size: int) -> Any:
    """Load `size` bytes (1, 2 or 4) at a global address as a 32-bit value; 0 without an access if `inside` is false."""
    load = {1: "mov.b32 $0, 0; @p ld.global.u8 $0, [$1];", 2: "mov.u16 t, 0; @p ld.global.u16 t, [$1]; cvt.u32.u16 $0, t;",
            4: "mov.b32 $0, 0; @p ld.global.b32 $0, [$1];"}[size]
    text = f"{{ .reg .pred p; .reg .u16 t; setp.ne.u32 p, $2, 0; {load} }}"
    return emit(builder, I32, text, "=r,l,r", [pointer, builder.zext(inside, I32)])


def emit_load16_if(builder: Any, inside: Any, address: Any) -> list[Any]:
    """Load four 32-bit words at a global address, a multiple of 16; zeros without an access if `inside` is false."""
    text = ("{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }")
    value = emit(builder, ir.LiteralStructType([I32] * 4), text, "=&r,=&r,=&r,=&r,l,r", [address, builder.zext(inside, I32)])
    return [builder.extract_value(value, k) for k in range(4)]


def emit_store16_if(builder: Any, keep: Any, address: Any, words: list[Any]) -> None:
    """Store four 32-bit words at a global address, a multiple of 16, if the 32-bit `keep` is not 0."""
    emit(builder, VOID, "{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4}; }", "l,r,r,r,r,r,~{memory}",
         [address, *words, keep])


def emit_store_pair_if(builder: Any, keep: Any, address: Any, x: Any, y: Any) -> None:
    """Store two float32 at a global address, a multiple of 8, if the 32-bit `keep` is not 0."""
    emit(builder, VOID, "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }", "l,f,f,r,~{memory}",
         [address, x, y, keep])


def emit_store_e4m3_pair_if(builder: Any, keep: Any, address: Any, offset: int, x: Any, y: Any) -> None:
    """Store two float32 as float8_e4m3fn at global address + offset, a multiple of 2, if the 32-bit `keep` is not 0. Larger numbers than
    448 become 448. Since sm_89."""
    text = ("{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, $3, 0; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; "
            f"@p st.global.b16 [$0+{offset}], t; }}")
    emit(builder, VOID, text, "l,f,f,r,~{memory}", [address, x, y, keep])


def emit_store_f32_if(builder: Any, keep: Any, address: Any, value: Any) -> None:
    """Store a float32 at a global address, if the 32-bit `keep` is not 0."""
    emit(builder, VOID, "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.f32 [$0], $1; }", "l,f,r,~{memory}", [address, value, keep])


def emit_store_halves_if(builder: Any, keep_low: Any, keep_high: Any, address: Any, word: Any) -> None:
    """Store the two halves of a word, each if its `keep` is not 0. The address is 2-byte aligned."""
    text = ("{ .reg .pred p; .reg .b16 t, u; mov.b32 {t, u}, $1; setp.ne.u32 p, $2, 0; @p st.global.b16 [$0], t; "
            "setp.ne.u32 p, $3, 0; @p st.global.b16 [$0+2], u; }")
    emit(builder, VOID, text, "l,r,r,r,~{memory}", [address, word, keep_low, keep_high])
