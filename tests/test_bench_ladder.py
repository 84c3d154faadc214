"""The ladder of the reading course: its cases, their first rung, its rows of other files, and its table in docs/course/index.md.

No GPU: tiny cases run on CPU tensors with the reference engine.
"""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench.timing import Spread

from bench import results
from bench.__main__ import main
from bench.case import Case
from bench.gpu import ladder
from bench.results import Row
from tests.tools.bench import WHERE, Processor, shrunk

ROOT = Path(__file__).parents[1]
TIME = Spread(0.002, 0.001, 0.003)


def tiny() -> list[Case]:
    """The ladder's cases at a size for the reference engine, without the rivals that need a GPU."""
    return [replace(shrunk(case), against=("unfused", "math", "simt"), bars=()) for case in ladder.cases()]


def test_cases_are_those_that_bench_gpu_measures_a_part_of() -> None:
    found = ladder.cases()
    assert len({case.name for case in found}) == len(found) == 9
    assert all(set(case.against) <= {*ladder.RUNGS, *ladder.RIVALS} and case.kernels == ladder.FAMILY for case in found)
    assert {(case.passes, case.head_dim, case.causal) for case in found if case.seqlen > 1} == {
        (passes, dim, causal) for passes in ("forward", "backward") for dim in (64, 128) for causal in (False, True)}
    assert ladder.forced(found[0], "simt").kernels == "simt"
    with pytest.raises(SystemExit, match="no case of the ladder has a name that matches 'nothing'"):
        ladder.choose("full", "nothing", ())
    assert all("FA4" not in case.against for case in ladder.choose("full", None, ("FA4",)))


def test_rungs_compute_the_same() -> None:
    """The first two rungs, and a family's rows, against the float64 reference: forward, gradients, one query, grouped heads."""
    pytest.importorskip("torch")
    from bench.gpu import worker

    bench = worker.Bench(Processor(), WHERE, worker.Budget(rounds=2, turn=0), engine="reference")
    for case in tiny():
        rows = {row.implementation: row for row in bench.rows(case)}
        for name in ("fastattn", "unfused", "math", "simt"):
            row = rows[name]
            assert row.error is not None and row.error < 0.01 and row.verdict != "WRONG", (case.name, name, row.note, row.error)
            assert (row.gigabytes is not None) == (case.seqlen == 1)


def test_the_first_rung_can_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from bench.gpu import worker

    causal = next(case for case in tiny() if case.causal and not case.alone)
    make = ladder.make_unfused
    monkeypatch.setattr(ladder, "make_unfused", lambda case, q: make(replace(case, causal=False), q))
    bench = worker.Bench(Processor(), WHERE, worker.Budget(rounds=2, turn=0), engine="reference")
    assert {row.implementation: row.verdict for row in bench.rows(causal)}["unfused"] == "WRONG"


def invented() -> list[Row]:
    case = next(case for case in ladder.cases() if case.head_dim == 128 and not case.causal and not case.alone)
    return [results.make_row(WHERE, case, "fastattn", time=TIME), results.make_row(WHERE, case, "simt", time=TIME.scaled(40)),
            results.make_row(WHERE, case, "math", note="failed: OutOfMemoryError: no"),
            results.make_row(WHERE, case, "cuDNN", time=TIME, agree=False),
            results.make_row(WHERE, ladder.cases()[-1], "fastattn", time=TIME, gigabytes=4000.4)]


def test_table_of_the_ladders_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_csv(invented(), tmp_path / "ladder.csv")
    text = ladder.markdown(ladder.rows_of(tmp_path))
    rate = f"{4 * 4096 * 4096 * 128 * 64 / 0.002 / 1e12:.0f}"
    none = ladder.MISSING
    assert f"| sm90 | wgmma, TMA, warp roles | {none} | {none} | {rate} | {none} |" in text
    assert f"| simt | tiles, online softmax | {none} | {none} | {float(rate) / 40:.0f} | {none} |" in text
    assert "| failed |" in text and "| WRONG |" in text and "| sm90 | the kernel of few queries | 4000 |" in text
    assert "one run of `python -m bench ladder`" in text and "A processor, 2030-01-02" in text
    assert ladder.markdown([]).count(none) == text.count(none) + 5
    with pytest.raises(SystemExit, match="a fast wrong answer means nothing"):
        main(["ladder", "--from-csv", "--csv", str(tmp_path / "ladder.csv")])
    assert f"| {rate} |" in capsys.readouterr().out


def test_rows_of_bench_gpu_stand_in() -> None:
    """Only the ladder's problems, under the rungs' names."""
    case = ladder.cases()[0]
    forced = replace(case, group="sm80", kernels="sm80")
    for one, name, as_name in ((forced, "fastattn", "sm80"), (forced, "flash", "flash"), (replace(case, group="grid"), "fastattn", "sm90"),
                               (replace(case, group="grid"), "cuDNN", "cuDNN")):
        assert [row.implementation for row in ladder.stand_in(results.make_row(WHERE, one, name, time=TIME))] == [as_name]
    for one, name in ((replace(case, group="grid", seqlen=512), "fastattn"), (replace(case, group="grid"), "cuDNN|FA4"),
                      (replace(case, group="features"), "fastattn"), (replace(case, group="grid", dtype="bfloat16"), "fastattn")):
        assert not list(ladder.stand_in(results.make_row(WHERE, one, name, time=TIME)))


def test_the_course_has_the_table() -> None:
    """docs/course/index.md has what the CSVs give: `python -m bench ladder --from-csv --update-course` writes it."""
    if not (ROOT / "bench" / "results").is_dir():
        pytest.skip("results are not part of a source distribution")
    text = (ROOT / "docs" / "course" / "index.md").read_text()
    [table] = re.findall(r"<!-- bench:ladder:begin -->\n(.*?)\n<!-- bench:ladder:end -->", text, re.DOTALL)
    assert table == ladder.markdown(ladder.rows_of(ROOT / "bench" / "results"))


def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import run

    def no_device() -> None:
        raise SystemExit("bench gpu needs a CUDA device")
    monkeypatch.setattr(run, "check_device", no_device)
    main(["ladder", "--list", "--only", "backward"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        main(["ladder", "--quick"])
    main(["ladder", "--from-csv"])
    assert "| forward, TFLOP/s |" in capsys.readouterr().out
