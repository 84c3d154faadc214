"""Fast path for a repeated call: same shapes, strides, dtypes and options, new pointers.

It skips validation and dispatch. A call is described by the types, dtypes, shapes, strides and devices of its arrays and
by its options, all as plain values; all memory is aligned to 16 bytes. Its second occurrence stores here what the engine
launched on the full path (dispatch.py). Later ones read the addresses, allocate, and launch that. Any difference takes
the full path, which raises its errors.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from .arrays.readers import by_type
from .arrays.view import HOST, Device, Output, Quick, View, numpy_dtype
from .memo import Recent
from .problem import CacheOperands, Grads, Operands
from .registry import choose

# Of addresses, and a stream, or HOST. The addresses are those of all Operands in their order, of CacheOperands, of a backward dout, out,
# lse and dlse, and of the results, each if the call has it.
Launch = Callable[[Sequence[int], int], None]


class Known:
    """A stored call."""

    __slots__ = ("address", "device", "engine", "key", "launch", "makers", "same", "stream")

    def __init__(self, key: Any, read: Quick, engine: object, device: Device, launch: Launch, makers: tuple[Callable[[], Any], ...],
                 same: Callable[..., bool] | None) -> None:
        """`makers` make its results, `same` tells whether arrays have its forms."""
        self.key, self.engine, self.device, self.launch, self.makers, self.same = key, engine, device, launch, makers, same
        self.address, self.stream = read.address, read.stream

    def again(self, call: str, engine: str | None, arrays: Sequence[Any]) -> list[Any] | None:
        """The results for these arrays, q first. None where the call differs."""
        try:
            addresses, stream = [*map(self.address, arrays)], self.stream(arrays[0])
        except RuntimeError:                # a tensor without memory, as in a function that torch transforms
            return None
        if not stream or 0 in addresses or choose(call, engine, self.device) is not self.engine:
            return None
        results = [make() for make in self.makers]
        addresses += map(self.address, results)
        for at in addresses:
            if at % 16:
                return None
        self.launch(addresses, stream)
        return results


# Stored calls by their keys; None for one that has occurred once. Also, by the first part of the key, the one that was repeated last,
# where its arrays' forms can be compared at once.
_known: Recent[Any, Known | None] = Recent()


# ---------------------------------------------------------------- NumPy
def _form(x: np.ndarray[Any, Any]) -> Any:
    return (x.dtype, x.shape, x.strides) if x.flags.aligned else None


@cache
def _numpy() -> Quick:
    """How NumPy arrays are read and made. Compiled code reads their addresses, so the CPU engine is loaded for it."""
    from .cpu import Forms, address
    return Quick(_form, address, lambda x: HOST, lambda x, shape, dtype: partial(np.empty, shape, numpy_dtype(dtype)), Forms)


def _form_of(kind: type) -> Callable[[Any], Any] | None:
    """`form` of a type's Quick; None for a type whose calls are not repeated here."""
    if kind is np.ndarray:
        return _form
    library = by_type.get(kind)
    return None if library is None or library.quick is None else library.quick.form


def replay(call: str, engine: str | None, arrays: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, list[Any] | None]:
    """(key, results). The key is None for a call that cannot be repeated here, the results None for one that takes the
    full path.

    Parameters
    ----------
    arrays
        Those of `Launch` but for the results, in that order.
    options
        Plain values that, with the arrays, decide what the call does; also which array is which, where some may be absent.
    """
    kind = type(arrays[0])
    short = call, kind, options, len(arrays)
    try:
        known = _known.get(short)
        if known is not None and known.same is not None and known.same(*arrays):
            key = known.key
        else:
            key = _key(short, kind, arrays)
            known = None if key is None else _known.get(key)
            if known is not None and known.same is not None:
                _known[short] = known
    except (RuntimeError, TypeError):       # a sparse tensor; an engine argument that has no hash
        return None, None
    return key, None if known is None else known.again(call, engine, arrays)


def _key(short: tuple[Any, ...], kind: type, arrays: Sequence[Any]) -> Any:
    """All that decides what a call does but addresses. None for a call that is not repeated here."""
    form = _form_of(kind)
    if form is None:
        return None
    forms = [form(x) for x in arrays if type(x) is kind]
    return None if len(forms) != len(arrays) or None in forms else (short, *forms)


def remember(key: Any, engine: Any, prepare: Callable[..., Any] | None, where: tuple[Any, ...], results: Sequence[Output]) -> None:
    """After a call with this key took the full path: store what it launched, if it has occurred before and the engine
    tells.

    Not at its first occurrence, because a call with a new seed each step never repeats.

    Parameters
    ----------
    prepare
        The engine's: of `where`, a Launch, or None where there is none.
    where
        All that the engine was called with, the Problem and the Operands first, but for the stream.
    """
    known, views = _known.get(key), _views(where)
    views = [x for x in views if x.device == views[0].device]       # the host makes the table of a contiguous cache
    if prepare is None or any(x.ptr % 16 for x in views) or (known is not None and known.engine is engine):
        return
    if key not in _known:
        _known[key] = None
        return
    launch = prepare(*where)
    if launch is None:
        return
    (_, kind, _, count), q = key[0], views[0].source
    read = _numpy() if kind is np.ndarray else by_type[kind].quick
    assert read is not None                 # the key was made with its form
    makers = tuple([read.maker(q, x.shape, x.view.dtype) for x in results])
    same = read.same and read.same([x.source for x in views[:count]])
    _known[key] = Known(key, read, engine, views[0].device, launch, makers, same)


def _views(where: tuple[Any, ...]) -> list[View]:
    """The Views that an engine was called with, q's first."""
    found: list[View] = []
    for x in where:
        if isinstance(x, View):
            found.append(x)
        elif isinstance(x, (Operands, CacheOperands)):
            found += _views(tuple([getattr(x, name) for name in x.__slots__]))
        elif isinstance(x, Grads):
            found += _views(x)
    return found
