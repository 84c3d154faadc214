"""What the families' tilings share: how many registers features take, which sequences count as short or long."""
from __future__ import annotations

from .spec import Spec

SHORT, LONG = 1536, 3072       # keys; measured in docs/performance.md
GROUP = 64                     # lines of a mask that share bounds (rows/mask_words.py): those of a warpgroup
# float32 calls that plain threads run in less time than the passes that split operands for tensor cores: some 15 us
FEW_FLOAT_KEYS, FEW_FLOAT_PRODUCTS = 128, 2**26


def num_features(spec: Spec) -> int:
    """Number of features that take registers."""
    return spec.dropout + spec.softcap + spec.mask + (spec.alibi is not None) + (spec.bias is not None)


def feature_weight(spec: Spec) -> int:
    """0: the features take next to no registers. 1: one more value for every score. 2: several.

    A mask takes two registers, which matter only where other features have left none.
    """
    values = spec.dropout + (spec.bias is not None) * (1 if spec.bias_pairs else 2)
    return 0 if values == 0 else 1 if values + spec.mask + spec.softcap + (spec.alibi is not None) <= 2 else 2


def squeeze(spec: Spec, pieces: int = 1) -> int:
    """Pieces in which elements of the bias are packed; 0: they are not.

    A bias and a mask together take more registers than there are: 4 to 72 bytes would spill. Packing costs arithmetic,
    so a bias alone stays unpacked.
    """
    return pieces if spec.mask and spec.bias is not None else 0
