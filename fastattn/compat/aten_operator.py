"""What the operators of aten.py share: the forward with seed, offset and debug mask, and checks of redundant arguments."""
from __future__ import annotations

from typing import Any

from .arrays import shape_of
from .probabilities import encode
from .translate import TORCH, Call, Lengths, dropout, forward, lengths

NAMES = {**TORCH, "lse": "logsumexp", "seed": "philox_seed", "offset": "philox_offset"}
CUM_SEQ = {**NAMES, "cu_seqlens_q": "cum_seq_q", "cu_seqlens_k": "cum_seq_k", "max_seqlen_q": "max_q", "max_seqlen_k": "max_k"}


def operator_forward(call: Call, q: Any, k: Any, v: Any, packed: Lengths | None, *, layout: str, compute_lse: bool, debug_mask: bool,
                     seed: int | None, offset: int, **options: Any) -> tuple[Any, Any, int, int, Any]:
    """(out, logsumexp, philox_seed, philox_offset, debug mask).

    logsumexp and debug mask are None unless requested. The seed is 0 if there is no dropout.
    """
    options |= dropout(call, q, options["dropout_p"], seed, offset)
    out, lse = forward(call, q, k, v, packed, layout=layout, return_lse=compute_lse, **options)
    encoded = encode(call, q, k, packed, layout, **options) if debug_mask else None
    return out, lse, 0 if options["seed"] is None else options["seed"], options["offset"], encoded


def cut(call: Call, query: Any, key: Any, axis: int, cu_seqlens_q: Any, cu_seqlens_k: Any, max_q: int | None, max_k: int | None,
        seqused_k: Any = None) -> Lengths | None:
    """Lengths of packed arrays; None for dense ones.

    max_q and max_k of dense arrays must equal the lengths at `axis`, or be None.
    """
    packed = lengths(call, cu_seqlens_q, cu_seqlens_k, max_q, max_k, seqused_k)
    if packed is not None:
        return packed
    if seqused_k is not None:
        name = call.names.get("seqused_k", "seqused_k")
        raise call.value(name, "is given without cumulative lengths", "packed arrays", "a boolean mask hides the padding of dense ones")
    for argument, given, name, x in (("max_seqlen_q", max_q, "query", query), ("max_seqlen_k", max_k, "key", key)):
        shape, given = shape_of(x, call.name, name), call.length(argument, given)
        if given is not None and len(shape) == 4 and given != shape[axis]:
            raise call.value(call.names.get(argument, argument), f"is {given}", f"{name}'s length {shape[axis]}, or None")
    return None
