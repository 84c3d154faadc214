"""Launches of the Hopper kernels: refuses, forward, backward. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby

from ...arrays.view import View, contiguous
from ...memo import Recent
from ...problem import Grads, Operands, Problem
from ..config import feature_weight, num_features
from ..decode import caches as decode_caches
from ..decode import launch as decode
from ..flex.ladder import first_that_fits
from ..flex.launch import bitmap, bitmap_fields, bitmap_sources
from ..rows import widen_launch
from ..rows.launch import Rows, dbias_sums, dsinks, padded_rows, preprocessed, refuses_rows, round_dq, sum_groups, sums_dbias
from ..rows.mask_words import mask_words
from ..rows.parts import as_parts, refuses_parts
from ..runtime.compile import Source, late
from ..runtime.device import Device
from ..runtime.launcher import PROGRAMS, Launcher, Listing, Program, program
from ..runtime.packed import MOST_BLOCKS, head_group, most_tiles, table
from ..runtime.tensormap import PANEL, Box, WholeRows, fits, form
from ..short import launch as short
from ..simt.launch import captured, dbias
from ..sm80 import launch as sm80
from ..spec import MOST_FLOAT_DIM, WIDE_CAP, AnyCall, Arguments, BackwardCall, Call, Launch, Spec, make_spec, unfit
from . import caches, launch_latent
from .config import (
    BLOCK_N,
    FLOAT_BLOCK,
    FLOAT_WARPS,
    MOST_BIAS_BACKWARD,
    MOST_BIAS_FORWARD,
    MOST_DIM,
    OUT_ROWS,
    WARPGROUP,
    BackwardSm90Config,
    ForwardSm90Config,
    choose_backward,
    choose_forward,
    is_wide,
    takes_bias_tiles,
    worth_parts,
)
from .config_alone import DqSm90Config, WideSm90Config, choose_dq, choose_wide
from .config_latent import refuses_latent
from .config_traced import backward_ladder, forward_ladder
from .launch_float import prepare_float

make_forward, make_backward = late("sm90.forward", "make_forward"), late("sm90.backward", "make_backward")
make_backward_float = late("sm90.backward_float", "make_backward_float")
make_dq, make_wide = late("sm90.backward_dq", "make_dq"), late("sm90.backward_wide", "make_wide")

ARCH = "sm_90a"
FORWARD = "map_q:l map_k:l map_v:l map_out:l counter:l table:l tiles:i head_group:i"
BACKWARD = ("map_q:l map_k:l map_v:l map_dout:l map_rows:l row_lse:l far:l far_mark:i accum:l rows:i table:l tiles:i head_group:i "
            "num_heads_k:i grad_scale:f sums:l sums_batch:q sums_head:q sums_row:i")
WIDE = ("map_q:l map_k:l map_v:l map_dout:l map_rows:l row_lse:l rows:i table:l tiles:i head_group:i num_heads_k:i grad_scale:f "
        "sums:l sums_batch:q sums_head:q sums_row:i")
DQ = "map_q:l map_k:l map_v:l map_dout:l row_lse:l row_log2:l row_delta:l rows:i table:l tiles:i head_group:i grad_scale:f"
BACKWARD_FLOAT = "row_lse:l row_log2:l row_delta:l accum:l rows:i table:l tiles:i head_group:i num_heads_k:i grad_scale:f"
Sums = tuple[int, int, int, int]        # rows.launch.dbias_sums


def refuses(call: AnyCall, d: Device) -> str | None:
    """None, or why this family does not run the call."""
    p, o = call.problem, call.operands
    if d.arch != ARCH:
        return f"it needs {ARCH}, this is {d.arch}"
    if isinstance(call, Call) and p.cache is not None:
        return _refuses_caches(call, d)
    if (reason := unfit(p, MOST_DIM, MOST_FLOAT_DIM if isinstance(call, BackwardCall) else MOST_DIM)) is not None:
        return reason
    if p.dtype == "float32":
        return _refuses_float(call)
    if isinstance(call, BackwardCall):
        g = call.grads
        if feature_weight(make_spec(p, o, False)) > 1:
            return "several features do not fit its registers"
        if p.float32_out and any(x.strides[-1] != x.itemsize and x.shape[-1] > 1 for x in g[:3]):
            return "float32 gradients: their last axis is not contiguous"
        written = {} if p.float32_out else {"dq": g.dq, "dk": g.dk, "dv": g.dv}
        return _unreadable({"q": o.q, "k": o.k, "v": o.v, "dout": call.dout, **written})
    return _refuses_forward(call)


def _refuses_forward(call: Call) -> str | None:
    p, o = call.problem, call.operands
    copied = {} if p.float32_out else {"out": call.out}         # float32 is stored from the registers
    if (reason := _unreadable({"q": o.q, "k": o.k, "v": o.v, **copied})) is not None:
        return reason
    if (192 < max(p.head_dim, p.head_dim_v) <= 256 or p.head_dim_v > 512) and feature_weight(make_spec(p, o, False)) > 1:
        return f"several features at head_dim {max(p.head_dim, p.head_dim_v)} do not fit its registers"
    return None


def _refuses_tiled(call: Call) -> str | None:
    """None, or why `forward` does not run a call over caches, or over widened ones."""
    if call.problem.eight_bit is not None:
        return widen_launch.refuses(call) or _refuses_tiled(widen_launch.widened(call, widen_launch.ALIGNED)[0])
    if (reason := unfit(call.problem, MOST_DIM)) is not None:
        return reason
    return caches.refuses(call, make_spec(call.problem, call.operands, False)) or _refuses_forward(call)


def _refuses_caches(call: Call, d: Device) -> str | None:
    """None, or why neither `forward` nor decode/ runs it."""
    reason = _refuses_tiled(call)
    if reason is None or caches.by_splits(call, d, reason):
        return None
    split = decode.refuses_caches(call)
    return reason if split == reason else f"{reason}; with split keys: {split}"


def _refuses_float(call: AnyCall) -> str | None:
    if isinstance(call, BackwardCall):
        if (reason := _refuses_float_backward(call)) is not None:
            return reason
        return refuses_rows(call) or refuses_parts(call)
    return refuses_parts(call)


def _refuses_float_backward(call: BackwardCall) -> str | None:
    if feature_weight(make_spec(call.problem, call.operands, False)) > 1:
        return "several features do not fit its registers"
    if call.deterministic:
        return "the sums of its float32 dq come in any order"
    return None if call.grads.dbias is None else "it has no float32 dbias"


def _unreadable(views: dict[str, View]) -> str | None:
    """None, or the first of the views that TMA cannot address, and why."""
    for name, x in views.items():
        reason = fits(x)
        if reason is not None:
            return f"{name}: {reason}"
    return None


# ---------------------------------------------------------------- a bias that TMA copies
def bias_view(bias: View) -> View:
    """The bias as (batch, row, head, column), the axes of tensor maps. An axis that it broadcasts over has length 1."""
    shape = tuple(n if stride else 1 for n, stride in zip(bias.shape[:2], bias.strides[:2], strict=True))
    return View(bias.ptr, (*shape, *bias.shape[2:]), bias.strides, bias.dtype, bias.device).bshd()


def with_bias_tiles(spec: Spec, bias: View | None, most: int) -> Spec:
    """The Spec of a kernel that reads tiles of the bias, if it `takes_bias_tiles` and TMA can copy them.

    Of packed sequences it does not: rows past a sequence's end would bring what the caller left there.
    """
    if bias is None or bias.itemsize != 2 or spec.packed or not takes_bias_tiles(spec, most) or fits(bias_view(bias)) is not None:
        return spec
    return replace(spec, bias_tiles=True, bias_pairs=False, bias_whole=False)


# ---------------------------------------------------------------- forward
def with_cap(spec: Spec, softcap: float | None) -> Spec:
    """The Spec of a kernel with one form of capped scores: where the softcap is the only feature, blocks of 128 keys then do not spill."""
    if softcap is None or num_features(spec) > 1 or spec.traced or not 64 < max(spec.head_dim, spec.head_dim_v) <= 128:
        return spec
    return replace(spec, cap="wide" if softcap > WIDE_CAP else "narrow")


@lru_cache(maxsize=PROGRAMS)
def forward_program(spec: Spec, config: ForwardSm90Config) -> Program:
    own = FORWARD + bitmap_fields(spec) + " map_bias:l" * spec.bias_tiles + caches.LENGTHS * spec.lengths + caches.PAGES * spec.paged
    return program(f"forward_sm90 {spec.text} | {config.text}", lambda: make_forward(spec, config),
                   Arguments(spec, own, ("out",), online=True), config.threads, config.blocks_per_sm)


@lru_cache(maxsize=PROGRAMS)
def _choice(spec: Spec, seqlen_k: int, seqlen_q: int, fine: bool) -> tuple[ForwardSm90Config, Program]:
    if spec.traced:
        config = first_that_fits(forward_ladder(spec, seqlen_k, seqlen_q, fine), partial(forward_program, spec), ARCH,
                                 lambda config: bitmap_sources(spec, config.block_m, config.block_n))
    else:
        config = choose_forward(spec, seqlen_k, seqlen_q)
    return config, forward_program(spec, config)


def prepare(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """What enqueues the kernel for this call, or one that differs in addresses only; before it, the words of a mask and
    the table of a packed problem."""
    if call.problem.cache is not None:
        return _prepare_caches(call, spec, launcher)
    if decode.accepts(call, spec, launcher.device):
        return decode.prepare(call, spec, launcher)
    if refuses_latent(call, spec) is None:
        return launch_latent.prepare(call, spec, launcher)
    if sm80.one_tile(call):
        return sm80.prepare(call, spec, launcher)
    if spec.parts > 1:
        return prepare_float(call, spec, launcher)
    p = call.problem
    spec = with_cap(with_bias_tiles(spec, call.operands.bias, MOST_BIAS_FORWARD), p.score.softcap)
    return _prepare(call, spec, *_choice(spec, _most_keys(p), p.seqlen_q, p.flex is not None and p.flex.fine), launcher)


def _most_keys(p: Problem) -> int:
    """Keys that a row attends, at most."""
    left, right = p.mask.left, p.mask.right
    return p.seqlen_k if left is None or right is None else max(min(p.seqlen_k, left + right + 1), 1)


def _prepare_caches(call: Call, spec: Spec, launcher: Launcher) -> Launch:
    """`prepare` for a call of attention_with_kvcache."""
    if caches.by_splits(call, launcher.device, _refuses_tiled(call)):
        prepare_few = decode_caches.prepare_caches if refuses_latent(call, spec) else launch_latent.prepare
        return prepare_few(call, spec, launcher)
    if call.problem.eight_bit is not None:
        def attend(wide: Call) -> Launch:
            return _prepare_caches(wide, make_spec(wide.problem, wide.operands, spec.lse), launcher)
        return widen_launch.prepare(call, attend, launcher)
    spec = caches.spec_of(call, spec)
    config = caches.tiling(call, spec)
    return _prepare(call, spec, config, forward_program(spec, config), launcher)


def _prepare(call: Call, spec: Spec, config: ForwardSm90Config, chosen: Program, launcher: Launcher) -> Launch:
    """`prepare` of a kernel with a tiling."""
    source, arguments = chosen
    kernel, values = launcher.load(source), arguments.bound(call)
    tiles, heads = most_tiles(call, config.block_m), head_group(call)
    grid, block_m, block_n = min(tiles, launcher.device.num_sms * config.blocks_per_sm), config.block_m, config.block_n
    capturing, tensor_maps, counter = launcher.capturing, launcher.tensor_maps, launcher.counter
    cached, box, floats = call.problem.cache is not None, config.box or block_n, spec.out_dtype is not None
    out_box = WholeRows(OUT_ROWS, spec.head_dim_v) if config.whole_rows else OUT_ROWS

    def boxes(call: Call) -> tuple[tuple[View, Box], ...]:
        o = call.operands
        inputs = (o.q, block_m), (o.k, box), (o.v, box)
        bias = ((bias_view(o.bias), block_m),) if spec.bias_tiles and o.bias else ()
        return (*inputs, *bias) if floats else (*inputs, (call.out, out_box), *bias)
    forms = tuple(form(x, rows) for x, rows in boxes(call))

    def launch(call: Call, stream: int, sequences: int = 0, kinds: tuple[int, ...] = ()) -> None:
        captured = capturing(stream)
        maps = tensor_maps(boxes(call), captured, forms)
        if floats:
            maps = [*maps[:3], 0, *maps[3:]]        # out is stored from the registers
        more = caches.values(call) if cached else maps[4:]
        kernel.launch(grid, values(call, (*maps[:4], counter(captured), sequences, tiles, heads, *kinds, *more)), stream)

    def launch_special(call: Call, stream: int) -> None:
        with (table(call, block_m, launcher, stream) as sequences, mask_words(call, block_n, launcher, stream) as call,
              bitmap(call, spec, block_m, block_n, launcher, stream) as kinds):
            launch(call, stream, sequences, kinds)
    return launch_special if spec.packed or spec.mask or spec.mask_mod else launch


# ---------------------------------------------------------------- backward
@lru_cache(maxsize=PROGRAMS)
def backward_program(spec: Spec, config: BackwardSm90Config) -> Program:
    own = BACKWARD + bitmap_fields(spec) + " map_bias:l" * spec.bias_tiles
    # with dbias, a memset of the sums comes before it: that is no kernel behind which this one could start early
    written = ("dq", "dk", "dv") if config.one_tile else ("dk", "dv")
    return program(f"backward_sm90 {spec.text} | {config.text}", lambda: make_backward(spec, config), Arguments(spec, own, written),
                   config.threads, early=spec.dbias is None, cluster=1 + config.pair)


@lru_cache(maxsize=PROGRAMS)
def wide_program(spec: Spec, config: WideSm90Config, early: bool) -> Program:
    return program(f"backward_sm90_wide {spec.text} | {config.text}" + " early" * early, lambda: make_wide(spec, config),
                   Arguments(spec, WIDE, ("dk", "dv")), WARPGROUP * (1 + config.consumers), early=early)


@lru_cache(maxsize=PROGRAMS)
def dq_program(spec: Spec, config: DqSm90Config) -> Program:
    return program(f"backward_sm90_dq {spec.text} | {config.text}", lambda: make_dq(spec, config),
                   Arguments(spec, DQ, ("dq",)), WARPGROUP * (1 + config.consumers), early=True)


@lru_cache(maxsize=PROGRAMS)
def float_program(spec: Spec) -> Program:
    return program(f"backward_sm90_float {spec.text}", lambda: make_backward_float(spec),
                   Arguments(spec, BACKWARD_FLOAT, ("q", "k", "v", "dout", "dk", "dv")), 32 * FLOAT_WARPS, early=True)


def backward(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int, tried: BackwardSm90Config | None = None) -> None:
    """Enqueue the kernels: lse and delta of rows, the gradients, then what is rounded from sums. tried: a tiling to take.

    One kernel computes all gradients, adding up dQ in memory. Deterministic calls and those of head_dim over 128 have a
    kernel for dQ alone.
    """
    if spec.parts > 1:
        return _backward_float(call, spec, launcher, stream)
    if not spec.group_parts and short.accepts(call):
        return short.backward(call, spec, launcher, stream)
    g = call.grads
    # dbias of every score is added up by the kernel of dK; a broadcast one is computed by simt's kernel
    in_kernel = not call.deterministic and sums_dbias(call)
    dq_alone = call.deterministic or max(spec.head_dim, spec.head_dim_v) > 128
    own_spec = replace(spec, sinks=None, dbias="float32" if in_kernel else None, deterministic=dq_alone)
    if not dq_alone:
        own_spec = with_bias_tiles(own_spec, call.operands.bias, MOST_BIAS_BACKWARD)
    config = tried or _backward_config(call, spec, own_spec, launcher)
    wide = is_wide(own_spec)
    if not spec.group_parts and not dq_alone and _in_parts(call, own_spec, config, launcher):
        return _backward_in_parts(call, spec, config, launcher, stream)
    block_n = choose_wide(own_spec, "dk").block_n if wide else BLOCK_N
    sums_dq = not (dq_alone or config.one_tile)
    with (preprocessed(call, spec, launcher, stream, accum_dim=config.dim if sums_dq else 0) as rows,
          table(call, block_n, launcher, stream, True) as sequences,
          dbias_sums(g.dbias if in_kernel else None, launcher, stream) as sums):
        if wide:
            _launch_wide(call, own_spec, rows, sequences, sums, launcher, stream)
        else:
            with (mask_words(call, config.block_m, launcher, stream, True) as words,
                  bitmap(call, spec, config.block_m, BLOCK_N, launcher, stream, True) as kinds):
                _launch_backward(words, own_spec, config, rows, sequences, sums, kinds, launcher, stream)
        if dq_alone:
            _launch_dq(call, own_spec, rows, launcher, stream)
        elif sums_dq:
            round_dq(call, spec, rows, config.dim, launcher, stream)
        if g.dbias is not None and not in_kernel:
            dbias(call, spec, rows, launcher, stream)
        captured(call, spec, rows, launcher, stream)
        dsinks(call, spec, rows, launcher, stream)


_fitting: Recent[tuple[Spec, int], BackwardSm90Config] = Recent()       # the tilings of functions
_choose_backward = lru_cache(maxsize=PROGRAMS)(choose_backward)


def _backward_config(call: BackwardCall, spec: Spec, own_spec: Spec, launcher: Launcher) -> BackwardSm90Config:
    """The tiling of the kernel with `own_spec`, in a call with `spec`."""
    keys = call.problem.seqlen_k
    if not spec.traced:
        rows = call.problem.seqlen_q * call.problem.group
        return _choose_backward(own_spec, keys, _key_tiles(call, own_spec), rows)

    def others(config: BackwardSm90Config) -> list[Source]:
        listing, tried = Listing(launcher.device), backward_program(own_spec, config).source
        backward(call, spec, listing, 0, config)
        return [source for source in listing.sources if source.key != tried.key]
    config = _fitting.get((own_spec, keys))
    if config is None:
        ladder = backward_ladder(own_spec, keys)
        config = _fitting[own_spec, keys] = first_that_fits(ladder, partial(backward_program, own_spec), ARCH, others)
    return config


def _key_tiles(call: BackwardCall, spec: Spec) -> int:
    """Tiles of keys of a head whose thread blocks can write dQ: one if every row attends one of its keys, because nobody would write dQ
    of the others, or two where there are two blocks of rows. 0: dQ is summed."""
    p = call.problem
    if spec.packed or spec.mask or spec.left or spec.traced or spec.deterministic or spec.group_parts or p.float32_out:
        return 0
    right, first_attends = p.mask.right, p.mask.top_left or p.seqlen_q <= p.seqlen_k
    counted = p.num_heads * padded_rows(call) <= MOST_BLOCKS        # rows of a batch entry, in int32
    if counted and 0 < p.seqlen_k <= BLOCK_N and (right is None or (right >= 0 and p.mask.first is None and first_attends)):
        return 1
    causal = right == 0 and p.mask.first is None and p.seqlen_q == p.seqlen_k
    two = min(p.seqlen_q, p.seqlen_k) > BLOCK_N and max(p.seqlen_q, p.seqlen_k) <= 2 * BLOCK_N
    return 2 if counted and two and p.group == 1 and (right is None or causal) else 0


def _in_parts(call: BackwardCall, spec: Spec, config: BackwardSm90Config, launcher: Launcher) -> bool:
    """Whether the query heads of a group get tiles of their own: one sequence with few tiles, and nothing but a mask by position.

    The sums of the parts are rounded to 16 bits (rows/groups.py), so not for float32 gradients.
    """
    p = call.problem
    if p.batch > 1 or p.group == 1 or spec.packed or spec.scaled or spec.mask or spec.dropout or p.float32_out or spec.traced:
        return False
    return call.grads.dsinks is None and worth_parts(spec, config, p.num_heads_k, p.group, p.seqlen_q, p.seqlen_k, launcher.device.num_sms)


def _backward_in_parts(call: BackwardCall, spec: Spec, config: BackwardSm90Config, launcher: Launcher, stream: int) -> None:
    """The backward of one sequence as that of a batch: entry n has query head n of each group, and all have the same keys and values.

    dK and dV of the entries are float32 parts, which are added up at the end.
    """
    p, o, g = call.problem, call.operands, call.grads
    parts, keys, heads = p.group, p.seqlen_k, p.num_heads_k

    def entries(x: View, axis: int) -> View:
        """x (1, ...) with every `parts`-th head in an entry; `axis` has the heads."""
        shape, strides = list(x.shape), list(x.strides)
        shape[0], shape[axis], strides[0], strides[axis] = parts, heads, x.strides[axis], parts * x.strides[axis]
        return View(x.ptr, tuple(shape), tuple(strides), x.dtype, x.device)

    def shared(x: View) -> View:
        return View(x.ptr, (parts, *x.shape[1:]), (0, *x.strides[1:]), x.dtype, x.device)
    columns = max(config.dim, config.dim_v)
    size, form = 4 * parts * keys * heads * columns, (parts, keys, heads, columns)
    with launcher.temporary(2 * size, stream) as memory:
        part_k, part_v = (View(at, form, contiguous(form, 4), "float32", o.k.device) for at in (memory, memory + size))
        problem = replace(p, batch=parts, num_heads=heads)
        operands, grads = Operands(entries(o.q, 2), shared(o.k), shared(o.v)), Grads(entries(g.dq, 2), part_k, part_v)
        parted = BackwardCall(problem, operands, entries(call.dout, 2), entries(call.out, 2), entries(call.lse, 1),
                              None if call.dlse is None else entries(call.dlse, 1), grads, False)
        backward(parted, replace(spec, group_parts=True), launcher, stream)
        sum_groups(part_k, part_v, g.dk, g.dv, launcher, stream)


def _backward_float(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
    """`backward` of float32: dq is added up in memory."""
    p, tiles, columns = call.problem, most_tiles(call, FLOAT_BLOCK, True), PANEL * -(-spec.head_dim // PANEL)
    plain = replace(spec, sinks=None, dbias=None, deterministic=False)
    with preprocessed(call, spec, launcher, stream, accum_dim=columns) as rows:
        with (as_parts(call, launcher, stream) as split, table(call, FLOAT_BLOCK, launcher, stream, True) as sequences,
              mask_words(split, FLOAT_BLOCK // 2, launcher, stream, True) as words):      # a warpgroup has half of a block's queries
            own = (rows.lse, rows.log2, rows.delta, rows.accum, rows.count, sequences, tiles, head_group(call, True), p.num_heads_k,
                   p.score.softmax_scale)
            float_program(plain).launch(launcher, tiles, words, own, stream)
        round_dq(call, spec, rows, columns, launcher, stream)
        dsinks(call, spec, rows, launcher, stream)


def _launch_backward(call: BackwardCall, spec: Spec, config: BackwardSm90Config, rows: Rows, sequences: int, sums: Sums,
                     kinds: tuple[int, ...], launcher: Launcher, stream: int) -> None:
    """Enqueue writing dk and dv, adding dq up in rows.accum and dbias, if `spec` has it, in `sums`. `sequences`: table
    by BLOCK_N keys."""
    p, o, tiles, captured = call.problem, call.operands, most_tiles(call, BLOCK_N, True), launcher.capturing(stream)
    bias = ((bias_view(o.bias), config.block_m),) if spec.bias_tiles and o.bias else ()
    maps = launcher.tensor_maps(((o.q, config.block_m), (o.k, BLOCK_N), (o.v, BLOCK_N), (call.dout, config.block_m), *bias), captured)
    heads = 1 if config.pair else head_group(call, True)        # a pair has the tiles of one head
    own = (*maps[:4], rows.map(call, config.block_m, launcher, captured), rows.lse, rows.far,
           rows.mark, rows.accum, rows.count, sequences, tiles, heads, p.num_heads_k, p.score.softmax_scale, *sums,
           *kinds, *maps[4:])
    backward_program(spec, config).launch(launcher, tiles, call, own, stream)


def _launch_wide(call: BackwardCall, spec: Spec, rows: Rows, sequences: int, sums: Sums, launcher: Launcher,
                 stream: int) -> None:
    """Enqueue writing dv, then dk, the latter adding dbias up in `sums`, if `spec` has it. `sequences`: the table by
    the tilings' keys."""
    p, o, captured = call.problem, call.operands, launcher.capturing(stream)
    spec = replace(spec, deterministic=False)
    parts = [(of_part, choose_wide(of_part, part)) for of_part, part in ((replace(spec, dbias=None), "dv"), (spec, "dk"))]
    for block_m, alike in groupby(parts, key=lambda part: part[1].block_m):         # up to head_dim 256 all have the same
        with mask_words(call, block_m, launcher, stream, True) as words:
            for of_part, config in alike:
                boxes = (o.q, block_m), (o.k, config.block_n), (o.v, config.block_n), (call.dout, block_m)
                tiles = most_tiles(call, config.block_n, True)
                own = (*launcher.tensor_maps(boxes, captured), rows.map(call, block_m, launcher, captured), rows.lse, rows.count,
                       sequences, tiles, head_group(call, True), p.num_heads_k, p.score.softmax_scale, *sums)
                wide_program(of_part, config, spec.dbias is None).launch(launcher, tiles, words, own, stream)


def _launch_dq(call: BackwardCall, spec: Spec, rows: Rows, launcher: Launcher, stream: int) -> None:
    """Enqueue writing dq."""
    o, spec = call.operands, replace(spec, sinks=None, dbias=None, deterministic=False)
    config = choose_dq(spec, call.problem.seqlen_k)
    tiles = most_tiles(call, config.block_m)
    with table(call, config.block_m, launcher, stream) as sequences, mask_words(call, config.block_n, launcher, stream) as words:
        boxes = (o.q, config.block_m), (o.k, config.block_n), (o.v, config.block_n), (call.dout, config.block_m)
        own = (*launcher.tensor_maps(boxes, launcher.capturing(stream)), rows.lse, rows.log2, rows.delta, rows.count,
               sequences, tiles, head_group(call), call.problem.score.softmax_scale)
        dq_program(spec, config).launch(launcher, tiles, words, own, stream)
