"""Fixtures that tests of several folders use."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.fake_cuda import Driver, installed
from tests.tools.other_engines import nothing_left


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A fake CUDA driver instead of the real one."""
    with installed(monkeypatch) as fake:
        yield fake


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The names of the Noters that ran; fails if the test leaves an engine registered."""
    with nothing_left() as names:
        yield names
