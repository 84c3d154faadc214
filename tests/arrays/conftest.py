"""Fixtures of the tests on arrays: an engine that records, and a fake torch."""
from __future__ import annotations

import types
from collections.abc import Iterator

import pytest

import fastattn
from fastattn.arrays import libraries, readers
from fastattn.arrays.view import ITEMSIZE
from tests.tools.fake_cuda import Driver, Recorder
from tests.tools.fake_torch import Tensor, TorchStream


@pytest.fixture
def engine(driver: Driver) -> Iterator[Recorder]:
    recorder = Recorder()
    with fastattn.register_engine("recorder", recorder.forward, recorder.backward, recorder.supports).activate():
        yield recorder


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
                                  is_grad_enabled=lambda: True, Tensor=Tensor,
                                  empty_like=lambda x: x.new_empty(x.shape), **{name: name for name in ITEMSIZE})
    monkeypatch.setitem(readers.by_type, Tensor, libraries._torch(torch))
    return current
