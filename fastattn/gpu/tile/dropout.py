"""Dropout of accumulator fragments, with Philox4x32-10 as philox.py defines it."""
from __future__ import annotations

from typing import Any

from numba import int32, uint32, uint64

from ..dsl.inline import inline
from ..spec import Spec
from .fragments import drop, make_draw


def philox(c0, c1, c2, c3, k0, k1):
    """The four random words of counter (c0, c1, c2, c3) under key (k0, k1), all uint32."""
    for _ in range(10):
        p0 = uint64(c0) * uint64(0xD2511F53)
        p1 = uint64(c2) * uint64(0xCD9E8D57)
        c0, c1, c2, c3 = uint32(uint32(p1 >> uint64(32)) ^ c1 ^ k0), uint32(p1), uint32(uint32(p0 >> uint64(32)) ^ c3 ^ k1), uint32(p0)
        k0 = uint32(k0 + uint32(0x9E3779B9))
        k1 = uint32(k1 + uint32(0xBB67AE85))
    return c0, c1, c2, c3


@inline
def plane_of(a, batch, head):
    """The third word of philox.py's counter."""
    return uint32(a.plane + batch * a.plane_heads + head)


@inline
def no_plane(a, batch, head):
    return uint32(0)


def make_dropout(spec: Spec, COUNT: int, EARLY: bool = False) -> tuple[Any, Any, Any]:
    """(plane_of, draw, dropout) for a fragment of COUNT registers. Without dropout they do nothing. EARLY: see fragments.make_draw.

    plane = plane_of(a, batch, head)
    words = draw(a, row, col, plane)        row, col: the thread's first
    p = dropout(a, p, words)                0 where dropped; the factor 1 / (1 - dropout_p) is applied to the output
    """
    if not spec.dropout:
        @inline
        def no_words(a, row, col, plane):
            return int32(0)

        @inline
        def nothing(a, p, words):
            return p
        return no_plane, no_words, nothing
    draw_words = make_draw(philox, COUNT, EARLY)

    @inline
    def draw(a, row, col, plane):
        lane = int32(((row & 7) << 2) | ((col & 7) >> 1))
        return draw_words(int32((row >> 4) + a.row16), int32((col >> 4) + a.column16), lane, plane, a.offset, a.seed_low, a.seed_high)

    @inline
    def dropout(a, p, words):
        return drop(p, words, a.threshold)
    return plane_of, draw, dropout
