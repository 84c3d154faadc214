"""`python -m bench paired`: each process imports the fastattn of its tree,
rounds alternate, and a cell that got slower is found.

The trees are packages of a few lines with a known speed; no compiled engine or GPU is needed.
"""
from __future__ import annotations

import ast
import csv
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import cpu, paired, paired_worker
from bench.__main__ import main
from bench.case import Case
from bench.gpu import cases as gpu_cases
from fastattn.benchmark.timing import Budget
from tests.tools.bench import TINY, Processor, shrunk

BUDGET = Budget(rounds=4, seconds=0)
FORWARD = replace(TINY, backward=False)
PACKAGE = """
import os, time
import numpy as np
__version__ = "{name}"
def set_num_threads(n): pass
def attention(q, k, v, **options):
    {body}
    return q
"""


def tree(path: Path, body: str) -> Path:
    """A tree whose attention runs `body`."""
    (path / "fastattn").mkdir(parents=True)
    (path / "fastattn" / "__init__.py").write_text(PACKAGE.format(name=path.name, body=body))
    return path


def test_a_slower_tree_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slower cell is measured again by new processes, and all rounds are pooled."""
    trees = tree(tmp_path / "old", "time.sleep(0.01)"), tree(tmp_path / "new", "time.sleep(0.03 if options['causal'] else 0.001)")
    slower, faster = paired.run(trees, [FORWARD, replace(FORWARD, causal=False)], "cpu", 1, BUDGET)
    assert slower.ratio and 2 < slower.ratio.median < 4 and slower.over(0.02) and len(slower.new) == len(slower.old) == 12
    assert faster.ratio and faster.ratio.median < 0.6 and not faster.over(0.02) and len(faster.new) == 4
    said = capsys.readouterr().out
    assert said.count(" again ") == 2 and said.splitlines()[0].startswith(f"[  1/2] {FORWARD.name}: ")
    text = paired.table([faster, slower], 0.02).splitlines()
    assert text[2].startswith(slower.case.name) and text[2].endswith("OVER 1.02") and text[3].startswith(faster.case.name)
    assert text[-1].startswith("2 cells: new / old geometric mean ") and text[-1].endswith("; 1 over 1.02")
    paired.write_csv([faster, slower], tmp_path / "results" / "paired.csv")
    with (tmp_path / "results" / "paired.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["case"] == slower.case.name and first["rounds"] == "12" and 25 < float(first["new_ms"]) < 200
    assert float(second["ratio"]) < 0.6 and second["note"] == ""


@pytest.mark.parametrize(("body", "said"), [("if options['causal']: raise ValueError('no causal here')", "new: ValueError: no causal here"),
                                            ("if options['causal']: os.write(2, b'out of luck\\n'); os._exit(3)",
                                             "new: exit status 3: out of luck")])
def test_a_tree_that_fails_costs_one_cell(body: str, said: str, tmp_path: Path) -> None:
    trees = tree(tmp_path / "old", "pass"), tree(tmp_path / "new", body)
    cells = paired.run(trees, [FORWARD, replace(FORWARD, causal=False)], "cpu", 1, BUDGET)
    assert cells[0].note == said and not cells[0].ratio and not cells[1].note and cells[1].ratio
    assert said in paired.table(cells, 9.0).splitlines()[2] and paired.closing(cells, 9.0).endswith("0 over 10.00; 1 not measured")


def test_a_tree_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "PATIENCE", 3)
    trees = tree(tmp_path / "old", "pass"), tree(tmp_path / "new", "time.sleep(60)")
    [cell] = paired.run(trees, [FORWARD], "cpu", 1, BUDGET)
    assert cell.note == "new: no answer for 3 s"


def test_fastattn_of_another_tree_is_an_error(tmp_path: Path) -> None:
    """A tree without the package imports the installed one, which is an error."""
    (tmp_path / "empty").mkdir()
    worker = paired.Worker("old", tmp_path / "empty", {"gpu": False, "threads": 1, "engine": None})
    try:
        with pytest.raises(paired.LostError, match=r"exit status 1: .*fastattn"):
            worker.ask("turn")
    finally:
        worker.close()
    with pytest.raises(SystemExit, match="expected a tree of the repository"):
        main(["paired", str(tmp_path / "empty")])


class Scripted:
    """Workers that record the parent's requests, without processes."""

    orders: ClassVar[list[tuple[str, str, Any]]] = []

    def __init__(self, name: str, tree: Path, job: dict[str, Any]) -> None:
        self.name, self.tree = name, tree

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        self.orders.append((self.name, do, (self.tree, more)))
        return {"seconds": 1.0} if do == "turn" else {}

    def close(self) -> None:
        self.orders.append((self.name, "close", None))


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    monkeypatch.setattr(paired, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "orders", [])
    return Scripted.orders


def test_rounds_alternate(orders: list[tuple[str, str, Any]]) -> None:
    [cell] = paired.run([Path("a"), Path("b")], [FORWARD], "cpu", 1, BUDGET)
    assert [name for name, do, _ in orders if do == "turn"] == ["old", "new", "new", "old"] * 2
    assert [name for name, do, _ in orders if do == "prepare"] == ["old", "new"] and cell.ratio == (1, 1, 1)


def test_kernels_of_both_trees_are_compiled_first(orders: list[tuple[str, str, Any]]) -> None:
    chosen = paired.select("gpu", "full", None)
    assert len(chosen) == 72 == len(paired.select("gpu", "full", None, backward=True))
    cells = paired.run([Path("a"), Path("b")], chosen, "gpu", 1, BUDGET)
    kinds = [do for _, do, _ in orders if do != "close"]
    assert kinds[:24] == ["compile"] * 24 and "compile" not in kinds[24:]
    compiled = [(where, Case.from_json(dict(case))) for _, do, given in orders if do == "compile" for where in given[:1]
                for case in given[1]["cases"]]
    for where in (Path("a"), Path("b")):
        assert sorted(case.name for tree, case in compiled if tree == where) == sorted(case.name for case in chosen)
    assert not any(case.against for _, case in compiled)       # no rival's kernels
    assert len(cells) == 72 and all(len(cell.new) == 4 for cell in cells)
    assert sum(do == "close" for _, do, _ in orders) == 24 + 2


def answers(worker: paired_worker.Worker, chosen: Sequence[Case]) -> list[float]:
    found = []
    for case in chosen:
        assert worker.answer({"do": "prepare", "case": asdict(case)}) == {}
        found.append(worker.answer({"do": "turn"})["seconds"])
    return found


def test_a_worker_measures_the_cases_of_a_processor() -> None:
    worker = paired_worker.Worker(None, 1, "reference")
    assert all(0 < seconds < 5 for seconds in answers(worker, [TINY, FORWARD]))
    assert worker.answer({"do": "prepare", "case": asdict(replace(TINY, dtype="float8"))})["failed"].startswith("TypeError")
    assert worker.answer({"do": "turn"})["failed"].startswith("AssertionError")


def test_a_worker_measures_the_cases_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    worker = paired_worker.Worker(Processor(), 1, "reference")
    cases = [replace(shrunk(case), against=()) for case in gpu_cases.forward_cases() + gpu_cases.backward_cases() if case.group != "memory"]
    chosen = list({(case.group, case.passes): case for case in cases}.values())
    assert {"grid", "host", "packed", "decode", "bias"} <= {case.group for case in chosen}
    assert worker.answer({"do": "compile", "cases": [asdict(case) for case in chosen[:2]]}) == {}
    assert all(0 < seconds < 5 for seconds in answers(worker, chosen))


def test_which_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert {case.group for case in paired.select("gpu", "full", None)} == {"grid"}
    assert {case.group for case in paired.select("gpu", "full", "")} >= {"grid", "host", "decode", "packed"}
    assert [case.name for case in paired.select("cpu", "full", None)] == [case.name for case in cpu.select("full", None)
                                                                          if case.group != "memory"]
    main(["paired", "--list", "--quick", "--only", "decode", "anywhere"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit, match="no case"):
        main(["paired", "--only", "no such case", "anywhere"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed last, and the exit status says whether a cell is over the limit."""
    old, new = tree(tmp_path / "old", "time.sleep(0.01)"), tree(tmp_path / "new", "time.sleep(0.0002)")
    common = ["--threads", "1", "--only", "short.*16,32", "--csv", str(tmp_path / "paired.csv")]
    main(["paired", str(old), "--new", str(new), *common])
    assert capsys.readouterr().out.splitlines()[-1].endswith("; 0 over 1.02") and (tmp_path / "paired.csv").exists()
    with pytest.raises(SystemExit) as ended:
        main(["paired", str(new), "--new", str(old), *common])
    assert ended.value.code == 1 and capsys.readouterr().out.splitlines()[-1].endswith("; 1 over 1.02")


def test_the_worker_needs_nothing_of_an_older_package() -> None:
    """An older fastattn lacks modules of this one: a child imports the package itself, and nothing inside it before a call asks."""
    folder = Path(paired.__file__).parent
    for name in ("paired_worker.py", "rivals.py", "case.py", "ceilings.py", "gpu/rivals.py", "gpu/worker.py", "gpu/device.py"):
        path = folder / name
        for line in ast.parse(path.read_text()).body:
            names = [line.module or ""] if isinstance(line, ast.ImportFrom) and not line.level else \
                [name.name for name in line.names] if isinstance(line, ast.Import) else []
            assert not [name for name in names if name.startswith("fastattn.")], path
