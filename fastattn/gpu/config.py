"""What the families' tilings share: limits of architectures, and how many registers a problem's features take."""
from __future__ import annotations

from .spec import Spec

SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}      # KiB a block may ask for


def num_features(spec: Spec) -> int:
    """Of those that take registers."""
    return spec.dropout + spec.softcap + spec.mask + (spec.alibi is not None) + (spec.bias is not None)


def feature_weight(spec: Spec) -> int:
    """0: features cost no registers to speak of, 1: one value more for every score, 2: several."""
    values = spec.dropout + spec.mask + (spec.bias is not None) * (1 if spec.bias_pairs else 2)
    return 0 if values == 0 else 1 if values + spec.softcap + (spec.alibi is not None) <= 2 else 2


SHORT, LONG = 1536, 3072       # keys; measured in docs/performance.md


def squeeze(spec: Spec, pieces: int = 1) -> int:
    """For a bias beside a mask, whose elements take more registers than there are: 4 to 72 bytes would spill. Packing them takes
    arithmetic, which the one or the other alone does without."""
    return pieces if spec.mask and spec.bias is not None else 0
