"""Style and types: ruff on everything, strict mypy on the package, stubs against
the compiled modules, how long files and functions are. CI runs the README's command."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from fastattn import cpu

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES = 500, 100       # what can be read at one sitting, and seen at a glance
SOURCES = [path for folder in ("fastattn", "tests", "bench", "examples", "docs") for path in sorted((ROOT / folder).rglob("*"))
           if path.suffix in (".py", ".pyi", ".pyx", ".pxi", ".h", ".sh")]


def passes(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    pytest.importorskip("ruff")
    passes("ruff", "check", "--no-cache", ".")


def test_mypy() -> None:
    pytest.importorskip("mypy")
    passes("mypy")


def test_stubs_are_what_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    allowed = tmp_path / "allowed"
    allowed.write_text(r".*\.__test__")
    module = f"fastattn.cpu.isa.{cpu.instruction_set()}"
    passes("mypy.stubtest", "--mypy-config-file", "pyproject.toml", "--allowlist", str(allowed), module)


def test_ci_runs_the_command_of_the_readme() -> None:
    """Its steps as they stand there: what installs, then the tests, which CI runs beside others."""
    commands = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.strip().startswith("python3 -m venv")]
    assert len(commands) == 2, "the README has two commands for a fresh machine"
    install, _, tests = commands[1].rpartition(" && ")
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert f"readme) {tests} ;;" in lines
    assert lines.index(install) < lines.index("start readme")


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > FILE_LINES}
    assert len(SOURCES) > 300 and not long


def python_functions(node: ast.AST, factories: bool) -> Iterator[tuple[str, int]]:
    """(name, lines without the docstring). A kernel factory may be long, with all that is inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if factories and child.name.startswith("make_"):
                continue
            first = child.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield child.name, (child.end_lineno or 0) - child.lineno + 1 - docstring
        yield from python_functions(child, factories)


def cython_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """(name, lines) of def and cdef: up to the next line that stands as far left."""
    for first, line in enumerate(lines):
        if found := re.match(r"( *)(?:def|cdef|cpdef)\b[^(=]*?(\w+)\(", line):
            inside = takewhile(lambda text, deep=f"{found[1]} ": not text.strip() or text.startswith(deep), lines[first + 1:])
            yield found[2], len("\n".join([line, *inside]).rstrip().splitlines())


def c_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """(name, lines) of what ends with a brace at the left edge."""
    name, first = "", 0
    for n, line in enumerate(lines):
        if (found := re.search(r"(\w+)\(", line)) and re.match(r"\w", line):
            name, first = found[1], n
        elif name and line.startswith("}"):
            yield name, n - first + 1
            name = ""


def functions(path: Path) -> list[tuple[str, int]]:
    text = path.read_text()
    if path.suffix == ".py":
        return list(python_functions(ast.parse(text), factories="fastattn/gpu/" in str(path)))
    return list((c_functions if path.suffix == ".h" else cython_functions)(text.splitlines()))


def test_functions_are_short() -> None:
    found = {str(path.relative_to(ROOT)): functions(path) for path in SOURCES if path.suffix in (".py", ".pyx", ".pxi", ".h")}
    # each kind is read: C, Cython, Python without its docstring, and no kernel factory
    assert {"rescale_rows", "join_row"} <= dict(found["fastattn/cpu/transform.h"]).keys() and found["fastattn/cpu/transform.pxi"]
    assert 5 < dict(found["fastattn/api.py"])["attention"] < 40 and "make_forward" not in dict(found["fastattn/gpu/sm90/forward.py"])
    assert not [(name, function, lines) for name, of in found.items() for function, lines in of if lines > FUNCTION_LINES]
