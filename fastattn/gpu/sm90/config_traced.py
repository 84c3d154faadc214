"""Tilings of the Hopper kernels for functions of the caller's: a ladder, of which flex/ladder.py takes the first that does not spill."""
from __future__ import annotations

from dataclasses import replace

from ..flex.derived import is_rated
from ..flex.distance import is_light
from ..flex.ladder import simple
from ..spec import Spec
from .config import BackwardSm90Config, ForwardSm90Config, choose_backward, choose_forward

# of a step, as far as the other features let them. With a load for every score 112 keys never helped where 128 spilled
KEYS, KEYS_OF_LOADS = (112, 96, 64, 48, 32), (96, 64, 48, 32)
SMALL = ForwardSm90Config(block_m=64, block_n=64, out_panels=2, optimistic=False, blocks_per_sm=2)


def forward_ladder(spec: Spec, seqlen_k: int, seqlen_q: int, fine: bool = False) -> tuple[ForwardSm90Config, ...]:
    """The tiling without functions, then narrower ones.

    The fallback of `optimistic` computes scores a second time and keeps all that they are made of: 48 to 136 bytes spill for a table. So
    only functions of the score and of q - k have it: ALiBi takes 489 us with it, 505 without.

    fine: of a mask of short pieces, two thread blocks of 64 x 64 come first. Documents of 341 keys take 104 us instead of 121, a window of
    1024 keys 244 instead of 216, causal calls 524 instead of 429.
    """
    own = choose_forward(spec, seqlen_k, seqlen_q)
    if not simple(spec.score_mod):
        own = replace(own, optimistic=is_light(spec.score_mod) and own.block_n == 128)
    rungs = [own] if own.block_m <= 128 else [own, replace(own, block_m=128)]
    if own.optimistic and not simple(spec.score_mod):
        rungs.append(replace(rungs[-1], optimistic=False))
    keys = KEYS_OF_LOADS if spec.score_mod is not None and spec.score_mod.gathers else KEYS
    small = [SMALL] if fine and spec.mask_mod and not spec.packed and max(spec.head_dim, spec.head_dim_v) <= 128 else []
    return (*small, *rungs, *(replace(rungs[-1], block_n=n) for n in keys if n < own.block_n))


def backward_ladder(spec: Spec, seqlen_k: int) -> tuple[BackwardSm90Config, ...]:
    """The tiling of a softcap, whose derivative takes as many registers as any function's, in the order of most MMAs beside arithmetic.

    No loop of its own for far rows, and under a mask_mod blocks from first to last: the producer looks for the next one that is seen.
    """
    own = choose_backward(replace(spec, softcap=is_rated(spec) or spec.softcap), seqlen_k)
    own = replace(own, split=False)
    own = replace(own, apart=False, halves=False, crowded=own.crowded or own.block_m > 64, down=own.down and spec.mask_mod is None)
    rungs = [replace(own, crowded=False), replace(own, crowded=True)] if own.block_m == 64 else [own]
    return (*rungs, *([replace(own, block_m=64, crowded=crowded) for crowded in (False, True)] if own.block_m > 64 else []))
