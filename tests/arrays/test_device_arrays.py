"""CUDA arrays without a GPU: a fake driver, fake libraries and an engine that
records its calls. gpu/test_arrays.py has the real ones."""
from __future__ import annotations

import gc
import types
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.arrays import convert, dlpack, libraries, readers
from fastattn.arrays.convert import allocate, view
from fastattn.arrays.device_array import DeviceArray
from fastattn.arrays.streams import Stream
from fastattn.arrays.view import ITEMSIZE, NO_NUMPY, contiguous, numpy_dtype
from fastattn.engine import _loaded as loaded
from tests.tools.fake_cuda import Cuda, Driver, Recorder, Speaker, waits
from tests.tools.fake_torch import Tensor, TorchStream

Q, K = (2, 6, 4, 8), (2, 9, 2, 8)
DTYPES = list(ITEMSIZE)


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
    if name in NO_NUMPY:
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
