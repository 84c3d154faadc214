"""Types of the public functions, for type checkers and for the signatures of your own wrappers.

An array goes in, and an array of the same type comes out: the functions of api.py are generic in `A`. Each option is
declared once for type checkers, in the TypedDicts below. A wrapper passes them on:

    def attend(q: A, k: Array, v: Array, **options: Unpack[DenseOptions]) -> A:
        return fastattn.attention(q, k, v, **options)

Nothing here is checked when the program runs; problem.py does that.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypedDict, TypeVar

import numpy as np

if TYPE_CHECKING:
    from .flex.blocks import BlockMask as BlockMask
else:
    BlockMask = Any


# ---------------------------------------------------------------- arrays
class DLPack(Protocol):
    """An array that speaks DLPack: NumPy's, torch's, JAX's, CuPy's."""

    def __dlpack__(self, *arguments: Any, **keywords: Any) -> Any: ...


class CUDAArray(Protocol):
    """An array that speaks the CUDA Array Interface: Numba's device arrays."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


Array = DLPack | CUDAArray | np.ndarray[Any, Any]           # NumPy's stubs say that boolean arrays do not speak DLPack
A = TypeVar("A", bound=Array)                               # the type of q, and of results
B = TypeVar("B", bound=Array)
S = TypeVar("S", bound=tuple[Any, ...])
D = TypeVar("D", bound=np.dtype[Any])
Lengths = Array | Sequence[int]                             # a list for host arrays
PerHead = Array | Sequence[float]                           # a list for host arrays
Scale = SupportsFloat | PerHead                             # of 8-bit operands

# ---------------------------------------------------------------- values
Number = SupportsFloat                                      # a float, an int, a NumPy scalar, a 0-d array or tensor in host memory
Integer = SupportsIndex
Causal = bool | np.bool_ | Literal["bottom_right", "top_left"]
Window = tuple[Integer | None, Integer | None]              # keys left and right of the diagonal; None is no limit
Place = tuple[Integer, Integer, Integer, Integer] | Sequence[Integer]       # batch, head, row, column
Layout = Literal["bshd", "bhsd"]
EngineName = Literal["cpu", "gpu", "reference", "sm90", "sm80", "simt"]     # others are named by use_engine


# ---------------------------------------------------------------- functions
ScoreMod = Callable[..., Any]                               # (score, b, h, q_idx, kv_idx, *captured) -> score
MaskMod = Callable[..., Any]                                # (b, h, q_idx, kv_idx) -> condition
Captured = Sequence[Array | Number]


# ---------------------------------------------------------------- keywords
class CommonOptions(TypedDict, total=False):
    """Keywords of every attention function, those of `fastattn.torch` and `fastattn.jax` too."""

    causal: Causal
    window: Window | None
    softmax_scale: Number | None
    softcap: Number | None
    alibi_slopes: PerHead | None
    bias: Array | None
    mask: Array | None
    sinks: PerHead | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    captured: Captured
    block_mask: BlockMask | None
    dropout_p: Number
    engine: EngineName | None


class ScoreOptions(CommonOptions, total=False):
    """Keywords of all four attention functions."""

    seed: Integer | None
    offset: Integer
    dropout_at: Place | None
    dropout_heads: Integer | None
    stream: Any


class DenseOptions(ScoreOptions, total=False):
    """Keywords of `fastattn.attention`, but `return_lse`, which decides the type of the result."""

    diagonal: Integer | None
    layout: Layout
    out: Array | None
    q_scale: Scale | None
    k_scale: Scale | None
    v_scale: Scale | None
    out_dtype: Any
    out_scale: Scale | None


class PackedOptions(ScoreOptions, total=False):
    """Keywords of `fastattn.attention_varlen`, but `return_lse`."""

    diagonal: Integer | Lengths | None
    layout: Literal["thd"]
    out: Array | None
    q_scale: Scale | None
    k_scale: Scale | None
    v_scale: Scale | None
    out_dtype: Any
    out_scale: Scale | None
    max_seqlen_q: Integer | None
    max_seqlen_k: Integer | None
    seqused_k: Lengths | None


class ServingOptions(TypedDict, total=False):
    """Keywords of `fastattn.attention_with_kvcache`, but `cache_seqlens` and `return_lse`."""

    block_table: Array | None
    cache_batch_idx: Lengths | None
    cu_seqlens_q: Lengths | None
    max_seqlen_q: Integer | None
    rotary_cos: Array | None
    rotary_sin: Array | None
    rotary_interleaved: bool
    causal: bool
    window: Window | None
    softcap: Number | None
    alibi_slopes: PerHead | None
    sinks: PerHead | None
    softmax_scale: Number | None
    q_scale: Scale | None
    k_scale: Scale | None
    v_scale: Scale | None
    num_splits: Integer | None
    shared_prefix: Integer | None
    layout: Layout
    out: Array | None
    stream: Any
    engine: EngineName | None


class FrameworkOptions(CommonOptions, total=False):
    """Keywords of `fastattn.torch.attention` and `fastattn.jax.attention`, but `return_lse`. Seeds may be traced there."""

    seed: Any
    offset: Any
    layout: Layout
    deterministic: bool


class PackedFrameworkOptions(CommonOptions, total=False):
    """Keywords of their `attention_varlen`, but `return_lse`."""

    seed: Any
    offset: Any
    layout: Literal["thd"]
    deterministic: bool
    max_seqlen_q: Integer | None
    max_seqlen_k: Integer | None
    seqused_k: Lengths | None
