"""What is measured."""
from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Case:
    """One causal problem and how it is spread."""

    seqlen: int
    heads: int
    heads_k: int
    method: str = "gather"
    head_dim: int = 128
    dtype: str = "bfloat16"
    window: int | None = None
    pieces: int | None = None
    documents: int = 0          # of packed sequences, whose lengths are drawn; 0: one dense sequence
    dropout: float = 0.0
    saved: bool = False         # the backward gets what the forward has received

    @property
    def name(self) -> str:
        more = [f" window {self.window}"] * (self.window is not None) + [f" in {self.pieces} pieces"] * (self.pieces is not None)
        more += [f" {self.documents} documents"] * bool(self.documents) + [f" dropout {self.dropout:g}"] * bool(self.dropout)
        more += [" saved"] * self.saved
        return f"{self.method} {self.seqlen // 1024}k {self.heads}/{self.heads_k}" + "".join(more)

    @property
    def shard(self) -> str:
        return "zigzag" if self.window is None else "contiguous"

    @property
    def cu_seqlens(self) -> list[int]:
        """Of the documents: the longest has several times as many rows as the shortest."""
        shares = np.cumsum(np.random.default_rng(64).lognormal(0, 0.7, self.documents))
        return [0, *[int(x) for x in shares / shares[-1] * self.seqlen]]

    @property
    def flops(self) -> float:
        """Of a forward; a backward has 2.5 times as many."""
        if self.documents:
            pairs = float((np.diff(self.cu_seqlens).astype(float) ** 2).sum() / 2)
        else:
            pairs = self.seqlen**2 / 2 if self.window is None else self.seqlen * self.window
        return 4.0 * pairs * self.heads * self.head_dim


ERROR_ROWS = 131072         # longer sequences are not compared with one rank, which would take longer than all the rest


def cases(mode: str, device: str) -> list[Case]:
    """"full" and "quick" on GPUs; on a CPU something small."""
    if device == "cpu":
        lengths = (1024,) if mode == "quick" else (2048, 8192)
        return [Case(n, 8, 4, method, 64, "float32") for n in lengths for method in ("gather", "ring", "ulysses")]
    lengths = (32768, 131072) if mode == "quick" else (32768, 65536, 131072, 262144, 1048576)
    ways: tuple[tuple[str, int | None], ...] = (("gather", None), ("gather", 1), ("gather", 2), ("ring", None), ("ring", 1), ("ring", 2),
                                                ("ulysses", None), ("ulysses", 1), ("ulysses", 2))
    found = [Case(n, *heads, method, pieces=pieces) for n in lengths for heads in ((32, 8), (16, 16)) for method, pieces in ways
             if (pieces is None or n == 32768) and (n <= ERROR_ROWS or heads == (32, 8))]
    found += [Case(n, 32, 8, method, saved=True) for n in lengths if n <= ERROR_ROWS for method in ("gather", "ulysses")]
    if mode == "quick":
        return found
    others = [Case(131072, 32, 8, "gather", window=4096), *[Case(131072, 32, 8, method, dropout=0.1) for method in ("gather", "ring")]]
    return [*found, *others, *[Case(131072, 32, 8, method, documents=64) for method in ("gather", "ring", "ulysses")]]


def select(mode: str, device: str, only: str | None) -> list[Case]:
    return [case for case in cases(mode, device) if only is None or re.search(only, case.name)]
