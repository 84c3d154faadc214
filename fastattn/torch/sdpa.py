"""torch's scaled_dot_product_attention by fastattn: the function, and putting it in torch's place.

    from fastattn.torch import sdpa
    with sdpa.replaced():                                   # or sdpa.install() ... sdpa.uninstall()
        model(x)                                            # its calls of torch.nn.functional.scaled_dot_product_attention run here

The rules are those of fastattn.compat.sdpa: top-left is_causal, True attends in a boolean mask, rows that attend nothing
give 0. Gradients, torch.compile and autocast are those of fastattn.torch.attention.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..arrays.view import FLOATS
from ..compat.sdpa import _FORWARD, _plan
from ..problem import MAX_HEAD_DIM
from .functions import attention

Unsupported = Literal["raise", "torch"]
_torchs_own: Callable[..., Tensor] = functional.scaled_dot_product_attention
_replaced: list[tuple[Any, Any]] = []                       # (what stood there before, what was put there), the latest last


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                                 is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, computed and differentiated by fastattn.

    Parameters
    ----------
    query : Tensor (N..., H, L, E)
        N... is any number of batch axes, which broadcast.
    key : Tensor (N..., H_k, S, E)
    value : Tensor (N..., H_v, S, E_v)
    attn_mask : Tensor that broadcasts to (N..., H, L, S), optional
        Boolean, True = may attend; or float, added to the scores, with a gradient.
    dropout_p : float, default 0.0
        The seed is drawn from torch's CPU generator.
    is_causal : bool, default False
        Top-left aligned. Not together with attn_mask.
    scale : float, optional
        Default 1 / sqrt(E).
    enable_gqa : bool, default False
        Let groups of query heads share a key head.

    Returns
    -------
    Tensor (N..., H, L, E_v)

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        The call is wrong, or of a dtype, device or size that fastattn has not.

    Notes
    -----
    Source: torch.nn.functional.scaled_dot_product_attention, PyTorch 2.13.

    Examples
    --------
    >>> import torch
    >>> from fastattn.torch.sdpa import scaled_dot_product_attention
    >>> q = torch.randn(2, 4, 5, 8, requires_grad=True)
    >>> scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    """
    is_causal = _FORWARD.flag("causal", is_causal)
    options: dict[str, Any] = {"layout": "bhsd", "causal": "top_left" if is_causal else False, "softmax_scale": scale,
                               "dropout_p": dropout_p}
    kind = None if attn_mask is None else "mask" if attn_mask.dtype == torch.bool else "bias"
    if _nothing_broadcasts(query, key, value, attn_mask, is_causal, enable_gqa):
        if kind is not None:
            options[kind] = attn_mask
        folded = _FORWARD.run(attention, *map(_four_axes, (query, key, value)), **options)
        return folded if query.dim() == 4 else folded.reshape(*query.shape[:-1], value.shape[-1])
    plan = _plan(_FORWARD, query, key, value, attn_mask, is_causal, _FORWARD.flag("enable_gqa", enable_gqa))
    if kind is not None:
        options[kind] = plan.fit(_FORWARD, "attn_mask", attn_mask)
    q, k, v = [plan.fit(_FORWARD, name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    out: Tensor = _FORWARD.run(attention, q, k, v, **options)
    return out.reshape(plan.out)


def _nothing_broadcasts(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether all is there but for axes to merge or add. Decided on sizes that may be symbols, so torch.compile follows."""
    axes = query.dim()
    if axes < 2 or key.dim() != axes or value.dim() != axes or (axes < 3 and enable_gqa):
        return False
    if attn_mask is not None and (is_causal or attn_mask.dim() > min(axes, 4 if axes == 4 else 3)):
        return False
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or key.shape[-3:-1] != value.shape[-3:-1]:
        return False
    heads, heads_k = (query.shape[-3], key.shape[-3]) if axes > 2 else (1, 1)
    return heads == heads_k or (bool(enable_gqa) and heads_k > 0 and heads % heads_k == 0)


def _four_axes(x: Tensor) -> Tensor:
    """(batch, heads, sequence, dim), a view where torch's reshape gives one."""
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x if x.dim() == 4 else x[None] if x.dim() == 3 else x[None, None]


# ---------------------------------------------------------------- in torch's place
def install(*, unsupported: Unsupported = "raise") -> None:
    """Put fastattn in the place of torch.nn.functional.scaled_dot_product_attention, in this whole process.

    Parameters
    ----------
    unsupported : {"raise", "torch"}, default "raise"
        What happens to a call that fastattn does not take: an error, or torch's own function. "torch" is for calls of
        other dtypes, devices, layouts, head dimensions over 576, and forward-mode differentiation. Wrong calls, and an
        engine that is missing, raise in any case.

    Raises
    ------
    ValueError
        Another word is given.

    Notes
    -----
    Code that has imported the function by its name before keeps torch's. torch.nn.MultiheadAttention and transformers
    look it up in each call. Installing twice is undone by uninstalling twice.
    """
    if unsupported not in ("raise", "torch"):
        raise ValueError(f"install(): unsupported is {unsupported!r}; expected 'raise' or 'torch'.")
    ours = scaled_dot_product_attention if unsupported == "raise" else _ours_or_torchs
    _replaced.append((functional.scaled_dot_product_attention, ours))
    functional.scaled_dot_product_attention = ours


def uninstall() -> None:
    """Undo the latest `install`.

    Raises
    ------
    RuntimeError
        Nothing is installed, or something else has been put in the place since.
    """
    if not _replaced:
        raise RuntimeError("uninstall(): nothing is installed; expected a call of install() before.")
    before, ours = _replaced[-1]
    if functional.scaled_dot_product_attention is not ours:
        raise RuntimeError(f"uninstall(): torch.nn.functional.scaled_dot_product_attention is {functional.scaled_dot_product_attention!r}; "
                           "expected what install() put there; whoever replaced it since has to put it back first.")
    functional.scaled_dot_product_attention = before
    del _replaced[-1]


@contextlib.contextmanager
def replaced(*, unsupported: Unsupported = "raise") -> Iterator[None]:
    """`install` at the start of a with block, `uninstall` at its end.

    Parameters
    ----------
    unsupported : {"raise", "torch"}, default "raise"
        As in `install`.

    Examples
    --------
    >>> import torch
    >>> from fastattn.torch import sdpa
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    >>> x = torch.randn(1, 5, 16)
    >>> with sdpa.replaced():
    ...     out, _ = layer(x, x, x, need_weights=False)
    """
    install(unsupported=unsupported)
    try:
        yield
    finally:
        uninstall()


def _ours_or_torchs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    if why_not(query, key, value, attn_mask) is not None:
        return _torchs_own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def why_not(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> str | None:
    """Why fastattn does not take such tensors; None if it does.

    Parameters
    ----------
    query, key, value : Tensor
        As in `scaled_dot_product_attention`.
    attn_mask : Tensor, optional

    Returns
    -------
    str or None
        For example "query has dtype torch.complex64".
    """
    floats = [getattr(torch, name) for name in FLOATS]
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None:
            continue
        if x.is_nested or x.layout != torch.strided:
            return f"{name} is nested" if x.is_nested else f"{name} has layout {x.layout}"
        if x.device.type not in ("cpu", "cuda", "meta"):
            return f"{name} is on {x.device}"
        if x.dtype not in ((torch.bool, query.dtype, torch.float32) if name == "attn_mask" else floats):
            return f"{name} has dtype {x.dtype}"
        if name != "attn_mask" and not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            return f"{name} has head_dim {x.shape[-1]}"
    if torch.autograd.forward_ad._current_level >= 0:
        return "torch differentiates forward"
    return None
