"""Hugging Face's transformers with fastattn: attn_implementation="fastattn".

    from fastattn.torch import transformers
    transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

transformers asks for two functions. One makes a mask for a whole model: here it is that of its "sdpa", a boolean mask, or
None where `causal` says it all. The other is attention in each layer: `attention_forward`.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functions import attention, attention_varlen

_CHANGES = ("indices", "block_indices", "head_mask")        # arguments of a few models that say which keys count, and how much


def register(name: str = "fastattn") -> str:
    """Make fastattn an attention implementation of transformers, in this process.

    Parameters
    ----------
    name : str, default "fastattn"
        What `attn_implementation` is to be.

    Returns
    -------
    str
        The name.

    Raises
    ------
    ImportError
        transformers is missing, or has no AttentionMaskInterface (before version 4.53).

    Notes
    -----
    In training dropout draws its seeds from torch's CPU generator. `output_attentions=True` needs the model's eager
    attention: fastattn does not store probabilities.

    Examples
    --------
    >>> from fastattn.torch import transformers                                             # doctest: +SKIP
    >>> model = AutoModel.from_config(config, attn_implementation=transformers.register())  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                      dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
                      is_causal: bool | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None,
                      cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: Any = None,
                      max_length_k: Any = None, **others: Any) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Parameters
    ----------
    module : torch.nn.Module
        The layer. Its `is_causal` counts where the argument is None.
    query : Tensor (batch, num_heads, seqlen_q, head_dim)
    key, value : Tensor (batch, num_heads_k, seqlen_k, head_dim)
    attention_mask : Tensor (batch, 1, seqlen_q, seqlen_k), optional
        Boolean, True = may attend; or float, added to the scores. It says all, causality and windows too.
    dropout, scaling, softcap : float, optional
    sliding_window : int, optional
        Without a mask: a causal layer attends so many keys, its own among them.
    is_causal : bool, optional
        Without a mask, and with more than one query: top-left causal.
    s_aux : Tensor (num_heads,), optional
        Sinks.
    position_bias : Tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        Added to the scores.
    cu_seq_lens_q, cu_seq_lens_k : Tensor (sequences + 1,), optional
        All sequences are packed in the one row of the batch.
    max_length_q, max_length_k : int, optional
    **others
        Arguments that change nothing here, such as position_ids. What would change the result is refused.

    Returns
    -------
    out : Tensor (batch, seqlen_q, num_heads, head_dim)
    None
        In the place of the probabilities.

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        As `fastattn.torch.attention`.
    NotImplementedError
        An argument is given that fastattn has not: probabilities, sparse indices.
    """
    _refuse(others)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap, "dropout_p": dropout, "sinks": s_aux}
    window = None if sliding_window is None else (sliding_window - 1, None if causal else sliding_window - 1)
    bias, mask = position_bias, None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if attention_mask is None and bias is None:
            if query.shape[0] != 1:
                raise ValueError(f"attention_forward(): query has batch {query.shape[0]}; expected 1, because cu_seq_lens_q packs all "
                                 "sequences in one row.")
            out = attention_varlen(q[0], k[0], v[0], cu_seq_lens_q, cu_seq_lens_k, max_seqlen_q=_number(max_length_q),
                                   max_seqlen_k=_number(max_length_k), causal=causal, window=window, **options)
            return out[None], None
        same = _sequence(cu_seq_lens_q, q.shape[1])[:, None] == _sequence(cu_seq_lens_k, k.shape[1])
        mask = same[None, None] if mask is None else mask & same
    if attention_mask is None and causal and query.shape[2] > 1:        # one query, the newest, attends all keys
        options["causal"] = "top_left"
    if attention_mask is None and causal:
        options["window"] = window
    return attention(q, k, v, mask=mask, bias=bias, **options), None


def _number(longest: Any) -> int | None:
    """A longest length that may be a tensor: on a device it is not read, and the number of rows serves."""
    if isinstance(longest, Tensor):
        return None if longest.device.type != "cpu" or torch.compiler.is_compiling() else int(longest)
    return longest  # type: ignore[no-any-return]


def _sequence(cu_seq_lens: Tensor, rows: int) -> Tensor:
    """Which sequence each row belongs to."""
    return torch.bucketize(torch.arange(rows, device=cu_seq_lens.device), cu_seq_lens, right=True)


def _refuse(others: dict[str, Any]) -> None:
    for name in _CHANGES:
        if others.get(name) is not None:
            raise NotImplementedError(f"attention_forward(): {name} is given; expected none, because fastattn has no such argument; "
                                      "attn_implementation='eager' takes it.")
    if others.get("output_attentions"):
        raise NotImplementedError("attention_forward(): output_attentions is True; expected False, because fastattn stores no "
                                  "probabilities; attn_implementation='eager' does.")
