"""Calls with a score_mod or a mask_mod, without a GPU: functions as a gallery, calls that are addresses only, emulated calls."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn import gpu
from fastattn.arrays.view import ITEMSIZE, View, contiguous, numpy_dtype
from fastattn.dispatch import read
from fastattn.flex.operands import Flex, FlexOperands, Functions
from fastattn.flex.ops import FLOAT, kind_of
from fastattn.flex.trace import trace
from fastattn.gpu.spec import AnyCall, BackwardCall, Call, Spec, make_backward_spec, make_spec
from fastattn.options import read_options
from fastattn.problem import Grads, Operands, make_problem, problem_of
from tests.tools.gpu import interpreter_tiles
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Memory, emulated

HERE = ("cuda", 0)


@dataclass(frozen=True)
class Mod:
    """A function with the dtypes and shapes of its arrays; `H`, `B`, `S` in a shape stand for heads, batch and keys."""

    function: Callable[..., Any]
    arrays: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def shapes(self, batch: int, heads: int, keys: int) -> list[tuple[str, tuple[int, ...]]]:
        known = {"B": batch, "H": heads, "S": keys}
        return [(dtype, tuple(known.get(n, n) for n in shape)) for dtype, shape in self.arrays]

    def program(self, mask: bool) -> Any:
        return trace(self.function, [(dtype, len(shape)) for dtype, shape in self.arrays], mask)


SCORES = {
    "alibi": Mod(lambda s, b, h, q, k, slopes: s - slopes[h] * abs(q - k), (("float32", ("H",)),)),
    "softcap": Mod(lambda s, b, h, q, k: 20 * np.tanh(s / 20)),
    "relative": Mod(lambda s, b, h, q, k, table: s + table[h, np.clip(q - k + 32, 0, 63)], (("float32", ("H", 64)),)),
    "swin": Mod(lambda s, b, h, q, k, table: s + table[h, (q // 7 - k // 7 + 6) * 13 + q % 7 - k % 7 + 6], (("bfloat16", ("H", 169)),)),
    "gated": Mod(lambda s, b, h, q, k, gate, shift: np.where(q >= k, s * gate[h], s) + shift[b, k],
                 (("float32", ("H",)), ("float16", ("B", "S")))),
}
MASKS = {
    "causal": Mod(lambda b, h, q, k: q >= k),
    "sliding": Mod(lambda b, h, q, k: (q >= k) & (q - k <= 1024)),
    "dilated": Mod(lambda b, h, q, k: (q >= k) & ((q - k) % 4 == 0)),
    "document": Mod(lambda b, h, q, k, doc: (doc[b, q] == doc[b, k]) & (q >= k), (("int32", ("B", "S")),)),
    "prefix": Mod(lambda b, h, q, k, prefix: (k < prefix[b]) | (q >= k), (("int32", ("B",)),)),
    "natten": Mod(lambda b, h, q, k: (abs(q // 64 - k // 64) <= 6) & (abs(q % 64 - k % 64) <= 6)),
    "tree": Mod(lambda b, h, q, k, sees: sees[q, k] | (k < 8), (("bool", (64, 64)),)),
    "local_global": Mod(lambda b, h, q, k, local: (q >= k) & ((q - k < 256) | ~local[h]), (("bool", ("H",)),)),
}


NO_OPTIONS: dict[str, Any] = {"causal": False, "window": None, "softmax_scale": None, "softcap": None, "dropout_p": 0.0, "seed": None,
                              "offset": 0}


def _view(dtype: str, shape: tuple[int, ...], at: int = 1 << 20) -> View:
    return View(at, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, HERE)


def flex_of(score: Mod | None, mask: Mod | None, batch: int, heads: int, keys: int) -> FlexOperands:
    """The operands of functions whose arrays are addresses only."""
    flex = Flex(score and score.program(False), mask and mask.program(True))
    of_score, of_mask = (() if mod is None else tuple(_view(*x) for x in mod.shapes(batch, heads, keys)) for mod in (score, mask))
    return FlexOperands(flex, of_score, (), of_mask, (), names=tuple(f"captured[{n}]" for n in range(len(of_score))))


def call_of(score: Mod | None, mask: Mod | None, *, backward: bool = False, dtype: str = "bfloat16", head_dim: int = 128,
            seqlen: int = 4096, batch: int = 2, heads: int = 4, heads_k: int | None = None, captured: bool = True,
            few: int | None = None, deterministic: bool = False, **options: Any) -> tuple[AnyCall, Spec]:
    """A dense call that is addresses only, and its Spec. few: query rows, where they are not as many as keys."""
    rows, keys = _view(dtype, (batch, few or seqlen, heads, head_dim)), _view(dtype, (batch, seqlen, heads_k or heads, head_dim))
    o = Operands(rows, keys, keys, flex=flex_of(score, mask, batch, heads, seqlen))
    problem, o = make_problem("test", o, packed=False, **options)
    lse = _view(problem.lse_dtype, problem.lse_shape)
    if not backward:
        return (call := Call(problem, o, rows, lse)), make_spec(call.problem, call.operands, True)
    assert o.flex is not None
    grads = [_view(x.dtype, x.shape) if kind_of(x.dtype) == FLOAT else None for x in o.flex.score_arrays] if captured else None
    made = BackwardCall(problem, o, rows, rows, lse, None, Grads(rows, keys, keys, None, None, grads and tuple(grads)), deterministic)
    return made, make_backward_spec(made)


# ---------------------------------------------------------------- calls whose kernels run in Python
def emulate(arrays: tuple[Any, ...], functions: Functions, *, lengths: tuple[Any, Any, Any] | None = None, bias: Any = None,
            sinks: Any = None, dout: Any = None, need_dbias: bool = False, deterministic: bool = False,
            **options: Any) -> tuple[Any, Any, Grads[Any], list[str]]:
    """(out, lse, gradients with those of captured arrays, kernels) of the kernels on plain threads. arrays: q, k, v in host memory."""
    layout, packed = ("bshd", False) if lengths is None else ("thd", True)
    _, o = read("attention", layout, None, arrays, (bias, None, None, sinks), lengths, None, functions)
    problem, o = problem_of("attention", o, read_options("attention", **NO_OPTIONS | options))
    assert problem.packed == packed and o.flex is not None
    out, lse = np.full(problem.out_shape, np.nan, arrays[0].dtype), np.full(problem.lse_shape, np.nan, problem.lse_dtype)
    call = Call(problem, o, host_view(out), host_view(lse))
    with _memory(call.views, o) as memory, emulated(memory) as machine:
        gpu.family("simt").prepare(call, make_spec(problem, o, True), machine.launcher())(call, 0)
    launched = list(machine.launched)
    given = [np.full(x.shape, np.nan, x.dtype) for x in arrays]
    dbias = np.full((1,) * (4 - bias.ndim) + bias.shape, np.nan, bias.dtype) if need_dbias else None
    dsinks = None if sinks is None else np.full_like(sinks, np.nan)
    captured = tuple([np.full(x.shape, np.nan, numpy_dtype(x.dtype)) if kind_of(x.dtype) == FLOAT else None for x in o.flex.score_arrays])
    grads = Grads(*given, dbias, dsinks, captured)
    views = Grads(*(host_view(x) for x in grads), tuple([host_view(x) for x in captured]))
    back = BackwardCall(problem, o, host_view(dout), call.out, call.lse, None, views, deterministic)  # type: ignore[arg-type]
    with _memory([*back.views, *views.dcaptured], o) as memory, emulated(memory) as machine:
        gpu.family("simt").backward(back, make_backward_spec(back), machine.launcher(), 0)
    return out, lse, grads, launched + machine.launched


@contextmanager
def _memory(views: list[Any], o: Operands) -> Iterator[Memory]:
    memory = Memory()
    assert o.flex is not None
    for x in (*views, *o.flex.views.values()):
        if x is None or isinstance(x, View):
            memory.allow(x)
    yield memory


# ---------------------------------------------------------------- calls whose kernels run from their PTX
def interpret(arrays: tuple[Any, ...], functions: Functions, family: str, *, dout: Any = None, arch: str = "sm_80",
              deterministic: bool = False, **options: Any) -> tuple[Any, Any, Any, list[str]]:
    """(out, lse, [dq, dk, dv, *gradients of captured arrays], kernels) of a family on dense arrays. No dout: no gradients."""
    memory = interpreter_tiles.Memory()
    _, o = read("attention", "bshd", None, arrays, (None, None, None, None), None, None, functions)

    def placed(x: View) -> View:
        return memory.place(x.numpy(), x)
    assert o.flex is not None
    flex = replace(o.flex, score_arrays=tuple(map(placed, o.flex.score_arrays)), mask_arrays=tuple(map(placed, o.flex.mask_arrays)))
    o = replace(o, q=placed(o.q), k=placed(o.k), v=placed(o.v), flex=flex)
    problem, o = problem_of("attention", o, read_options("attention", **NO_OPTIONS | options))

    def empty(shape: tuple[int, ...], dtype: Any) -> tuple[View, Any]:
        return placed(host_view(np.full(shape, np.nan, dtype))), dtype
    (out, kind), (lse, _) = empty(problem.out_shape, arrays[0].dtype), empty(problem.lse_shape, np.float32)
    launcher = interpreter_tiles.Launcher(memory, arch)
    call = Call(problem, o, out, lse)
    gpu.family(family).prepare(call, make_spec(problem, o, True), launcher)(call, 0)
    if dout is None:
        return memory.read(out, kind), memory.read(lse, np.float32), [], launcher.launched
    results = [empty(x.shape, x.dtype) for x in arrays]
    captured = [empty(x.shape, numpy_dtype(x.dtype)) if kind_of(x.dtype) == FLOAT else None for x in flex.score_arrays]
    grads = Grads(*(x for x, _ in results), None, None, tuple([x and x[0] for x in captured]))
    back = BackwardCall(problem, o, placed(host_view(dout)), out, lse, None, grads, deterministic)
    gpu.family(family).backward(back, make_backward_spec(back), launcher, 0)
    found = [memory.read(x, dtype) for x, dtype in (*results, *(x for x in captured if x is not None))]
    return memory.read(out, kind), memory.read(lse, np.float32), found, launcher.launched
