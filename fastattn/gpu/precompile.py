"""Compile kernels ahead of use, for the device here or for another architecture. Nothing here needs a GPU or a driver.

A `Want` is a call without memory, forward or backward. Its kernels are found the way a real call finds them
(make_problem, choose, the family's launch), so the cache gets exactly the entries that calls will look up.
"""
from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import gpu
from ..arrays.view import ITEMSIZE, View, contiguous
from ..problem import Grads, Operands, make_problem
from .runtime import cache
from .runtime import compile as compiler
from .runtime.arch import ARCHITECTURES
from .runtime.device import Device, device
from .runtime.launcher import Listing
from .spec import AnyCall, BackwardCall, Call, Spec, make_backward_spec, make_spec

HERE = ("cuda", 0)


@dataclass(frozen=True, slots=True)
class Want:
    """The properties of a call that decide which kernels run. alibi, bias and sinks are their operand's dtype, None if
    absent."""

    dtype: str = "bfloat16"
    head_dim: int = 128
    head_dim_v: int | None = None           # head_dim when None
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    packed: bool = False
    softcap: bool = False
    wide_cap: bool = False                  # a softcap over spec.WIDE_CAP
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
    one_bias: bool = False                  # the same for all of the batch
    deterministic: bool = False
    out_dtype: str | None = None            # of out, dq, dk and dv: "float32" beside 16 bits
    diagonals: bool = False                 # a packed call with a diagonal for each sequence

    def call(self) -> tuple[AnyCall, Spec]:
        """The call and its Spec, with addresses that are never used."""
        dim_v, heads_k = self.head_dim_v or self.head_dim, self.num_heads_k or self.num_heads
        keys = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        rows: tuple[int, ...] = (self.batch * self.seqlen_q,) if self.packed else (self.batch, self.seqlen_q)
        columns: tuple[int, ...] = (self.batch * keys,) if self.packed else (self.batch, keys)
        scores = (self.batch, self.num_heads, self.seqlen_q, keys)
        of_bias = (1, *scores[1:]) if self.one_bias else scores

        def view(dtype: str | None, *shape: int) -> View | None:
            return None if dtype is None else View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, HERE)

        def array(dtype: str, *shape: int) -> View:
            return View(1 << 20, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, HERE)
        o = Operands(array(self.dtype, *rows, self.num_heads, self.head_dim), array(self.dtype, *columns, heads_k, self.head_dim),
                     array(self.dtype, *columns, heads_k, dim_v), view(self.bias, *of_bias), view("bool" if self.mask else None, *scores),
                     view(self.alibi, self.num_heads), view(self.sinks, self.num_heads))
        lengths: dict[str, int] = {}
        if self.packed:
            cu = array(self.lengths, self.batch + 1)
            o = Operands(o.q, o.k, o.v, o.bias, o.mask, o.alibi_slopes, o.sinks, cu, cu,
                         view(self.lengths if self.seqused else None, self.batch), view("int32" if self.diagonals else None, self.batch))
            lengths = {"max_seqlen_q": self.seqlen_q, "max_seqlen_k": keys}
        out_dtype = self.out_dtype if ITEMSIZE[self.dtype] == 2 else None
        problem, o = make_problem("precompile", o, out_dtype=out_dtype, packed=self.packed, causal=self.causal, window=self.window,
                                  softcap=128.0 if self.wide_cap else 30.0 if self.softcap else None,
                                  dropout_p=0.1 if self.dropout else 0.0, seed=0, **lengths)
        out, lse = array(problem.out_dtype, *problem.out_shape), array(problem.lse_dtype, *problem.lse_shape)
        if not self.backward:
            return Call(problem, o, out, lse if self.lse else None), make_spec(problem, o, self.lse)
        dq, dk, dv = (array(problem.out_dtype, *x.shape) for x in (o.q, o.k, o.v))
        grads = Grads(dq, dk, dv, view(self.bias, *of_bias) if self.dbias else None, o.sinks)
        call = BackwardCall(problem, o, out, out, lse, None, grads, self.deterministic)
        return call, make_backward_spec(call)


def absent_device(name: str) -> Device:
    """A device of the architecture `name` ("sm_90a"), as far as choosing kernels needs one."""
    arch = ARCHITECTURES[name]
    return Device(0, name, arch.processors, arch.shared_memory * 1024, f"a device of {name}", 0)


def sources(call: AnyCall, spec: Spec, d: Device) -> list[compiler.Source]:
    """All kernels that the call launches, in order: it is launched with a launcher that only lists them.

    Raises
    ------
    UnsupportedError
        No family in use runs the call.
    """
    family, launcher = gpu.choose(call, d), Listing(d)
    if isinstance(call, Call):
        family.prepare(call, spec, launcher)(call, 0)
    else:
        family.backward(call, spec, launcher, 0)
    return launcher.sources


# ---------------------------------------------------------------- many at once
class Job(NamedTuple):
    """One kernel to be compiled: the first call that launches it, an architecture, and its key."""

    want: Want
    arch: str
    key: str


@dataclass(frozen=True, slots=True)
class Built:
    """The result of compiling one kernel: `error` is None when its machine code is in the cache."""

    key: str
    arch: str
    seconds: float
    error: str | None = None


def jobs_of(wants: Iterable[Want], archs: Iterable[str], families: tuple[str, ...] = gpu.FAMILIES) -> tuple[list[Job], list[Built]]:
    """One Job for each kernel that the calls launch, however many launch it; and a Built with the reason for each call
    that no family runs.
    """
    jobs, refused = dict[tuple[str, str], Job](), list[Built]()
    with gpu.use(*families):
        for want, arch in itertools.product(wants, archs):
            try:
                needed = sources(*want.call(), absent_device(arch))
            except NotImplementedError as error:
                refused.append(Built(str(want), arch, 0.0, str(error)))
                continue
            for source in needed:
                jobs.setdefault((source.key, arch), Job(want, arch, source.key))
    return list(jobs.values()), refused


def _build(job: Job, families: tuple[str, ...]) -> Built:
    """In a worker process: compile one kernel into the cache."""
    start, failed = time.perf_counter(), None
    with gpu.use(*families):
        needed = sources(*job.want.call(), absent_device(job.arch))
    source = next(source for source in needed if source.key == job.key)
    try:
        failed = None if compiler.cached(source, job.arch) else "the cache does not keep it: the log says why"
    except Exception as error:       # whatever the compilers raise concerns this kernel only
        failed = f"{type(error).__name__}: {error}"
    return Built(job.key, job.arch, time.perf_counter() - start, failed)


def build_all(jobs: Sequence[Job], processes: int | None = None, families: tuple[str, ...] = gpu.FAMILIES) -> Iterator[Built]:
    """Compile kernels in parallel processes. Yields each as it finishes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(processes or usable, len(jobs))
    with ProcessPoolExecutor(max(count, 1), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_build, job, families) for job in jobs]):
            yield done.result()


# ---------------------------------------------------------------- the command
# score features as keywords of a Want: one list, for the command and for the tests that draw kernels at random
SCORE_FEATURES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": True}, "softcap": {"softcap": True}, "alibi": {"alibi": "float32"}, "sinks": {"sinks": "float32"},
    "mask": {"mask": True}, "bias": {"bias": "float32"}, "float32_out": {"out_dtype": "float32"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": (1024, 0)}, **SCORE_FEATURES, "backward": {"backward": True},
}


def arch_here() -> str:
    """The architecture of device 0. LookupError: there is no device, or no driver."""
    try:
        return device(0).arch
    except RuntimeError as error:
        raise LookupError(f"no CUDA device here ({error}); name an architecture: --arch sm_90a.") from error


LENGTHS = 64, 128, 200, 256, 512, 2048, 4096, 16384, 32768, 65536     # keys of dense calls: tilings and kernels are chosen by length
DECODE: dict[str, Any] = {"seqlen_q": 1, "seqlen_k": 4096, "num_heads_k": 4}


def wants_of(head_dims: Iterable[int], dtypes: Iterable[str], features: Iterable[str]) -> list[Want]:
    """Dense and packed calls with each feature; forward calls with lse and without, and with one query.

    A feature is a name of FEATURES, or several joined by "+". ValueError: unknown name.
    """
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


def _progress(results: Iterator[Built], total: int) -> Iterator[Built]:
    """Pass the results on and show progress: tqdm's bar where it is installed, else a numbered line for each."""
    try:
        from tqdm import tqdm
    except ImportError:
        for n, built in enumerate(results, 1):
            print(f"{n}/{total}  {built.seconds:5.1f} s  {built.arch}  {built.key}", flush=True)
            yield built
    else:
        yield from tqdm(results, total=total, unit="kernel", desc="compiling")


def command(archs: list[str], head_dims: list[int], dtypes: list[str], features: list[str], processes: int | None) -> int:
    """`python -m fastattn precompile`: the exit status, 1 if a kernel failed. ValueError: unknown features, a refused
    folder."""
    wants, folder = wants_of(head_dims, dtypes, features), cache.folders()[-1]
    refusal = cache.refusal(folder)
    if refusal:
        raise ValueError(f"{folder} is not used as a kernel cache: {refusal}.")
    start = time.perf_counter()
    jobs, refused = jobs_of(wants, archs)
    built = list(_progress(build_all(jobs, processes), len(jobs)))
    failed = [b for b in built if b.error is not None]
    print(f"{len(built) - len(failed)} kernels for {', '.join(archs)} in {folder}, {time.perf_counter() - start:.0f} s")
    for b in (*failed, *refused):
        print(f"failed: {b.key} for {b.arch}: {b.error}")
    return 1 if failed or refused else 0
