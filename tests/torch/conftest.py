"""Fixtures of the tests of fastattn.torch, and their random tensors."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastattn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch and one for fastattn, and a fixed generator: two thread pools that wait for each other take
    ten times as long as these problems."""
    torch = pytest.importorskip("torch")
    before = fastattn.get_num_threads(), torch.get_num_threads()
    fastattn.set_num_threads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    fastattn.set_num_threads(before[0])
    torch.set_num_threads(before[1])
