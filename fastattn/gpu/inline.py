"""`inline`: a helper that becomes part of the kernel that calls it. (A device function of Numba's asks for a driver to compile.)
`divide`: 32-bit division; Numba's // works in 64 bits, which is a long subroutine."""
from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

inline: Any = cuda.jit(device=True, inline="always")


@intrinsic
def divide(typingctx: Any, x: Any, y: Any) -> Any:
    """x // y of int32, x >= 0 and y > 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.udiv(*args)
    return signature(types.int32, types.int32, types.int32), generate
