"""Fixtures that tests of several folders use."""
from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest

# Before NumPy is imported, here and in processes that tests start. Expected results are small products: after each one OpenBLAS's other
# threads wait awake, which took 40% of the processor time of tests/test_engines.py on two cores, and two thirds of that of some of
# tests/fuzz. A plugin of pytest that imports NumPy comes before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.tools.fake_cuda import Driver, installed
from tests.tools.other_engines import nothing_left


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FASTATTN_EVERY=5: of a test's parametrised cases the first, the sixth and so on. 5 meets all dtypes, of which there are mostly 4."""
    every = int(os.environ.get("FASTATTN_EVERY", "1"))
    seen: Counter[str] = Counter()
    kept, left_out = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        (left_out if seen[name] % every else kept).append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """The modules and thousands of tests stay to the end: the garbage collector need not visit them, which took a twentieth of the time."""
    gc.collect()
    gc.freeze()


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
