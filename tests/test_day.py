"""Which cases run on a day: all of them within the days, and each test every day."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.tools.day import cases_of_the_day


def item(name: str, mark: str = "") -> Any:
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda marker: mark == marker)


def test_all_cases_run_within_the_days() -> None:
    dtypes, dims = ("float16", "bfloat16", "float32"), (64, 128, 256)
    items = [item(f"test_numbers[{dtype}-{dim}]") for dtype in dtypes for dim in dims]
    kept = [[x.nodeid for x in cases_of_the_day(items, 3, day)[0]] for day in range(20261201, 20261204)]
    assert sorted(name for day in kept for name in day) == sorted(x.nodeid for x in items) and [len(day) for day in kept] == [3, 3, 3]
    assert all(len({name.partition("-")[0] for name in day}) > 1 for day in kept), "not one dtype a day"


def test_each_test_runs_every_day() -> None:
    items = [item("test_alone"), item("test_two[a]"), item("test_two[b]"), *(item(f"test_drawn[{n}]", "drawn") for n in range(4))]
    days = [cases_of_the_day(items, 5, day)[0] for day in range(2)]
    for kept in days:
        assert [x.nodeid.partition("[")[0] for x in kept] == ["test_alone", "test_two", *["test_drawn"] * 4]
    assert days[0][1] is not days[1][1]


def test_slow_tests_share_the_days() -> None:
    items = [item(f"test_{n}", "slow") for n in range(20)]
    days = [{x.nodeid for x in cases_of_the_day(items, 3, day)[0]} for day in range(3)]
    assert set.union(*days) == {x.nodeid for x in items} and sum(map(len, days)) == 20 and all(2 < len(day) < 14 for day in days)


def test_all_without_the_variable() -> None:
    items = [item(f"test[{n}]") for n in range(7)]
    assert cases_of_the_day(items, 1, 20261201) == (items, [])
