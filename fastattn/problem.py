"""What is computed: the frozen `Problem`, made once from the caller's arguments, and the one definition of every mask.

All validation of the public functions is in this file and nowhere else; below it there are no checks and no defaults.
Shapes here are canonical: (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim).
"""
from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import words
from .buffers import FLOATS, LENGTHS, View, in_device_memory
from .errors import message

DTYPES = FLOATS
MAX_HEAD_DIM = 512


Rows = TypeVar("Rows", int, np.ndarray[Any, Any])


# ---------------------------------------------------------------- masks: one interval of keys per query row
def diagonal_of(row: Rows, seqlen_q: int, seqlen_k: int, top_left: bool = False) -> Rows:
    """The key on which a query row stands: masks, windows and ALiBi count from it."""
    return row if top_left else row + (seqlen_k - seqlen_q)


def row_bounds(row: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None,
               top_left: bool = False) -> tuple[int, int]:
    """Keys [lo, hi) that query `row` may see. Every structural mask (causal, window, padding, tail) is this interval.

    `left` and `right` count keys from the diagonal, inclusive; None is no limit. The diagonal of row i is key
    i + seqlen_k - seqlen_q (bottom-right aligned), or i when `top_left`. An empty interval has lo == hi.
    """
    diagonal = diagonal_of(row, seqlen_q, seqlen_k, top_left)
    lo = 0 if left is None else min(max(diagonal - left, 0), seqlen_k)
    hi = seqlen_k if right is None else min(max(diagonal + right + 1, 0), seqlen_k)
    return lo, max(lo, hi)


def block_bounds(first_row: int, last_row: int, block_n: int, seqlen_q: int, seqlen_k: int, left: int | None,
                 right: int | None, top_left: bool = False) -> tuple[int, int, int, int]:
    """Key blocks of `block_n` for query rows [first_row, last_row): (n_min, full_min, full_max, n_max).

    Blocks outside [n_min, n_max) are skipped, blocks in [full_min, full_max) need no mask, the others are partial.
    Holds because lo and hi of `row_bounds` never decrease with the row.
    """
    lo_first, hi_first = row_bounds(first_row, seqlen_q, seqlen_k, left, right, top_left)
    lo_last, hi_last = row_bounds(last_row - 1, seqlen_q, seqlen_k, left, right, top_left)
    n_min, n_max = lo_first // block_n, -(-hi_last // block_n)
    if lo_first >= hi_last:
        return n_min, n_min, n_min, n_min
    full_min, full_max = -(-lo_last // block_n), hi_first // block_n
    full_min = min(max(full_min, n_min), n_max)
    return n_min, full_min, min(max(full_max, full_min), n_max), n_max


def query_bounds(first_key: int, last_key: int, block_m: int, seqlen_q: int, seqlen_k: int, left: int | None,
                 right: int | None, top_left: bool = False) -> tuple[int, int, int, int]:
    """Blocks of `block_m` query rows for keys [first_key, last_key), some of them: (m_min, full_min, full_max, m_max).

    The twin of `block_bounds`: in blocks outside [m_min, m_max) no row sees any of the keys, in [full_min, full_max) every row
    sees all of them. Key j is seen by the rows from j - right to j + left, counted from the diagonal.
    """
    diagonal = 0 if top_left else seqlen_k - seqlen_q

    def clip(row: int) -> int:
        return min(max(row, 0), seqlen_q)
    first = 0 if right is None else clip(first_key - diagonal - right)
    end = seqlen_q if left is None else clip(last_key - diagonal + left)
    full_first = 0 if right is None else clip(last_key - 1 - diagonal - right)
    full_end = seqlen_q if left is None else clip(first_key + 1 - diagonal + left)
    m_min, m_max = first // block_m, -(-end // block_m)
    if first >= end:
        return m_min, m_min, m_min, m_min
    full_min = min(max(-(-full_first // block_m), m_min), m_max)
    return m_min, full_min, min(max(full_end // block_m, full_min), m_max), m_max


@dataclass(frozen=True, slots=True)
class Mask:
    """The structural mask: keys from `left` before to `right` after the diagonal, inclusive; None is no limit."""

    left: int | None = None
    right: int | None = None
    top_left: bool = False

    def diagonal(self, row: Rows, seqlen_q: int, seqlen_k: int) -> Rows:
        return diagonal_of(row, seqlen_q, seqlen_k, self.top_left)

    def bounds(self, row: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        return row_bounds(row, seqlen_q, seqlen_k, self.left, self.right, self.top_left)


@dataclass(frozen=True, slots=True)
class Score:
    """How a dot product becomes a score: softcap(softmax_scale * q.k) + alibi + bias, then the boolean mask.

    `bias` is the dtype of the bias operand or None; the other features are flags of operands that are there or not.
    """

    softmax_scale: float
    softcap: float | None = None
    alibi: bool = False
    bias: str | None = None
    mask: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Dropout:
    """Philox dropout addressed by position (see philox.py): `seed` is the 64-bit key, `offset` the last counter word."""

    p: float
    seed: int
    offset: int = 0

    @property
    def threshold(self) -> int:
        """A 16-bit lane is kept when it is >= threshold = round(p * 65536)."""
        return round(self.p * 65536)

    @property
    def keep_scale(self) -> float:
        """1 / (1 - threshold / 65536); 0 when nothing is kept, so that p = 1 gives zeros."""
        return 65536.0 / (65536 - self.threshold) if self.threshold < 65536 else 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem. Packed problems have `total_q` and `total_k`, and seqlen_q, seqlen_k are their maxima."""

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
    mask: Mask = Mask()
    dropout: Dropout | None = None
    total_q: int | None = None
    total_k: int | None = None
    seqused_k: bool = False

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
    def compute_dtype(self) -> str:
        """Softmax and accumulation: float32, float64 for float64 input. Also the dtype of lse."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def lse_dtype(self) -> str:
        return self.compute_dtype


@dataclass(slots=True)
class Operands:
    """Where the inputs of a Problem are: canonical Views; `bias` and `mask` are already broadcast to four axes.

    Never changed once made; not frozen for the reason that View gives.
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

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def plain(self) -> bool:
        """Nothing but q, k, v and lengths: then shapes, dtypes, strides and options decide what an engine does."""
        return self.bias is None and self.mask is None and self.alibi_slopes is None and self.sinks is None


# ---------------------------------------------------------------- validation
class Check:
    """Raises for one public call: `check.value("k", "has 5 heads", "a divisor of 8")`."""

    def __init__(self, call: str) -> None:
        self.call = call

    def value(self, argument: str, has: object, expected: str, hint: str = "") -> ValueError:
        return ValueError(message(self.call, argument, has, expected, hint))

    def type(self, argument: str, has: object, expected: str, hint: str = "") -> TypeError:
        return TypeError(message(self.call, argument, has, expected, hint))

    def shape(self, argument: str, view: View, shape: tuple[int, ...], meaning: str) -> None:
        if view.shape != shape:
            raise self.value(argument, f"has shape {view.shape}", f"{meaning} = {shape}")

    def dtype(self, argument: str, view: View, allowed: tuple[str, ...], hint: str | None = None) -> None:
        """`hint` None: the cast to the first that is allowed, in the words of the array's library."""
        if view.dtype not in allowed:
            hint = words.cast(argument, view.owner, allowed[0]) if hint is None else hint
            raise self.type(argument, f"has dtype {view.dtype}", " or ".join(allowed), hint)

    def scalar(self, argument: str, x: Any, expected: str, hint: str = "") -> Any:
        """What a 0-d array or tensor in host memory holds, as a Python number; other kinds of numbers as they are. TypeError where reading
        would stop the host, drop a gradient, or is not possible."""
        if isinstance(x, np.generic):
            return x.item()
        if not hasattr(x, "shape"):
            return x
        stand_in = words.transformed(x)
        if stand_in is not None:
            raise self.type(argument, stand_in[0], expected, stand_in[1])
        if words.in_graph(x):
            raise self.type(argument, "requires grad, which fastattn would drop from the graph", expected, f"pass {argument}.item()")
        if in_device_memory(x):
            raise self.type(argument, "is in device memory", f"{expected}, because the host never waits for a device",
                            f"pass {argument}.item(), or keep the number on the host")
        if tuple(x.shape) != () or not hasattr(x, "item"):
            raise self.type(argument, f"is {words.shown(x)}", expected, hint)
        return x.item()

    def index(self, argument: str, x: Any, expected: str, hint: str = "") -> int:
        y = self.scalar(argument, x, expected, hint)
        try:
            return int(operator.index(y))
        except TypeError:
            raise self.type(argument, f"is {words.shown(x)}", expected, hint) from None

    def integer(self, argument: str, x: Any, low: int, high: int, hint: str = "") -> int:
        expected = f"an integer in [{low}, {high}]"
        n = x if type(x) is int else self.index(argument, x, expected, hint)
        if not low <= n <= high:
            raise self.value(argument, f"is {words.shown(n)}", expected, hint)
        return n

    def number(self, argument: str, x: Any, expected: str) -> float:
        y = x
        if type(x) is not float:
            y = self.scalar(argument, x, expected)
            if isinstance(y, (str, bytes, bool)):
                raise self.type(argument, f"is {words.shown(x)}", expected)
            try:
                y = float(y)
            except (TypeError, ValueError):
                raise self.type(argument, f"is {words.shown(x)}", expected) from None
            except OverflowError:
                raise self.value(argument, f"is {words.shown(y)}, beyond float64", expected) from None
        if not math.isfinite(y):
            raise self.value(argument, f"is {y}", expected)
        return y  # type: ignore[no-any-return]


# ---------------------------------------------------------------- options
class Options(NamedTuple):
    """The options of one call as plain values, and all that is known of them behind the public functions.

    Each is exactly of the type that stands here, made by `read_options` from whatever a caller gave. So equal Options are the same
    options, in any cache, whatever becomes of the objects they were read from. Ranges are make_problem's to check.
    """

    causal: bool | str = False                              # True is bottom-right; the one string is "top_left"
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    offset: int = 0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


_SCALE, _CAP, _PROBABILITY = "a finite number", "a positive number, or None for no cap", "a probability in [0, 1]"
_SEED, _OFFSET, _LENGTH = (-(2**63), 2**64 - 1), (0, 2**32 - 1), (0, 2**31 - 1)


def read_options(call: str, causal: Any, window: Any, softmax_scale: Any, softcap: Any, dropout_p: Any, seed: Any, offset: Any,
                 max_seqlen_q: Any = None, max_seqlen_k: Any = None) -> Options:
    """Options from a caller's arguments: numbers of any kind, 0-d arrays and tensors in host memory. TypeError or ValueError that name
    `call` and the argument for anything else. What is plain already passes."""
    if type(causal) is not bool:
        causal = _causal(Check(call), causal)
    if window is not None:
        window = _window(call, window)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = Check(call).number("softmax_scale", softmax_scale, _SCALE)
    if softcap is not None and type(softcap) is not float:
        softcap = Check(call).number("softcap", softcap, _CAP)
    if type(dropout_p) is not float:
        dropout_p = Check(call).number("dropout_p", dropout_p, _PROBABILITY)
    if seed is not None and type(seed) is not int:
        seed = Check(call).integer("seed", seed, *_SEED)
    if type(offset) is not int:
        offset = Check(call).integer("offset", offset, *_OFFSET)
    if max_seqlen_q is not None and type(max_seqlen_q) is not int:
        max_seqlen_q = Check(call).integer("max_seqlen_q", max_seqlen_q, *_LENGTH)
    if max_seqlen_k is not None and type(max_seqlen_k) is not int:
        max_seqlen_k = Check(call).integer("max_seqlen_k", max_seqlen_k, *_LENGTH)
    return tuple.__new__(Options, (causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k))


def _causal(check: Check, causal: Any) -> bool | str:
    expected = "False, True, 'bottom_right' or 'top_left'"
    plain = check.scalar("causal", causal, expected, "an array of what may be attended goes in mask=")
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, str) and plain in ("top_left", "bottom_right"):
        return True if plain == "bottom_right" else "top_left"
    raise check.value("causal", f"is {words.shown(causal)}", expected)


def _is_limit(x: Any) -> bool:
    return x is None or (type(x) is int and 0 <= x < 2**31)


def _window(call: str, window: Any) -> tuple[int | None, int | None]:
    if type(window) is tuple and len(window) == 2 and _is_limit(window[0]) and _is_limit(window[1]):
        return window
    check = Check(call)
    if getattr(window, "shape", None) != (2,) and not (isinstance(window, (tuple, list)) and len(window) == 2):
        hint = f"window=({window}, 0) looks back only" if isinstance(window, int) else ""
        raise check.value("window", f"is {words.shown(window)}", "a pair (left, right) of counts, None for no limit", hint)
    left, right = (None if w is None else check.integer("window", w, *_LENGTH, "None means no limit") for w in window)
    return left, right


def _qkv(check: Check, q: View, k: View, v: View, packed: bool) -> None:
    """Ranks, dtypes, devices and head counts of q, k and v; the layouts differ only in their leading axes."""
    rank, axes = (3, "(total, num_heads, head_dim)") if packed else (4, "(batch, seqlen, num_heads, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != rank:
            hint = "use attention_varlen for packed (total, num_heads, head_dim) arrays" if rank == 4 and len(x.shape) == 3 else ""
            raise check.value(name, f"has {len(x.shape)} axes, shape {x.shape}", f"{rank} axes {axes}", hint)
        check.dtype(name, x, DTYPES)
        if x.dtype != q.dtype:
            raise check.type(name, f"has dtype {x.dtype}", f"q's dtype, {q.dtype}", words.like(name, x.owner, "q"))
        if x.device != q.device:
            raise check.value(name, f"is on device {x.device}", f"q's device, {q.device}")
    if k.shape[:-1] != v.shape[:-1]:
        raise check.value("v", f"has shape {v.shape}", f"k's shape but for the last axis, {k.shape[:-1]} + (head_dim_v,)")
    if k.shape[-1] != q.shape[-1]:
        raise check.value("k", f"has head_dim {k.shape[-1]}", f"q's head_dim, {q.shape[-1]}")
    if not packed and k.shape[0] != q.shape[0]:
        raise check.value("k", f"has batch {k.shape[0]}", f"q's batch, {q.shape[0]}")
    for name, n in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        check.integer(name, n, 1, MAX_HEAD_DIM)
    heads, heads_k = q.shape[-2], k.shape[-2]
    if heads_k == 0 or heads % heads_k:
        near = max((d for d in range(1, min(heads, heads_k) + 1) if heads % d == 0), default=1)
        raise check.value("k", f"has {heads_k} heads", f"a divisor of q's num_heads = {heads}", f"num_heads_k = {near} works")


def _limited(check: Check, argument: str, x: float, expected: str, dtype: str) -> float:
    """x in half of the range of the softmax's arithmetic, because engines count scores in units of log2; 0.0 where that rounds to 0."""
    info = np.finfo(dtype)
    if abs(x) > float(info.max) / 2:
        raise check.value(argument, f"is {x}", f"{expected} of at most {float(info.max) / 2:.3g}, because scores are {dtype}")
    return x if abs(x) > float(info.smallest_subnormal) / 2 else 0.0


def _scale_and_cap(check: Check, options: Options, head_dim: int, dtype: str) -> tuple[float, float | None]:
    """softmax_scale and softcap as the softmax's arithmetic, in `dtype`, can use them."""
    if options.softmax_scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    else:
        scale = _limited(check, "softmax_scale", check.number("softmax_scale", options.softmax_scale, _SCALE), _SCALE, dtype)
    if options.softcap is None:
        return scale, None
    cap = check.number("softcap", options.softcap, _CAP)
    if _limited(check, "softcap", cap, _CAP, dtype) <= 0:
        raise check.value("softcap", f"is {cap}" if cap <= 0 else f"is {cap}, which {dtype} rounds to 0", _CAP)
    if abs(scale) / cap > float(np.finfo(dtype).max) / 2:
        raise check.value("softcap", f"is {cap} beside softmax_scale = {scale}", f"softmax_scale / softcap in {dtype}'s range")
    return scale, cap


def _mask(options: Options) -> Mask:
    left, right = options.window or (None, None)
    return Mask(left, 0 if options.causal else right, options.causal == "top_left")


def make_dropout(check: Check, dropout_p: float, seed: int | None, offset: int) -> Dropout | None:
    p = check.number("dropout_p", dropout_p, _PROBABILITY)
    if not 0.0 <= p <= 1.0:
        raise check.value("dropout_p", f"is {p}", _PROBABILITY)
    if p == 0.0:
        return None
    if seed is None:
        raise check.value("seed", "is None", f"a 64-bit integer, because dropout_p = {p}",
                          "pass seed=..., a fresh one each step; backward takes the same one")
    return Dropout(p, check.integer("seed", seed, *_SEED) & (2**64 - 1), check.integer("offset", offset, *_OFFSET))


def _broadcast(check: Check, argument: str, x: View, shape: tuple[int, ...], axes: str) -> View:
    if len(x.shape) > len(shape) or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(shape), strict=False)):
        padding = len(x.shape) == 2 and x.shape == (shape[0], shape[3])
        raise check.value(argument, f"has shape {x.shape}", f"a shape that broadcasts to {axes} = {shape}",
                          f"{argument}[:, None, None, :] gives one of (batch, keys) these axes" if padding else "")
    return x.broadcast_to(shape)


def read_lengths(check: Check, argument: str, lengths: View) -> tuple[View, np.ndarray[Any, Any] | None]:
    """Lengths in host memory as int64 in memory of our own, and that array: they are read once, here, so what is checked is what engines
    use, whatever another thread writes meanwhile. Lengths on a device stay where they are."""
    check.dtype(argument, lengths, LENGTHS)
    if lengths.device[0] != "cpu":
        return lengths, None
    own = lengths.numpy().astype(np.int64, order="C")
    return View(own.__array_interface__["data"][0], own.shape, own.strides, "int64", owner=own), own


def cumulative(check: Check, argument: str, lengths: View, total: int, most: Any, most_name: str) -> tuple[View, int, int]:
    """(own cumulative lengths, number of sequences, longest); values are read only where they are in host memory."""
    cu, c = read_lengths(check, argument, lengths)
    if len(cu.shape) != 1 or cu.shape[0] < 1:
        raise check.value(argument, f"has shape {cu.shape}", "one axis, (number of sequences + 1,)")
    given = None if most is None else check.integer(most_name, most, *_LENGTH)
    if c is None:
        return cu, cu.shape[0] - 1, total if given is None else given
    falls = c[1:] < c[:-1]                                  # compared, because a difference may overflow
    if c[0] != 0 or falls.any():
        i = int(np.argmax(falls)) + 1 if c[0] == 0 else 0
        raise check.value(argument, f"starts {c[:8].tolist()}, entry {i} is {c[i]}", "cumulative lengths: 0 first, never decreasing")
    if c[-1] > total:
        raise check.value(argument, f"ends at {c[-1]}", f"at most the {total} rows of the packed array")
    longest = int((c[1:] - c[:-1]).max(initial=0))
    if given is not None and given < longest:
        raise check.value(most_name, f"is {given}", f"at least the longest sequence of {argument}, {longest}")
    return cu, cu.shape[0] - 1, longest if given is None else given


def _used(check: Check, used: View, cu_seqlens_k: View, batch: int) -> View:
    """Own seqused_k, each at most its sequence's length."""
    used, counts = read_lengths(check, "seqused_k", used)
    check.shape("seqused_k", used, (batch,), "(number of sequences,)")
    if counts is not None:
        c = cu_seqlens_k.numpy()
        room = c[1:] - c[:-1]
        wrong = (counts < 0) | (counts > room)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise check.value("seqused_k", f"has {counts[i]} for sequence {i}", f"a count from 0 to its length, {room[i]}")
    return used


def make_problem(call: str, operands: Operands, *, packed: bool, causal: Any = False, window: Any = None,
                 softmax_scale: Any = None, softcap: Any = None, dropout_p: Any = 0.0, seed: Any = None, offset: Any = 0,
                 max_seqlen_q: Any = None, max_seqlen_k: Any = None) -> tuple[Problem, Operands]:
    """`problem_of` with options as the public functions take them."""
    assert packed == operands.packed
    return problem_of(call, operands, read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q,
                                                   max_seqlen_k))


def problem_of(call: str, operands: Operands, options: Options) -> tuple[Problem, Operands]:
    """Validate one call and return its Problem, and the operands with bias, mask and alibi_slopes broadcast and lengths of our own.

    `operands` hold canonical Views. Raises ValueError or TypeError that name `call` and the argument.
    """
    check, o, packed = Check(call), operands, operands.packed
    _qkv(check, o.q, o.k, o.v, packed)
    for name in ("alibi_slopes", "sinks", "bias", "mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        x = getattr(o, name)
        if x is not None and x.device != o.q.device:
            raise check.value(name, f"is on device {x.device}", f"q's device, {o.q.device}")
    num_heads, head_dim = o.q.shape[-2:]
    total_q = total_k = None
    if packed:
        total_q, total_k = o.q.shape[0], o.k.shape[0]
        assert o.cu_seqlens_q is not None and o.cu_seqlens_k is not None
        cu_q, batch, seqlen_q = cumulative(check, "cu_seqlens_q", o.cu_seqlens_q, total_q, options.max_seqlen_q, "max_seqlen_q")
        cu_k, batch_k, seqlen_k = cumulative(check, "cu_seqlens_k", o.cu_seqlens_k, total_k, options.max_seqlen_k, "max_seqlen_k")
        if batch_k != batch:
            raise check.value("cu_seqlens_k", f"describes {batch_k} sequences", f"as many as cu_seqlens_q, {batch}")
        used = None if o.seqused_k is None else _used(check, o.seqused_k, cu_k, batch)
        o = Operands(o.q, o.k, o.v, o.bias, o.mask, o.alibi_slopes, o.sinks, cu_q, cu_k, used)      # three times as fast as replace
    else:
        (batch, seqlen_q), seqlen_k = o.q.shape[:2], o.k.shape[1]
    scale, cap = _scale_and_cap(check, options, head_dim, "float64" if o.q.dtype == "float64" else "float32")
    small = ("float32", "float64", o.q.dtype)
    if o.alibi_slopes is not None:
        check.dtype("alibi_slopes", o.alibi_slopes, small)
        if o.alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
            raise check.value("alibi_slopes", f"has shape {o.alibi_slopes.shape}", f"({num_heads},) or ({batch}, {num_heads})")
        o = replace(o, alibi_slopes=o.alibi_slopes.broadcast_to((batch, num_heads)))
    if o.sinks is not None:
        check.dtype("sinks", o.sinks, small)
        check.shape("sinks", o.sinks, (num_heads,), "(num_heads,)")
    full = (batch, num_heads, seqlen_q, seqlen_k)
    axes = f"(batch, num_heads, {'max_seqlen_q, max_seqlen_k' if packed else 'seqlen_q, seqlen_k'})"
    if o.bias is not None:
        hint = "a boolean mask goes in mask=, True where a query may attend" if o.bias.dtype == "bool" else None
        check.dtype("bias", o.bias, tuple(dict.fromkeys((o.q.dtype, "float32"))), hint)
        o = replace(o, bias=_broadcast(check, "bias", o.bias, full, axes))
    if o.mask is not None:
        if o.mask.dtype != "bool":
            additive = o.mask.dtype in DTYPES
            raise check.type("mask", f"has dtype {o.mask.dtype}", "bool, True where a query may attend",
                             "an additive float mask goes in bias=" if additive else words.cast("mask", o.mask.owner, "bool"))
        o = replace(o, mask=_broadcast(check, "mask", o.mask, full, axes))
    score = Score(scale, cap, o.alibi_slopes is not None, o.bias.dtype if o.bias else None, o.mask is not None, o.sinks is not None)
    problem = Problem(call, o.q.dtype, batch, num_heads, o.k.shape[-2], seqlen_q, seqlen_k, head_dim, o.v.shape[-1], score,
                      _mask(options), make_dropout(check, options.dropout_p, options.seed, options.offset), total_q, total_k,
                      o.seqused_k is not None)
    return problem, o


def check_array(call: str, argument: str, view: View, shape: tuple[int, ...], dtype: str, device: tuple[str, int], *,
                output: bool = False) -> None:
    """out, dout, lse and the like: exact shape, dtype and device; an output also writable, aligned and not self-overlapping."""
    check = Check(call)
    check.shape(argument, view, shape, "the shape")
    check.dtype(argument, view, (dtype,), "" if output else None)
    if view.device != device:
        raise check.value(argument, f"is on device {view.device}", f"q's device, {device}")
    if output:
        if view.readonly:
            raise check.value(argument, "is read-only", "a writable array")
        if view.ptr % view.itemsize or any(s % view.itemsize for s in view.strides):
            raise check.value(argument, "is misaligned", f"addresses and strides that are multiples of {view.itemsize} bytes")
        reach = view.itemsize                           # bytes that the axes so far span: each stride must step over them
        for s, n in sorted((abs(s), n) for s, n in zip(view.strides, view.shape, strict=True) if n > 1):
            if s < reach and 0 not in view.shape:
                raise check.value(argument, f"has strides {view.strides}", "no two elements at one address")
            reach += (n - 1) * s
