"""No engine touches memory outside its arrays: each begins or ends at a page that ends the process.

All calls of tests/test_engines.py, of tests/serving and of the fuzzers have such arrays. Here are calls that did it once, on every level.
"""
from __future__ import annotations

import signal

import numpy as np
import pytest

from tests.tools.guard import GUARD, guarded, guarded_copy
from tests.tools.processes import levels_here, not_sanitized, run


@not_sanitized
@pytest.mark.parametrize(("ends", "index"), [(True, 7), (True, 7 + GUARD // 4 - 1), (False, -1), (False, -GUARD // 4)])
def test_a_guard_ends_the_process(ends: bool, index: int) -> None:
    code = f"""
import ctypes
from tests.tools.guard import guarded
x = guarded(28, ends={ends}).view("int32")
read = lambda i: ctypes.c_int32.from_address(x.ctypes.data + 4 * i).value
print([read(i) for i in range(7)], flush=True)
read({index})
print("still here")
"""
    done = run(code)
    assert done.returncode == -signal.SIGSEGV and done.stdout.strip() == str([-1] * 7), done.stderr


@pytest.mark.parametrize("ends", [True, False])
def test_a_guarded_copy_is_the_array(ends: bool) -> None:
    wide = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for x in (wide, wide[:, ::2, 1:4], wide[::-1, :, ::-1], wide.transpose(2, 0, 1), np.broadcast_to(wide[:, :1], wide.shape), wide[:0],
              wide[0, 0, 0], np.broadcast_to(wide[:1], (0, 4, 5))):
        copy = guarded_copy(x, ends)
        np.testing.assert_array_equal(copy, x)
        assert copy.strides == x.strides and copy.dtype == x.dtype
    assert guarded(0, ends).size == 0 and np.isnan(guarded(8, ends).view(np.float32)).all()
    gaps = guarded_copy(wide[..., ::2], ends)
    assert np.isnan(np.lib.stride_tricks.as_strided(gaps[0, 0, :1], (2,), (4,))[1])


# Splits are cut by the longest sequence. Of a short one, those behind its end packed the rows that came after it.
UNEVEN = """
import numpy as np, fastattn
from dataclasses import replace
from tests.tools import caches, problems
from tests.tools.guard import guarded_arrays, guarded_copy
packed = problems.Case("uneven", lengths_q=(1, 3, 2), lengths_k=(2500, 700, 16), head_dim=7, num_heads=4, num_heads_k=2)
cache = caches.Case("20261130:17", "float16", (491, 16, 0), 1, 16, 2, 64, 43, 3, strided=True)
for dtype in ("float32", "bfloat16", "float64"):
    for name, case in (("packed", packed), ("used", replace(packed, lengths_k=(2500, 700, 90), used_k=(2500, 3, 17)))):
        print(name, dtype, flush=True)
        x = replace(case, dtype=dtype, name="uneven " + name + dtype).make()
        inputs = x.map(guarded_copy)
        out, lse = inputs.forward("cpu")
        right, top = x.forward("reference")
        np.testing.assert_allclose(np.float64(out), np.float64(right), atol=0.02)
        inputs.backward(guarded_copy(out), guarded_copy(lse), "cpu")
for case in (cache, replace(cache, name="long pages", keys=(2600, 3, 16), page_size=16, head_dim_v=64),
             replace(cache, name="float", dtype="float32", strided=False, head_dim=40, rows=9)):
    for splits in (None, 7):
        print(case.name, splits, flush=True)
        case.make().check("cpu", num_splits=splits)
print("end")
"""


@pytest.mark.parametrize("level", levels_here())
def test_a_split_behind_the_end_of_a_short_sequence_reads_nothing(level: str) -> None:
    done = run(UNEVEN, FASTATTN_ISA=level)
    assert done.returncode == 0 and done.stdout.endswith("end\n"), f"in {done.stdout.splitlines()[-1:]}: {done.stderr[-3000:]}"
