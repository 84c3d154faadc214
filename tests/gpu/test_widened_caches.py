"""8-bit caches widened for tensor-core forwards: the kernel run from its PTX, all parts, and which calls are widened."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn.gpu import caches
from fastattn.gpu.decode import launch as decode
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.rows import widen_launch
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.sm90 import launch as sm90
from fastattn.gpu.spec import Call, Spec, make_spec
from tests.gpu.test_caches import EIGHT, Eight, judge_eight
from tests.tools.gpu import interpreter
from tests.tools.gpu.calls import serving_call
from tests.tools.problems import NUMPY

WIDENED = [Eight(), Eight("bfloat16", "float8_e5m2", scales="batch", new="sixteen", dim=128), Eight("float16", page=None),
           Eight("float8_e4m3fn", scales="batch", rows=5), Eight(scales="number", dim=96, rows=(2, 0, 3)),
           Eight("bfloat16", scales="head", new="eight", page=None)]


def attended(call: Call, spec: Spec, launcher: Any) -> Any:
    """The call over widened caches, which the split-key kernel runs here: the interpreter has no wgmma."""
    return widen_launch.prepare(
        call, lambda wide: decode.prepare_caches(wide, make_spec(wide.problem, wide.operands, spec.lse), launcher), launcher)


@pytest.mark.parametrize(("given", "most"), [*((given, 1 << 30) for given in WIDENED), (Eight(scales="batch"), 40000),
                                             (Eight(scales="batch", new="sixteen"), 1 << 17), (Eight(page=None, dim=128), 150000),
                                             (Eight(scales="head", rows=(2, 0, 3)), 1 << 18)], ids=str)
def test_a_widened_call(given: Eight, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widen_launch, "WIDEN_BYTES", most)
    made, memory = given.make(), interpreter.Memory()
    from fastattn.arrays import convert
    call = serving_call(made, lambda x: memory.place(x, convert.view(x, "test", "x")))
    alone = caches.attention_alone(call)[0]
    assert widen_launch.refuses(alone) is None and (most > 1 << 20) == (len(widen_launch.parts_of(alone) or ()) == 1)
    launcher = interpreter.Launcher(memory)
    family = caches.Cached(SimpleNamespace(refuses=lambda call, d: None, prepare=attended))
    family.prepare(call, make_spec(call.problem, call.operands, True), launcher)(call, 0)
    found = [memory.read(x, y.dtype) for x, y in zip((call.operands.k, call.operands.v), made.arrays[1:3], strict=True)]
    assert call.lse is not None
    judge_eight(given, memory.read(call.out, NUMPY[call.problem.out_dtype]), memory.read(call.lse, np.float32), *found, most_lse=2e-3)


def call_of(given: Eight, **more: Any) -> Call:
    from fastattn.arrays import convert
    memory = interpreter.Memory()
    call = serving_call(given.make(), lambda x: memory.place(x, convert.view(x, "test", "x")), **more)
    return caches.attention_alone(call)[0]


@pytest.mark.parametrize(("given", "reason"), [
    (Eight("float16", scales="head"), "may leave float16"), (Eight(dim=72), "whole, aligned pieces"),
    (EIGHT[0]._replace(q="float16", scales="number"), "may leave float16")], ids=str)
def test_what_is_not_widened(given: Eight, reason: str) -> None:
    assert reason in (widen_launch.refuses(call_of(given)) or "")


def test_a_window_is_not_widened() -> None:
    call = call_of(Eight())
    windowed = replace(call, problem=replace(call.problem, mask=replace(call.problem.mask, left=5)))
    assert "window" in (widen_launch.refuses(windowed) or "")


def test_many_rows_are_widened_on_hopper() -> None:
    """Prompts are, steps of decoding are not."""
    for rows, kernels in ((300, ["widen_keys", "forward_sm90"]), (1, ["forward_decode"])):
        call, launcher = call_of(Eight(rows=rows, dim=128)), Listing(absent_device("sm_90a"))
        assert sm90.refuses(call, launcher.device) is None
        sm90.prepare(call, make_spec(call.problem, call.operands, False), launcher)
        assert [source.key.split()[0] for source in launcher.sources] == kernels


@pytest.mark.parametrize("arguments", [("float8_e4m3fn", "float8_e4m3fn", "bfloat16", False, True),
                                       ("float8_e5m2", "float8_e4m3fn", "float16", True, False)])
def test_the_kernel_compiles(arguments: tuple[Any, ...]) -> None:
    assert compiler.complaints(compiler.build(widen_launch.widen_source(*arguments), "sm_90a")[1]) == []
