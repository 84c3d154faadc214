"""The Hopper forward over caches: which calls it runs, what it is launched with, its kernels. test_roles_pages.py plays it; a device runs
the cases."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.arrays import convert
from fastattn.gpu.precompile import HERE, absent_device
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.spec import Call, make_spec
from tests.tools import caches
from tests.tools.devices import requires_gpu
from tests.tools.gpu.calls import serving_call
from tests.tools.gpu.cases import on_device as to_device
from tests.tools.gpu.cases import to_host

BASE = caches.Case("prefill", "bfloat16", keys=(300, 41, 700), rows=130, num_heads=4, num_heads_k=2, head_dim=128, append=False)


def call_of(case: caches.Case, **options: Any) -> Call:
    made = replace(case, options={**case.options, **options}).make()
    return serving_call(made, lambda x: replace(convert.view(np.ascontiguousarray(x), "test", "x"), device=HERE))


class Noting(Listing):
    """Keeps what kernels are launched with."""

    def __init__(self) -> None:
        super().__init__(absent_device("sm_90a"))
        self.boxes: tuple[Any, ...] = ()
        self.values: dict[str, Any] = {}

    def tensor_maps(self, boxes: Any, captured: bool, forms: Any = None) -> list[int]:
        self.boxes = boxes
        return super().tensor_maps(boxes, captured, forms)

    def load(self, source: Any) -> Any:
        super().load(source)
        noting = self

        class Kernel:
            def launch(self, grid: int, values: list[Any], stream: int) -> None:
                noting.values = dict(zip([name for name, _ in source.fields], values, strict=True))
        return Kernel()


def launched(call: Call) -> Noting:
    launcher = Noting()
    gpu.choose(call, launcher.device).prepare(call, make_spec(call.problem, call.operands, call.lse is not None), launcher)(call, 0)
    return launcher


def kernel_of(case: caches.Case, **options: Any) -> str:
    return launched(call_of(case, **options)).sources[0].key.split()[0]


# ---------------------------------------------------------------- which calls
def test_where_the_kernels_cross() -> None:
    """Up to 64 rows of a key head the keys are split, with heads that share it or few tiles, and up to 16 queries of any heads."""
    for rows, heads, batch, wanted in ((8, 4, 3, "decode"), (32, 4, 3, "decode"), (33, 4, 3, "sm90"), (64, 2, 3, "decode"),
                                       (65, 2, 3, "sm90"), (64, 2, 66, "sm90"), (16, 2, 66, "decode"), (16, 64, 66, "decode"),
                                       (17, 64, 66, "sm90")):
        case = replace(BASE, rows=rows, num_heads=heads, num_heads_k=2, keys=(70,) * batch)
        assert kernel_of(case) == f"forward_{wanted}", (rows, heads, batch)
    alone = replace(BASE, rows=64, num_heads=2, keys=(70,) * 66)
    assert kernel_of(alone, num_splits=1) == "forward_decode"       # as in a batch of one


def test_what_few_rows_fall_back_to() -> None:
    assert kernel_of(replace(BASE, rows=3, page_size=5)) == "forward_decode"
    assert kernel_of(replace(BASE, rows=60, num_heads=2, page_size=5, keys=(70,) * 66)) == "forward_decode"


@pytest.mark.parametrize(("changes", "options"), [
    ({"page_size": 40}, {}), ({"dtype": "float32"}, {}), ({"rows": (130, 5, 70)}, {"num_splits": 1})], ids=str)
def test_what_the_tiled_kernel_leaves(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Pages whose boxes would be small, float32, and packed requests that keep their bits: the split-key kernel, in blocks of rows."""
    assert kernel_of(replace(BASE, **changes), **options) == "forward_decode"


def test_what_no_kernel_takes() -> None:
    with pytest.raises(fastattn.UnsupportedError, match="multiples of 16 bytes"):
        gpu.choose(call_of(replace(BASE, head_dim=124)), absent_device("sm_90a"))


def test_other_architectures_and_families() -> None:
    call = call_of(BASE)
    found = dict(gpu.reasons(call, absent_device("sm_80"), gpu.FAMILIES))
    assert found == {"sm90": "it needs sm_90a, this is sm_80", "sm80": None, "simt": "it reads no caches"}


# ---------------------------------------------------------------- what it is launched with
@pytest.mark.parametrize(("page_size", "box", "whole"), [
    (16, 16, True), (48, 16, False), (64, 64, True), (128, 128, True), (256, 128, False)])
def test_boxes_of_pages(page_size: int, box: int, whole: bool) -> None:
    call = call_of(replace(BASE, page_size=page_size))
    found, cache = launched(call), call.operands.k
    (q, _), (k, rows), (v, rows_v), _ = found.boxes
    assert rows == rows_v == box and (q.ptr, k.ptr, v.ptr) == tuple(x.ptr for x in (call.operands.q, cache, call.operands.v))
    assert f"box {box}" in found.sources[-1].key and found.sources[-1].key.endswith(" whole") == whole
    table, values = call.operands.cache.block_table, found.values        # type: ignore[union-attr]
    assert (values["pages"], values["pages_batch"], values["pages_entry"]) == (table.ptr, *table.strides)
    assert (values["last_page"], values["page_size"], values["append"]) == (cache.shape[0] - 1, page_size, 0)
    assert values["seqlen_k"] == table.shape[1] * page_size and values["lengths"] == call.operands.seqused_k.ptr      # type: ignore[union-attr]
    for row in (0, page_size - 1, page_size, 7 * page_size + 3):
        assert row * values["page_magic"] >> values["page_shift"] == row // page_size


def test_rows_of_a_cache() -> None:
    """A row for each request, by their numbers or by an index: blocks need not divide it."""
    rows = launched(call_of(replace(BASE, page_size=None)))
    assert "pages" not in rows.values and rows.boxes[1][1] == 128
    index = launched(call_of(replace(BASE, page_size=None, batch_idx=True)))
    assert index.values["pages_entry"] == 0 and index.values["page_size"] == 832 and index.boxes[1][1] == 128


def test_packed_queries() -> None:
    found = launched(call_of(replace(BASE, rows=(130, 0, 70), spare=3)))
    assert [source.key.split()[0] for source in found.sources] == ["forward_sm90", "plan_packed"] and "cached" in found.sources[1].key


# ---------------------------------------------------------------- its kernels
KERNELS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"head_dim": 64}, {}), ({"head_dim": 64, "page_size": 48, "rows": (130, 3)}, {}), ({"page_size": 64}, {}), ({"page_size": None}, {}),
    ({"rows": (130, 3), "sinks": True}, {}), ({"alibi": "batch", "sinks": True}, {"softcap": 9.0, "window": (100, None)}),
    ({"head_dim": 256, "page_size": 64}, {}), ({"head_dim": 256}, {}),
    ({"head_dim": 256, "rows": (130, 3), "page_size": 48}, {"window": (100, 50), "causal": False}),
    ({"head_dim": 576, "head_dim_v": 512, "page_size": 64}, {}), ({"head_dim": 64, "alibi": "heads"}, {"softcap": 9.0})]


@pytest.mark.parametrize(("changes", "options"), KERNELS, ids=str)
def test_kernels_do_not_spill(changes: dict[str, Any], options: dict[str, Any]) -> None:
    keys = (300, 41) if isinstance(changes.get("rows"), tuple) else BASE.keys
    source = launched(call_of(replace(BASE, keys=keys, **changes), **options)).sources[0]
    assert source.key.startswith("forward_sm90") and compiler.complaints(compiler.build(source, "sm_90a")[1]) == []


# ---------------------------------------------------------------- on a device
SERVED = [replace(BASE, name=f"prefill_{n}", **settings) for n, settings in enumerate([
    {}, {"page_size": 64, "head_dim": 64}, {"page_size": 128, "head_dim": 256}, {"page_size": 256, "dtype": "float16"}, {"page_size": 48},
    {"page_size": None}, {"page_size": None, "batch_idx": True, "head_dim": 64}, {"page_size": 32, "shared": 1, "layout": "bhsd"},
    {"rows": (130, 0, 70), "spare": 9}, {"rows": (300, 41, 1), "page_size": 64, "head_dim": 64, "keys": (300, 41, 513)},
    {"rows": (200, 33, 129), "head_dim": 256, "page_size": None}, {"keys": (0, 1, 129), "page_size": 16, "rows": 200},
    {"alibi": "batch", "sinks": True, "options": {"window": (60, None), "softcap": 9.0}},
    {"head_dim": 96, "head_dim_v": 64, "page_size": 64},
    {"rows": (130, 20, 70), "alibi": "heads", "sinks": True, "options": {"window": (60, None)}, "page_size": 64},
    {"options": {"causal": False}}, {"head_dim": 576, "head_dim_v": 512, "page_size": 64, "num_heads_k": 1},
    {"rows": 333, "keys": (2000, 4097, 3333), "page_size": 16, "head_dim": 64, "num_heads": 8}])]


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_attention_with_kvcache_on_a_device(case: caches.Case) -> None:
    made = case.make()
    options = {name: to_device(x) if isinstance(x, np.ndarray) else x for name, x in made.options.items()}
    arrays = [None if x is None else to_device(x) for x in made.arrays]
    with fastattn.use_engine("sm90"):
        made.judge(*(to_host(x) for x in fastattn.attention_with_kvcache(*arrays, **options, return_lse=True)))


@requires_gpu
@pytest.mark.gpu
def test_one_split_has_the_same_bits_in_any_batch() -> None:
    made = replace(BASE, keys=(300, 41, 700), options={"num_splits": 1}).make()
    arrays = [None if x is None else to_device(x) for x in made.arrays]
    table, lengths = made.options["block_table"], made.options["cache_seqlens"]
    whole = to_host(fastattn.attention_with_kvcache(*arrays, cache_seqlens=to_device(lengths), block_table=to_device(table), num_splits=1))
    for b in range(3):
        q = to_device(np.ascontiguousarray(made.arrays[0][b:b + 1]))
        wider = np.concatenate([table[b:b + 1], np.zeros((1, 7), np.int32)], axis=1)
        alone = fastattn.attention_with_kvcache(q, *arrays[1:3], cache_seqlens=to_device(lengths[b:b + 1]), block_table=to_device(wider),
                                                num_splits=1)
        assert to_host(alone).tobytes() == whole[b:b + 1].tobytes()
