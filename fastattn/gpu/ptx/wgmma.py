"""wgmma: a warpgroup multiplies 64 rows (PTX ISA 9.7.15), operands float16 or bfloat16, sums float32. Operands of float32 are three
bfloat16 parts (parts.py): as many panels for each part, one part after the other.

Shared operands are 128-byte swizzled panels of 64 elements (tile/smem.py). The accumulator of 64 x N gives a thread rows lane/4 and
lane/4 + 8 of its warp's 16, columns 8 j + 2 (lane % 4) + {0, 1}; packed to 16 bits it is the A operand of the next MMA.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, emit_many, instruction, literals, pack, unpack
from .parts import PAIRS, PART_DTYPE, PARTS, SWAPPED

KIND = {"float16": "f16", "bfloat16": "bf16"}
SWIZZLE_128B = 1 << 62
# before the first wgmma, and before each batch whose register operands were written since the last
fence = instruction("wgmma.fence.sync.aligned;")
commit = instruction("wgmma.commit_group.sync.aligned;")


def wait(pending: int) -> Any:
    """acc = wait(acc): until at most `pending` committed groups are in flight. The accumulator passes through, so that its uses stay behind
    the wait."""
    @intrinsic
    def wait_group(typingctx: Any, acc: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return pack(builder, _wait(builder, pending, unpack(builder, args[0], acc.count)))
        return signature(acc, acc), generate
    return wait_group


def _wait(builder: Any, pending: int, registers: list[Any]) -> list[Any]:
    n = len(registers)
    constraints = ",".join(["=f"] * n + [str(k) for k in range(n)] + ["~{memory}"])
    return emit_many(builder, F32, f"wgmma.wait_group.sync.aligned {pending};", constraints, registers, [])


wait_all, wait_all_but_one = wait(0), wait(1)
wait_all_but_two = wait(2)


def _descriptor(builder: Any, address: Any, leading: int) -> Any:
    start = builder.zext(builder.lshr(address, I32(4)), I64)
    return builder.or_(start, I64(SWIZZLE_128B | (64 << 32) | ((leading >> 4) << 16)))


@intrinsic
def k_major(typingctx: Any, address: Any) -> Any:
    """Descriptor of a K-major operand: the summed axis runs along the panels' rows of 128 bytes."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _descriptor(builder, args[0], 16)
    return signature(types.uint64, types.int32), generate


@intrinsic
def mn_major(typingctx: Any, address: Any, panel_bytes: Any) -> Any:
    """Descriptor of an MN-major operand: the other axis runs along the panels' rows. Panels are `panel_bytes` apart."""
    [panel] = literals(panel_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _descriptor(builder, args[0], panel)
    return signature(types.uint64, types.int32, panel_bytes), generate


def _multiply(builder: Any, dtype: str, acc: list[Any], a: list[Any], b: Any, clear: bool, transposed: tuple[int, int]) -> list[Any]:
    """acc (or 0, when `clear`) + A B for one step of 16; A is a descriptor or four registers."""
    n, count = len(acc), len(a)
    at = 2 * n                     # the accumulators are numbered twice, as results and as operands
    registers = ", ".join(f"${k}" for k in range(n))
    first = f"${at}" if count == 1 else "{" + ", ".join(f"${at + k}" for k in range(4)) + "}"
    flags = f"{transposed[0]}, {transposed[1]}" if count == 1 else f"{transposed[1]}"
    text = (f"{{ .reg .pred add; setp.ne.b32 add, ${at + count + 1}, 0;\n"
            f"wgmma.mma_async.sync.aligned.m64n{2 * n}k16.f32.{KIND[dtype]}.{KIND[dtype]} {{{registers}}}, {first}, ${at + count}, "
            f"add, 1, 1, {flags}; }}")
    constraints = ",".join(["=f"] * n + [str(k) for k in range(n)] + ["l" if count == 1 else "r"] * count + ["l", "n"])
    return emit_many(builder, F32, text, constraints, acc, [*a, b, I32(0 if clear else 1)])


def _make_qk(dtype: str, first: bool) -> Any:
    @intrinsic
    def qk(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, a_rows: Any, b_rows: Any) -> Any:
        """acc (64 x N) = A (64 x depth) B (N x depth)^T, both in shared memory, K-major, in panels of `a_rows` and `b_rows` rows."""
        d, rows_a, rows_b = literals(depth, a_rows, b_rows)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            for k in range(d // 16):
                at = [builder.add(x, I64((k // 4 * rows * 128 + k % 4 * 32) >> 4)) for x, rows in ((args[1], rows_a), (args[2], rows_b))]
                registers = _multiply(builder, dtype, registers, at[:1], at[1], first and k == 0, (0, 0))
            return pack(builder, registers)
        return signature(acc, acc, types.uint64, types.uint64, depth, a_rows, b_rows), generate
    return qk


def make_more_qk(dtype: str) -> Any:
    """`qk` of make_products for 16-bit `dtype`, but acc += A B^T: of further columns."""
    return _make_qk(dtype, False)


def make_products(dtype: str) -> tuple[Any, Any]:
    """(qk, pv) for a 16-bit `dtype`."""
    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, b: Any) -> Any:
        """acc (64 x N) += P (64 x depth, registers) B (depth x N, MN-major in shared memory)."""
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a = unpack(builder, args[0], acc.count), unpack(builder, args[1], p.count)
            for k in range(p.count // 4):
                rows = builder.add(args[2], I64(k * 2048 >> 4))
                registers = _multiply(builder, dtype, registers, a[4 * k:4 * k + 4], rows, False, (0, 1))
            return pack(builder, registers)
        return signature(acc, acc, p, types.uint64), generate

    return _make_qk(dtype, True), pv


@intrinsic
def kq_parts(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, a_rows: Any, b_rows: Any) -> Any:
    """qk of parts, of a product K Q^T: its pairs of parts come in the order of those of Q K^T."""
    d, rows_a, rows_b = literals(depth, a_rows, b_rows)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, panels = unpack(builder, args[0], acc.count), -(-d // 64)
        for n, pair in enumerate(SWAPPED):
            for k in range(d // 16):
                at = [builder.add(x, I64(((part * panels + k // 4) * rows * 128 + k % 4 * 32) >> 4))
                      for x, part, rows in zip(args[1:3], pair, (rows_a, rows_b), strict=True)]
                registers = _multiply(builder, PART_DTYPE, registers, at[:1], at[1], n + k == 0, (0, 0))
        return pack(builder, registers)
    return signature(acc, acc, types.uint64, types.uint64, depth, a_rows, b_rows), generate


@intrinsic
def pv_parts(typingctx: Any, acc: Any, p: Any, b: Any, part_bytes: Any) -> Any:
    """acc (64 x N) = P (64 x depth, registers) B (depth x N, MN-major) of float32, small products first. The caller adds it to a longer
    sum, rounded to nearest; tensor cores cut.

    p: the registers of each part, one part after the other. b: descriptor of the first part; they are `part_bytes` apart.
    """
    [apart] = literals(part_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, words, each = unpack(builder, args[0], acc.count), unpack(builder, args[1], p.count), p.count // PARTS
        for n, (part_a, part_b) in enumerate(PAIRS):
            for k in range(each // 4):
                rows, first = builder.add(args[2], I64((part_b * apart + k * 2048) >> 4)), part_a * each + 4 * k
                registers = _multiply(builder, PART_DTYPE, registers, words[first:first + 4], rows, n + k == 0, (0, 1))
        return pack(builder, registers)
    return signature(acc, acc, p, types.uint64, part_bytes), generate


@intrinsic
def dsk_parts(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, a_part: Any, b_part: Any) -> Any:
    """acc (64 x N) = A^T (64 x depth) B (depth x N) of float32, both MN-major, their parts `a_part` and `b_part` bytes apart."""
    d, apart_a, apart_b = literals(depth, a_part, b_part)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for n, pair in enumerate(PAIRS):
            for k in range(d // 16):
                at = [builder.add(x, I64((part * apart + k * 2048) >> 4))
                      for x, part, apart in zip(args[1:3], pair, (apart_a, apart_b), strict=True)]
                registers = _multiply(builder, PART_DTYPE, registers, at[:1], at[1], n + k == 0, (1, 1))
        return pack(builder, registers)
    return signature(acc, acc, types.uint64, types.uint64, depth, a_part, b_part), generate


def make_grad_products(dtype: str) -> tuple[Any, Any]:
    """(dsk, dsq) for 16-bit `dtype`."""
    @intrinsic
    def dsk(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any) -> Any:
        """acc (64 x N) = A^T (64 x depth) B (depth x N), both MN-major in shared memory: rows of a panel are the summed axis."""
        [d] = literals(depth)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            for k in range(d // 16):
                at = [builder.add(x, I64(k * 2048 >> 4)) for x in args[1:3]]
                registers = _multiply(builder, dtype, registers, at[:1], at[1], k == 0, (1, 1))
            return pack(builder, registers)
        return signature(acc, acc, types.uint64, types.uint64, depth), generate

    @intrinsic
    def dsq(typingctx: Any, acc: Any, a: Any, b: Any, depth: Any, a_rows: Any) -> Any:
        """acc (64 x N) += A (64 x depth, K-major in panels of `a_rows` rows) B (depth x N, MN-major), both in shared memory."""
        d, rows = literals(depth, a_rows)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            for k in range(d // 16):
                at_a = builder.add(args[1], I64((k // 4 * rows * 128 + k % 4 * 32) >> 4))
                at_b = builder.add(args[2], I64(k * 2048 >> 4))
                registers = _multiply(builder, dtype, registers, [at_a], at_b, False, (0, 1))
            return pack(builder, registers)
        return signature(acc, acc, types.uint64, types.uint64, depth, a_rows), generate
    return dsk, dsq
