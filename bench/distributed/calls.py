"""The calls of a case: of a rank, and of one rank alone."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn
import fastattn.distributed as fd
from fastattn.distributed.spans import Sequences, spans_of

from .cases import Case

Rows = list[tuple[int, int]]


def rows_of(case: Case, size: int, rank: int) -> Rows:
    """The rows of the whole arrays that a rank has, in its order."""
    if case.documents:
        return [tuple(span) for span in Sequences(tuple(case.cu_seqlens), size, case.shard).spans(rank)]
    return [tuple(span) for span in spans_of(case.seqlen, size, rank, case.shard)]


class Calls:
    """`group` None: of one rank. `keywords`: the stream's."""

    def __init__(self, case: Case, group: Any, keywords: dict[str, Any]) -> None:
        self.case, cu = case, np.asarray(case.cu_seqlens, np.int32) if case.documents else None
        options: dict[str, Any] = keywords | {"causal": True, "window": None if case.window is None else (case.window - 1, None)}
        if case.dropout:
            options |= {"dropout_p": case.dropout, "seed": 1}
        forward: Callable[..., Any] = fastattn.attention
        backward: Callable[..., Any] = fastattn.attention_backward
        self.lengths: tuple[Any, ...] = ()
        if group is None and cu is not None:
            forward, backward, self.lengths = fastattn.attention_varlen, fastattn.attention_varlen_backward, (cu, cu)
            longest = int(np.diff(cu).max())
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        elif cu is not None:
            forward, backward, self.lengths = fd.attention_varlen, fd.attention_varlen_backward, (cu,)
        elif group is not None:
            forward, backward = fd.attention, fd.attention_backward
        if group is not None:
            options |= {"group": group, "shard": case.shard, "method": case.method}
            options |= {} if cu is not None else {"seqlen": case.seqlen, "pieces": case.pieces}
        self._keep, self._saved = group is not None and case.saved, None
        self._forward, self._backward, self.options = forward, backward, options

    def lengths_on(self, to: Callable[[Any], Any]) -> Calls:
        """Of one rank cu_seqlens is where the arrays are."""
        if self._forward is fastattn.attention_varlen:
            self.lengths = tuple([to(x) for x in self.lengths])
        return self

    def forward(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        keep = {"return_saved": True} if self._keep else {}
        out, lse, *saved = self._forward(q, k, v, *self.lengths, return_lse=True, **keep, **self.options)
        self._saved = saved[0] if saved else None
        return out, lse

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        saved = {"saved": self._saved} if self._keep else {}
        return self._backward(dout, q, k, v, out, lse, *self.lengths, **saved, **self.options)
