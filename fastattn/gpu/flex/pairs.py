"""score_mod and mask_mod on one pair of a query row and a key, for kernels on plain threads."""
from __future__ import annotations

from typing import Any

from numba import float32, float64, int32

from ..dsl.inline import inline
from ..spec import Spec
from ..traced import MASK, SCORE
from .derived import with_rate
from .staged import make_stages


def _nothing() -> tuple[Any, Any]:
    @inline
    def prepare(a, batch, head):
        return int32(0)
    return prepare, None


def make_pair_mods(spec: Spec, DERIVATIVE: bool) -> tuple[Any, Any, Any]:
    """(prepare, modify, sees).

    shared = prepare(a, batch, head): what all pairs of a head share; kernels only pass it on
    s, rate = modify(a, s, shared, batch, head, row, col): the score_mod's score of a score, and its derivative (1 without DERIVATIVE)
    sees(a, shared, batch, head, row, col): whether the mask_mod lets the row attend the key

    Where the Spec has no such function, a score stays and all is seen.
    """
    REAL = float64 if spec.dtype == "float64" else float32
    (prepare_mod, modify), (prepare_mask, sees) = _make_modify(spec, REAL, DERIVATIVE), _make_sees(spec, REAL)

    @inline
    def prepare(a, batch, head):
        return prepare_mod(a, batch, head), prepare_mask(a, batch, head)
    return prepare, modify, sees


def _make_modify(spec: Spec, REAL: Any, DERIVATIVE: bool) -> tuple[Any, Any]:
    if spec.score_mod is None:
        prepare, _ = _nothing()

        @inline
        def stays(a, s, shared, batch, head, row, col):
            return s, REAL(1)
        return prepare, stays
    program = with_rate(spec.score_mod) if DERIVATIVE else spec.score_mod
    tile_values, row_values, column_values, element_values = make_stages(program, SCORE, REAL)

    @inline
    def prepare_tile(a, batch, head):
        return tile_values(a, batch, head, REAL(1))

    @inline
    def modify(a, s, shared, batch, head, row, col):
        tile = shared[0]
        rows, columns = row_values(a, tile, batch, head, row, REAL(1)), column_values(a, tile, batch, head, col, REAL(1))
        out = element_values(a, tile, rows, columns, batch, head, row, col, s, REAL(1))
        if DERIVATIVE:
            return out[0], out[1]
        else:
            return out[0], REAL(1)
    return prepare_tile, modify


def _make_sees(spec: Spec, REAL: Any) -> tuple[Any, Any]:
    if spec.mask_mod is None:
        prepare, _ = _nothing()

        @inline
        def all_seen(a, shared, batch, head, row, col):
            return True
        return prepare, all_seen
    tile_values, row_values, column_values, element_values = make_stages(spec.mask_mod, MASK, REAL)

    @inline
    def prepare_tile(a, batch, head):
        return tile_values(a, batch, head, REAL(1))

    @inline
    def sees(a, shared, batch, head, row, col):
        tile = shared[1]
        rows, columns = row_values(a, tile, batch, head, row, REAL(1)), column_values(a, tile, batch, head, col, REAL(1))
        return element_values(a, tile, rows, columns, batch, head, row, col, REAL(0), REAL(1))[0]
    return prepare_tile, sees
