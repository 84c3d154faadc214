"""The GPU engine: Numba kernels in three families, and the choice between them. README.md is the map.

A call is a Problem and where its operands are (spec.Call, spec.BackwardCall). The first family in use that does not
refuse it runs it: its launch.py enqueues the kernels, which runtime/ compiles, keeps in the disk cache and loads.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..arrays.view import View
from ..engine import FAMILIES
from ..errors import UnsupportedError, refused
from ..memo import Recent
from ..problem import Grads, Operands, Problem
from ..registry import families_in_use, use_engine
from . import caches
from .config import FEW_FLOAT_KEYS, FEW_FLOAT_PRODUCTS
from .eight_bit import Widening
from .flex.refusals import refuses_traced
from .narrow import Narrowing
from .rows import accumulate_launch, merge_launch, quantize_launch
from .rows import launch as rows
from .runtime.device import Device, capturing, current, device, read_back
from .runtime.launcher import Launcher, on_device
from .runtime.packed import MOST_BLOCKS, most_tiles
from .runtime.recording import Recorder, Recording, addressed
from .simt import launch as simt
from .sm80 import launch as sm80
from .sm90 import launch as sm90
from .sm90 import launch_8bit
from .sm90.config_latent import may_be_latent
from .spec import AnyCall, BackwardCall, Call, Launch, Spec, make_backward_spec, make_spec

# looked for, not imported: a kernel in the cache needs neither. The api says what to install where one is missing.
for _package in ("numba", "numba_cuda", "cuda.core"):
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}")

__all__ = ["FAMILIES", "Family", "backward", "choose", "device", "family", "forward", "merge_states", "prepare",
           "prepare_backward", "quantize", "reasons", "to_host", "use"]


class Family(Protocol):
    """What a family's launch.py has. None of it imports Numba where the kernels are in the cache."""

    def refuses(self, call: AnyCall, d: Device) -> str | None:
        """None, or why the family does not run the call."""

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        """What enqueues this forward, or one that differs in addresses of the same alignment only."""

    def backward(self, call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
        """Enqueue the kernels of this backward."""


_FAMILIES: dict[str, Family] = {"sm90": sm90, "sm80": sm80, "simt": simt}
# for calls over key and value caches, and for 8-bit operands
_CACHED: dict[str, Family] = {name: caches.Cached(family, launch_8bit if name == "sm90" else None) for name, family in _FAMILIES.items()}
_WIDENING: dict[str, Family] = {name: Widening(family, launch_8bit if name == "sm90" else None) for name, family in _FAMILIES.items()}


# for a float32 dout beside 16-bit operands
_NARROWING: dict[str, Family] = {name: Narrowing(family) for name, family in _FAMILIES.items()}


def family(which: str) -> Family:
    """The kernel family of this name."""
    return _FAMILIES[which]


def use(*families: str) -> AbstractContextManager[None]:
    """fastattn.use_engine for kernel families alone: `with use("sm80", "simt"):`. Calls on host memory keep theirs."""
    unknown = [f for f in families if f not in FAMILIES]
    if unknown or not families:
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"use(): {given} given, the kernel families are {', '.join(FAMILIES)}")
    return use_engine(*families, "cpu")


def _few_float(p: Problem) -> bool:
    products = p.batch * p.num_heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v)
    return p.dtype == "float32" and p.seqlen_k <= FEW_FLOAT_KEYS and products <= FEW_FLOAT_PRODUCTS


def _for(which: str, call: AnyCall) -> Family:
    """The family's launches for such a call. Caches are never copied, so they are not widened."""
    if call.problem.cache is not None:
        return _CACHED[which]
    if call.problem.eight_bit is not None:
        return _WIDENING[which]
    narrow = isinstance(call, BackwardCall) and call.dout.dtype != call.problem.dtype
    return _NARROWING[which] if narrow else _FAMILIES[which]


def reasons(call: AnyCall, d: Device, families: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """Each of `families` with the reason why it does not run the call, or with None."""
    tiles = most_tiles(call, 64)
    too_many = f"it has {tiles} tiles of 64 query rows, over 2**31 - 1" if tiles > MOST_BLOCKS else None
    cached = call.problem.cache is not None
    few_float = not cached and "simt" in families and _few_float(call.problem)
    for which in families:
        if few_float and which != "simt":
            yield which, "so few float32 products take less time on plain threads"
        else:
            yield which, too_many or refuses_traced(which, call) or _for(which, call).refuses(call, d)


def choose(call: AnyCall, d: Device, families: tuple[str, ...] | None = None) -> Family:
    """The first of `families` (None: those of use_engine) that runs the call. UnsupportedError says why none does."""
    found = dict[str, str]()
    for which, reason in reasons(call, d, families or families_in_use()):
        if reason is None:
            return _for(which, call)
        found[which] = reason
    raise refused(call.problem.call, found, f" on {d.name} ({d.arch})")


# ---------------------------------------------------------------- calls
def forward(problem: Problem, operands: Operands, out: View, lse: View | None, stream: int,
            families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueue writing out, and lse if it is wanted. Packed rows that belong to no sequence become 0 and -inf."""
    if 0 in out.shape and (lse is None or 0 in lse.shape):
        return
    _enqueue(Call(problem, operands, out, lse), stream, families)


def backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads[View],
             stream: int, deterministic: bool, families: tuple[str, ...] = FAMILIES) -> None:
    """Enqueue writing the gradients. Rows of no sequence and keys past seqused_k get gradients 0."""
    _enqueue(BackwardCall(problem, operands, dout, out, lse, dlse, grads, deterministic), stream, families)


def prepare(problem: Problem, operands: Operands, out: View, lse: View | None,
            families: tuple[str, ...] = FAMILIES) -> Recording | caches.Repeated | None:
    """What `forward` does with arrays of such shapes and strides, at any addresses of their alignment. None for an empty
    output."""
    call = Call(problem, operands, out, lse)
    if 0 in out.shape:
        return None
    if problem.cache is not None or may_be_latent(problem):
        return caches.Repeated(call, lambda call: _record(call, families))
    return _record(call, families)


def prepare_backward(problem: Problem, operands: Operands, dout: View, out: View, lse: View, dlse: View | None,
                     grads: Grads[View], deterministic: bool, families: tuple[str, ...] = FAMILIES) -> Recording:
    """What `backward` does with arrays of such shapes and strides, at any addresses of their alignment."""
    return _record(BackwardCall(problem, operands, dout, out, lse, dlse, grads, deterministic), families)


def merge_states(outs: list[View], lses: list[View], out: View, lse: View, stream: int) -> None:
    """rows.launch.merge_states on the device of `out`."""
    if merge_launch.in_place(outs, lses, out, lse):
        _repeat(merge_launch.merge_into, [outs[1], lses[1], out, lse], (), stream)
        return
    launcher = on_device(out.device[1])
    with current(launcher.device):
        rows.merge_states(outs, lses, out, lse, launcher, stream)


def accumulate(out: View, x: View, add: bool, stream: int) -> None:
    """rows.accumulate_launch.accumulate on the device of `out`."""
    _repeat(accumulate_launch.accumulate, [out, x], (add,), stream)


def accumulate_rows(out: View, x: View, count: int, x_rows: int, out_rows: int, add: bool, stream: int) -> None:
    """rows.accumulate_launch.accumulate_rows on the device of `out`; addresses of int32 row numbers, or 0."""
    numbers = [View(rows, (count,), (4,), "int32", out.device) for rows in (x_rows, out_rows) if rows]
    _repeat(_accumulate_rows, [out, x, *numbers], (count, x_rows != 0, add), stream)


def _accumulate_rows(out: View, x: View, *more: Any) -> None:
    *numbers, count, gather, add, launcher, stream = more
    x_rows = numbers.pop(0).ptr if gather else 0
    found = accumulate_launch.Rows(x_rows, numbers[0].ptr if numbers else 0)
    accumulate_launch.accumulate_rows(out, x, count, found, add, launcher, stream)


def quantize(x: View, out: View, scale: View, stream: int) -> None:
    """rows.quantize_launch.quantize on the device of x."""
    launcher = on_device(x.device[1])
    with current(launcher.device):
        quantize_launch.quantize(x, out, scale, launcher, stream)


def to_host(call: str, x: View, stream: int) -> View:
    """A copy of a small array in host memory. Waits for the stream's work."""
    with current(device(x.device[1])):
        if capturing(stream):
            raise UnsupportedError(f"{call}(): FASTATTN_CHECK=1 reads lengths and tables; while a stream is captured that is not allowed.")
        low, high = x.bytes_range()
        own = read_back(low, high - low, stream)
    return View(own.ctypes.data + x.ptr - low, x.shape, x.strides, x.dtype, owner=own)


# ---------------------------------------------------------------- what is remembered
_recordings: Recent[Any, tuple[Problem, Recording]] = Recent()
_repeats: Recent[Any, Recording] = Recent()
_launches: Recent[Any, Launch] = Recent()           # of forwards with functions


def _repeat(launch: Callable[..., None], views: list[View], options: tuple[Any, ...], stream: int) -> None:
    """What `launch(*views, *options, launcher, stream)` enqueues, which is remembered."""
    launcher = on_device(views[0].device[1])
    key = (launch, launcher, options, *[(x.shape, x.strides, x.dtype, x.ptr % 16) for x in views])
    found = _repeats.get(key)
    if found is None:
        recorder = Recorder(launcher, len(views))
        with current(launcher.device):
            launch(*addressed(views), *options, recorder, 0)
        found = _repeats[key] = Recording(recorder)
    found([x.ptr for x in views], stream)


def _enqueue(call: AnyCall, stream: int, families: tuple[str, ...]) -> None:
    """Enqueue the call's kernels. For plain operands the launches are remembered: in the next
    call only addresses differ.

    The key has the Problem's id, because hashing a Problem takes longer than all the rest. That is safe: an entry holds
    its Problem, so no other can have the same id while the entry is there, and `is` finds out when the entry is another
    Problem's.
    """
    p, launcher = call.problem, on_device(call.operands.q.device[1])
    if isinstance(call, Call) and (key := _key_of_functions(call, launcher, families)) is not None:
        with current(launcher.device):
            launch = _launches.get(key)
            if launch is None:
                launch = _launches[key] = _prepared(call, launcher, families)
            launch(call, stream)
        return
    if not call.operands.plain or call.problem.cache is not None:
        with current(launcher.device):
            _launch(call, launcher, families, stream)
        return
    views = call.views
    key = (id(p), launcher, families, isinstance(call, BackwardCall) and call.deterministic, call.operands.k.ptr == call.operands.v.ptr,
           *[x and (x.strides, x.ptr % 16) for x in views])
    found = _recordings.get(key)
    if found is None or found[0] is not p:
        found = _recordings[key] = p, _record(call, families)
    found[1]([x.ptr for x in views if x], stream)


def _key_of_functions(call: Call, launcher: Launcher, families: tuple[str, ...]) -> Any:
    """All that a forward's launch with functions is prepared for, or None: then it is prepared each time. Numbers of the functions are part
    of it, -0.0 apart from 0.0; their arrays are looked up in each call."""
    o, f = call.operands, call.operands.flex
    if f is None or call.views[3:-2].count(None) != len(call.views) - 6:        # besides q, k, v, the functions, out and lse
        return None
    return (call.problem, launcher, families, call.lse is None, o.k.ptr == o.v.ptr, repr((f.score_numbers, f.mask_numbers)),
            f.blocks and f.blocks.strides, *[(x.strides, x.ptr % 16) for x in (o.q, o.k, o.v, call.out)])


def _prepared(call: Call, launcher: Launcher, families: tuple[str, ...]) -> Launch:
    chosen = choose(call, launcher.device, families)
    return chosen.prepare(call, make_spec(call.problem, call.operands, call.lse is not None), launcher)


def _launch(call: AnyCall, launcher: Launcher, families: tuple[str, ...], stream: int) -> None:
    """Launch the call's kernels with this launcher."""
    if isinstance(call, Call):
        _prepared(call, launcher, families)(call, stream)
    else:
        choose(call, launcher.device, families).backward(call, make_backward_spec(call), launcher, stream)


def _record(call: AnyCall, families: tuple[str, ...]) -> Recording:
    """What enqueues the call, and all that differ in addresses of the same alignment. Their order is that of `views`."""
    launcher = on_device(call.operands.q.device[1])
    cached = isinstance(call, Call) and call.problem.cache is not None
    views = addressed(caches.views_of(call) if cached else call.views)  # type: ignore[arg-type]
    recorder = Recorder(launcher, sum(x is not None for x in views))
    with current(launcher.device):
        _launch(caches.at(call, views) if cached else call.at(views), recorder, families, 0)  # type: ignore[arg-type]
    return Recording(recorder)
