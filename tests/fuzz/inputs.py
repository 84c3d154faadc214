"""The numbers of a Spec as plain arrays, and the arguments of its call: the same numbers as a caller might hold them."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastattn
from tests.tools.problems import NUMPY

from . import formula, functions, memory, values
from .spec import Spec

Array = np.ndarray[Any, Any]


@dataclass
class Inputs:
    """q, dout (batch, seqlen_q, num_heads, ...), k, v (batch, seqlen_k, num_heads_k, ...); packed without the batch. Options resolved."""

    spec: Spec
    q: Array
    k: Array
    v: Array
    dout: Array
    dlse: Array | None
    bias: Array | None
    mask: Array | None
    slopes: Array | None
    sinks: Array | None
    scale: float
    cu_q: Array | None = None
    cu_k: Array | None = None
    keep: Array | None = None                   # (sequences, num_heads, longest q, longest k): what dropout multiplies P by
    held: dict[str, Array] = field(default_factory=dict)        # arrays of score_mod and mask_mod, blocks: functions.held

    @property
    def lse_shape(self) -> tuple[int, ...]:
        s = self.spec
        return (s.num_heads, self.q.shape[0]) if s.packed else (s.batch, s.num_heads, s.seqlen_q)


def compute_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _whole(s: Spec) -> Array:
    """The part at dropout_at of a larger problem's mask. That of a far one is only drawn where the part is."""
    b, h, i, j = s.dropout_at or (0, 0, 0, 0)
    heads = s.num_heads if s.dropout_heads is None else s.dropout_heads
    if max(b, h, i, j, heads) > 200:
        return fastattn.dropout_mask(s.sequences, s.num_heads, *s.full[2:], dropout_p=s.dropout_p, seed=s.dropout_seed, offset=s.offset,
                                     dropout_at=s.dropout_at, dropout_heads=s.dropout_heads)
    whole = fastattn.dropout_mask(b + s.sequences, heads, i + s.full[2], j + s.full[3], dropout_p=s.dropout_p, seed=s.dropout_seed,
                                  offset=s.offset)
    return whole[b:, h:h + s.num_heads, i:, j:]


def make(spec: Spec) -> Inputs:
    """The numbers of a problem; every one follows from the spec."""
    s, random = spec, np.random.default_rng(spec.seed)
    rows_q, rows_k = (s.batch, s.seqlen_q), (s.batch, s.seqlen_k)
    cu_q = cu_k = None
    if s.lengths_q is not None:
        cu_q, cu_k = (np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32) for lengths in (s.lengths_q, s.lengths_k))
        rows_q, rows_k = (int(cu_q[-1]) + s.spare[0],), (int(cu_k[-1]) + s.spare[1],)  # type: ignore[assignment]
    scale = 1 / math.sqrt(s.head_dim) if s.softmax_scale is None else s.softmax_scale
    if s.dtype != "float64":
        scale = float(np.float32(scale))
    q, k = values.query_and_key(random, s.values, s.dtype, (*rows_q, s.num_heads, s.head_dim), (*rows_k, s.num_heads_k, s.head_dim), scale)
    v = (values.standard(random, (*rows_k, s.num_heads_k, s.head_dim_v), "float32") * s.v_size).astype(NUMPY[s.dtype])
    dout = values.standard(random, (*rows_q, s.num_heads, s.head_dim_v), s.dtype)
    real = compute_dtype(s.dtype)
    x = Inputs(s, q, k, v, dout, None, None, None, None, None, scale, cu_q, cu_k)
    x.dlse = values.standard(random, x.lse_shape, real) if s.dlse else None
    if s.bias is not None:
        large = s.values != "normal" or abs(scale) > 100 or s.alibi is not None
        x.bias = values.bias_of(random, s.bias_values, s.bias, s.bias_dtype, large)
    if s.mask is not None:
        x.mask = random.random(s.mask) < s.mask_density
    if s.alibi is not None:
        x.slopes = random.choice([0.5, 0.25, 0.0625, 0.03, 0.0], (s.num_heads,) if s.alibi == "heads" else (s.sequences, s.num_heads))
        x.slopes = x.slopes.astype(real)
    if s.sinks is not None:
        x.sinks = random.standard_normal(s.num_heads).astype(real)
        if s.sinks == "large":
            x.sinks *= random.choice([1e2, 1e5, 1e9, 1e20], s.num_heads).astype(real)
    x.held = functions.held(random, s, np.dtype(real))
    if s.dropout_p:
        kept = fastattn.dropout_mask(s.sequences, s.num_heads, *s.full[2:], dropout_p=s.dropout_p, seed=s.dropout_seed, offset=s.offset)
        if s.dropout_at is not None or s.dropout_heads is not None:
            kept = _whole(s)
        threshold = round(s.dropout_p * 65536)
        x.keep = kept * (65536 / (65536 - threshold) if threshold < 65536 else 0.0)
    for entry in s.repeats:
        array, axis = getattr(x, entry[:-1]), int(entry[-1])
        if array.shape[axis]:
            array[...] = np.take(array, [0], axis)
    if s.hidden is not None:
        _hide(x)
    return x


def _hide(x: Inputs) -> None:
    """NaN or infinity in all that reaches no result: padding, keys that nobody attends, rows that attend nothing, masked positions."""
    s, bad = x.spec, float(str(x.spec.hidden))
    everywhere = s.library == "numpy"           # the tensor-core kernels promise it of padding only
    repeated = {entry[:-1] for entry in s.repeats}
    bias_seen = None if x.bias is None else np.zeros(s.full, bool)
    nobody_q, nobody_k = (np.ones(array.shape[:-1], bool) for array in (x.q, x.k))     # places to be hidden
    for n in range(s.sequences):
        rows_q, rows_k, rows_q_all, rows_k_all = formula.rows(s, n)
        visible = formula.visible(x, n)                                         # (num_heads, rows, keys)
        if bias_seen is not None:
            bias_seen[n, :, :visible.shape[1], :visible.shape[2]] = visible
        nobody_q[rows_q_all], nobody_k[rows_k_all] = False, True
        nobody_k[rows_k] = False
        if everywhere:
            nobody_q[rows_q] = ~visible.any(axis=2).T
            by_key = visible.any(axis=1).reshape(s.num_heads_k, s.num_heads // s.num_heads_k, visible.shape[2]).any(axis=1)
            nobody_k[rows_k] = ~by_key.T
    for name, array, nobody in (("q", x.q, nobody_q), ("dout", x.dout, nobody_q), ("k", x.k, nobody_k), ("v", x.v, nobody_k)):
        if name not in repeated:
            array[nobody] = bad
    if x.bias is not None and bias_seen is not None and everywhere and "bias" not in repeated:
        axes = tuple(range(4 - x.bias.ndim)) + tuple(4 - x.bias.ndim + i for i, n in enumerate(x.bias.shape) if n == 1)
        seen = bias_seen.any(axis=axes, keepdims=True)
        x.bias[~np.broadcast_to(seen.reshape(seen.shape[4 - x.bias.ndim:]), x.bias.shape)] = bad


# ---------------------------------------------------------------- as a caller holds them
@dataclass
class Arguments:
    """Of the public functions: `arrays` positional or held by functions, `lengths` behind them, `options` by name."""

    arrays: dict[str, Any]
    lengths: tuple[Any, ...]
    options: dict[str, Any]


def swapped(spec: Spec, x: Array) -> Array:
    """bshd <-> the layout of the spec."""
    return x.swapaxes(1, 2) if spec.layout == "bhsd" and not spec.packed else x


def arguments(x: Inputs, placed: bool = True) -> Arguments:
    """The call's arguments on the host, in the spec's memory and kinds of number. placed=False: their values, in any memory."""
    s, random = x.spec, np.random.default_rng([x.spec.seed, 1])
    repeats: dict[str, tuple[int, ...]] = {}
    for entry in s.repeats:
        axis = int(entry[-1])
        if entry[:-1] in ("q", "k", "v", "dout") and s.layout == "bhsd" and not s.packed:
            axis = {1: 2, 2: 1}.get(axis, axis)
        repeats[entry[:-1]] = (*repeats.get(entry[:-1], ()), axis)

    def lay(name: str, array: Array) -> Array:
        return memory.laid(random, array, s.memory, repeats.get(name, ()), s.readonly) if placed else array
    arrays = {name: lay(name, swapped(s, getattr(x, name))) for name in ("q", "k", "v", "dout")}
    arrays |= {name: lay(name, array) for name, array in x.held.items()}
    options: dict[str, Any] = {}
    for name, array in (("bias", x.bias), ("mask", x.mask), ("alibi_slopes", x.slopes), ("sinks", x.sinks)):
        if array is not None:
            options[name] = lay(name, array)
    if x.dlse is not None:
        options["dlse"] = lay("dlse", x.dlse)
    if s.numbers == "int" and s.library == "numpy":                            # lists of numbers
        options |= {name: options[name].tolist() for name in ("alibi_slopes", "sinks") if name in options and 0 not in options[name].shape}
    if s.causal is not False:
        options["causal"] = np.bool_(True) if s.causal is True and s.numbers.startswith("np.") else s.causal
    if s.window is not None:
        left, right = (values.count(s.numbers, n) for n in s.window)
        options["window"] = [left, right] if s.numbers == "int" else (left, right)
    for name, number in (("softmax_scale", s.softmax_scale), ("softcap", s.softcap)):
        if number is not None:
            options[name] = values.number(s.numbers, number)
    if s.dropout_p:
        options |= {"dropout_p": values.number(s.numbers, s.dropout_p), "seed": values.count(s.numbers, s.dropout_seed),
                    "offset": values.count(s.numbers, s.offset)}
        if s.dropout_at is not None:
            options["dropout_at"] = tuple([values.count(s.numbers, n) for n in s.dropout_at])
        if s.dropout_heads is not None:
            options["dropout_heads"] = values.count(s.numbers, s.dropout_heads)
    if isinstance(s.diagonal, int):
        options["diagonal"] = values.count(s.numbers, s.diagonal)
    if s.out_dtype is not None:
        options["out_dtype"] = s.out_dtype
    if not s.packed:
        return Arguments(arrays, (), options | ({"layout": s.layout} if s.layout != "bshd" else {}))
    wide = np.int64 if s.numbers in ("np.float64", "array") else np.int32
    assert x.cu_q is not None and x.cu_k is not None
    lengths: tuple[Any, ...] = tuple(lay("cu", cu.astype(wide)) for cu in (x.cu_q, x.cu_k))
    if s.used_k is not None:
        options["seqused_k"] = lay("used", np.array(s.used_k, wide))
    if isinstance(s.diagonal, tuple):
        options["diagonal"] = lay("diagonal", np.array(s.diagonal, wide))
    if s.numbers == "int" and s.library == "numpy":
        lengths = tuple(cu.tolist() for cu in lengths)
    if s.beyond != (0, 0) or s.library != "numpy":
        options |= {"max_seqlen_q": values.count(s.numbers, s.full[2]), "max_seqlen_k": values.count(s.numbers, s.full[3])}
    return Arguments(arrays, lengths, options)
