"""Fixtures that tests of several folders use."""
from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Before NumPy is imported, here and in processes that tests start. Expected results are small products: after each one OpenBLAS's other
# threads wait awake, which took 40% of the processor time of tests/test_engines.py on two cores, and two thirds of that of some of
# tests/fuzz. A plugin of pytest that imports NumPy comes before.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.tools.day import EVERY, SEED, cases_of_the_day
from tests.tools.fake_cuda import Driver, installed
from tests.tools.other_engines import nothing_left


def pytest_report_header() -> list[str]:
    return [f"of the cases of a test one in {EVERY}: FASTATTN_SEED={SEED}"] if EVERY > 1 else []


@pytest.hookimpl(trylast=True)      # -k and -m come first
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FASTATTN_EVERY=5: of a test's parametrised cases a fifth, which depends on the day."""
    kept, left_out = cases_of_the_day(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """The modules and thousands of tests stay to the end: the garbage collector need not visit them, which took a twentieth of the time.
    It comes seldom, because what the GPU engine's emulator and Numba make is no garbage: another twentieth of theirs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


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
