"""The benchmark's own arithmetic and files, and one tiny case run without rivals: no other library and no compiled engine needed."""
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cpu, plot, results, rivals, table, worker
from bench.case import Bar, Case
from bench.results import Row, Where
from bench.timing import Budget, Call, Spread, alternate, ratios
from fastattn.problem import row_bounds

TINY = Case("dense", 1, 2, 16, 8, causal=True, backward=True, against=("torch",), bars=(Bar("torch", "speedup", 1.5),))
WHERE = Where("2030-01-02", "A processor", "scalar", 1, "3.11", "numpy 2", "numpy matmul 9 GF/s")
BUDGET = Budget(rounds=3, seconds=0, settle=0, turn=0)


def rows(value: float = 1.6, agree: bool = True) -> list[Row]:
    """fastattn, torch and onnxruntime on a causal case, and a ceiling on its full sibling."""
    full = replace(TINY, causal=False, bars=(Bar("fma peak", "ceiling", 0.7),))
    time = Spread(0.002, 0.001, 0.003)
    return [results.make_row(WHERE, TINY, "fastattn", time=time, others=0.0),
            results.make_row(WHERE, TINY, "torch", time=time, measure="speedup", value=Spread(value, 1.0, 2.0), agree=agree),
            results.make_row(WHERE, TINY, "onnxruntime", note="not installed: onnxruntime"),
            results.make_row(WHERE, full, "fastattn", time=time),
            results.make_row(WHERE, full, "fma peak", measure="ceiling", value=Spread(0.75, 0.7, 0.8))]


@pytest.mark.parametrize(("causal", "window", "seqlen", "seqlen_k"),
                         [(False, None, 5, 9), (True, None, 9, 9), (True, 3, 9, 12), (True, 3, 9, 5)])
def test_scored_pairs_are_those_of_the_library(causal: bool, window: int | None, seqlen: int, seqlen_k: int) -> None:
    case = Case("dense", 2, 3, seqlen, 8, causal=causal, window=window, seqlen_k=seqlen_k)
    bounds = [row_bounds(row, seqlen, seqlen_k, window, 0 if causal else window) for row in range(seqlen)]
    assert case.pairs == 6 * sum(hi - lo for lo, hi in bounds)


def test_cases_have_unique_names_and_known_rivals() -> None:
    found = cpu.cases()
    assert len({case.name for case in found}) == len(found)
    assert all(rival in rivals.MAKERS for case in found for rival in case.against)
    assert all(bar.against in ("fastattn", *case.against) for case in found for bar in case.bars)
    assert 0 < len(cpu.select("quick", None)) < len(cpu.select("full", None)) < len(cpu.select("long", None))
    assert all(Case.from_json(json.loads(json.dumps(asdict(case)))) == case for case in found)


def test_bars_know_which_way_is_good() -> None:
    assert Bar("torch", "speedup", 1.4).met(1.4) and not Bar("torch", "speedup", 1.4).met(1.39)
    assert Bar("plain", "cost", 1.6).met(1.5) and not Bar("fastattn", "memory", 64).met(65)
    assert str(Bar("torch", "speedup", 1.4)) == ">= 1.40x" and str(Bar("plain", "cost", 1.6)) == "<= 1.60x"


def test_calls_take_turns() -> None:
    order: list[str] = []
    clock = {"a": 1.0, "b": 3.0}

    def timer(call: Call) -> float:
        order.append(str(call()))
        return clock[order[-1]]

    ours, theirs = alternate(lambda: "a", lambda: "b", BUDGET, timer)
    assert order[6:] == ["a", "b"] * 3  # after three calls of each to warm up
    assert ratios(theirs, ours).median == 3


def test_difference_sees_a_wrong_row_and_nan() -> None:
    right = np.random.default_rng(0).standard_normal((2, 3, 50, 8))
    wrong, nan = right.copy(), right.copy()
    wrong[1, 2, 7] *= 1.5
    nan[0, 0, 0, 0] = np.nan
    assert worker.difference(right * (1 + 1e-6), right) < 1e-5
    assert worker.difference(wrong, right) > 0.1
    assert worker.difference(nan, right) > 1e300


def test_a_tiny_case_without_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same JSON as a child process, on the reference engine."""
    def child(job: dict[str, Any], threads: int) -> Any:
        assert job["rival"] is None
        return json.loads(json.dumps(asdict(worker.measure_pair(Case.from_json(job["case"]), None, threads, BUDGET, "reference"))))

    monkeypatch.setattr(cpu, "child", child)
    monkeypatch.setattr(rivals, "missing", lambda implementation: f"not installed: {implementation}")
    own, torch = cpu.Runs(WHERE, BUDGET, 1).rows(TINY)
    assert own.implementation == "fastattn" and own.rounds == 3 and own.median_ms and own.p20_ms and own.median_ms >= own.p20_ms > 0
    assert torch.note == "not installed: torch" and torch.verdict == "" and torch.needs == ">= 1.50x"
    assert "not installed" in table.console([own, torch]) and "not measured" in table.console([own, torch])


def test_a_failing_child_is_a_note() -> None:
    answer = cpu.child({"kind": "pair", "threads": 1}, 1)
    assert answer == "failed: KeyError: 'case'"


def test_csv_and_back(tmp_path: Path) -> None:
    results.write_csv(rows(), tmp_path / "new" / "cpu.csv")
    assert results.read_csv(tmp_path / "new" / "cpu.csv") == rows()


@pytest.mark.parametrize(("value", "agree", "verdict"), [(1.6, True, "pass"), (1.4, True, "MISS"), (1.6, False, "WRONG")])
def test_console(value: float, agree: bool, verdict: str) -> None:
    header, _, causal, full = table.console(rows(value, agree)).splitlines()
    assert header.split() == ["case", "ms", "torch", "onnxruntime", "also", "needs"]
    assert causal.endswith(verdict) and ">= 1.50x" in causal and "not installed" in causal
    assert full.endswith("pass") and "75% of FMA peak" in full and ">= 70% of FMA peak" in full


def test_warning_of_a_busy_machine() -> None:
    assert table.warning(rows()) == ""
    assert "1.5 processors" in table.warning([replace(rows()[0], others=1.5)])


def test_readme_between_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Name\n<!-- bench:cpu:begin -->\nold \\1 text\n<!-- bench:cpu:end -->\nafter\n")
    for _ in range(2):  # again changes nothing
        table.update_readme(readme, "cpu", table.markdown(rows()))
    text = readme.read_text()
    assert text.startswith("# Name\n<!-- bench:cpu:begin -->\nMeasured 2030-01-02 on A processor, 1 threads")
    assert text.endswith("\n<!-- bench:cpu:end -->\nafter\n") and "old" not in text
    assert "| forward+backward | float32 | (1,2,16,8) | 2.00 |  |  | 2.00 | 1.60x |  |" in text
    assert "75% of FMA peak" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md has the markers .* 0 times"):
        table.update_readme(readme, "cpu", "text")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.plot(rows(), tmp_path / "cpu.png") and (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"
    assert not plot.plot(rows()[3:], tmp_path / "none.png")
