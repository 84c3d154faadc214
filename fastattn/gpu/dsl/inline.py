"""`inline`: a helper that becomes part of the kernel that calls it. `divide`: 32-bit division; Numba's // uses 64 bits.

A helper is typed and lowered once for each list of argument types, into the kernel's own module, and LLVM's optimizer
inlines it. Numba's own inline="always" copies the callee at every call instead, which doubles the compile time
(docs/performance.md, "Compile time"). A device function of Numba's needs a driver. Everything that depends on Numba's
internals is in this file.

A helper gives its conditional expressions names before its return, and before a call that it ends with. Python 3.12 compiles
`return f(x if c else y)` to two returns, each with a call of f, and a last statement `f(x if c else y)` to two, too; LLVM does
not merge calls that end in inline assembly.
"""
from __future__ import annotations

import inspect
import itertools
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.compiler import CUDABytecodeInterpreter
from numba.cuda.core import interpreter, typed_passes, untyped_passes
from numba.cuda.core.bytecode import FunctionIdentity
from numba.cuda.core.callconv import CUDACABICallConv
from numba.cuda.core.compiler import StateDict, _CompileStatus, _make_subtarget
from numba.cuda.core.funcdesc import PythonFunctionDescriptor
from numba.cuda.core.rewrites.static_getitem import RewriteConstGetitems
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.descriptor import cuda_target
from numba.cuda.extending import intrinsic
from numba.cuda.lowering import CUDALower
from numba.cuda.typing import signature

from .asm import intrinsic_of

_numbers = itertools.count()


class _Convention(CUDACABICallConv):  # type: ignore[misc]
    """Calling convention: arguments and the result are plain values, also tuples. No pointers and no status that the
    optimizer would have to remove."""

    def get_function_type(self, restype: Any, argtypes: Any) -> Any:
        return ir.FunctionType(self.get_return_type(restype), [self.context.get_value_type(t) for t in argtypes])

    def decorate_function(self, fn: Any, args: Any, fe_argtypes: Any, noalias: bool = False) -> None:
        pass

    def decode_arguments(self, builder: Any, argtypes: Any, func: Any) -> Any:
        return func.args

    def return_value(self, builder: Any, retval: Any) -> None:
        builder.ret(retval)

    def return_user_exc(self, builder: Any, *exception: Any, **where: Any) -> None:
        builder.unreachable()       # an index out of a tuple, a range with step 0


class _Module:
    """In place of Numba's library of code: all helpers of a kernel go into the kernel's module."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def create_ir_module(self, name: str) -> Any:
        return self.module

    def add_ir_module(self, module: Any) -> None:
        pass


class _Typing:
    """Numba's typing context with a cache of the signature for a function and its argument types.

    A kernel has thousands of calls of some hundred kinds, and each look-up goes through NumPy's rules for an operator,
    or all of Numba's registries for an intrinsic. Cached on the type object, because lowering reads state from that
    object and equal type objects do not share it.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda_target.typing_context, name)

    def resolve_function_type(self, function: Any, arguments: Any, keywords: Any) -> Any:
        resolve = cuda_target.typing_context.resolve_function_type
        if keywords or not isinstance(function, types.Type):
            return resolve(function, arguments, keywords)
        known = vars(function).setdefault("_fastattn_found", {})
        found = known.get(arguments)
        if found is None:
            found = known[arguments] = resolve(function, arguments, keywords)
        return found


_TYPING = _Typing()


class _Lower(CUDALower):  # type: ignore[misc]
    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        """Without debug information of the variable, whose size costs LLVM a parse of a module."""
        return cgutils.alloca_once(self.builder, lltype, name=name)

    def lower_binop(self, resty: Any, expr: Any, op: Any) -> Any:
        """Without the look-up of special cases for constant operands, which only powers have."""
        op = self.context.typing_context.resolve_value_type(op)
        sig = _TYPING.resolve_function_type(op, self.fndesc.calltypes[expr].args, {})
        operands = [self.context.cast(self.builder, self.loadvar(x.name), self.typeof(x.name), t)
                    for x, t in zip((expr.lhs, expr.rhs), sig.args, strict=True)]
        return self.context.cast(self.builder, self.context.get_function(op, sig)(self.builder, operands), sig.return_type, resty)


class _Interpreter(CUDABytecodeInterpreter):  # type: ignore[misc]
    def post_process(self, peepholes: Any, func_ir: Any) -> Any:
        """Only what f(*a) and (*a, b) need."""
        return interpreter.peep_hole_call_function_ex_to_call_function_kw(interpreter.peep_hole_list_to_tuple(func_ir))


def _compile(state: Any) -> None:
    """Bytecode to typed instructions: only the passes of Numba that change anything here.

    Helpers contain no inner functions, `with`, raises, array expressions or unrolled literals, and lifetimes of
    variables are not needed.
    """
    untyped_passes.ExtractByteCode().run_pass(state)
    state.func_ir = _Interpreter(state.func_id).interpret(state.bc)
    untyped_passes.FixupArgs().run_pass(state)
    untyped_passes.rewrite_semantic_constants(state.func_ir, state.args)
    untyped_passes.dead_branch_prune(state.func_ir, state.args)
    rewrite, blocks = RewriteConstGetitems(), state.func_ir.blocks
    for label, block in blocks.items():
        if rewrite.match(state.func_ir, block, None, None):
            blocks[label] = rewrite.apply()
    state.func_ir = untyped_passes.reconstruct_ssa(state.func_ir)
    state.func_ir._definitions = untyped_passes.build_definitions(state.func_ir.blocks)
    typed_passes.NopythonTypeInference().run_pass(state)
    state.func_ir = typed_passes.PreLowerStripPhis()._strip_phi_nodes(state.func_ir)


class Compiled:
    """A Python function for one list of argument types. `result` is its type, inferred if None."""

    def __init__(self, function: Any, arguments: Any, result: Any = None) -> None:
        self._given = function, arguments, result
        self._name = f"{function.__name__.strip('<>')}.{next(_numbers)}"
        self._state = self._typed()
        self.result = self._state.return_type

    def _typed(self) -> Any:
        function, arguments, result = self._given
        flags = ConfigStack().top()
        state = StateDict(typingctx=_TYPING, targetctx=_make_subtarget(cuda_target.target_context, flags), flags=flags, locals={},
                          func_id=FunctionIdentity.from_function(function), args=arguments, return_type=result,
                          status=_CompileStatus(can_fallback=False))
        _compile(state)
        return state

    def call(self, builder: Any, arguments: Any) -> Any:
        """Emit a call. The first one in a module adds the function to it."""
        if self._name not in builder.module.globals:
            self._lower(builder.module)
        value = builder.call(builder.module.globals[self._name], arguments)
        return cuda_target.target_context.get_returned_value(builder, self.result, value)

    def _lower(self, module: Any) -> None:
        state, self._state = self._state or self._typed(), None     # a kernel needs it once, and it is large
        descriptor = PythonFunctionDescriptor.from_specialized_function(
            state.func_ir, state.typemap, state.return_type, state.calltypes, mangler=lambda *_, **__: self._name, inline=True,
            noalias=False, abi_tags=(), abi_info=None, call_conv=_Convention(state.targetctx))
        _Lower(state.targetctx, _Module(module), descriptor, state.func_ir).lower()
        module.globals[self._name].linkage = "internal"


def inline(function: Any) -> Any:
    """`function`, to be called by kernels and by other helpers."""
    def typing(typingctx: Any, *given: Any) -> Any:
        compiled = Compiled(function, given)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return compiled.call(builder, args)
        return signature(compiled.result, *given), generate
    typing.__name__ = function.__name__
    helper = intrinsic_of(typing, inspect.signature(function).parameters)
    helper.py_func = function
    return helper


def kernel_of(function: Any) -> Any:
    """A kernel of the same name that only calls `function` as a helper, with its one argument, a named tuple.

    Numba compiles a kernel's own code more slowly than a helper's; this way there is next to none.
    """
    body = inline(function)

    def kernel(a: Any) -> None:
        body(a)
    kernel.__module__, kernel.__qualname__ = function.__module__, function.__qualname__
    return kernel


@intrinsic
def divide(typingctx: Any, x: Any, y: Any) -> Any:
    """x // y of int32, x >= 0 and y > 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.udiv(*args)
    return signature(types.int32, types.int32, types.int32), generate
