"""Launches of forward_float. Without Numba: see runtime/compile.py."""
from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from ...arrays.view import View, contiguous
from ...problem import Problem
from ..rows.mask_words import mask_words
from ..rows.parts import as_parts, parts_of
from ..runtime.compile import late
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..runtime.packed import head_group, most_tiles, table
from ..runtime.tensormap import form
from ..spec import Arguments, Call, Launch, Spec, whole_chunks
from .config import WARPGROUP
from .config_float import LEAST_KEYS, MERGE_THREADS, MOST_SPLITS, SHORT_KEYS, ForwardFloatConfig, choose_forward

make_forward_float = late("sm90.forward_float", "make_forward_float")
make_merge_float = late("sm90.merge_float", "make_merge_float")
FORWARD, MAPS = "table:l tiles:i head_group:i", "map_k:l map_v:l "
SPLITS = "part:l part_batch:q part_row:q part_head:q part_split:q rows:l row_batch:q row_head:q row_split:q totals:q splits:i"


@lru_cache(maxsize=PROGRAMS)
def float_forward_program(spec: Spec, config: ForwardFloatConfig, whole: bool) -> Program:
    own, strided = (FORWARD, ("q", "k", "v", "out")) if config.split else (MAPS + FORWARD, ("q", "out"))
    return program(f"forward_sm90_float {spec.text} | {config.text}" + " whole" * whole, lambda: make_forward_float(spec, config, whole),
                   Arguments(spec, own, strided, online=True), WARPGROUP * (1 + config.consumers), 3 - config.consumers,
                   early=not config.split)


@lru_cache(maxsize=PROGRAMS)
def merge_program(spec: Spec) -> Program:
    return program(f"merge_sm90_float {spec.text}", lambda: make_merge_float(spec), Arguments(spec, SPLITS, ("out",), online=True),
                   MERGE_THREADS)


def splits_of(p: Problem, spec: Spec, tiles: int, num_sms: int) -> int:
    """Splits of the keys of a call with so few tiles that multiprocessors would be idle. 1: none.

    Splits are entries of a batch, or heads, of plain problems: that needs one of either, and as many keys in each split.
    """
    plain = spec == Spec(spec.dtype, spec.head_dim, spec.head_dim_v, lse=spec.lse)
    if not plain or (p.batch > 1 and p.num_heads > 1):
        return 1
    most = min(num_sms // max(tiles, 1), p.seqlen_k // LEAST_KEYS, MOST_SPLITS)
    return max((n for n in range(1, most + 1) if p.seqlen_k % n == 0), default=1)


def prepare_float(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only; before it, the parts of k and v, the words of a mask
    and the table of a packed problem."""
    o, p = call.operands, call.problem
    config = choose_forward(spec, whole_chunks(o.k) and whole_chunks(o.v), not p.packed and p.seqlen_k <= SHORT_KEYS)
    if config.split:
        return _prepare_kernel(call, spec, config, launcher)
    splits = splits_of(p, spec, most_tiles(call, config.block_m), launcher.device.num_sms)
    if splits > 1:
        return _prepare_split(call, spec, config, splits, launcher)
    enqueue = _prepare_kernel(parts_of(call, 0, whole_q=True)[0], spec, config, launcher)

    def launch(call: Call, stream: int) -> None:
        with as_parts(call, launcher, stream, whole_q=True) as split:
            enqueue(split, stream)
    return launch


def _prepare_kernel(call: Call, spec: Spec, config: ForwardFloatConfig, launcher: Launcher) -> Launch:
    """prepare_float for a call whose k and v are as the kernel takes them."""
    source, arguments = float_forward_program(spec, config, whole_chunks(call.operands.q))
    kernel, values = launcher.load(source), arguments.bound(call)
    block_m, block_n, tiles, heads = config.block_m, config.block_n, most_tiles(call, config.block_m), head_group(call)
    forms = () if config.split else tuple(form(x, block_n) for x in (call.operands.k, call.operands.v))

    def launch(call: Call, stream: int) -> None:
        boxes = (call.operands.k, block_n), (call.operands.v, block_n)
        maps = launcher.tensor_maps(boxes, launcher.capturing(stream), forms) if forms else []
        with table(call, block_m, launcher, stream) as sequences, mask_words(call, block_n, launcher, stream) as call:
            kernel.launch(tiles, values(call, (*maps, sequences, tiles, heads)), stream)
    return launch


def _prepare_split(call: Call, spec: Spec, config: ForwardFloatConfig, splits: int, launcher: Launcher) -> Launch:
    """prepare_float with the keys in `splits` parts, whose results are merged."""
    lines, dim = math.prod(call.out.shape[:3]), call.problem.head_dim_v
    out_bytes, row_bytes = 4 * splits * lines * dim, 4 * splits * lines         # of all splits: O; maxima, and as much of sums
    enqueue = _prepare_kernel(split_call(parts_of(call, 0, whole_q=True)[0], splits, 0, out_bytes), replace(spec, lse=True),
                              replace(config, partial=True), launcher)
    merge_source, merge_arguments = merge_program(spec)
    merge, merge_values = launcher.load(merge_source), merge_arguments.bound(call)

    def launch(call: Call, stream: int) -> None:
        with (launcher.temporary(out_bytes + 2 * row_bytes, stream) as memory,
              as_parts(call, launcher, stream, whole_q=True) as parts):
            split = split_call(parts, splits, memory, memory + out_bytes)
            enqueue(split, stream)
            merge.launch(lines, merge_values(call, split_values(call.problem, split, splits, row_bytes)), stream)
    return launch


def split_values(p: Problem, split: Call, splits: int, row_bytes: int) -> tuple[int, ...]:
    """Values of SPLITS, of a call's problem and its split_call."""
    assert split.lse is not None
    axis, rows_axis = _axes(p)          # of length 1 in the call: its stride there is never used
    return (split.out.ptr, *split.out.strides[:3], split.out.strides[axis], split.lse.ptr, *split.lse.strides[:2],
            split.lse.strides[rows_axis], row_bytes, splits)


def _axes(p: Problem) -> tuple[int, int]:
    """The axis of q, k, v and out, and that of lse, which has the splits: one of length 1."""
    return (0, 0) if p.batch == 1 else (2, 1)


def split_call(call: Call, splits: int, out: int, lse: int) -> Call:
    """The call whose batch entries, or heads, are the splits of the keys of a call with one of either. out, lse: addresses of its
    results, which are contiguous."""
    p, o, (axis, _) = call.problem, call.operands, _axes(call.problem)
    keys = p.seqlen_k // splits

    def repeated(x: View, step: int) -> View:
        """x with `splits` entries on the axis."""
        shape, strides = list(x.shape), list(x.strides)
        shape[axis], strides[axis] = splits, step
        return View(x.ptr, tuple(shape), tuple(strides), x.dtype, x.device)

    def share(x: View) -> View:
        """The keys of each split."""
        return repeated(View(x.ptr, (x.shape[0], keys, *x.shape[2:]), x.strides, x.dtype, x.device), keys * x.strides[1])
    problem = replace(p, seqlen_k=keys, batch=splits) if axis == 0 else replace(p, seqlen_k=keys, num_heads=splits, num_heads_k=splits)
    results = (View(at, shape, contiguous(shape, 4), "float32", call.out.device)
               for at, shape in ((out, problem.out_shape), (lse, problem.lse_shape)))
    return Call(problem, replace(o, q=repeated(o.q, 0), k=share(o.k), v=share(o.v)), *results)
