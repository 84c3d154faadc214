"""Packed distributed calls beside the same call on one rank: named cases, as ranks.py has dense ones.

    mpiexec -n 2 python -m tests.tools.packed_ranks mpi     all cases that two ranks can run; a line for each that is wrong, then "done"
"""
from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastattn
import fastattn.distributed as fd
from tests.tools.problems import NUMPY
from tests.tools.ranks import connected, error, here

CU = (0, 301, 306, 434, 434, 511, 1024)
DROPOUT = {"dropout_p": 0.3, "seed": 11, "offset": 5}


@dataclass(frozen=True)
class Case:
    """Packed sequences, and how they are spread. bias and mask: axes that broadcast are 1."""

    method: str
    shard: str = "zigzag"
    cu: tuple[int, ...] = CU
    cu_k: tuple[int, ...] | None = None
    size: tuple[int, ...] = (2, 4)
    heads: int = 8
    heads_k: int = 4
    dtype: str = "float64"
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    alibi: bool = False
    sinks: bool = False
    dlse: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CAUSAL = {"causal": True}
SHORT = tuple(range(0, 331, 10))
CASES = {
    "gather": Case("gather", options=CAUSAL),
    "gather of 3": Case("auto", size=(1, 3), options=CAUSAL),
    "gather full": Case("gather", "contiguous"),
    "gather window": Case("gather", "contiguous", sinks=True, options={"causal": True, "window": (70, None)}),
    "gather window both ways": Case("gather", alibi=True, options={"window": (200, 40)}),
    "gather short": Case("gather", cu=SHORT, sinks=True, dlse=True, options=CAUSAL),
    "gather none": Case("gather", cu=(0,), options=CAUSAL),
    "gather all empty": Case("gather", cu=(0, 0, 0), sinks=True, options=CAUSAL),
    "gather short queries": Case("gather", cu=(0, 64, 64, 100), cu_k=(0, 300, 310, 410), alibi=True, options=CAUSAL),
    "gather everything": Case("gather", cu=(0, 150, 150, 200), bias=(3, 8, 150, 150), mask=(1, 1, 150, 150), alibi=True, sinks=True,
                              dlse=True, options={"causal": True, "softcap": 5.0} | DROPOUT),
    "gather bias of keys": Case("gather", cu=(0, 150, 150, 200), bias=(3, 1, 1, 150), options=CAUSAL),
    "gather bfloat16": Case("gather", dtype="bfloat16", options=CAUSAL),
    "ring": Case("ring", options=CAUSAL),
    "ring of 3": Case("ring", size=(1, 3), sinks=True, dlse=True, options=CAUSAL),
    "ring window": Case("ring", alibi=True, options={"window": (90, 10)}),
    "ring short queries": Case("ring", cu=(0, 64, 64, 100), cu_k=(0, 300, 310, 410), options=CAUSAL),
    "ring everything": Case("ring", cu=(0, 150, 150, 200), bias=(3, 8, 150, 150), mask=(1, 1, 150, 150), alibi=True, sinks=True, dlse=True,
                            options={"causal": True, "softcap": 5.0} | DROPOUT),
    "ring float16": Case("ring", dtype="float16", options=CAUSAL),
    "ulysses": Case("ulysses", options=CAUSAL),
    "ulysses of 3": Case("ulysses", size=(1, 3), sinks=True, dlse=True, options=CAUSAL),
    "ulysses everything": Case("ulysses", cu=(0, 150, 150, 200), bias=(3, 8, 150, 150), mask=(1, 1, 150, 150), alibi=True, sinks=True,
                               dlse=True, options={"causal": True, "softcap": 5.0} | DROPOUT),
    "ulysses bias of keys": Case("ulysses", cu=(0, 150, 150, 200), bias=(1, 8, 1, 150), options=CAUSAL),
}


class Whole:
    """A case's arrays, and what one rank computes of them."""

    def __init__(self, name: str) -> None:
        self.case = c = CASES[name]
        rng, dtype = np.random.default_rng(zlib.crc32(name.encode())), NUMPY[c.dtype]
        self.cu_k = c.cu if c.cu_k is None else c.cu_k
        self.q, self.dout = rng.standard_normal((2, c.cu[-1], c.heads, 16)).astype(dtype)
        self.k, self.v = rng.standard_normal((2, self.cu_k[-1], c.heads_k, 16)).astype(dtype)
        wide = np.float64 if c.dtype == "float64" else np.float32
        self.dlse = rng.standard_normal((c.heads, c.cu[-1])).astype(wide) if c.dlse else None
        self.options = dict(c.options)
        if c.bias:
            self.options["bias"] = rng.standard_normal(c.bias).astype(dtype)
        if c.mask:
            self.options["mask"] = rng.random(c.mask) < 0.7
        if c.sinks:
            self.options["sinks"] = rng.standard_normal(c.heads).astype(wide)
        if c.alibi:
            self.options["alibi_slopes"] = (0.5 ** np.arange(1, c.heads + 1)).astype(wide)
        given = (self.q, self.k, self.v)
        self.out, self.lse = fastattn.attention_varlen(*given, c.cu, self.cu_k, return_lse=True, **self.options)
        self.grads = fastattn.attention_varlen_backward(self.dout, *given, self.out, self.lse, c.cu, self.cu_k, dlse=self.dlse,
                                                        need_dbias=c.bias is not None, **self.options)


def results(group: Any, whole: Whole, to: Callable[[Any], Any] = here, **more: Any) -> dict[str, tuple[Any, Any]]:
    """Each result of this rank beside this rank's part of what one rank computes. `to` takes arrays to a device; `more` are keywords."""
    c = whole.case

    def mine(x: Any, axis: int = 0, cu: Any = c.cu) -> Any:
        return None if x is None else fd.shard(x, group, axis, shard=c.shard, cu_seqlens=cu)

    def there(x: Any, axis: int = 0, cu: Any = c.cu) -> Any:
        return None if x is None else to(mine(x, axis, cu))
    q, k, v = there(whole.q), there(whole.k, cu=whole.cu_k), there(whole.v, cu=whole.cu_k)
    options = {name: to(x) if isinstance(x, np.ndarray) else x for name, x in whole.options.items()}
    keywords = options | {"group": group, "method": c.method, "shard": c.shard, "cu_seqlens_k": c.cu_k} | more
    out, lse = fd.attention_varlen(q, k, v, c.cu, return_lse=True, **keywords)
    dout, dlse = there(whole.dout), there(whole.dlse, 1)
    grads = fd.attention_varlen_backward(dout, q, k, v, out, lse, np.array(c.cu), dlse=dlse, need_dbias=c.bias is not None, **keywords)
    found = {"out": (out, mine(whole.out)), "lse": (lse, mine(whole.lse, 1)), "dq": (grads.dq, mine(whole.grads.dq))}
    for name in ("dk", "dv"):
        found[name] = getattr(grads, name), mine(getattr(whole.grads, name), cu=whole.cu_k)
    for name in ("dbias", "dsinks"):
        x, of_one = getattr(grads, name), getattr(whole.grads, name)
        assert (x is None) == (of_one is None)
        if x is not None:
            found[name] = x, of_one
    return found


def run(group: Any, whole: Whole, to: Callable[[Any], Any] = here, back: Callable[[Any], Any] = here) -> dict[str, float]:
    """The largest error of each result on this rank."""
    return {name: error(back(x), expected) for name, (x, expected) in results(group, whole, to).items()}


def wrong(case: Case, found: dict[str, float]) -> list[str]:
    """The results of a rank that are not what one rank computes."""
    largest = {"float64": 1e-12, "float16": 8e-3, "bfloat16": 6e-2}[case.dtype]
    return [f"{name} {x:.1e}" for name, x in found.items() if not x <= largest]


def main() -> None:
    group = connected(sys.argv[1])
    fastattn.set_num_threads(1)
    for name, case in CASES.items():
        if group.size in case.size:
            for text in wrong(case, run(group, Whole(name))):
                print(f"rank {group.rank} of {group.size}: {name}: {text}", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
