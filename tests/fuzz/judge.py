"""Runs one Spec through the public functions and says what is wrong with what comes back."""
from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

import fastattn
from fastattn import UnsupportedError
from fastattn.tolerance import FACTOR
from tests.tools.compare import EPS, NOTHING, close, norm
from tests.tools.problems import NUMPY

from . import formula, functions, values
from .device import Device
from .formula import Common, Value
from .inputs import Arguments, Inputs, arguments, compute_dtype, make, swapped
from .spec import Spec

Array = np.ndarray[Any, Any]
ORDINARY = ("normal", "integers", "zero")       # values for which the naive rival's error is a measure
MANY = 32                                       # elements of a result, and pairs: of fewer it may just have been lucky


class Refused(Exception):
    """No engine, or not the forced one, takes the problem."""


def complaints(spec: Spec, device: Device) -> list[str]:
    """What is wrong, a line each; none where the call is right. Refused is raised through."""
    try:
        device.poison()
        x = make(spec)
        found = {"attention": _attention, "parts": _parts, "merge": _merge}[spec.call](x, device)
        device.finish()
    except UnsupportedError as error:
        if spec.library == "numpy":             # the host's engine takes everything
            return [f"refused: {error}"]
        raise Refused(str(error)) from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"raised {type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"]
    return found


@contextmanager
def poisoned_results() -> Iterator[None]:
    """Inside, host memory of results holds 0xFF before an engine writes it: what it leaves out is NaN."""
    from fastattn.arrays import convert

    original = convert.allocate

    def allocate(*arguments: Any, **options: Any) -> Any:
        output = original(*arguments, **options)
        if output.view.device[0] == "cpu" and 0 not in output.view.shape:
            output.view.numpy().view(f"u{output.view.itemsize}")[...] = np.iinfo(f"u{output.view.itemsize}").max
        return output
    places = [module for name, module in list(sys.modules.items()) if name.startswith("fastattn") and
              getattr(module, "allocate", None) is original]
    assert places, "results are allocated elsewhere now"
    for module in places:
        module.allocate = allocate  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.allocate = original  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the calls
def _attention(x: Inputs, device: Device) -> list[str]:
    s = x.spec
    there = device.put(s, arguments(x))
    there.options |= functions.given(s, there.arrays)
    out, lse, found = _forward(x, there, device)
    common = formula.scored(x)
    right = formula.forward(x, common)
    naive = formula.naive(x) if _ordinary(x) else None
    found += _judged(x, {"out": out, "lse": lse} if lse is not None else {"out": out}, right, naive)
    if s.backward and not found:
        found += _backward(x, there, device, naive is not None, common)
    return found + unchanged(x, there, device)


def _forward(x: Inputs, there: Arguments, device: Device) -> tuple[Array, Array | None, list[str]]:
    """Canonical out and lse, and complaints about a given out."""
    s, found = x.spec, list[str]()
    function = fastattn.attention_varlen if s.packed else fastattn.attention
    options: dict[str, Any] = {name: y for name, y in there.options.items() if name != "dlse"} | {"engine": s.engine}
    place = None
    if s.give_out is not None:
        shape = swapped(s, np.empty((*x.q.shape[:-1], s.head_dim_v), NUMPY[s.result])).shape
        place = device.place(s, shape, s.result, s.give_out)
        options["out"] = place.array
    q, k, v = (there.arrays[name] for name in ("q", "k", "v"))
    result = device.call(s, function, q, k, v, *there.lengths, **options, return_lse=s.return_lse)
    out, lse = result if s.return_lse else (result, None)
    if place is not None and out is not place.array:
        found.append("out: another array than the one given came back")
    if lse is None and s.backward:
        del options["engine"]
        _, lse = device.call(s, function, q, k, v, *there.lengths, **options, engine=s.engine, return_lse=True)
    there.arrays |= {"out": out, "lse": lse}
    host = swapped(s, device.get(out))
    if place is not None and not place.untouched():
        found.append("out: memory between its elements was written")
    return host, None if lse is None else device.get(lse), found


def _backward(x: Inputs, there: Arguments, device: Device, ordinary: bool, common: Common) -> list[str]:
    s = x.spec
    function: Any = fastattn.attention_varlen_backward if s.packed else fastattn.attention_backward
    dout, q, k, v, out, lse = (there.arrays[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    host_out, host_lse = swapped(s, device.get(out)), device.get(lse)
    if s.memory != "plain":
        out, lse = _held_otherwise(x, host_out, host_lse, device)
    device.poison()
    options = there.options | {"need_dbias": s.need_dbias, "deterministic": s.deterministic, "need_dcaptured": s.need_dcaptured}
    grads = device.call(s, function, dout, q, k, v, out, lse, *there.lengths, **options, engine=s.engine)
    got = {name: device.get(y) for name, y in _named(grads)}
    found = []
    if (set(got) >= {"dbias"}) != s.need_dbias or (set(got) >= {"dsinks"}) != (s.sinks is not None):
        found.append(f"gradients are {sorted(got)}")
    wanted = len(functions.arrays_of("score_mod", x.held)) if s.need_dcaptured else 0
    if sum(name.startswith("dcaptured") for name in got) != wanted:
        found.append(f"gradients are {sorted(got)}, for {wanted} arrays")
    for name in ("dq", "dk", "dv"):
        got[name] = swapped(s, got[name])
    right = formula.backward(x, host_out, host_lse, common)
    if not s.need_dbias:
        right.pop("dbias", None)
    naive = formula.naive(x, host_out, host_lse) if ordinary else None
    found += _judged(x, got, right, naive)
    if s.deterministic:
        again = device.call(s, function, dout, q, k, v, out, lse, *there.lengths, **options, engine=s.engine)
        for (name, y), (_, first) in zip(_named(again), _named(grads), strict=True):
            if device.get(y).tobytes() != device.get(first).tobytes():
                found.append(f"{name}: other bits in the second of two deterministic runs")
    return found


def _named(grads: Any) -> list[tuple[str, Any]]:
    """The gradients that there are, each with its name."""
    captured = [(f"dcaptured{n}", y) for n, y in enumerate(grads.dcaptured or ())]
    return [(name, y) for name, y in [*zip(grads._fields, grads, strict=True), *captured] if y is not None]


def _held_otherwise(x: Inputs, out: Array, lse: Array, device: Device) -> tuple[Any, Any]:
    """out and lse in other memory; NaN in rows of no sequence where hidden places hold it."""
    s, out, lse = x.spec, out.copy(), lse.copy()
    if s.packed and s.hidden is not None and x.cu_q is not None:
        out[x.cu_q[-1]:], lse[:, x.cu_q[-1]:] = float(s.hidden), float(s.hidden)
    return device.lay(s, swapped(s, out)), device.lay(s, lse)


def _parts(x: Inputs, device: Device) -> list[str]:
    """Over parts of the keys, merged; then each part's share of the gradients, with the merged out and lse."""
    s = x.spec
    there = device.put(s, arguments(x))
    axis = 2 if s.layout == "bhsd" else 1
    bounds = (0, *s.parts, s.seqlen_k)
    pieces = []
    for n, (first, last) in enumerate(pairwise(bounds)):
        options = {name: y for name, y in there.options.items() if name not in ("dlse", "sinks")} | {"engine": s.engine}
        for name in ("bias", "mask"):
            if name in options and getattr(x, name).shape[-1:] not in ((), (1,)):
                options[name] = options[name][..., first:last]
        if n == 0 and "sinks" in there.options:
            options["sinks"] = there.options["sinks"]
        keys = (slice(None),) * axis + (slice(first, last),)
        pieces.append((there.arrays["k"][keys], there.arrays["v"][keys], options))
    q, dout = there.arrays["q"], there.arrays["dout"]
    states = [device.call(s, fastattn.attention, q, k, v, **options, return_lse=True) for k, v, options in pieces]
    out, lse = fastattn.merge_states([state[0] for state in states], [state[1] for state in states], layout=s.layout)  # type: ignore[arg-type]
    common = formula.scored(x)
    right = formula.forward(x, common)
    value = right["out"]
    right["out"] = value._replace(allowed=value.allowed + 2 * EPS[s.result] * value.size)
    found = _judged(x, {"out": swapped(s, device.get(out)), "lse": device.get(lse)}, right, None)
    if not s.backward or found:
        return found
    dlse = {"dlse": there.options["dlse"]} if "dlse" in there.options else {}
    shares = [device.call(s, fastattn.attention_backward, dout, q, k, v, out, lse, **options, **dlse, need_dbias="bias" in options)
              for k, v, options in pieces]
    gradients = formula.backward(x, swapped(s, device.get(out)), device.get(lse), common)
    got = {name: np.concatenate([swapped(s, device.get(getattr(share, name))) for share in shares], axis=1) for name in ("dk", "dv")}
    with np.errstate(all="ignore"):
        got["dq"] = sum(swapped(s, device.get(share.dq)).astype(np.float64) for share in shares).astype(NUMPY[s.result])  # type: ignore[union-attr]
    value = gradients["dq"]
    allowed = value.allowed + len(shares) * EPS[s.result] * value.size
    # shares that cancel may each be beyond the dtype: only a sum of terms inside it is determined
    allowed = np.where(value.size + allowed > values.LARGEST[s.result], np.inf, allowed)
    wanted = {"dk": gradients["dk"], "dv": gradients["dv"], "dq": value._replace(allowed=allowed)}
    if "sinks" in there.options:
        got["dsinks"], wanted["dsinks"] = device.get(shares[0].dsinks), gradients["dsinks"]
    return _judged(x, got, wanted, None) + unchanged(x, there, device)


def _merge(x: Inputs, device: Device) -> list[str]:
    """merge_states of made-up parts: levels far apart, huge, equal; empty parts whose out is NaN."""
    s, random = x.spec, np.random.default_rng([x.spec.seed, 2])
    count = 1 + len(s.parts)
    real = compute_dtype(s.dtype)
    size = float(random.choice([1.0, 30.0, 1e4, 1e9, 1e30]))
    outs = [values.standard(random, (*x.q.shape[:-1], s.head_dim_v), s.dtype) for _ in range(count)]
    lses = [(random.standard_normal(x.lse_shape) * size).astype(real) for _ in range(count)]
    if random.random() < 0.3:
        lses = [lses[0].copy() for _ in lses]
    for out, lse in zip(outs, lses, strict=True):
        empty = random.random(lse.shape) < 0.25
        lse[empty] = random.choice([-np.inf, np.inf], int(empty.sum()))
        if s.hidden is not None:
            out.swapaxes(-2, -3)[empty] = np.nan
    there = [device.lay(s, swapped(s, out)) for out in outs], [device.lay(s, lse) for lse in lses]
    layout: Any = "thd" if s.packed else s.layout
    given = {}
    if s.out_dtype is not None:                 # a running state: the first part is of another dtype, and is written to
        outs[0] = outs[0].astype(NUMPY[s.out_dtype])
        there[0][0] = device.lay(s, swapped(s, outs[0]))
        in_place = not s.readonly and s.memory != "dlpack" and s.stream != "capture"       # a capture runs the call twice
        given = {"out": there[0][0], "lse": there[1][0]} if in_place else {}
    out, lse = device.call(s, fastattn.merge_states, *there, layout=layout, **given)
    right = formula.merged(outs, lses, s.dtype, s.result)
    return _judged(x, {"out": swapped(s, device.get(out)), "lse": device.get(lse)}, right, None)


# ---------------------------------------------------------------- what is right
def _ordinary(x: Inputs) -> bool:
    """Whether one naive run's error is a measure: many scores of ordinary size. Of large ones it is luck, and depends on a sum's order; a
    small softcap makes them large. Where one pair attends, its one rounding is all of the error of dq and dk."""
    s = x.spec
    cap = 1.0 if s.softcap is None else min(s.softcap, 1.0)
    pairs = sum(int(formula.visible(x, n).sum()) for n in range(s.sequences))
    return (s.values in ORDINARY and s.bias_values in ("normal", "inf") and s.sinks != "large" and s.alibi is None and s.score_mod is None
            and s.dropout_p < 0.95 and abs(x.scale) * s.head_dim**0.5 <= 2 * cap and pairs >= MANY)


def _judged(x: Inputs, got: dict[str, Array], right: dict[str, Value], naive: dict[str, Array] | None) -> list[str]:
    s, found = x.spec, []
    real = compute_dtype(s.dtype)
    for name, value in right.items():
        if name not in got:
            continue
        dtype = {"lse": real, "dsinks": real, "dbias": s.bias_dtype}.get(name, s.result)
        if name.startswith("dcaptured"):
            dtype = x.held[name.replace("dcaptured", "score_mod")].dtype.name
        wrong = _far(name, got[name], value, dtype)
        within = (np.isfinite(got[name]) | (got[name] == value.exact)).all()        # a norm of infinities says nothing
        if wrong is None and naive is not None and value.exact.size >= MANY and within:
            wrong = _farther_than_naive(s, name, got[name], value, naive[name], dtype)
        if wrong is not None:
            found.append(wrong)
    return found


@np.errstate(all="ignore")
def _far(name: str, got: Array, value: Value, dtype: str) -> str | None:
    """The worst element that is not right."""
    if got.shape != value.exact.shape:
        return f"{name} has shape {got.shape}, expected {value.exact.shape}"
    if got.dtype.name != dtype:
        return f"{name} has dtype {got.dtype}, expected {dtype}"
    if got.size == 0:
        return None
    number, allowed = got.astype(np.float64), FACTOR * value.allowed
    off = np.abs(number - value.exact)
    off = np.where(number == value.exact, 0, off)           # infinities too
    beyond = np.abs(value.exact) + allowed > values.LARGEST[dtype] / (1 if name == "lse" else 4)
    if dtype not in ("float16", "float64") and name != "lse":   # sums on the way
        beyond |= value.size > values.LARGEST["float32"] / 16
    excess = np.where(np.isnan(off), np.inf, off / np.where(allowed > 0, allowed, 1e-300))
    excess = np.where((beyond & np.isfinite(value.exact)) | np.isnan(value.exact), 0, excess)      # NaN: the formula's own numbers overflow
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    if excess[worst] <= 1:
        return None
    count = int((excess > 1).sum())
    place = ", ".join(str(int(i)) for i in worst)
    return (f"{name}[{place}] is {float(number[worst]):.9g}, expected {float(value.exact[worst]):.9g} +- {float(allowed[worst]):.2g}"
            f" ({count} of {got.size} wrong, {int(np.isnan(number).sum())} NaN)")


def _farther_than_naive(s: Spec, name: str, got: Array, value: Value, naive: Array, dtype: str) -> str | None:
    """The README's rule, over the whole array."""
    shrink = EPS["float64"] / EPS["float32"] if s.dtype == "float64" else 1.0
    nothing = NOTHING[compute_dtype(s.dtype)] * norm(value.size) + formula.SMALLEST[dtype] * got.size
    size = norm(value.exact) if name == "out" else norm(value.exact) + norm(value.size)
    try:
        close(name, got, value.exact, naive, dtype, size, s.dtype, shrink, nothing)
    except AssertionError as error:
        return str(error)
    return None


def unchanged(x: Inputs, there: Arguments, device: Device) -> list[str]:
    """Complaints about inputs that were written to."""
    before = arguments(x, placed=False)
    pairs = [(name, there.arrays[name], y) for name, y in before.arrays.items()]
    pairs += [(name, there.options[name], y) for name, y in before.options.items() if isinstance(y, np.ndarray) and y.ndim]
    return [f"{name}: the input was written to" for name, now, y in pairs if device.get(now).tobytes() != y.tobytes()]
