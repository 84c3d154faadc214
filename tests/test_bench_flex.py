"""`python -m bench flex` on the host: every kind is right, times are there, and a wrong number is said to be one."""
from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from bench import __main__ as command  # noqa: E402
from bench import flex  # noqa: E402

SHAPE = (1, 64, 2, 8)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention as it is: compiling it takes a minute here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("backward", [False, True])
def test_rows(backward: bool) -> None:
    rows = list(flex.run("cpu", SHAPE, "float32", backward, "ALiBi|document" if backward else None, "reference", rounds=1))
    assert len(rows) == (2 if backward else 8)
    for row in rows:
        assert row.error is not None and row.error < flex.TOLERANCE["float32"] and "WRONG" not in row.note
        assert row.times["functions"] and row.times["plain"] and (row.kind not in ("causal", "ALiBi", "sliding") or row.times["built in"])
        assert flex.line(row).count("|") == flex.HEAD.split("\n")[0].count("|")


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    [kind] = [kind for kind in flex.kinds(64, 2, "cpu") if kind.name == "softcap"]
    case = flex.Case(kind, SHAPE, "float32", "cpu", False, "reference")
    monkeypatch.setattr(case, "kind", replace(kind, score_mod=lambda s, b, h, q, k: s))
    out = case.attend(score_mod=lambda s, b, h, q, k: 2 * s, mask_mod=kind.mask_mod)
    assert case.error(out) > 1e-2


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(flex, "QUICK", SHAPE)
    path = tmp_path / "flex.csv"
    command.main(["flex", "--quick", "--engine", "reference", "--only", "sliding", "--csv", str(path)])
    assert "| sliding |" in capsys.readouterr().out
    [row] = csv.DictReader(path.open())
    assert row["kind"] == "sliding" and float(row["functions us"]) > 0
    command.main(["flex", "--list"])
    assert capsys.readouterr().out.split("\n")[:2] == ["causal", "ALiBi"]


def test_the_page_has_the_numbers_of_the_results() -> None:
    """docs/howto/functions.md has the table of bench/results/flex.csv."""
    root = Path(__file__).parents[1]
    page, kept = (root / "docs" / "howto" / "functions.md").read_text(), root / "bench" / "results" / "flex.csv"
    assert "\n".join(flex.page_table(kept)) in page


def test_targets_of_the_results() -> None:
    """On the device that is measured: gradients at 1.5 times flex_attention's speed, cheap masks within a tenth of the built-in ones."""
    with (Path(__file__).parents[1] / "bench" / "results" / "flex.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        mine, rival = float(row["functions us"]), float(row["flex_attention us"])
        assert rival / mine > (1.5 if row["passes"] == "backward" else 1.7), row
        if row["kind"] in ("causal", "sliding"):
            assert mine <= 1.1 * float(row["built in us"]), row
