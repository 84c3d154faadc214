"""Shared memory of a kernel: a bump allocator over byte offsets, used while the kernel is made."""
from __future__ import annotations

ALIGN = 1024         # 128-byte swizzle repeats every 8 rows


class Smem:
    """`take(bytes)` gives an offset from the kernel's aligned base; `size` is what to ask for at launch."""

    def __init__(self) -> None:
        self._end = 0

    def take(self, size: int, align: int = ALIGN) -> int:
        start = -(-self._end // align) * align
        self._end = start + size
        return start

    def barriers(self, count: int) -> int:
        """`count` mbarriers, 8 bytes each."""
        return self.take(8 * count, 8)

    @property
    def size(self) -> int:
        """With room to align the base, which the driver aligns to 16 only (to 1024 in practice)."""
        return self._end + ALIGN


def panels(dim: int) -> int:
    """128-byte wide panels of a row of `dim` 16-bit elements."""
    return -(-dim // 64)
