"""The benchmark's own arithmetic and files, and tiny cases run on the reference engine: no other library, compiled engine or GPU needed.

The GPU's part runs on CPU tensors with a wall clock, under names that are never written to a file of results.
"""
from __future__ import annotations

import fcntl
import json
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cpu, plot, results, rivals, table, worker
from bench.__main__ import ROOT, main
from bench.case import Bar, Case
from bench.gpu import cases as gpu_cases
from bench.gpu import plot as gpu_plot
from bench.gpu import run as gpu_run
from bench.gpu import table as gpu_table
from bench.results import Row
from fastattn.benchmark.timing import Budget, Call, Spread, alternate, ratios, rotate
from fastattn.masks import row_bounds
from tests.tools.bench import TINY, WHERE, Processor, shrunk

RESULTS = ROOT / "bench" / "results"
BUDGET = Budget(rounds=3, seconds=0, settle=0, turn=0)


def rows(value: float = 1.6, agree: bool = True) -> list[Row]:
    """fastattn, torch and onnxruntime on a causal case, and a ceiling on the same case without the mask."""
    full = replace(TINY, causal=False, bars=(Bar("fma peak", "ceiling", 0.7),))
    time = Spread(0.002, 0.001, 0.003)
    return [results.make_row(WHERE, TINY, "fastattn", time=time, others=0.0),
            results.make_row(WHERE, TINY, "torch", time=time, measure="speedup", value=Spread(value, 1.0, 2.0), agree=agree),
            results.make_row(WHERE, TINY, "onnxruntime", note="not installed: onnxruntime"),
            results.make_row(WHERE, full, "fastattn", time=time),
            results.make_row(WHERE, full, "fma peak", measure="ceiling", value=Spread(0.75, 0.7, 0.8))]


@pytest.mark.parametrize(("causal", "window", "seqlen", "seqlen_k"),
                         [(False, None, 5, 9), (True, None, 9, 9), (True, 3, 9, 12), (True, 3, 9, 5)])
def test_scored_pairs_agree_with_row_bounds(causal: bool, window: int | None, seqlen: int, seqlen_k: int) -> None:
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


def test_bars_know_which_direction_is_better() -> None:
    assert Bar("torch", "speedup", 1.4).met(1.4) and not Bar("torch", "speedup", 1.4).met(1.39)
    assert Bar("plain", "cost", 1.6).met(1.5) and not Bar("fastattn", "memory", 64).met(65)
    assert str(Bar("torch", "speedup", 1.4)) == ">= 1.40x" and str(Bar("plain", "cost", 1.6)) == "<= 1.60x"


def test_calls_alternate() -> None:
    order: list[str] = []
    clock = {"a": 1.0, "b": 3.0}

    def timer(call: Call) -> float:
        order.append(str(call()))
        return clock[order[-1]]

    ours, theirs = alternate(lambda: "a", lambda: "b", BUDGET, timer)
    assert order[6:] == ["a", "b"] * 3  # after three calls of each to warm up
    assert ratios(theirs, ours).median == 3


def test_difference_finds_a_wrong_row_and_nan() -> None:
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


@pytest.mark.parametrize("case", [TINY, replace(TINY, backward=False, dtype="bfloat16"), replace(TINY, seqlen_k=40, num_heads=4,
                                  num_heads_k=2, seqlen=1, causal=False, backward=False)], ids=lambda case: case.name)
def test_torch_computes_the_same_on_a_cpu(case: Case) -> None:
    pytest.importorskip("torch")
    x = rivals.make_inputs(case)
    ours = rivals.make_fastattn(case, x, 1, "reference")
    for name in ("torch", "torch folded") if case.num_heads_k else ("torch",):
        theirs = rivals.MAKERS[name](case, x, 1)
        assert ours.arrays and theirs.arrays
        both = zip(ours.arrays(ours.call()), theirs.arrays(theirs.call()), strict=True)
        assert all(worker.difference(a, b) <= worker.TOLERANCE[case.dtype] for a, b in both)


@pytest.mark.parametrize("cache_dtype", ["", "float8_e4m3fn"])
def test_caches_in_pages_hold_the_same_keys(cache_dtype: str) -> None:
    case = next(case for case in cpu.cases() if case.group == "paged" and case.cache_dtype == cache_dtype)
    case = replace(case, batch=2, num_heads=4, num_heads_k=2, seqlen_k=64, head_dim=16)
    x = rivals.make_inputs(case)
    ours, theirs = rivals.make_fastattn(case, x, 1), rivals.MAKERS["contiguous"](case, x, 1)
    assert ours.arrays and theirs.arrays and "contiguous" in theirs.label
    assert np.array_equal(ours.arrays(ours.call())[0], theirs.arrays(theirs.call())[0])
    assert case.kv_bytes == 2 * 2 * 2 * 64 * 16 * (1 if cache_dtype else 4) and "page16" in case.name


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


def test_pages_between_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Name\n<!-- bench:cpu:begin -->\nold \\1 text\n<!-- bench:cpu:end -->\nafter\n")
    for _ in range(2):  # again changes nothing
        table.update_readme(page, "cpu", table.markdown(rows()))
    text = page.read_text()
    assert text.startswith("# Name\n<!-- bench:cpu:begin -->\nMeasured 2030-01-02 on A processor, 1 threads")
    assert text.endswith("\n<!-- bench:cpu:end -->\nafter\n") and "old" not in text
    assert "| forward+backward | float32 | (1,2,16,8) | 2.00 |  |  | 2.00 | 1.60x |  |" in text
    assert "75% of FMA peak" in text and ">= 1.50x" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md has the markers .* 0 times"):
        table.update_readme(page, "cpu", "text")


def test_the_readme_shows_a_part() -> None:
    shape = table.SHOWN[0]
    changed = [replace(row, case=f"{row.case} {dtype}", shape=shape, dtype=dtype) for row in rows() for dtype in ("float32", "float16")]
    text = table.summary(changed)
    assert f"| float32 | {shape} | 2.00 |" in text and "float16" not in text and "FMA peak" not in text
    assert "| 2.00 |" not in table.summary(rows()) and "Measured" in table.summary(rows())


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.plot(rows(), tmp_path / "cpu.png") and (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"
    assert not plot.plot(rows()[3:], tmp_path / "none.png")


# ---------------------------------------------------------------- the GPU's cases, tables and protocol


def test_gpu_cases() -> None:
    forward, backward = gpu_cases.forward_cases(), gpu_cases.backward_cases()
    everything = forward + backward
    assert len({case.name for case in everything}) == len(everything)
    assert sum(case.group == "grid" for case in forward) == 72 == sum(case.group == "grid" for case in backward)
    assert all(name in ("fastattn", *case.against) for case in everything for bar in case.bars for name in bar.against.split("|"))
    assert all(case.batch * case.seqlen == 16384 and case.num_heads * case.head_dim == 2048 for case in everything if case.group == "grid")
    limits = {(case.head_dim, case.seqlen): case.bars[-1].limit for case in forward if case.group == "grid"}
    assert limits[64, 512] == limits[256, 1024] == 0.85 and limits[128, 2048] == 0.95 and limits[256, 2048] == 0.90
    quick = gpu_cases.select(forward, "quick", None, ("FA4",))
    assert 0 < len(quick) < len(forward) and all("FA4" not in case.against for case in quick)
    assert not any("flash" in case.against for case in quick if case.group == "grid") and any("flash" in case.against for case in quick)
    assert all(Case.from_json(json.loads(json.dumps(asdict(case)))) == case for case in everything)


def test_packed_pairs_and_backward_flops() -> None:
    case = Case("packed", 2, 3, 5, 8, lengths=(5, 2), causal=True)
    assert case.pairs == 3 * (15 + 3) and case.shape == "(2,3,<=5,8)"
    assert replace(case, backward=True, alone=True).flops == 2.5 * case.flops
    assert replace(case, backward=True, alone=True).passes == "backward"


def test_rounds_rotate() -> None:
    order: list[str] = []
    samples = rotate([lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0], 3, 0.0)
    assert order == ["a", "b"] * 3 and samples == [[1.0] * 3, [2.0] * 3]


def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench whose rivals are all torch's CPU attention, without flash: then the yardstick is the emulated kernel."""
    pytest.importorskip("torch")
    from bench.gpu import rivals as gpu_rivals
    from bench.gpu import worker as gpu_worker

    for name in ("cuDNN", "FA4", "efficient"):
        monkeypatch.setitem(gpu_rivals.MAKERS, name, lambda case, x, _: gpu_rivals.make_sdpa(case, x, "sdpa"))
    monkeypatch.setattr(gpu_rivals, "missing", lambda name: f"not installed: {name}" if name in ("varlen_attn", "flash") else None)
    return gpu_worker.Bench(Processor(), WHERE, gpu_worker.Budget(2, 0.001), "reference")


def test_gpu_cases_run_and_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu_bench(monkeypatch)
    cases = {case.name: case for case in map(shrunk, gpu_cases.forward_cases() + gpu_cases.backward_cases()) if case.group != "host"}
    for case in cases.values():
        found = {row.implementation: row for row in bench.rows(case)}
        own = found["fastattn"]
        if case.group == "memory":
            assert own.measure == "memory" and own.value == 1.5 and own.verdict == "pass"
            continue
        assert own.verdict == "pass" and own.error and 0 < own.error < 0.01, (case.name, own)
        assert own.measure == "error" and own.value and own.value < 1.05 and own.rounds == 2 and own.clock_mhz == 1000
        assert case.alone or (own.lse_error is not None and own.lse_error < 1e-6)
        assert (own.gigabytes is not None) == (case.group == "decode")
        assert "varlen_attn" not in found or found["varlen_attn"].note == "not installed: varlen_attn"
        assert all(row.error is None or row.error < 0.01 for row in found.values()), case.name


def test_the_best_of_several_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu_bench(monkeypatch)
    case = shrunk(gpu_cases.forward_cases()[0])
    found = {row.implementation: row for row in bench.rows(case)}
    fastest = min((found["cuDNN"], found["FA4"]), key=lambda row: row.median_ms or 0.0)
    best = found["cuDNN|FA4"]
    assert best.median_ms == fastest.median_ms and best.value == fastest.value and best.label.startswith(fastest.implementation)
    assert best.verdict in ("pass", "MISS") and best.needs == ">= 0.85x" and not fastest.needs
    found = {row.implementation: row for row in bench.rows(replace(case, against=("cuDNN",)))}
    assert found["cuDNN|FA4"].note == "without FA4" and found["cuDNN|FA4"].verdict == "" and found["cuDNN|FA4"].value


def test_a_wrong_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, another scale, a wrong lse, and a rival that computes something else."""
    import_torch = pytest.importorskip("torch")
    from bench.gpu import rivals as gpu_rivals

    bench = gpu_bench(monkeypatch)
    case = shrunk(gpu_cases.forward_cases()[0])
    make = gpu_rivals.make_fastattn

    def spoiled(name: str, spoil: Callable[[Any], Any]) -> Callable[..., Any]:
        def maker(case: Case, x: Any, engine: str | None = None) -> Any:
            right = make(case, x, engine)
            assert right.checked
            return replace(right, checked=lambda: (found := right.checked()) | {name: spoil(found[name].clone())})
        return maker

    for name, spoil in (("out", lambda t: t.index_fill_(1, import_torch.tensor([3]), math.nan)), ("out", lambda t: t * 1.02),
                        ("lse", lambda t: t + 1e-4)):
        monkeypatch.setattr(gpu_rivals, "make_fastattn", spoiled(name, spoil))
        found = list(bench.rows(case))
        assert found[0].verdict == "WRONG" and "lse" in found[0].note
        assert "WRONG" in gpu_table.console(found) and gpu_table.closing(found) == "1 WRONG"
    monkeypatch.setattr(gpu_rivals, "make_fastattn", make)
    monkeypatch.setitem(gpu_rivals.MAKERS, "cuDNN", lambda case, x, _: gpu_rivals.make_sdpa(replace(case, causal=True), x, "sdpa"))
    found = {row.implementation: row for row in bench.rows(case)}
    assert found["cuDNN"].verdict == "WRONG" and found["fastattn"].verdict == "pass"
    best = found["cuDNN|FA4"]
    assert best.value == found["FA4"].value and best.note == "without cuDNN, which is wrong" and best.verdict in ("pass", "MISS")


def gpu_rows(ratio: float = 1.02) -> list[Row]:
    """Two grid cells, a decode case and a failing one, with invented times."""
    cells = [case for case in gpu_cases.forward_cases() if case.group == "grid" and case.dtype == "bfloat16" and case.head_dim == 128][4:6]
    found: list[Row] = []
    for case in cells:
        one, time_ = Spread(0.97, 0.97, 0.97), Spread(0.002, 0.002, 0.002)
        found += [results.make_row(WHERE, case, "fastattn", time=time_, measure="error", value=one, error=2e-4, clock_mhz=1980),
                  results.make_row(WHERE, case, "cuDNN", time=time_, measure="speedup", value=Spread(ratio, ratio, ratio)),
                  results.make_row(WHERE, case, "FA4", note="not installed: FA4"),
                  results.make_row(WHERE, case, "cuDNN|FA4", time=time_, measure="speedup", value=Spread(ratio, ratio, ratio))]
    decode = next(case for case in gpu_cases.forward_cases() if case.group == "decode")
    found += [results.make_row(WHERE, decode, "fastattn", time=Spread(1e-5, 1e-5, 1e-5), gigabytes=3355.4),
              *(results.make_row(WHERE, decode, name, time=Spread(1e-5, 1e-5, 1e-5), measure="speedup", value=Spread(value, value, value))
                for name, value in (("cuDNN", 0.8), ("flash", 0.5))),
              results.make_row(WHERE, shrunk(decode), "fastattn", note="failed: RuntimeError: no")]
    return found + gpu_table.geometric_means(found)


def test_gpu_csv_table_and_plot(tmp_path: Path) -> None:
    found = gpu_rows()
    results.write_csv(found, tmp_path / "gpu.csv")
    again = results.read_csv(tmp_path / "gpu.csv")
    assert gpu_table.console(again) == gpu_table.console(found) and again[0].clock_mhz == 1980 and again[2].error is None
    _, _, cell, _, decode, failed, mean = gpu_table.console(found).splitlines()
    assert cell.split()[-7:] == ["550", "550", "1.02x", ">=", "0.95x", "0.97x", "pass"]
    assert "3355 GB/s" in decode and "0.50x" in decode and "0.80x" not in decode       # the ratio to the fastest
    wrong = [replace(row, verdict="WRONG") if row.implementation == "flash" else row for row in found]
    decode = gpu_table.console(wrong).splitlines()[4]
    assert "0.80x" in decode and "0.50x" not in decode and decode.endswith("WRONG")    # the fastest whose result is right
    assert failed.endswith("FAILED") and "failed: RuntimeError" in failed
    assert " ".join(mean.split()) == "geometric mean fwd over 2 cells of the grid 1.02x >= 1.00x pass"
    assert "FA4: not installed: FA4 (2x, first fwd bf16 grid full (2,16,8192,128))" in gpu_table.notes(found)
    assert gpu_table.closing(found) == "3 pass, 1 FAILED, 1 not measured"
    assert gpu_table.closing(gpu_rows(0.9)) == "3 MISS, 1 FAILED, 1 not measured"
    if pytest.importorskip("matplotlib"):
        assert gpu_plot.plot(found, tmp_path / "gpu.png") and (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"


def test_gpu_pages() -> None:
    found = gpu_rows()
    assert "| forward | bfloat16 | 128 | full | 550 (1.02) | 1100 (1.02) |" in gpu_table.markdown(found)
    text = gpu_table.summary(found)
    assert "| forward | bfloat16 | 128 | full | 550 (1.02) | 1100 (1.02) |" in text
    assert "| forward | bfloat16 | decode | (1,32,1,128) over 8192x8 | 3355 GB/s |" in text
    assert "FlashAttention-2 of torch" in text and "failed" not in text
    assert not any("needs" in page or ">=" in page for page in (gpu_table.markdown(found), text))


def test_panels_stand_in_one_order() -> None:
    """Whatever order children finish in: bfloat16 first, small heads first, the backward beside the forward. A wrong result has no line."""
    cells = [case for case in (*gpu_cases.backward_cases(), *gpu_cases.forward_cases()) if case.group == "grid"][::-1]
    grid = [results.make_row(WHERE, case, "fastattn", time=Spread(0.002, 0.002, 0.002)) for case in cells]
    order = list(gpu_plot.panels(grid))
    assert len(order) == 24 and [panel.dtype for panel in order] == ["bfloat16"] * 12 + ["float16"] * 12
    assert [panel.head_dim for panel in order[:12]] == [64] * 4 + [128] * 4 + [256] * 4
    assert [panel[2:] for panel in order[:4]] == [("forward", "full"), ("forward", "causal"), ("backward", "full"), ("backward", "causal")]
    assert gpu_plot.panels([replace(row, verdict="WRONG") for row in grid]) == {}


def test_the_readmes_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.svg"
    assert not gpu_plot.headline(gpu_rows(), path) and not path.exists()          # without head_dim 64 and a backward
    grid = [case for case in (*gpu_cases.backward_cases(), *gpu_cases.forward_cases()) if case.group == "grid" and case.causal]
    assert gpu_plot.headline([results.make_row(WHERE, case, "fastattn", time=Spread(0.002, 0.002, 0.002)) for case in grid], path)
    assert path.read_text().startswith("<?xml")


@pytest.mark.skipif(not (RESULTS / "gpu.csv").is_file(), reason="bench/results is not in the sdist")
@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_results_that_are_there(page: str) -> None:
    """Every number between the markers is that of the CSV files."""
    write = ("summary" if page == "README.md" else "markdown")
    text = (ROOT / page).read_text()
    gpu = [row for name in ("gpu", "gpu-backward") for row in results.read_csv(RESULTS / f"{name}.csv")]
    assert getattr(table, write)(results.read_csv(RESULTS / "cpu.csv")) in text
    assert getattr(gpu_table, write)(gpu) in text


CHILD = """
import json, sys
job = json.load(sys.stdin)
for n, case in enumerate(job["cases"]):
    print(json.dumps({"begin": name(case)}), flush=True)
    if n == 0 and len(job["cases"]) > 1:
        FAULT
    print(json.dumps({"rows": [row(case)], "seconds": 0.1}), flush=True)
print(json.dumps({"end": True}), flush=True)
"""
CHILD_ROWS = """
from dataclasses import asdict
from bench import results
from bench.case import Case
where = results.Where("2030-01-02", "A card", "sm_90", 1, "3.11", "torch 2", "copy 9 GB/s")
def name(case): return Case.from_json(dict(case)).name
def row(case): return asdict(results.make_row(where, Case.from_json(dict(case)), "fastattn"))
"""


@pytest.mark.parametrize(("fault", "why"), [("sys.exit('out of luck')", "exit status 1: out of luck"),
                                            ("import time; time.sleep(60)", "no answer for 3 s")])
def test_a_lost_child_costs_one_case(fault: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "COMMAND", (sys.executable, "-c", CHILD_ROWS + CHILD.replace("FAULT", fault)))
    chosen = gpu_cases.forward_cases()[:2]
    found = gpu_run.run(chosen, "quick", tmp_path / "gpu.csv", patience=3)
    assert [row.case for row in found] == [case.name for case in chosen]
    assert found[0].verdict == "WRONG" and why in found[0].note and found[1].note == ""
    assert [row.case for row in results.read_csv(tmp_path / "gpu.csv")] == [case.name for case in chosen]


@pytest.mark.parametrize(("held", "wanted"), [("EX", "EX"), ("EX", "SH"), ("SH", "EX")])     # who measures, EX; who compiles, SH
def test_children_share_kernels_and_measure_one_at_a_time(held: str, wanted: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from bench.gpu import worker as gpu_worker

    parts = list(gpu_run.by_kernels(gpu_cases.forward_cases()))
    assert sum(map(len, parts)) == len(gpu_cases.forward_cases()) and len(parts[0]) == 6
    assert len({(case.head_dim, case.causal) for case in parts[0]}) == 1
    path, done = tmp_path / "lock", threading.Event()
    with path.open("w") as mine, path.open("w") as others:
        fcntl.flock(mine, getattr(fcntl, f"LOCK_{held}"))
        kind = getattr(fcntl, f"LOCK_{wanted}")
        thread = threading.Thread(target=lambda: (gpu_worker.wait(others, kind, lambda answer: None), done.set()))
        thread.start()
        assert not done.wait(0.3)
        fcntl.flock(mine, fcntl.LOCK_UN)
        assert done.wait(5)
        thread.join()


def test_gpu_command_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_device() -> None:
        raise SystemExit("bench gpu needs a CUDA device")

    monkeypatch.setattr(gpu_run, "check_device", no_device)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        main(["gpu", "--quick", "--csv", str(tmp_path / "gpu.csv")])
    assert not (tmp_path / "gpu.csv").exists()
    main(["gpu", "--list", "--only", "window"])
    assert capsys.readouterr().out.splitlines()[0] == "window forward bfloat16 causal+window (1,16,16384,128)"
    results.write_csv(gpu_rows(), tmp_path / "gpu.csv")
    with pytest.raises(SystemExit, match="FAILED"):
        main(["gpu", "--from-csv", "--csv", str(tmp_path / "gpu.csv")])
    assert capsys.readouterr().out.splitlines()[-1] == "3 pass, 1 FAILED, 1 not measured"
