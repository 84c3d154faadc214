"""Marks that skip tests where there is no GPU, or only one. The driver is asked through cuda.bindings alone."""
from __future__ import annotations

from functools import cache

import pytest

from fastattn.arrays import streams


@cache
def device_count() -> int:
    try:
        return int(streams.check(streams.driver().cuDeviceGetCount(), "cuDeviceGetCount"))
    except (ImportError, RuntimeError):
        return 0


requires_gpu = pytest.mark.skipif(device_count() < 1, reason="needs a CUDA device")
requires_two_gpus = pytest.mark.skipif(device_count() < 2, reason="needs two CUDA devices")
