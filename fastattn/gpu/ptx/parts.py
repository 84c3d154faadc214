"""A float32 as a sum of three bfloat16, its parts, so that tensor cores multiply float32 without loss.

    x = high + middle + low         8 bits each of the 24 of x. high is x cut off, so that it never overflows; the others are rounded
    x * y = six products            PAIRS; the three that are left out are below 2**-23 of x * y

Each product of two parts is exact in float32. The sum of a dot product is rounded as tensor cores round it: towards zero, once an MMA.
So small products come first, and long sums are not left to tensor cores.
"""
from __future__ import annotations

from typing import Any

from ..dsl.asm import F32, I32, emit
from .arith import emit_pack_half

PARTS = 3
PART_DTYPE = "bfloat16"
PAIRS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))       # parts of the two factors, smallest products first
# of y * x, in the order of x * y. A backward's S^T = K Q^T then has the bits of the forward's S = Q K^T, which its lse belongs to
SWAPPED = tuple([(b, a) for a, b in PAIRS])


def _upper(builder: Any, bits: Any) -> Any:
    """The float32 of the upper 16 bits of a word."""
    return builder.bitcast(builder.and_(bits, I32(-65536)), F32)


def _lower(builder: Any, bits: Any) -> Any:
    """The float32 of the lower 16 bits of a word."""
    return builder.bitcast(builder.shl(bits, I32(16)), F32)


def emit_parts(builder: Any, x: Any, y: Any, any_value: bool = False) -> list[Any]:
    """The parts of two neighbours, each a word with the part of x in its lower half.

    `any_value`: infinities, too, are right: their other parts are 0. NaN always is.
    """
    bits = [builder.bitcast(z, I32) for z in (x, y)]
    high = emit(builder, I32, "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", bits, side_effect=False)
    rest = [builder.fsub(z, _upper(builder, b)) for z, b in zip((x, y), bits, strict=True)]
    if any_value:
        infinite = [builder.icmp_signed("==", builder.and_(b, I32(0x7FFFFFFF)), I32(0x7F800000)) for b in bits]
        rest = [builder.select(i, F32(0.0), z) for i, z in zip(infinite, rest, strict=True)]
    middle = emit_pack_half(builder, rest[0], rest[1], PART_DTYPE)
    left = builder.fsub(rest[0], _lower(builder, middle)), builder.fsub(rest[1], _upper(builder, middle))
    return [high, middle, emit_pack_half(builder, left[0], left[1], PART_DTYPE)]
