"""`check`: is every engine that this machine can run right?"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..benchmark.text import aligned
from .checks import Result

DESCRIPTION = """\
Calls every engine of this machine, forward and backward, and compares the results with the float64 reference: the CPU
engine on every instruction set that was built and that this processor has, and each kernel family on CUDA device 0, if
there is one. Kernels that are not in the cache are compiled first, which takes seconds each. Errors are relative
Frobenius norms. Allowed is twice the error of the same computation done naively in the input's precision, plus a
rounding of the result. The exit status is 1 if a result is wrong or an engine failed."""
EXAMPLE = "check"
ISA = "FASTATTN_ISA"
PATIENCE = 600.0        # seconds for one engine: some kernels to compile, at most


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that may be checked. why_not: a reason that it is not."""

    name: str
    argument: str
    level: str = ""
    why_not: str = ""


def add(parser: argparse.ArgumentParser) -> None:
    """`check` has no arguments: it checks what there is."""


def run(given: argparse.Namespace) -> int:
    found = [(engine, result) for engine in (*cpu_engines(), *gpu_engines())
             for result in ([Result("", "", note=engine.why_not)] if engine.why_not else results(engine))]
    print(aligned([("engine", "call", "direction", "worst", "error", "allowed", ""), *(_line(engine, result) for engine, result in found)]))
    wrong = sum(not result.right for _, result in found)
    ran = any(result.failed or not result.note for _, result in found)
    print(f"\n{wrong} of these are wrong or failed." if wrong else "\nEverything that ran is right." if ran else "\nNothing ran.")
    return 1 if wrong or not ran else 0


def _line(engine: Engine, result: Result) -> tuple[str, ...]:
    if result.note:
        return engine.name, result.call, result.direction, "", "", "", f"{'FAILED' if result.failed else 'not run'}: {result.note}"
    return (engine.name, result.call, result.direction, result.tensor, f"{result.error:.1e}", f"{result.allowed:.1e}",
            "ok" if result.right else "WRONG")


def cpu_engines() -> Iterator[Engine]:
    """The CPU engine on each level of this architecture, worst first; one line where no level was built.

    FASTATTN_ISA does not count: each level's own process is given its own.
    """
    forced = os.environ.pop(ISA, None)
    try:
        from ..cpu import levels
    except ImportError as error:
        yield Engine("cpu", "cpu", why_not=str(error))
        return
    finally:
        os.environ.update({} if forced is None else {ISA: forced})
    usable = levels.available()
    for level in levels.levels():
        built = importlib.util.find_spec(f"fastattn.cpu.isa.{level}") is not None
        why = "" if built and level in usable else "this processor lacks it" if built else "it was not built"
        yield Engine(f"cpu {level}", "cpu", level, why)


def gpu_engines() -> Iterator[Engine]:
    """The kernel families, or one line that says why there are none."""
    from .. import report
    from ..engine import FAMILIES

    cuda = report.cuda_facts()
    missing = cuda["error"] or (None if cuda["devices"] else "no CUDA device")
    packages = report.gpu_engine_facts()["error"]
    if missing or packages:
        yield Engine("gpu", "gpu", why_not=missing or f"{packages}; pip install 'fastattn[gpu]' brings the engine's packages")
        return
    for family in (*reversed(FAMILIES), "decode"):
        yield Engine(f"gpu {family}", family)


def results(engine: Engine) -> list[Result]:
    """In a process of its own, because an instruction set is chosen once in a process, and a crash is a result too."""
    command = [sys.executable, "-m", f"{__package__}.checks", engine.argument]
    environment = os.environ | ({ISA: engine.level} if engine.level else {})
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return [Result("", "", note=f"no answer for {PATIENCE:.0f} s", failed=True)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [Result("", "", note=last, failed=True)]
    return [Result(**result) for result in json.loads(done.stdout)]
