"""What is compiled, and what it is called with: the Spec of a Problem, and the run-time arguments of its kernels.

A Spec has only what changes the code: which features there are, dtypes, padded head sizes. Numbers (scale, window, p,
seed, lengths, strides) are arguments, so that one kernel serves them all.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from ..arrays.view import View
from ..flex.program import Program
from ..problem import Grads, Mask, Operands, Problem
from . import traced
from .traced import mask_of

WIDE_CAP = 64.0         # a larger softcap needs another form of capped scores (tile/scores.py)
LOG2E = math.log2(math.e)
FAR_EXPONENT = 2.0**12      # from here on products are too coarse for lse; in the backward such a row is far
# of a row that is far in the forward, in units of log2: far_limits. The dtypes that tensor cores have
FAR_TOPS = {"float16": 2.0**28, "bfloat16": 2.0**29, "float32": 2.0**29}
MOST_FLOAT_DIM = 128        # of float32 on tensor cores but in sm90/forward_float: wider tiles of its parts do not fit shared memory
FAR_LSE = 2.0**-126         # marks a far row instead of its lse in units of log2: kernels subtract the lse itself from its scores
FAR = 2**30                 # wider windows are cut to it: the sum of a limit and a position stays inside 32 bits


@dataclass(frozen=True, slots=True)
class Spec:
    """What changes a kernel's code. A kernel that does not depend on a field is made from a Spec without it.

    Parameters
    ----------
    dtype
        Of q, k, v and out.
    head_dim, head_dim_v
        Padded to multiples of 16.
    left, right
        Whether rows have these limits.
    packed
        Sequences are packed: cu_seqlens.
    scaled
        Scores are computed before their maximum is taken, because they are not q.k times a positive factor of moderate
        size: softcap, alibi or bias, or a softmax_scale whose products leave float32.
    softcap, mask, dropout
        Whether there are any.
    cap
        Of a softcap: the form of its scores, "narrow" or, over WIDE_CAP, "wide". None: the kernel looks at its argument.
    alibi, bias, sinks
        The operand's dtype, None if absent.
    bias_pairs, bias_whole
        Two (eight) neighbours of a 16-bit bias can be read at once.
    bias_tiles
        TMA copies tiles of the bias; set by the launches of kernels that read them.
    lse
        The forward writes it.
    dbias
        Of the backward: the dtype in which dbias is stored, None if it is not wanted.
    deterministic
        Of the backward: the same bits every run.
    lengths
        Of decode/: the number of keys of each batch entry is on the device.
    paged
        Of decode/: keys are in pages that a table on the device names.
    planned
        Of decode/: a plan on the device says how keys are split.
    group_parts
        Of the backward: dk and dv are float32 parts, one of each query head (rows/groups.py). Dense only.
    out_dtype
        The dtype of the output, of a backward that of dq, dk and dv, where it is not q's.
    shared
        Of decode/: which part of a call whose requests share their first keys: those "prefix" keys, or those "behind" them, with which the
        first part's results are merged.
    diagonals
        Each packed sequence has a diagonal of its own.
    cache_dtype
        Of decode/: the dtype of 8-bit k and v beside 16-bit q.
    score_mod, mask_mod
        Programs of the caller's functions (fastattn/flex); the mask with its blocks (traced.py).
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    left: bool = False
    right: bool = False
    packed: bool = False
    scaled: bool = False
    softcap: bool = False
    cap: str | None = None
    alibi: str | None = None
    bias: str | None = None
    bias_pairs: bool = False
    bias_whole: bool = False
    bias_tiles: bool = False
    mask: bool = False
    sinks: str | None = None
    dropout: bool = False
    lse: bool = True
    dbias: str | None = None
    deterministic: bool = False
    group_parts: bool = False
    lengths: bool = False
    paged: bool = False
    planned: bool = False
    shared: str | None = None
    out_dtype: str | None = None
    diagonals: bool = False
    cache_dtype: str | None = None
    score_mod: Program | None = None
    mask_mod: Program | None = None

    @property
    def traced(self) -> bool:
        """Whether it has functions of the caller's."""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def parts(self) -> int:
        """16-bit parts of an element of q, k and v on tensor cores (ptx/parts.py)."""
        return 3 if self.dtype == "float32" else 1

    @property
    def p_dtype(self) -> str:
        """Of P and V as tensor cores multiply them: 8-bit numbers are exact as float16, and one instruction makes two of them."""
        return self.dtype if self.cache_dtype is None else "float16"

    @property
    def text(self) -> str:
        """Short and unique: "bfloat16 head_dim 128 right lse"."""
        flags = ("left", "right", "packed", "scaled", "softcap", "bias_pairs", "bias_whole", "bias_tiles", "mask", "dropout", "lse",
                 "deterministic", "group_parts", "lengths", "paged", "planned", "diagonals")
        on = [name for name in flags if getattr(self, name)]
        named = ("cap", "alibi", "bias", "sinks", "dbias", "shared", "out_dtype", "cache_dtype")
        on += [f"{name}={getattr(self, name)}" for name in named if getattr(self, name)]
        on += [f"{name}=[{getattr(self, name).text}]" for name in ("score_mod", "mask_mod") if getattr(self, name)]
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        return " ".join([self.dtype, f"head_dim {dims}", *on])


@lru_cache(maxsize=64)
def far_limits(dtype: str, softmax_scale: float, p_dtype: str | None = None) -> tuple[float, float]:
    """When a row is far in the forward, and the power of two that then replaces softmax_scale * log2(e): (beyond, power). p_dtype: of P,
    if not dtype.

    A row is far if its maximum exceeds `beyond`, whose product with the factor is below FAR_TOPS. P of near rows contains the rounding
    of that product, a factor of at most 2**8 for float16, which holds 2**15, and 2**16 for bfloat16. Beyond it, different scores times
    the power are at least 16 apart. So the smaller one has P <= 2**-16 with either factor: only scores that differ in their last bit
    notice the power, with a weight of 2**-16, and dot products of this size are not that exact.

    A maximum that changes between near and far has risen by as much. The product of `beyond` is not rounded down, so that P under this
    maximum is at most 1, and is below FAR_TOPS itself, so that the product of the next float32 is another one.

    The power keeps products finite: those of float16, below 2**41, with any power up to 2**80. bfloat16's are as large as float32's, but
    softmax_scale times a product is finite, and the power is not larger.
    """
    scale, top = np.float32(softmax_scale * LOG2E), FAR_TOPS[p_dtype or dtype]
    beyond = np.float32(min(top / float(scale), float(np.finfo(np.float32).max)))
    while beyond * scale >= top or float(beyond * scale) < float(beyond) * float(scale):
        beyond = np.nextafter(beyond, np.float32(0))
    power = round(math.log2(min(float(scale), 2.0**80))) if dtype == "float16" else math.floor(math.log2(softmax_scale))
    return float(beyond), 2.0**power


def _pad(n: int) -> int:
    return -(-n // 16) * 16


def make_spec(p: Problem, o: Operands, lse: bool) -> Spec:
    """The Spec of a forward that writes lse or not."""
    s = p.score
    score_mod, mask_mod = (None, None) if o.flex is None else (o.flex.flex.score_mod, mask_of(o.flex))
    scaled = not 1e-30 <= s.softmax_scale <= 1e30 or s.softcap is not None or s.alibi or s.bias is not None or score_mod is not None
    pairs = (o.bias is not None and o.bias.itemsize == 2 and o.bias.strides[3] == 2 and o.bias.ptr % 4 == 0
             and all(stride % 4 == 0 for stride in o.bias.strides[:3]) and p.seqlen_k % 2 == 0)
    whole = (pairs and o.bias is not None and o.bias.ptr % 16 == 0 and all(stride % 16 == 0 for stride in o.bias.strides[:3])
             and p.seqlen_k % 8 == 0)
    return Spec(
        p.dtype, _pad(p.head_dim), _pad(p.head_dim_v), left=p.mask.left is not None, right=p.mask.right is not None, packed=p.packed,
        scaled=scaled, softcap=s.softcap is not None, alibi=o.alibi_slopes.dtype if o.alibi_slopes and p.batch else None, bias=s.bias,
        bias_pairs=pairs, bias_whole=whole, mask=s.mask, sinks=o.sinks.dtype if o.sinks else None, dropout=p.dropout is not None, lse=lse,
        out_dtype="float32" if p.float32_out else None, diagonals=p.diagonals and p.batch > 0, score_mod=score_mod, mask_mod=mask_mod)


_operands = attrgetter(*(field.name for field in fields(Operands)))
OPERANDS = len(fields(Operands))


@dataclass(slots=True)
class Call:
    """One forward: the Problem and where everything is. Never changed once made."""

    problem: Problem
    operands: Operands
    out: View
    lse: View | None

    @property
    def views(self) -> list[View | None]:
        """All arrays of the call, in the order of `at`."""
        return [*_operands(self.operands), self.out, self.lse]

    def at(self, views: list[Any]) -> Call:
        """The same call of other views."""
        *operands, out, lse = views
        return Call(self.problem, Operands(*operands), out, lse)


@dataclass(slots=True)
class BackwardCall:
    """One backward. Never changed once made.

    `grads` are canonical Views, as the operands; dbias has four axes, of length 1 where bias broadcasts.
    """

    problem: Problem
    operands: Operands
    dout: View
    out: View
    lse: View
    dlse: View | None
    grads: Grads[View]
    deterministic: bool

    @property
    def views(self) -> list[View | None]:
        """All arrays of the call, in the order of `at`."""
        return [*_operands(self.operands), self.dout, self.out, self.lse, self.dlse, *self.grads]

    def at(self, views: list[Any]) -> BackwardCall:
        """The same call of other views."""
        operands, (dout, out, lse, dlse), grads = views[:OPERANDS], views[OPERANDS:OPERANDS + 4], views[OPERANDS + 4:]
        return BackwardCall(self.problem, Operands(*operands), dout, out, lse, dlse, Grads(*grads), self.deterministic)


def make_backward_spec(c: BackwardCall) -> Spec:
    """The Spec of a backward."""
    return replace(make_spec(c.problem, c.operands, False), dbias=c.grads.dbias.dtype if c.grads.dbias else None,
                   deterministic=c.deterministic)


AnyCall = Call | BackwardCall
OneCall = TypeVar("OneCall", Call, BackwardCall)      # of functions that take either kind of call and return that kind
Launch = Callable[[Any, int], None]       # (call, stream): enqueues a call like the one that it was prepared for
Values = Callable[[AnyCall], tuple[Any, ...]]
_VIEWS: dict[str, Callable[[Any], View]] = {
    **{name: attrgetter(f"operands.{name}") for name in ("q", "k", "v")}, **{name: attrgetter(name) for name in ("out", "dout")},
    **{name: attrgetter(f"grads.{name}") for name in ("dq", "dk", "dv")}}


def _stride(x: View | None, axis: int) -> int:
    """Bytes between neighbours of a canonical view's axis, counted from the last; 0 for an axis that packed arrays do
    not have."""
    return 0 if x is None or -axis > len(x.strides) else x.strides[axis]


def unfit(p: Problem, most: int, most_float: int = MOST_FLOAT_DIM) -> str | None:
    """None, or why no kernel of a tensor-core family runs the problem. `most`: the family's largest head_dim of 16 bits; most_float: of
    float32."""
    if p.dtype not in FAR_TOPS:
        return f"it has no {p.dtype} products"
    dim = max(p.head_dim, p.head_dim_v)
    if p.dtype == "float32" and dim > most_float:
        return f"head_dim is {dim}, over {most_float} in float32"
    return f"head_dim is {dim}, over {most}" if dim > most else None


def whole_chunks(x: View) -> bool:
    """Whether every row consists of contiguous, aligned pieces of 16 bytes."""
    return (x.ptr % 16 == 0 and x.shape[-1] * x.itemsize % 16 == 0 and (x.strides[-1] == x.itemsize or x.shape[-1] == 1)
            and all(stride % 16 == 0 for stride, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1))


def _group(on: bool, fields: str, values: Values) -> list[tuple[str, Values]]:
    return [(fields, values)] if on else []


def _strided(name: str) -> list[tuple[str, Values]]:
    """Pointer and strides in bytes of q, k, v, out, dout, dq, dk or dv."""
    view = _VIEWS[name]

    def strides(c: AnyCall) -> tuple[int, ...]:
        return tuple([_stride(view(c), axis) for axis in (-4, -3, -2, -1)])
    return [(f"{name}:l", lambda c: (view(c).ptr,)), (f"{name}_batch:q {name}_row:q {name}_head:q {name}_dim:q", strides)]


def _score_operand(name: str, view: Callable[[AnyCall], View | None]) -> tuple[str, Values]:
    """bias and mask: (batch, head, row, column) strides in bytes."""
    def values(c: AnyCall) -> tuple[Any, ...]:
        x = view(c)
        assert x is not None
        return x.ptr, *x.strides
    return f"{name}:l {name}_batch:q {name}_head:q {name}_row:q {name}_col:q", values


def _features(spec: Spec) -> list[tuple[str, Values]]:
    return [
        ("softmax_scale:f", lambda c: (c.problem.score.softmax_scale,)),
        *_group(not spec.scaled, "log2_scale:f", lambda c: (c.problem.score.softmax_scale * LOG2E,)),
        *_group(spec.left, "left:i", lambda c: (_limit(c.problem.mask, c.problem.mask.left, -1),)),
        *_group(spec.right, "right:i", lambda c: (_limit(c.problem.mask, c.problem.mask.right, 1),)),
        ("top_left:i", lambda c: (int(c.problem.mask.top_left or c.problem.mask.first is not None),)),
        *_group(spec.diagonals, "diagonals:l diagonals_step:q",
                lambda c: (c.operands.diagonals.ptr, c.operands.diagonals.strides[0])),  # type: ignore[union-attr]
        *_group(spec.softcap, "softcap:f", lambda c: (c.problem.score.softcap,)),
        *_group(spec.alibi is not None, "alibi:l alibi_batch:q alibi_head:q",
                lambda c: (c.operands.alibi_slopes.ptr, *c.operands.alibi_slopes.strides)),  # type: ignore[union-attr]
        *_group(spec.alibi is not None, "alibi_diagonal:i", lambda c: (c.problem.mask.first or 0,)),
        *([_score_operand("bias", lambda c: c.operands.bias)] if spec.bias else []),
        *([_score_operand("mask", lambda c: c.operands.mask)] if spec.mask else []),
        *_group(spec.sinks is not None, "sinks:l sinks_head:q",
                lambda c: (c.operands.sinks.ptr, c.operands.sinks.strides[0])),  # type: ignore[union-attr]
        *_group(spec.dropout, "threshold:I keep_scale:f seed_low:I seed_high:I offset:I row16:i column16:i plane:I plane_heads:i",
                _dropout_values),
        *([(traced.fields(spec.score_mod, traced.SCORE, spec.dtype == "float64"), traced.score_values)] if spec.score_mod else []),
        *([(traced.fields(spec.mask_mod, traced.MASK, spec.dtype == "float64"), traced.mask_values)] if spec.mask_mod else []),
        *_group(spec.lse, "lse:l", lambda c: (c.lse.ptr if c.lse else 0,)),
    ]


def _dropout_values(c: AnyCall) -> tuple[Any, ...]:
    d = c.problem.dropout
    assert d is not None
    # compared with 16 random bits in the upper half of a word; with p = 1 the value 65535 is kept, and keep_scale 0 makes it 0
    first, heads = d.plane(c.problem.num_heads)
    return (min(d.threshold, 65535) << 16, d.keep_scale, d.seed & 0xFFFFFFFF, d.seed >> 32, d.offset, d.row // 16, d.column // 16,
            first, heads)


def _limit(mask: Mask, keys: int | None, sign: int) -> int:
    """A limit of a row in keys from its diagonal, as kernels take it; `sign` is that of its direction.

    Where the call says on which key row 0 stands, that is part of the limits, and kernels take the diagonal to be top-left. So they have
    one rule, and a limit may be negative.
    """
    return max(min((keys or 0) + sign * (mask.first or 0), FAR), -FAR)


def _sizes(c: AnyCall) -> tuple[Any, ...]:
    p = c.problem
    return p.seqlen_q, p.seqlen_k, p.batch, p.num_heads, p.group, p.head_dim, p.head_dim_v, p.total_q or 0


class Arguments:
    """The run-time arguments of a kernel: `fields` for compiling it, `values(call, own)` for a launch.

    Parameters
    ----------
    spec
        Decides which operands and numbers there are.
    own
        The kernel's own fields ("counter:l tiles:i"), which come first; compile.Source explains the letters.
    strided
        The views whose pointer and strides the kernel gets: q, k, v, out and, of a BackwardCall, dout, dq, dk, dv.
    online
        Whether the kernel keeps running maxima (tile/softmax.py), and so has to know which of them are far.
    """

    def __init__(self, spec: Spec, own: str = "", strided: tuple[str, ...] = (), *, online: bool = False) -> None:
        groups = [("seqlen_q:i seqlen_k:i batch:i num_heads:i group:i head_dim:i head_dim_v:i total_q:i", _sizes),
                  *(group for name in strided for group in _strided(name)), *_features(spec),
                  *_group(online and not spec.scaled, "far_beyond:f far_scale:f",
                          lambda c: far_limits(c.problem.dtype, c.problem.score.softmax_scale, spec.p_dtype))]
        texts = [own, *(text for text, _ in groups)]
        self.fields = tuple((name, letter) for text in texts for name, _, letter in (field.partition(":") for field in text.split()))
        self._groups = [(values, ":l" in text) for text, values in groups]

    def values(self, call: AnyCall, own: tuple[Any, ...] = ()) -> list[Any]:
        """Values of `fields` for a call. `own`: those of the kernel's own fields."""
        return self.bound(call)(call, own)

    def bound(self, call: AnyCall) -> Callable[[AnyCall, tuple[Any, ...]], list[Any]]:
        """`values` for this call and those that differ from it in addresses only. Everything but addresses is looked up
        once."""
        parts: list[Any] = []       # tuples of what stays, functions of what does not
        for group, pointers in self._groups:
            if pointers:
                parts.append(group)
            elif parts and isinstance(parts[-1], tuple):
                parts[-1] += group(call)
            else:
                parts.append(group(call))

        def values(call: AnyCall, own: tuple[Any, ...]) -> list[Any]:
            values = list(own)
            for part in parts:
                values += part if isinstance(part, tuple) else part(call)
            return values
        return values
