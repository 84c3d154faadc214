"""Random calls with key and value caches, with the seed of the day, on the instruction set in use."""
from __future__ import annotations

import os
from typing import Any

import pytest

from fastattn.arrays.view import numpy_dtype
from tests.fuzz import caches
from tests.fuzz.__main__ import today
from tests.tools.caches import Call, Case, Eight
from tests.tools.processes import run

COUNT = int(120 * float(os.environ.get("FASTATTN_FUZZ", "1")))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_calls_of_the_day() -> None:
    """In a process of their own, which ends where a call reads past an array."""
    seed, level = today(), os.environ.get("FASTATTN_ISA")
    print(f"FASTATTN_FUZZ_SEED={seed}")
    code = f"import sys; from tests.fuzz import caches; sys.argv[1:] = ['--calls', '{COUNT}', '--seed', '{seed}']; sys.exit(caches.main())"
    done = run(code, **({"FASTATTN_ISA": level} if level else {}))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([line for line in lines[:-1] if not line.startswith("at ")] + lines[-1:]) + done.stderr[-3000:]


def test_draws_cover_the_features() -> None:
    drawn = [caches.draw(1, n)[0] for n in range(200)]
    for name in ("packed", "append", "batch_idx", "shared", "rotary", "strided", "alibi", "sinks", "page_size", "options"):
        count = sum(bool(getattr(case, name)) for case in drawn)
        assert 3 < count < 200, name


def test_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rotation by the next position."""
    from fastattn import caches as host

    rotated = host.rotated
    numbers = [n for n in range(60) if caches.draw(1, n)[0].rotary and sum(caches.draw(1, n)[0].lengths)][:3]
    monkeypatch.setattr(host, "rotated", lambda x, positions, *rest: rotated(x, positions + 1, *rest))
    assert numbers and all("bits" in (caches.run(1, n) or "") for n in numbers)


def test_calls_drawn_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, whose arrays stand for the device's: lists come as arrays, and prompts over 8-bit caches are allowed their rounding."""
    cases = pytest.importorskip("tests.tools.gpu.cases", reason="the GPU engine's packages are not installed")
    monkeypatch.setattr(cases, "on_device", lambda x: x)
    monkeypatch.setattr(cases, "to_host", lambda x: x)
    numbers = range(0, 24 * 60, 24)
    assert {caches.draw_alike(2, n, "cuda")[0].integers for n in numbers} >= {"list", "int32", "int64"}
    for n in numbers:
        assert caches.run(2, n, "cuda") is None


def widened(case: Case) -> tuple[Call, Any, Any]:
    """A call, and what an engine gives that rounds K and V times their scales to 16 bits."""
    made = case.make()
    return made, *made.expected("float32", case.dtype, widened=case.dtype)


def test_prompts_over_widened_caches() -> None:
    """What such an engine gives is right where it may widen, and wrong where it may not. An error of two percent is always wrong."""
    case = Case("widened", dtype="bfloat16", rows=40, head_dim=64, eight=Eight("float8_e4m3fn", ("none", "batch", "batch")),
                options={"softmax_scale": 1.0})
    made, out, lse = widened(case)
    made.judge(out.astype(numpy_dtype("bfloat16")), lse, rewritten=True)
    with pytest.raises(AssertionError):
        made.judge(out.astype(numpy_dtype("bfloat16")), lse)
    with pytest.raises(AssertionError):
        made.judge((out * 1.02).astype(numpy_dtype("bfloat16")), lse, rewritten=True)
