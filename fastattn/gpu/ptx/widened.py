"""8-bit rows on their way from global memory to panels of 16 bits in shared memory: loaded 16 bytes at a time, widened in registers."""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, VOID, emit, instruction, pack, unpack
from .memory import emit_load16_if
from .widen import make_widen

# prefetch(address): load the 128 bytes around a global address into the L2 cache
prefetch = instruction("prefetch.global.L2 [$0];", "l")


@intrinsic
def load_chunk_if(typingctx: Any, address: Any, inside: Any) -> Any:
    """Four words at a global address, a multiple of 16; zeros without an access if the 32-bit `inside` is 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack(builder, emit_load16_if(builder, builder.icmp_unsigned("!=", args[1], I32(0)), args[0]))
    return signature(types.UniTuple(types.int32, 4), types.uint64, types.int32), generate


def make_store_chunk(dtype: str, source: str) -> Any:
    """store_chunk(first, second, words): 16 numbers of `source` as the 16-bit `dtype`, to two shared addresses, multiples of 16. Exact."""
    widen = make_widen(dtype, source, True)

    @intrinsic
    def store_chunk(typingctx: Any, first: Any, second: Any, words: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            given = unpack(builder, args[2], 4)
            for address, two in ((args[0], given[:2]), (args[1], given[2:])):
                wide = [x for word in two for x in widen(builder, word)]
                emit(builder, VOID, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}", [address, *wide])
            return context.get_dummy_value()
        return signature(types.none, types.int32, types.int32, words), generate
    return store_chunk
