"""Dense distributed calls, forward and backward, against one rank: ranks are threads here, processes in test_processes.py."""
from __future__ import annotations

import pytest

import fastattn.distributed as fd
from tests.tools import ranks

PAIRS = [pytest.param(name, size, id=f"{name}-{size}") for name, case in ranks.CASES.items() for size in case.size]


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_threads(name: str, size: int) -> None:
    whole = ranks.Whole(name)
    for found in fd.threads(size, ranks.run, whole, timeout=60):
        assert ranks.wrong(whole.case, found) == []


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_same_elements_are_dropped(size: int) -> None:
    for method in ranks.methods(size):
        assert all(fd.threads(size, ranks.drops_as_one, method, timeout=60)), method
