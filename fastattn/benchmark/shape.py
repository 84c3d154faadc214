"""What is measured: one attention problem, its scored pairs and its flop."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arrays import ITEMSIZE

# GEMMs over head_dim and over head_dim_v: S, and O = P V; backward S again, dQ, dK, and dV, dP
GEMMS = {"forward": (1, 1), "backward": (3, 2), "forward+backward": (4, 3)}


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window: int | None = None) -> int:
    """Scored (query, key) pairs of one head: those that causal and window leave, the diagonal bottom-right."""
    diagonal = np.arange(seqlen_q) + seqlen_k - seqlen_q
    last = np.clip(diagonal + 1, 0, seqlen_k) if causal else np.full(seqlen_q, seqlen_k)
    first = np.zeros_like(last) if window is None else np.clip(diagonal - window, 0, seqlen_k)
    return int(np.maximum(last - first, 0).sum())


def flops(passes: str, pairs: int, head_dim: int, head_dim_v: int) -> int:
    """Floating-point operations over scored pairs: two for each pair, GEMM and element of a row."""
    of_dim, of_dim_v = GEMMS[passes]
    return 2 * pairs * (of_dim * head_dim + of_dim_v * head_dim_v)


@dataclass(frozen=True, slots=True)
class Shape:
    """q is (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_k, head_dim), v's last axis
    head_dim_v.
    """

    batch: int
    seqlen_q: int
    num_heads: int
    head_dim: int
    seqlen_k: int
    num_heads_k: int
    head_dim_v: int
    dtype: str = "bfloat16"
    causal: bool = False
    backward: bool = False

    @property
    def q(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_q, self.num_heads, self.head_dim

    @property
    def k(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_k, self.num_heads_k, self.head_dim

    @property
    def v(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_k, self.num_heads_k, self.head_dim_v

    @property
    def out(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen_q, self.num_heads, self.head_dim_v

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v."""
        return ITEMSIZE[self.dtype] * sum(map(math.prod, (self.q, self.k, self.v)))

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def masked(self) -> bool:
        """Whether causal hides any key: not from one row at the last key."""
        return self.causal and self.seqlen_q > 1

    @property
    def pairs(self) -> int:
        return self.batch * self.num_heads * visible(self.seqlen_q, self.seqlen_k, self.causal)

    @property
    def flops(self) -> int:
        return flops(self.direction, self.pairs, self.head_dim, self.head_dim_v)

    @property
    def unit(self) -> str:
        """Of `speed`: one query row is bound by reading K and V, more by arithmetic."""
        return "GB/s" if self.seqlen_q == 1 and not self.backward else "TFLOP/s"

    def speed(self, seconds: float) -> float:
        """TFLOP/s over scored pairs; of one query row GB/s, of K and V once."""
        if self.unit == "TFLOP/s":
            return self.flops / seconds / 1e12
        return ITEMSIZE[self.dtype] * (math.prod(self.k) + math.prod(self.v)) / seconds / 1e9

    def __str__(self) -> str:
        q, k = ",".join(map(str, self.q)), ",".join(map(str, self.v[1:]))
        keys = "" if self.q == self.v else f" over {k}"
        return f"{self.direction} {self.dtype} {'causal' if self.causal else 'full'} ({q}){keys}"
