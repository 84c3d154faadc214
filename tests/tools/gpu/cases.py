"""Cases for the forward and backward tests of the GPU engine: several tiles, few queries, random ones. Arrays on the
device. All kernels that
the selected tests need, compiled in parallel before them.

The tensor-core families do not take float64, so they run such cases with a 16-bit dtype.
"""
from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import random
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fastattn import UnsupportedError, gpu
from tests.tools.compare import Judge
from tests.tools.devices import device_count
from tests.tools.gpu.cases_float import float_cases
from tests.tools.gpu.poison import poison
from tests.tools.problems import CASES, NUMPY, Case, Inputs

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")

import fastattn
from fastattn import Grads
from fastattn.arrays import convert, dlpack, streams
from fastattn.arrays.device_array import DeviceArray
from fastattn.arrays.view import NO_NUMPY, numpy_dtype
from fastattn.gpu import precompile
from fastattn.gpu.short import launch as short
from fastattn.gpu.sm80 import launch as sm80
from fastattn.gpu.spec import BackwardCall, Call, make_backward_spec, make_spec
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.calls import operands_of

HALVES = ("float16", "bfloat16")
Array = np.ndarray[Any, Any]
TIMES = float(os.environ.get("FASTATTN_FUZZ", "1"))


# ---------------------------------------------------------------- cases that need several tiles, and what a family takes
def _large() -> Iterator[Case]:
    """Sizes around the tiles of the tensor-core kernels, and every feature over several of them."""
    base = Case("large", "bfloat16", seqlen_q=300, seqlen_k=700, head_dim=128, causal=True)
    for dim, lengths in ((64, (127, 128, 129, 191, 192, 193, 385)), (128, (63, 64, 65, 127, 128, 129, 257)), (256, (79, 80, 81, 129, 161))):
        for n in lengths:
            yield replace(base, name=f"tiles_{dim}_{n}", head_dim=dim, seqlen_q=n, seqlen_k=n, dtype="float16")
            yield replace(base, name=f"tiles_{dim}_{n}_full", head_dim=dim, seqlen_q=129, seqlen_k=n, causal=False)
    for dim in (16, 32, 40, 72, 80, 96, 112, 192):
        yield replace(base, name=f"large_{dim}", head_dim=dim)
    for dim in (40, 80):        # products of one panel, and of a panel and a part
        yield replace(base, name=f"large_softcap_{dim}", head_dim=dim, softcap=5.0)
        yield replace(base, name=f"large_bias_{dim}", head_dim=dim, bias=(2, 2, 300, 700))
        yield replace(base, name=f"large_packed_{dim}", head_dim=dim, lengths_q=(300, 0, 129, 1, 64), lengths_k=(300, 40, 700, 130, 0))
    for dim, dim_v in ((192, 128), (128, 192), (64, 256)):
        yield replace(base, name=f"large_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, dtype="float16")
    features: dict[str, dict[str, Any]] = {
        "gqa": {"num_heads": 8, "num_heads_k": 2}, "window": {"window": (150, None)}, "window_both": {"window": (33, 70), "causal": False},
        "narrow": {"window": (3, 0)}, "top_left": {"causal": "top_left"}, "softcap": {"softcap": 5.0}, "alibi": {"alibi": "batch"},
        "bias": {"bias": (2, 2, 300, 700)}, "bias_float32": {"bias": (2, 300, 700), "bias_dtype": "float32"},
        "bias_row": {"bias": (1, 700)}, "bias_column": {"bias": (2, 1, 300, 1)}, "bias_inf": {"bias": (2, 2, 300, 700), "bias_inf": True},
        "bias_tiles": {"bias": (1, 2, 300, 704), "seqlen_k": 704},
        "bias_tiles_full": {"bias": (2, 1, 300, 704), "seqlen_k": 704, "causal": False},
        "bias_tiles_inf": {"bias": (2, 2, 300, 704), "seqlen_k": 704, "bias_inf": True},
        "bias_tiles_mask": {"bias": (2, 2, 300, 704), "seqlen_k": 704, "mask": (2, 1, 1, 704), "causal": False},
        "bias_tiles_gqa": {"bias": (4, 300, 704), "seqlen_k": 704, "num_heads": 4, "num_heads_k": 2, "window": (150, 40)},
        "bias_tiles_huge": {"bias": (300, 704), "seqlen_k": 704, "bias_size": 1e4},
        "mask": {"mask": (2, 1, 300, 700)}, "mask_heads": {"mask": (2, 2, 300, 700), "mask_kind": "blocks", "causal": False},
        "mask_padding": {"mask": (2, 1, 1, 700), "mask_kind": "blocks", "causal": False}, "mask_rows": {"mask": (2, 1, 300, 1)},
        "mask_queries": {"mask": (1, 2, 300, 700), "mask_kind": "blocks", "mask_memory": "queries", "window": (300, 200), "causal": False},
        "mask_gqa": {"num_heads": 8, "num_heads_k": 2, "mask": (2, 8, 300, 700), "mask_kind": "blocks", "mask_memory": "shifted"},
        "sinks": {"sinks": True}, "dropout": {"dropout_p": 0.2}, "one_key": {"seqlen_k": 1},
        "more_queries": {"seqlen_q": 700, "seqlen_k": 300}, "huge": {"softmax_scale": 40.0}, "negative": {"softmax_scale": -0.1},
        "zero_scale": {"softmax_scale": 0.0}, "bhsd": {"layout": "bhsd"}, "sliced": {"memory": "sliced"},
        "transposed": {"memory": "transposed"}, "dim_first": {"memory": "dim_first"},
    }
    for (name, settings), dim in itertools.product(features.items(), (64, 128)):
        yield replace(base, name=f"large_{name}_{dim}", **{**settings, "head_dim": dim})
    for dim in (192, 256):
        yield replace(base, name=f"large_mask_{dim}", head_dim=dim, **features["mask_heads"])
    for name in ("gqa", "window_both", "top_left", "sinks", "dropout", "huge", "more_queries", "one_key"):      # MLA: dK and dV together
        yield replace(base, name=f"large_{name}_192_128", **{**features[name], "head_dim": 192, "head_dim_v": 128})
    packed = replace(base, lengths_q=(300, 0, 129, 1, 64), lengths_k=(300, 40, 700, 130, 0))
    for dim in (64, 128, 256):
        yield replace(packed, name=f"large_packed_{dim}", head_dim=dim)
        yield replace(packed, name=f"large_packed_full_{dim}", head_dim=dim, causal=False, spare=5, dtype="float16")
    yield replace(packed, name="large_packed_used", used_k=(250, 40, 0, 130, 0), num_heads=4, num_heads_k=1, window=(200, 10))
    for dim, dim_v in ((160, None), (192, 128), (256, None)):        # gradients of keys past seqused_k, in a tile with used ones and alone
        yield replace(packed, name=f"large_packed_used_{dim}", used_k=(250, 40, 0, 1, 0), head_dim=dim, head_dim_v=dim_v, spare=7)
    yield replace(packed, name="large_packed_used_dropout", used_k=(250, 3, 1, 130, 0), head_dim=256, dropout_p=0.2, dtype="float16")
    yield replace(packed, name="large_packed_mask", mask=(5, 2, 300, 700), mask_kind="blocks")
    yield replace(packed, name="large_packed_all", alibi="batch", bias=(5, 1, 300, 700), mask=(1, 2, 1, 700), sinks=True, dropout_p=0.1,
                  softcap=9.0)


def _wide() -> Iterator[Case]:
    """Head sizes over 256: warpgroups share rows and divide the columns of results among them."""
    base = Case("wide", "bfloat16", seqlen_q=200, seqlen_k=330, head_dim=512, causal=True, batch=1, dlse=True)
    for dim, dim_v in ((264, 264), (320, 320), (384, 384), (448, 392), (512, 512), (576, 512), (576, 576), (576, 64), (64, 512), (512, 256),
                       (8, 264)):
        yield replace(base, name=f"wide_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v)
        yield replace(base, name=f"wide_full_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, causal=False, dtype="float16", seqlen_q=65)
    features: dict[str, dict[str, Any]] = {
        "gqa": {"num_heads": 4, "num_heads_k": 2}, "window": {"window": (33, 70), "causal": False}, "softcap": {"softcap": 5.0},
        "alibi": {"alibi": "batch"}, "bias": {"bias": (1, 2, 200, 330)}, "bias_float32": {"bias": (2, 200, 330), "bias_dtype": "float32"},
        "bias_row": {"bias": (1, 330)}, "mask": {"mask": (1, 1, 200, 330)}, "sinks": {"sinks": True}, "dropout": {"dropout_p": 0.2},
        "more_queries": {"seqlen_q": 330, "seqlen_k": 100}, "one_key": {"seqlen_k": 1}, "one_row": {"seqlen_q": 1},
        "huge": {"softmax_scale": 40.0}, "bhsd": {"layout": "bhsd"}, "transposed": {"memory": "transposed"}}
    for (name, settings), dim in itertools.product(features.items(), (320, 512)):
        yield replace(base, name=f"wide_{name}_{dim}", **{**settings, "head_dim": dim})
    for name in ("window", "bias", "huge"):     # the narrowest blocks of the backward
        yield replace(base, name=f"wide_{name}_576", **{**features[name], "head_dim": 576, "head_dim_v": 512})
    packed = replace(base, lengths_q=(130, 0, 65, 1, 64), lengths_k=(130, 40, 200, 70, 0), num_heads=4, num_heads_k=2)
    for dim, dim_v in ((320, 320), (384, 384), (512, 256), (256, 576), (512, 512), (576, 512)):
        yield replace(packed, name=f"wide_packed_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, used_k=(100, 40, 0, 1, 0), spare=7)
    yield replace(packed, name="wide_packed_all", alibi="batch", bias=(5, 1, 130, 200), mask=(1, 4, 1, 200), sinks=True, dropout_p=0.1,
                  softcap=9.0)


def _decode() -> Iterator[Case]:
    """Few queries and many keys: the keys are split (decode/launch.py)."""
    base = Case("decode", "bfloat16", num_heads=8, num_heads_k=2, seqlen_q=1, seqlen_k=1000, head_dim=128, causal=True)
    for dim, dim_v in ((64, 64), (128, 64), (64, 128), (128, 128)):
        for dtype in HALVES:
            yield replace(base, name=f"decode_{dim}_{dim_v}_{dtype}", head_dim=dim, head_dim_v=dim_v, dtype=dtype, seqlen_q=3)
    for dim in (64, 128):
        for keys in (256, 257, 511, 4099):
            yield replace(base, name=f"decode_{dim}_{keys}", head_dim=dim, seqlen_k=keys, causal=False, dtype="float16")
    changes: dict[str, dict[str, Any]] = {
        "window": {"window": (300, None)}, "window_both": {"window": (100, 50), "causal": False, "seqlen_q": 4},
        "narrow": {"window": (3, 0)}, "top_left": {"causal": "top_left", "seqlen_q": 4}, "softcap": {"softcap": 5.0},
        "sinks": {"sinks": True, "seqlen_q": 2},
        "huge": {"softmax_scale": 40.0}, "negative": {"softmax_scale": -0.1}, "zero_scale": {"softmax_scale": 0.0},
        "multi_head": {"num_heads": 3, "num_heads_k": 3, "seqlen_q": 16}, "multi_query": {"num_heads": 16, "num_heads_k": 1},
        "odd_group": {"num_heads": 10, "num_heads_k": 2, "seqlen_q": 3},
        "many": {"batch": 70, "num_heads": 6, "num_heads_k": 6, "seqlen_k": 300},
        "long": {"batch": 1, "seqlen_k": 40000}, "bhsd": {"layout": "bhsd"}, "transposed": {"memory": "transposed", "seqlen_q": 2},
        "all": {"window": (700, None), "softcap": 9.0, "sinks": True, "seqlen_q": 4}}
    for (name, settings), dim in itertools.product(changes.items(), (64, 128)):
        yield replace(base, name=f"decode_{name}_{dim}", **{**settings, "head_dim": dim})
    for name in ("window_both", "top_left", "softcap", "sinks", "huge", "negative", "multi_head", "odd_group", "many", "bhsd", "all"):
        for dim in (64, 128):
            yield replace(base, name=f"decode_float32_{name}_{dim}", **{**changes[name], "head_dim": dim, "dtype": "float32"})
    for dim, dim_v in ((16, 16), (32, 32), (36, 60), (100, 100), (64, 128), (128, 20)):
        yield replace(base, name=f"decode_float32_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, dtype="float32", seqlen_q=2)
    for dim, dim_v in ((8, 8), (32, 32), (40, 24), (80, 80), (96, 96), (104, 120), (160, 160), (192, 192), (192, 128), (96, 256),
                       (256, 256)):
        yield replace(base, name=f"decode_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, seqlen_q=3)
        yield replace(base, name=f"decode_all_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, **changes["all"])
    for rows, dim, dtype in ((5, 128, "bfloat16"), (8, 64, "float16"), (9, 256, "bfloat16"), (16, 80, "float16"), (7, 64, "float32"),
                             (13, 128, "float32"), (16, 128, "bfloat16")):        # 20 to 64 rows a key head
        yield replace(base, name=f"decode_rows_{4 * rows}_{dim}_{dtype}", head_dim=dim, dtype=dtype, seqlen_q=rows, window=(600, None))


def _decode_features() -> Iterator[Case]:
    """Few queries and many keys, with what depends on the head and on the row."""
    base = Case("decode", "bfloat16", num_heads=8, num_heads_k=2, seqlen_q=2, seqlen_k=1000, head_dim=128, causal=True)
    changes: dict[str, dict[str, Any]] = {
        "alibi": {"alibi": "heads"}, "alibi_batch": {"alibi": "batch", "causal": "top_left", "seqlen_q": 3},
        "bias": {"bias": (2, 8, 2, 1000)}, "bias_odd": {"bias": (2, 8, 2, 777), "seqlen_k": 777}, "bias_row": {"bias": (1, 1000)},
        "bias_column": {"bias": (2, 1, 2, 1)}, "bias_float32": {"bias": (8, 2, 1000), "bias_dtype": "float32", "window": (500, 3)},
        "bias_window": {"bias": (2, 8, 2, 1000), "window": (501, 3), "causal": False},         # from an odd key on
        "bias_inf": {"bias": (2, 8, 2, 1000), "bias_inf": True, "sinks": True}, "mask": {"mask": (2, 8, 2, 1000)},
        "mask_blocks": {"mask": (2, 1, 4, 1000), "mask_kind": "blocks", "seqlen_q": 4}, "mask_hidden": {"mask": (1, 1, 2, 1000),
                                                                                                        "mask_kind": "hidden"},
        "mask_padding": {"mask": (2, 1, 1, 2100), "mask_kind": "blocks", "seqlen_k": 2100, "window": (1500, 0), "causal": False},
        "many": {"alibi": "heads", "bias": (1, 8, 8, 1000), "mask": (2, 1, 8, 1000), "softcap": 4.0, "sinks": True, "seqlen_q": 8,
                 "window": (900, 5), "causal": False},
        "softcap_bias": {"softcap": 9.0, "bias": (2, 1, 2, 1000), "bias_size": 5.0}, "bhsd": {"layout": "bhsd", "alibi": "heads",
                                                                                               "mask": (2, 1000)}}
    for (name, settings), (dim, dtype) in itertools.product(changes.items(), ((64, "bfloat16"), (128, "float16"), (128, "float32"))):
        yield replace(base, name=f"decode_{name}_{dim}_{dtype}", **{**settings, "head_dim": dim, "dtype": dtype})
    for dim in (32, 80, 256):
        for name in ("bias_odd", "many"):
            yield replace(base, name=f"decode_{name}_{dim}", **{**changes[name], "head_dim": dim})


def is_short(case: Case) -> bool:
    """Whether kernels of short sequences may run it."""
    keys = case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    return not case.packed and max(case.seqlen_q, 2 * keys) <= 128 and max(case.head_dim, case.head_dim_v or 0) <= 64


_SHORT = [pytest.param(case, "short", id=f"{case.name}-short") for case in CASES if is_short(case)]
short_pairs = pytest.mark.parametrize(("case", "family"), _SHORT)
DECODE = [*_decode(), *_decode_features()]
LARGE = [*_large(), *_wide(), *float_cases(), *DECODE]
SMALL = [replace(case, name=f"small_{case.name}") for case in (
    Case("plain", "bfloat16", batch=1, seqlen_q=130, head_dim=64),
    Case("causal", "float16", batch=1, seqlen_q=150, head_dim=128, causal=True),
    Case("features", "bfloat16", seqlen_q=70, seqlen_k=140, head_dim=64, causal=True, window=(60, None), softcap=3.0, alibi="heads",
         bias=(2, 1, 70, 140), mask=(2, 1, 1, 140), sinks=True, dropout_p=0.2),
    Case("packed", "bfloat16", lengths_q=(70, 0, 33), lengths_k=(90, 4, 130), spare=3, head_dim=128, causal=True),
    Case("odd", "float16", seqlen_q=37, head_dim=40, head_dim_v=24, memory="sliced"),
    Case("decode", "bfloat16", num_heads=8, num_heads_k=2, seqlen_q=1, seqlen_k=400, head_dim=128))]


def for_family(case: Case, family: str) -> Case:
    """The case with a dtype that the family may take."""
    if family in ("any", "simt") or case.dtype in (*HALVES, "float32"):
        return case
    return replace(case, dtype=HALVES[zlib.crc32(case.name.encode()) % 2], bias_dtype=case.bias_dtype and "float32")


def must_take(case: Case, family: str, backward: bool = False) -> bool:
    """Whether a refusal is an error."""
    if family in ("any", "simt"):
        return True
    dims = (case.head_dim, case.head_dim_v or case.head_dim)
    rows, keys = case.seqlen_q, case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    if case.lengths_q is not None:
        rows, keys = sum(case.lengths_q), sum(case.lengths_q if case.lengths_k is None else case.lengths_k)
    floats = case.dtype == "float32"
    most = 128 if floats and (backward or family != "sm90") else 576 if family == "sm90" else 256
    ordinary = (case.dtype in HALVES or floats) and max(dims) <= most and keys > 0 and rows > 0 and case.batch > 0
    several = sum(map(bool, (case.bias, case.mask, case.dropout_p, case.softcap, case.alibi))) > 1
    if family == "sm90" and not floats and (192 < max(dims) <= 256 or dims[1] > 512) and several:
        return False                                        # not enough registers
    if floats:
        return ordinary                                     # its parts are copies, so any strides do
    return ordinary and (family in ("sm80", "short") or (case.memory in ("contiguous", "transposed") and all(d % 8 == 0 for d in dims)))


def families_here(families: tuple[str, ...] = gpu.FAMILIES) -> list[str]:
    """The `families` that run on this device, and "any", the engine's own choice."""
    from fastattn.gpu.runtime.device import device
    return ["any", *(family for family in families if family != "sm90" or device_count() == 0 or device(0).arch == "sm_90a")]


def wanted(family: str) -> tuple[str, ...]:
    return {"any": gpu.FAMILIES, "short": ("sm80",)}.get(family, (family,))


@contextmanager
def using(family: str) -> Iterator[None]:
    """The kernels of a family. A tensor-core family's own ones only, not those of short sequences, so that short problems test them, too.
    "short" has those, "any" has all."""
    with ExitStack() as stack:
        stack.enter_context(gpu.use(*wanted(family)))
        if family in ("sm80", "sm90"):
            stack.enter_context(mock.patch.object(short, "accepts", lambda call: False))
            stack.enter_context(mock.patch.object(sm80, "one_tile", lambda call: False))
        yield


def pairs(cases: list[Case], families: tuple[str, ...] = gpu.FAMILIES) -> Any:
    given = [pytest.param(case, family, id=f"{case.name}-{family}") for case in cases for family in families_here(families)]
    return pytest.mark.parametrize(("case", "family"), given)


PROFILES: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": True}, "packed": {"causal": True, "packed": True},
    "packed_window": {"window": True, "packed": True, "sinks": True},
    "scores": {"causal": True, "softcap": 4.0, "alibi": "heads", "bias": True},
    "half_bias": {"bias": True, "bias_dtype": None, "causal": True},
    "masks": {"mask": True, "bias": True, "bias_inf": True}, "dropout": {"causal": True, "dropout_p": 0.3},
    "all": {"causal": True, "window": True, "packed": True, "softcap": 4.0, "alibi": "batch", "bias": True, "mask": True, "sinks": True,
            "dropout_p": 0.1},
}


def fuzz_cases(profile: str, count: int) -> list[Case]:
    """Random lengths, heads, limits and layouts; dtype, head sizes and features are the profile's, so that it is one kernel a family."""
    draw = random.Random(profile)
    dim, dim_v = draw.choice([(64, None), (128, None), (128, 64), (256, None), (80, None)])
    dtype = draw.choice(HALVES)
    return [_fuzz_case(draw, profile, n, dim, dim_v, dtype) for n in range(count)]


def _fuzz_case(draw: random.Random, profile: str, n: int, dim: int, dim_v: int | None, dtype: str) -> Case:
    on = PROFILES[profile]

    def length() -> int:
        return draw.choice([draw.randint(1, 40), draw.randint(1, 700), draw.choice([63, 64, 65, 127, 128, 129, 192, 256, 257, 384, 512])])
    heads_k, group, batch = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 3)
    rows, keys = length(), length()
    if on.get("bias_dtype", "float32") is None:
        keys = -(-keys // 8) * 8        # rows of a bias of 16 bits that TMA can address
    shape: dict[str, Any] = {"batch": batch, "seqlen_q": rows, "seqlen_k": keys, "layout": draw.choice(["bshd", "bhsd"])}
    if on.get("packed"):
        count = draw.randint(1, 5)
        lengths_q, lengths_k = (tuple(draw.choice([0, length(), length()]) for _ in range(count)) for _ in range(2))
        lengths_q, lengths_k = (*lengths_q[:-1], rows), (*lengths_k[:-1], keys)
        used = tuple(draw.randint(0, k) for k in lengths_k) if n % 2 else None
        shape = {"lengths_q": lengths_q, "lengths_k": lengths_k, "used_k": used, "spare": draw.choice([0, 3])}
        batch, rows, keys = count, max(lengths_q), max(lengths_k)

    def broadcast() -> tuple[int, ...]:
        return tuple(size if draw.random() < 0.6 else 1 for size in (batch, heads_k * group, rows, keys))
    return Case(f"fuzz_{profile}_{n}", dtype, num_heads=heads_k * group, num_heads_k=heads_k, head_dim=dim, head_dim_v=dim_v,
                causal=draw.choice([True, "top_left"]) if on.get("causal") else False,
                window=(draw.randint(0, 300), draw.randint(0, 300)) if on.get("window") else None, softcap=on.get("softcap"),
                alibi=on.get("alibi"), bias=broadcast() if on.get("bias") else None, bias_dtype=on.get("bias_dtype", "float32"),
                bias_inf=on.get("bias_inf", False), mask=broadcast() if on.get("mask") else None,
                sinks=on.get("sinks", False), dropout_p=on.get("dropout_p", 0.0),
                memory=draw.choice(["contiguous", "contiguous", "transposed"]), **shape)


# ---------------------------------------------------------------- arrays on the device, strides and all
def _driver() -> Any:
    return streams.driver()


class Strided:
    """A NumPy array's copy on device 0 with its strides, negative ones too; it has DLPack alone."""

    def __init__(self, x: Array) -> None:
        place = convert.view(x, "test", "x")
        low, high = place.bytes_range()
        self.shape, self.strides, self.dtype = place.shape, place.strides, place.dtype
        with streams.on_device(0):
            self.memory = int(streams.check(_driver().cuMemAlloc(max(high - low, 1)), "cuMemAlloc"))
            if high > low:
                streams.check(_driver().cuMemcpyHtoD(self.memory, low, high - low), "cuMemcpyHtoD")
        self.ptr = self.memory + place.ptr - low

    def __del__(self) -> None:
        with streams.on_device(0):
            _driver().cuMemFree(self.memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        return dlpack.capsule(self, self.ptr, self.shape, self.strides, self.dtype, 0, max_version)


@lru_cache
def torch() -> Any:
    """torch with CUDA, or None: not there, or FASTATTN_TEST_TORCH=0."""
    if os.environ.get("FASTATTN_TEST_TORCH") == "0":
        return None
    try:
        import torch as module
    except ImportError:
        return None
    return module if module.cuda.is_available() else None


def on_device(x: Array) -> Any:
    """A copy with the same strides, gaps included: a torch tensor, or a Strided where torch is not there or has no such strides."""
    if torch() is None or any(s < 0 for s in x.strides):
        return Strided(x)
    dtype = getattr(torch(), x.dtype.name)
    if 0 in x.shape:
        return torch().empty(x.shape, dtype=dtype, device="cuda")
    place = convert.view(x, "test", "x")
    low, high = place.bytes_range()
    raw = torch().frombuffer(bytearray(ctypes.string_at(low, high - low)), dtype=torch().uint8).cuda()
    size = x.dtype.itemsize
    return torch().as_strided(raw.view(dtype), x.shape, [s // size for s in x.strides], (place.ptr - low) // size)


def to_host(x: Any) -> Array:
    """A result as an ndarray; waits for the device."""
    if torch() is not None and isinstance(x, torch().Tensor):
        name = str(x.dtype).removeprefix("torch.")
        if name in NO_NUMPY:
            bits = torch().int16 if x.element_size() == 2 else torch().uint8
            return np.asarray(x.contiguous().view(bits).cpu().numpy()).view(numpy_dtype(name))
        return np.asarray(x.cpu().numpy())
    ptr = x.view().ptr if isinstance(x, DeviceArray) else x.ptr
    host = np.empty(x.shape, NUMPY[x.dtype])
    with streams.on_device(0):
        streams.check(_driver().cuCtxSynchronize(), "cuCtxSynchronize")
        if host.nbytes:
            streams.check(_driver().cuMemcpyDtoH(host.ctypes.data, ptr, host.nbytes), "cuMemcpyDtoH")
    return host


def device_arguments(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of the public function, arrays on the device; lengths there cannot be read, so their maxima are given."""
    kwargs = {name: on_device(x) if isinstance(x, np.ndarray) else x for name, x in inputs.kwargs.items()}
    if inputs.packed:
        kwargs |= {f"max_seqlen_{side}": int(np.diff(cu).max(initial=0)) for side, cu in (("q", inputs.args[3]), ("k", inputs.args[4]))}
    return [on_device(x) for x in inputs.args], kwargs


def function_of(inputs: Inputs) -> Any:
    return fastattn.attention_varlen if inputs.packed else fastattn.attention


@lru_cache(maxsize=64)
def judged(case: Case) -> tuple[Inputs, Judge]:
    inputs = case.make()
    return inputs, Judge(inputs)


# ---------------------------------------------------------------- every kernel that is needed, compiled at once
@lru_cache(2)
def made(case: Case) -> Inputs:
    """The arguments of a case, for those who look at shapes and addresses alone: drawing them is most of the time."""
    return case.make()


def sources_of(case: Case, family: str, arch: str, with_lse: bool = True, backward: bool = False) -> list[Any]:
    """The kernels of a case in one direction, found without a device."""
    inputs = made(for_family(case, family))

    def dry(x: Any) -> Any:
        if x is None:
            return None
        place = convert.view(x, "test", "x")
        return replace(place, ptr=(1 << 20) + place.ptr - place.bytes_range()[0], device=precompile.HERE)
    settings = {name: x for name, x in inputs.kwargs.items() if name != "layout"}
    arrays = operands_of(settings, dry)
    swap = inputs.kwargs.get("layout") == "bhsd"
    canonical = [dry(x.swapaxes(1, 2) if swap else x) for x in inputs.args]
    lengths = {}
    if inputs.packed:
        arrays |= {"cu_seqlens_q": canonical[3], "cu_seqlens_k": canonical[4]}
        lengths = {f"max_seqlen_{side}": int(np.diff(cu).max(initial=0)) for side, cu in (("q", inputs.args[3]), ("k", inputs.args[4]))}
    problem, o = make_problem("test", Operands(*canonical[:3], **arrays), packed=inputs.packed, **settings, **lengths)
    out, lse = (dry(np.empty(shape, NUMPY[dtype])) for shape, dtype in ((problem.out_shape, problem.out_dtype),
                                                                        (problem.lse_shape, problem.lse_dtype)))
    if 0 in problem.out_shape and not backward:
        return []
    call: Any = Call(problem, o, out, lse if with_lse else None)
    spec = make_spec(problem, o, with_lse)
    if backward:
        bias = inputs.kwargs.get("bias")
        dbias = None if bias is None else dry(np.empty((1,) * (4 - bias.ndim) + bias.shape, bias.dtype))
        dout = dry(inputs.dout.swapaxes(1, 2) if swap else inputs.dout)
        grads = Grads(*(dry(np.empty(x.shape, NUMPY[problem.out_dtype])) for x in canonical[:3]), dbias, o.sinks)
        call = BackwardCall(problem, o, dout, out, lse, dry(inputs.dlse), grads, False)
        spec = make_backward_spec(call)
    try:
        with using(family):
            return precompile.sources(call, spec, precompile.absent_device(arch))
    except UnsupportedError:
        return []


def compile_one(case: Case, family: str, arch: str, with_lse: bool, backward: bool, key: str) -> str | None:
    """In a worker process: one kernel into the cache. What goes wrong is raised again by the test that needs it."""
    from fastattn.gpu.runtime.compile import binary

    for source in sources_of(case, family, arch, with_lse, backward):
        if source.key == key:
            try:
                binary(source, arch)
            except Exception as error:
                return f"{key}: {error}"
    return None


def compile_kernels(items: list[Any]) -> None:
    """The kernels of all cases that these tests run, compiled into the cache in parallel. A module with BACKWARD = True runs backwards."""
    from fastattn.gpu.runtime.device import device

    arch, jobs = device(0).arch, dict[str, tuple[Case, str, str, bool, bool, str]]()
    for item in items:
        backward = bool(getattr(item.module, "BACKWARD", False))
        given = getattr(getattr(item, "callspec", None), "params", {})
        cases = [given["case"]] if isinstance(given.get("case"), Case) else fuzz_cases(given["profile"], 2) if "profile" in given else []
        cases += [case for mark in item.iter_markers("kernels") for case in mark.args]
        for case in cases:
            job = (case, given.get("family", "any"), arch, given.get("lse", backward or asks_lse(case)), backward)
            for source in sources_of(*job):
                jobs.setdefault(source.key, (*job, source.key))
    if not jobs:
        return
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(jobs)), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs.values(), strict=True)))


def asks_lse(case: Case) -> bool:
    """Float32 calls that give lse are not run by the kernel of few queries."""
    return not (case.name.startswith("decode") and case.dtype == "float32")


def forward(inputs: Inputs, family: str, return_lse: bool = True) -> tuple[Array, Array | None]:
    """(out, lse) of the family, written into memory that held NaN; all other free memory holds NaN too."""
    args, kwargs = device_arguments(inputs)
    q, v = inputs.args[0], inputs.args[2]
    out = on_device(np.full((*q.shape[:-1], v.shape[-1]), np.nan, NUMPY[kwargs.get("out_dtype", inputs.dtype)]))
    poison()
    with using(family):
        given = function_of(inputs)(*args, **kwargs, out=out, return_lse=return_lse)
    given, lse = given if return_lse else (given, None)
    assert given is out
    return to_host(out), to_host(lse) if return_lse else None
