"""The few array operations that translation needs, in the caller's own library.

That is NumPy, torch, CuPy, JAX, or another array namespace. On the way in only shapes change, never data: `fit` gives a
view wherever the array's own reshape does. An array that already has its shape is passed through untouched, so a plain
CUDA array without any operations works as long as none is needed.
"""
from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

Shape = tuple[int, ...]


def namespace(x: Any, call: str, argument: str) -> Any:
    """The module with the array functions of x's library. TypeError if there is none."""
    library = sys.modules.get(type(x).__module__.partition(".")[0])
    if library is not None and all(hasattr(library, name) for name in ("concatenate", "where", "broadcast_to")):
        return library
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    raise TypeError(f"{call}(): {argument} is a {type(x).__name__}, whose library has no array operations, and this call needs them; "
                    "expected an array of NumPy, torch, CuPy, JAX or another array namespace; fastattn.attention takes it as it is.")


def shape_of(x: Any, call: str, argument: str) -> Shape:
    """The shape as a plain tuple. TypeError if x is no array."""
    try:
        return tuple(x.shape) if hasattr(x, "shape") else tuple(x.__cuda_array_interface__["shape"])
    except (AttributeError, TypeError):
        raise TypeError(f"{call}(): {argument} is a {type(x).__name__}; expected an array.") from None


def is_boolean(x: Any) -> bool:
    """Whether the dtype is bool, however the library spells it."""
    dtype = x.dtype if hasattr(x, "dtype") else x.__cuda_array_interface__["typestr"]
    return str(dtype).rpartition(".")[2] in ("bool", "|b1")


def fit(x: Any, before: Shape, full: Shape, flat: Shape, call: str, argument: str) -> Any:
    """x reshaped to `before`, broadcast to `full`, reshaped to `flat`.

    A view where the library's reshape gives one, else the library's copy. It is always a view if x is contiguous and no
    broadcast axis is merged with another.
    """
    shape = shape_of(x, call, argument)
    if shape == flat:
        return x
    if not hasattr(x, "reshape"):
        raise TypeError(f"{call}(): {argument} is a {type(x).__name__} of shape {shape} without a reshape method; expected the shape "
                        f"{flat}, as which the kernels read it.")
    if before != full:
        x = namespace(x, call, argument).broadcast_to(x.reshape(before), full)
    return x.reshape(flat)


def fold(grad: Any, shape: Shape, before: Shape, full: Shape, call: str, argument: str) -> Any:
    """Gradient of an array of `shape`, from the gradient of what `fit` made of it.

    Sums over the axes that were broadcast, in float32 (float64 for float64), and rounds once.
    """
    if tuple(grad.shape) == shape:
        return grad
    axes = tuple(axis for axis, (m, n) in enumerate(zip(before, full, strict=True)) if m != n)
    if axes:
        xp = namespace(grad, call, argument)
        wide = xp.float64 if grad.dtype == xp.float64 else xp.float32
        grad = xp.asarray(grad.reshape(full).sum(axis=axes, dtype=wide), dtype=grad.dtype)
    return grad.reshape(shape)


def broadcast_shape(*shapes: Shape) -> Shape | None:
    """The broadcast shape by NumPy's rules, for any library. None if the shapes do not broadcast."""
    rank = max(map(len, shapes), default=0)
    result = []
    for axis in zip(*[(1,) * (rank - len(shape)) + shape for shape in shapes], strict=True):
        sizes = set(axis) - {1}
        if len(sizes) > 1:
            return None
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def lead(shape: Shape, rank: int) -> Shape:
    """`shape` with leading axes of 1, up to `rank` axes."""
    return (1,) * (rank - len(shape)) + shape


def count(shape: Shape) -> int:
    """Number of elements."""
    return math.prod(shape)


def positions(like: Any, n: int, call: str, argument: str) -> Any:
    """0 to n - 1 as integers, on the device of `like`."""
    xp = namespace(like, call, argument)
    if xp.__name__ == "torch":
        return xp.arange(n, device=like.device)
    with _device(xp, like):
        return xp.arange(n)


def zeros(like: Any, shape: Shape, call: str, argument: str) -> Any:
    """Zeros of the dtype of `like`, on its device."""
    xp = namespace(like, call, argument)
    if xp.__name__ == "torch":
        return like.new_zeros(shape)
    with _device(xp, like):
        return xp.zeros(shape, dtype=like.dtype)


def _device(xp: Any, like: Any) -> Any:
    """Context in which xp makes arrays on the device of `like`.

    Only CuPy needs one, because it allocates on its current device.
    """
    return like.device if xp.__name__ == "cupy" else contextlib.nullcontext()
