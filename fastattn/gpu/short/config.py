"""Tilings of the backward of short sequences: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..config import num_features
from ..spec import Spec

WARPS = 4                   # of a thread block; 16 keys each
BLOCK_N = 16 * WARPS        # keys of a tile: all there are
BLOCK_M = 16 * WARPS        # query rows of a step: a warp has dQ of 16
MOST_ROWS = 128             # query rows of a call: one block goes through all of them
MOST_DIM = 64               # head_dim: one panel


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConfig:
    """A tiling of the kernel.

    Parameters
    ----------
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread: 128, 168 or 255.
    keep_bias
        All batch entries have the same bias, and a head is one block of queries: the bias and the sums of dbias stay in
        registers.
    squeeze
        As in sm90.config.BackwardSm90Config.
    dlse
        There is a gradient of lse.
    whole, whole_out
        Rows of q, k, v, dout and out (of dq, dk and dv) are aligned pieces of 16 bytes. Not a choice but a property of
        the operands that the code depends on.
    """

    blocks_per_sm: int
    keep_bias: bool = False
    squeeze: int = 0
    dlse: bool = False
    whole: bool = True
    whole_out: bool = True

    @property
    def text(self) -> str:
        return (f"{BLOCK_M}x{BLOCK_N} blocks {self.blocks_per_sm}" + " keep_bias" * self.keep_bias + " dlse" * self.dlse
                + (f" squeeze {self.squeeze}" if self.squeeze else "") + " elements" * (not self.whole)
                + " out_elements" * (not self.whole_out))


def choose_backward(spec: Spec, keep_bias: bool, dlse: bool, whole: bool, whole_out: bool) -> ShortConfig:
    """As many blocks on a multiprocessor as registers allow without spills; 41 KiB of shared memory each.

    Scores and their gradients take 32 registers each, dK and dV half of the head size each, dbias 32 more where it is
    summed.
    """
    sums, crowded = keep_bias and spec.dbias is not None, num_features(spec) > 1 or not (whole and whole_out)
    dim = max(spec.head_dim, spec.head_dim_v)
    narrow = dim <= 32
    # a softcap spills 28 to 32 bytes in four blocks, a mask at head_dim 16 12
    full = spec.softcap or spec.left or spec.right or (spec.mask and dim <= 16)
    blocks = 2 if crowded or (sums and not narrow) else 4 if narrow and not (sums or full) else 3
    return ShortConfig(blocks_per_sm=blocks, keep_bias=keep_bias, squeeze=int(spec.bias is not None), dlse=dlse, whole=whole,
                       whole_out=whole_out)
