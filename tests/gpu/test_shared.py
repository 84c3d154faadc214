"""Requests that share a prefix, on the GPU: kernels run from their PTX, and on a device where there is one."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn.arrays import convert
from fastattn.gpu.decode import shared
from fastattn.gpu.decode.caches import prepare_caches
from fastattn.gpu.precompile import HERE, absent_device
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.sm90 import launch as sm90
from fastattn.gpu.spec import make_spec
from tests.tools.caches import Call, Case, Eight
from tests.tools.devices import requires_gpu
from tests.tools.gpu.calls import interpreted_serving, serving_call
from tests.tools.gpu.cases import on_device as to_device
from tests.tools.gpu.cases import to_host

Array = np.ndarray[Any, Any]
SMALL = [
    Case("decode", dtype="bfloat16", shared=3, keys=(50, 60, 48, 90)),
    Case("some are shorter", dtype="bfloat16", shared=3, keys=(50, 20, 0, 90), append=False),
    Case("the first one is shorter", dtype="bfloat16", shared=3, keys=(20, 60, 48, 90), append=False),
    Case("the first one is empty", dtype="bfloat16", shared=3, keys=(0, 60, 48), append=False),
    Case("some rows see less", dtype="bfloat16", shared=3, keys=(50, 49, 90), rows=5, append=False),
    Case("packed", dtype="float16", shared=2, keys=(40, 60, 33), rows=(5, 1, 9), spare=3, sinks=True),
    Case("packed, one without rows", dtype="float16", shared=2, keys=(40, 60, 33), rows=(5, 0, 9), sinks=True),
    Case("features", dtype="bfloat16", shared=2, keys=(40, 33), rows=2, alibi="batch", options={"softcap": 5.0, "window": (20, 0)}),
    Case("float32, rotary, bhsd", shared=2, keys=(40, 33), rows=2, rotary=(16, False), layout="bhsd"),
    Case("scales by request", dtype="bfloat16", shared=2, keys=(40, 33), rows=2, eight=Eight("float8_e4m3fn", ("none", "batch", "batch"))),
    Case("8-bit q", dtype="bfloat16", shared=2, keys=(40, 33), rows=2, eight=Eight("float8_e4m3fn", ("batch", "batch", "head"), q=True)),
    Case("pages of 5", dtype="bfloat16", shared=5, keys=(40, 33), page_size=5),
]
LARGE = [
    Case("blocks of 64 rows", dtype="bfloat16", shared=2, keys=(50, 40, 33, 60) * 5, num_heads=16, num_heads_k=2),
    Case("blocks of 64 rows, packed", dtype="bfloat16", shared=2, keys=(50, 40, 33, 60) * 5, rows=(1, 2, 1, 1) * 5, num_heads=8,
         num_heads_k=1, head_dim=64),
    Case("steps of 32 keys", dtype="bfloat16", shared=2, keys=(70, 90, 66, 80) * 5, num_heads=8, num_heads_k=2, head_dim=128, page_size=32),
    Case("several splits", dtype="bfloat16", shared=40, keys=(650, 700, 641), num_heads=2, num_heads_k=1),
]
CACHE8 = Eight("float8_e4m3fn", ("none", "head", "head"))


def keys_of(case: Case) -> int:
    """shared_prefix of the case, not in whole pages."""
    return case.shared * (case.page_size or 0) + 3


def judged(case: Case, **more: Any) -> list[str]:
    """Results against float64, caches bit for bit. The names of the kernels."""
    made = case.make()
    expected = made.caches_after()
    found = interpreted_serving(made, **{"shared_prefix": keys_of(case), **more})
    for name, got, right in (("k_cache", found.k_cache, expected[0]), ("v_cache", found.v_cache, expected[1])):
        assert got.tobytes() == right.tobytes(), f"{name}'s bits"
    made.judge(found.out, found.lse)
    return [name for name in found.kernels if name.startswith("forward")]


@pytest.mark.parametrize("case", SMALL + LARGE, ids=lambda case: case.name)
def test_prefix_is_read_once(case: Case) -> None:
    assert judged(case, num_splits=11 if case.name == "several splits" else None) == ["forward_decode"] * 2


@pytest.mark.parametrize("case", [replace(SMALL[0], keys=(50, 1060, 48, 90)), SMALL[5]], ids=lambda case: case.name)
def test_wide_tables_are_planned(case: Case) -> None:
    """There may be long requests then. The plan counts the keys behind the prefix."""
    made = case.make()
    expected, table = made.caches_after(), made.options["block_table"]
    wide = np.concatenate([table, np.full((len(table), 600), -1, np.int32)], axis=1)
    found = interpreted_serving(made, block_table=wide, shared_prefix=keys_of(case))
    assert [name for name in found.kernels if name != "append"] == ["forward_decode", "plan_splits", "forward_decode"]
    assert found.k_cache.tobytes() == expected[0].tobytes()
    made.judge(found.out, found.lse)


@pytest.mark.parametrize("given", [None, 0, 15])
def test_nothing_is_shared_unless_a_page_is(given: int | None) -> None:
    assert judged(SMALL[0], shared_prefix=given) == ["forward_decode"]


def test_a_broken_promise_stays_inside_the_cache() -> None:
    """A request attends to the first one's pages then; entries that name no page are the last one."""
    made = replace(SMALL[0], append=False).make()
    table = made.options["block_table"].copy()
    table[1, :3], table[0, 1] = [-1, 10**6, 2], -(2**31)
    made.arrays[1][np.isnan(made.arrays[1])] = 0
    found = interpreted_serving(made, block_table=table, shared_prefix=48)
    named = table.copy()
    named[:, :3] = [table[0, 0], len(made.arrays[1]) - 1, table[0, 2]]
    made.arrays[2][np.isnan(made.arrays[2])] = 0
    right = Call(made.case, made.arrays, {**made.options, "block_table": named}, named)
    assert np.isfinite(found.lse).all()
    exact = right.expected()[1]
    np.testing.assert_allclose(found.lse, exact, atol=1e-3)


def test_one_split_has_the_same_bits_in_any_batch() -> None:
    """Of the same shared prefix: the prefix's rows may be in other blocks, beside other requests'."""
    made = Case("bits", dtype="bfloat16", shared=3, keys=(50, 60, 48, 90, 55), num_heads=8, num_heads_k=1, append=False).make()
    together = interpreted_serving(made, num_splits=1, shared_prefix=48)
    few = [0, 3, 4]
    options = {name: x[few] for name, x in made.options.items()}
    case = replace(made.case, keys=tuple(made.case.keys[b] for b in few))
    fewer = Call(case, [made.arrays[0][few], *made.arrays[1:]], options, made.table[few])
    some = interpreted_serving(fewer, num_splits=1, shared_prefix=48)
    assert some.out.tobytes() == together.out[few].tobytes() and some.lse.tobytes() == together.lse[few].tobytes()


# ---------------------------------------------------------------- what is launched
def call_of(case: Case, **more: Any) -> Any:
    more = {"shared_prefix": keys_of(case), **more}
    return serving_call(case.make(), lambda x: replace(convert.view(x, "test", "x"), device=HERE), **more)


@pytest.mark.parametrize(("case", "keys"), [
    (SMALL[0], 48), (Case("pages of 100", page_size=100, shared=1, keys=(120, 130)), 100), (replace(SMALL[0], keys=(50,)), 0),
    (Case("latent", dtype="bfloat16", shared=2, keys=(40, 60), num_heads_k=1, head_dim=576, head_dim_v=512), 0)], ids=str)
def test_keys_are_whole_pages(case: Case, keys: int) -> None:
    assert shared.keys_of(call_of(case)) == keys


def test_prompts_run_as_they_do_alone() -> None:
    """Many rows of a request: products bound the tiled kernel, which reads each request's keys."""
    call = call_of(Case("prompts", dtype="bfloat16", shared=2, keys=(64, 80), rows=64, head_dim=128))
    listing = Listing(absent_device("sm_90a"))
    sm90.prepare(call, make_spec(call.problem, call.operands, True), listing)
    assert [source.key.split()[0] for source in listing.sources] == ["forward_sm90"]


@pytest.mark.parametrize(("arch", "changes"), [
    ("sm_80", {}), ("sm_120", {}), ("sm_90a", {}), ("sm_90a", {"head_dim": 256}), ("sm_120", {"eight": CACHE8}),
    ("sm_90a", {"eight": CACHE8}), ("sm_90a", {"page_size": 32, "keys": (70,) * 20}), ("sm_90a", {"dtype": "float32"}),
    ("sm_90a", {"rows": tuple([1] * 20), "sinks": True, "alibi": "heads"}),
    ("sm_90a", {"rows": tuple([1] * 20), "alibi": "batch", "page_size": 32, "keys": (70,) * 20,
                "options": {"softcap": 5.0, "window": (9, 0)}}),
], ids=str)
def test_compiled(arch: str, changes: dict[str, Any]) -> None:
    """Blocks of 64 rows: no spill, no local memory."""
    call = call_of(replace(LARGE[0], **{"head_dim": 128, "keys": (50,) * 20, "append": False, **changes}))
    listing = Listing(absent_device(arch))
    prepare_caches(call, make_spec(call.problem, call.operands, True), listing)
    assert len(listing.sources) == 2
    for source in listing.sources:
        assert compiler.complaints(compiler.build(source, arch)[1]) == [], source.key


# ---------------------------------------------------------------- with a GPU
DEVICE = [*SMALL, *LARGE,
          Case("alibi", dtype="bfloat16", shared=2, keys=(40, 33), rows=2, alibi="heads"),
          Case("window", dtype="bfloat16", shared=2, keys=(40, 33), rows=2, options={"window": (20, 0)}),
          Case("not causal", dtype="bfloat16", shared=2, keys=(40, 33), rows=3, options={"causal": False}),
          Case("long prefix", dtype="bfloat16", shared=250, keys=(4100, 4000, 4090, 4500), num_heads=8, num_heads_k=2, head_dim=128),
          Case("many requests", dtype="bfloat16", shared=64, keys=tuple(range(1030, 1094)), num_heads=8, num_heads_k=2, head_dim=64),
          Case("wide heads", dtype="bfloat16", shared=4, keys=(70, 90, 64), num_heads=8, num_heads_k=2, head_dim=256)]


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE, ids=lambda case: case.name)
def test_on_a_device(case: Case) -> None:
    made = case.make()
    expected = made.caches_after()
    options = {name: to_device(x) if isinstance(x, np.ndarray) else x for name, x in made.options.items()}
    for _ in range(3):                      # the full path twice, then as a call that is repeated
        arrays = [None if x is None else to_device(x) for x in made.arrays]
        out, lse = fastattn.attention_with_kvcache(*arrays, **options, shared_prefix=keys_of(case), return_lse=True)
        for got, right in zip(arrays[1:3], expected, strict=True):
            assert as_bytes(got) == right.tobytes()
        made.judge(to_host(out), to_host(lse))


def as_bytes(x: Any) -> bytes:
    torch = pytest.importorskip("torch")
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes() if isinstance(x, torch.Tensor) else to_host(x).tobytes()


@requires_gpu
@pytest.mark.gpu
def test_in_a_graph_with_growing_lengths() -> None:
    """One graph for all steps: lengths are read when it runs."""
    torch = pytest.importorskip("torch")
    made = replace(SMALL[0], append=False, keys=(48, 48, 48, 48), name="graph").make()
    arrays = [torch.nan_to_num(to_device(x)) for x in made.arrays[:3]]
    table = torch.arange(4 * 6, device="cuda", dtype=torch.int32).reshape(4, 6) % arrays[1].shape[0]
    table[:, :3] = table[:1, :3].clone()
    lengths = torch.full((4,), 48, dtype=torch.int32, device="cuda")

    def run(shared_prefix: int | None) -> Any:
        return fastattn.attention_with_kvcache(*arrays, cache_seqlens=lengths, block_table=table, shared_prefix=shared_prefix)
    for _ in range(3):
        run(48)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(48)
    for grown in ((48, 48, 48, 48), (49, 90, 60, 48), (96, 50, 0, 70)):
        lengths.copy_(torch.tensor(grown, dtype=torch.int32))
        graph.replay()
        exact = run(None)
        torch.cuda.synchronize()
        assert torch.allclose(out.float(), exact.float(), atol=2e-2), grown


@requires_gpu
@pytest.mark.gpu
def test_debug_mode_checks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(SMALL[0], append=False).make()
    made.options["block_table"][2, 1] = 0 if made.options["block_table"][0, 1] else 1
    arrays, options = [to_device(x) for x in made.arrays[:3]], {name: to_device(x) for name, x in made.options.items()}
    monkeypatch.setenv("FASTATTN_CHECK", "1")
    with pytest.raises(ValueError, match=r"shared_prefix is 48, and block_table has page [01] for request 2, entry 1"):
        fastattn.attention_with_kvcache(*arrays, **options, shared_prefix=48)
