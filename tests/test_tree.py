"""The tests' own order: README.md's table names every module of the package and files that exist; tests and helpers are told apart."""
from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fastattn"
ROWS = re.findall(r"^\| (`[\w/.`, ]+`) \| (.*`[\w/]*test_\w+\.py`.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
NAMED = [name for modules, _ in ROWS for name in re.findall(r"`([\w/.]+)`", modules)]


def has_code(path: Path) -> bool:
    """Whether a file holds more than a docstring."""
    if path.suffix != ".py":
        return True
    body = ast.parse(path.read_text()).body
    return not all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_every_module_is_in_the_table() -> None:
    files = [path for pattern in ("*.py", "*.pyx", "*.pxi", "*.h") for path in PACKAGE.rglob(pattern) if has_code(path)]
    modules = {str(path.relative_to(PACKAGE)) for path in files}
    assert len(NAMED) == len(set(NAMED)), "a module is in the table twice"
    assert not modules - set(NAMED), f"without a row in tests/README.md: {sorted(modules - set(NAMED))}"
    assert not set(NAMED) - modules, f"rows of tests/README.md without a module: {sorted(set(NAMED) - modules)}"


def test_every_test_of_the_table_exists() -> None:
    named = {name for _, tests in ROWS for name in re.findall(r"`([\w/]*test_\w+\.py)`", tests)}
    assert not [name for name in sorted(named) if not (TESTS / name).is_file()]


def test_every_folder_is_a_package() -> None:
    """Absolute imports work from any folder, and two files may have one name."""
    folders = {path.parent for path in TESTS.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_tests_are_no_helpers() -> None:
    """No file imports a test, and no helper has a test's name."""
    for path in TESTS.rglob("*.py"):
        source = path.read_text()
        assert not re.search(r"^\s*(from|import) .*\btest_", source, re.MULTILINE), f"{path} imports a test"
        assert path.name.startswith("test_") or not re.search(r"^def test_", source, re.MULTILINE), f"{path} has tests"
        assert not (path.name.startswith("test_") and "tools" in path.parts), f"{path} is a helper with a test's name"


def test_gpu_tests_skip_before_they_import() -> None:
    """Without the GPU engine's packages a file is skipped; an import of theirs before that would be an error."""
    for path in (TESTS / "gpu").glob("test_*.py"):
        source = path.read_text()
        first = re.search(r"^(from|import) (fastattn\.gpu|tests\.tools\.gpu|numba|fastattn import .*\bgpu\b)", source, re.MULTILINE)
        assert first is None or 0 < source.find("pytest.importorskip(") < first.start(), path.name
