"""Which stream a call uses, and how it waits for another stream, with a fake driver."""
from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from fastattn.arrays import streams
from fastattn.arrays.streams import Home, Stream
from tests.tools.fake_cuda import Driver, waits


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x50


class Property:
    __cuda_stream__ = (0, 0)


def _has(**attributes: Any) -> Any:
    return types.SimpleNamespace(**attributes)


@pytest.mark.parametrize(("given", "handle"), [
    (0, 1), (1, 1), (2, 2), (0x50, 0x50), (np.int64(0x50), 0x50), (Protocol(), 0x50), (Property(), 1),
    (_has(cuda_stream=0x50), 0x50), (_has(cuda_stream=0), 1), (_has(ptr=0x50), 0x50),                   # torch, CuPy
    (_has(handle=_has(value=None)), 1), (_has(handle=_has(value=80)), 80), (_has(handle=80), 80)])      # Numba, old and new
def test_resolve(given: Any, handle: int) -> None:
    """0 is the legacy default stream, which is 1 here; a stream object stays alive as long as the call's stream."""
    found = streams.resolve(given, Home(3, 0x60), "f")
    assert found is not None and (found.handle, found.device) == (handle, 3) and found.owner is given
    assert found.__cuda_stream__() == (0, handle)


def test_resolve_cuda_bindings() -> None:
    bindings = pytest.importorskip("cuda.bindings.driver")
    found = streams.resolve(bindings.CUstream(0x50), Home(0, 1), "f")
    assert found is not None and found.handle == 0x50


@pytest.mark.parametrize(("given", "error", "text"), [
    ("7", TypeError, r"f\(\): stream is '7'; expected a CUstream handle as an int, or a stream of cuda\.core, torch"),
    (True, TypeError, "stream is True"), (1.5, TypeError, r"stream is 1\.5"), ([], TypeError, r"stream is \[\]"),
    (-1, ValueError, "stream is -1; expected a CUstream handle, 0 or 1 for the legacy default stream"),
    (types.SimpleNamespace(__cuda_stream__=(1, 5)), TypeError, "speaks __cuda_stream__ version 1; expected version 0")])
def test_resolve_refuses(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        streams.resolve(given, Home(0, 1), "f")


def test_without_a_stream_the_librarys_own_is_used() -> None:
    assert streams.resolve(None, None, "f") is None
    found = streams.resolve(None, Home(1, 0x60, "torch"), "f")
    assert found is not None and (found.handle, found.device, found.ordered_by) == (0x60, 1, "torch")
    with pytest.raises(ValueError, match="stream is 7; expected None, because q is in host memory"):
        streams.resolve(7, None, "f")


def test_wait(driver: Driver) -> None:
    streams.wait(Stream(0x50, 0), 0x50)
    assert driver.log == []
    streams.wait(Stream(0x50, 0), 1)
    assert waits(driver) == [(0x50, 1)] and driver.contexts == [0]
    driver.log.clear()
    driver.capturing = {0x50}
    streams.wait(Stream(0x50, 0), 1)                        # outside the graph: nothing that a replay could wait for
    assert driver.log == []
    driver.capturing = {0x50, 0x60}
    streams.wait(Stream(0x50, 0), 0x60)
    assert waits(driver) == [(0x50, 0x60)]


def test_wait_on_another_device_than_the_current_one(driver: Driver) -> None:
    seen = []
    driver.cuEventCreate = lambda flags: seen.append(list(driver.contexts)) or (0, 77)      # type: ignore[attr-defined]
    streams.wait(Stream(0x50, 2), 1)
    driver.contexts = []                                    # a thread that has none
    streams.wait(Stream(0x50, 2), 1)
    assert seen == [[0, 2], [2]] and driver.contexts == []


def test_driver_errors_say_what_failed(driver: Driver) -> None:
    driver.fails = "cuEventRecord"
    with pytest.raises(streams.CudaError, match=r"waiting for stream 0x60: cuEventRecord failed with CUDA_ERROR_INVALID_HANDLE: invalid"):
        streams.wait(Stream(0x50, 0), 0x60)
    assert driver.log[-1][0] == "EventDestroy"
    with pytest.raises(streams.CudaError, match=r"cuPointerGetAttribute\(0x1234\) failed with CUDA_ERROR_INVALID_VALUE"):
        streams.device_of(0x1234)


def test_the_device_of_memory_where_cuda_bindings_say_0(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions do for every device; then the driver is asked without them."""
    def attribute(found: Any, which: int, pointer: Any) -> int:
        assert which == 9 and pointer.value == 0x7000_0000_1000
        found._obj.value = 3
        return 0
    monkeypatch.undo()
    monkeypatch.setattr(streams, "driver", lambda: driver)
    monkeypatch.setattr(streams.ctypes, "CDLL", lambda name: types.SimpleNamespace(cuPointerGetAttribute=attribute))
    driver.devices[0x7000_0000_1000] = 0
    assert streams.device_of(0x7000_0000_1000) == 3
    driver.devices[0x7000_0000_1000] = 2                    # bindings without the mistake
    assert streams.device_of(0x7000_0000_1000) == 2


def test_missing_packages_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace()

    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")
    monkeypatch.setattr(streams.importlib, "import_module", gone)
    with pytest.raises(ImportError, match=r"cuda-bindings .*pip install 'fastattn\[gpu\]'"):
        streams.driver.__wrapped__()
    monkeypatch.setattr(streams.importlib, "import_module", lambda name: module)
    module.cuInit = lambda flags: (types.SimpleNamespace(name="CUDA_ERROR_NO_DEVICE"),)
    with pytest.raises(streams.CudaError, match="cuInit says CUDA_ERROR_NO_DEVICE"):
        streams.driver.__wrapped__()

    def no_library(flags: int) -> Any:
        raise RuntimeError("libcuda is not there")
    module.cuInit = no_library
    with pytest.raises(streams.CudaError, match="NVIDIA driver, which cannot be loaded: libcuda is not there"):
        streams.driver.__wrapped__()
