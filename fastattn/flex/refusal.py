"""What tracing refuses, with the user's line and what to write instead."""
from __future__ import annotations

import linecache
import os
import sys
from types import TracebackType
from typing import Any

MOST = 80                               # characters of a line that are quoted
_HERE = os.path.dirname(__file__)
_LIBRARIES = tuple([f"{os.sep}{name}{os.sep}" for name in ("numpy", "torch", "jax", "jaxlib", "cupy")])


class RefusalError(TypeError):
    """`has` ends a sentence that starts with the argument's name, `hint` is what would work."""

    def __init__(self, has: str, hint: str) -> None:
        super().__init__(f"{has}; {hint}")
        self.has, self.hint = has, hint


class DecidesError(RefusalError):
    """Python asked for the value of something traced: `numbers` are the run-time numbers that it is made of, if of nothing else.

    Tracing starts again with those as constants.
    """

    def __init__(self, has: str, hint: str, numbers: frozenset[int]) -> None:
        super().__init__(has, hint)
        self.numbers = numbers


def of_jax() -> RefusalError:
    return RefusalError("calls a function of jax.numpy or jax.nn", "NumPy's are traced: numpy.where(c, x, y) works")


def raised_in_jax(error: Exception) -> bool:
    """Whether JAX raised it, which takes no stand-ins: every function of jax.numpy makes arrays of what it gets.

    JAX hides its own frames, so its words count too.
    """
    if "__jax_array__" in str(error):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and f"{os.sep}jax{os.sep}" in traceback.tb_frame.f_code.co_filename


def line_of(traceback: TracebackType | None) -> str:
    """`line 12 of model.py, "if score > 0:"`: the innermost line of the user's own; "" without one."""
    found = ""
    while traceback is not None:
        name, number = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        if not name.startswith(_HERE) and not any(x in name for x in _LIBRARIES):
            text = linecache.getline(name, number).strip()
            text = text if len(text) <= MOST else f"{text[:MOST - 3]}..."
            found = f"line {number} of {os.path.basename(name)}" + (f", `{text}`" if text else "")
        traceback = traceback.tb_next
    return found


def torch_dtype(kind: str) -> Any:
    """What `x.dtype` is inside a function: torch's where torch is loaded, or NumPy's."""
    name = {"f": "float32", "i": "int32", "b": "bool"}[kind]
    torch = sys.modules.get("torch")
    return name if torch is None else getattr(torch, name)
