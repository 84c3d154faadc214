"""Views of every kind of array, and outputs of the caller's kind."""
from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn.arrays import streams
from fastattn.arrays.convert import allocate, small, view
from fastattn.arrays.view import CPU, View, overlap

NAMES = ["float32", "float64", "float16", "bfloat16", "bool", "int32", "int64"]


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class Cuda:
    """An array known only by its __cuda_array_interface__."""

    def __init__(self, shape: tuple[int, ...], ptr: int = 4096, typestr: str = "<f4", strides: tuple[int, ...] | None = None,
                 readonly: bool = False, stream: int | None = None) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (ptr, readonly), "version": 3, "strides": strides,
                                         "stream": stream}


class Producer:
    """An array known only by DLPack, of the old protocol or the new."""

    def __init__(self, array: np.ndarray[Any, Any], old: bool = False, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.old, self.device = array, old, device

    def __dlpack__(self, **keywords: Any) -> Any:
        if self.old:
            if "max_version" in keywords:
                raise TypeError("unexpected keyword max_version")
            return self.array.__dlpack__()
        return self.array.__dlpack__(max_version=keywords["max_version"])

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class Namespaced(Producer):
    """A producer of an array-API library with immutable arrays."""

    class Library:
        @staticmethod
        def from_dlpack(x: Any) -> Namespaced:
            if x.dtype.name == "bfloat16":
                raise BufferError("NumPy cannot export it")
            return Namespaced(np.from_dlpack(x))

        @staticmethod
        def asarray(x: Any) -> Namespaced:
            return Namespaced(np.asarray(x))

    def __array_namespace__(self) -> type[Library]:
        return self.Library


@pytest.mark.parametrize("name", NAMES)
def test_numpy(name: str) -> None:
    x = np.arange(24).reshape(2, 3, 4).astype(_dtype(name))[:, ::-1, 1:]
    v = view(x, "f", "x")
    assert (v.ptr, v.shape, v.strides, v.dtype, v.device, v.readonly) == (x.ctypes.data, x.shape, x.strides, name, CPU, False)
    assert v.itemsize == x.itemsize
    assert v.numpy().dtype == x.dtype and np.shares_memory(v.numpy(), x)
    np.testing.assert_array_equal(v.numpy(), x)


def test_readonly_and_owner() -> None:
    x = np.arange(6.0)
    x.flags.writeable = False
    v = view(x, "f", "x")
    assert v.readonly and not v.numpy().flags.writeable
    array = view(np.arange(1000.0), "f", "x").numpy()           # the owner lives as long as the array
    np.testing.assert_array_equal(array, np.arange(1000.0))


def test_permute_and_broadcast() -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 4))
    v = view(x, "f", "x")
    np.testing.assert_array_equal(v.permute((2, 0, 1)).numpy(), x.transpose(2, 0, 1))
    np.testing.assert_array_equal(v.broadcast_to((5, 2, 3, 4)).numpy(), np.broadcast_to(x, (5, 2, 3, 4)))
    assert v.broadcast_to((5, 2, 3, 4)).strides == (0, 32, 0, 8)
    for shape in ((2, 4), (2, 3, 5), (3, 1, 4)):
        with pytest.raises(ValueError, match="does not broadcast"):
            v.broadcast_to(shape)


def test_empty_and_scalar() -> None:
    assert view(np.empty((0, 3)), "f", "x").numpy().shape == (0, 3)
    assert float(view(np.array(3.0), "f", "x").numpy()) == 3.0


def test_overlap() -> None:
    x = np.zeros((8, 8))
    a, b = view(x[:, ::2], "f", "x"), view(x[:, 1::2], "f", "x")
    assert not overlap(a, b) and overlap(a, a) and overlap(view(x[::-1], "f", "x"), b)
    assert not overlap(a, view(np.zeros(8), "f", "x")) and not overlap(view(x[:0], "f", "x"), a)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "bfloat16"])
def test_dlpack(name: str, old: bool) -> None:
    x = np.arange(24).reshape(2, 3, 4).astype(name)[:, 1:]
    v = view(Producer(x, old), "f", "x")
    assert (v.ptr, v.shape, v.strides, v.dtype, v.device) == (x.ctypes.data, x.shape, x.strides, name, CPU)
    assert v.readonly == old                                    # the old protocol does not say: not for outputs
    np.testing.assert_array_equal(v.numpy(), x)


def test_dlpack_gives_the_memory_back() -> None:
    x = np.arange(4.0)
    before = sys.getrefcount(x)
    for old in (False, True):
        v = view(Producer(x, old), "f", "x")
        assert sys.getrefcount(x) > before
        array = v.numpy()
        del v
        assert array[3] == 3.0
        del array
        assert sys.getrefcount(x) == before


def test_dlpack_errors() -> None:
    with pytest.raises(TypeError, match=r"f\(\): x has dtype complex128; expected float32"):
        view(Producer(np.zeros(3, complex)), "f", "x")
    with pytest.raises(TypeError, match="has dtype uint8"):
        view(Producer(np.zeros(3, np.uint8)), "f", "x")
    with pytest.raises(TypeError, match=r"is on DLPack device \(8, 0\); expected a CPU or CUDA array"):
        view(Producer(np.zeros(3), device=(8, 0)), "f", "x")

    class Broken(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise BufferError("no memory here")

    with pytest.raises(TypeError, match="cannot be exported: no memory here"):
        view(Broken(np.zeros(3)), "f", "x")


def test_cuda_arrays_are_views_not_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "device_of", {4096: 3}.__getitem__)
    v = view(Cuda((2, 3)), "f", "x")
    assert (v.ptr, v.shape, v.strides, v.dtype, v.device, v.readonly) == (4096, (2, 3), (12, 4), "float32", ("cuda", 3), False)
    with pytest.raises(ValueError, match="has no NumPy array"):
        v.numpy()
    v = view(Cuda((2, 3), strides=(8, 16), typestr="<f2", readonly=True), "f", "x")
    assert (v.strides, v.dtype, v.readonly) == ((8, 16), "float16", True)
    assert view(Cuda((0, 3), ptr=0), "f", "x").device == ("cuda", 0)        # no memory, so nothing to ask the driver about
    with pytest.raises(TypeError, match=r"f\(\): x has type string '<V2' .* no code for bfloat16; .* speaks DLPack .* can say"):
        view(Cuda((2,), typestr="<V2"), "f", "x")
    with pytest.raises(TypeError, match="x has dtype <c8; expected float32"):
        view(Cuda((2,), typestr="<c8"), "f", "x")


def test_allocate() -> None:
    output = allocate(np.zeros(1), (2, 3), "bfloat16")
    assert isinstance(output.finish(), np.ndarray) and output.finish().dtype == ml_dtypes.bfloat16
    output.view.numpy()[...] = 2
    assert (output.finish() == 2).all()
    assert isinstance(allocate(Producer(np.zeros(1)), (2,), "float32").finish(), np.ndarray)
    for name in ("float32", "bfloat16"):
        output = allocate(Namespaced(np.zeros(1)), (2,), name)
        output.view.numpy()[...] = 3
        assert isinstance(output.finish(), Namespaced) and (output.finish().array == 3).all()


def test_small() -> None:
    assert small([1, 2], "float32", "f", "x").dtype == "float32"
    assert small((0, 5), None, "f", "x").dtype == "int64"
    assert small([0.5], None, "f", "x").dtype == "float64"      # left for make_problem to refuse
    with pytest.raises(TypeError, match="of unequal parts"):
        small([[1], [2, 3]], "float32", "f", "x")


def test_array_api_producer_end_to_end() -> None:
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)
    expected, expected_lse = fastattn.attention(x, x, x, return_lse=True, engine="reference")
    p = Namespaced(x)
    out, lse = fastattn.attention(p, p, p, return_lse=True, engine="reference")
    assert isinstance(out, Namespaced) and isinstance(lse, Namespaced)
    np.testing.assert_array_equal(out.array, expected)
    grads = fastattn.attention_backward(out, p, p, p, out, lse, engine="reference")
    assert isinstance(grads.dk, Namespaced)
    np.testing.assert_array_equal(lse.array, expected_lse)


@pytest.mark.parametrize("name", NAMES)
def test_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))[:, ::2]
    v = view(x, "f", "x")
    assert (v.ptr, v.shape, v.dtype, v.device, v.readonly) == (x.data_ptr(), tuple(x.shape), name, CPU, False)
    np.testing.assert_array_equal(v.numpy().astype(float), x.to(torch.float64).numpy())


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_torch_end_to_end(name: str) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 4, 7, 8).to(getattr(torch, name)) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, layout="bhsd", return_lse=True, engine="reference")
    assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    grads = fastattn.attention_backward(torch.ones_like(out), q, k, v, out, lse, layout="bhsd", engine="reference")
    assert isinstance(grads.dk, torch.Tensor) and grads.dk.dtype == q.dtype and grads.dk.shape == k.shape
    given = torch.empty_like(out)
    assert fastattn.attention(q, k, v, layout="bhsd", out=given, engine="reference") is given
    torch.testing.assert_close(given, out, rtol=0, atol=0)


def test_torch_errors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"attention\(\): k requires grad.*fastattn\.torch\.attention has gradients, and k\.detach"):
        fastattn.attention(x, x.clone().requires_grad_(), x)
    with pytest.raises(TypeError, match="cannot be exported"):
        view(torch.zeros(3, 3).to_sparse(), "f", "x")


def test_import_is_light() -> None:
    """No Numba, no CUDA, no torch, and at most 0.15 s of CPU time over NumPy's own import, best of three."""
    code = ("import numpy, sys, time; start = time.process_time(); import fastattn; took = time.process_time() - start\n"
            "assert not {'numba', 'cuda', 'torch', 'ml_dtypes'} & set(sys.modules); print(took)")
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(times) < 0.15


def test_a_view_is_not_hashable() -> None:
    assert View(0, (), (), "float32") != View(0, (), (), "float32")


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = fastattn.show_config()
    printed = capsys.readouterr().out
    assert config["fastattn"] == fastattn.__version__
    assert all(name in printed for name in ("numpy", "cpu engine", "cuda driver", "cuda devices", "gpu engine"))
