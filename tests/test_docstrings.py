"""Docstrings of the public functions: their examples run, and they document every parameter in numpydoc form."""
from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import fastattn

FUNCTIONS = [name for name in fastattn.__all__ if inspect.isfunction(getattr(fastattn, name))]
SECTIONS = ("Parameters", "Returns", "Raises", "Notes", "Examples")
OF_THE_CPU = ("get_num_threads", "set_num_threads")         # documented beside the compiled engine


def section(text: str, name: str) -> str:
    """The body of one numpydoc section; "" where there is none."""
    found = re.search(rf"^{name}\n-+\n(.*?)(?=^[A-Z][a-z]+\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def documented(text: str) -> set[str]:
    """Names that the Parameters section describes: its lines without indentation, up to the colon."""
    lines = [line for line in section(text, "Parameters").splitlines() if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for line in lines for name in line.partition(" :")[0].split(",")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name: str) -> None:
    function = getattr(fastattn, name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in OF_THE_CPU])
def test_every_parameter_is_documented(name: str) -> None:
    function: Any = getattr(fastattn, name)
    text = inspect.getdoc(function) or ""
    assert section(text, "Returns") and section(text, "Examples")
    named = {parameter for parameter in inspect.signature(function).parameters if parameter not in ("more", "unknown")}
    assert documented(text) == named
    underlined = re.findall(r"^(\w+)\n-+$", text, re.MULTILINE)
    assert underlined == [section for section in SECTIONS if section in underlined]


def test_no_heading_has_run_into_its_text() -> None:
    """A heading and its underline are lines of their own, in compat/ too."""
    files = Path(fastattn.__file__).parent.rglob("*.py")
    lost = re.compile(rf"^ +({'|'.join(SECTIONS)})( -{{3,}}|\n +-+ *\w)", re.MULTILINE)
    assert not [str(path) for path in files if lost.search(path.read_text())]


def test_the_check_itself() -> None:
    text = "What.\n\nParameters\n----------\na, b : int\n    One.\n*c : str\n\nReturns\n-------\nint\n"
    assert documented(text) == {"a", "b", "c"} and section(text, "Returns") == "int\n" and section(text, "Notes") == ""
