"""CUDA arrays without a GPU: a fake driver, fake libraries and an engine that
records its calls. gpu/test_arrays.py has the real ones."""
from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import memo, registry, repeat
from fastattn.arrays import convert, dlpack, libraries, readers
from fastattn.arrays.convert import allocate, view
from fastattn.arrays.device_array import DeviceArray
from fastattn.arrays.streams import Stream
from fastattn.arrays.view import ITEMSIZE, View, contiguous, numpy_dtype
from fastattn.engine import _loaded as loaded
from fastattn.memo import Recent
from fastattn.problem import Grads, Operands
from tests.tools.fake_cuda import Cuda, Driver, Speaker, waits

Q, K = (2, 6, 4, 8), (2, 9, 2, 8)
DTYPES = list(ITEMSIZE)


class Recorder:
    """An engine for CUDA memory that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def supports(self, problem: Any) -> str | None:
        return None

    def forward(self, problem: Any, operands: Any, out: Any, lse: Any, stream: int) -> None:
        self.calls.append((problem, operands, out, lse, stream))

    def backward(self, problem: Any, operands: Any, dout: Any, out: Any, lse: Any, dlse: Any, grads: Any, stream: int,
                 deterministic: bool) -> None:
        self.calls.append((problem, grads, stream, deterministic))


@pytest.fixture
def engine(driver: Driver) -> Iterator[Recorder]:
    recorder = Recorder()
    with fastattn.register_engine("recorder", recorder.forward, recorder.backward, recorder.supports).activate():
        yield recorder


# ---------------------------------------------------------------- inputs
def test_interface_producers_are_waited_for(driver: Driver) -> None:
    on = Stream(0x50, 0)
    view(Cuda(driver, (2,), stream=0x50), "f", "x", on)
    view(Cuda(driver, (2,)), "f", "x", on)
    view(Cuda(driver, (2,), 0x2000, stream=0x60, device=1), "f", "x", on)   # another device: refused later, by name
    assert waits(driver) == []
    view(Cuda(driver, (2,), stream=0x60), "f", "x", on)
    view(Cuda(driver, (2,), stream=1), "f", "x", on)
    assert waits(driver) == [(0x50, 0x60), (0x50, 1)]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_dlpack_producers_are_given_the_stream(driver: Driver, name: str, old: bool) -> None:
    x = Speaker((2, 3, 4), dtype=name, device=1, old=old)
    v = view(x, "f", "x", Stream(0x50, 1))
    assert (v.ptr, v.shape, v.dtype, v.device, v.readonly) == (0x1000, (2, 3, 4), name, ("cuda", 1), old)
    assert v.strides == contiguous(v.shape, ITEMSIZE[name])
    view(x, "f", "x", Stream(1, 1))
    view(x, "f", "x", Stream(0x50, 0))                      # another device: no stream of it is known, and it is refused later
    view(x, "f", "x")
    assert x.streams == [0x50, 1, "none", "none"]


def test_dlpack_device_errors() -> None:
    class Sharded(Speaker):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("__dlpack__ only supported for unsharded arrays.")

    with pytest.raises(TypeError, match=r"f\(\): x \(Sharded\) cannot be exported: .* unsharded"):
        view(Sharded((2,)), "f", "x")
    with pytest.raises(TypeError, match=r"attention\(\): q \(Sharded\) cannot be exported"):
        fastattn.attention(Sharded(Q), Sharded(K), Sharded(K))


class Tensor:
    """The part of a CUDA torch tensor that fastattn reads."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "bfloat16", ptr: int = 0x1000, device: int = 0) -> None:
        self.shape, self.dtype, self.ptr, self.number, self.device = shape, dtype, ptr, device, f"cuda:{device}"
        self.requires_grad, self.is_cuda, self.is_cpu, self.negative, self.recorded, self._version = False, True, False, False, [], 0

    def data_ptr(self) -> int:
        return self.ptr

    def get_device(self) -> int:
        return self.number

    def stride(self) -> tuple[int, ...]:
        return contiguous(self.shape, 1)

    def is_neg(self) -> bool:
        return self.negative

    def new_empty(self, *shape: Any, dtype: str | None = None) -> Tensor:
        shape = shape if isinstance(shape[0], int) else shape[0]
        return Tensor(shape, dtype or self.dtype, 0x9000, self.number)

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class TorchStream:
    cuda_stream = 0x50


@pytest.fixture
def torch_streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Makes Tensor a torch tensor; the current stream of each device."""
    current = {0: 0, 1: 0}
    cuda = types.SimpleNamespace(default_stream=lambda n: ("default", n), Stream=TorchStream)
    inside = types.SimpleNamespace(_cuda_getCurrentRawStream=current.__getitem__, _len_torch_dispatch_stack=lambda: 0,
                                   _get_tracing_state=lambda: None)
    autograd = types.SimpleNamespace(forward_ad=types.SimpleNamespace(_current_level=-1), graph=types.SimpleNamespace(
        increment_version=lambda x: setattr(x, "_version", x._version + 1)))
    torch = types.SimpleNamespace(_C=inside, cuda=cuda, version=types.SimpleNamespace(hip=None), autograd=autograd,
                                  is_grad_enabled=lambda: True, **{name: name for name in ITEMSIZE})
    monkeypatch.setitem(readers.by_type, Tensor, libraries._torch(torch))
    return current


def test_torch_views(driver: Driver, torch_streams: dict[int, int]) -> None:
    x = Tensor((2, 3), "float16", device=1)
    v = view(x, "f", "x")
    assert (v.ptr, v.shape, v.strides, v.dtype, v.device, v.readonly) == (0x1000, (2, 3), (6, 2), "float16", ("cuda", 1), False)
    torch_streams[1] = 0x60
    found = convert.resolve(None, x, "f")
    assert found is not None and (found.handle, found.device) == (0x60, 1)
    view(x, "f", "x", found)
    view(x, "f", "x", Stream(0x50, 0))
    assert driver.log == []
    view(x, "f", "x", Stream(0x50, 1))                      # q of another library: torch's current stream is waited for
    assert waits(driver) == [(0x50, 0x60)]
    x.negative = True
    with pytest.raises(TypeError, match=r"x \(Tensor\) cannot be exported: it is a lazy negation; x\.resolve_neg\(\) works"):
        view(x, "f", "x")
    with pytest.raises(TypeError, match="it has no memory of its own"):
        view(Tensor((2, 3), ptr=0), "f", "x")
    assert view(Tensor((0, 3), ptr=0), "f", "x").shape == (0, 3)
    with pytest.raises(TypeError, match="x has dtype uint8; expected float32"):
        view(Tensor((2,), "torch.uint8"), "f", "x")
    x.requires_grad = True
    with pytest.raises(TypeError, match=r"x requires grad.*pass x\.detach\(\)"):
        view(x, "f", "x")


def test_torch_explicit_stream(driver: Driver, torch_streams: dict[int, int], engine: Recorder) -> None:
    """The given stream waits once for torch's. If torch owns it, the results are
    marked as used on it; else torch's stream waits for it."""
    q, k, given = Tensor(Q), Tensor(K), TorchStream()
    out, lse = fastattn.attention(q, k, k, stream=given, return_lse=True)
    assert waits(driver) == [(0x50, 1)] and engine.calls[-1][-1] == 0x50
    assert isinstance(out, Tensor) and (out.shape, out.dtype, lse.shape, lse.dtype) == (Q, "bfloat16", (2, 4, 6), "float32")
    assert out.recorded == lse.recorded == [given]
    torch_streams[0] = 0x60
    assert fastattn.attention(q, k, k, stream=0).recorded == [("default", 0)] and engine.calls[-1][-1] == 1
    driver.log.clear()
    for foreign in (2, 0x70):
        driver.log.clear()
        assert fastattn.attention(q, k, k, stream=foreign).recorded == []
        assert waits(driver) == [(foreign, 0x60), (0x60, foreign)]
    driver.log.clear()
    assert fastattn.attention(q, k, k).recorded == [] and driver.log == [] and engine.calls[-1][-1] == 0x60


def test_torch_devices(driver: Driver, torch_streams: dict[int, int], engine: Recorder) -> None:
    q, k = Tensor(Q, device=1), Tensor(K, device=1)
    assert fastattn.attention(q, k, k).number == 1
    with pytest.raises(ValueError, match=r"v is on device \('cuda', 0\); expected q's device, \('cuda', 1\)"):
        fastattn.attention(q, k, Tensor(K))
    others = {"bias": Tensor((6, 9)), "mask": Tensor((6, 9), "bool"), "sinks": Tensor((4,)), "alibi_slopes": Tensor((4,), "float32")}
    for name, x in others.items():
        with pytest.raises(ValueError, match=rf"{name} is on device \('cuda', 0\); expected q's device, \('cuda', 1\)"):
            fastattn.attention(q, k, k, **{name: x})
    with pytest.raises(ValueError, match=r"out is on device \('cuda', 0\); expected q's device"):
        fastattn.attention(q, k, k, out=Tensor(Q))


def test_cupy(monkeypatch: pytest.MonkeyPatch, driver: Driver, engine: Recorder) -> None:
    """A minimal fake CuPy: results are allocated on q's device, in the pool of the call's stream."""
    entered: list[Any] = []
    current = {0: 0, 1: 0x60}

    class Inside:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            entered.append(self.what)

        def __exit__(self, *error: object) -> None:
            entered.append("out")

    class Array:
        def __init__(self, shape: tuple[int, ...], dtype: Any, device: int) -> None:
            self.shape, self.dtype = shape, np.dtype(dtype)
            self.strides = contiguous(shape, self.dtype.itemsize)
            self.data = types.SimpleNamespace(ptr=0x1000, device_id=device)

    cuda = types.SimpleNamespace(get_current_stream=lambda n: types.SimpleNamespace(ptr=current[n]), Device=lambda n: Inside("device", n),
                                 runtime=types.SimpleNamespace(getDevice=lambda: 0),
                                 Stream=types.SimpleNamespace(from_external=lambda s: Inside("stream", s.__cuda_stream__()[1])))
    cupy = types.SimpleNamespace(cuda=cuda, empty=lambda shape, dtype: Array(shape, dtype, 1))
    monkeypatch.setitem(readers.by_type, Array, libraries._cupy(cupy))
    q, k = (Array(shape, numpy_dtype("bfloat16"), 1) for shape in (Q, K))
    out = fastattn.attention(q, k, k)
    assert isinstance(out, Array) and out.dtype == q.dtype and engine.calls[-1][-1] == 0x60
    assert entered == [("device", 1), "out"] and driver.log == []
    entered.clear()
    fastattn.attention(q, k, k, stream=0x50)
    assert entered == [("device", 1), ("stream", 0x50), "out", "out"] and waits(driver) == [(0x50, 0x60)]
    with pytest.raises(TypeError, match="q has dtype complex64; expected float32"):
        fastattn.attention(Array(Q, "complex64", 1), k, k)


def test_strided_memory_view() -> None:
    utils = pytest.importorskip("cuda.core.utils")
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2]
    v = view(utils.StridedMemoryView.from_any_interface(x, stream_ptr=-1), "f", "x")
    assert (v.ptr, v.shape, v.strides, v.dtype, v.device) == (x.ctypes.data, x.shape, x.strides, "float32", ("cpu", 0))


def test_cuda_core_buffer_has_no_shape() -> None:
    class Buffer:
        __module__ = "cuda.core._memory._buffer"

    with pytest.raises(TypeError, match=r"q is a cuda\.core Buffer, bytes without shape and dtype; .*View\.from_buffer\(q, shape"):
        fastattn.attention(Buffer(), Buffer(), Buffer())


# ---------------------------------------------------------------- outputs of our own
@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_device_array_round_trip(driver: Driver, name: str, versioned: bool) -> None:
    x = DeviceArray((2, 3), name, Stream(0x50, 1))
    ptr = x.view().ptr
    assert driver.log == [("alloc", 1, 6 * ITEMSIZE[name], 0x50)] and driver.contexts == [0]
    assert (x.ndim, x.size, x.nbytes, x.strides) == (2, 6, 6 * ITEMSIZE[name], (3 * ITEMSIZE[name], ITEMSIZE[name]))
    if name == "bfloat16":
        assert not hasattr(x, "__cuda_array_interface__")
    else:
        interface = x.__cuda_array_interface__
        assert np.dtype(interface["typestr"]).name == name and interface["data"] == (ptr, False) and interface["stream"] == 0x50
    capsule = x.__dlpack__(stream=0x50, max_version=(1, 0) if versioned else None)
    tensor, readonly = dlpack.opened(capsule)
    assert (tensor.data, tensor.device_type, tensor.device_id, tensor.ndim, readonly) == (ptr, 2, 1, 2, not versioned)
    assert dlpack.DTYPES[tensor.code, tensor.bits] == name and tensor.shape[:2] == [2, 3] and tensor.strides[:2] == [3, 1]
    del x
    gc.collect()
    assert ptr in driver.memory                             # the capsule holds it
    del capsule
    gc.collect()
    assert ptr not in driver.memory and driver.log[-1] == ("free", 1, 0x50)


def test_device_array_is_read_by_its_own_kind(driver: Driver) -> None:
    x = DeviceArray((2, 3), "bfloat16", Stream(0x50, 0))
    v = view(x, "f", "x", Stream(0x60, 0))
    assert (v.ptr, v.dtype, v.device, v.readonly) == (x.view().ptr, "bfloat16", ("cuda", 0), False)
    assert waits(driver) == [(0x60, 0x50)]
    ours = convert.resolve(None, x, "f")
    assert ours is not None and ours.handle == 0x50
    assert isinstance(allocate(x, (2,), "float32", ours).finish(), DeviceArray)


def test_consumers_wait_for_device_arrays(driver: Driver) -> None:
    x = DeviceArray((2, 3), "float32", Stream(0x50, 0))
    for stream in (-1, 0x50):
        x.__dlpack__(stream=stream)
    assert waits(driver) == []
    x.__dlpack__()
    x.__dlpack__(stream=2, dl_device=(2, 0), copy=False)
    assert waits(driver) == [(1, 0x50), (2, 0x50)]
    for keywords in ({"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}):
        with pytest.raises(BufferError, match="without a copy, on its own device"):
            x.__dlpack__(**keywords)
    with pytest.raises(ValueError, match="stream 0 is ambiguous"):
        x.__dlpack__(stream=0)


def test_device_array_without_elements(driver: Driver) -> None:
    x = DeviceArray((0, 3), "float16", Stream(1, 0))
    tensor, _ = dlpack.opened(x.__dlpack__(max_version=(1, 0)))
    assert tensor.data == x.view().ptr != 0 and tensor.shape[:2] == [0, 3] and x.nbytes == 0


def test_device_arrays_and_graphs(driver: Driver) -> None:
    """No DeviceArray is allocated while its stream is captured. One dropped during
    a capture is freed after it, not by every replay."""
    x = DeviceArray((4,), "float32", Stream(0x50, 0))
    ptr = x.view().ptr
    driver.capturing = {0x50}
    with pytest.raises(fastattn.UnsupportedError, match=r"stream 0x50 is being captured .* pass out="):
        DeviceArray((4,), "float32", Stream(0x50, 0))
    del x
    gc.collect()
    assert ptr in driver.memory
    driver.capturing = set()
    DeviceArray((4,), "float32", Stream(0x60, 0))
    assert [entry for entry in driver.log if entry[0] == "free"] == [("free", 0, 0x50), ("free", 0, 0x60)]


# ---------------------------------------------------------------- a call
def test_interface_call(driver: Driver, engine: Recorder) -> None:
    q, k = Cuda(driver, Q, stream=0x60, device=1), Cuda(driver, K, 0x2000, stream=0x70, device=1)
    out, lse = fastattn.attention(q, k, k, return_lse=True)
    problem, operands, out_view, lse_view, stream = engine.calls[-1]
    assert stream == 0x60 and operands.k.ptr == 0x2000 and problem.seqlen_k == 9
    assert isinstance(out, DeviceArray) and (out.shape, out.dtype, lse.dtype) == (Q, "float32", "float32")
    assert out_view.ptr == out.view().ptr and out_view.device == ("cuda", 1) and lse_view.shape == (2, 4, 6)
    assert waits(driver) == [(0x60, 0x70)] * 2
    out = fastattn.attention(Cuda(driver, (2, 4, 6, 8)), Cuda(driver, (2, 2, 9, 8)), Cuda(driver, (2, 2, 9, 8)), layout="bhsd")
    assert engine.calls[-1][2].shape == Q and engine.calls[-1][2].strides == (768, 32, 192, 4) and out.shape == (2, 4, 6, 8)


class Immutable(Speaker):
    """An array-API library like JAX: from_dlpack is the only way in."""

    imported: list[Any] = []  # noqa: RUF012

    class Library:
        @staticmethod
        def from_dlpack(x: Any) -> Immutable:
            Immutable.imported.append((x, x.__dlpack__(stream=0x80)))
            return Immutable(x.shape, x.view().ptr, x.dtype)

    def __array_namespace__(self) -> type[Library]:
        return self.Library


def test_results_in_the_library_of_an_array_namespace(driver: Driver, engine: Recorder) -> None:
    q, k = Immutable(Q, dtype="bfloat16"), Immutable(K, dtype="bfloat16")
    out, lse = fastattn.attention(q, k, k, return_lse=True, stream=0x50)
    assert isinstance(out, Immutable) and isinstance(lse, Immutable) and q.streams == [0x50] and k.streams == [0x50, 0x50]
    assert waits(driver) == [(0x80, 0x50)] * 2             # only the importer waits for the call
    assert engine.calls[-1][2].ptr == out.ptr
    Immutable.imported.clear()


def test_backward_call(driver: Driver, engine: Recorder) -> None:
    q, k, lse, sinks = Cuda(driver, Q), Cuda(driver, K), Cuda(driver, (2, 4, 6)), Cuda(driver, (4,))
    grads = fastattn.attention_backward(q, q, k, k, q, lse, sinks=sinks, bias=Cuda(driver, (6, 9)), need_dbias=True, deterministic=True)
    _, places, stream, deterministic = engine.calls[-1]
    assert (stream, deterministic) == (1, True) and places.dbias.shape == (1, 1, 6, 9)
    assert [x.shape for x in grads] == [Q, K, K, (6, 9), (4,)] and all(isinstance(x, DeviceArray) for x in grads)
    fastattn.attention_backward(q, q, k, k, q, lse, stream=0x50)
    assert engine.calls[-1][2:] == (0x50, False)


def test_cpu_engines_get_no_stream() -> None:
    x = np.ones((1, 4, 1, 8), np.float32)
    out, lse = fastattn.attention(x, x, x, return_lse=True, engine="reference")
    a, b = (fastattn.attention_backward(x, x, x, x, out, lse, deterministic=d, engine="reference") for d in (False, True))
    np.testing.assert_array_equal(a.dk, b.dk)


def test_packed_call_reads_nothing_back(driver: Driver, engine: Recorder) -> None:
    q, k, cu = Cuda(driver, (10, 4, 8)), Cuda(driver, (12, 2, 8)), Cuda(driver, (3,), 0x3000, typestr="<i4")
    out = fastattn.attention_varlen(q, k, k, cu, cu, seqused_k=Cuda(driver, (2,), 0x4000, typestr="<i4"))
    problem = engine.calls[-1][0]
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k, out.shape) == (2, 10, 12, (10, 4, 8))
    fastattn.attention_varlen(q, k, k, cu, cu, max_seqlen_q=6, max_seqlen_k=7)
    assert (engine.calls[-1][0].seqlen_q, engine.calls[-1][0].seqlen_k) == (6, 7)


def test_host_data_is_not_uploaded(driver: Driver, engine: Recorder) -> None:
    q, k = Cuda(driver, Q, device=1), Cuda(driver, K, 0x2000, device=1)
    for name in ("alibi_slopes", "sinks"):
        with pytest.raises(TypeError, match=rf"{name} is a list; expected an array on q's device, \('cuda', 1\); make it once"):
            fastattn.attention(q, k, k, **{name: [1.0] * 4})
        with pytest.raises(ValueError, match=rf"{name} is on device \('cpu', 0\); expected q's device, \('cuda', 1\)"):
            fastattn.attention(q, k, k, **{name: np.ones(4, np.float32)})
    packed = Cuda(driver, (10, 4, 8)), Cuda(driver, (12, 2, 8))
    with pytest.raises(TypeError, match="cu_seqlens_q is a tuple; expected an array on q's device"):
        fastattn.attention_varlen(packed[0], packed[1], packed[1], (0, 10), (0, 12))
    cu = np.array([0, 10]), np.array([0, 12])
    with pytest.raises(ValueError, match=r"cu_seqlens_q is on device \('cpu', 0\); expected q's device"):
        fastattn.attention_varlen(packed[0], packed[1], packed[1], *cu)
    assert engine.calls == []


def test_out_in_cuda_memory(driver: Driver, engine: Recorder) -> None:
    """Slices of one buffer that share no element are fine; the addresses alone decide."""
    wide = (6 * 8 * 8 * 4, 8 * 8 * 4, 8 * 4, 4)
    q = Cuda(driver, (2, 6, 4, 8), 0x10000, strides=wide)
    beside, onto = (Cuda(driver, (2, 6, 4, 8), 0x10000 + 4 * heads * 8, strides=wide) for heads in (4, 3))
    assert fastattn.attention(q, q, q, out=beside) is beside
    assert engine.calls[-1][2].ptr == 0x10000 + 128 and driver.memory == {}
    with pytest.raises(ValueError, match="out shares memory with q; expected memory of its own"):
        fastattn.attention(q, q, q, out=onto)
    packed, cu = Cuda(driver, (10, 4, 8), 0x50000), Cuda(driver, (3,), 0x60000, typestr="<i4")
    with pytest.raises(ValueError, match="out shares memory with cu_seqlens_q"):
        fastattn.attention_varlen(packed, packed, packed, cu, cu, out=Cuda(driver, (10, 4, 8), 0x60000))


def test_remembered_problems_are_equal_and_checked_as_much(driver: Driver, engine: Recorder) -> None:
    q, k = Cuda(driver, Q), Cuda(driver, K)
    for _ in range(2):
        fastattn.attention(q, k, k, causal=True, window=(1, None), softmax_scale=1.0)
    assert engine.calls[0][0] is engine.calls[1][0]
    for changes in ({"causal": 1}, {"window": (1.0, None)}, {"window": [1.0, None]}, {"softmax_scale": True}, {"causal": [True]}):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, k, k, **({"causal": True, "window": (1, None), "softmax_scale": 1.0} | changes))
    fastattn.attention(q, k, k, causal=True, window=(1, None), softmax_scale=0.5)
    assert engine.calls[-1][0].score.softmax_scale == 0.5


def test_zero_sizes(driver: Driver, engine: Recorder) -> None:
    q, k = Cuda(driver, (0, 6, 4, 8), 0), Cuda(driver, (0, 9, 2, 8), 0)
    assert fastattn.attention(q, k, k).shape == (0, 6, 4, 8)
    q, k = Cuda(driver, (2, 6, 4, 8), device=1), Cuda(driver, (2, 0, 2, 8), 0)
    assert fastattn.attention(q, k, k).shape == (2, 6, 4, 8) and engine.calls[-1][1].k.device == ("cuda", 1)


def test_merge_states(driver: Driver, torch_streams: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU engine is given; its kernels are tested in gpu/test_merge.py."""
    calls: list[Any] = []
    monkeypatch.setitem(loaded, "gpu", types.SimpleNamespace(merge_states=lambda *where: calls.append(where)))
    parts = [Tensor((2, 4, 6, 8), ptr=ptr) for ptr in (0x1000, 0x2000)]
    lses = [Tensor((2, 4, 6), "float32", ptr=ptr) for ptr in (0x3000, 0x4000)]
    torch_streams[0] = 0x60
    out, lse = fastattn.merge_states(parts, lses, layout="bhsd")
    assert isinstance(out, Tensor) and (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 4, 6, 8), "bfloat16", (2, 4, 6), "float32")
    [(outs, given_lses, place, lse_place, stream)] = calls
    assert [(x.ptr, x.shape, x.strides) for x in outs] == [(ptr, (2, 6, 4, 8), (384, 16, 96, 2)) for ptr in (0x1000, 0x2000)]
    assert [x.ptr for x in given_lses] == [0x3000, 0x4000] and stream == 0x60
    assert (place.shape, place.strides, lse_place.shape) == ((2, 6, 4, 8), (384, 16, 96, 2), (2, 4, 6))
    fastattn.merge_states(parts, lses, layout="bhsd", stream=0x70)
    assert calls[-1][-1] == 0x70 and waits(driver) == [(0x70, 0x60), (0x60, 0x70), (0x60, 0x70)]
    with pytest.raises(ValueError, match=r"lses\[1\] is on device \('cuda', 1\)"):
        fastattn.merge_states(parts, [lses[0], Tensor((2, 4, 6), "float32", device=1)], layout="bhsd")
    with pytest.raises(ValueError, match=r"outs\[1\] is on device \('cpu', 0\)"):
        fastattn.merge_states([Cuda(driver, Q), np.zeros(Q, np.float32)], [Cuda(driver, (2, 4, 6))] * 2)
    with pytest.raises(ValueError, match="stream is 112; expected None, because q is in host memory"):
        fastattn.merge_states([np.zeros(Q, np.float32)], [np.zeros((2, 4, 6), np.float32)], stream=0x70)
    assert len(calls) == 2


# ---------------------------------------------------------------- repeated calls
class Prepared(Recorder):
    """An engine that says what it launches, and records the calls that were checked in full."""

    def __init__(self) -> None:
        super().__init__()
        self.long = 0

    def forward(self, problem: Any, *where: Any) -> None:
        self.long += 1
        super().forward(problem, *where)

    def backward(self, problem: Any, *where: Any) -> None:
        self.long += 1
        self.calls.append((problem, *where))

    def prepare(self, problem: Any, o: Any, *results: Any) -> Any:
        def record(operands: Operands, views: list[Any], stream: int) -> None:
            self.calls.append((problem, operands, *views, stream))
        return self._run(o, results, record)

    def prepare_backward(self, problem: Any, o: Any, *where: Any) -> Any:
        *given, grads, deterministic = where

        def record(operands: Operands, views: list[Any], stream: int) -> None:
            self.calls.append((problem, operands, *views[:4], Grads(*views[4:]), stream, deterministic))
        return self._run(o, (*given, *grads), record)

    def _run(self, o: Any, others: Any, record: Any) -> Any:
        """A launch that records the views at the addresses that it is given."""
        names = o.__slots__
        forms = [x and (x.shape, x.strides, x.dtype, x.device) for x in (*[getattr(o, name) for name in names], *others)]

        def run(addresses: Any, stream: int) -> None:
            given = iter(addresses)
            views = [form and View(next(given), *form) for form in forms]
            assert next(given, None) is None
            record(Operands(*views[:len(names)]), views[len(names):], stream)
        return run


@pytest.fixture
def prepared(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    engine = Prepared()
    monkeypatch.setattr(repeat, "_known", Recent())
    monkeypatch.setattr(registry, "_runs", {(None, "cuda"): engine})
    return engine


def seen(call: Any) -> Any:
    """An engine's arguments as numbers: views without their owners."""
    if isinstance(call, View):
        return call.ptr, call.shape, call.strides, call.dtype, call.device
    if isinstance(call, Operands):
        return [seen(getattr(call, name)) for name in call.__slots__]
    return [seen(x) for x in call] if isinstance(call, tuple) else call


@pytest.mark.parametrize("keywords", [{}, {"return_lse": True}, {"layout": "bhsd"}, {"causal": True, "window": (3, None), "softcap": 2.0},
                                      {"dropout_p": 0.5, "seed": 3}])
def test_repeated_calls_skip_the_checks(torch_streams: dict[int, int], prepared: Prepared, keywords: dict[str, Any]) -> None:
    """The third equal call skips the checks. Engine and caller get the same
    as before, and the stream is the current one."""
    shapes = ((2, 4, 6, 8), (2, 2, 9, 8)) if keywords.get("layout") else (Q, K)
    for n in range(4):
        q, k, v = (Tensor(shape, ptr=ptr) for shape, ptr in zip((shapes[0], *shapes[1:] * 2), (0x1000, 0x2000, 0x3000), strict=True))
        result = fastattn.attention(q, k, v, **keywords)
        out, lse = result if keywords.get("return_lse") else (result, None)
        assert isinstance(out, Tensor) and (out.shape, out.dtype) == (q.shape, "bfloat16")
        assert lse is None or (lse.shape, lse.dtype) == ((2, 4, 6), "float32")
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    torch_streams[0] = 0x60
    fastattn.attention(Tensor(shapes[0], ptr=0x5000), k, v, **keywords)
    assert prepared.long == 2 and prepared.calls[-1][1].q.ptr == 0x5000 and prepared.calls[-1][-1] == 0x60


@pytest.mark.parametrize("keywords", [{}, {"layout": "bhsd"}, {"causal": True, "softcap": 2.0}, {"deterministic": True},
                                      {"dlse": True, "dropout_p": 0.5, "seed": 3}, {"packed": True},
                                      {"packed": True, "used": True, "dlse": True}], ids=str)
def test_repeated_backwards_skip_the_checks(torch_streams: dict[int, int], prepared: Prepared, keywords: dict[str, Any]) -> None:
    """The same of backwards, dense and packed."""
    keywords = dict(keywords)
    packed, used, with_dlse = (keywords.pop(name, False) for name in ("packed", "used", "dlse"))
    if packed:
        q_shape, k_shape, lse_shape = (12, 4, 8), (18, 2, 8), (4, 12)
    else:
        q_shape, k_shape, lse_shape = *(((2, 4, 6, 8), (2, 2, 9, 8)) if keywords.get("layout") else (Q, K)), (2, 4, 6)

    def once(first: int, dlse: bool = with_dlse, **changed: Any) -> Any:
        shapes = (q_shape, q_shape, k_shape, k_shape, q_shape, lse_shape, lse_shape)
        dout, q, k, v, out, lse, x = (Tensor(shape, "float32" if shape == lse_shape else "bfloat16", ptr=first + 0x1000 * n)
                                      for n, shape in enumerate(shapes))
        more = (keywords | changed) | ({"dlse": x} if dlse else {})
        if not packed:
            return fastattn.attention_backward(dout, q, k, v, out, lse, **more)
        lengths = [Tensor((3,), "int32", ptr=first + 0x8000), Tensor((3,), "int32", ptr=first + 0x9000)]
        if used:
            more["seqused_k"] = Tensor((2,), "int32", ptr=first + 0xA000)
        return fastattn.attention_varlen_backward(dout, q, k, v, out, lse, *lengths, **more)
    for n in range(4):
        grads = once(0x100000)
        assert [(x.shape, x.dtype) for x in grads[:3]] == [(shape, "bfloat16") for shape in (q_shape, k_shape, k_shape)]
        assert type(grads) is Grads and grads.dbias is None and grads.dsinks is None
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    torch_streams[0] = 0x60
    once(0x200000)
    assert prepared.long == 2 and prepared.calls[-1][-2] == 0x60 and prepared.calls[-1][1].k.ptr == 0x202000
    once(0x200000, dlse=not with_dlse)
    once(0x200000, deterministic=not keywords.get("deterministic", False))
    once(0x200008)                                          # aligned to less
    once(0x200000, softmax_scale=1.0)
    once(0x200000, stream=0x70)
    assert prepared.long == 7 and prepared.calls[-1][-2] == 0x70
    with pytest.raises(ValueError, match="need_dbias"):
        once(0x200000, need_dbias=True)
    once(0x300000)
    assert prepared.long == 7


OPERANDS = {"bias": ((1, 4, 6, 9), "bfloat16"), "mask": ((2, 1, 1, 9), "bool"), "alibi_slopes": ((4,), "float32"),
            "sinks": ((4,), "float32")}


@pytest.mark.parametrize("names", [("bias",), ("mask", "alibi_slopes"), ("sinks",), ("bias", "mask", "alibi_slopes", "sinks")], ids=str)
def test_repeated_calls_with_operands_of_scores(torch_streams: dict[int, int], prepared: Prepared, names: tuple[str, ...]) -> None:
    def once(first: int, leave_out: str = "", **more: Any) -> Any:
        operands = {name: Tensor(*OPERANDS[name], ptr=first + 0x1000 * n) for n, name in enumerate(OPERANDS)
                    if name in names and name != leave_out}
        q, k, v, out, lse = (Tensor(shape, kind, ptr=first + 0x10000 * n) for n, (shape, kind) in enumerate(
            ((Q, "bfloat16"), (K, "bfloat16"), (K, "bfloat16"), (Q, "bfloat16"), ((2, 4, 6), "float32")), start=1))
        if more:
            return fastattn.attention_backward(out, q, k, v, out, lse, **operands, **more)
        return fastattn.attention(q, k, v, **operands)
    for n in range(4):
        once(0x100000)
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    once(0x200000)
    o = prepared.calls[-1][1]
    assert prepared.long == 2 and all((getattr(o, name) is not None) == (name in names) for name in OPERANDS)
    assert all(getattr(o, name).ptr == 0x200000 + 0x1000 * n for n, name in enumerate(OPERANDS) if name in names)
    once(0x200000, leave_out=names[0])
    assert prepared.long == 3
    prepared.calls.clear()
    wants = {"need_dbias": "bias" in names}
    for n in range(4):
        grads = once(0x100000, causal=False, **wants)
        assert prepared.long == 3 + min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
        assert (grads.dbias is not None) == ("bias" in names) and (grads.dsinks is not None) == ("sinks" in names)
        assert grads.dbias is None or (grads.dbias.shape, grads.dbias.dtype) == OPERANDS["bias"]
        assert grads.dsinks is None or (grads.dsinks.shape, grads.dsinks.dtype) == OPERANDS["sinks"]


def test_what_is_stored_is_aligned(torch_streams: dict[int, int], prepared: Prepared) -> None:
    """A launch for arrays that are aligned to less is not repeated for others, nor the other way round."""
    for n, ptr in enumerate((0x1000, 0x1008, 0x1000, 0x1008, 0x1000)):
        fastattn.attention(Tensor(Q, ptr=ptr), Tensor(K), Tensor(K))
        assert prepared.long == (n + 1 if n < 4 else 4)


def test_a_call_that_differs_is_checked_in_full(torch_streams: dict[int, int], prepared: Prepared) -> None:
    q, k, v, usual = Tensor(Q), Tensor(K), Tensor(K), {"causal": True, "window": (1, None), "softmax_scale": 1.0}
    for _ in range(3):
        fastattn.attention(q, k, v, **usual)
    assert prepared.long == 2
    for changes in ({"causal": 1}, {"window": (1.0, None)}, {"softmax_scale": True}, {"causal": [True]},
                    {"window": [1.0, None]}, {"layout": "thd"}, {"layout": ["bshd"]}, {"dropout_p": False}, {"engine": "nobody"},
                    {"engine": ["cpu"]}, {"engine": "cpu"}):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, k, v, **(usual | changes))

    class Sparse(Tensor):
        def stride(self) -> tuple[int, ...]:
            raise RuntimeError("sparse tensors do not have strides")

    class Transformed(Tensor):
        def data_ptr(self) -> int:
            raise RuntimeError("cannot access data pointer")
    for kind in (Sparse, Transformed):
        readers.by_type[kind] = readers.by_type[Tensor]
        with pytest.raises(TypeError, match=r"\(Tensor\)|cannot be exported"):
            fastattn.attention(*[kind(shape) for shape in (Q, K, K)], **usual)
        del readers.by_type[kind]
    monkey = Tensor(K)
    monkey.data_ptr = Transformed.data_ptr.__get__(monkey)  # type: ignore[method-assign]
    for x, error in ((monkey, "cannot access data pointer"), (Tensor(K, ptr=0), "no memory of its own"), (Tensor(K, "float16"), "dtype"),
                     (Tensor(K, device=1), "device")):
        with pytest.raises((TypeError, ValueError), match=error):
            fastattn.attention(q, k, x, **usual)
    for name in ("requires_grad", "negative"):
        x = Tensor(K)
        setattr(x, name, True)
        with pytest.raises(TypeError):
            fastattn.attention(q, k, x, **usual)
    assert prepared.long == 2 and len(prepared.calls) == 3
    fastattn.attention(q, k, Tensor(K, ptr=0x1008), **usual)            # aligned to less
    fastattn.attention(q, k, v, **usual, stream=0x70)
    assert fastattn.attention(q, k, v, **usual, out=(out := Tensor(Q, ptr=0x8000))) is out and out._version == 1
    fastattn.attention(q, k, v, **usual, mask=Tensor((6, 9), "bool"))
    assert prepared.long == 6 and prepared.calls[-3][-1] == 0x70
    with fastattn.register_engine("other", (other := Recorder()).forward, None, other.supports).activate():
        fastattn.attention(q, k, v, **usual)
    assert prepared.long == 6 and len(other.calls) == 1


@pytest.mark.parametrize("name, before, after", [("softmax_scale", 0.25, 1.0), ("softcap", 1.0, 2.0), ("dropout_p", 0.25, 0.5),
                                                 ("seed", 1, 2), ("offset", 0, 1), ("causal", False, True), ("window", [2, 0], [0, 3])])
def test_options_changed_in_place(torch_streams: dict[int, int], prepared: Prepared, name: str, before: Any, after: Any) -> None:
    """A replayed launch uses the option's present value, whatever object holds it."""
    q, k, usual = Tensor(Q), Tensor(K), {"dropout_p": 0.5, "seed": 7}
    holder, plain = np.array(before), lambda x: tuple(x) if isinstance(x, list) else x
    for value in (before, after, before):
        holder[...] = value
        for _ in range(3):
            fastattn.attention(q, k, k, **(usual | {name: holder}))
            found = prepared.calls[-1][0]
            fastattn.attention(q, k, k, **(usual | {name: plain(value)}))
            assert prepared.calls[-1][0] is found
    assert len({id(call[0]) for call in prepared.calls}) == 2 and prepared.long == 4


def test_remembered_calls_are_bounded(torch_streams: dict[int, int], prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST", 10)
    q, k = Tensor(Q), Tensor(K)
    for seed in range(25):
        fastattn.attention(q, k, k, dropout_p=0.5, seed=seed)
        assert len(repeat._known) <= 10 and not any(repeat._known.values())
    assert [call[0].dropout.seed for call in prepared.calls] == list(range(25))
    for _ in range(3):
        fastattn.attention(q, k, k)
    assert prepared.long == 27 and len(prepared.calls) == 28


def test_explain_knows_repeated_calls(torch_streams: dict[int, int], prepared: Prepared) -> None:
    q, k = Tensor(Q), Tensor(K)
    for _ in range(3):
        fastattn.attention(q, k, k)
    assert fastattn.explain(fastattn.attention, q, k, k, device="cpu").engine == "cpu" and len(prepared.calls) == 3
