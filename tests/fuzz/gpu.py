"""The GPU: arrays of torch, CuPy, or known by DLPack or __cuda_array_interface__ alone; poisoned pools, side streams, captured graphs.

`where="cpu"` is a double for machines without a GPU: torch's tensors in host memory.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastattn.arrays import convert, dlpack, streams
from fastattn.arrays.streams import LEGACY
from fastattn.arrays.view import View, contiguous
from tests.tools.problems import NUMPY

from . import memory
from .device import Device, Place
from .inputs import Arguments
from .spec import Spec

Array = np.ndarray[Any, Any]
BLOCKS = (1 << 12, 1 << 16, 1 << 20, 1 << 20, 1 << 24)      # bytes: what is poisoned before each problem


class Bytes:
    """Memory on device 0 that no library has."""

    def __init__(self, raw: Array) -> None:
        self.count, d = raw.size, streams.driver()
        with streams.on_device(0):
            self.start = int(streams.check(d.cuMemAlloc(max(raw.size, 1)), "cuMemAlloc"))
            if raw.size:
                streams.check(d.cuMemcpyHtoD(self.start, raw.ctypes.data, raw.size), "cuMemcpyHtoD")

    def __del__(self) -> None:
        with contextlib.suppress(Exception), streams.on_device(0):
            streams.driver().cuMemFree(self.start)

    def raw(self) -> Array:
        """What it holds, once all work is done."""
        host = np.empty(self.count, np.uint8)
        with streams.on_device(0):
            streams.check(streams.driver().cuCtxSynchronize(), "cuCtxSynchronize")
            if host.size:
                streams.check(streams.driver().cuMemcpyDtoH(host.ctypes.data, self.start, host.size), "cuMemcpyDtoH")
        return host


class Bare:
    """An array in Bytes: it speaks DLPack, and `Named` the CUDA Array Interface alone."""

    def __init__(self, memory: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> None:
        self.memory, self.offset, self.shape, self.strides, self.dtype = memory, offset, shape, strides, dtype
        self.ptr = memory.start + offset

    def __getitem__(self, index: Any) -> Bare:
        """A slice: the same memory."""
        whole = np.lib.stride_tricks.as_strided(np.empty(1, numpy_dtype(self.dtype)), self.shape, self.strides)
        some = whole[index]
        first, there = (x.__array_interface__["data"][0] for x in (whole, some))
        return Bare(self.memory, self.offset + there - first, some.shape, some.strides, self.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        return dlpack.capsule(self, self.ptr, self.shape, self.strides, self.dtype, 0, max_version)


class Named:
    """A Bare known only by its __cuda_array_interface__."""

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        self.__cuda_array_interface__ = {"version": 3, "shape": bare.shape, "strides": bare.strides, "typestr": NUMPY_NAMES[bare.dtype],
                                         "data": (bare.ptr, False), "stream": None}

    def __getitem__(self, index: Any) -> Named:
        return Named(self.bare[index])


NUMPY_NAMES = {name: np.dtype(name).str for name in ("float32", "float64", "float16", "int32", "int64")} | {"bool": "|b1"}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """bfloat16 and integers too."""
    return NUMPY[name] if name in NUMPY else np.dtype(name)


class Gpu(Device):
    def __init__(self, where: str = "cuda") -> None:
        self.where, self.kept, self.cupy_dtypes = where, list[Any](), set[str]()
        self.torch: Any = importlib.import_module("torch")
        self.cupy: Any = None
        if where == "cuda":
            with contextlib.suppress(ImportError):
                self.cupy = importlib.import_module("cupy")
            self.cupy_dtypes = {name for name, dtype in NUMPY.items() if self.cupy is not None and self._cupy_has(dtype)}
            self._keep_default_pool()

    def _cupy_has(self, dtype: np.dtype[Any]) -> bool:
        """CuPy before 14 has no bfloat16."""
        try:
            return bool(self.cupy.empty(1, dtype).size)
        except (TypeError, ValueError):
            return False

    # ---------------------------------------------------------------- memory that nothing has written
    def _keep_default_pool(self) -> None:
        """Memory of the driver's pool stays there when the device is waited for: what is poisoned comes again."""
        d = streams.driver()
        self.torch.cuda.init()
        pool = streams.check(d.cuDeviceGetDefaultMemPool(0), "cuDeviceGetDefaultMemPool")
        threshold = d.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        streams.check(d.cuMemPoolSetAttribute(pool, threshold, d.cuuint64_t(1 << 30)), "cuMemPoolSetAttribute")

    def poison(self) -> None:
        """0xFF, NaN in every dtype, in the free memory of torch's, CuPy's, the driver's and the engine's pools."""
        if self.where == "cpu":
            return
        blocks = [self.torch.full((size,), memory.POISON, dtype=self.torch.uint8, device="cuda") for size in BLOCKS]
        if self.cupy is not None:
            blocks += [self.cupy.full(size, memory.POISON, self.cupy.uint8) for size in BLOCKS]
        del blocks
        from fastattn.gpu.runtime import workspace

        d = streams.driver()
        with streams.on_device(0), contextlib.ExitStack() as until:
            for size in BLOCKS:
                taken = int(streams.check(d.cuMemAllocAsync(size, LEGACY), "cuMemAllocAsync"))
                until.callback(d.cuMemFreeAsync, taken, LEGACY)
                for place in (taken, until.enter_context(workspace.temporary(size, 0, LEGACY))):
                    streams.check(d.cuMemsetD8Async(place, memory.POISON, size, LEGACY), "cuMemsetD8Async")
        self.torch.cuda.synchronize()

    # ---------------------------------------------------------------- arrays
    def put(self, s: Spec, given: Arguments) -> Arguments:
        on_it = {"bias", "mask", "alibi_slopes", "sinks", "seqused_k", "dlse"} | ({"diagonal"} if isinstance(s.diagonal, tuple) else set())
        options = {name: self._copy(s, x) if name in on_it else x for name, x in given.options.items()}
        arrays = {name: self._copy(s, x) for name, x in given.arrays.items()}
        return Arguments(arrays, tuple(self._copy(s, x) for x in given.lengths), options)

    def lay(self, s: Spec, x: Array) -> Any:
        return self._copy(s, super().lay(s, x))

    def place(self, s: Spec, shape: tuple[int, ...], dtype: str, kind: str) -> Place:
        whole, view = memory.place(np.random.default_rng([s.seed, 4]), shape, NUMPY[dtype], kind)
        offset = view.__array_interface__["data"][0] - whole.ctypes.data if 0 not in shape else 0
        array, fetch = self._make(s, whole, offset, view)

        def untouched() -> bool:
            back = fetch()
            return 0 in shape or memory.untouched(back, _strided(back, offset, shape, view.strides, dtype))
        return Place(array, untouched)

    def _copy(self, s: Spec, x: Array) -> Any:
        """The same numbers with the same strides, what lies between them included."""
        low, high = convert.view(x, "fuzz", "x").bytes_range()
        raw = np.frombuffer(ctypes.string_at(low, high - low), np.uint8).copy()
        return self._make(s, raw, x.__array_interface__["data"][0] - low if high > low else 0, x)[0]

    def _make(self, s: Spec, raw: Array, offset: int, like: Array) -> tuple[Any, Callable[[], Array]]:
        """(an array of the spec's library over a copy of `raw`, a function that gives the bytes back)."""
        shape, dtype, size = like.shape, like.dtype.name, like.itemsize
        strides = tuple(size if n == 1 else step for n, step in zip(shape, like.strides, strict=True))
        if (s.library == "torch" and not any(step < 0 for step in strides)) or self.where == "cpu":
            if 0 in shape:
                return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=self.where), lambda: raw
            if any(step < 0 for step in strides):
                raw, offset = np.frombuffer(like.tobytes(), np.uint8).copy(), 0
                strides = contiguous(shape, size)
            bytes_there = self.torch.from_numpy(raw).to(self.where)
            flat = bytes_there.view(getattr(self.torch, dtype))
            return (self.torch.as_strided(flat, shape, [step // size for step in strides], offset // size),
                    lambda: np.asarray(bytes_there.cpu().numpy()).copy())
        if s.library == "cupy" and self.cupy is not None and (dtype in self.cupy_dtypes or dtype not in NUMPY):
            if 0 in shape:
                return self.cupy.empty(shape, like.dtype), lambda: raw
            held = self.cupy.asarray(raw)
            return self.cupy.ndarray(shape, like.dtype, held.data + offset, strides), lambda: np.asarray(self.cupy.asnumpy(held))
        there = Bytes(raw)
        bare = Bare(there, offset, shape, strides, dtype)
        return Named(bare) if s.library == "interface" and dtype in NUMPY_NAMES else bare, there.raw

    def get(self, x: Any) -> Array:
        if isinstance(x, self.torch.Tensor):
            if x.dtype == self.torch.bfloat16:
                return np.asarray(x.contiguous().view(self.torch.int16).cpu().numpy()).view(NUMPY["bfloat16"])
            return np.asarray(x.cpu().numpy())
        if self.cupy is not None and isinstance(x, self.cupy.ndarray):
            return np.asarray(self.cupy.asnumpy(x))
        if isinstance(x, (Bare, Named)):
            bare = x.bare if isinstance(x, Named) else x
            return _strided(bare.memory.raw(), bare.offset, bare.shape, bare.strides, bare.dtype)
        if isinstance(x, np.ndarray):
            return x
        host = np.empty(x.shape, NUMPY[x.dtype])                # a DeviceArray
        with streams.on_device(0):
            streams.check(streams.driver().cuCtxSynchronize(), "cuCtxSynchronize")
            if host.nbytes:
                streams.check(streams.driver().cuMemcpyDtoH(host.ctypes.data, x.view().ptr, host.nbytes), "cuMemcpyDtoH")
        return host

    # ---------------------------------------------------------------- calls
    def call(self, s: Spec, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.where == "cpu" or s.stream is None:
            return function(*arguments, **options)
        if s.stream == "capture":
            return self._captured(function, arguments, options)
        with self._side(s) as more:
            return function(*arguments, **options, **more)

    @contextlib.contextmanager
    def _side(self, s: Spec) -> Iterator[dict[str, Any]]:
        """Inside, a stream of its own is the library's current one; or it is the call's `stream`, as an object or a number."""
        if s.library == "cupy" and self.cupy is not None:
            side: Any = self.cupy.cuda.Stream(non_blocking=True)
            side.wait_event(self.cupy.cuda.get_current_stream().record())
        else:
            side = self.torch.cuda.Stream()
            side.wait_stream(self.torch.cuda.current_stream())
        self.kept.append(side)
        if s.library not in ("torch", "cupy"):
            yield {"stream": side.cuda_stream}
        elif s.seed % 2:
            yield {"stream": side}
        else:
            with side if s.library == "cupy" else self.torch.cuda.stream(side):
                yield {}
        side.synchronize()

    def _captured(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What a replayed graph gives: its results are NaN between capture and replay."""
        function(*arguments, **options)                     # compiles
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            result = function(*arguments, **options)
        for x in result if isinstance(result, tuple) else (result,):
            if x is not None:
                x.fill_(float("nan"))
        graph.replay()
        self.torch.cuda.synchronize()
        self.kept.append(graph)
        return result

    def finish(self) -> None:
        self.kept.clear()
        if self.where == "cuda":
            self.torch.cuda.synchronize()

    def healthy(self) -> bool:
        """Whether the context still works: after an illegal address nothing does."""
        if self.where == "cpu":
            return True
        try:
            with streams.on_device(0):
                return not streams.driver().cuCtxSynchronize()[0]
        except Exception:
            return False


def _strided(raw: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Array:
    """An ndarray in bytes."""
    if 0 in shape:
        return np.empty(shape, numpy_dtype(dtype))
    place = View(raw.ctypes.data + offset, shape, strides, dtype, owner=raw)
    return place.numpy()
