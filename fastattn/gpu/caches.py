"""Calls of attention_with_kvcache on the GPU: what comes before attention. Without Numba.

The new keys and values go into the caches and q is rotated into memory of its own (rows/append.py). What is left is attention of that q
over the caches, which a kernel family runs. It finds lengths and tables on the device; `Cache.append` says whether q's rows are counted
with the keys.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

from ..arrays.view import EIGHT_BIT, View, overlap
from ..memo import Recent
from ..problem import CacheOperands, Operands
from .eight_bit import rescale
from .rows import append_launch
from .rows.widen_launch import HALVES
from .runtime.launcher import Launcher
from .spec import AnyCall, BackwardCall, Call, Launch, Spec, make_spec

ALIGNED = 256               # an address as good as any of the temporary memory


def attention_alone(call: Call, address: int = ALIGNED) -> tuple[Call, int]:
    """The call after the append, with its q at an address, and the bytes of q there; 0 where q is the call's. A q is rotated there, or
    widened: 8-bit numbers to the output's dtype if that has 16 bits, else to float16. Both are exact."""
    p, q = call.problem, call.operands.q
    eight = p.dtype in EIGHT_BIT
    if p.cache is None or not (eight or p.cache.rotary is not None):
        return call, 0
    dtype = q.dtype if not eight else p.out_dtype if p.out_dtype in HALVES else "float16"
    made, size = append_launch.workspace_of(q, address, dtype)
    return replace(call, problem=replace(p, dtype=made.dtype) if eight else p, operands=replace(call.operands, q=made)), size


# ---------------------------------------------------------------- what is remembered
def views_of(call: Call) -> list[View | None]:
    """All arrays of the call, in the order of `at`: Operands, then those of its cache, out and lse. Not the table of a contiguous cache,
    which the host made."""
    o, c = call.operands, call.operands.cache
    assert c is not None
    table = c.block_table if append_launch.is_paged(call) else None
    return [*[getattr(o, name) for name in _OPERANDS], table, c.k, c.v, c.rotary_cos, c.rotary_sin, call.out, call.lse]


def at(call: Call, views: list[Any]) -> Call:
    """The same call of other views."""
    *operands, table, k, v, cos, sin, out, lse = views
    assert call.operands.cache is not None
    cache = CacheOperands(table or call.operands.cache.block_table, k, v, cos, sin)
    return Call(call.problem, Operands(**dict(zip(_OPERANDS, operands, strict=True)), cache=cache), out, lse)


_OPERANDS = tuple(field.name for field in fields(Operands) if field.name != "cache")
KEYS, VALUES = 1, 2            # of the addresses of a call that is repeated


def _shares(k: View, v: View) -> tuple[bool, bool]:
    """Whether the caches share memory, and whether they begin with the same column."""
    return overlap(k, v), k.ptr == v.ptr


class Repeated:
    """What enqueues a forward at any addresses. Caches that share memory are written one after the other, and values that are the first
    columns of the keys may have a kernel of their own. So each of these has another recording."""

    def __init__(self, call: Call, record: Callable[[Call], Callable[[Sequence[int], int], None]]) -> None:
        cached = call.problem.cache is not None
        views = [x and View(x.ptr, x.shape, x.strides, x.dtype, x.device)      # without the caller's memory
                 for x in (views_of(call) if cached else call.views)]
        self._call, self._record = at(call, views) if cached else call.at(views), record
        self._of = {_shares(call.operands.k, call.operands.v): record(call)}
        self._apart: Recent[int, tuple[bool, bool]] = Recent()      # by the bytes from one cache to the other

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        apart = addresses[VALUES] - addresses[KEYS]
        shared = self._apart.get(apart)
        if shared is None:
            o = self._call.operands
            k, v = replace(o.k, ptr=addresses[KEYS]), replace(o.v, ptr=addresses[VALUES])
            shared = self._apart[apart] = _shares(k, v)
            if shared not in self._of:
                self._of[shared] = self._record(replace(self._call, operands=replace(o, k=k, v=v)))
        self._of[shared](addresses, stream)


class Products(Protocol):
    """Launches of a kernel on 8-bit products, of an 8-bit q and 8-bit caches."""

    def takes_caches(self, call: Call, wide: Call, d: Any) -> bool:
        """Whether it runs a call over caches, and not the family the one with a wider q."""

    def prepare_caches(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        """As a kernel family's `prepare`, behind the append."""


class Cached:
    """A kernel family for calls over caches, over the family that runs their attention. `products` runs the calls that it takes."""

    def __init__(self, family: Any, products: Products | None = None) -> None:
        self.family, self.products = family, products

    def _takes(self, call: Call, d: Any) -> bool:
        return self.products is not None and self.products.takes_caches(call, attention_alone(call)[0], d)

    def refuses(self, call: AnyCall, d: Any) -> str | None:
        assert isinstance(call, Call), "problem.py has no backward of caches"
        refused = append_launch.refuses_append(call)
        if refused is None and not self._takes(call, d):
            refused = self.family.refuses(attention_alone(call)[0], d)
        return refused

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        assert call.problem.cache is not None
        append = append_launch.prepare(call, launcher) if call.problem.cache.append else None
        eight, own = call.problem.dtype in EIGHT_BIT, self._takes(call, launcher.device)
        alone, size = (call, 0) if own else attention_alone(call)
        attending: Any = self.products.prepare_caches if own and self.products is not None else self.family.prepare
        attend: Launch = attending(alone, make_spec(alone.problem, alone.operands, spec.lse), launcher)

        def launch(call: Call, stream: int) -> None:
            if append is not None:
                append(call, 0, stream)
            attend(call, stream)

        def launch_own_q(call: Call, stream: int) -> None:
            with launcher.temporary(size, stream) as memory:
                alone, _ = attention_alone(call, memory)
                if append is not None:
                    append(call, memory, stream)
                if eight:
                    rescale(call, call.operands.q, alone.operands.q, (None, None), launcher, stream, 1)
                attend(alone, stream)
        return launch_own_q if size else launch

    def backward(self, call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
        raise AssertionError("problem.py has no backward of caches")
