"""`attention` and `attention_varlen` for torch's tensors: fastattn's functions with torch's gradients.

Where torch neither records nor transforms a call, it is fastattn's own function, at fastattn's own cost: `_direct`
decides. Otherwise its arguments become `Arguments`, and autograd.py goes on.
"""
from __future__ import annotations

import sys
from typing import Any, Literal, Never, Unpack, overload

import torch
from torch import Tensor

import fastattn

from ..arrays.view import EIGHT_BIT
from ..errors import message
from ..flex.operands import functions_of
from ..options import read_options
from ..problem import is_plain
from ..signature import hiding, unknown_arguments
from ..types import (
    BlockMask,
    Captured,
    Causal,
    EngineName,
    FrameworkOptions,
    Integer,
    MaskMod,
    Number,
    PackedFrameworkOptions,
    ScoreMod,
    Window,
)
from .autograd import PLAIN, Settings, attend, attend_plain, level, modes
from .operators import Arguments, causal_name, seed_tensor

_autocast = torch._C._is_any_autocast_enabled


def _unseen(q: Any) -> bool:
    """Whether only the caller and torch's graph see this call: no compiler, no mode, no transform, no autocast."""
    return not (torch.compiler.is_compiling() or type(q) not in PLAIN or q.is_meta or modes() or level() is not None or _autocast())


def _in_graph(*operands: Any) -> bool:
    """Whether torch records a call with these operands."""
    if torch.is_grad_enabled():
        for x in operands:
            if x is not None and isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[FrameworkOptions]) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True],
              **options: Unpack[FrameworkOptions]) -> tuple[Tensor, Tensor]: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool,
              **options: Unpack[FrameworkOptions]) -> Tensor | tuple[Tensor, Tensor]: ...
@hiding
def attention(q: Any, k: Any, v: Any, *more: Never, causal: Causal = False, window: Window | None = None,
              softmax_scale: Number | None = None, softcap: Number | None = None, alibi_slopes: Any = None, bias: Any = None,
              mask: Any = None, sinks: Any = None, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None,
              captured: Captured = (), block_mask: BlockMask | None = None, dropout_p: Number = 0.0, seed: Any = None, offset: Any = 0,
              layout: Literal["bshd", "bhsd"] = "bshd", return_lse: bool = False, deterministic: bool | None = None,
              engine: EngineName | None = None, **unknown: Never) -> Any:
    """`fastattn.attention` that torch differentiates, compiles, exports and casts.

    Parameters
    ----------
    q : Tensor (batch, seqlen_q, num_heads, head_dim)
        On CPU or CUDA; float16, bfloat16, float32 or float64. Has a gradient.
    k : Tensor (batch, seqlen_k, num_heads_k, head_dim)
        q's dtype and device. num_heads_k divides num_heads. Has a gradient.
    v : Tensor (batch, seqlen_k, num_heads_k, head_dim_v)
        q's dtype and device. Has a gradient.
    causal, window, softmax_scale, softcap, mask, offset, layout, engine : optional
        As in `fastattn.attention`.
    bias : Tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        q's dtype or float32, added to the scores. Has a gradient, of bias's own shape.
    sinks : Tensor (num_heads,), optional
        Logits that join the softmax's denominator only. Has a gradient.
    score_mod, mask_mod, captured, block_mask : optional
        As in `fastattn.attention`. The float tensors that score_mod reads, captured or in its closure, have gradients.
        torch.compile runs such a call outside of its graph.
    alibi_slopes : Tensor (num_heads,) or (batch, num_heads), optional
        Has no gradient: slopes that require one are refused.
    dropout_p : float, default 0.0
        Probability of dropping a softmax weight.
    seed : int or Tensor, optional
        Key of the dropout's random numbers: a number, or a 0-d int64 tensor in host memory. None draws one from torch's
        CPU generator, which torch.manual_seed seeds and torch.utils.checkpoint restores.
    return_lse : bool, default False
        Return (out, lse). lse has a gradient too.
    deterministic : bool, optional
        The same bits of gradients in every run. None: as torch.use_deterministic_algorithms says.

    Returns
    -------
    out : Tensor (batch, seqlen_q, num_heads, head_dim_v)
        q's dtype, under torch.autocast the autocast dtype. Contiguous in the caller's layout.
    lse : Tensor (batch, num_heads, seqlen_q)
        Only with ``return_lse``: float32, float64 for float64 q.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `fastattn.attention`.
    RuntimeError
        The gradient is differentiated once more: there are first derivatives only.
    NotImplementedError
        Forward-mode differentiation (torch.func.jvp) of a call.

    Notes
    -----
    Saved for the backward: the inputs, out and lse; nothing of size seqlen x seqlen. Dropout is recomputed from its seed.

    The keywords `out` and `stream` of `fastattn.attention` are not here: results have a graph, and torch's current
    stream is the call's.

    Examples
    --------
    >>> import torch
    >>> from fastattn.torch import attention
    >>> q, k, v = torch.randn(3, 2, 5, 4, 8, requires_grad=True)
    >>> attention(q, k, v, causal=True).sum().backward()
    """
    if more or unknown:
        raise _unknown(attention, more, unknown)
    if dropout_p and seed is None:
        seed = _draw()
    if functions_of(score_mod, mask_mod, captured, block_mask) is not None:
        return _flexible("attention", q, k, v, {"bias": bias, "sinks": sinks, "mask": mask, "alibi_slopes": alibi_slopes},
                         {"score_mod": score_mod, "mask_mod": mask_mod, "captured": captured, "block_mask": block_mask},
                         {"causal": causal, "window": window, "softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p,
                          "seed": seed, "offset": offset, "layout": layout, "engine": engine}, deterministic, return_lse)
    unseen = _unseen(q)
    if unseen and not _in_graph(q, k, v, bias, sinks, alibi_slopes):
        return fastattn.attention(q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap,
                                  alibi_slopes=alibi_slopes, bias=bias, mask=mask, sinks=sinks, dropout_p=dropout_p, seed=seed,
                                  offset=offset, layout=layout, return_lse=return_lse, engine=engine)
    _refuse_8_bits("attention", q, k, v)
    if unseen and is_plain(bias, mask, alibi_slopes, sinks):
        options = read_options("attention", causal, window, softmax_scale, softcap, dropout_p, seed, offset)
        settings = Settings("attention", options, layout, bool(return_lse), _deterministic(deterministic), engine, None)
        if (result := attend_plain(q, k, v, settings)) is not None:
            return result
    if layout not in ("bshd", "bhsd"):
        raise ValueError(message("attention", "layout", f"is {layout!r}", "'bshd' or 'bhsd'", "attention_varlen takes packed tensors"))
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks, "mask": mask, "alibi_slopes": alibi_slopes}
    return _recorded("attention", tensors, (causal, window, softmax_scale, softcap, dropout_p, seed, offset), layout, return_lse,
                     deterministic, engine)


@overload
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: Literal[False] = ...,
                     **options: Unpack[PackedFrameworkOptions]) -> Tensor: ...
@overload
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: Literal[True],
                     **options: Unpack[PackedFrameworkOptions]) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, return_lse: bool,
                     **options: Unpack[PackedFrameworkOptions]) -> Tensor | tuple[Tensor, Tensor]: ...
@hiding
def attention_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *more: Never, max_seqlen_q: Integer | None = None,
                     max_seqlen_k: Integer | None = None, seqused_k: Any = None, causal: Causal = False,
                     window: Window | None = None, softmax_scale: Number | None = None,
                     softcap: Number | None = None, alibi_slopes: Any = None, bias: Any = None, mask: Any = None,
                     sinks: Any = None, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None,
                     captured: Captured = (), block_mask: BlockMask | None = None, dropout_p: Number = 0.0,
                     seed: Any = None, offset: Any = 0,
                     layout: Literal["thd"] = "thd", return_lse: bool = False, deterministic: bool | None = None,
                     engine: EngineName | None = None, **unknown: Never) -> Any:
    """`fastattn.attention_varlen` that torch differentiates, compiles, exports and casts.

    Parameters
    ----------
    q : Tensor (total_q, num_heads, head_dim)
        Sequences of different lengths, packed along the first axis. Has a gradient.
    k : Tensor (total_k, num_heads_k, head_dim)
        Has a gradient.
    v : Tensor (total_k, num_heads_k, head_dim_v)
        Has a gradient.
    cu_seqlens_q, cu_seqlens_k : Tensor (sequences + 1,)
        int32 or int64, cumulative lengths in rows, on q's device.
    max_seqlen_q, max_seqlen_k, seqused_k : optional
        As in `fastattn.attention_varlen`.
    alibi_slopes : Tensor (num_heads,) or (sequences, num_heads), optional
        Has no gradient.
    bias : Tensor that broadcasts to (sequences, num_heads, max_seqlen_q, max_seqlen_k), optional
        Has a gradient.
    causal, window, softmax_scale, softcap, mask, sinks, dropout_p, seed, offset, return_lse, deterministic, engine : optional
        As in `attention`.
    score_mod, mask_mod, captured, block_mask : optional
        As in `attention`; indices count inside each sequence.
    layout : {"thd"}
        The one layout of packed tensors.

    Returns
    -------
    out : Tensor (total_q, num_heads, head_dim_v)
        Rows of no sequence are 0.
    lse : Tensor (num_heads, total_q)
        Only with ``return_lse``. Rows of no sequence are -inf.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError, RuntimeError, NotImplementedError
        As `attention`.

    Examples
    --------
    >>> import torch
    >>> from fastattn.torch import attention_varlen
    >>> q, k, v = torch.randn(3, 7, 4, 8, requires_grad=True)
    >>> lengths = torch.tensor([0, 3, 7], dtype=torch.int32)                 # two sequences, of 3 and 4 rows
    >>> attention_varlen(q, k, v, lengths, lengths, causal=True).sum().backward()
    """
    if more or unknown:
        raise _unknown(attention_varlen, more, unknown)
    if dropout_p and seed is None:
        seed = _draw()
    if functions_of(score_mod, mask_mod, captured, block_mask) is not None:
        return _flexible("attention_varlen", q, k, v, {
            "bias": bias, "sinks": sinks, "mask": mask, "alibi_slopes": alibi_slopes, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k},
            {"score_mod": score_mod, "mask_mod": mask_mod, "captured": captured, "block_mask": block_mask},
            {"causal": causal, "window": window, "softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p, "seed": seed,
             "offset": offset, "layout": layout, "engine": engine, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k},
            deterministic, return_lse)
    unseen = _unseen(q)
    if unseen and not _in_graph(q, k, v, bias, sinks, alibi_slopes):
        return fastattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
                                         seqused_k=seqused_k, causal=causal, window=window, softmax_scale=softmax_scale, softcap=softcap,
                                         alibi_slopes=alibi_slopes, bias=bias, mask=mask, sinks=sinks, dropout_p=dropout_p, seed=seed,
                                         offset=offset, layout=layout, return_lse=return_lse, engine=engine)
    _refuse_8_bits("attention_varlen", q, k, v)
    if unseen and is_plain(bias, mask, alibi_slopes, sinks):
        call, lengths = "attention_varlen", {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
        options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
        given: Any = tuple([_tensor(call, name, x) for name, x in lengths.items()])
        settings = Settings(call, options, layout, bool(return_lse), _deterministic(deterministic), engine, given)
        if (result := attend_plain(q, k, v, settings)) is not None:
            return result
    if layout != "thd":
        raise ValueError(message("attention_varlen", "layout", f"is {layout!r}", "'thd'", "attention takes 'bshd' and 'bhsd'"))
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks, "mask": mask, "alibi_slopes": alibi_slopes,
               "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    return _recorded("attention_varlen", tensors, (causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q,
                                                   max_seqlen_k), layout, return_lse, deterministic, engine)


_PLACED = "a call that torch differentiates is a problem by itself"
_ELSEWHERE = {"out": "the result's graph needs memory of its own", "stream": "the call is on torch's current stream",
              "diagonal": _PLACED, "dropout_at": _PLACED, "dropout_heads": _PLACED,
              "out_dtype": "autograd wants gradients in the dtypes of their inputs"}


def _unknown(function: Any, more: tuple[Any, ...], unknown: dict[str, Any]) -> TypeError:
    """The TypeError for arguments that are not in the signature; some of them fastattn's own functions have."""
    for name, instead in _ELSEWHERE.items():
        if name in unknown and not more:
            call = function.__name__
            return TypeError(f"{call}(): {name} is no keyword of fastattn.torch.{call}, because {instead}; fastattn.{call} has it.")
    return unknown_arguments(function, more, unknown)


def _flexible(call: str, q: Any, k: Any, v: Any, tensors: dict[str, Any], functions: dict[str, Any], options: dict[str, Any],
              deterministic: bool | None, return_lse: bool) -> Any:
    """A call with functions: see flex.py, which is imported for the first. Where torch's compiler may be at work, outside of its graph."""
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        from .flex_outside import attend as attend_flexible
    else:
        from .flex import attend as attend_flexible
    return attend_flexible(call, {"q": q, "k": k, "v": v} | tensors, functions, options, _deterministic(deterministic), bool(return_lse))


# ---------------------------------------------------------------- a call that torch sees
def _recorded(call: str, tensors: dict[str, Any], options: tuple[Any, ...], layout: str, return_lse: bool, deterministic: bool | None,
              engine: str | None) -> Any:
    """The call as an operator's. Its options become plain numbers; lists of numbers become tensors."""
    tensors = {name: _tensor(call, name, x) for name, x in tensors.items()}
    causal, window, scale, softcap, dropout_p, seed, offset, *longest = options
    seed = seed_tensor(call, seed)
    if not torch.compiler.is_compiling() and not any(isinstance(x, torch.SymInt) for x in (offset, *longest)):
        causal, window, scale, softcap, dropout_p, _, offset, *longest = read_options(call, causal, window, scale, softcap, dropout_p,
                                                                                      None, offset, *longest)[:9]
    left, right = (None, None) if window is None else window
    longest_q, longest_k = longest or (None, None)
    out, lse = attend(Arguments(
        tensors["q"], tensors["k"], tensors["v"], tensors["bias"], tensors["sinks"], tensors["mask"], tensors["alibi_slopes"],
        tensors.get("cu_seqlens_q"), tensors.get("cu_seqlens_k"), tensors.get("seqused_k"), seed,
        causal_name(causal), left, right, scale, softcap, dropout_p, offset, longest_q, longest_k, layout,
        _deterministic(deterministic), engine))
    return (out, lse) if return_lse else out


_EIGHT_BIT = tuple([getattr(torch, name) for name in EIGHT_BIT if hasattr(torch, name)])


def _refuse_8_bits(call: str, *qkv: Any) -> None:
    """TypeError for an 8-bit operand of a call that torch sees: it has no backward."""
    for name, x in zip("qkv", qkv, strict=True):
        if getattr(x, "dtype", None) in _EIGHT_BIT:
            raise TypeError(message(call, name, f"has dtype {str(x.dtype).removeprefix('torch.')}",
                                    "16 bits or more, because torch records this call",
                                    f"8-bit operands have no backward; fastattn.{call} takes them"))


def _tensor(call: str, name: str, x: Any) -> Tensor | None:
    """x as a tensor: lists of numbers may stand for lengths, slopes and sinks in host memory."""
    if x is None or isinstance(x, Tensor):
        return x
    if isinstance(x, (list, tuple)) and name in ("alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        return torch.tensor(x, device="cpu")
    hint = f"torch.as_tensor({name}) makes one, and fastattn.{call} takes arrays of all libraries"
    raise TypeError(message(call, name, f"is {type(x).__name__}", "a torch.Tensor, because torch records this call", hint))


def _deterministic(asked: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if asked is None else bool(asked)


def _draw() -> Tensor:
    """A new seed, from torch's CPU generator: no device is read, and in a compiled function it is drawn in each call."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
