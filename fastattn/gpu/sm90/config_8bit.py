"""Tilings of the Hopper forward on 8-bit operands: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..spec import Spec
from .config import ForwardSm90Config

# head sizes that have a tiling; others are widened to 16 bits. At 256 O and a quarter of P V spill 300 to 500 bytes beside 32 to 96 keys
DIMS = (64, 128)
MOST_SUMMED = 384           # keys of a sum of the tensor cores: of as many positive ones it loses 0.5 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward8BitConfig(ForwardSm90Config):
    """A tiling of the forward on 8-bit operands. Its steps are optimistic, and nobody waits for a turn.

    Parameters
    ----------
    gather
        P V of so many blocks is summed by the tensor cores before it is added to O in float32: fewer additions, and a larger error.
    ahead
        The scores of a block are computed during the softmax of the block before it, in the registers that P V has left: block_n is
        head_dim, so that both take as many.
    offset
        P is multiplied by 2**offset before it is rounded: e4m3 ends at 448, and its steps below 2**-6 are 2**-9. A thread's sum of a row
        in a block is at most 448 in an optimistic step, so each probability is, too; the offset leaves room for equal ones.
    """

    gather: int = 1
    ahead: bool = False
    offset: int = 3

    def __post_init__(self) -> None:
        assert self.gather in (1, 2) and self.gather * self.block_n <= MOST_SUMMED
        assert self.optimistic and not self.turns
        assert self.gather == 1 or not self.ahead, "the registers of a sum are for the next scores"
        assert self.block_n // 4 << self.offset <= 448, "equal probabilities would be too many"

    @property
    def panel(self) -> int:
        """Keys of a panel of the transposed V: its rows' bytes, a width of the swizzle."""
        return next(n for n in (128, 64, 32) if self.block_n % n == 0)

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} stages {self.stages} out {self.out_panels} gather {self.gather} offset {self.offset}"
                + " ahead" * self.ahead)


def row_bytes(dim: int) -> int:
    """Bytes of a row of a panel of `dim` columns."""
    return min(dim, 128)


def choose_forward_8bit(spec: Spec) -> Forward8BitConfig:
    """S takes block_n / 2 registers a thread, P block_n / 8, O and a sum head_dim / 2 each, of 232.

    D128, H200: 913 to 948 TFLOP/s full, of which `ahead` is 3 to 5 %; 772 to 933 causal, where it loses 1 to 2 % and `gather` is 1 to 2 %.
    144 keys spill. Maxima in every step take 16 to 20 % more time, turns 5 to 7 % under a causal mask (docs/log-gpu.md).
    """
    direct = (spec.out_dtype or spec.dtype) not in ("float16", "bfloat16")      # the output is stored from the registers
    if spec.head_dim <= 64:
        return Forward8BitConfig(block_m=128, block_n=192, out_panels=0 if direct else 1)
    out_panels = 0 if direct else 2
    if spec.left:           # the bounds of a window would spill 60 bytes beside a sum of two blocks; with 128 keys, 56 bytes of lse
        return Forward8BitConfig(block_m=128, block_n=96 if spec.lse else 128, out_panels=out_panels)
    if spec.right:
        return Forward8BitConfig(block_m=128, block_n=128, out_panels=out_panels, gather=2)
    return Forward8BitConfig(block_m=128, block_n=128, stages=4, out_panels=out_panels, ahead=True)
