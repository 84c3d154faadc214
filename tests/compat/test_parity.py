"""docs/parity.md is true: no cell is empty, and every function, test and file that it names exists."""
from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "parity.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|") and "---" not in line]


def test_no_cell_is_empty() -> None:
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 4 and all(row), row
        assert "not supported" not in " ".join(row), row


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(fastattn(?:\.\w+)+)", TEXT))))
def test_functions_exist(name: str) -> None:
    if name.startswith("fastattn.gpu"):
        pytest.importorskip("numba")
    for framework in ("torch", "jax"):
        if name.startswith(f"fastattn.{framework}"):
            pytest.importorskip(framework)
    if name == "fastattn.compat":
        importlib.import_module(name)
        return
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_tests_exist() -> None:
    found = re.findall(r"`([\w/]+)::(test_\w+)`", TEXT)
    for file, test in found:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE), f"{file}::{test}"
    for row in ROWS:
        assert "::" in row[2] or row[2] in ("pending", "test"), row


def test_files_exist() -> None:
    for path in set(re.findall(r"`((?:fastattn|examples|bench|docs)/[\w/]+\.\w+)`", TEXT)):
        assert (ROOT / path).exists(), path
