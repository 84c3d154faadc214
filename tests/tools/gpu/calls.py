"""Calls made without a GPU: arrays that are addresses only, and a backward whose kernels run in Python."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fastattn import Grads, attention, attention_backward, attention_varlen, attention_varlen_backward, explain, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import ITEMSIZE, View, contiguous
from fastattn.gpu.config import GROUP
from fastattn.gpu.decode import launch as decode
from fastattn.gpu.decode.config import choose_cached
from fastattn.gpu.spec import BackwardCall, Call, make_backward_spec, make_spec
from fastattn.options import read_eight_bit, read_options
from fastattn.problem import Operands, Problem, make_problem
from fastattn.serving.problem import Given, How, problem_with_cache
from tests.tools import caches
from tests.tools.gpu import interpreter_tiles as interpreter
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.problems import NUMPY, Case, Inputs

Sequence = tuple[int, int, int, int, int]       # plane, q_start, seqlen_q, k_start, seqlen_k


def view(*shape: int, ptr: int = 1 << 20, dtype: str = "bfloat16") -> View:
    return View(ptr, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, ("cuda", 0))


def whole(p: Problem) -> list[Sequence]:
    return [(batch, 0, p.seqlen_q, 0, p.seqlen_k) for batch in range(p.batch)]


def host_view(x: Any) -> Any:
    return None if x is None else convert.view(x, "test", "x")


def operands_of(kwargs: dict[str, Any], placed: Callable[[Any], Any]) -> dict[str, Any]:
    """The operands among the keywords of a call, which are taken out of them. placed(array): its View, None for None."""
    arrays = {name: placed(kwargs.pop(name, None)) for name in ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")}
    if isinstance(kwargs.get("diagonal"), np.ndarray):
        arrays["diagonals"] = placed(kwargs.pop("diagonal"))
    return arrays


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
    arrays = operands_of(kwargs, host_view)
    q, k, v = (canonical(x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": host_view(inputs.args[3]), "cu_seqlens_k": host_view(inputs.args[4])}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    grads = Grads(*(np.full(x.shape, np.nan, NUMPY[problem.out_dtype]) for x in inputs.args[:3]),
                  *(None if x is None else np.full(x.shape, np.nan, x.dtype)
                    for x in (inputs.kwargs.get("bias"), inputs.kwargs.get("sinks"))))
    dbias = None if grads.dbias is None else host_view(grads.dbias.reshape((1,) * (4 - grads.dbias.ndim) + grads.dbias.shape))
    places = Grads(canonical(grads.dq), canonical(grads.dk), canonical(grads.dv), dbias, host_view(grads.dsinks))
    call = BackwardCall(problem, o, canonical(inputs.dout), canonical(out), host_view(lse), host_view(inputs.dlse), places, False)
    memory = Memory()
    for x in (*(getattr(o, name) for name in o.__slots__), call.dout, call.out, call.lse, call.dlse, *places):
        memory.allow(x)
    with emulated(memory) as machine:
        gpu._for("simt", call).backward(call, make_backward_spec(call), machine.launcher(), 0)
    return grads, machine.launched


def interpreted(inputs: Inputs, arch: str = "sm_90a", family: str = "sm90", return_lse: bool = True) -> tuple[Any, Any, list[str]]:
    """(out, lse or None, kernels) of a forward whose kernels are run from their PTX (interpreter.py)."""
    swap, kwargs = inputs.kwargs.get("layout") == "bhsd", {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    memory = interpreter.Memory()

    def placed(x: Any) -> Any:
        return None if x is None else memory.place(x, convert.view(x, "test", "x"))
    arrays = operands_of(kwargs, placed)
    q, k, v = (placed(x.swapaxes(1, 2) if swap else x) for x in inputs.args[:3])
    if inputs.packed:
        arrays |= {"cu_seqlens_q": placed(inputs.args[3]), "cu_seqlens_k": placed(inputs.args[4])}
        kwargs |= {f"max_seqlen_{side}": int(np.diff(cu).max(initial=0)) for side, cu in (("q", inputs.args[3]), ("k", inputs.args[4]))}
    problem, o = make_problem("test", Operands(q, k, v, **arrays), packed=inputs.packed, **kwargs)
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in
                ((problem.out_shape, NUMPY[problem.out_dtype]), (problem.lse_shape, np.float32)))
    launcher, call = interpreter.Launcher(memory, arch), Call(problem, o, out, lse if return_lse else None)
    with gpu.use(family):
        gpu.family(family).prepare(call, make_spec(problem, o, return_lse), launcher)(call, 0)
    result = memory.read(out, NUMPY[problem.out_dtype])
    return result.swapaxes(1, 2) if swap else result, memory.read(lse, np.float32) if return_lse else None, launcher.launched


def families_of(packed: bool, args: list[Any], kwargs: dict[str, Any], device: str | None = None) -> tuple[str | None, str | None]:
    """The kernel families that run a forward with these arguments and its backward: where the arrays are, or on an absent `device`."""
    functions = (attention_varlen, attention_varlen_backward) if packed else (attention, attention_backward)
    forward, backward = (explain(function, *args, device=device, **kwargs).engine for function in functions)
    return forward, backward


class CacheCall(NamedTuple):
    """A call of the split-key kernel over a cache; k and v as they are read, (batch, keys, heads, dim)."""

    call: Call
    cache: decode.KeyCache
    k: Any
    v: Any

    def launch(self, launcher: Any, stream: int = 0, **tiling: Any) -> None:
        """tiling: fields of the DecodeConfig that differ from the chosen one's."""
        assert decode.refuses_cache(self.call, self.spec) is None
        config = replace(choose_cached(self.spec, self.call.problem, self.cache.num_splits), **tiling) if tiling else None
        decode.prepare(self.call, self.spec, launcher, self.cache, config)(self.call, stream)

    @property
    def spec(self) -> Any:
        return make_spec(self.call.problem, self.call.operands, True)


def cache_call(case: Case, placed: Callable[[Any], Any], lengths: list[int], page_size: int | None = None, append: bool = False,
               num_splits: int | None = None, stray: bool = False) -> CacheCall:
    """placed(array): the View of a copy. lengths: keys of each request, without the new ones. page_size: keys are in shuffled pages; None:
    the cache has a row for each request. stray: the table names pages that do not exist where it is not read, and for one that is."""
    inputs, draw = case.make(), np.random.default_rng(1)
    kwargs, (q, k, v) = dict(inputs.kwargs), inputs.args
    small = {name: placed(kwargs.pop(name)) for name in ("alibi_slopes", "sinks") if name in kwargs}
    problem, o = make_problem("test", Operands(*(placed(x) for x in (q, k, v)), **small), packed=False, **kwargs)
    table = None
    if page_size is not None:
        batch, per = len(lengths), -(-k.shape[1] // page_size)
        numbers = draw.permutation(batch * per + 3)[:batch * per].reshape(batch, per).astype(np.int32)
        caches = [_paged(x, numbers, page_size) for x in (k, v)]
        if stray:
            needed = np.arange(per) * page_size < np.array(lengths)[:, None] + problem.seqlen_q * append
            numbers[~needed] = draw.choice([-1, 2**31 - 1, -2**31, 10**6], int((~needed).sum()))
            numbers[0, 0] = -5                  # read as the last page
            last = len(caches[0]) - 1
            there = np.where((numbers < 0) | (numbers > last), last, numbers)
            k, v = (cache[there].reshape(batch, per * page_size, *cache.shape[2:]) for cache in caches)
        o, table = replace(o, k=placed(caches[0]), v=placed(caches[1])), placed(numbers)
    o = replace(o, seqused_k=placed(np.array(lengths, np.int32)))
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in ((problem.out_shape, q.dtype), (problem.lse_shape, np.float32)))
    cache = decode.KeyCache(append, None if table is None else lambda call: table, num_splits)
    return CacheCall(Call(problem, o, out, lse), cache, k, v)


def _paged(x: Any, numbers: Any, page_size: int) -> Any:
    """Keys (batch, keys, heads, dim) in pages of these numbers. What is no key is not a number."""
    batch, per = numbers.shape
    pages = np.full((batch * per + 3, page_size, *x.shape[2:]), np.nan, x.dtype)
    pages[-1] = 1                               # where stray entries lead
    room = np.full((batch, per * page_size - x.shape[1], *x.shape[2:]), np.nan, x.dtype)
    pages[numbers] = np.concatenate([x, room], axis=1).reshape(batch, per, page_size, *x.shape[2:])
    return pages


def interpreted_cache(case: Case, lengths: list[int], tiling: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """(out, lse, k, v) of a CacheCall, run from its PTX. tiling: see CacheCall.launch."""
    memory = interpreter.Memory()
    made = cache_call(case, lambda x: memory.place(x, convert.view(x, "test", "x")), lengths, **settings)
    made.launch(interpreter.Launcher(memory), **(tiling or {}))
    call = made.call
    assert call.lse is not None
    return memory.read(call.out, case.make().args[0].dtype), memory.read(call.lse, np.float32), made.k, made.v


SMALL = ("cache_seqlens", "block_table", "cache_batch_idx", "cu_seqlens_q", "alibi_slopes", "sinks", "q_scale", "k_scale", "v_scale")
ANGLES = ("rotary_cos", "rotary_sin")


def serving_call(made: caches.Call, placed: Callable[[Any], Any], **more: Any) -> Call:
    """A call of attention_with_kvcache on a device. placed(array): the View of a copy there. more: options beside the case's."""
    options = {**made.options, **more}
    q, k_cache, v_cache, k, v = made.arrays
    layout = options.pop("layout", "bshd")

    def canonical(x: Any) -> Any:
        return None if x is None else placed(x.swapaxes(1, 2) if layout == "bhsd" else x)
    scales = tuple(options.pop(name, None) for name in SMALL[-3:])
    given = {name: placed(options.pop(name)) for name in (*SMALL, *ANGLES) if isinstance(options.get(name), np.ndarray)}
    read = read_options("test", options.pop("causal", True), options.pop("window", None), options.pop("softmax_scale", None),
                        options.pop("softcap", None), 0.0, None, 0, options.pop("max_seqlen_q", None))
    read, arrays = read_eight_bit("test", read, (*scales, None), None)
    given |= {name: placed(x) for name, x in zip(SMALL[-3:], arrays or (), strict=False) if x is not None}
    how = How(options.pop("rotary_interleaved", False), options.pop("num_splits", None), options.pop("shared_prefix", None))
    assert not options
    call = Given(canonical(q), placed(k_cache), placed(v_cache), canonical(k), canonical(v),
                 **{name: given.get(name) for name in (*SMALL, *ANGLES)})
    problem, o = problem_with_cache("test", call, read, how)
    out_dtype = NUMPY[problem.out_dtype]
    out, lse = (placed(np.full(shape, np.nan, dtype)) for shape, dtype in ((problem.out_shape, out_dtype), (problem.lse_shape, np.float32)))
    return Call(problem, o, out, lse)


class Served(NamedTuple):
    """What a call of attention_with_kvcache left: its results, its caches, and the names of the kernels."""

    out: Any
    lse: Any
    k_cache: Any
    v_cache: Any
    kernels: list[str]


def interpreted_serving(made: caches.Call, arch: str = "sm_90a", **more: Any) -> Served:
    """A call of attention_with_kvcache, run from its kernels' PTX."""
    memory = interpreter.Memory()
    call = serving_call(made, lambda x: memory.place(x, convert.view(x, "test", "x")), **more)
    launcher = interpreter.Launcher(memory, arch)
    gpu._launch(call, launcher, ("sm80",), 0)           # whose split-key kernel takes any number of rows; the interpreter has no wgmma
    assert call.lse is not None
    out = memory.read(call.out, NUMPY[call.problem.out_dtype])
    of_caches = [memory.read(x, y.dtype) for x, y in zip((call.operands.k, call.operands.v), made.arrays[1:3], strict=True)]
    return Served(out.swapaxes(1, 2) if made.case.layout == "bhsd" else out, memory.read(call.lse, np.float32), *of_caches,
                  [key.split()[0] for key in launcher.launched])
