"""The array libraries that are known by name, torch, CuPy, Numba and cuda.core: how each one's arrays are read and
made.

This is faster than DLPack (a torch tensor is read in 1 us instead of 8), and these libraries tell their current stream.
None is imported here: one whose array came in is loaded already. JAX and all others come by DLPack or the CUDA Array
Interface (protocols.py).
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ..errors import message
from ..signature import UNCOMPILED
from . import streams, words
from .device_array import DeviceArray
from .protocols import DLPACK, INTERFACE, cannot, dtype_name, empty_device_array, requires_grad, wrong_dtype
from .streams import LEGACY, PER_THREAD, Home, Stream
from .view import CPU, EIGHT_BIT, HOST, ITEMSIZE, Library, Output, Quick, Shape, View, contiguous, numpy_dtype


def find(x: Any) -> Library | None:
    """The library of x by its type, if it is known by name."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(x, torch.Tensor):
        if any(base.__name__ == "FakeTensor" for base in type(x).__mro__):     # reading its address warns
            return Library(_stand_in, lambda x, call: None, empty_device_array)
        _leave_alone(torch)
        return _torch(torch)
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _cupy(cupy)
    modules = [base.__module__ for base in type(x).__mro__]
    if any(name.endswith("cuda.cudadrv.devicearray") for name in modules):
        return Library(INTERFACE.view, INTERFACE.home, _numba_empty)
    if modules[0].startswith("cuda.core.") and type(x).__name__ == "StridedMemoryView":
        return Library(_memory_view, _memory_view_home, empty_device_array)
    if modules[0].startswith("cuda.core.") and type(x).__name__ == "Buffer":
        return Library(_bare_buffer, lambda x, call: None, empty_device_array)
    if isinstance(x, DeviceArray):
        return Library(_device_array, lambda x, call: Home(x.stream.device, x.stream.handle), empty_device_array)
    return None


# ---------------------------------------------------------------- torch
def _torch(torch: Any) -> Library:
    names = {getattr(torch, name): (name, size) for name, size in ITEMSIZE.items() if hasattr(torch, name)}
    dtypes = {name: dtype for dtype, (name, _) in names.items()}
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda n: torch.cuda.current_stream(n).cuda_stream)
    mark, is_hip, new_tuple = "torch", torch.version.hip is not None, tuple.__new__
    forward_ad, modes, traced = torch.autograd.forward_ad, torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
    guard = _guard(torch)

    @lru_cache(4096)
    def in_bytes(strides: Shape, size: int) -> Shape:
        return tuple([s * size for s in strides])

    def view(x: Any, call: str, argument: str, stream: Stream | None) -> View:
        if forward_ad._current_level >= 0:
            _stand_in(x, call, argument, stream)
        if x.requires_grad and torch.is_grad_enabled():
            _stand_in(x, call, argument, stream)
            raise requires_grad(call, argument)
        known = names.get(x.dtype)
        if known is None:
            raise wrong_dtype(str(x.dtype).removeprefix("torch."), call, argument, x)
        name, size = known
        on_device = x.is_cuda
        if is_hip or not (on_device or x.is_cpu):
            _stand_in(x, call, argument, stream)
            return DLPACK.view(x.detach(), call, argument, stream)      # whose error names the device
        try:
            ptr, shape, strides = x.data_ptr(), tuple(x.shape), in_bytes(x.stride(), size)
        except RuntimeError as error:                       # sparse, functorch's wrappers, ...
            _stand_in(x, call, argument, stream)
            raise cannot(x, error, call, argument) from error
        if x.is_neg() or (ptr == 0 and 0 not in shape):
            raise cannot(x, "it is a lazy negation; x.resolve_neg() works" if x.is_neg() else "it has no memory of its own", call, argument)
        if not on_device:
            return View(ptr, shape, strides, name, CPU, x)
        number = x.get_device()
        if stream is not None and stream.ordered_by is not mark and stream.device == number:
            streams.wait(stream, streams.normal(raw(number)))
        return View(ptr, shape, strides, name, ("cuda", number), x)

    def home(x: Any, call: str) -> Home | None:
        if modes() or traced() is not None:
            _stand_in(x, call, "q", None)
        if is_hip or not x.is_cuda:
            return None
        number = x.get_device()
        return new_tuple(Home, (number, raw(number) or LEGACY, mark))       # Home(...) takes twice as long

    def maker(x: Any, shape: Shape, dtype: str) -> Any:
        like = x.new_empty(shape, dtype=dtypes[dtype])
        like.untyped_storage().resize_(0)                   # what is kept has no memory
        return partial(torch.empty_like, like)              # 0.8 us; new_empty takes 0.9, and 1.6 for another dtype

    def empty(x: Any, shape: Shape, dtype: str, stream: Stream) -> Output:
        tensor = x.new_empty(shape, dtype=dtypes[dtype])
        found = View(tensor.data_ptr(), shape, in_bytes(tensor.stride(), ITEMSIZE[dtype]), dtype, ("cuda", stream.device), tensor)
        current = raw(stream.device) or LEGACY
        if current == stream.handle:
            return Output(found, tensor)
        if stream.handle == LEGACY or type(stream.owner) is torch.cuda.Stream:
            # so that the allocator waits for this stream before it reuses the memory
            tensor.record_stream(torch.cuda.default_stream(stream.device) if stream.handle == LEGACY else stream.owner)
            return Output(found, tensor)
        def finish(filled: Any) -> Any:                     # our stream may be destroyed before the memory is freed: the current one waits
            streams.wait(Stream(current, stream.device), stream.handle)
            return filled
        return Output(found, tensor, finish)

    def form(x: Any) -> Any:
        if x.requires_grad and torch.is_grad_enabled():
            return None
        return x.dtype, x.shape, x.stride(), x.device, x.is_neg(), x.requires_grad, x.is_inference()

    def current(x: Any) -> int:
        if modes() or forward_ad._current_level >= 0 or traced() is not None:
            return 0
        return (raw(x.get_device()) or LEGACY) if x.is_cuda else HOST

    def same(arrays: Sequence[Any]) -> Any:
        """The guard of torch.compile compares all that `form` has, in a fifth of its time, but for the grad mode."""
        check = guard(*arrays).check
        if any(x.requires_grad for x in arrays):
            return lambda *others: not torch.is_grad_enabled() and check(*others)
        return check

    def written(x: Any) -> Any:
        torch.autograd.graph.increment_version(x)           # so that a backward that has saved x raises
        return x

    return Library(view, home, empty, None if is_hip else Quick(form, torch.Tensor.data_ptr, current, maker, guard and same), written)


def _guard(torch: Any) -> Any:
    """What torch.compile compares its inputs with; None for a torch that has none of this kind, which has no public name."""
    try:
        guard = partial(torch._C._dynamo.guards.TensorGuards, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guard if guard().check() else None
    except (AttributeError, TypeError):
        return None


def _leave_alone(torch: Any) -> None:
    """Tell torch's compiler not to compile the public functions' frames, which it meets where its graph ended (signature.py).

    Without this the results are the same, but it tries each frame once. Nothing is imported for it.
    """
    known: Any = getattr(torch._C._dynamo, "eval_frame", None)
    if hasattr(known, "set_code_exec_strategy") and hasattr(known, "_FrameExecStrategy"):
        skip = known._FrameExecStrategy(known._FrameAction.SKIP, known._FrameAction.SKIP)
        for function in UNCOMPILED:
            known.set_code_exec_strategy(function.__code__, skip)


def _stand_in(x: Any, call: str, argument: str, stream: Stream | None) -> Any:
    """TypeError where x is no array, or where a framework records or transforms what is done with it."""
    found = words.transformed(x)
    if found is not None:
        raise TypeError(message(call, argument, found[0], "an array in memory of its own", found[1]))


# ---------------------------------------------------------------- CuPy
def _cupy(cupy: Any) -> Library:
    mark = "cupy"

    def current(device: int) -> int:
        return streams.normal(cupy.cuda.get_current_stream(device).ptr)

    def view(x: Any, call: str, argument: str, stream: Stream | None) -> View:
        memory = x.data
        number = memory.device_id
        if stream is not None and stream.ordered_by is not mark and stream.device == number:
            streams.wait(stream, current(number))
        return View(memory.ptr, x.shape, x.strides, dtype_name(x.dtype, call, argument, x), ("cuda", number), x)

    def home(x: Any, call: str) -> Home:
        number = x.data.device_id
        return Home(number, current(number), mark)

    def empty(x: Any, shape: Shape, dtype: str, stream: Stream) -> Output:
        if dtype in EIGHT_BIT:                              # CuPy has none
            return empty_device_array(x, shape, dtype, stream)
        with contextlib.ExitStack() as inside:
            if cupy.cuda.runtime.getDevice() != stream.device:
                inside.enter_context(cupy.cuda.Device(stream.device))
            if current(stream.device) != stream.handle:     # so that the pool reuses the memory in our stream's order
                foreign = getattr(cupy.cuda.Stream, "from_external", None)
                inside.enter_context(foreign(stream) if foreign else cupy.cuda.ExternalStream(stream.handle, stream.device))
            array = cupy.empty(shape, numpy_dtype(dtype))
        return Output(View(array.data.ptr, shape, array.strides, dtype, ("cuda", stream.device), array), array)

    def maker(x: Any, shape: Shape, dtype: str) -> Any:
        return partial(cupy.empty, shape, numpy_dtype(dtype))

    def form(x: Any) -> Any:
        return x.dtype, x.shape, x.strides, x.data.device_id

    def address(x: Any) -> int:
        return x.data.ptr  # type: ignore[no-any-return]

    def here(x: Any) -> int:
        number = x.data.device_id
        return current(number) if cupy.cuda.runtime.getDevice() == number else 0    # else `maker` would be on another device

    return Library(view, home, empty, Quick(form, address, here, maker))


# ---------------------------------------------------------------- Numba
def _numba_empty(x: Any, shape: Shape, dtype: str, stream: Stream) -> Output:
    """A Numba device array bound to our stream, so that `copy_to_host` waits for our work. A DeviceArray of 8-bit floats.

    In a graph capture pass out=: Numba's allocator cannot be captured.
    """
    if dtype in EIGHT_BIT:
        return empty_device_array(x, shape, dtype, stream)
    cuda = sys.modules["numba.cuda"]
    with cuda.gpus[stream.device]:
        if stream.handle == LEGACY:
            bound = 0
        else:
            bound = cuda.per_thread_default_stream() if stream.handle == PER_THREAD else cuda.external_stream(stream.handle)
        array = cuda.device_array(shape, np.dtype(dtype), stream=bound)
    ptr = array.__cuda_array_interface__["data"][0]
    return Output(View(ptr, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, ("cuda", stream.device), array), array)


# ---------------------------------------------------------------- cuda.core and our own
def _memory_view(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    """cuda.core's StridedMemoryView, strides in elements. It names no stream: ordering its work is its maker's."""
    if x.dtype is None:
        raise TypeError(message(call, argument, "is a StridedMemoryView without a dtype", "one with a dtype",
                                "StridedMemoryView.from_buffer(buffer, shape, dtype=...) takes one"))
    name = dtype_name(x.dtype, call, argument, x)
    size, shape = ITEMSIZE[name], tuple(x.shape)
    strides = contiguous(shape, size) if x.strides is None else tuple([s * size for s in x.strides])
    return View(x.ptr, shape, strides, name, CPU if x.device_id < 0 else ("cuda", x.device_id), x, bool(x.readonly))


def _memory_view_home(x: Any, call: str) -> Home | None:
    return None if x.device_id < 0 else Home(x.device_id, LEGACY)


def _bare_buffer(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    raise TypeError(message(call, argument, "is a cuda.core Buffer, bytes without shape and dtype", "an array",
                            f"StridedMemoryView.from_buffer({argument}, shape, dtype=...) of cuda.core.utils makes one"))


def _device_array(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    if stream is not None and stream.device == x.stream.device:
        streams.wait(stream, x.stream.handle)
    found: View = x.view()
    return found
