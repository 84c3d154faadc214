"""Calls made without a GPU: arrays that are addresses only, and a backward whose kernels run in Python."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastattn import Grads, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import ITEMSIZE, View, contiguous
from fastattn.gpu.config import GROUP
from fastattn.gpu.decode import launch as decode
from fastattn.gpu.spec import BackwardCall, Call, make_backward_spec, make_spec
from fastattn.problem import Operands, Problem, make_problem
from tests.tools.gpu import interpreter
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import Case, Inputs

Sequence = tuple[int, int, int, int, int]       # plane, q_start, seqlen_q, k_start, seqlen_k


def view(*shape: int, ptr: int = 1 << 20, dtype: str = "bfloat16") -> View:
    return View(ptr, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, ("cuda", 0))


def whole(p: Problem) -> list[Sequence]:
    return [(batch, 0, p.seqlen_q, 0, p.seqlen_k) for batch in range(p.batch)]


def host_view(x: Any) -> Any:
    return None if x is None else convert.view(x, "test", "x")


def with_bounds(call: Any, mask: np.ndarray[Any, Any], block: int, memory: Memory, by_keys: bool = False) -> Any:
    """The call with the bounds of its boolean mask's blocks in place of the mask, as rows/mask_words.py lays them out; without words.

    mask: (batch, num_heads, rows, keys), or with one head for all.
    """
    lines = mask.swapaxes(2, 3) if by_keys else mask
    batch, heads, count, columns = lines.shape
    groups, found = range(0, count, GROUP), np.zeros((batch, heads, -(-count // GROUP), 2), np.int32)
    for b, h, n in np.ndindex(found.shape[:3]):
        used = np.flatnonzero(np.add.reduceat(lines[b, h, groups[n]:groups[n] + GROUP].any(axis=0), np.arange(0, columns, block)))
        found[b, h, -1 - n] = (used[0], used[-1] + 1) if len(used) else (1 << 30, 0)        # the first group's are the last
    x = host_view(found)
    memory.allow(x)
    memory.kept.append(found)
    plane = found[0, 0].nbytes
    strides = (plane * heads, plane * (heads > 1), *((0, 16) if by_keys else (16, 0)))
    return replace(call, operands=replace(call.operands, mask=View(x.ptr + plane, call.operands.mask.shape, strides, "int32")))


def run(inputs: Inputs) -> tuple[Grads, list[str]]:
    """The gradients that the simt kernels write, and the kernels."""
    swap, kwargs = inputs.kwargs.get("layout") == "bhsd", {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    out, lse = inputs.forward("reference")

    def canonical(x: Any) -> Any:
        return host_view(x.swapaxes(1, 2) if swap else x)
    arrays = {name: host_view(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    q, k, v = (canonical(x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": host_view(inputs.args[3]), "cu_seqlens_k": host_view(inputs.args[4])}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    grads = Grads(*(None if x is None else np.full(x.shape, np.nan, x.dtype)
                    for x in (*inputs.args[:3], inputs.kwargs.get("bias"), inputs.kwargs.get("sinks"))))
    dbias = None if grads.dbias is None else host_view(grads.dbias.reshape((1,) * (4 - grads.dbias.ndim) + grads.dbias.shape))
    places = Grads(canonical(grads.dq), canonical(grads.dk), canonical(grads.dv), dbias, host_view(grads.dsinks))
    call = BackwardCall(problem, o, canonical(inputs.dout), canonical(out), host_view(lse), host_view(inputs.dlse), places, False)
    memory = Memory()
    for x in (*(getattr(o, name) for name in o.__slots__), call.dout, call.out, call.lse, call.dlse, *places):
        memory.allow(x)
    with emulated(memory) as machine:
        gpu.family("simt").backward(call, make_backward_spec(call), machine.launcher(), 0)
    return grads, machine.launched


def interpreted(inputs: Inputs, arch: str = "sm_90a", family: str = "sm90") -> tuple[Any, Any, list[str]]:
    """(out, lse, kernels) of a forward whose kernels are run from their PTX (interpreter.py)."""
    swap, kwargs = inputs.kwargs.get("layout") == "bhsd", {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    memory = interpreter.Memory()

    def placed(x: Any) -> Any:
        return None if x is None else memory.place(x, convert.view(x, "test", "x"))
    arrays = {name: placed(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    q, k, v = (placed(x.swapaxes(1, 2) if swap else x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": placed(inputs.args[3]), "cu_seqlens_k": placed(inputs.args[4])}
        kwargs |= {f"max_seqlen_{side}": int(np.diff(cu).max(initial=0)) for side, cu in (("q", inputs.args[3]), ("k", inputs.args[4]))}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in
                ((problem.out_shape, inputs.args[0].dtype), (problem.lse_shape, np.float32)))
    launcher = interpreter.Launcher(memory, arch)
    with gpu.use(family):
        gpu.family(family).prepare(Call(problem, o, out, lse), make_spec(problem, o, True), launcher)(Call(problem, o, out, lse), 0)
    result = memory.read(out, inputs.args[0].dtype)
    return result.swapaxes(1, 2) if swap else result, memory.read(lse, np.float32), launcher.launched


def interpreted_cache(case: Case, page_size: int | None, lengths: list[int], new_keys: int = 0, num_splits: int | None = None,
                      stray: bool = False) -> tuple[Any, Any, Any, Any]:
    """(out, lse, k, v) of the split-key kernel over a cache, run from its PTX; k and v as they are read, (batch, keys, heads, dim).

    page_size: the keys are in shuffled pages; None: the cache has a row for each request. lengths: keys of each request but for the new
    ones. stray: the table names pages that do not exist where it is not needed, and for one that is.
    """
    inputs, memory, draw = case.make(), interpreter.Memory(), np.random.default_rng(1)
    kwargs = dict(inputs.kwargs)

    def placed(x: Any) -> Any:
        return None if x is None else memory.place(x, convert.view(x, "test", "x"))
    arrays = {name: placed(kwargs.pop(name, None)) for name in ("alibi_slopes", "sinks")}
    q, k, v = inputs.args
    problem, o = make_problem("test", Operands(*(placed(x) for x in (q, k, v)), **arrays), packed=False, **kwargs)
    table = None
    if page_size is not None:
        batch, keys = k.shape[:2]
        per, room = -(-keys // page_size), -(-keys // page_size) * page_size - keys
        numbers = draw.permutation(batch * per + 3)[:batch * per].reshape(batch, per).astype(np.int32)
        caches = []
        for x in (k, v):
            cache = np.full((batch * per + 3, page_size, *x.shape[2:]), np.nan, x.dtype)
            padded = np.concatenate([x, np.full((batch, room, *x.shape[2:]), np.nan, x.dtype)], axis=1)
            cache[numbers] = padded.reshape(batch, per, page_size, *x.shape[2:])
            caches.append(cache)
        if stray:
            needed = np.arange(per) * page_size < np.array(lengths)[:, None] + new_keys
            numbers[~needed] = draw.choice([-1, 2**31 - 1, -2**31, 10**6], int((~needed).sum()))
            numbers[0, 0] = -5                  # read as the last page
            k, v = (cache[np.where((numbers < 0) | (numbers >= len(cache)), len(cache) - 1, numbers)].reshape(batch, per * page_size,
                                                                                                             *cache.shape[2:])
                    for cache in caches)
        o, table = replace(o, k=placed(caches[0]), v=placed(caches[1])), placed(numbers)
    o = replace(o, seqused_k=placed(np.array(lengths, np.int32)))
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in ((problem.out_shape, q.dtype), (problem.lse_shape, np.float32)))
    call, launcher = Call(problem, o, out, lse), interpreter.Launcher(memory)
    spec = make_spec(problem, o, True)
    cache = decode.KeyCache(new_keys, None if table is None else lambda call: table, num_splits)
    assert decode.takes_cache(call, spec) is None
    decode.prepare(call, spec, launcher, cache)(call, 0)
    return memory.read(out, q.dtype), memory.read(lse, np.float32), k, v
