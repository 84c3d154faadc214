"""Real arrays on a real GPU: torch, CuPy, JAX, Numba and cuda.core in, the same library out; streams, graphs, several devices.

Every result is compared with the reference engine on the host. Slow producers (a spinning kernel before the values are
written) make a missing wait visible. Stands alone: `python -m pytest tests/gpu/test_arrays.py`.
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import repeat
from fastattn.arrays import convert, streams
from fastattn.arrays.device_array import DeviceArray
from fastattn.arrays.streams import Stream
from tests.tools.devices import requires_gpu, requires_two_gpus
from tests.tools.library_arrays import (
    BATCH,
    DIM,
    HEADS,
    HEADS_K,
    SEQLEN_K,
    SEQLEN_Q,
    SHAPES,
    DlpackOnly,
    InterfaceOnly,
    close,
    expected,
    host,
    numbers,
    to_cupy,
    to_torch,
)

pytestmark = requires_gpu
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # JAX would take three quarters of the memory


# ---------------------------------------------------------------- one library in, the same out
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")

    arrays = host(dtype)
    q, k, v = to_torch(arrays)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    wanted, wanted_lse = expected(arrays, causal=True)
    assert isinstance(out, torch.Tensor) and (out.dtype, out.device, out.shape) == (q.dtype, q.device, q.shape) and out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32) and lse.device == q.device
    close(numbers(out), wanted, dtype)
    close(numbers(lse), wanted_lse, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cupy(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = host(dtype)
    try:
        q, k, v = to_cupy(arrays)
    except (TypeError, ValueError):
        pytest.skip(f"this CuPy has no {dtype}")
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    wanted, wanted_lse = expected(arrays)
    assert isinstance(out, cupy.ndarray) and out.dtype == q.dtype and out.device == q.device and lse.dtype == np.float32
    close(cupy.asnumpy(out), wanted, dtype)
    close(cupy.asnumpy(lse), wanted_lse, dtype)


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("keywords", [{}, {"return_lse": True, "causal": True}, {"layout": "bhsd", "return_lse": True},
                                      {"dropout_p": 0.3, "seed": 7}, {"engine": "sm80"}, {"engine": "simt"}], ids=str)
def test_repeated_calls_skip_the_checks(library: str, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third equal call on the checks are skipped; also for other
    arrays, streams and alignments, and in a graph."""
    bhsd = keywords.get("layout") == "bhsd"
    give = to_torch if library == "torch" else to_cupy
    asked = {name: x for name, x in keywords.items() if name != "engine"}
    monkeypatch.setattr(repeat, "_known", {})

    def once(seed: int, shift: int = 0) -> None:
        arrays = host(seed=seed)
        inputs = [give([np.concatenate([np.zeros(shift, a.dtype), a.ravel()])])[0][shift:].reshape(a.shape) for a in arrays]
        result = fastattn.attention(*[x.swapaxes(1, 2) for x in inputs] if bhsd else inputs, **keywords)
        out, lse = result if keywords.get("return_lse") else (result, None)
        wanted, wanted_lse = expected(arrays, **{name: x for name, x in asked.items() if name not in ("layout", "return_lse")})
        close(numbers(out.swapaxes(1, 2) if bhsd else out), wanted, "float16")
        if lse is not None:
            close(numbers(lse), wanted_lse, "float16")
    for seed in range(5):
        once(seed)
    assert len({id(x) for x in repeat._known.values() if x}) == 1
    for shift in (1, 8, 3):
        once(5, shift)
    module = pytest.importorskip(library)
    with module.cuda.stream(module.cuda.Stream()) if library == "torch" else module.cuda.Stream(non_blocking=True):
        once(6)


@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("keywords", [{}, {"causal": True, "deterministic": True}, {"dropout_p": 0.3, "seed": 7, "dlse": True},
                                      {"packed": True}, {"engine": "sm80"}, {"engine": "simt", "packed": True}], ids=str)
def test_repeated_backwards_skip_the_checks(library: str, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of backwards. Packed: the lengths change too, at the same address."""
    give, options = to_torch if library == "torch" else to_cupy, dict(keywords)
    packed, with_dlse = (options.pop(name, False) for name in ("packed", "dlse"))
    asked = {name: x for name, x in options.items() if name not in ("engine", "deterministic")}
    monkeypatch.setattr(repeat, "_known", {})
    module = pytest.importorskip(library)
    cu_q, cu_k = (module.asarray([0, 70, n], dtype=module.int32, **({"device": "cuda"} if library == "torch" else {}))
                  for n in (SEQLEN_Q, SEQLEN_K))

    def once(seed: int, shift: int = 0) -> None:
        draw = np.random.default_rng(seed)
        q, k, v = (x[0] if packed else x for x in host(seed=seed))
        dout = draw.standard_normal(q.shape).astype(q.dtype)
        lengths = []
        if packed:
            cu_q[1], cu_k[1] = 10 + 7 * seed, 20 + 9 * seed
            lengths = [numbers(x).astype(np.int32) for x in (cu_q, cu_k)]
        exact = [x.astype(np.float64) for x in (q, k, v)]
        forward = fastattn.attention_varlen if packed else fastattn.attention
        backward = fastattn.attention_varlen_backward if packed else fastattn.attention_backward
        out, lse = forward(*exact, *lengths, return_lse=True, engine="reference", **asked)
        dlse = {"dlse": draw.standard_normal(lse.shape)} if with_dlse else {}
        wanted = backward(dout.astype(np.float64), *exact, out, lse, *lengths, engine="reference", **asked, **dlse)
        arrays = [dout, q, k, v, out.astype(q.dtype), lse.astype(np.float32), *[x.astype(np.float32) for x in dlse.values()]]
        given = [give([np.concatenate([np.zeros(shift, a.dtype), a.ravel()])])[0][shift:].reshape(a.shape) for a in arrays]
        more = {"dlse": given.pop()} if with_dlse else {}
        grads = backward(*given, *((cu_q, cu_k) if packed else ()), **options, **more)
        for x, y in zip(grads[:3], wanted[:3], strict=True):
            np.testing.assert_allclose(numbers(x), y, rtol=0, atol=0.02)
    for seed in range(5):
        once(seed)
    assert len({id(x) for x in repeat._known.values() if x}) == 1
    for shift in (1, 8, 3):
        once(5, shift)
    with module.cuda.stream(module.cuda.Stream()) if library == "torch" else module.cuda.Stream(non_blocking=True):
        once(6)


def _jax() -> Any:
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX without CUDA")
    return jax, device


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax(dtype: str) -> None:
    jax, device = _jax()
    arrays = host(dtype)
    q, k, v = (jax.device_put(a, device) for a in arrays)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    wanted, wanted_lse = expected(arrays)
    assert isinstance(out, jax.Array) and out.dtype == q.dtype and out.devices() == q.devices() and lse.dtype == np.float32
    close(out, wanted, dtype)
    close(lse, wanted_lse, dtype)
    with pytest.raises(ValueError, match="out is read-only"):
        fastattn.attention(q, k, v, out=q + 1)


def test_jax_in_a_loop() -> None:
    """JAX uses results and drops them while more are computed: no memory is reused too early."""
    jax, device = _jax()
    arrays = host("float32")
    q, k, v = (jax.device_put(a, device) for a in arrays)
    wanted = expected(arrays)[0].sum()
    sums = []
    for i in range(50):
        big = jax.numpy.ones((2000, 2000)) @ jax.numpy.ones((2000, 2000))           # keeps JAX's stream behind
        out = fastattn.attention(q + 0 * big[0, 0], k, v)
        sums.append(jax.numpy.sum(out.astype(jax.numpy.float32)) + i)
        del out
    for i, total in enumerate(sums):
        assert abs(float(total) - i - wanted) < 1e-2 * abs(wanted) + 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numba(dtype: str) -> None:
    cuda = pytest.importorskip("numba.cuda")
    arrays = host(dtype)
    q, k, v = (cuda.to_device(a) for a in arrays)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    wanted, wanted_lse = expected(arrays)
    assert type(out) is type(q) and out.dtype == q.dtype
    close(out.copy_to_host(), wanted, dtype)
    close(lse.copy_to_host(), wanted_lse, dtype)
    stream = cuda.stream()
    out = fastattn.attention(q, k, v, stream=stream)
    close(out.copy_to_host(), wanted, dtype)                # ordered by the stream that the array is bound to


def test_cuda_core() -> None:
    """A StridedMemoryView in; a DeviceArray out, which torch and CuPy take."""
    core = pytest.importorskip("cuda.core")
    utils = pytest.importorskip("cuda.core.utils")
    arrays = host("float32")
    tensors = to_torch(arrays)
    device = core.Device(0)
    device.set_current()
    stream = device.create_stream()
    views = [utils.StridedMemoryView.from_any_interface(t, stream_ptr=int(stream.handle)) for t in tensors]
    out, lse = fastattn.attention(*views, stream=stream, return_lse=True)
    assert isinstance(out, DeviceArray) and out.stream.owner is stream
    wanted, wanted_lse = expected(arrays)
    close(numbers(out), wanted, "float32")                  # torch's stream is made to wait
    close(numbers(lse), wanted_lse, "float32")
    cupy = pytest.importorskip("cupy")
    close(cupy.asnumpy(cupy.asarray(out)), wanted, "float32")       # by __cuda_array_interface__, which CuPy prefers
    close(cupy.asnumpy(cupy.from_dlpack(out)), wanted, "float32")


def test_mixed_libraries() -> None:
    arrays = host("float32")
    (q, _, _), (_, k, _) = to_torch(arrays), to_cupy(arrays)
    out = fastattn.attention(q, k, DlpackOnly(to_torch(arrays)[2]))
    assert type(out) is type(q)
    close(numbers(out), expected(arrays)[0], "float32")


# ---------------------------------------------------------------- strides and layouts
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides(dtype: str) -> None:
    """bhsd, a packed qkv buffer, reversed batch order by a view with gaps, and a last axis that is not of stride 1."""
    torch = pytest.importorskip("torch")

    arrays = host(dtype)
    wanted, _ = expected(arrays)
    q, k, v = to_torch(arrays)
    out = fastattn.attention(*[x.transpose(1, 2) for x in (q, k, v)], layout="bhsd")
    close(numbers(out.transpose(1, 2)), wanted, dtype)
    kv = torch.cat([k, v], dim=2)
    close(numbers(fastattn.attention(q, kv[:, :, :HEADS_K], kv[:, :, HEADS_K:])), wanted, dtype)
    wide = torch.full((BATCH, SEQLEN_Q, HEADS, 2 * DIM), float("nan"), dtype=q.dtype, device="cuda")
    wide[..., ::2] = q
    close(numbers(fastattn.attention(wide[..., ::2], k, v)), wanted, dtype)
    shared = k[:, :, :1].expand(-1, -1, HEADS_K, -1)        # stride 0
    close(numbers(fastattn.attention(q, shared, v)), expected([arrays[0], np.repeat(arrays[1][:, :, :1], HEADS_K, 2), arrays[2]])[0], dtype)


def test_out() -> None:
    torch = pytest.importorskip("torch")

    arrays = host()
    wanted, _ = expected(arrays)
    q, k, v = to_torch(arrays)
    out = torch.full_like(q, float("nan"))
    assert fastattn.attention(q, k, v, out=out) is out
    close(numbers(out), wanted, "float16")
    buffer = torch.full((BATCH, SEQLEN_Q, 2 * HEADS, DIM), 7.0, dtype=q.dtype, device="cuda")
    buffer[:, :, ::2] = q
    fastattn.attention(buffer[:, :, ::2], k, v, out=buffer[:, :, 1::2])             # interleaved with q, no element in common
    close(numbers(buffer[:, :, 1::2]), wanted, "float16")
    close(numbers(buffer[:, :, ::2]), arrays[0].astype(np.float64), "float16")
    with pytest.raises(ValueError, match="out shares memory with q"):
        fastattn.attention(buffer[:, :, ::2], k, v, out=buffer[:, :, :HEADS])
    cupy_out = to_cupy([np.zeros(SHAPES[0], np.float16)])[0]
    assert fastattn.attention(q, k, v, out=cupy_out) is cupy_out                    # another library's
    close(cupy_out.get(), wanted, "float16")


def test_packed_lengths_stay_on_the_device() -> None:
    torch = pytest.importorskip("torch")

    rng = np.random.default_rng(0)
    lengths = [17, 0, 100, 33]
    total = sum(lengths)
    arrays = [rng.standard_normal((total, heads, DIM)).astype(np.float16) for heads in (HEADS, HEADS_K, HEADS_K)]
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    wanted = fastattn.attention_varlen(*[a.astype(np.float64) for a in arrays], cu, cu, causal=True, engine="reference")
    q, k, v = to_torch(arrays)
    on_device = torch.from_numpy(cu).cuda()
    fastattn.attention_varlen(q, k, v, on_device, on_device, causal=True)           # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [fastattn.attention_varlen(q, k, v, on_device, on_device, causal=True, **keywords)
                for keywords in ({}, {"max_seqlen_q": 100, "max_seqlen_k": 100})]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out in outs:
        close(numbers(out), wanted, "float16")
    with pytest.raises(ValueError, match=r"cu_seqlens_q is on device \('cpu', 0\); expected q's device, \('cuda', 0\)"):
        fastattn.attention_varlen(q, k, v, cu, cu)
    with pytest.raises(TypeError, match="alibi_slopes is a list; expected an array on q's device"):
        fastattn.attention_varlen(q, k, v, on_device, on_device, alibi_slopes=[1.0] * HEADS)


def test_zero_sizes() -> None:
    torch = pytest.importorskip("torch")

    q, k, v = to_torch(host())
    assert fastattn.attention(q[:0], k[:0], v[:0]).shape == (0, *q.shape[1:])
    assert fastattn.attention(q[:, :0], k, v).shape == (BATCH, 0, HEADS, DIM)
    out, lse = fastattn.attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


# ---------------------------------------------------------------- devices
def test_the_driver_names_the_device() -> None:
    q = to_torch(host())[0]
    stream = pytest.importorskip("torch").cuda.current_stream()
    assert convert.view(InterfaceOnly(q, stream), "f", "x").device == ("cuda", 0)
    with pytest.raises(streams.CudaError, match=r"cuPointerGetAttribute\(0x1000\) failed with CUDA_ERROR_INVALID_VALUE"):
        streams.device_of(0x1000)


def test_host_arrays_are_refused() -> None:
    arrays = host()
    q, k, v = to_torch(arrays)
    with pytest.raises(ValueError, match=r"k is on device \('cpu', 0\); expected q's device, \('cuda', 0\)"):
        fastattn.attention(q, arrays[1], v)
    with pytest.raises(ValueError, match=r"k is on device \('cuda', 0\); expected q's device, \('cpu', 0\)"):
        fastattn.attention(arrays[0], k, v)
    with pytest.raises(ValueError, match="engine is 'cpu' but q is on device"):
        fastattn.attention(q, k, v, engine="cpu")


@requires_two_gpus
def test_two_devices() -> None:
    torch = pytest.importorskip("torch")

    arrays = host()
    wanted, _ = expected(arrays)
    here, there = to_torch(arrays, "cuda:0"), to_torch(arrays, "cuda:1")
    with pytest.raises(ValueError, match=r"k is on device \('cuda', 1\); expected q's device, \('cuda', 0\)"):
        fastattn.attention(here[0], there[1], here[2])
    with pytest.raises(ValueError, match=r"out is on device \('cuda', 1\); expected q's device, \('cuda', 0\)"):
        fastattn.attention(*here, out=torch.empty_like(there[0]))
    assert torch.cuda.current_device() == 0
    out = fastattn.attention(*there)                        # the current device is another
    assert out.device == there[0].device and torch.cuda.current_device() == 0
    close(numbers(out), wanted, "float16")
    out = fastattn.attention(*[DlpackOnly(x) for x in there])
    assert isinstance(out, DeviceArray) and out.stream.device == 1
    close(numbers(out), wanted, "float16")
    with torch.cuda.device(1):
        close(numbers(fastattn.attention(*here)), wanted, "float16")
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(1):
        q, k, v = to_cupy(arrays)
    out = fastattn.attention(q, k, v)
    assert out.device.id == 1 and cupy.cuda.runtime.getDevice() == 0
    close(cupy.asnumpy(out), wanted, "float16")


# ---------------------------------------------------------------- memory of our own
def test_device_array_exports() -> None:
    torch = pytest.importorskip("torch")

    for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"):
        x = DeviceArray((3, 5), name, Stream(1, 0))
        y = torch.from_dlpack(x)
        assert y.data_ptr() == x.view().ptr and y.shape == (3, 5) and y.is_contiguous() and str(y.dtype) == f"torch.{name}"
        y.fill_(1)
        del x
        assert (y == 1).all()                               # the tensor keeps the memory
    assert torch.from_dlpack(DeviceArray((0, 5), "float16", Stream(1, 0))).shape == (0, 5)


def test_device_array_memory_returns() -> None:
    """A hundred results of 64 MiB fit where two do."""
    d = streams.driver()
    for _ in range(100):
        DeviceArray((1 << 24,), "float32", Stream(1, 0))
    with streams.on_device(0):
        streams.check(d.cuCtxSynchronize(), "cuCtxSynchronize")
        pool = streams.check(d.cuDeviceGetDefaultMemPool(0), "cuDeviceGetDefaultMemPool")
        used = streams.check(d.cuMemPoolGetAttribute(pool, d.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_CURRENT), "cuMemPoolGetAttribute")
    assert int(used) < 1 << 27
