"""Real streams and CUDA graphs on a real GPU.

Slow producers (a spinning kernel before the values are written) make a missing wait visible. Stands alone:
`python -m pytest tests/gpu/test_streams.py`.
"""
from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.arrays.device_array import DeviceArray
from tests.tools.devices import requires_gpu
from tests.tools.library_arrays import Array, DlpackOnly, InterfaceOnly, close, expected, host, numbers, to_cupy, to_torch

pytestmark = requires_gpu
SPIN = 50_000_000       # clock cycles, about 30 ms


def called_once() -> tuple[list[Any], Array]:
    """Operands of a call whose kernels are compiled and loaded, and its result."""
    arrays = host()
    sources = to_torch(arrays)
    fastattn.attention(*sources)
    pytest.importorskip("torch").cuda.synchronize()
    return sources, expected(arrays)[0]


def test_the_current_stream_is_used() -> None:
    """The call reads values that a spinning stream writes late, because it is on that stream."""
    torch = pytest.importorskip("torch")

    sources, wanted = called_once()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        q, k, v = (torch.zeros_like(x) for x in sources)
        torch.cuda._sleep(SPIN)
        for x, source in zip((q, k, v), sources, strict=True):
            x.copy_(source)
        out = fastattn.attention(q, k, v)
        assert not side.query(), "the host has waited"
        close(numbers(out), wanted, "float16")


@pytest.mark.parametrize("kind", ["torch", "int", "cupy", "numba", "core"])
def test_a_given_stream_waits_for_the_producer(kind: str) -> None:
    torch = pytest.importorskip("torch")

    sources, wanted = called_once()
    q, k, v = (torch.zeros_like(x) for x in sources)
    stream, keep = _stream(kind)
    torch.cuda._sleep(SPIN)
    for x, source in zip((q, k, v), sources, strict=True):
        x.copy_(source)
    out = fastattn.attention(q, k, v, stream=stream)
    assert not torch.cuda.current_stream().query(), "the host has waited"
    keep.synchronize() if hasattr(keep, "synchronize") else keep.sync()
    close(numbers(out), wanted, "float16")


def _stream(kind: str) -> tuple[Any, Any]:
    """A new stream that does not wait for the legacy default one by itself where that can be had, and what synchronises it."""
    torch = pytest.importorskip("torch")

    if kind in ("torch", "int"):
        stream = torch.cuda.Stream()
        return (stream, stream) if kind == "torch" else (stream.cuda_stream, stream)
    if kind == "cupy":
        stream = pytest.importorskip("cupy").cuda.Stream(non_blocking=True)
    elif kind == "numba":
        stream = pytest.importorskip("numba.cuda").stream()
    else:
        device = pytest.importorskip("cuda.core").Device(0)
        device.set_current()
        stream = device.create_stream()
    return stream, stream


@pytest.mark.parametrize("kind", ["interface", "dlpack"])
def test_operands_of_other_streams_are_waited_for(kind: str) -> None:
    torch = pytest.importorskip("torch")

    arrays = host()
    wanted, _ = expected(arrays)
    q, source, v = to_torch(arrays)
    fastattn.attention(q, source, v)
    torch.cuda.synchronize()
    side, ours = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        k = torch.zeros_like(source)
        torch.cuda._sleep(SPIN)
        k.copy_(source)
        wrapped = InterfaceOnly(k, side) if kind == "interface" else DlpackOnly(k)
        if kind == "dlpack":
            out = fastattn.attention(q, wrapped, v, stream=ours)
            assert wrapped.streams == [ours.cuda_stream]
    if kind == "interface":
        with torch.cuda.stream(ours):
            out = fastattn.attention(q, wrapped, v)
    assert not side.query(), "the host has waited"
    ours.synchronize()
    close(numbers(out), wanted, "float16")


def test_cupy_streams() -> None:
    cupy = pytest.importorskip("cupy")
    arrays = host()
    wanted, _ = expected(arrays)
    q, k, v = to_cupy(arrays)
    side, ours = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with side:
        busy = cupy.ones((4096, 4096), np.float32)
        for _ in range(20):
            busy = busy @ busy * np.float32(1e-4)
        late = q + (busy[0, 0] * 0).astype(np.float16)
        here, there = fastattn.attention(late, k, v), fastattn.attention(late, k, v, stream=ours)
        close(cupy.asnumpy(here), wanted, "float16")
    ours.synchronize()
    close(cupy.asnumpy(there), wanted, "float16")


def test_memory_of_results_is_not_reused_too_early() -> None:
    """A result on another stream is dropped at once: torch does not reuse its memory before the call has finished."""
    torch = pytest.importorskip("torch")

    q, k, v = to_torch(host())
    fastattn.attention(q, k, v)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(side):
            torch.cuda._sleep(SPIN)
        out = fastattn.attention(q, k, v, stream=side)
        del out
        others = [torch.full_like(q, 7.0) for _ in range(8)]
        torch.cuda.synchronize()
        assert all((x == 7).all() for x in others)


def test_per_thread_and_legacy_streams() -> None:
    arrays = host()
    wanted, _ = expected(arrays)
    q, k, v = to_torch(arrays)
    for stream in (0, 1, 2):
        close(numbers(fastattn.attention(q, k, v, stream=stream)), wanted, "float16")


def test_a_thread_without_a_context() -> None:
    arrays = host("float32")
    wanted, _ = expected(arrays)
    tensors = to_torch(arrays)
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(fastattn.attention(*[DlpackOnly(t) for t in tensors]))
            found.append(fastattn.attention(*tensors))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], DeviceArray), found
    for out in found:
        close(numbers(out), wanted, "float32")


def test_a_bad_stream_is_an_error_not_a_crash() -> None:
    q, k, v = to_torch(host())
    with pytest.raises(TypeError, match="stream is 'fast'"):
        fastattn.attention(q, k, v, stream="fast")


# ---------------------------------------------------------------- CUDA graphs
def test_torch_graph() -> None:
    """Captured once, replayed over new values; the result lives in the graph's pool."""
    torch = pytest.importorskip("torch")

    q, k, v = to_torch(host())
    fastattn.attention(q, k, v, return_lse=True)            # compiled and loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    for seed in (1, 2):
        arrays = host(seed=seed)
        for x, source in zip((q, k, v), to_torch(arrays), strict=True):
            x.copy_(source)
        graph.replay()
        wanted, wanted_lse = expected(arrays, causal=True)
        close(numbers(out), wanted, "float16")
        close(numbers(lse), wanted_lse, "float16")


def test_cupy_graph() -> None:
    cupy = pytest.importorskip("cupy")
    arrays = host()
    q, k, v = to_cupy(arrays)
    out = cupy.empty_like(q)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fastattn.attention(q, k, v, out=out)
        stream.begin_capture()
        fastattn.attention(q, k, v, out=out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        close(cupy.asnumpy(out), expected(arrays)[0], "float16")


def test_device_arrays_are_refused_in_a_capture() -> None:
    torch = pytest.importorskip("torch")

    q, k, v = to_torch(host("float32"))
    fastattn.attention(q, k, v)
    stream = torch.cuda.Stream()
    wrapped = [InterfaceOnly(x, stream) for x in (q, k, v)]
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)
    with torch.cuda.graph(graph, stream=stream):
        with pytest.raises(fastattn.UnsupportedError, match="is being captured into a CUDA graph"):
            fastattn.attention(*wrapped)
        fastattn.attention(*wrapped, out=out)
    graph.replay()
    torch.cuda.synchronize()
    close(numbers(out), expected(host("float32"))[0], "float32")
