"""Every instruction set of this machine runs the engine's tests, each in a
process of its own; the best one runs in this process."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import cpu
from fastattn.cpu import levels

ROOT = Path(__file__).parents[2]
TESTS = ["tests/test_engines.py", "tests/cpu/test_engine.py", "tests/test_huge_scores.py", "tests/fuzz/test_fuzz.py::test_found"]
# equal on every level, or a test of all levels itself
LEFT_OUT = ("not reference_agrees and not test_reference and not reference] and not no_memory and not leftovers and not isa "
            "and not threads_from")


@pytest.mark.parametrize("level", [level for level in levels.available() if level != cpu.instruction_set()])
def test_level(level: str) -> None:
    if importlib.util.find_spec(f"fastattn.cpu.isa.{level}") is None and "FASTATTN_LEVELS" in os.environ:
        pytest.skip("not built: FASTATTN_LEVELS")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", LEFT_OUT]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTATTN_ISA": level}, capture_output=True, text=True)
    print(f"{level}: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, f"{level}:\n{done.stdout[-10_000:]}\n{done.stderr[-2000:]}"
