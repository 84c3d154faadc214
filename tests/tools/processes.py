"""Code that runs in a fresh interpreter, and the instruction sets to run it on."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.cpu import levels

ROOT = Path(__file__).parents[2]
not_sanitized = pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""),
                                   reason="AddressSanitizer keeps freed memory, and its own locks do not survive a fork among threads")


def levels_here() -> list[str]:
    """The one that FASTATTN_ISA forces, else all that this machine has and that were built."""
    forced = os.environ.get("FASTATTN_ISA")
    found = [forced] if forced else levels.available()
    return [level for level in found if importlib.util.find_spec(f"fastattn.cpu.isa.{level}") is not None]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter."""
    kept = {name: x for name, x in os.environ.items() if name not in ("FASTATTN_ISA", "OMP_NUM_THREADS")}
    return subprocess.run([sys.executable, "-c", code], env=kept | environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def printed(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
EXTRA = """
import sys, pathlib, numpy as np, ml_dtypes, fastattn
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
def measured(call):
    pathlib.Path("/proc/self/clear_refs").write_text("5")       # the record of the peak starts anew
    before = status("VmRSS")
    results = call()
    return results, status("VmHWM") - before - sum(x.nbytes for x in results if x is not None)
def both(seqlen, heads, heads_k, dtype, need_dbias=False, **options):
    draw = np.random.default_rng(0)
    q, k, v, dout = (draw.standard_normal((1, seqlen, n, 64), np.float32).astype(dtype) for n in (heads, heads_k, heads_k, heads))
    (out, lse), forward = measured(lambda: fastattn.attention(q, k, v, return_lse=True, **options))
    return forward, measured(lambda: fastattn.attention_backward(dout, q, k, v, out, lse, need_dbias=need_dbias, **options))[1]
fastattn.set_num_threads(min(fastattn.get_num_threads(), 8))
both(16, 1, 1, "float32")                                       # loads the libraries
"""
