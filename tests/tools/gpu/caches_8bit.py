"""Calls of attention_with_kvcache over 8-bit caches, and what is right of them."""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn.arrays.view import numpy_dtype
from tests.tools.caches import Call, Case

Array = np.ndarray[Any, Any]


class Eight(NamedTuple):
    """A call over 8-bit caches. scales: none, a number, or of this shape; `new`: what it appends, if anything."""

    q: str = "bfloat16"
    cache: str = "float8_e4m3fn"
    scales: str = "none"
    new: str | None = None
    dim: int = 64
    rows: int | tuple[int, ...] = 2
    arch: str = "sm_90a"
    page: int | None = 16

    def make(self) -> Call:
        """Its arrays, and the options of the scales."""
        case = Case(str(self), dtype="float16" if self.q == "float16" else "bfloat16", keys=(40, 0, 217), rows=self.rows,
                    head_dim=self.dim, rotary=(32, False) if self.new == "rotary" else None, append=self.new is not None, num_heads=8,
                    page_size=self.page)
        made, draw = case.make(), np.random.default_rng(5)
        eight = numpy_dtype(self.cache)
        made.arrays[1:3] = [np.nan_to_num(x.astype(np.float32), nan=0.5).astype(eight) for x in made.arrays[1:3]]
        if self.q == "float8_e4m3fn":
            made.arrays[0] = made.arrays[0].astype(numpy_dtype(self.q))
        if self.new == "eight":
            made.arrays[3:] = [x.astype(eight) for x in made.arrays[3:]]
        shape = {"none": None, "number": (), "one": (1,), "head": (2,), "batch": (3, 2)}[self.scales]
        if shape is not None:
            for name in ("q_scale", "k_scale", "v_scale")[self.q != "float8_e4m3fn":]:
                made.options[name] = draw.uniform(0.1, 3, shape).astype(np.float32) if shape else 0.75
        return made


EIGHT = [Eight(), Eight(scales="batch", new="sixteen", dim=128), Eight("float16", "float8_e5m2", "head", "rotary", rows=(1, 30, 4)),
         Eight("float16", scales="one", new="eight", dim=128, rows=1, page=None), Eight("bfloat16", "float8_e5m2", "number", "rotary", 256),
         Eight("float8_e4m3fn", "float8_e4m3fn", "batch", "sixteen", 64), Eight("float8_e4m3fn", "float8_e5m2", "head", None, 128, 20),
         Eight(scales="batch", dim=96, rows=(2, 0, 3)), Eight(arch="sm_80", scales="head", new="sixteen", dim=128),
         Eight("float16", arch="sm_80", dim=64, rows=9), Eight("bfloat16", scales="number", dim=80, new="rotary"),
         Eight(scales="batch", dim=128, rows=8), Eight("float16", "float8_e5m2", "head", rows=7)]


# prompts on Hopper, and the largest errors of out and lse: K and V times scales are rounded to 16 bits, P to 8 bits beside an 8-bit q
PROMPTS = {Eight(rows=100, dim=128): (2.0**-8, 1e-6), Eight(scales="batch", new="sixteen", rows=100, dim=128): (2.0**-7, 2e-3),
           Eight("float16", "float8_e5m2", page=None, rows=70): (2.0**-10, 1e-6),
           Eight("float8_e4m3fn", scales="head", rows=100, dim=128): (4e-2, 2e-3),
           Eight("float8_e4m3fn", page=None, new="eight", rows=70): (4e-2, 2e-3)}


def judge_eight(given: Eight, out: Array, lse: Array, k_cache: Array, v_cache: Array, most_lse: float = 1e-6,
                most_out: float | None = None) -> None:
    """Against the engines of host memory: the caches' bits, and numbers of the exact formula."""
    made = given.make()
    exact, exact_lse = made.run("reference", return_lse=True)
    assert k_cache.tobytes() == made.arrays[1].tobytes() and v_cache.tobytes() == made.arrays[2].tobytes()
    assert out.dtype == exact.dtype
    most_out = most_out or (2.0**-8 if out.dtype != np.float16 else 2.0**-10)
    for got, right, most in ((out, exact, most_out), (lse, exact_lse, most_lse)):
        wide = right.astype(np.float64)
        seen = np.isfinite(wide)
        assert np.array_equal(np.isfinite(got.astype(np.float64)), seen)
        assert np.linalg.norm((got.astype(np.float64) - wide)[seen]) <= most * np.linalg.norm(wide[seen])
