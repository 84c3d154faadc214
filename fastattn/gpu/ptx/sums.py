"""float32 sums in shared memory: a fragment is stored there, and added to others later (PTX ISA 9.7.9.8, 9.7.9.12).

A thread's registers lie in pieces of four, so that those of the threads of a warpgroup are side by side: no bank conflict.
"""
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, VOID, emit, pack, unpack

PIECE = 16                  # bytes: four registers of a thread
APART = 128 * PIECE         # a thread's pieces: those of the warpgroup's other threads are between
AT_ONCE = 4                 # pieces that are loaded before the first is used
_FOUR = ir.LiteralStructType([F32] * 4)


@intrinsic
def store_sums(typingctx: Any, address: Any, acc: Any) -> Any:
    """Store a fragment. address: the thread's first piece."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[1], acc.count)
        for k in range(0, acc.count, 4):
            at = builder.add(args[0], I32(k // 4 * APART))
            emit(builder, VOID, "st.shared.v4.f32 [$0], {$1, $2, $3, $4};", "r,f,f,f,f,~{memory}", [at, *x[k:k + 4]])
        return context.get_dummy_value()
    return signature(types.none, types.int32, acc), generate


@intrinsic
def add_sums(typingctx: Any, address: Any, acc: Any, scale0: Any, scale1: Any) -> Any:
    """acc + the stored fragment times each row's scale."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[1], acc.count)
        for first in range(0, acc.count, 4 * AT_ONCE):
            pieces = range(first, min(first + 4 * AT_ONCE, acc.count), 4)
            loaded = [emit(builder, _FOUR, "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r",
                           [builder.add(args[0], I32(k // 4 * APART))]) for k in pieces]
            for k, four in zip(pieces, loaded, strict=True):
                for n in range(4):      # columns 0 and 1 of row 0, then of row 1
                    operands = [builder.extract_value(four, n), args[2 + n // 2], x[k + n]]
                    x[k + n] = emit(builder, F32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", operands)
        return pack(builder, x)
    return signature(acc, types.int32, acc, types.float32, types.float32), generate
