"""Tilings of the Hopper forward on 8-bit operands: every number with its constraint, and the measurement that chose it."""
from __future__ import annotations

from dataclasses import dataclass

from ..spec import Spec
from .config import ForwardSm90Config

# head sizes that have a tiling; others are widened to 16 bits. At 256 O and a quarter of P V spill 300 to 500 bytes beside 32 to 96 keys
DIMS = (64, 128)
# P is multiplied by 2**OFFSET before it is rounded: e4m3 ends at 448 and its steps below 2**-6 are 2**-9. 7 leaves a factor of 3.5 for
# maxima that lag (tile/softmax_8bit.py)
OFFSET = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward8BitConfig(ForwardSm90Config):
    """A tiling of the forward on 8-bit operands.

    Parameters
    ----------
    optimistic
        As in ForwardSm90Config, and a thread's sum of a row in a block is at most 448, so each probability is, too. The offset leaves room
        for equal ones, 32 in a block of 128 keys.
    pieces
        P V of a block is added to O in so many pieces of columns, one after the other. O in float32 takes head_dim_v / 2
        registers a thread, a piece head_dim_v / 2 / pieces more.
    gather
        P V of so many blocks is summed by the tensor cores before it is added to O in float32: fewer additions, and a larger error.
    parked
        O in float32 is in shared memory, where each sum of `gather` blocks is added: registers for wider blocks of keys.
    offset
        P is multiplied by 2**offset before it is rounded.
    polynomial
        Of so many neighbouring exponentials one is a polynomial on the FMA units instead of ex2, of which a
        multiprocessor does 16 a cycle. 0: none.
    degree
        Of the polynomial: 2 or 3.
    """

    pieces: int = 1
    polynomial: int = 0
    degree: int = 3
    gather: int = 1
    parked: bool = False
    offset: int = OFFSET
    ahead: bool = False
    ones: bool = False
    pairs: bool = True

    def __post_init__(self) -> None:
        assert self.gather in (1, 2, 4, 8, 16) and self.degree in (2, 3) and (self.gather > 1 or not self.parked)
        assert self.pieces == 1 or (self.gather == 1 and not self.optimistic), "a piece is added when it is there"
        assert not self.optimistic or self.ones or self.block_n // 4 << self.offset <= 448, "equal probabilities would be too many"

    @property
    def panel(self) -> int:
        """Keys of a panel of the transposed V: its rows' bytes, a width of the swizzle."""
        return next(n for n in (128, 64, 32) if self.block_n % n == 0)

    @property
    def text(self) -> str:
        return (f"{self.block_m}x{self.block_n} stages {self.stages} out {self.out_panels} pieces {self.pieces}" + " turns" * self.turns
                + f" polynomial {self.polynomial} of {self.degree}" * (self.polynomial > 0) + " optimistic" * self.optimistic
                + f" gather {self.gather}" * (self.gather > 1) + " parked" * self.parked
                + f" offset {self.offset}" * (self.offset != OFFSET) + " ahead" * self.ahead + " ones" * self.ones
                + " pairs" * (self.ahead and self.pairs))


def row_bytes(dim: int) -> int:
    """Bytes of a row of a panel of `dim` columns."""
    return min(dim, 128)


def choose_forward_8bit(spec: Spec) -> Forward8BitConfig:
    """S takes block_n / 2 registers a thread, P block_n / 8, O head_dim / 2 and a piece of P V, of 232."""
    direct = (spec.out_dtype or spec.dtype) not in ("float16", "bfloat16")      # the output is stored from the registers
    dim = spec.head_dim
    if dim <= 64:
        return Forward8BitConfig(block_m=128, block_n=192, out_panels=0 if direct else 1, turns=True, optimistic=False)
    return Forward8BitConfig(block_m=128, block_n=128, out_panels=0 if direct else 2, gather=2, offset=3)
