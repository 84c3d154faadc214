"""What is computed: the frozen `Problem`, made once from the caller's arguments.

Arguments are validated here, and nowhere below: engines have no checks and no defaults. (The types of options are read
in options.py.) Shapes here are canonical: (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from .arrays import words
from .arrays.view import EIGHT_BIT, FLOATS, View
from .eight_bit import EightBit, check_dtypes, make_eight_bit, read_scales
from .features import NO_LIMITS
from .features import Cache as Cache
from .features import Dropout as Dropout
from .features import Mask as Mask
from .features import Rotary as Rotary
from .features import Score as Score
from .flex.operands import Flex, FlexOperands
from .lengths import cumulative, read_diagonals, used_lengths
from .options import (
    CAP,
    NO_SCALES,
    OFFSET,
    PROBABILITY,
    SCALE,
    SCALES,
    SEED,
    Check,
    Options,
    Position,
    read_eight_bit,
    read_options,
    read_position,
)

DTYPES = FLOATS
MAX_HEAD_DIM = 576
G = TypeVar("G")


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem. `dtype` is q's; that of k, v and out too unless `eight_bit` says otherwise.

    A packed one has `total_q` and `total_k`, the rows of its packed arrays; its seqlen_q and seqlen_k are those of the
    longest sequences. With a `cache` seqlen_k is the most keys that a request may have, and seqused_k says how many each
    has.
    """

    call: str
    dtype: str
    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    score: Score
    mask: Mask = NO_LIMITS
    dropout: Dropout | None = None
    total_q: int | None = None
    total_k: int | None = None
    seqused_k: bool = False
    eight_bit: EightBit | None = None
    cache: Cache | None = None
    diagonals: bool = False               # a key for row 0 of each sequence
    float32_out: bool = False             # out, of a backward dq, dk and dv, are float32 beside 16-bit operands
    flex: Flex | None = None

    @property
    def packed(self) -> bool:
        return self.total_q is not None

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_heads_k

    @property
    def out_shape(self) -> tuple[int, ...]:
        if self.packed:
            return (self.total_q or 0, self.num_heads, self.head_dim_v)
        return (self.batch, self.seqlen_q, self.num_heads, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (self.num_heads, self.total_q or 0) if self.packed else (self.batch, self.num_heads, self.seqlen_q)

    @property
    def out_dtype(self) -> str:
        """The dtype of out, of a backward that of dq, dk and dv."""
        if self.eight_bit is not None:
            return self.eight_bit.out_dtype
        return "float32" if self.float32_out else self.dtype

    @property
    def compute_dtype(self) -> str:
        """Softmax and accumulation: float32, float64 for float64 input. Also the dtype of lse."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def lse_dtype(self) -> str:
        return self.compute_dtype


def is_plain(bias: Any, mask: Any, alibi_slopes: Any, sinks: Any) -> bool:
    """Whether a call has none of the operands that change scores.

    The one definition: caches of plain calls rest on it.
    """
    return bias is None and mask is None and alibi_slopes is None and sinks is None


@dataclass(slots=True)
class CacheOperands:
    """Where the operands are that a Problem has beside its caches."""

    block_table: View                     # (batch, pages of a request)
    k: View | None = None                 # the new keys and values, q's rows
    v: View | None = None
    rotary_cos: View | None = None        # (positions, rotary.dim / 2)
    rotary_sin: View | None = None


@dataclass(slots=True)
class Operands:
    """Where the inputs of a Problem are: canonical Views; `bias` and `mask` are already broadcast to four axes.

    Treat as immutable; not frozen for the reason that View gives.
    """

    q: View
    k: View
    v: View
    bias: View | None = None
    mask: View | None = None
    alibi_slopes: View | None = None      # broadcast to (batch, num_heads)
    sinks: View | None = None             # (num_heads,)
    cu_seqlens_q: View | None = None
    cu_seqlens_k: View | None = None
    seqused_k: View | None = None
    diagonals: View | None = None         # (sequences,)
    q_scale: View | None = None           # float32, as those below: broadcast to (batch, num_heads_k)
    k_scale: View | None = None
    v_scale: View | None = None
    out_scale: View | None = None         # (1,)
    cache: CacheOperands | None = None    # k and v are caches then
    flex: FlexOperands | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def scaled(self) -> bool:
        """Whether scales of 8-bit numbers are arrays. Those that are numbers are in the Problem."""
        return not (self.q_scale is None and self.k_scale is None and self.v_scale is None and self.out_scale is None)

    @property
    def plain(self) -> bool:
        """No bias, mask, ALiBi slopes, sinks, functions or scales: shapes, dtypes, strides and options alone decide what an
        engine does.
        """
        return is_plain(self.bias, self.mask, self.alibi_slopes, self.sinks) and self.flex is None and not self.scaled


class _Five(NamedTuple, Generic[G]):
    dq: G
    dk: G
    dv: G
    dbias: Any = None
    dsinks: Any = None


class Grads(_Five[G]):
    """Gradients, each with its input's shape, layout and dtype. Between api.py and an engine the same tuple holds
    Views. It unpacks as five: dcaptured is an attribute alone.

    Attributes
    ----------
    dq : array, the shape of q
    dk : array, the shape of k
    dv : array, the shape of v
    dbias : array, the shape of bias, or None
        Summed over the axes where bias broadcasts. Only with ``need_dbias=True``.
    dsinks : array (num_heads,), or None
        Only if sinks were given.
    dcaptured : tuple of arrays, or None
        Only with ``need_dcaptured=True``: an entry for each of captured, then for each array that score_mod holds, in order of
        first use. None for integers and conditions.
    """

    dcaptured: Any

    def __new__(cls, dq: G, dk: G, dv: G, dbias: Any = None, dsinks: Any = None, dcaptured: Any = None) -> Grads[G]:
        self: Grads[G] = tuple.__new__(cls, (dq, dk, dv, dbias, dsinks))
        self.dcaptured = dcaptured
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.dcaptured)

    def _replace(self, **changed: Any) -> Grads[G]:
        names = (*self._fields, "dcaptured")
        return Grads(**dict(zip(names, self.__getnewargs__(), strict=True)) | changed)


# ---------------------------------------------------------------- validation
def _qkv(check: Check, q: View, k: View, v: View, packed: bool) -> None:
    """Check ranks, dtypes, devices and head counts of q, k and v. Dense and packed differ only in the leading axes."""
    rank, axes = (3, "(total, num_heads, head_dim)") if packed else (4, "(batch, seqlen, num_heads, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != rank:
            hint = "use attention_varlen for packed (total, num_heads, head_dim) arrays" if rank == 4 and len(x.shape) == 3 else ""
            raise check.value(name, f"has {len(x.shape)} axes, shape {x.shape}", f"{rank} axes {axes}", hint)
        if x.device != q.device:
            raise check.value(name, f"is on device {x.device}", f"q's device, {q.device}")
    check_dtypes(check, q, k, v)
    if k.shape[:-1] != v.shape[:-1]:
        raise check.value("v", f"has shape {v.shape}", f"k's shape but for the last axis, {k.shape[:-1]} + (head_dim_v,)")
    if k.shape[-1] != q.shape[-1]:
        raise check.value("k", f"has head_dim {k.shape[-1]}", f"q's head_dim, {q.shape[-1]}")
    if not packed and k.shape[0] != q.shape[0]:
        raise check.value("k", f"has batch {k.shape[0]}", f"q's batch, {q.shape[0]}")
    for name, n in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        check.integer(name, n, 1, MAX_HEAD_DIM)
    check_heads(check, "k", q.shape[-2], k.shape[-2])


def check_heads(check: Check, argument: str, heads: int, heads_k: int) -> None:
    if heads_k == 0 or heads % heads_k:
        near = max((d for d in range(1, min(heads, heads_k) + 1) if heads % d == 0), default=1)
        raise check.value(argument, f"has {heads_k} heads", f"a divisor of q's num_heads = {heads}", f"num_heads_k = {near} works")


def _limited(check: Check, argument: str, x: float, expected: str, dtype: str) -> float:
    """x within half the range of the softmax's arithmetic, because engines use exp2 and scale scores by log2(e). 0.0 if
    `dtype` rounds x to 0.
    """
    info = np.finfo(dtype)
    if abs(x) > float(info.max) / 2:
        raise check.value(argument, f"is {x}", f"{expected} of at most {float(info.max) / 2:.3g}, because scores are {dtype}")
    return x if abs(x) > float(info.smallest_subnormal) / 2 else 0.0


def scale_and_cap(check: Check, options: Options, head_dim: int, dtype: str) -> tuple[float, float | None]:
    """softmax_scale and softcap, both representable in `dtype`, the softmax's arithmetic."""
    if options.softmax_scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    else:
        scale = _limited(check, "softmax_scale", check.number("softmax_scale", options.softmax_scale, SCALE), SCALE, dtype)
    if options.softcap is None:
        return scale, None
    cap = check.number("softcap", options.softcap, CAP)
    if _limited(check, "softcap", cap, CAP, dtype) <= 0:
        raise check.value("softcap", f"is {cap}" if cap <= 0 else f"is {cap}, which {dtype} rounds to 0", CAP)
    if abs(scale) / cap > float(np.finfo(dtype).max) / 2:
        raise check.value("softcap", f"is {cap} with softmax_scale = {scale}", f"softmax_scale / softcap in {dtype}'s range")
    return scale, cap


def mask_of(check: Check, options: Options, diagonals: bool = False) -> Mask:
    left, right = options.window or (None, None)
    first = None if options.position is None else options.position.diagonal
    if options.causal == "top_left" and (first is not None or diagonals):
        raise check.value("causal", "is 'top_left' beside diagonal", "causal=True beside diagonal", "diagonal=0 is what 'top_left' means")
    return Mask(left, 0 if options.causal else right, options.causal == "top_left", first)


def _float32_out(check: Check, options: Options, dtype: str) -> bool:
    """Whether out_dtype asks for float32 beside 16-bit operands."""
    wanted = None if options.eight_bit is None else options.eight_bit.out_dtype
    if wanted is None or wanted == dtype:
        return False
    if wanted != "float32" or dtype not in ("float16", "bfloat16"):
        raise check.value("out_dtype", f"is {wanted}, and q has dtype {dtype}",
                          "None, q's dtype, or float32 beside float16 and bfloat16; 8-bit operands have more")
    return True


def make_dropout(check: Check, dropout_p: float, seed: int | None, offset: int, position: Position | None = None,
                 num_heads: int = 0) -> Dropout | None:
    """The dropout of a call with so many heads; None where nothing can be dropped."""
    p = check.number("dropout_p", dropout_p, PROBABILITY)
    if not 0.0 <= p <= 1.0:
        raise check.value("dropout_p", f"is {p}", PROBABILITY)
    at, heads = (None, None) if position is None else (position.dropout_at, position.dropout_heads)
    if p == 0.0:
        for name, x in (("dropout_at", at), ("dropout_heads", heads)):
            if x is not None:
                raise check.value(name, f"is {x} without dropout", "None, because dropout_p = 0.0")
        return None
    if seed is None:
        raise check.value("seed", "is None", f"a 64-bit integer, because dropout_p = {p}",
                          "pass seed=..., a fresh one each step; backward takes the same one")
    batch, head, row, column = at or (0, 0, 0, 0)
    for n, x in ((2, row), (3, column)):
        if x % 16:
            raise check.value(f"dropout_at[{n}]", f"is {x}", "a multiple of 16", f"{x - x % 16} is the one below it")
    if head + num_heads > (num_heads if heads is None else heads):
        has = f"is {heads}" if heads is not None else f"is None, which means {num_heads}"
        raise check.value("dropout_heads", has, f"at least dropout_at's head + num_heads = {head + num_heads}")
    return Dropout(p, check.integer("seed", seed, *SEED) & (2**64 - 1), check.integer("offset", offset, *OFFSET), batch, head, row, column,
                   heads)


def _broadcast(check: Check, argument: str, x: View, shape: tuple[int, ...], axes: str) -> View:
    if len(x.shape) > len(shape) or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False)):
        padding = len(x.shape) == 2 and x.shape == (shape[0], shape[3])
        raise check.value(argument, f"has shape {x.shape}", f"a shape that broadcasts to {axes} = {shape}",
                          f"{argument}[:, None, None, :] gives one of (batch, keys) these axes" if padding else "")
    return x.broadcast_to(shape)


def _own(o: Operands) -> tuple[str, ...]:
    """The dtype that small operands may have because q has it: none for an 8-bit q."""
    return () if o.q.dtype in EIGHT_BIT else (o.q.dtype,)


def with_scales(check: Check, o: Operands, options: Options, scale: float, batch: int) -> tuple[Operands, float, EightBit | None]:
    """What 8-bit operands make of a call: the operands with checked scales, its softmax_scale, and its EightBit."""
    names = ("k", "v") if o.cache is None else ("k_cache", "v_cache")
    eight_bit, given = make_eight_bit(check, o.q, o.k, o.v, options.eight_bit, names), options.eight_bit
    if given is None:
        return o, scale, eight_bit
    scale = _limited(check, "q_scale", scale * given.q_scale * given.k_scale, "a scale of scores", "float32")
    if o.scaled:
        views = {name: x for name in SCALES if (x := getattr(o, name)) is not None}
        entry = "sequence" if o.packed else "batch entry"
        o = replace(o, **read_scales(check, views, batch, o.k.shape[-2], entry if o.cache is None else "request"))
    return o, scale, eight_bit


def per_head(check: Check, o: Operands, batch: int, num_heads: int) -> Operands:
    """The operands with alibi_slopes broadcast to (batch, num_heads); they and sinks are checked."""
    small = tuple(dict.fromkeys(("float32", "float64", *_own(o))))
    if o.alibi_slopes is not None:
        check.dtype("alibi_slopes", o.alibi_slopes, small)
        if o.alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
            raise check.value("alibi_slopes", f"has shape {o.alibi_slopes.shape}", f"({num_heads},) or ({batch}, {num_heads})")
        o = replace(o, alibi_slopes=o.alibi_slopes.broadcast_to((batch, num_heads)))
    if o.sinks is not None:
        check.dtype("sinks", o.sinks, small)
        check.shape("sinks", o.sinks, (num_heads,), "(num_heads,)")
    return o


def make_problem(call: str, operands: Operands, *, packed: bool, causal: Any = False, window: Any = None,
                 softmax_scale: Any = None, softcap: Any = None, dropout_p: Any = 0.0, seed: Any = None, offset: Any = 0,
                 max_seqlen_q: Any = None, max_seqlen_k: Any = None, diagonal: Any = None, dropout_at: Any = None,
                 dropout_heads: Any = None, out_dtype: Any = None) -> tuple[Problem, Operands]:
    """`problem_of` with the options as keywords, as the public functions take them."""
    assert packed == operands.packed
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    options, _ = read_position(call, options, diagonal, dropout_at, dropout_heads)
    return problem_of(call, operands, read_eight_bit(call, options, NO_SCALES, out_dtype)[0])


def problem_of(call: str, operands: Operands, options: Options) -> tuple[Problem, Operands]:
    """Validate one call. Returns its Problem, and the operands with bias, mask and alibi_slopes broadcast and lengths
    copied.

    `operands` hold canonical Views. Raises ValueError or TypeError that name `call` and the argument.
    """
    check, o, packed = Check(call), operands, operands.packed
    _qkv(check, o.q, o.k, o.v, packed)
    for name in ("alibi_slopes", "sinks", "bias", "mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "diagonals", *SCALES):
        x = getattr(o, name)
        if x is not None and x.device != o.q.device:
            raise check.value("diagonal" if name == "diagonals" else name, f"is on device {x.device}", f"q's device, {o.q.device}")
    num_heads, head_dim = o.q.shape[-2:]
    total_q = total_k = None
    if packed:
        total_q, total_k = o.q.shape[0], o.k.shape[0]
        assert o.cu_seqlens_q is not None and o.cu_seqlens_k is not None
        cu_q, batch, seqlen_q = cumulative(check, "cu_seqlens_q", o.cu_seqlens_q, total_q, options.max_seqlen_q, "max_seqlen_q")
        cu_k, batch_k, seqlen_k = cumulative(check, "cu_seqlens_k", o.cu_seqlens_k, total_k, options.max_seqlen_k, "max_seqlen_k")
        if batch_k != batch:
            raise check.value("cu_seqlens_k", f"describes {batch_k} sequences", f"as many as cu_seqlens_q, {batch}")
        used = None if o.seqused_k is None else used_lengths(check, o.seqused_k, cu_k, batch)
        diagonals = None if o.diagonals is None else read_diagonals(check, o.diagonals, batch)
        o = Operands(o.q, o.k, o.v, o.bias, o.mask, o.alibi_slopes, o.sinks, cu_q, cu_k, used,      # a third of the time of replace
                     diagonals, o.q_scale, o.k_scale, o.v_scale, o.out_scale, flex=o.flex)
    else:
        (batch, seqlen_q), seqlen_k = o.q.shape[:2], o.k.shape[1]
    scale, cap = scale_and_cap(check, options, head_dim, o.q.compute_dtype)
    o, scale, eight_bit = with_scales(check, o, options, scale, batch)
    o = per_head(check, o, batch, num_heads)
    full = (batch, num_heads, seqlen_q, seqlen_k)
    axes = f"(batch, num_heads, {'max_seqlen_q, max_seqlen_k' if packed else 'seqlen_q, seqlen_k'})"
    if o.bias is not None:
        hint = "a boolean mask goes in mask=, True where a query may attend" if o.bias.dtype == "bool" else None
        check.dtype("bias", o.bias, tuple(dict.fromkeys((*_own(o), "float32"))), hint)
        o = replace(o, bias=_broadcast(check, "bias", o.bias, full, axes))
    if o.mask is not None:
        if o.mask.dtype != "bool":
            additive = o.mask.dtype in DTYPES
            raise check.type("mask", f"has dtype {o.mask.dtype}", "bool, True where a query may attend",
                             "an additive float mask goes in bias=" if additive else words.cast("mask", o.mask.source, "bool"))
        o = replace(o, mask=_broadcast(check, "mask", o.mask, full, axes))
    if o.flex is not None:
        from .flex.read import check_flex

        o = replace(o, flex=check_flex(check, o.flex, o.q.device, (batch, num_heads, seqlen_q, seqlen_k)))
    score = Score(scale, cap, o.alibi_slopes is not None, o.bias.dtype if o.bias else None, o.mask is not None, o.sinks is not None)
    dropout = make_dropout(check, options.dropout_p, options.seed, options.offset, options.position, num_heads)
    problem = Problem(call, o.q.dtype, batch, num_heads, o.k.shape[-2], seqlen_q, seqlen_k, head_dim, o.v.shape[-1], score,
                      mask_of(check, options, o.diagonals is not None), dropout, total_q, total_k, o.seqused_k is not None, eight_bit,
                      diagonals=o.diagonals is not None, float32_out=eight_bit is None and _float32_out(check, options, o.q.dtype),
                      flex=None if o.flex is None else o.flex.flex)
    return problem, o


def check_array(call: str, argument: str, view: View, shape: tuple[int, ...], dtypes: str | tuple[str, ...], device: tuple[str, int], *,
                output: bool = False) -> None:
    """Check out, dout, lse and the like: exact shape, dtype (or one of several) and device.

    An output must also be writable, aligned and without overlap.
    """
    check = Check(call)
    check.shape(argument, view, shape, "the shape")
    check.dtype(argument, view, (dtypes,) if isinstance(dtypes, str) else dtypes, "" if output else None)
    if view.device != device:
        raise check.value(argument, f"is on device {view.device}", f"q's device, {device}")
    if output:
        if view.readonly:
            raise check.value(argument, "is read-only", "a writable array")
        if view.ptr % view.itemsize or any(s % view.itemsize for s in view.strides):
            raise check.value(argument, "is misaligned", f"addresses and strides that are multiples of {view.itemsize} bytes")
        reach = view.itemsize                           # bytes that the axes so far span; each larger stride must step over them
        for s, n in sorted((abs(s), n) for s, n in zip(view.strides, view.shape, strict=True) if n > 1):
            if s < reach and 0 not in view.shape:
                raise check.value(argument, f"has strides {view.strides}", "no two elements at one address")
            reach += (n - 1) * s
