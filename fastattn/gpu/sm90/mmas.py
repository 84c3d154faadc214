"""The five MMAs of the Hopper backward: descriptors of what lies in shared memory."""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32

from ..dsl.inline import inline
from ..ptx import wgmma
from ..spec import Spec
from ..tile.smem import ROW_BYTES, WARPGROUP_ROWS, panels
from .config import BLOCK_N, BackwardSm90Config


class Places(NamedTuple):
    """Offsets in shared memory: K, V, the stages of Q and of dO, the buffers of dS."""

    k: int
    v: int
    q: int
    do: int
    ds: int


def columns_of_dq(config: BackwardSm90Config) -> tuple[int, int]:
    """Registers of a product of dQ, and how far apart in K the two warpgroups' columns are. See tile/gradients.make_piece_of."""
    if config.block_m == 2 * WARPGROUP_ROWS:
        return config.dim // 2, 0
    return (32, BLOCK_N * ROW_BYTES) if panels(config.dim) > 1 else (config.dim // 4, config.dim)


def make_mmas(spec: Spec, config: BackwardSm90Config, places: Places) -> tuple[Any, Any, Any, Any, Any]:
    """(mma_s, mma_dp, mma_dv, mma_dq, mma_dk), each of warpgroup w, or of half w of dQ."""
    DIM, DIM_V, BLOCK_M = config.dim, config.dim_v, config.block_m
    PANELS, PANELS_V, Q_PANEL, KV_PANEL = panels(DIM), panels(DIM_V), BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES
    DS_PANEL, DS_PANELS, WARPGROUP_BYTES = BLOCK_N * ROW_BYTES, panels(BLOCK_M), WARPGROUP_ROWS * ROW_BYTES
    Q_BYTES, DO_BYTES, DS_BYTES, COLUMNS = PANELS * Q_PANEL, PANELS_V * Q_PANEL, DS_PANELS * DS_PANEL, columns_of_dq(config)[1]
    K, V, Q, DO, DS = places
    (qk, pv), (dsk, dsq) = wgmma.make_products(spec.dtype), wgmma.make_grad_products(spec.dtype)

    @inline
    def mma_s(base, w, acc_s, stage):
        """S^T = K Q^T of the warpgroup's keys."""
        return qk(acc_s, wgmma.k_major(base + K + w * WARPGROUP_BYTES), wgmma.k_major(base + Q + stage * Q_BYTES), DIM, BLOCK_N, BLOCK_M)

    @inline
    def mma_dp(base, w, acc_dp, stage_do):
        """dP^T = V dO^T."""
        return qk(acc_dp, wgmma.k_major(base + V + w * WARPGROUP_BYTES), wgmma.k_major(base + DO + stage_do * DO_BYTES), DIM_V,
                  BLOCK_N, BLOCK_M)

    @inline
    def mma_dv(base, acc_dv, p, stage_do):
        """dV += P^T dO."""
        return pv(acc_dv, p, wgmma.mn_major(base + DO + stage_do * DO_BYTES, Q_PANEL))

    @inline
    def mma_dq(base, w, acc_dq, buffer):
        """dQ = dS K: the warpgroup's half of the queries, or its panel or half of the columns."""
        return dsk(acc_dq, wgmma.mn_major(base + DS + buffer * DS_BYTES + (w * DS_PANEL if DS_PANELS == 2 else int32(0)), DS_PANEL),
                   wgmma.mn_major(base + K + w * COLUMNS, KV_PANEL), BLOCK_N)

    @inline
    def mma_dk(base, w, acc_dk, buffer, stage):
        """dK += dS^T Q."""
        return dsq(acc_dk, wgmma.k_major(base + DS + buffer * DS_BYTES + w * WARPGROUP_BYTES),
                   wgmma.mn_major(base + Q + stage * Q_BYTES, Q_PANEL), BLOCK_M, BLOCK_N)
    return mma_s, mma_dp, mma_dv, mma_dq, mma_dk
