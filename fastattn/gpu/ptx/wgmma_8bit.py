"""wgmma on 8-bit floats, sums float32 (PTX ISA 9.7.15): a step is 32 elements of 8 bits, and both operands in shared memory are K-major.

A step of 32 bytes is as long as one of 16 elements of 16 bits. Rows of shared operands are panels of 32, 64 or 128 bytes, swizzled over
their width. As the A operand in registers, a lane 4 g + c has elements 4 c to 4 c + 3 and 16 + 4 c to 16 + 4 c + 3 of a step, in rows g and
g + 8. An accumulator gives it columns 8 j + 2 c + {0, 1}. What is summed over may come in any order, so these become the A operand as they
are, and B has its rows in the order that KEY_OF says. The sums of the tensor cores keep some 14 bits.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, emit, emit_many, literals, pack, unpack

KIND = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
STEP = 32                   # bytes of a row that one instruction multiplies
# of 32 columns of an accumulator, the one at place p = 16 h + 4 c + 2 i + e of the A operand that is made of it
KEY_OF = tuple(8 * (2 * (p >> 4) + (p >> 1 & 1)) + 2 * (p >> 2 & 3) + (p & 1) for p in range(STEP))
_SWIZZLE = {128: 1, 64: 2, 32: 3}       # of the descriptor, by the width of a panel's rows in bytes


def make_descriptor(panel: int) -> Any:
    """k_major(address): descriptor of an operand in panels whose rows have `panel` bytes."""
    @intrinsic
    def k_major(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            start = builder.zext(builder.lshr(args[0], I32(4)), I64)
            return builder.or_(start, I64((_SWIZZLE[panel] << 62) | ((8 * panel >> 4) << 32) | (1 << 16)))
        return signature(types.uint64, types.int32), generate
    return k_major


def _multiply(builder: Any, kinds: tuple[str, str], acc: list[Any], a: list[Any], b: Any, add: Any) -> list[Any]:
    """acc (or 0, if `add` is a value that is 0) + A B for one step; A is a descriptor or four registers."""
    n, count = len(acc), len(a)
    at = 2 * n                     # the accumulators are numbered twice, as results and as operands
    registers = ", ".join(f"${k}" for k in range(n))
    first = f"${at}" if count == 1 else "{" + ", ".join(f"${at + k}" for k in range(4)) + "}"
    text = (f"{{ .reg .pred add; setp.ne.b32 add, ${at + count + 1}, 0;\n"
            f"wgmma.mma_async.sync.aligned.m64n{2 * n}k32.f32.{KIND[kinds[0]]}.{KIND[kinds[1]]} {{{registers}}}, {first}, ${at + count}, "
            "add, 1, 1; }")
    kinds_of = ["l" if count == 1 else "r"] * count + ["l", "n" if add is None else "r"]
    constraints = ",".join(["=f"] * n + [str(k) for k in range(n)] + kinds_of)
    return emit_many(builder, F32, text, constraints, acc, [*a, b, I32(1) if add is None else add])


def _offset(k: int, rows: int, panel: int) -> int:
    """Of step k, in units of 16 bytes."""
    return (STEP * k // panel * rows * panel + STEP * k % panel) >> 4


def make_qk(dtype_q: str, dtype_k: str, panel: int) -> Any:
    """qk of operands in panels whose rows have `panel` bytes."""
    @intrinsic
    def qk(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, a_rows: Any, b_rows: Any, add: Any) -> Any:
        """A (64 x depth) B (N x depth)^T, both in shared memory, in panels of `a_rows` and `b_rows` rows; added to acc (64 x N) unless
        `add` is 0. Where the compiler does not know that, the result is in the registers of acc."""
        d, rows_a, rows_b = literals(depth, a_rows, b_rows)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            for k in range(d // STEP):
                at = [builder.add(x, I64(_offset(k, rows, panel))) for x, rows in ((args[1], rows_a), (args[2], rows_b))]
                registers = _multiply(builder, (dtype_q, dtype_k), registers, at[:1], at[1], args[6] if k == 0 else None)
            return pack(builder, registers)
        return signature(acc, acc, types.uint64, types.uint64, depth, a_rows, b_rows, types.int32), generate
    return qk


def make_pv(dtype_v: str, panel: int) -> Any:
    """pv of B in panels whose rows have `panel` bytes."""
    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, b: Any, rows: Any, add: Any) -> Any:
        """P (64 x depth, registers, e4m3) B (N x depth)^T, in panels of `rows` rows, of which B may be some; added to acc (64 x N) unless
        `add` is 0. Not many times: sums of 8-bit products lose 5e-4 of a positive sum a step of 32."""
        [panel_rows] = literals(rows)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a = unpack(builder, args[0], acc.count), unpack(builder, args[1], p.count)
            for k in range(p.count // 4):
                at = builder.add(args[2], I64(_offset(k, panel_rows, panel)))
                registers = _multiply(builder, ("float8_e4m3fn", dtype_v), registers, a[4 * k:4 * k + 4], at, args[4] if k == 0 else None)
            return pack(builder, registers)
        return signature(acc, acc, p, types.uint64, rows, types.int32), generate
    return pv


def _pack4(builder: Any, x: list[Any]) -> Any:
    text = "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }"
    return emit(builder, I32, text, "=r,f,f,f,f", x, side_effect=False)


@intrinsic
def to_e4m3(typingctx: Any, acc: Any) -> Any:
    """An accumulator as the A operand of pv, its columns in the order KEY_OF. Larger numbers than 448 become 448."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[0], acc.count)
        first = [u + half + row for u in range(0, acc.count, 16) for half in (0, 8) for row in (0, 2)]
        return pack(builder, [_pack4(builder, [x[j], x[j + 1], x[j + 4], x[j + 5]]) for j in first])
    return signature(types.UniTuple(types.int32, acc.count // 4), acc), generate


@intrinsic
def transpose_bytes(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """4 x 4 bytes: word i of the result has byte i of each of the four."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def permute(x: Any, y: Any, selector: int) -> Any:
            return emit(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [x, y], side_effect=False)
        low_ab, high_ab, low_cd, high_cd = (permute(args[x], args[y], selector)
                                            for x, y in ((0, 1), (2, 3)) for selector in (0x5140, 0x7362))
        return pack(builder, [permute(low_ab, low_cd, 0x5410), permute(low_ab, low_cd, 0x7632), permute(high_ab, high_cd, 0x5410),
                              permute(high_ab, high_cd, 0x7632)])
    word = types.int32
    return signature(types.UniTuple(word, 4), word, word, word, word), generate
