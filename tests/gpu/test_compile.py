"""Every shipped kernel compiled to machine code, without a GPU: no spill, no local memory, no serialized wgmma, no float64 arithmetic.

Shipped are the kernels that each family's table picks for a list of calls. CI's list has the most used ones, all features together, and 40
calls drawn at random with the seed of the day. FASTATTN_SAMPLES=1000 draws that many (-k sample runs only these), and FASTATTN_SEED repeats
those of a day. CONTRIBUTING.md, "Other compilers", has the same under another Python and NVVM. FASTATTN_EVERY=3 compiles a third of the
list, another one each day. FASTATTN_COMPILE=full has every feature, head size and dtype and takes an hour. All selected kernels (-k sm_90a,
-k "sm80 and everything") are compiled first, in as many processes as there are processors. Many calls share kernels: each is compiled once.
"""
from __future__ import annotations

import ast
import contextlib
import gc
import multiprocessing
import os
import platform
import random
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import UnsupportedError, gpu
from fastattn.gpu import precompile
from fastattn.gpu.runtime import compile as compiler
from tests.tools.day import SEED
from tests.tools.gpu.jobs import JOBS, SAMPLES, Job, draw_job

CONVERSIONS = {"int32", "int64", "uint32", "uint64", "float32", "REAL"}


def toolchain() -> str:
    """What decides about registers beside the sources: Python, whose byte code Numba reads, and the compilers, where pip has them."""
    found = [f"Python {platform.python_version()}"]
    for package in ("nvidia-nvvm", "nvidia-nvjitlink"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


# ---------------------------------------------------------------- compiling, in worker processes
@dataclass(frozen=True)
class Result:
    """One kernel: what is wrong with it (nothing: a shipped one)."""

    key: str
    arch: str
    registers: str
    wrong: tuple[str, ...]


def _float64(ptx: str) -> list[str]:
    """float64 instructions, other than loads and conversions of a float64 operand, which the Spec needs."""
    return sorted(set(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*\.f64[\w.]*)", ptx, re.MULTILINE)))


# a Python number in float32(...), and its comparison with 0: LLVM computes both
_FOLDED = re.compile(r"""^\s*%\S+ = (fptrunc double 0x[0-9a-f]+ to float|fcmp \w+ double 0x[0-9a-f]+,\s+0x[0-9a-f]+)$""", re.MULTILINE)


def _may_have_float64(ir: list[str]) -> bool:
    """Whether LLVM's text can become a float64 instruction. Without that type, but for constants that LLVM computes, and without PTX text
    that names it, it cannot."""
    return any(re.search(r"\bdouble\b|\.f64\b", _FOLDED.sub("", text)) for text in ir)


def examine(source: compiler.Source, arch: str, float64: bool) -> Result:
    """Compile to machine code, and to PTX where that is needed to look for float64; Numba's part is done once for both."""
    from numba.cuda.cudadrv import nvvm

    ir: list[str] = []
    to_ltoir = nvvm.compile_ir

    def read(texts: list[str], **options: Any) -> Any:
        ir.extend(texts)
        return to_ltoir(texts, **options)
    with mock.patch.object(nvvm, "compile_ir", read):
        ltoir = compiler.intermediate(source, arch)
    assert ir, "Numba no longer compiles through nvvm.compile_ir"
    _, report = compiler.link(ltoir, arch)
    wrong = compiler.complaints(report)
    if not float64 and _may_have_float64(ir):
        ptx, _ = compiler.link(ltoir, arch, "ptx")
        wrong += [f"float64: {text}" for text in _float64(ptx.decode())]
    return Result(source.key, arch, compiler.registers(report), tuple(wrong))


@dataclass(frozen=True)
class Wanted:
    """A kernel that must hold; `float64`: its call has that dtype. Equal ones are compiled once."""

    key: str
    arch: str
    float64: bool


def sources(job: Job) -> dict[Wanted, compiler.Source]:
    """The kernels of a job."""
    with gpu.use(job.family):
        found = precompile.sources(*job.want.call(), precompile.absent_device(job.arch))
    return {Wanted(source.key, job.arch, job.want.dtype == "float64"): source for source in found}


def work(job: Job, wanted: Wanted) -> Result:
    return examine(sources(job)[wanted], wanted.arch, wanted.float64)


def _start_worker() -> None:
    """Collect garbage seldom: Numba makes millions of objects for a kernel, most of which live as long as it is compiled."""
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[dict[Wanted, Future[Result]]]:
    """A future for each kernel of the selected jobs."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [given["job"] for given in parameters if "job" in given]
    first: dict[Wanted, Job] = {}
    for job in sorted(chosen, key=lambda job: "everything" not in job.what):
        with contextlib.suppress(UnsupportedError):     # its test fails
            for wanted in sources(job):
                first.setdefault(wanted, job)
    processes = min(len(os.sched_getaffinity(0)), len(chosen))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker) as pool:
        yield {wanted: pool.submit(work, job, wanted) for wanted, job in first.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", [pytest.param(job, marks=[pytest.mark.drawn] * (job.what.startswith("sample")), id=job.id) for job in JOBS])
def test_shipped_kernel(job: Job, results: dict[Wanted, Future[Result]], record_property: Any) -> None:
    try:
        needed = sources(job)
    except UnsupportedError as error:
        pytest.fail(f"{job.family} does not take it: {error}")
    assert needed
    found = [results[wanted].result() for wanted in needed]
    for result in found:
        record_property(result.key, result.registers)
    wrong = [f"{r.key} for {r.arch} ({r.registers}): {'; '.join(r.wrong)}" for r in found if r.wrong]
    assert not wrong, "\n".join([*wrong, f"Job({job.family!r}, {job.arch!r}, {job.want}, ...); FASTATTN_SEED={SEED}; {toolchain()}"])


def test_samples_follow_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    """A seed always draws the same kernels, of all families and both directions."""
    with capsys.disabled():
        print(f"\nrandom kernels: FASTATTN_SEED={SEED} FASTATTN_SAMPLES={SAMPLES}; {toolchain()}")
    one, other = ([draw_job(random.Random(seed)) for _ in range(2)] for seed in (1, 2))
    assert one[0] == one[1] != other[0]
    draw = random.Random(1)
    drawn = [draw_job(draw) for _ in range(60)]
    assert {job.family for job in drawn} == set(gpu.FAMILIES) and {job.want.backward for job in drawn} == {True, False}


def last_arguments(body: list[ast.stmt]) -> Iterator[ast.expr]:
    """The last argument of the call that a function ends with, or of each that its branches end with. No more than that is copied."""
    last = body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        yield from last.value.args[-1:]
    elif isinstance(last, ast.If):
        yield from last_arguments(last.body)
        yield from last_arguments(last.orelse) if last.orelse else ()


def copied_ends(text: str) -> list[str]:
    """Conditional expressions in the arguments of a call that a function returns, or ends with. Python 3.12 compiles the call twice
    (dsl/inline.py). Conversions may be copied, and conditions on constants disappear."""
    found = []
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "inline" for d in function.decorator_list):
            returned = [statement.value for statement in ast.walk(function) if isinstance(statement, ast.Return) and statement.value]
            calls = [call for value in returned for call in ast.walk(value)
                     if isinstance(call, ast.Call) and ast.unparse(call.func) not in CONVERSIONS]
            arguments = [*(argument for call in calls for argument in call.args), *last_arguments(function.body)]
            conditions = [x.test for argument in arguments for x in ast.walk(argument) if isinstance(x, ast.IfExp)]
            found += [ast.unparse(test) for test in conditions
                      if any(isinstance(x, ast.Name) and not x.id.isupper() for x in ast.walk(test))]
    return found


def test_no_end_is_copied() -> None:
    assert copied_ends("@inline\ndef f(x):\n    return uniform(int32(1) if x < 2 else int32(0))\n") == ["x < 2"]
    assert copied_ends("@inline\ndef f(x):\n    return int32(x if x < 2 else 0), g(x if MASK else 0)\n") == []
    assert copied_ends("@inline\ndef f(x):\n    if A:\n        wait(int32(1 if x < 2 else 0))\n    else:\n        wait(x)\n") == ["x < 2"]
    assert copied_ends("@inline\ndef f(x):\n    wait(1 if x < 2 else 0)\n    done(x)\n") == []
    folder = Path(gpu.__file__).parent
    found = {str(path.relative_to(folder)): copied_ends(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    assert len(found) > 50 and not {path: tests for path, tests in found.items() if tests}


def _multiplied(factor: float) -> compiler.Source:
    """A small kernel that multiplies a float32 by a constant."""
    from numba.cuda import int32

    from fastattn.gpu.ptx.memory import store_b32

    def kernel(a: Any) -> None:
        store_b32(a.out, int32(a.x * factor))
    return compiler.Source(f"multiplied {factor!r}", lambda: (kernel, 0), compiler.fields_of("out:l x:f"), 32)


def test_float64_of_a_kernel_is_found() -> None:
    """A Python number is float64 to Numba, and makes a product float64."""
    assert any("mul.f64" in text for text in examine(_multiplied(0.1), "sm_80", False).wrong)
    assert examine(_multiplied(np.float32(0.1)), "sm_80", False).wrong == examine(_multiplied(0.1), "sm_80", True).wrong == ()


def test_folded_constants_are_no_float64() -> None:
    """They save the PTX of a kernel, a fifth of its time. What is not a constant, or is not folded, does not."""
    constants = '  %".2" = fptrunc double 0x3fe0000000000000 to float\n  %".3" = fcmp oeq double 0x3fe0000000000000,              0x0\n'
    assert not _may_have_float64([constants, "define void @f(float %x)"])
    for text in ('%".4" = fptrunc double %".3" to float', '%".4" = fcmp oeq double 0x3fe0000000000000, %".3"',
                 '%".2" = fadd double 0x3fe0000000000000, 0x3fe0000000000000', "%x = fpext float %y to double", "define void @f(double %x)",
                 "add.f64 %0, %1, %2;"):
        assert _may_have_float64([constants + text + "\n"]), text


def test_float64_is_found() -> None:
    assert _float64("\tmov.b32 %r1, 0;\n\tadd.rn.f64 %fd1, %fd2, %fd3;\n\t@%p1 cvt.f64.f32 %fd1, %f1;\n") == ["add.rn.f64", "cvt.f64.f32"]


@pytest.mark.parametrize("line", ["ptxas info : (C7504) Potential Performance Loss: 'setmaxnreg' ignored",
                                  "ptxas info : (C7508) Potential Performance Loss", "ptxas info : (C7512) Potential Performance Loss",
                                  "ptxas info : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized",
                                  "ptxas info : (C7519) Potential Performance Loss: wgmma.mma_async instructions are serialized",
                                  "ptxas . 8 bytes stack frame, 0 bytes spill stores", "ptxas . 0 bytes stack frame, 4 bytes spill stores"])
def test_complaints_are_found(line: str) -> None:
    assert len(compiler.complaints(f"ptxas info : Used 168 registers\n{line}\n")) == 1
    assert compiler.complaints("ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 168 registers") == []
