"""What a Problem consists of besides shapes: the structural mask, the scores, dropout, caches."""
from __future__ import annotations

from dataclasses import dataclass

from .masks import Rows, diagonal_of, row_bounds


@dataclass(frozen=True, slots=True)
class Mask:
    """The structural mask: keys from `left` before to `right` after the diagonal, inclusive; None is no limit.

    `first`: the key on which row 0 stands, where the call gives it. One for each sequence is an operand, `diagonals`.
    """

    left: int | None = None
    right: int | None = None
    top_left: bool = False
    first: int | None = None

    def diagonal(self, row: Rows, seqlen_q: int, seqlen_k: int) -> Rows:
        return diagonal_of(row, seqlen_q, seqlen_k, self.top_left, self.first)

    def bounds(self, row: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        return row_bounds(row, seqlen_q, seqlen_k, self.left, self.right, self.top_left, self.first)


NO_LIMITS = Mask()


@dataclass(frozen=True, slots=True)
class Score:
    """How a dot product becomes a score: softcap(softmax_scale * q.k) + alibi + bias, then the boolean mask.

    `bias` is the dtype of the bias operand or None. The other features are flags: whether the operand is given.
    """

    softmax_scale: float
    softcap: float | None = None
    alibi: bool = False
    bias: str | None = None
    mask: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Dropout:
    """Philox dropout addressed by position (see philox.py): `seed` is the 64-bit key, `offset` the last counter word.

    The mask is that of a larger problem with `heads` heads (None: the call's), from element (batch, head, row, column) on.
    """

    p: float
    seed: int
    offset: int = 0
    batch: int = 0
    head: int = 0
    row: int = 0                          # row and column are multiples of 16
    column: int = 0
    heads: int | None = None

    def plane(self, num_heads: int) -> tuple[int, int]:
        """(first, heads) of a call's planes: batch entry b and head h have number first + b * heads + h, modulo 2**32."""
        heads = num_heads if self.heads is None else self.heads
        return (self.batch * heads + self.head) & 0xFFFFFFFF, heads

    @property
    def threshold(self) -> int:
        """A 16-bit lane is kept when it is >= threshold = round(p * 65536)."""
        return round(self.p * 65536)

    @property
    def keep_scale(self) -> float:
        """1 / (1 - threshold / 65536); 0 when nothing is kept, so that p = 1 gives zeros."""
        return 65536.0 / (65536 - self.threshold) if self.threshold < 65536 else 0.0


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding of q and of the new keys: the first `dim` columns are turned by their row's position.

    Column c is paired with column c + dim / 2, `interleaved` with its neighbour.
    """

    dim: int
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Cache:
    """The caches that k and v are, (pages, page_size, num_heads_k, dim), and what the call does with them.

    A request's keys are in the pages that its row of the block table names. A contiguous cache is pages of one request
    each. With `append` q's rows bring keys and values, which are written behind those in the cache before the call.
    """

    pages: int
    page_size: int
    dtype: str
    append: bool = False
    rotary: Rotary | None = None
    num_splits: int | None = None
    k_scale: float = 1.0                  # what new 16-bit keys and values of 8-bit caches are divided by, where it is a number
    v_scale: float = 1.0
    shared_prefix: int | None = None      # the first keys of all requests that are in the same pages; None: nothing is said
