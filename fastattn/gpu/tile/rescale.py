"""When row maxima rise: O is rescaled to the new ones, which most steps leave as they are."""
from __future__ import annotations

from numba import float32, int32

from ..dsl.inline import inline
from ..ptx.sync import any_lane
from .fragments import scale_rows


@inline
def rescale(acc_o, alpha0, alpha1):
    """O under the new maxima of the thread's two rows. The branch, which a warp takes as one, skips multiplications by 1."""
    if any_lane(int32(1) if alpha0 != float32(1) or alpha1 != float32(1) else int32(0)) != 0:
        acc_o = scale_rows(acc_o, alpha0, alpha1)
    return acc_o


@inline
def changed(alpha0, alpha1, sum0, sum1):
    """1 if O must be rescaled. The test on the sums is never true; it is a data dependence that keeps this after the softmax."""
    return int32(1) if alpha0 != float32(1) or alpha1 != float32(1) or sum0 < float32(0) or sum1 < float32(0) else int32(0)
