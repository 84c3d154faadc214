"""Kernels compiled ahead of use, for the device here or for an architecture that is elsewhere; nothing here needs a GPU or a driver.

A `Want` is a call without memory, forward or backward. Its kernels are found the way a real call finds them (make_problem, choose, the
family's table), so what is put into the cache is what calls will look up.
"""
from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .. import gpu
from ..arrays.view import ITEMSIZE, View, contiguous
from ..problem import Grads, Operands, make_problem
from . import config
from .runtime import cache
from .runtime import compile as compiler
from .runtime.device import ARCHITECTURES, Device
from .runtime.packed import plan_packed
from .spec import AnyCall, BackwardCall, Call, Spec, make_backward_spec, make_spec

PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_120": 170}     # of A100, A10, L40, H100, RTX 5090
HERE = ("cuda", 0)
# modules that launch kernels of a backward, beside a family's own
SHARED = "rows.preprocess", "rows.postprocess", "simt.dbias", "sm90.backward_dq", "sm90.backward_wide"


@dataclass(frozen=True, slots=True)
class Want:
    """A call, as far as it changes which kernel runs. alibi, bias and sinks are their operand's dtype; None where absent."""

    dtype: str = "bfloat16"
    head_dim: int = 128
    head_dim_v: int | None = None           # head_dim when None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    packed: bool = False
    softcap: bool = False
    alibi: str | None = None
    bias: str | None = None
    mask: bool = False
    sinks: str | None = None
    dropout: bool = False
    lse: bool = False
    seqused: bool = False                   # a packed call with seqused_k
    lengths: str = "int32"                  # dtype of cu_seqlens
    seqlen_q: int = 4096                    # of each of `batch` sequences with `num_heads` heads
    seqlen_k: int | None = None
    batch: int = 4
    num_heads: int = 16
    num_heads_k: int | None = None
    backward: bool = False                  # with dbias where there is a bias; lse is then given, not wanted
    dbias: bool = True                      # of a backward with a bias
    deterministic: bool = False

    def call(self) -> tuple[AnyCall, Spec]:
        """The call with addresses that are never used."""
        dim_v, heads_k = self.head_dim_v or self.head_dim, self.num_heads_k or self.num_heads
        keys = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        rows: tuple[int, ...] = (self.batch * self.seqlen_q,) if self.packed else (self.batch, self.seqlen_q)
        columns: tuple[int, ...] = (self.batch * keys,) if self.packed else (self.batch, keys)
        scores = (self.batch, self.num_heads, self.seqlen_q, keys)

        def view(dtype: str | None, *shape: int) -> View | None:
            return None if dtype is None else View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, HERE)

        def array(dtype: str, *shape: int) -> View:
            return View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, HERE)
        o = Operands(array(self.dtype, *rows, self.num_heads, self.head_dim), array(self.dtype, *columns, heads_k, self.head_dim),
                     array(self.dtype, *columns, heads_k, dim_v), view(self.bias, *scores), view("bool" if self.mask else None, *scores),
                     view(self.alibi, self.num_heads), view(self.sinks, self.num_heads))
        lengths: dict[str, int] = {}
        if self.packed:
            cu = array(self.lengths, self.batch + 1)
            o = Operands(o.q, o.k, o.v, o.bias, o.mask, o.alibi_slopes, o.sinks, cu, cu,
                         view(self.lengths if self.seqused else None, self.batch))
            lengths = {"max_seqlen_q": self.seqlen_q, "max_seqlen_k": keys}
        problem, o = make_problem("precompile", o, packed=self.packed, causal=self.causal, window=self.window,
                                  softcap=30.0 if self.softcap else None, dropout_p=0.1 if self.dropout else 0.0, seed=0, **lengths)
        out, lse = array(self.dtype, *problem.out_shape), array(problem.lse_dtype, *problem.lse_shape)
        if not self.backward:
            return Call(problem, o, out, lse if self.lse else None), make_spec(problem, o, self.lse)
        grads = Grads(o.q, o.k, o.v, o.bias if self.dbias else None, o.sinks)
        call = BackwardCall(problem, o, out, out, lse, None, grads, self.deterministic)
        return call, make_backward_spec(call)


def absent_device(arch: str) -> Device:
    """A device of this architecture, as far as choosing kernels needs one."""
    return Device(0, arch, PROCESSORS[arch], config.SHARED_MEMORY[arch] * 1024, f"a device of {arch}", 0)


_replacing = threading.Lock()


def sources(call: AnyCall, spec: Spec, d: Device) -> list[compiler.Source]:
    """All kernels that the call launches, found by launching it without a device. UnsupportedError where no family in use takes it.

    What a launch asks for is replaced in the family's module and the shared ones: kernels are noted, not loaded, addresses are 0. Only
    for this thread: others go on launching.
    """
    module, found, this = gpu.choose(call, d), list[compiler.Source](), threading.get_ident()

    def note(source: compiler.Source, ordinal: int) -> Any:
        found.append(source)
        return SimpleNamespace(launch=lambda *_: None)

    @contextlib.contextmanager
    def table(call: AnyCall, block: int, ordinal: int, stream: int, by_keys: bool = False) -> Iterator[int]:
        if call.problem.packed:
            found.append(plan_packed(call.problem.seqused_k, block, by_keys))
        yield 0

    absent = {"load_kernel": note, "table": table, "tensor_maps": lambda boxes, *_: [0] * len(boxes),
              "row_map": lambda *_: 0, "counter": lambda *_: 0, "arrivals": lambda *_: 0, "capturing": lambda *_: False,
              "clear": lambda *_: None, "temporary": lambda *_: contextlib.nullcontext(0)}

    def replaced(original: Any, replacement: Any) -> Any:
        return lambda *values, **more: (replacement if threading.get_ident() == this else original)(*values, **more)
    with _replacing, contextlib.ExitStack() as stack:
        shared = ("decode.launch",) if isinstance(call, Call) else SHARED
        for where in (module, *(importlib.import_module(f".{name}", __package__) for name in shared)):
            for name in absent.keys() & vars(where).keys():
                original = getattr(where, name)
                stack.callback(setattr, where, name, original)
                setattr(where, name, replaced(original, absent[name]))
        if isinstance(call, Call):
            module.prepare(call, spec, d)(call, 0)
        else:
            module.launch(call, spec, d, 0)
    return found


# ---------------------------------------------------------------- many at once
@dataclass(frozen=True, slots=True)
class Built:
    """What became of one kernel: `error` is None when its machine code is in the cache."""

    key: str
    arch: str
    seconds: float
    error: str | None = None


def _build(want: Want, arch: str, families: tuple[str, ...]) -> list[Built]:
    """In a worker process: the kernels of one call into the cache."""
    results = []
    try:
        with gpu.use(*families):
            needed = sources(*want.call(), absent_device(arch))
    except NotImplementedError as error:
        return [Built(str(want), arch, 0.0, str(error))]
    for source in needed:
        start, failed = time.perf_counter(), None
        try:
            failed = None if compiler.cached(source, arch) else "the cache does not keep it: the log says why"
        except Exception as error:       # whatever the compilers raise belongs to this kernel; the others go on
            failed = f"{type(error).__name__}: {error}"
        results.append(Built(source.key, arch, time.perf_counter() - start, failed))
    return results


def build_all(wants: Iterable[Want], archs: Iterable[str], families: tuple[str, ...] = gpu.FAMILIES,
              processes: int | None = None) -> Iterator[list[Built]]:
    """Compile the kernels of every Want for every architecture in parallel processes; one list a Want, as they finish."""
    jobs = [(want, arch, families) for want in wants for arch in archs]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(processes or usable, len(jobs))
    with ProcessPoolExecutor(max(count, 1), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_build, *job) for job in jobs]):
            yield done.result()


# ---------------------------------------------------------------- the command
# what a call may have besides its masks by position, as a Want says it: one list, for the command and for what draws kernels at random
SCORE_FEATURES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": True}, "softcap": {"softcap": True}, "alibi": {"alibi": "float32"}, "sinks": {"sinks": "float32"},
    "mask": {"mask": True}, "bias": {"bias": "float32"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": (1024, 0)}, **SCORE_FEATURES, "backward": {"backward": True},
}


def parse_arch(text: str) -> str:
    """"sm_90a" of sm_90a, sm_90, 90 or 9.0. ValueError for what kernels are not compiled for."""
    arch = "sm_" + text.strip().lower().removeprefix("sm_").replace(".", "").rstrip("af")
    arch += "a" if arch == "sm_90" else ""
    if arch not in PROCESSORS:
        raise ValueError(f"--arch {text}: kernels are compiled for {', '.join(ARCHITECTURES)}.")
    return arch


def arch_here() -> str:
    """Of device 0. LookupError where there is none, or no driver."""
    from .runtime.device import device
    try:
        return device(0).arch
    except RuntimeError as error:
        raise LookupError(f"no CUDA device here ({error}); name an architecture: --arch sm_90a.") from error


LENGTHS = 512, 2048, 4096, 16384      # of dense calls: tiles are chosen by length
DECODE: dict[str, Any] = {"seqlen_q": 1, "seqlen_k": 4096, "num_heads_k": 4}


def wants_of(head_dims: Iterable[int], dtypes: Iterable[str], features: Iterable[str]) -> list[Want]:
    """Dense and packed calls with each feature, forward ones with lse and without, and of one query. A feature is a name of FEATURES, or
    several with '+'."""
    wants = []
    for feature in features:
        unknown = [name for name in feature.split("+") if name not in FEATURES]
        if unknown:
            raise ValueError(f"--features {feature}: {unknown[0]!r} is not one of {', '.join(FEATURES)} (several at once: causal+alibi).")
        settings: dict[str, Any] = {}
        for name in feature.split("+"):
            settings |= FEATURES[name]
        lses = (False,) if "backward" in settings else (False, True)
        wants += [Want(dtype, dim, packed=packed, lse=lse, seqlen_q=seqlen, **settings) for dtype in dtypes for dim in head_dims
                  for packed in (False, True) for lse in lses for seqlen in ((4096,) if packed else LENGTHS)]
        if "backward" not in settings:
            wants += [Want(dtype, dim, lse=lse, **settings, **DECODE) for dtype in dtypes for dim in head_dims for lse in lses]
    return wants


def _progress(results: Iterator[list[Built]], total: int) -> Iterator[list[Built]]:
    """With tqdm's bar where it is installed, else a counted line each."""
    try:
        from tqdm import tqdm
    except ImportError:
        for n, built in enumerate(results, 1):
            print(f"{n}/{total}  {built[-1].seconds:5.1f} s  {built[-1].arch}  {built[-1].key}", flush=True)
            yield built
    else:
        yield from tqdm(results, total=total, unit="kernel", desc="compiling")


def command(archs: list[str], head_dims: list[int], dtypes: list[str], features: list[str], processes: int | None) -> int:
    """`python -m fastattn precompile`: the exit status, 1 where a kernel failed. ValueError: unknown features, a refused folder."""
    wants, folder = wants_of(head_dims, dtypes, features), cache.folders()[-1]
    refusal = cache.refusal(folder)
    if refusal:
        raise ValueError(f"{folder} is not used as a kernel cache: {refusal}.")
    start, kernels, failed = time.perf_counter(), 0, list[Built]()
    for built in _progress(build_all(wants, archs, processes=processes), len(wants) * len(archs)):
        kernels += len(built)
        failed += [b for b in built if b.error is not None]
    print(f"{kernels - len(failed)} kernels for {', '.join(archs)} in {folder}, {time.perf_counter() - start:.0f} s")
    for b in failed:
        print(f"failed: {b.key} for {b.arch}: {b.error}")
    return 1 if failed else 0
