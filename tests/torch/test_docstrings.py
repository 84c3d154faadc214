"""Docstrings of fastattn.torch: examples run, every parameter is documented. The code of docs/torch.md runs."""
from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

PUBLIC = {"functions": ("attention", "attention_varlen"), "transformers": ("register", "attention_forward"),
          "sdpa": ("scaled_dot_product_attention", "install", "uninstall", "replaced", "why_not")}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_docstring(module: str, name: str) -> None:
    function: Any = getattr(importlib.import_module(f"fastattn.torch.{module}"), name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    text = inspect.getdoc(function) or ""
    body = re.search(r"^Parameters\n-+\n(.*?)(?=^[A-Z][a-z]+\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in (body[1] if body else "").splitlines() if line and not line.startswith(" ")]
    documented = {part.strip().lstrip("*") for line in lines for part in line.partition(" :")[0].split(",")}
    assert documented == set(inspect.signature(function).parameters)


def test_the_guides_code_runs() -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "docs" / "torch.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4 and names["q"].grad.shape == (2, 512, 8, 64) and names["out"].shape == (512, 8, 64)
    assert names["model"].config._attn_implementation == "fastattn"
