"""What a type checker tells users: the types of results, and their mistakes. mypy and pyright must agree.

The other files of this folder are programs that are checked and never run.
"""
from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastattn
from fastattn import types
from fastattn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.compat.sdpa import scaled_dot_product_attention

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DENSE, PACKED = fastattn.attention, fastattn.attention_varlen
Found = set[tuple[int, str]]


def mypy(text: str, folder: Path) -> Found:
    """Line and text of each error that mypy finds, in its strict mode, and not with the settings of this repository."""
    pytest.importorskip("mypy")
    (folder / "program.py").write_text(text)
    (folder / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), "--strict", "--no-error-summary", "--no-pretty",
               str(folder / "program.py")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [re.match(r".*program\.py:(\d+): error: (.*)", line) for line in done.stdout.splitlines() if ": error: " in line]
    assert all(errors), done.stdout
    return {(int(error[1]), error[2]) for error in errors if error}


@functools.cache
def pyright_starts() -> str:
    """What its package says when it cannot fetch or start pyright; "" if it can."""
    done = subprocess.run([sys.executable, "-m", "pyright", "--version"], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr[-500:] or f"exit status {done.returncode}"


def pyright(text: str, folder: Path) -> Found:
    """Line and text of each error that pyright finds."""
    pytest.importorskip("pyright")
    if pyright_starts():
        pytest.skip(f"pyright, which PyPI's package fetches from npm, does not start: {pyright_starts()}")
    (folder / "program.py").write_text(text)
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "pythonVersion": "3.11"}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, report
    errors = [error for error in report["generalDiagnostics"] if error["severity"] == "error"]
    return {(error["range"]["start"]["line"] + 1, error["message"]) for error in errors}


@pytest.fixture(params=[mypy, pyright], ids=lambda checker: checker.__name__)
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Found]:
    """A checker, of the text of a program."""
    return lambda text: request.param(text, tmp_path)


# ---------------------------------------------------------------- programs
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_right_program_has_no_errors(library: str, check: Callable[[str], Found]) -> None:
    pytest.importorskip(library)
    assert check((HERE / ("user.py" if library == "numpy" else f"user_{library}.py")).read_text()) == set()


def test_every_mistake_is_found(check: Callable[[str], Found]) -> None:
    program = (HERE / "mistakes.py").read_text()
    wrong = {number for number, line in enumerate(program.splitlines(), 1) if line.endswith("# wrong")}
    assert len(wrong) > 30
    found = {number for number, _ in check(program)}
    assert sorted(wrong - found) == [], "lines whose mistake is not found"
    assert sorted(found - wrong) == [], "lines without a mistake"


def test_a_lost_type_is_found(check: Callable[[str], Found]) -> None:
    """The check itself: assert_type fails where a result is Any."""
    program = (HERE / "user.py").read_text()
    lost = program.replace("def backward(q: Singles,", "def backward(q: Any,")
    assert lost != program
    first = next(number for number, line in enumerate(lost.splitlines(), 1) if "assert_type(grads.dk, Singles)" in line)
    assert first in {number for number, _ in check(lost)}


# ---------------------------------------------------------------- one definition of each signature
@pytest.mark.parametrize("function", [DENSE, PACKED, fastattn.attention_with_kvcache, scaled_dot_product_attention, flash_attn_func,
                                      flash_attn_varlen_func],
                         ids=lambda function: function.__name__)
def test_overloads_take_what_the_function_takes(function: Callable[..., Any]) -> None:
    """Names, order, types and which have a default; keywords in a TypedDict count as keywords."""
    shown = inspect.signature(function).parameters
    flag = "return_attn_probs" if "return_attn_probs" in shown else "return_lse"    # a Literal in overloads
    hints_of = typing.get_type_hints(function)
    overloads = typing.get_overloads(function)
    assert len(overloads) >= 3
    for overload in overloads:
        own = dict(inspect.signature(overload).parameters)
        hints = typing.get_type_hints(overload)
        options = own.pop("options", None)
        keywords = typing.get_type_hints(typing.get_args(hints["options"])[0]) if options else {}
        assert not set(own) & set(keywords)
        assert {*own, *keywords} == set(shown)
        assert list(own) == [name for name in shown if name in own]
        for name, parameter in own.items():
            assert parameter.kind in (shown[name].kind, parameter.KEYWORD_ONLY)
            assert name == flag or (parameter.default is parameter.empty) == (shown[name].default is parameter.empty), name
        positional = [name for name, parameter in shown.items() if parameter.kind is not parameter.KEYWORD_ONLY]
        for name, hint in ({name: hints[name] for name in own} | keywords).items():
            if name not in (flag, positional[0]):           # positional[0] is of the TypeVar
                assert hint == hints_of[name], name
    results = {str(typing.get_type_hints(overload)[flag]) for overload in overloads}
    assert results == {"typing.Literal[False]", "typing.Literal[True]", "<class 'bool'>"}


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_overloads_of_the_frameworks_have_every_keyword(framework: str, name: str) -> None:
    pytest.importorskip(framework)
    function = getattr(importlib.import_module(f"fastattn.{framework}"), name)
    shown = set(inspect.signature(function).parameters)
    overloads = typing.get_overloads(inspect.unwrap(function))
    assert len(overloads) == 3
    for overload in overloads:
        own = set(inspect.signature(overload).parameters) - {"options"}
        options = types.FrameworkOptions if name == "attention" else types.PackedFrameworkOptions
        assert own | set(typing.get_type_hints(options)) == shown


@pytest.mark.parametrize("forward", [DENSE, PACKED], ids=lambda function: function.__name__)
def test_a_backward_shares_its_forwards_keywords(forward: Callable[..., Any]) -> None:
    backward = getattr(fastattn, f"{forward.__name__}_backward")
    of_forward, of_backward = typing.get_type_hints(forward), typing.get_type_hints(backward)
    a, b = inspect.signature(forward).parameters, inspect.signature(backward).parameters
    keywords = {name for name, parameter in a.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords - set(b) == {"return_lse", "q_scale", "k_scale", "v_scale", "out_scale"}      # of 8-bit operands
    assert set(b) - set(a) == {"dout", "lse", "dlse", "need_dbias", "need_dcaptured", "deterministic"}
    for name in keywords & set(b) - {"out"}:                # an option there, the forward's result here
        assert (of_forward[name], a[name].default) == (of_backward[name], b[name].default), name


def test_engine_names_are_those_of_the_package() -> None:
    from fastattn.types import EngineName

    assert set(typing.get_args(EngineName)) == {"gpu", *(engine.name for engine in fastattn.engines() if engine.built_in)}
