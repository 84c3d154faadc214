"""Errors for unknown keywords and extra positional arguments: they name the keyword of this library."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_MASK = "mask= (boolean) or bias= (additive)"
_HERE = {
    "is_causal": "causal=", "attn_mask": _MASK, "attention_mask": _MASK, "attn_bias": "bias=", "scale": "softmax_scale=",
    "sm_scale": "softmax_scale=", "scaling": "softmax_scale=", "dropout": "dropout_p=", "p_dropout": "dropout_p=",
    "window_size": "window= (None for no limit, not -1)", "sliding_window": "window=", "logits_soft_cap": "softcap=",
    "alibi": "alibi_slopes=", "slopes": "alibi_slopes=", "s_aux": "sinks=", "learnable_sink": "sinks=",
    "return_attn_probs": "return_lse=", "philox_seed": "seed=", "philox_offset": "offset=",
    "cu_seqlens": "cu_seqlens_q and cu_seqlens_k", "max_seqlen": "max_seqlen_q= and max_seqlen_k=",
    "score_fn": "score_mod=", "aux_tensors": "captured=", "mask_fn": "mask_mod=", "score_modifier": "score_mod=",
    "kernel_options": "nothing: tiles are chosen, and fastattn.explain shows them", "BLOCK_SIZE": "block= of fastattn.block_mask",
    "key_padding_mask": "mask=, True where a query may attend, as mask[:, None, None, :]", "backend": "engine=",
    "enable_gqa": "nothing: fewer key heads than query heads just work"
}
_COMPAT = "fastattn.compat.sdpa and fastattn.compat.flash_attn take other libraries' names"


class _Shown(str):
    """An annotation that `help` shows without quotes."""

    __repr__ = str.__str__


UNCOMPILED: list[Callable[..., Any]] = []        # functions that torch.compile leaves alone


def strict(function: F) -> F:
    """The function itself, `hiding` what it has only for its errors, and `uncompiled`."""
    return hiding(uncompiled(function))


def uncompiled(function: F) -> F:
    """The function itself, left alone by torch.compile.

    torch's compiler knows the two attributes: it ends its graph at the call instead of tracing into the package, and
    quotes the reason.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "fastattn.torch.attention can be compiled"  # type: ignore[attr-defined]
    UNCOMPILED.append(function)
    return function


def hiding(function: F) -> F:
    """The function itself, with the signature that `help` should show.

    `*more` and `**unknown` are hidden: they only collect what `unknown_arguments` reports. Both are of type Never, so a
    type checker refuses such arguments.
    """
    whole = inspect.signature(function)                     # its annotations are strings, because of the __future__ import
    named = [p.replace(annotation=_Shown(p.annotation)) for p in whole.parameters.values()
             if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    shown = whole.replace(parameters=named, return_annotation=_Shown(whole.return_annotation))
    function.__signature__ = shown  # type: ignore[attr-defined]
    return function


def unknown_arguments(function: Callable[..., Any], more: tuple[Any, ...], unknown: Mapping[str, Any]) -> TypeError:
    """The TypeError for too many positional arguments, or for an unknown keyword."""
    parameters = inspect.signature(function).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    call = function.__name__
    if more:
        return TypeError(f"{call}(): {len(positional) + len(more)} positional arguments are given; expected {len(positional)}, "
                         f"{', '.join(positional)}; all others go by keyword, {_MASK} among them; {_COMPAT}.")
    import difflib

    name = next(iter(unknown))
    close = difflib.get_close_matches(name, parameters, 1)
    here = _HERE.get(name) or (f"{close[0]}=" if close else "")
    hint = f"here it is {here}" if here else f"it has {', '.join(p for p in parameters if p not in positional)}"
    return TypeError(f"{call}(): {name} is no keyword of it; {hint}; {_COMPAT}.")
