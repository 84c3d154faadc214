"""What is measured."""
from __future__ import annotations

import re
from dataclasses import dataclass


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
    pieces: int = 1

    @property
    def name(self) -> str:
        more = ("" if self.window is None else f" window {self.window}") + f" in {self.pieces} pieces" * (self.pieces > 1)
        return f"{self.method} {self.seqlen // 1024}k {self.heads}/{self.heads_k}{more}"

    @property
    def flops(self) -> float:
        """Of a forward; a backward has 2.5 times as many."""
        pairs = self.seqlen**2 / 2 if self.window is None else self.seqlen * self.window
        return 4.0 * pairs * self.heads * self.head_dim


ERROR_ROWS = 131072         # longer sequences are not compared with one rank, which would take longer than all the rest


def cases(mode: str, device: str) -> list[Case]:
    """"full" and "quick" on GPUs; on a CPU something small."""
    if device == "cpu":
        lengths = (1024,) if mode == "quick" else (2048, 8192)
        return [Case(n, 8, 4, method, 64, "float32") for n in lengths for method in ("gather", "ring", "ulysses")]
    lengths = (32768, 131072) if mode == "quick" else (32768, 65536, 131072, 262144, 1048576)
    found = [Case(n, *heads, method, pieces=pieces) for n in lengths for heads in ((32, 8), (16, 16))
             for method, pieces in (("gather", 1), ("gather", 2), ("ring", 1), ("ring", 2), ("ulysses", 1))
             if n <= 131072 or (heads == (32, 8) and method != "ulysses" and pieces == 1)]
    return found if mode == "quick" else [*found, Case(131072, 32, 8, "gather", window=4096)]


def select(mode: str, device: str, only: str | None) -> list[Case]:
    return [case for case in cases(mode, device) if only is None or re.search(only, case.name)]
