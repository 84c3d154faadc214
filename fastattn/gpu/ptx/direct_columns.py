"""direct.py with the products transposed, for 8 rows at most: S^T = K Q^T and O^T = V^T P^T. Queries are the columns of an MMA, not half of
its 16 rows. So O and S take half the registers, and a product half the MMAs.

An MMA has 16 keys in any order. Rows g and g + 8 of MMA u are keys first_key(g) + 8 u and the one behind it, so that a lane's keys
lie to each other as those of a fragment's columns (tile/fragments.py):

    K       chunks c, c + 4, ... of keys first_key(g) + 8 u + (0, 1)
    V       chunks g, g + 8, ... of keys first_key(2 c) + 8 u + (0, 2, 1, 3): rows 2 c, 2 c + 1, 2 c + 8, 2 c + 9. Elements 2 j and 2 j + 1
            of a chunk are the lane's two rows of MMA j
    S, O    a lane's fragments, of queries 2 c and 2 c + 1: registers in the order of a fragment's, whose rows they are

P^T is transposed back to operands by movmatrix.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numba import int32
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, emit, literals, pack, unpack
from ..dsl.inline import inline
from .direct import Q_STEP, load_operand, make_load, store_operand
from .matrix import emit_transpose
from .memory import emit_store_shared_vector
from .mma import multiply


def make_first_key(KEYS: int) -> Any:
    """first_key(g): the first key of rows g and g + 8 of the MMAs of a step of KEYS keys."""
    @inline
    def first_key(g):
        return int32(2 * (g & 3) + (KEYS // 2) * (g >> 2))
    return first_key


def _rows_of(count: int) -> list[int]:
    """The keys of K that a lane loads of `count`, counted from first_key(g)."""
    return [8 * u + k for u in range(count // 16) for k in (0, 1)]


def _keys_of(count: int) -> list[int]:
    """The keys of V that a lane loads of `count`, counted from first_key(2 c)."""
    return [8 * u + k for u in range(count // 16) for k in (0, 2, 1, 3)]


def make_loads(once: bool) -> tuple[Any, Any]:
    """direct.make_loads of K and V for these products: `row` is the first key plus first_key."""
    return make_load(_rows_of, 4, once), make_load(_keys_of, 8, once)


def _swapped(x: list[Any]) -> list[Any]:
    """Registers of an MMA in the order of a fragment, and back."""
    return [x[0], x[2], x[1], x[3]]


@intrinsic
def by_key(typingctx: Any, acc: Any) -> Any:
    """A fragment with the two rows of each key beside each other."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = unpack(builder, args[0], acc.count)
        return pack(builder, [y for k in range(0, acc.count, 4) for y in _swapped(x[k:k + 4])])
    return signature(acc, acc), generate


def make_products(dtype: str) -> tuple[Any, Any]:
    """(qk, pv) for 8 rows of a 16-bit dtype.

    acc_s = qk(acc_s, q, k): q from direct's load_rows, the lane's row g
    acc_o = pv(acc_o, p, v): p packed, of by_key
    """
    @intrinsic
    def qk(typingctx: Any, acc: Any, q: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words = unpack(builder, args[1], q.count)
            pairs = [words[at:at + 2] for at in range(0, q.count, 2)]
            return _scores(builder, dtype, args[0], acc.count, args[2], k.count, pairs)
        return signature(acc, acc, q, k), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, probabilities, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
            of_row = acc.count // 4         # words of a lane's chunks of a key
            for u in range(p.count // 2):
                b = [emit_transpose(builder, x) for x in probabilities[2 * u:2 * u + 2]]
                rows = [words[(4 * u + r) * of_row:(4 * u + r + 1) * of_row] for r in range(4)]
                for n in range(of_row):
                    a = [emit(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [rows[r][n], rows[r + 1][n]], False)
                         for r in (0, 2) for selector in (0x5410, 0x7632)]
                    registers[4 * n:4 * n + 4] = _swapped(multiply(builder, dtype, _swapped(registers[4 * n:4 * n + 4]), a, b))
            return pack(builder, registers)
        return signature(acc, acc, p, v), generate
    return qk, pv


def make_kept(dtype: str) -> tuple[Any, Any]:
    """(keep_q, qk) where registers do not hold Q: see direct.make_kept. Q_STEP bytes for every chunk of a lane."""
    @intrinsic
    def keep_q(typingctx: Any, address: Any, q: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words = unpack(builder, args[1], q.count)
            for at in range(0, q.count, 4):
                store_operand(builder, args[0], Q_STEP * (at // 4), words[at:at + 4])
            return context.get_dummy_value()
        return signature(types.none, types.int32, q), generate

    @intrinsic
    def qk(typingctx: Any, acc: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def pairs() -> Iterable[list[Any]]:
                for chunk in range(k.count // (acc.count // 2) // 4):
                    words = load_operand(builder, args[1], Q_STEP * chunk)
                    yield from (words[:2], words[2:])
            return _scores(builder, dtype, args[0], acc.count, args[2], k.count, pairs())
        return signature(acc, acc, types.int32, k), generate
    return keep_q, qk


def _scores(builder: Any, dtype: str, acc: Any, count: int, k: Any, words_k: int, pairs: Iterable[list[Any]]) -> Any:
    """acc + K Q^T. `pairs`: the operand of Q for each step of 16 columns."""
    registers, words, of_row = unpack(builder, acc, count), unpack(builder, k, words_k), words_k // (count // 2)
    for step, b in enumerate(pairs):
        for u in range(count // 4):
            first, second = (words[(2 * u + r) * of_row + 2 * step:(2 * u + r) * of_row + 2 * step + 2] for r in range(2))
            a = [first[0], second[0], first[1], second[1]]
            registers[4 * u:4 * u + 4] = _swapped(multiply(builder, dtype, _swapped(registers[4 * u:4 * u + 4]), a, b))
    return pack(builder, registers)


@intrinsic
def store_output(typingctx: Any, acc: Any, address: Any, pitch: Any) -> Any:
    """acc_o of pv as float32 rows to shared memory. address: of column 8 g in the lane's row 2 c. pitch: bytes between rows."""
    [row_bytes] = literals(pitch)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = [builder.bitcast(x, F32) for x in unpack(builder, args[0], acc.count)]
        for n in range(0, acc.count, 8):            # two MMAs: four columns
            for row in range(2):
                values = [registers[n + k + 2 * row + column] for k in (0, 4) for column in range(2)]
                emit_store_shared_vector(builder, args[1], row * row_bytes + 256 * (n // 16) + 16 * (n // 8 % 2), values)
        return context.get_dummy_value()
    return signature(types.none, acc, types.int32, pitch), generate
