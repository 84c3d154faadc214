"""What is measured (a Case), and the requirement on it (a Bar)."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from . import masks
from .arrays import ITEMSIZE
from .shape import flops, visible

Mode = Literal["quick", "full", "long"]
Measure = Literal["time", "speedup", "ceiling", "cost", "memory", "error", "host"]
TEXT = {"speedup": "{:.2f}x", "ceiling": "{:.0%}", "cost": "{:.2f}x", "memory": "{:.0f} MB", "error": "{:.2f}x error", "host": "{:.1f} us"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A requirement on a case, against one implementation or the fastest of several ("cuDNN|FA4").

    speedup: their time / ours, at least.
    ceiling: the hardware's time / ours, at least.
    cost: our time per scored pair / the same without the feature, at most.
    memory: MB beyond inputs and results, at most.
    error: our error against float64 / theirs, at most.
    host: microseconds until a call returns, at most; its work is still queued.
    """

    against: str
    measure: Measure
    limit: float

    def met(self, value: float) -> bool:
        return value >= self.limit if self.measure in ("speedup", "ceiling") else value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.measure in ("speedup", "ceiling") else "<="
        return f"{sign} {TEXT[self.measure].format(self.limit)}"


@dataclass(frozen=True, slots=True)
class Case:
    """One attention problem, and who else runs it. Shapes are (batch, heads, seqlen, head_dim).

    lengths: of packed sequences; batch is then their number and seqlen the longest.
    alone: the backward without its forward.
    kernels: the kernel family that is forced; "" lets the engine choose.
    head_dim_v: of v and out; 0 is head_dim. latent: v is a view of k's first columns (the absorbed form of MLA).
    bias_batch: the bias has a plane for each sequence, else one for all. mask_kind: see bench/masks.py.
    page_size: k and v are caches in pages of so many keys, in random order. cache_dtype: theirs, if it is an 8-bit float.
    position: the call says on which key its row 0 stands, which is where it would stand anyway, and where it lies in the dropout's mask.
    float32_out: results are not rounded to 16 bits.
    title, source: of a workload, and the model or paper it is from. wall: time from call to call, not the device's.
    """

    group: str
    batch: int
    num_heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    backward: bool = False
    num_heads_k: int = 0
    seqlen_k: int = 0
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    dropout_p: float = 0.0
    bias: bool = False
    mask: bool = False
    sinks: bool = False
    lengths: tuple[int, ...] = ()
    alone: bool = False
    need_dbias: bool = False
    deterministic: bool = False
    kernels: str = ""
    against: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    mode: Mode = "full"
    head_dim_v: int = 0
    latent: bool = False
    bias_batch: bool = False
    mask_kind: masks.Kind = "random"
    title: str = ""
    source: str = ""
    wall: bool = False
    page_size: int = 0
    cache_dtype: str = ""
    position: bool = False
    float32_out: bool = False

    @property
    def shape_q(self) -> tuple[int, int, int, int]:
        return self.batch, self.num_heads, self.seqlen, self.head_dim

    @property
    def shape_k(self) -> tuple[int, int, int, int]:
        return self.batch, self.num_heads_k or self.num_heads, self.seqlen_k or self.seqlen, self.head_dim

    @property
    def shape_v(self) -> tuple[int, int, int, int]:
        return *self.shape_k[:3], self.head_dim_v or self.head_dim

    @property
    def passes(self) -> str:
        return "backward" if self.alone else "forward+backward" if self.backward else "forward"

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that are on, the mask first."""
        names = {"causal": self.causal, "window": self.window, "alibi": self.alibi, "softcap": self.softcap, "dropout": self.dropout_p,
                 "bias": self.bias, "mask": self.mask, "sinks": self.sinks, "dbias": self.need_dbias, "deterministic": self.deterministic,
                 "position": self.position, "float32_out": self.float32_out}
        caches = (f"page{self.page_size}", self.cache_dtype) if self.page_size else ()
        return (*(name for name, on in names.items() if on), *filter(None, caches))

    @property
    def shape(self) -> str:
        """(1,8,2048,64); decode (1,32,1,128) over 8192x8, which is keys x key heads; packed (32,16,<=4096,128)."""
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        if self.lengths:
            return f"({self.batch},{self.num_heads},<={self.seqlen},{dims})"
        text = f"({self.batch},{self.num_heads},{self.seqlen},{dims})"
        _, heads, keys, _ = self.shape_k
        return text if (heads, keys) == (self.num_heads, self.seqlen) else f"{text} over {keys}x{heads}"

    @property
    def name(self) -> str:
        if self.title:
            return f"{self.title}, {self.passes}{' with dbias' if self.need_dbias else ''}"
        return " ".join([self.group, self.passes, self.dtype, "+".join(self.features) or "full", self.shape])

    @property
    def plain(self) -> Case:
        """The same case with its causal mask only: the yardstick for a feature's cost."""
        return replace(self, window=None, softcap=None, alibi=False, dropout_p=0.0, bias=False, mask=False, sinks=False,
                       need_dbias=False, deterministic=False, position=False, float32_out=False, against=(), bars=())

    @property
    def pairs(self) -> int:
        """Scored (query, key) pairs over all heads: those that causal and window leave. A boolean mask removes tiles without any pair
        that may attend (masks.TILE); it stands without causal and window, which "left" and "documents" contain."""
        if self.mask and self.mask_kind != "random":
            return self.num_heads * masks.visited(self.mask_kind, self.batch, self.seqlen, self.shape_k[2])
        if self.lengths:
            return self.num_heads * sum(visible(length, length, self.causal, self.window) for length in self.lengths)
        return self.batch * self.num_heads * visible(self.seqlen, self.shape_k[2], self.causal, self.window)

    @property
    def flops(self) -> int:
        """Over scored pairs only."""
        return flops(self.passes, self.pairs, self.head_dim, self.shape_v[3])

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, which a decode step must read at least. A latent V is read with K."""
        itemsize = 1 if self.cache_dtype else ITEMSIZE[self.dtype]
        return (int(np.prod(self.shape_k)) + (0 if self.latent else int(np.prod(self.shape_v)))) * itemsize

    @property
    def few_queries(self) -> bool:
        """Whether reading K and V bounds the call: decode, speculative or not. Its rate is in GB/s."""
        return self.seqlen <= 16 and not self.alone and not self.lengths

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        bars = tuple(Bar(**bar) for bar in data.pop("bars"))
        return cls(**{**data, "against": tuple(data["against"]), "lengths": tuple(data["lengths"])}, bars=bars)
