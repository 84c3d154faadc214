"""What all signatures share.

That is: the names of a call, its options as plain values, lengths of packed arrays, windows with -1, seeds, and the two
calls into fastattn.
"""
from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from ..api import attention, attention_backward
from ..api_packed import attention_varlen, attention_varlen_backward
from ..arrays import words
from ..errors import message
from ..options import Check
from ..problem import Grads

TORCH = {"q": "query", "k": "key", "v": "value", "dout": "grad_out", "softmax_scale": "scale", "causal": "is_causal", "bias": "attn_bias"}


class Call(NamedTuple):
    """The function that the user called, and its names for fastattn's arguments where they differ."""

    name: str
    names: dict[str, str] = {}      # noqa: RUF012

    def value(self, argument: str, has: object, expected: str, hint: str = "") -> ValueError:
        return ValueError(message(self.name, argument, has, expected, hint))

    def plain(self, argument: str, x: Any, expected: str) -> Any:
        """An option as a Python number, read now. Arrays and tensors of one number count as in fastattn.attention."""
        return x if x is None or type(x) in (bool, int, float) else Check(self.name).scalar(self.names.get(argument, argument), x, expected)

    def flag(self, argument: str, x: Any) -> bool:
        x = self.plain(argument, x, "True or False")
        if isinstance(x, str):
            raise TypeError(message(self.name, self.names.get(argument, argument), f"is {x!r}", "True or False"))
        return bool(x)

    def length(self, argument: str, x: Any) -> int | None:
        """A length, or None."""
        return x if x is None or type(x) is int else Check(self.name).integer(self.names.get(argument, argument), x, 0, 2**31 - 1)

    def run(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """function(...). Errors of its argument checks are rephrased with this call's names."""
        try:
            return function(*args, **keywords)
        except (TypeError, ValueError, NotImplementedError, ImportError) as error:
            found = re.match(r"attention\w*\(\): (\w+)(.*)", str(error), re.DOTALL)
            if found is not None and len(error.args) == 1:
                text = found[2]
                for ours, theirs in self.names.items():     # "cu_seqlens_k", "q's head_dim", "q.detach()", "seed=..."
                    text = re.sub(rf"\b{ours}\b" if "_" in ours else rf"\b{ours}(?='s|\.[a-z]|=)", theirs, text)
                error.args = (f"{self.name}(): {self.names.get(found[1], found[1])}{text}",)
            raise


class Lengths(NamedTuple):
    """How packed arrays are divided into sequences; fields as in attention_varlen."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_k: Any = None

    @classmethod
    def read(cls, call: Call, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
             seqused_k: Any = None) -> Lengths:
        """Lengths whose maxima are plain numbers."""
        longest_q, longest_k = call.length("max_seqlen_q", max_seqlen_q), call.length("max_seqlen_k", max_seqlen_k)
        return cls(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, seqused_k)

    def keywords(self) -> dict[str, Any]:
        return {"max_seqlen_q": self.max_seqlen_q, "max_seqlen_k": self.max_seqlen_k, "seqused_k": self.seqused_k}


def lengths(call: Call, cu_seqlens_q: Any, cu_seqlens_k: Any, *rest: Any) -> Lengths | None:
    """Lengths of packed arrays. None for dense arrays, which have neither cu_seqlens; ValueError if one of the two is missing."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        given, missing = ("cu_seqlens_k", "cu_seqlens_q") if cu_seqlens_q is None else ("cu_seqlens_q", "cu_seqlens_k")
        given, missing = (call.names.get(name, name) for name in (given, missing))
        raise call.value(missing, "is None", f"cumulative lengths, because {given} is given", "both for packed arrays, none for dense ones")
    return None if cu_seqlens_q is None else Lengths.read(call, cu_seqlens_q, cu_seqlens_k, *rest)


def window(call: Call, argument: str, left: Any, right: Any) -> tuple[int | None, int | None] | None:
    """fastattn's window from counts of keys before and after the diagonal, where -1 or None is no limit."""
    expected = "counts of keys, -1 for no limit"
    sides = [call.plain(argument, side, expected) for side in (left, right)]
    sides = [None if side == -1 else side for side in sides]
    for side in sides:
        if isinstance(side, int) and side < 0:
            raise call.value(argument, f"is {(left, right)}", expected)
    return None if sides == [None, None] else (sides[0], sides[1])


def pair(call: Call, argument: str, x: Any) -> tuple[Any, Any]:
    if getattr(x, "shape", None) != (2,) and not (isinstance(x, (tuple, list)) and len(x) == 2):
        raise call.value(argument, f"is {words.shown(x)}", "a pair (left, right), -1 for no limit")
    return x[0], x[1]


def dropout(call: Call, q: Any, dropout_p: Any, seed: Any, offset: Any) -> dict[str, Any]:
    """fastattn's keywords of dropout as plain values, with a fresh seed if one is needed.

    The host draws it, so no device is read: from torch's CPU generator for torch tensors, which torch.manual_seed
    seeds, else from the operating system.
    """
    dropout_p = call.plain("dropout_p", dropout_p, "a probability in [0, 1]")
    seed, offset = call.plain("seed", seed, "an integer"), call.plain("offset", offset, "an integer")
    if seed is None and dropout_p:
        torch: Any = sys.modules.get("torch")
        seed = int(torch.randint(2**63 - 1, ())) if torch is not None and isinstance(q, torch.Tensor) else secrets.randbits(63)
    return {"dropout_p": dropout_p, "seed": seed, "offset": offset}


def forward(call: Call, q: Any, k: Any, v: Any, packed: Lengths | None, *, layout: str = "bshd", return_lse: bool = True,
            **options: Any) -> tuple[Any, Any]:
    """(out, lse) of attention, or of attention_varlen for packed arrays. lse is None unless requested."""
    if packed is None:
        result = call.run(attention, q, k, v, layout=layout, return_lse=return_lse, **options)
    else:
        result = call.run(attention_varlen, q, k, v, packed.cu_seqlens_q, packed.cu_seqlens_k, return_lse=return_lse, **packed.keywords(),
                          **options)
    return result if return_lse else (result, None)


def backward(call: Call, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, packed: Lengths | None, *, layout: str = "bshd",
             **options: Any) -> Grads[Any]:
    """Gradients of `forward` with the same options."""
    if packed is None:
        grads: Grads[Any] = call.run(attention_backward, dout, q, k, v, out, lse, layout=layout, **options)
    else:
        grads = call.run(attention_varlen_backward, dout, q, k, v, out, lse, packed.cu_seqlens_q, packed.cu_seqlens_k, **packed.keywords(),
                         **options)
    return grads
