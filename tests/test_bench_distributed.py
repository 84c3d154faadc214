"""`python -m bench distributed`: a small problem over TCP, the table, the picture."""
from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.distributed import report, run
from bench.distributed.cases import Case, cases, select
from bench.distributed.model import efficiency, exposed


def test_ranks_are_measured_beside_one() -> None:
    tiny = Case(256, 4, 2, "gather", 16, "float32")
    chosen = [tiny, replace(tiny, documents=5, dropout=0.2), replace(tiny, method="ring", window=40), replace(tiny, saved=True)]
    rows = list(run.run(chosen, [2], "cpu", seconds=120))
    assert [row["name"] for row in rows] == [
        "gather 0k 4/2", "gather 0k 4/2 5 documents dropout 0.2", "ring 0k 4/2 window 40", "gather 0k 4/2 saved"]
    assert all(x < 1e-6 for row in rows for x in row["errors"].values()) and rows[0]["errors"]["out"] == 0
    assert all(row["ranks"] == 2 and 0 < row["forward_host"] <= row["forward"] and row["step"] > 0 < row["one_step"] for row in rows)
    assert rows[0]["trace"] == [] and rows[0]["gib"] == 0


def test_the_work_of_documents() -> None:
    case = Case(131072, 32, 8, documents=64)
    cu = case.cu_seqlens
    assert len(cu) == 65 and cu[0] == 0 and cu[-1] == 131072 and cu == sorted(cu)
    assert case.flops == pytest.approx(sum(4 * 32 * 128 * (b - a) ** 2 / 2 for a, b in itertools.pairwise(cu)))


def test_ranks_that_fail_are_a_row() -> None:
    rows = list(run.run([Case(256, 4, 2, "gathers", 16, "float32")], [1], "cpu", seconds=60))
    assert rows == [{"name": "all", "ranks": 1, "note": "the ranks ended with status 1"}]


def row(name: str, ranks: int, **more: Any) -> dict[str, Any]:
    times = {"forward": 0.05, "backward": 0.15, "step": 0.19, "forward_host": 0.001, "backward_host": 0.002, "gib": 3.14159}
    return {"name": name, "ranks": ranks, "trace": [], "errors": {"out": 0.0, "dq": 1e-3}} | times | more


def test_the_table() -> None:
    rows = [row("gather 128k 32/8", 2, one_forward=0.098, one_backward=0.27, one_step=0.36),
            row("ring 1024k 32/8", 8, forward=0.8, backward=2.4, step=3.1, errors={}),
            {"name": "all", "ranks": 4, "note": "this machine has 2 CUDA devices"}]
    lines = report.lines(rows, "cuda").splitlines()[2:]
    assert lines[0] == ("| gather 128k 32/8 | 2 | 50.00 | 150.00 | 1.00, 2.00 | 6.9e+05 | 98 %, 90 %, 92 %, 95 % | 99 % | 3.14 | "
                        "0.0e+00, 1.0e-03 |")
    assert lines[1] == "| ring 1024k 32/8 | 8 | 800.00 | 2400.00 | 1.00, 2.00 | 3.38e+05 | 98 %, 90 %, 92 %, 93 % | 100 % | 3.14 |  |"
    assert lines[2] == "| all | 4 | this machine has 2 CUDA devices | | | | | | | |"


def test_the_model() -> None:
    """Bytes of K and V of half of 32768 rows, and twice as many of their gradients; half of them where there are two groups of heads."""
    keys = 16384 * 2 * 8 * 128 * 2
    assert exposed(Case(32768, 32, 8, pieces=1), 2, False) == keys and exposed(Case(32768, 32, 8, pieces=1), 2, True) == 3 * keys
    assert exposed(Case(32768, 32, 8), 2, True) == 1.5 * keys
    ring = Case(32768, 32, 8, "ring", pieces=1)
    assert exposed(ring, 2, False) == 0 and exposed(ring, 2, True) == 2 * keys
    assert exposed(Case(32768, 32, 8, "ulysses", pieces=1), 2, False) == 16384 * (48 / 2 + 32 / 2) * 256
    model = efficiency(Case(32768, 32, 8), 2, (0.013, 0.037))
    assert model == pytest.approx(0.025 / (0.025 + 2 * keys / 300e9 + 0.0007))
    assert efficiency(Case(32768, 32, 8, window=100), 2, (0.013, 0.037)) is None


def test_the_file_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("ring 32k 32/8", 2, trace=[("forward", 0.0, 1.0), ("transfer", 0.2, 0.6), ("backward", 1.0, 3.0)])]
    report.write(rows, "fastattn 1", tmp_path / "d.json")
    main(["distributed", "--from-json", "--json", str(tmp_path / "d.json")])
    assert "| ring 32k 32/8 | 2 | 50.00 |" in capsys.readouterr().out and (tmp_path / "d.png").stat().st_size > 1000
    assert json.loads((tmp_path / "d.json").read_text())["versions"] == "fastattn 1"


def test_the_lists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["distributed", "--list", "--quick", "--only", "ulysses.*32k"])
    assert capsys.readouterr().out.splitlines() == [
        f"ulysses 32k {heads}{pieces}" for heads in ("32/8", "16/16") for pieces in ("", " in 1 pieces", " in 2 pieces")] + [
            "ulysses 32k 32/8 saved"]
    assert len(cases("full", "cuda")) > len(cases("quick", "cuda")) and select("full", "cuda", "window")[0].window == 4096


def test_forwards_leave_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--leave: a CPU has no multiprocessors"):
        main(["distributed", "--device", "cpu", "--leave", "4"])
    pytest.importorskip("numba.cuda")
    from bench.distributed.worker import Rank
    from fastattn.gpu.precompile import absent_device
    from fastattn.gpu.runtime import launcher

    found, whole = launcher.Listing(absent_device("sm_90a")), absent_device("sm_90a").num_sms
    monkeypatch.setattr(launcher, "on_device", lambda ordinal: found)
    rank = object.__new__(Rank)
    rank.index, seen = 0, []
    for rank.leave in (4, 0):
        with rank.fewer_processors():
            seen.append(found.device.num_sms)
        seen.append(found.device.num_sms)
    assert seen == [whole - 4, whole, whole, whole]
