"""From a Python kernel to machine code: Numba to LTO-IR, nvJitLink to a cubin, loading and launching. cache.py keeps it
on disk.

Numba's dispatcher is not used: it costs 37 us a call, has no opt-in shared memory, and its cache does not notice
changes in other files. Neither is its route over PTX, where the linker ignores setmaxnreg and serializes every wgmma
(docs/performance.md). Numba is imported only to compile: a kernel in the cache is launched without it. Nothing here but
`load` needs a GPU or a driver.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache
from .arch import arch_of
from .cache import Binary
from .notice import announced

log = logging.getLogger("fastattn")
_PACKAGES = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12",
             "cuda-core")
LINKER_STARTS = 0.01     # seconds in which another thread has entered the linker
PORTABLE_CLUSTER = 8    # blocks of a cluster that every device takes that has clusters; sm_90 takes 16 if the kernel allows it
_lock = threading.RLock()       # one compilation at a time
_LETTERS = {"l": "Q", "q": "q", "i": "i", "I": "I", "f": "f", "d": "d"}     # letter of a field -> letter of struct


@dataclass(frozen=True, slots=True)
class Source:
    """A kernel to be compiled.

    Parameters
    ----------
    key
        Which kernel it is: its name, Spec and Config as text.
    make
        Returns the Python function, which has one named tuple of `fields` as its argument, and the bytes of dynamic
        shared memory of a launch. Not called where the kernel is in the cache, so that Numba need not be imported.
    fields
        (name, letter) of each argument: l pointer, q int64, i int32, I uint32, f float32, d float64.
    threads
        Of a thread block.
    blocks_per_sm
        Thread blocks of a multiprocessor, which bound the registers of a thread.
    cluster
        So many neighbouring blocks are a cluster, of which a grid has a whole number. Since sm_90.
    early
        It may start before the kernel before it has ended: it waits itself (ptx/sync.py).
    """

    key: str
    make: Callable[[], tuple[Any, int]]
    fields: tuple[tuple[str, str], ...]
    threads: int
    blocks_per_sm: int = 1
    early: bool = False
    cluster: int = 1


def fields_of(text: str) -> tuple[tuple[str, str], ...]:
    """The fields of a Source that a text names: "table:l tiles:i" gives (("table", "l"), ("tiles", "i"))."""
    return tuple((name, letter) for name, _, letter in (field.partition(":") for field in text.split()))


def late(module: str, function: str) -> Callable[..., Any]:
    """A kernel factory that is imported when it is called: `function` of the module fastattn.gpu.`module`.

    Importing it pulls in Numba, which a cached kernel does not need.
    """
    return lambda *arguments: getattr(importlib.import_module(f"..{module}", __package__), function)(*arguments)


@functools.cache
def _fingerprint() -> str:
    """Hash of everything that changes machine code: all GPU sources, what makes programs of functions, the versions of the compilers."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent.parent
    for path in sorted(path for folder in ("flex", "gpu") for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for package in _PACKAGES:
        try:
            digest.update(f"{package}={importlib.metadata.version(package)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"{package}=?\n".encode())
    return digest.hexdigest()


def _key(source: Source, arch: str) -> str:
    """Name of a kernel's cache entry."""
    return hashlib.sha256(f"{_fingerprint()}\n{arch}\n{source.key}\n{source.fields}".encode()).hexdigest()


def _fresh_lock() -> None:
    """In a forked child: another thread may have held the lock, and is not there to release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_lock)


def binary(source: Source, arch: str, announce: bool = True, warn: bool = True, overlapped: Sequence[Source] = ()) -> Binary:
    """Machine code of a kernel for `arch`, e.g. "sm_90a", from the cache or compiled. Logs a warning if it will be
    slow.

    announce: say on a terminal why the call takes so long (notice.py). warn: no, where a slow kernel is only tried. overlapped: other
    kernels of the same call. If this one has to be compiled, they are compiled into the cache while its linker runs.
    """
    with _lock:
        key = _key(source, arch)
        found = cache.read(key)
        if found is not None:
            log.debug("fastattn: %s for %s is in the kernel cache, entry %.12s", source.key, arch, key)
        else:
            log.info("fastattn: compiling %s for %s", source.key, arch)
            start = time.perf_counter()
            with announced(source.key.split()[0], arch) if announce else contextlib.nullcontext():
                others = [functools.partial(binary, other, arch, announce=False) for other in overlapped]
                code, report = build(source, arch, overlapped=others)
            for problem in complaints(report):      # a compiler that the tests do not know: slower, not wrong
                log.log(logging.WARNING if warn else logging.INFO, "fastattn: %s for %s: %s", source.key, arch, problem)
            log.info("fastattn: compiled in %.1f s, %s", time.perf_counter() - start, registers(report))
            found = Binary(code, source.make()[1], f"{arch} {source.key}")
            cache.write(key, found)
        return found


def cached(source: Source, arch: str) -> bool:
    """Compile a kernel into the cache if it is not there yet. Returns whether it is there now."""
    binary(source, arch, announce=False)
    return cache.read(_key(source, arch)) is not None


def known(source: Source, arch: str) -> Binary | None:
    """Machine code of a kernel if it is in the cache."""
    return cache.read(_key(source, arch))


def build(source: Source, arch: str, output: str = "cubin", overlapped: Sequence[Callable[[], object]] = ()) -> tuple[bytes, str]:
    """Compile without the cache. overlapped: what this thread does while another one is in the linker, which needs no interpreter.

    Returns
    -------
    (code, report)
        Machine code, or PTX text for output="ptx", and what the compiler says about it.
    """
    with _no_collection() as wanted:
        ltoir = intermediate(source, arch)
        with ThreadPoolExecutor(1) as pool:
            linked = _begun(pool, link, ltoir, arch, output)
            for work in overlapped:
                work()
            if wanted:      # 0.15 s without letting the other thread in, for which the linker would wait
                time.sleep(LINKER_STARTS)
                gc.collect(0)
            return linked.result() if linked else link(ltoir, arch, output)


def _begun(pool: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
    """The work, begun in another thread. None: there is no thread to be had, as while the interpreter ends."""
    try:
        return pool.submit(work, *arguments)
    except RuntimeError:
        return None


def intermediate(source: Source, arch: str) -> bytes:
    """What Numba and NVVM make of a kernel: LTO-IR, half of the time of `build`. The other half is `link`."""
    with _no_collection():
        try:
            import cuda.core
            from numba import cuda

            from ..dsl.inline import kernel_of
        except ImportError as error:
            raise ImportError(f"{source.key.split()[0]} is not in the kernel cache and cannot be compiled ({error}); that needs numba-cuda "
                              "and cuda-core: pip install 'fastattn[gpu]'.") from error

        target = arch_of(arch)
        capability = (*target.capability, *target.suffix)
        ltoir, _ = cuda.compile(kernel_of(source.make()[0]), _signature(source), device=False, abi="numba", cc=capability, fastmath=False,
                                output="ltoir", launch_bounds=(source.threads, source.blocks_per_sm))
    return bytes(ltoir)


def link(ltoir: bytes, arch: str, output: str = "cubin") -> tuple[bytes, str]:
    """(code, report) as `build` returns them."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=arch, link_time_optimization=True, ptxas_options=["-v"], ptx=output == "ptx")
    linker = Linker(ObjectCode.from_ltoir(ltoir), options=options)
    code = bytes(linker.link(output).code)
    return code, f"{linker.get_info_log()}\n{linker.get_error_log()}"


@contextlib.contextmanager
def _no_collection() -> Iterator[bool]:
    """No garbage collection inside: Numba makes millions of small objects and next to no garbage. Saves a sixth of the
    time. Yields whether there was one outside."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield collected
    finally:
        if collected:
            gc.enable()


def _signature(source: Source) -> Any:
    from collections import namedtuple

    from numba.cuda import types
    kinds = {"l": types.uint64, "q": types.int64, "i": types.int32, "I": types.uint32, "f": types.float32, "d": types.float64}
    arguments = namedtuple("Arguments", [name for name, _ in source.fields])  # type: ignore[misc]
    letters = [kinds[letter] for _, letter in source.fields]
    if len(set(letters)) == 1:
        return types.void(types.NamedUniTuple(letters[0], len(letters), arguments))
    return types.void(types.NamedTuple(letters, arguments))


def complaints(report: str) -> list[str]:
    """What a shipped kernel must not have: spills, local memory, ignored setmaxnreg, serialized wgmma."""
    found = [line.strip() for line in report.splitlines()
             if re.search(r"C75(04|08|12|14)", line) or (re.search(r"C75\d\d", line) and "serialized" in line)]
    for kind, pattern in (("bytes of stack", r"(\d+) bytes stack frame"), ("bytes of spills", r"(\d+) bytes spill stores")):
        worst = max((int(n) for n in re.findall(pattern, report)), default=0)
        if worst:
            found.append(f"{worst} {kind}")
    return found


def registers(report: str) -> str:
    match = re.search(r"Used (\d+) registers", report)
    return f"{match.group(1)} registers" if match else "registers unknown"


# ---------------------------------------------------------------- on a device
class Kernel:
    """A loaded kernel: `launch(grid, values, stream)` with the values of its fields in order. `offsets`: where they are in
    `packed(values)`."""

    def __init__(self, source: Source, ordinal: int) -> None:
        from cuda.bindings import driver

        from ...arrays.streams import check
        from .device import current, device, relaxed
        d = device(ordinal)
        self.source, self.ordinal = source, ordinal
        self.lay_out()
        with current(d), relaxed():
            code, self.shared_memory, _ = binary(source, d.arch)
            library = check(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0), "cuLibraryLoadData")
            [kernel] = check(driver.cuLibraryEnumerateKernels(1, library), "cuLibraryEnumerateKernels")
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuKernelSetAttribute(attribute, self.shared_memory, kernel, ordinal), "cuKernelSetAttribute")
            if source.cluster > PORTABLE_CLUSTER:
                allowed = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                check(driver.cuKernelSetAttribute(allowed, 1, kernel, ordinal), "cuKernelSetAttribute")
            self._function = check(driver.cuKernelGetFunction(kernel), "cuKernelGetFunction")
        self._launch, self._check = driver.cuLaunchKernelEx, check

    def lay_out(self) -> None:
        """Find where the values of fields are in memory."""
        self._struct = struct.Struct("@" + "".join(_LETTERS[letter] for _, letter in self.source.fields))
        offset, self.offsets = 0, list[int]()
        for _, letter in self.source.fields:
            size = struct.calcsize(_LETTERS[letter])
            offset = -(-offset // size) * size
            self.offsets.append(offset)
            offset += size

    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        """Enqueue `grid` thread blocks in one dimension, at most 2**31 - 1, with the values of the kernel's fields in
        order.

        Nothing is launched for an empty grid, which the driver refuses: every block writes what it owns, so there is
        nothing to write. The device's context must be current.
        """
        if grid == 0:
            return
        buffer, config = self.packed(values), self.config(grid)
        start, config.hStream = ctypes.addressof(buffer), stream
        pointers = (ctypes.c_void_p * len(self.offsets))(*[start + offset for offset in self.offsets])
        self.enqueue(config, ctypes.addressof(pointers))

    def packed(self, values: list[Any]) -> Any:
        """Memory with the values of all fields."""
        buffer = ctypes.create_string_buffer(self._struct.size)
        self._struct.pack_into(buffer, 0, *values)
        return buffer

    def config(self, grid: int) -> Any:
        """A launch of `grid` blocks, at least one, but for its stream."""
        from cuda.bindings import driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes = grid, self.source.threads, self.shared_memory
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        attributes = []
        if self.source.early:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        if self.source.cluster > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = cluster.value.clusterDim
            size.x, size.y, size.z = self.source.cluster, 1, 1
            attributes.append(cluster)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def enqueue(self, config: Any, arguments: int) -> None:
        """Enqueue a launch. `arguments`: address of a pointer to the value of each field."""
        result = self._launch(config, self._function, arguments, 0)
        if result[0]:
            self._check(result, f"launch of {self.source.key}")


_loaded: dict[tuple[str, int], Kernel] = {}


def load(source: Source, ordinal: int) -> Kernel:
    """The kernel on device `ordinal`, compiled and loaded on first use."""
    key = (source.key, ordinal)
    kernel = _loaded.get(key)
    if kernel is None:
        with _lock:
            kernel = _loaded.get(key) or _loaded.setdefault(key, Kernel(source, ordinal))
    return kernel
