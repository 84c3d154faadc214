"""How a PTX instruction becomes a function that kernels call: Numba intrinsics over LLVM inline assembly.

A register fragment is a homogeneous tuple, which is an SSA value: it cannot end up in local memory. Intrinsics get and
return whole fragments, and unroll their loops while they build the IR.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import RequireLiteralValue
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

I1, I16, I32, I64, F32, F64, VOID = (ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType(),
                                     ir.VoidType())
_OPERANDS = {"r": (types.int32, I32), "l": (types.uint64, I64), "f": (types.float32, F32), "d": (types.float64, F64)}


def emit(builder: Any, result: Any, text: str, constraints: str, operands: list[Any], side_effect: bool = True) -> Any:
    """One inline assembly call with the types of `operands`."""
    function = ir.FunctionType(result, [x.type for x in operands])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=side_effect), operands)


def instruction(text: str, operands: str = "", result: str = "", pure: bool = False) -> Any:
    """An intrinsic that is one PTX instruction.

    Parameters
    ----------
    text
        The instruction. $0 is the result if there is one, then the operands follow.
    operands, result
        Constraint letters: r int32, l uint64, f float32, d float64.
    pure
        The compiler may move or drop it. Otherwise it stays in order with memory accesses.
    """
    accepted = [_OPERANDS[c][0] for c in operands]
    numba_result, llvm_result = _OPERANDS[result] if result else (types.none, VOID)
    constraints = ",".join([f"={result}"] * bool(result) + list(operands) + ["~{memory}"] * (not pure))

    def typing(typingctx: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, llvm_result, text, constraints, list(args), side_effect=not pure)
            return value if result else context.get_dummy_value()
        return signature(numba_result, *accepted), generate
    return intrinsic_of(typing, [f"operand{k}" for k in range(len(operands))])


def intrinsic_of(typing: Any, names: Iterable[str]) -> Any:
    """An intrinsic with parameters of these names. Numba reads their number from the signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("typingctx", *names)])
    return intrinsic(typing)


def literals(*given: Any) -> list[int]:
    """Values of arguments that must be constants in the kernel's closure."""
    for x in given:
        if not isinstance(x, types.IntegerLiteral):
            raise RequireLiteralValue(x)
    return [x.literal_value for x in given]


def unpack(builder: Any, value: Any, count: int) -> list[Any]:
    """The registers of a fragment."""
    return [builder.extract_value(value, k) for k in range(count)]


def pack(builder: Any, registers: list[Any]) -> Any:
    """A fragment of these registers."""
    value = ir.Constant(ir.ArrayType(registers[0].type, len(registers)), ir.Undefined)
    for k, x in enumerate(registers):
        value = builder.insert_value(value, x, k)
    return value


def emit_many(builder: Any, kind: Any, text: str, constraints: str, tied: list[Any], operands: list[Any]) -> list[Any]:
    """One instruction that reads and writes the registers `tied`, all of type `kind`, and reads `operands`."""
    result = ir.LiteralStructType([kind] * len(tied))
    value = emit(builder, result, text, constraints, tied + operands)
    return [builder.extract_value(value, k) for k in range(len(tied))]
