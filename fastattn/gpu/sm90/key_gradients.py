"""The end of a tile of the Hopper backward: dK and dV of its keys to memory."""
from __future__ import annotations

from typing import Any

from numba import int32, int64

from ..dsl.inline import inline
from ..spec import Spec
from ..tile.fragments import scale_rows
from ..tile.gradients import make_store
from ..tile.smem import WARPGROUP_ROWS
from .config import BLOCK_N, BackwardSm90Config
from .consumer import own_lane, own_thread, own_warpgroup


def make_store_keys(spec: Spec, config: BackwardSm90Config, kept_tile: Any) -> Any:
    """store_keys(a, base, acc_dk, acc_dv), by a consumer warpgroup. kept_tile: of gradients.make_kept_tile."""
    store_k, store_v, PACKED, DROPOUT = make_store(spec, config.dim), make_store(spec, config.dim_v), spec.packed, spec.dropout

    @inline
    def store_keys(a, base, acc_dk, acc_dv):
        n_block, head_k, batch, k_start, used, keys = kept_tile(base)
        w, thread, lane = own_warpgroup(), own_thread(), own_lane()
        key = int32(n_block * BLOCK_N + w * WARPGROUP_ROWS + (thread >> 5) * 16 + (lane >> 2))
        map_batch = int32(0) if PACKED else batch
        if DROPOUT:
            acc_dv = scale_rows(acc_dv, a.keep_scale, a.keep_scale)
        to_v = int64(a.dv) + map_batch * a.dv_batch + head_k * a.dv_head + k_start * a.dv_row
        store_v(acc_dv, to_v, a.dv_row, a.head_dim_v, lane, key, used, keys)
        acc_dk = scale_rows(acc_dk, a.grad_scale, a.grad_scale)
        to_k = int64(a.dk) + map_batch * a.dk_batch + head_k * a.dk_head + k_start * a.dk_row
        store_k(acc_dk, to_k, a.dk_row, a.head_dim, lane, key, used, keys)
    return store_keys
