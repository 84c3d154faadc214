"""What the lines of a traced function become in a kernel: operations on int32, bool and floating point numbers.

A line's operands have one kind. Every function here is pure: equal lines are computed once, and ptxas may move them. None has a branch.
Integers are int32 and wrap; Numba's own operators would make int64 of them. The names are looked up by staged.py.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, I64, intrinsic_of


@intrinsic
def select(typingctx: Any, condition: Any, x: Any, y: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)
    return signature(x, types.boolean, x, x), generate


@intrinsic
def divided(typingctx: Any, x: Any, y: Any) -> Any:
    """x / y of floating point numbers, correctly rounded. Numba's `/` has a branch for y = 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fdiv(*args)
    return signature(x, x, x), generate


@intrinsic
def below(typingctx: Any, x: Any, y: Any) -> Any:
    """x < y of int32 without signs."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("<", *args)
    return signature(types.boolean, types.int32, types.int32), generate


@intrinsic
def inverted(typingctx: Any, x: Any) -> Any:
    """not x of a bool."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.xor(args[0], ir.Constant(args[0].type, 1))
    return signature(types.boolean, types.boolean), generate


def _clipped(builder: Any, index: Any, count: Any, SIGNED: bool) -> Any:
    last = builder.sub(count, I32(1))
    if SIGNED:
        index = builder.select(builder.icmp_signed("<", index, I32(0)), I32(0), index)
    return builder.select(builder.icmp_unsigned("<", index, last), index, last)


def _element_of(SIGNED: bool) -> Any:
    @intrinsic
    def element_of(typingctx: Any, pointer: Any, by: Any, index: Any, count: Any) -> Any:
        """pointer + index * by, where the index is cut to [0, count): a function may ask for any, and rows past the end do. An int32 `by`
        makes one instruction of the product."""
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer, by, index, count = args
            wide = by if by.type == I64 else builder.sext(by, I64)
            return builder.add(pointer, builder.mul(builder.sext(_clipped(builder, index, count, SIGNED), I64), wide))
        return signature(types.uint64, types.uint64, by if by == types.int32 else types.int64, types.int32, types.int32), generate
    return element_of


element_of, element_of_natural = _element_of(True), _element_of(False)      # natural: the index is known to be no less than 0


def _integer(op: Callable[..., Any], count: int = 2) -> Any:
    """An intrinsic of `count` int32 that gives an int32."""
    names = ("x", "y")[:count]

    def typing(typingctx: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return op(builder, *args)
        return signature(types.int32, *[types.int32] * count), generate
    return intrinsic_of(typing, names)


def _quotient(b: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """(x / y rounded to 0, the rest, whether the rest has not y's sign), 0 for y = 0. y becomes 1 where LLVM defines nothing, as for
    -2**31 / -1."""
    none = b.icmp_signed("==", y, I32(0))
    over = b.and_(b.icmp_signed("==", y, I32(-1)), b.icmp_signed("==", x, I32(-(2**31))))
    y = b.select(b.or_(none, over), I32(1), y)
    q, r = b.select(none, I32(0), b.sdiv(x, y)), b.srem(x, y)
    return q, r, b.and_(b.icmp_signed("!=", r, I32(0)), b.icmp_signed("<", b.xor(r, y), I32(0)))


def _floordiv(b: Any, x: Any, y: Any) -> Any:
    q, _, off = _quotient(b, x, y)
    return b.sub(q, b.zext(off, I32))


def _mod(b: Any, x: Any, y: Any) -> Any:
    _, r, off = _quotient(b, x, y)          # of y = 0: x % 1 is 0
    return b.add(r, b.select(off, y, I32(0)))


def _shift(method: str) -> Callable[..., Any]:
    """A shift by 0 to 31; by more, all bits are out."""
    def shift(b: Any, x: Any, y: Any) -> Any:
        far = b.icmp_unsigned(">", y, I32(31))
        if method == "ashr":
            return b.ashr(x, b.select(far, I32(31), y))
        return b.select(far, I32(0), b.shl(x, b.select(far, I32(0), y)))
    return shift


def _plain(method: str) -> Callable[..., Any]:
    return lambda b, x, y: getattr(b, method)(x, y)


INTEGERS: dict[str, Any] = {
    **{name: _integer(_plain(method)) for name, method in
       (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("and", "and_"), ("or", "or_"), ("xor", "xor"))},
    "shl": _integer(_shift("shl")), "shr": _integer(_shift("ashr")), "floordiv": _integer(_floordiv), "mod": _integer(_mod),
    "floordiv_natural": _integer(_plain("udiv")), "mod_natural": _integer(_plain("urem")),
    "min": _integer(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y)),
    "max": _integer(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y)),
    "neg": _integer(lambda b, x: b.sub(I32(0), x), 1), "not": _integer(lambda b, x: b.xor(x, I32(-1)), 1),
    "abs": _integer(lambda b, x: b.select(b.icmp_signed("<", x, I32(0)), b.sub(I32(0), x), x), 1),      # one instruction
}


@intrinsic
def flag(typingctx: Any, x: Any) -> Any:
    """int32 of a bool."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(args[0], I32)
    return signature(types.int32, types.boolean), generate


@intrinsic
def as_bool(typingctx: Any, x: Any) -> Any:
    """x != 0 of an int32."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], I32(0))
    return signature(types.boolean, types.int32), generate
