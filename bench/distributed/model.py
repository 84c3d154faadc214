"""How efficient a case can be: what transfers nothing hides, beside the computation that one rank was measured with."""
from __future__ import annotations

from .cases import Case

BYTES_A_SECOND = 300e9      # from one device to another and back at the same time, NVLink of an H200
START = 0.35e-3             # seconds until a call has started its first exchange and its first kernel


def exposed(case: Case, size: int, backward: bool) -> float:
    """Bytes that a rank receives before its first call or behind its last one: with groups of heads those of the first and of the last."""
    pieces = case.pieces or 2
    row = case.head_dim * (4 if case.dtype == "float32" else 2)
    others, own = case.seqlen * (size - 1) / size, case.seqlen / size
    if case.method == "gather":
        elements = others * 2 * case.heads_k * case.head_dim
        return elements * (row / case.head_dim + backward * 4) / pieces         # keys, and float32 shares of their gradients
    if case.method == "ring":
        return backward * own * 2 * case.heads_k * case.head_dim * 4 / pieces
    to_heads = others * ((3 if backward else 1) * case.heads + 2 * case.heads_k) / size * row
    to_rows = own * (size - 1) / size * (case.heads + (2 * case.heads_k if backward else 0)) * row
    return (to_heads + to_rows) / pieces


def efficiency(case: Case, size: int, one: tuple[float, float]) -> float | None:
    """Of a forward and a backward, from the seconds of one rank. None where what is sent depends on a window or on documents."""
    if case.window is not None or case.documents or size == 1:
        return None
    linear = sum(one) / size
    lost = sum(exposed(case, size, backward) / BYTES_A_SECOND + START for backward in (False, True))
    return linear / (linear + lost)
