"""The GPU cases and their bars, which are ratios to the best rival of the same run."""
from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ..case import Bar, Case, Mode

TOKENS, WIDTH = 16384, 2048  # batch * seqlen and heads * head_dim of the grid
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
BEST = "cuDNN|FA4"
ERROR = Bar("fastattn", "error", 1.1)  # against torch's flash backend on the same input
GEOMETRIC_MEAN = 1.0  # of the ratios to the best rival over a grid, at least
HOST_MICROSECONDS = 30.0
FEATURES = (4, 16, 4096, 128)  # (batch, heads, seqlen, head_dim)
SEQUENCES = tuple(int(n) for n in np.random.default_rng(0).integers(128, 4096, 32, endpoint=True))
QUICK_FP16 = {(128, False, 4096), (128, True, 4096), (64, False, 4096)}  # only a few: FA4 compiles each of them
QUICK_RIVALS = ("cuDNN", "FA4")  # the grid's rivals in a quick run: those with a bar
BACKWARD_SEQLEN = 65536  # of the case that measures memory


def grid_limit(head_dim: int, seqlen: int) -> float:
    """The required speedup of a cell of the grid against the faster of cuDNN and FA4."""
    return 0.85 if seqlen < 2048 else 0.95 if head_dim < 256 else 0.90


def forward_cases() -> list[Case]:
    """In the order in which they run: cases with a bar first."""
    return [*_grid("bfloat16"), *_grouped(), *_window(), *_packed(), *_dropout(), *_bias(), *_sm80(), *_host(), *_costs(), *_decode(),
            *_grid("float16")]


def backward_cases() -> list[Case]:
    """The same for the backward alone: the whole public call without its forward."""
    chosen = [*_grid("bfloat16", True), *_grouped(True), *_packed(True), *_dropout(True), *_bias(True), *_deterministic(),
              *_sm80(True), *_grid("float16", True), *_memory()]
    assert all(case.alone for case in chosen)
    return chosen


def select(cases: Iterable[Case], mode: Mode, only: str | None, skip: tuple[str, ...] = ()) -> list[Case]:
    """Cases of a mode whose name contains the regular expression `only`, without the rivals in `skip`."""
    return [replace(case, against=tuple(name for name in case.against if name not in skip and _timed(case, name, mode)))
            for case in cases if (mode != "quick" or case.mode == "quick") and (only is None or re.search(only, case.name))]


def _timed(case: Case, rival: str, mode: Mode) -> bool:
    return mode != "quick" or case.group != "grid" or rival in QUICK_RIVALS


def _alone(case: Case, backward: bool) -> Case:
    return replace(case, backward=True, alone=True) if backward else case


def _grid(dtype: str, backward: bool = False) -> Iterator[Case]:
    for head_dim, causal, seqlen in itertools.product((128, 64, 256), (False, True), SEQLENS):
        against = ("cuDNN", "FA4", "flash") + (("efficient",) if seqlen == 4096 else ())
        quick = dtype == "bfloat16" or (head_dim, causal, seqlen) in QUICK_FP16
        yield _alone(Case("grid", TOKENS // seqlen, WIDTH // head_dim, seqlen, head_dim, dtype=dtype, causal=causal, against=against,
                          bars=(ERROR, Bar(BEST, "speedup", grid_limit(head_dim, seqlen))), mode="quick" if quick else "full"), backward)


def _grouped(backward: bool = False) -> Iterator[Case]:
    for causal in (False, True):
        bar = () if backward else (Bar(BEST, "speedup", 0.95),)
        yield _alone(Case("gqa", 4, 32, 4096, 128, dtype="bfloat16", causal=causal, num_heads_k=8, against=("cuDNN", "FA4"),
                          bars=(ERROR, *bar), mode="quick"), backward)


def _window() -> Iterator[Case]:
    yield Case("window", 1, 16, 16384, 128, dtype="bfloat16", causal=True, window=1024, against=("FA4",),
               bars=(ERROR, Bar("FA4", "speedup", 0.95)), mode="quick")


def _packed(backward: bool = False) -> Iterator[Case]:
    for head_dim, causal in itertools.product((128, 64), (False, True)):
        yield _alone(Case("packed", len(SEQUENCES), WIDTH // head_dim, max(SEQUENCES), head_dim, dtype="bfloat16", causal=causal,
                          lengths=SEQUENCES, against=("FA4", "varlen_attn"),
                          bars=(ERROR, Bar("FA4", "speedup", 0.95), Bar("varlen_attn", "speedup", 1.6)), mode="quick"), backward)


def _dropout(backward: bool = False) -> Iterator[Case]:
    bar = Bar("cuDNN", "speedup", 1.1) if backward else Bar("cuDNN|flash", "speedup", 1.3)
    yield _alone(Case("dropout", *FEATURES, dtype="float16", dropout_p=0.1, against=("cuDNN", "flash"), bars=(ERROR, bar), mode="quick"),
                 backward)


def _bias(backward: bool = False) -> Iterator[Case]:
    """A bias of (1, heads, seqlen, seqlen). The efficient backend computes its gradient, cuDNN does not."""
    case = _alone(Case("bias", *FEATURES, dtype="float16", bias=True, against=("cuDNN", "efficient"),
                       bars=(ERROR, Bar("cuDNN", "speedup", 1.2 if backward else 1.3)), mode="quick"), backward)
    yield case
    if backward:
        yield replace(case, need_dbias=True, against=("efficient",), bars=(ERROR, Bar("efficient", "speedup", 2.0)))


def _deterministic() -> Iterator[Case]:
    for causal in (False, True):
        yield _alone(Case("deterministic", *FEATURES, dtype="bfloat16", causal=causal, deterministic=True, against=("plain",),
                          bars=(ERROR, Bar("plain", "cost", 1.35)), mode="quick"), True)


def _sm80(backward: bool = False) -> Iterator[Case]:
    """Our sm_80 kernels on this GPU, against torch's flash backend, which runs sm_80 kernels everywhere."""
    for head_dim, causal in itertools.product((128, 64), (False, True)):
        yield _alone(Case("sm80", 4, WIDTH // head_dim, 4096, head_dim, dtype="float16", causal=causal, kernels="sm80", against=("flash",),
                          bars=(ERROR, Bar("flash", "speedup", 1.0)), mode="quick"), backward)


def _host() -> Iterator[Case]:
    """A call so small that only its host time counts."""
    yield Case("host", 1, 8, 64, 64, dtype="float16", against=("sdpa", "FA4"), bars=(Bar("fastattn", "host", HOST_MICROSECONDS),),
               mode="quick")


def _costs() -> Iterator[Case]:
    """fastattn against itself without the feature, time per scored pair."""
    base = Case("features", *FEATURES, dtype="bfloat16", against=("plain",), bars=(ERROR,), mode="quick")
    yield from (replace(base, causal=True, alibi=True), replace(base, causal=True, softcap=30.0), replace(base, window=512),
                replace(base, sinks=True), replace(base, mask=True))
    for case in (replace(base, causal=True, position=True), replace(base, causal=True, float32_out=True)):
        yield replace(case, bars=(ERROR, Bar("plain", "cost", 1.02 if case.position else 1.1)))


def _decode() -> Iterator[Case]:
    for batch, keys in ((1, 8192), (16, 8192), (64, 4096), (1, 131072)):
        yield Case("decode", batch, 32, 1, 128, dtype="bfloat16", num_heads_k=8, seqlen_k=keys, against=("cuDNN", "flash", "FA4"),
                   bars=(ERROR,), mode="full" if keys > 8192 else "quick")


def _memory() -> Iterator[Case]:
    heads, head_dim = 16, 128
    limit = (1.3 * BACKWARD_SEQLEN * heads * head_dim * 4 + 2 * BACKWARD_SEQLEN * heads * 4) / 1e6  # dq in float32, delta, lse
    yield _alone(Case("memory", 1, heads, BACKWARD_SEQLEN, head_dim, dtype="bfloat16", bars=(Bar("fastattn", "memory", limit),)), True)
