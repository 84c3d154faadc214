"""Which engines have functions of the user's, and how close they must be."""
from __future__ import annotations

from typing import Any

import numpy as np

ENGINES = ["reference", "cpu"]


def close(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite])
    assert np.abs(got[finite] - want[finite]).max(initial=0) <= tolerance * max(1, np.abs(want[finite]).max(initial=0))
