"""Tilings of the mma.sync kernels for functions of the caller's: a ladder, of which flex/ladder.py takes the first that does not spill."""
from __future__ import annotations

from dataclasses import replace

from ..flex.ladder import simple
from ..spec import Spec
from .config import BackwardSm80Config, ForwardSm80Config, choose_backward, choose_forward


def _heavy(spec: Spec) -> Spec:
    """With a feature that takes registers: choose_forward and choose_backward leave room for it."""
    return replace(spec, mask=True)


def forward_ladder(spec: Spec, arch: str, whole: bool, whole_out: bool) -> tuple[ForwardSm80Config, ...]:
    """The tiling without functions if the function is of the score alone, then that of a call with features, then fewer keys a step."""
    own, heavy = (choose_forward(s, arch, whole, whole_out) for s in (spec, _heavy(spec)))
    rungs = [own, heavy] if simple(spec.score_mod) else [heavy]
    return (*rungs, *(replace(heavy, block_n=n) for n in (48, 32, 16) if n < heavy.block_n))


def backward_ladder(spec: Spec, arch: str, whole: bool, whole_out: bool) -> tuple[BackwardSm80Config, ...]:
    """The tiling of a call with features, then fewer query rows a step."""
    heavy = choose_backward(_heavy(spec), arch, whole, whole_out)
    narrow = replace(heavy, block_m=32, split=1, tiles=1, warps=8)
    return tuple(dict.fromkeys([heavy, *([replace(heavy, block_m=32)] if heavy.split == 1 else []), narrow]))
