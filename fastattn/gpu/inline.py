"""`inline`: a helper that becomes part of the kernel that calls it. (A device function of Numba's asks for a driver to compile.)"""
from __future__ import annotations

from typing import Any

from numba import cuda

inline: Any = cuda.jit(device=True, inline="always")
