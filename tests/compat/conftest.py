"""Fixtures of the tests of compat."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import fastattn


@pytest.fixture
def torch() -> Iterator[Any]:
    """torch, with one thread for it and one for fastattn: two thread pools that wait for each other take ten times as
    long as these problems."""
    module = pytest.importorskip("torch")
    before = fastattn.get_num_threads(), module.get_num_threads()
    fastattn.set_num_threads(1)
    module.set_num_threads(1)
    yield module
    fastattn.set_num_threads(before[0])
    module.set_num_threads(before[1])
