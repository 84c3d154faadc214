"""Distributed calls beside the same call on one rank: named cases, which threads (tests/distributed/test_dense.py) and MPI run.

    mpiexec -n 2 python -m tests.tools.ranks mpi            all cases that two ranks can run; a line for each that is wrong, then "done"

"mpi" is mpi4py, "torch" torch.distributed with gloo, "connect" TCP; the last two take RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from
the environment.
"""
from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import fastattn
import fastattn.distributed as fd
from tests.tools.problems import NUMPY


@dataclass(frozen=True)
class Case:
    """A dense problem, and how it is spread. `size`: the numbers of ranks that can run it."""

    method: Any
    seqlen: int
    shard: str = "zigzag"
    size: tuple[int, ...] = (2, 4)
    seqlen_k: int | None = None
    batch: int = 1
    heads: int = 4
    heads_k: int = 2
    dim: int = 16
    dim_v: int = 16
    dtype: str = "float64"
    layout: str = "bshd"
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    alibi: bool = False
    sinks: bool = False
    dlse: bool = False
    pieces: int | None = None
    saved: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def same_bits(self) -> bool:
        """Whether out has the bits of one rank."""
        return self.method in ("gather", "ulysses", "auto") and self.seqlen > 100        # a rank with few rows plans its call for few rows


CAUSAL = {"causal": True}
DROPOUT = {"dropout_p": 0.3, "seed": 11, "offset": 5}
CASES = {
    "gather": Case("gather", 1003, options=CAUSAL),
    "gather of 3": Case("auto", 700, size=(1, 3), options=CAUSAL),
    "gather in pieces": Case("gather", 300, heads=8, heads_k=4, pieces=3, options=CAUSAL),
    "gather full": Case("gather", 300, "contiguous", batch=2),
    "gather halo": Case("gather", 900, "contiguous", options={"causal": True, "window": (70, None)}),
    "gather zigzag window": Case("gather", 900, options={"causal": True, "window": (200, None)}),
    "gather everything": Case("gather", 300, batch=2, bias=(2, 4, 300, 300), mask=(1, 1, 300, 300), sinks=True, dlse=True,
                              options={"causal": True, "softcap": 5.0, "softmax_scale": 0.3}),
    "gather bias of keys": Case("gather", 300, bias=(4, 1, 300), sinks=True, options=CAUSAL),
    "gather bias of all": Case("gather", 300, bias=(300, 300), layout="bhsd", dim_v=24, options=CAUSAL),
    "gather alibi": Case("gather", 517, alibi=True, options={"causal": True, "window": (200, None)}),
    "gather empty ranks": Case("gather", 20, size=(2, 4), sinks=True, options=CAUSAL),
    "gather nothing": Case("gather", 0, size=(2,), options=CAUSAL),
    "ring": Case("ring", 1003, options=CAUSAL),
    "ring of 3": Case("ring", 700, size=(1, 3), options=CAUSAL),
    "ring full": Case("ring", 300, "contiguous", batch=2),
    "ring everything": Case("ring", 300, batch=2, bias=(2, 4, 300, 300), mask=(1, 1, 300, 300), sinks=True, dlse=True,
                            options={"causal": True, "softcap": 5.0}),
    "ring bias of keys": Case("ring", 300, bias=(4, 1, 300), sinks=True, layout="bhsd", options=CAUSAL),
    "ring empty ranks": Case("ring", 20, size=(2, 4), sinks=True, options=CAUSAL),
    "ring in pieces": Case("ring", 515, size=(1, 2, 3), heads=8, heads_k=4, pieces=3, sinks=True, dlse=True, options=CAUSAL),
    "ring in pieces everything": Case("ring", 300, batch=2, pieces=2, bias=(2, 4, 300, 300), alibi=True, sinks=True,
                                      options={"causal": True, "softcap": 5.0} | DROPOUT),
    "ring window": Case("ring", 900, options={"causal": True, "window": (70, None)}),
    "ring window both ways": Case("ring", 517, "contiguous", batch=2, options={"window": (300, 57)}),
    "ring alibi and dropout": Case("ring", 517, alibi=True, sinks=True, options={"causal": True} | DROPOUT),
    "ring window and dropout": Case("ring", 517, bias=(4, 517, 517), options={"window": (93, 41)} | DROPOUT),
    "ring short queries": Case("ring", 100, seqlen_k=301, alibi=True, options=CAUSAL),
    "ring top left": Case("ring", 301, seqlen_k=100, options={"causal": "top_left"}),
    "ring bfloat16": Case("ring", 515, dtype="bfloat16", sinks=True, options=CAUSAL),
    "ring float16": Case("ring", 515, dtype="float16", options=CAUSAL),
    "ring float32": Case("ring", 515, dtype="float32", options=CAUSAL),
    "gather window both ways": Case("gather", 900, "contiguous", options={"window": (300, 57)}),
    "gather dropout": Case("gather", 517, batch=2, alibi=True, options={"causal": True} | DROPOUT),
    "gather dropout in pieces": Case("gather", 300, heads=8, heads_k=4, pieces=2, options=DROPOUT),
    "gather short queries": Case("gather", 300, seqlen_k=700, alibi=True, options=CAUSAL),
    "gather alibi full": Case("gather", 300, alibi=True),
    "gather top left": Case("gather", 301, seqlen_k=150, options={"causal": "top_left", "window": (30, None)}),
    "gather bfloat16": Case("gather", 1000, dtype="bfloat16", options=CAUSAL),
    "gather float32": Case("gather", 515, dtype="float32", bias=(4, 515, 515), sinks=True, options=CAUSAL),
    "ulysses dropout": Case("ulysses", 300, size=(2,), batch=2, alibi=True, options={"causal": True} | DROPOUT),
    "ulysses bfloat16": Case("ulysses", 515, size=(2,), dtype="bfloat16", options=CAUSAL),
    "ulysses x ring dropout": Case((2, 2), 300, size=(4,), batch=2, alibi=True, options={"causal": True} | DROPOUT),
    "ulysses": Case("ulysses", 515, heads=8, heads_k=4, options=CAUSAL),
    "ulysses uneven heads": Case("ulysses", 300, size=(2, 3), heads=10, heads_k=5, dim_v=8, options={"causal": True, "window": (70, None)}),
    "ulysses everything": Case("ulysses", 300, size=(2,), batch=2, bias=(2, 4, 300, 300), mask=(1, 1, 300, 300), sinks=True, dlse=True,
                               alibi=True, options={"causal": True, "softcap": 5.0}),
    "ulysses bias of heads": Case("ulysses", 300, size=(2,), bias=(1, 300, 300), mask=(1, 1, 1, 300), options=CAUSAL),
    "ulysses bias of keys": Case("ulysses", 300, size=(2,), bias=(4, 1, 300), options=CAUSAL),
    "gather saved": Case("gather", 300, heads=8, heads_k=4, pieces=2, saved=True, options=CAUSAL),
    "gather saved everything": Case("auto", 300, size=(1, 2), batch=2, saved=True, bias=(2, 4, 300, 300), sinks=True, dlse=True,
                                    options={"causal": True, "window": (70, None)} | DROPOUT),
    "ulysses saved everything": Case("ulysses", 300, size=(2,), heads=8, heads_k=4, batch=2, pieces=2, saved=True, bias=(2, 8, 300, 300),
                                     mask=(1, 1, 300, 300), sinks=True, dlse=True, layout="bhsd", options=CAUSAL),
    "ulysses x ring saved": Case((2, 2), 515, size=(4,), heads=8, heads_k=4, saved=True, options=CAUSAL),
    "ulysses in pieces": Case("ulysses", 300, size=(2, 3), heads=14, heads_k=7, pieces=2, dlse=True, options=CAUSAL),
    "ulysses in pieces everything": Case("ulysses", 300, size=(2,), heads=8, heads_k=4, batch=2, pieces=2, bias=(2, 8, 300, 300),
                                         mask=(1, 1, 300, 300), sinks=True, dlse=True, alibi=True,
                                         options={"causal": True, "softcap": 5.0} | DROPOUT),
    "ulysses in pieces bias of all": Case("ulysses", 300, size=(2,), heads=8, heads_k=4, pieces=9, bias=(300, 300), sinks=True,
                                          options=CAUSAL),
    "ulysses x ring in pieces": Case((2, 2), 515, size=(4,), heads=8, heads_k=4, pieces=2, bias=(8, 1, 515), sinks=True, options=CAUSAL),
    "ulysses x ring": Case((2, 2), 515, size=(4,), heads=8, heads_k=4, sinks=True, options=CAUSAL),
    "ulysses x ring everything": Case((2, 2), 300, size=(4,), batch=2, bias=(4, 1, 300), mask=(1, 1, 300, 300), sinks=True, dlse=True,
                                      options={"causal": True, "softcap": 5.0}),
}


def shorter(case: Case, seqlen: int) -> Case:
    """The case with another length."""
    def shape(x: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if x is None else tuple([seqlen if n == case.seqlen else n for n in x])
    return replace(case, seqlen=seqlen, bias=shape(case.bias), mask=shape(case.mask))


class Whole:
    """A case's arrays, and what one rank computes of them."""

    def __init__(self, name: str, case: Case | None = None) -> None:
        self.case = c = CASES[name] if case is None else case
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        keys = c.seqlen if c.seqlen_k is None else c.seqlen_k
        dtype = NUMPY[c.dtype]

        def draw(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(dtype)
        arrays = [draw(c.batch, c.seqlen, c.heads, c.dim), draw(c.batch, keys, c.heads_k, c.dim), draw(c.batch, keys, c.heads_k, c.dim_v),
                  draw(c.batch, c.seqlen, c.heads, c.dim_v)]
        if c.layout == "bhsd":
            arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
        *self.qkv, self.dout = arrays
        wide = np.float64 if c.dtype == "float64" else np.float32
        self.bias = None if c.bias is None else rng.standard_normal(c.bias).astype(dtype)
        self.mask = None if c.mask is None else rng.random(c.mask) < 0.7
        self.dlse = rng.standard_normal((c.batch, c.heads, c.seqlen)).astype(wide) if c.dlse else None
        self.options = c.options | {"layout": c.layout}
        if c.sinks:
            self.options["sinks"] = rng.standard_normal(c.heads).astype(wide)
        if c.alibi:
            self.options["alibi_slopes"] = (0.5 ** np.arange(1, c.heads + 1)).astype(wide)
        scores = {"bias": self.bias, "mask": self.mask}
        self.out, self.lse = fastattn.attention(*self.qkv, return_lse=True, **scores, **self.options)
        self.grads = fastattn.attention_backward(self.dout, *self.qkv, self.out, self.lse, dlse=self.dlse, need_dbias=c.bias is not None,
                                                 **scores, **self.options)


def of_rank(x: Any, group: Any, shard: str, axis: int) -> Any:
    """A rank's part of an array; an array that has one row for all as it is."""
    return x if x is None or x.shape[axis] == 1 else fd.shard(x, group, axis, shard=shard)


def here(x: Any) -> Any:
    return x


def results(group: Any, whole: Whole, to: Callable[[Any], Any] = here, **more: Any) -> dict[str, tuple[Any, Any]]:
    """Each result of this rank beside this rank's part of what one rank computes. `to` takes arrays to a device; `more` are keywords."""
    c = whole.case
    axis = 2 if c.layout == "bhsd" else 1

    def mine(x: Any, at: int = axis) -> Any:
        return of_rank(x, group, c.shard, at)

    def there(x: Any, at: int = axis) -> Any:
        return None if x is None else to(mine(x, at))
    options = {name: to(x) if isinstance(x, np.ndarray) else x for name, x in whole.options.items()}
    keywords = options | {"group": group, "seqlen": c.seqlen, "seqlen_k": c.seqlen_k, "shard": c.shard, "method": c.method,
                          "bias": there(whole.bias, -2), "mask": there(whole.mask, -2), "pieces": c.pieces} | more
    q, k, v = [there(x) for x in whole.qkv]
    out, lse, *saved = fd.attention(q, k, v, return_lse=True, return_saved=c.saved, **keywords)
    keywords["saved"] = saved[0] if saved else None
    dout, dlse = there(whole.dout), there(whole.dlse, 2)
    grads = fd.attention_backward(dout, q, k, v, out, lse, dlse=dlse, need_dbias=c.bias is not None, **keywords)
    found = {"out": (out, mine(whole.out)), "lse": (lse, mine(whole.lse, 2))}
    for name, x in grads._asdict().items():
        of_one = getattr(whole.grads, name)
        assert (x is None) == (of_one is None)
        if x is not None:
            found[name] = x, of_one if name == "dsinks" else mine(of_one, -2 if name == "dbias" else axis)
    return found


def run(group: Any, whole: Whole, to: Callable[[Any], Any] = here, back: Callable[[Any], Any] = here) -> dict[str, float]:
    """The largest error of each result on this rank, against one rank; "bits": 0 where out is the same bit for bit."""
    found = {name: (back(x), expected) for name, (x, expected) in results(group, whole, to).items()}
    return {name: error(*pair) for name, pair in found.items()} | {"bits": float(not np.array_equal(*found["out"]))}


def error(x: Any, y: Any) -> float:
    """The largest difference, of what is larger than 1 its part; infinite where shape, dtype or the places of infinities differ."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return np.inf
    x, y = x.astype(np.float64), y.astype(np.float64)
    same = x == y
    return float(np.abs(np.where(same, 0, x) - np.where(same, 0, y)).max(initial=0) / np.abs(y[np.isfinite(y)]).max(initial=1))


def wrong(case: Case, found: dict[str, float]) -> list[str]:
    """The results of a rank that are not what one rank computes."""
    largest = {"float64": 1e-12, "float32": 1e-5, "float16": 8e-3, "bfloat16": 6e-2}[case.dtype]
    bad = [f"{name} {x:.1e}" for name, x in found.items() if name != "bits" and not x <= largest]
    return bad + ["bits of out"] * bool(case.same_bits and case.dtype == "float64" and found["bits"])


def drops_as_one(group: Any, method: Any) -> bool:
    """Whether this rank drops the elements that one rank drops, bit for bit: with the identity as V out is the matrix of probabilities."""
    batch, n, heads = 2, 96, 4
    q, k = np.random.default_rng(5).standard_normal((2, batch, n, heads, 8))
    v = np.broadcast_to(np.eye(n)[:, None], (batch, n, heads, n)).copy()
    mine = [fd.shard(x, group) for x in (q, k, v)]
    out = fd.attention(*mine, group=group, seqlen=n, method=method, **DROPOUT)
    kept = fastattn.dropout_mask(batch, heads, n, n, **DROPOUT).transpose(0, 2, 1, 3)
    return bool(np.array_equal(out != 0, fd.shard(kept, group) != 0))


def methods(size: int) -> list[Any]:
    """All methods that so many ranks and 4 heads can take."""
    return ["gather", "ring", *(["ulysses"] if size <= 4 else []), *([(2, size // 2)] if size % 2 == 0 and size > 2 else [])]


def connected(transport: str) -> Any:
    """The group of this process."""
    if transport == "mpi":
        from mpi4py import MPI

        return fd.group(MPI.COMM_WORLD, timeout=60)
    if transport == "torch":
        from torch import distributed

        distributed.init_process_group("gloo")
        return fd.group(distributed.group.WORLD, timeout=60)
    return fd.connect("cpu", timeout=60)


def main() -> None:
    group = connected(sys.argv[1])
    fastattn.set_num_threads(1)
    for name, case in CASES.items():
        if group.size in case.size and (len(sys.argv) < 3 or sys.argv[2] in name):
            for text in wrong(case, run(group, Whole(name))):
                print(f"rank {group.rank} of {group.size}: {name}: {text}", flush=True)
    for method in methods(group.size):
        if not drops_as_one(group, method):
            print(f"rank {group.rank} of {group.size}: {method} drops other elements", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main()
