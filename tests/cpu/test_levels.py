"""Which instruction set is chosen; and every one of this machine runs the engine's
tests, each in processes of its own; the best one runs in this process."""
from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastattn import cpu
from fastattn.cpu import detect, levels

ROOT = Path(__file__).parents[2]
TESTS = ["tests/test_engines.py", "tests/cpu/test_short.py", "tests/serving/test_numbers.py", "tests/fuzz/test_fuzz.py::test_found"]
# many cases of one test: here a twentieth of them, others each day; all on the best level
SAMPLED = ["tests/cpu/test_engine.py", "tests/cpu/test_flex.py", "tests/test_huge_scores.py"]
# the code of the level behind it, which is run too, but for kernels in bfloat16: a twelfth of the cases, of other levels a quarter
ALIKE = {"x86_64_v4": "x86_64_v4_bf16", "x86_64_v4_bf16": "x86_64_amx"}
# equal on every level, or a test of all levels itself
LEFT_OUT = ("not reference_agrees and not test_reference and not reference] and not no_memory and not leftovers and not isa "
            "and not threads_from")


@pytest.mark.parametrize("level", [level for level in levels.available() if level != cpu.instruction_set()])
def test_level(level: str) -> None:
    if importlib.util.find_spec(f"fastattn.cpu.isa.{level}") is None and "FASTATTN_LEVELS" in os.environ:
        pytest.skip("not built: FASTATTN_LEVELS")
    for tests, every in ((TESTS, "12" if ALIKE.get(level) in levels.available() else "4"), (SAMPLED, "20")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", LEFT_OUT]
        environment = os.environ | {"FASTATTN_ISA": level, "FASTATTN_EVERY": every}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(f"{level}: {done.stdout.strip().splitlines()[-1]}")
        assert done.returncode == 0, f"{level}:\n{done.stdout[-10_000:]}\n{done.stderr[-2000:]}"


# ---------------------------------------------------------------- what the CPU has
def test_every_need_can_be_detected() -> None:
    """A name that detect.h misspells or lacks would never be found."""
    header = (ROOT / "fastattn" / "cpu" / "detect.h").read_text()
    assert all(f'{{"{name}", ' in header for name in levels.NEEDS["x86_64_amx"])


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="compares CPUID with Linux's list")
def test_features_are_those_that_linux_lists() -> None:
    listed = levels._proc_flags()
    if listed is None:
        pytest.skip("/proc/cpuinfo has no flags")
    assert detect.cpu_features() == listed & levels.NEEDS["x86_64_amx"]


# ---------------------------------------------------------------- the choice
@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An x86-64 CPU that has AVX512_BF16 but no AMX, and a build of all levels."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(levels, "cpu_features", lambda: levels.NEEDS["x86_64_v4_bf16"] | {"sse4_2"})
    monkeypatch.setattr(levels, "built", lambda: list(levels.X86))
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    return monkeypatch


def test_the_best_level_of_the_cpu(machine: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert levels.available() == ["baseline", "x86_64_v3", "x86_64_v4", "x86_64_v4_bf16"]
        assert levels.choose() == "x86_64_v4_bf16"


def test_the_best_level_that_was_built(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(levels, "built", lambda: ["baseline", "x86_64_v3", "x86_64_amx"])
    assert levels.choose() == "x86_64_v3"
    machine.setenv("FASTATTN_ISA", "x86_64_v4")
    with pytest.raises(ValueError, match=r"FASTATTN_ISA is 'x86_64_v4', which was not built; expected one of: baseline, x86_64_v3\."):
        levels.choose()
    machine.setenv("FASTATTN_ISA", "x86_64_amx")
    with pytest.raises(ValueError, match=r"expected one that this CPU has: baseline, x86_64_v3, x86_64_v4, x86_64_v4_bf16\."):
        levels.choose()


def test_a_build_for_other_cpus_only(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(levels, "built", lambda: ["x86_64_amx"])
    with pytest.raises(ImportError, match=r"was built for x86_64_amx, and this CPU has baseline, .*: build it again without"):
        levels.choose()


def test_amx_needs_the_systems_consent(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(levels, "cpu_features", lambda: levels.NEEDS["x86_64_amx"])
    for allowed, best in ((True, "x86_64_amx"), (False, "x86_64_v4_bf16")):
        machine.setattr(levels, "_amx_allowed", lambda allowed=allowed: allowed)
        assert levels.choose() == best


def test_an_unknown_cpu_is_reported(machine: pytest.MonkeyPatch) -> None:
    """Without the module and without /proc only the baseline is safe."""
    machine.setattr(levels, "cpu_features", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"cannot find out what this CPU supports: .* uses the level 'baseline'"):
        assert levels.choose() == "baseline"


def test_without_the_module_linux_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastattn.cpu.detect", None)
    monkeypatch.delattr(cpu, "detect")
    assert levels.cpu_features() == levels._proc_flags()


@pytest.mark.parametrize(("name", "flags"), [("AMD64", levels.X86), ("arm64", levels.AARCH64), ("aarch64", levels.AARCH64),
                                             ("ppc64le", {"baseline": []}), ("riscv64", {"baseline": []})])
def test_levels_of_an_architecture(name: str, flags: dict[str, list[str]], machine: pytest.MonkeyPatch) -> None:
    machine.setattr(platform, "machine", lambda: name)
    assert levels.levels() == flags
    if flags is not levels.X86:
        machine.setattr(levels, "cpu_features", set)
        machine.setattr(levels, "built", lambda: ["baseline"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert levels.choose() == "baseline"
