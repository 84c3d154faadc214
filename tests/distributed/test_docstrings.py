"""Docstrings of the public functions: their examples run, and they document every parameter in numpydoc form."""
from __future__ import annotations

import doctest
import inspect
import re
from typing import Any

import pytest

import fastattn.distributed as fd

FUNCTIONS = [name for name in fd.__all__ if inspect.isfunction(getattr(fd, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(recurse=False).find(getattr(fd, name), name, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0 and runner.tries > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name: str) -> None:
    function: Any = getattr(fd, name)
    text = inspect.getdoc(function) or ""
    body = text.partition("Parameters\n----------\n")[2].partition("\nReturns\n-------")[0]
    heads = [line.partition(" :")[0] for line in body.splitlines() if line and not line.startswith(" ")]
    named = {part.strip().lstrip("*") for head in heads for part in head.split(",")}
    assert named == set(inspect.signature(function).parameters) - {"more", "unknown"}
    sections = re.findall(r"^(\w+)\n-+$", text, re.MULTILINE)
    assert sections == [name for name in ("Parameters", "Returns", "Raises", "Notes", "Examples") if name in sections]
    assert {"Returns", "Raises", "Examples"} <= set(sections)


def test_names_are_there() -> None:
    assert fd.__all__ == sorted(fd.__all__) and all(hasattr(fd, name) for name in fd.__all__)
