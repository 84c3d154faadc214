"""Random calls with caches that must agree, with the seed of the day, on the instruction set in use."""
from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

import fastattn
from tests.fuzz import serving
from tests.fuzz.__main__ import today
from tests.tools.processes import run

COUNT = int(90 * float(os.environ.get("FASTATTN_FUZZ", "1")))


def test_calls_of_the_day() -> None:
    """In a process of their own, which ends where a call reads past an array."""
    seed, level = today(), os.environ.get("FASTATTN_ISA")
    print(f"FASTATTN_FUZZ_SEED={seed}")
    arguments = ["--calls", str(COUNT), "--seed", str(seed)]
    code = f"import sys; from tests.fuzz import serving; sys.argv[1:] = {arguments}; sys.exit(serving.main())"
    done = run(code, **({"FASTATTN_ISA": level} if level else {}))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([line for line in lines[:-1] if not line.startswith("at ")] + lines[-1:]) + done.stderr[-3000:]


def test_each_relation_is_tried() -> None:
    tried = [serving.RELATIONS[n % len(serving.RELATIONS)].__name__ for n in range(60) if serving.run(1, n) is True]
    absent = {"in_torch"} if importlib.util.find_spec("torch") is None else set()
    assert set(tried) == {relation.__name__ for relation in serving.RELATIONS} - absent


def test_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an out that another way of the call gives, and of a refusal that comes too late."""
    original = fastattn.attention_with_kvcache

    def spoiled(*arrays: Any, **options: Any) -> Any:
        out, *rest = original(*arrays, **options)
        return (out + np.asarray(1e-2, out.dtype), *rest) if options["cache_seqlens"].dtype == np.int32 else (out, *rest)
    monkeypatch.setattr(fastattn, "attention_with_kvcache", spoiled)
    found = [serving.run(1, n) for n in range(45)]
    for relation in (serving.by_flash_attn, serving.by_vllm, serving.in_chunks):
        assert any(isinstance(text, str) and text.startswith(relation.__name__) for text in found), relation.__name__
    monkeypatch.setattr(fastattn, "attention_with_kvcache", lambda *arrays, **options: None)
    assert any("was not refused" in str(serving.run(1, n)) for n in range(8, 45, 9))
