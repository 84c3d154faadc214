"""Style and types: ruff on everything, strict mypy on the package, stubs against
the compiled modules. CI runs the README's command."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import cpu

ROOT = Path(__file__).parents[1]


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
    commands = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.strip().startswith("python3 -m venv")]
    assert len(commands) == 2, "the README has two commands for a fresh machine"
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
