"""The seed of the day: what is drawn at random, and which cases of a parametrised test run where not all do."""
from __future__ import annotations

import datetime
import os
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SEED = int(os.environ.get("FASTATTN_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
EVERY = int(os.environ.get("FASTATTN_EVERY", "1"))


def cases_of_the_day(items: list[pytest.Item], every: int = EVERY, seed: int = SEED) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(kept, left out): of each test one case in `every`, others the next day, so that all run within so many days.

    At least one case of each test runs, and all that are drawn at random. A test without cases runs every day, or, if it is marked as slow,
    on one day in `every`. Cases are counted in the order of their names' hashes: in their own order all of a day could have one dtype.
    """
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = set[str]()
    for test, cases in by_test.items():
        cases = sorted(cases, key=lambda item: _hash(item.nodeid))
        one_in = every if cases[0].get_closest_marker("slow") else min(every, len(cases))
        first = _hash(test) if len(cases) == 1 else 0       # slow tests run on different days
        chosen.update(item.nodeid for n, item in enumerate(cases, first) if (n + seed) % one_in == 0)
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (kept if item.nodeid in chosen or item.get_closest_marker("drawn") else left_out).append(item)
    return kept, left_out


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())
