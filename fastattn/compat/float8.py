"""float8_e4m3fn and its scales in the caller's own library: what attention needs around 8-bit operands.

No engine multiplies 8-bit numbers. Each of them is exactly a float16 and a bfloat16, so operands are widened and the
ordinary kernels do the rest.

A scale is a number, or a tensor of 1 element or of one element per head. In host memory its value is read. A value
that all heads share becomes a Python number and goes into softmax_scale without a rounding. On a device it stays
there: reading it would stop the host and break the capture of a CUDA graph.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays import words
from ..arrays.convert import view
from ..arrays.protocols import requires_grad
from ..arrays.readers import library_of
from ..arrays.view import LARGEST, numpy_dtype
from ..errors import message
from ..problem import DTYPES
from .arrays import namespace
from .translate import Call

NAME = "float8_e4m3fn"
FP8_MAX, FP8_MIN = LARGEST[NAME], -LARGEST[NAME]           # it has no infinity: larger values would become NaN
HALF_MAX = 65504.0


# ---------------------------------------------------------------- dtypes
def name_of(x: Any, call: Call, argument: str) -> str:
    """The name of an array's dtype. TypeError for 8-bit floats other than float8_e4m3fn."""
    try:
        name = words.dtype_of(x.dtype if hasattr(x, "dtype") else np.dtype(x.__cuda_array_interface__["typestr"]))
    except (AttributeError, TypeError):
        raise TypeError(message(call.name, argument, f"is a {type(x).__name__}", "an array")) from None
    if name.startswith("float8") and name != NAME:
        raise TypeError(message(call.name, argument, f"has dtype {name}", f"{NAME}, the only 8-bit dtype here"))
    return name


def library(x: Any, call: Call, argument: str) -> Any:
    """The module of x's library. TypeError if it has no float8_e4m3fn (CuPy, Numba and bare CUDA arrays)."""
    try:
        xp = namespace(x, call.name, argument)
    except TypeError:
        xp = None
    if xp is None or not (xp is np or hasattr(xp, NAME)):
        raise TypeError(message(call.name, argument, f"is a {kind(x)}, whose library has no {NAME}",
                                f"an array of NumPy (with ml_dtypes.{NAME}), torch or JAX",
                                f"torch.from_dlpack({argument}) shares its memory"))
    return xp


def kind(x: Any) -> str:
    """Library and type for error messages, such as "cupy ndarray"."""
    return f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"


def cast(x: Any, name: str) -> Any:
    """x in the dtype of that name, rounded to nearest even."""
    xp = namespace(x, "cast", "x")
    if xp.__name__ == "torch":
        return x.to(getattr(xp, name))
    return x.astype(_numpy_dtype(name) if xp is np else getattr(xp, name))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name != NAME:
        return numpy_dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return dtype


def saturate(x: Any, limit: float) -> Any:
    return namespace(x, "saturate", "x").clip(x, -limit, limit)


def wide(name: str) -> str:
    """The dtype of arithmetic on operands of dtype `name`."""
    return "float64" if name == "float64" else "float32"


# ---------------------------------------------------------------- scales
class Scale(NamedTuple):
    """number * tensor. The tensor is (1,) or (heads,) float32, in the operand's library and on its device; None means 1."""

    number: float = 1.0
    tensor: Any = None

    def times(self, other: Scale, heads: int) -> Scale:
        """The product for each of `heads` query heads. A key head's scale is used for all query heads that share it."""
        ours, theirs = _repeat(self.tensor, heads), _repeat(other.tensor, heads)
        tensor = theirs if ours is None else ours if theirs is None else ours * theirs
        return Scale(self.number * other.number, tensor)

    @property
    def is_one(self) -> bool:
        return self.tensor is None and self.number == 1.0

    def inverse(self) -> Scale:
        return Scale(1.0 / self.number, None if self.tensor is None else 1.0 / self.tensor)

    def apply(self, x: Any, axes: int) -> Any:
        """x * scale. The heads are the axis followed by `axes` axes."""
        if self.tensor is None:
            return x if self.number == 1.0 else x * self.number
        return x * (self.tensor * self.number).reshape((-1,) + (1,) * axes)


def _repeat(tensor: Any, heads: int) -> Any:
    if tensor is None or tensor.shape[0] in (1, heads):
        return tensor
    shared = tensor.shape[0]
    return namespace(tensor, "repeat", "scale").broadcast_to(tensor.reshape(shared, 1), (shared, heads // shared)).reshape(heads)


def read_scale(call: Call, argument: str, x: Any, of: str, operand: Any, heads: int) -> Scale:
    """The Scale of the operand that is the argument `of` and has `heads` heads, from a number or a tensor of 1 or `heads` elements.

    It must be positive and finite, as far as it can be read. ValueError and TypeError name `argument`.
    """
    name = call.names.get(argument, argument)
    if isinstance(x, (int, float, np.number)) and not isinstance(x, bool):
        return Scale(float(_positive(call, name, np.asarray([x], np.float64))[0]))
    expected = "a positive number, or a tensor of 1 element" + (f" or of one for each of {heads} heads" if heads != 1 else "")
    if not hasattr(x, "shape"):
        raise TypeError(message(call.name, name, f"is {x!r}", expected))
    if math.prod(x.shape) not in (1, heads):
        raise call.value(name, f"has shape {tuple(x.shape)}", expected)
    if words.in_graph(x):
        raise requires_grad(call.name, name)
    if name_of(x, call, name) not in DTYPES:
        raise TypeError(message(call.name, name, f"has dtype {name_of(x, call, name)}", " or ".join(DTYPES)))
    here, there = device(x, call, name), device(operand, call, of)
    if here is None and (there is None or math.prod(x.shape) == 1):
        values = _positive(call, name, view(x, call.name, name).numpy().astype(np.float64).reshape(-1))
        return Scale(float(values[0])) if values.size == 1 else Scale(1.0, library(operand, call, of).asarray(values.astype(np.float32)))
    if here != there:
        raise call.value(name, "is in host memory" if here is None else f"is on device ('cuda', {here})",
                         f"{of}'s device, {'host memory' if there is None else ('cuda', there)}",
                         "a copy to the device in every call would wait for the host" if here is None else "")
    if library(x, call, name) is not library(operand, call, of):
        raise TypeError(message(call.name, name, f"is a {kind(x)}", f"an array of {of}'s library, as {kind(operand)}"))
    return Scale(1.0, cast(x.reshape(-1), "float32"))


def device(x: Any, call: Call, argument: str) -> int | None:
    """The number of x's CUDA device; None in host memory."""
    home = None if isinstance(x, np.ndarray) else library_of(x, call.name, argument).home(x, call.name)
    return None if home is None else home.device


def _positive(call: Call, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size:
        raise call.value(name, f"has the value {wrong[0]}", "positive finite numbers")
    return values


# ---------------------------------------------------------------- arrays
def widen(x: Any, name: str, scale: Scale, axes: int) -> Any:
    """An 8-bit x in the wider dtype of that name.

    Exact without a scale. With one the product is computed in float32, saturated and rounded once.
    """
    if scale.is_one:
        return cast(x, name)
    y = scale.apply(cast(x, wide(name)), axes)
    return cast(saturate(y, HALF_MAX) if name == "float16" else y, name)


def quantize(x: Any, scale: Scale, axes: int) -> Any:
    """x / scale in float32 (float64 for float64), saturated and rounded once."""
    y = cast(x, wide(words.dtype_of(x.dtype)))
    divisor = scale.number if scale.tensor is None else (scale.tensor * scale.number).reshape((-1,) + (1,) * axes)
    return cast(saturate(y / divisor, FP8_MAX), NAME)
