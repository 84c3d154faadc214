"""Few queries and many keys: which calls run the split-key kernels, how the keys
are split, and what some kernels compute, from their PTX. test_forward.py runs the cases."""
from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.arrays import convert
from fastattn.arrays.view import View
from fastattn.gpu.decode import caches as decode_caches
from fastattn.gpu.decode import launch as launch_decode
from fastattn.gpu.decode.config import MOST_SPLITS, DecodeConfig, choose_decode, page_division, shared_bytes
from fastattn.gpu.decode.launch import KeyCache
from fastattn.gpu.precompile import Want, absent_device, sources
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime import workspace
from fastattn.gpu.runtime.device import current
from fastattn.gpu.runtime.launcher import on_device
from tests.tools.compare import Judge
from tests.tools.devices import requires_gpu
from tests.tools.gpu.calls import cache_call, interpreted, interpreted_cache
from tests.tools.gpu.cases import DECODE, asks_lse, device_arguments, for_family, must_take, sources_of, to_host
from tests.tools.gpu.cases import on_device as to_device
from tests.tools.problems import Case


def kernels_of(case: Case, family: str, arch: str) -> list[str]:
    return [source.key.split()[0] for source in sources_of(case, family, arch, asks_lse(case))]


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
def test_what_runs_the_cases(case: Case) -> None:
    for family, arch in (("sm90", "sm_90a"), ("sm80", "sm_90a"), ("sm80", "sm_80"), ("sm80", "sm_120"), ("any", "sm_89")):
        found = kernels_of(for_family(case, family), family, arch)
        if found or must_take(for_family(case, family), family):        # sm90 leaves some float32 ones to sm80
            assert found == ["forward_decode", *(["pack_mask"] if case.mask else [])], case.name


# the numbers of kernels that run from their PTX here; a device runs all cases
@pytest.mark.parametrize("name", [
    "128_128_bfloat16", "64_128_float16", "all_64", "float32_all_128", "float32_huge_64", "float32_36_60", "float32_window_both_64",
    "all_40_24", "80_80", "all_96_256", "256_256", "rows_20_128_bfloat16", "rows_52_128_float32", "rows_64_80_float16", "many_64",
    "alibi_batch_64_bfloat16", "bias_odd_128_float16", "bias_window_64_bfloat16", "bias_inf_64_bfloat16",
    "mask_padding_128_float32", "mask_blocks_64_bfloat16", "many_128_float32", "many_32", "many_256"])
def test_numbers(name: str) -> None:
    case = {case.name: case for case in DECODE}[f"decode_{name}"]
    inputs = case.make()
    out, lse, kernels = interpreted(inputs, return_lse=asks_lse(case))
    assert [key.split()[0] for key in kernels] == [*(["pack_mask"] if "mask" in inputs.kwargs else []), "forward_decode"]
    Judge(inputs).forward(out, lse)


# ---------------------------------------------------------------- lengths and pages on the device
CACHED = Case("cached", "bfloat16", batch=4, num_heads=8, num_heads_k=2, seqlen_q=3, seqlen_k=700, head_dim=64, causal=True)
LENGTHS = [697, 0, 3, 300]          # and as many new keys as there are queries


CACHES = pytest.mark.parametrize(("changes", "page_size", "stray"), [
    ({}, None, False), ({}, 16, True), ({"head_dim": 128, "dtype": "float32"}, 7, False),
    ({"window": (200, None), "softcap": 5.0, "alibi": "batch", "sinks": True, "head_dim": 80}, 1, False),
    ({"seqlen_q": 9, "head_dim": 256}, 256, True), ({"causal": False, "head_dim": 128}, 64, False)], ids=str)


def check_cache(case: Case, lengths: list[int], **settings: Any) -> Any:
    """Each request against the same problem of its keys alone, from the kernel's PTX. Returns out and lse."""
    out, lse, k, v = interpreted_cache(case, lengths, append=True, **settings)
    judge_requests(case, lengths, out, lse, k, v)
    return out, lse


def judge_requests(case: Case, lengths: list[int], out: Any, lse: Any, k: Any, v: Any) -> None:
    inputs = case.make()
    for b, length in enumerate(lengths):
        keys = min(max(length, 0) + case.seqlen_q, case.seqlen_k or 0)
        args = (inputs.args[0][b:b + 1], k[b:b + 1, :keys], v[b:b + 1, :keys])
        kwargs = {name: x[b:b + 1] if name == "alibi_slopes" and x.ndim == 2 else x for name, x in inputs.kwargs.items()}
        Judge(replace(inputs, args=args, kwargs=kwargs, dout=inputs.dout[b:b + 1])).forward(out[b:b + 1], lse[b:b + 1])


@CACHES
def test_lengths_and_pages(changes: dict[str, Any], page_size: int | None, stray: bool) -> None:
    check_cache(replace(CACHED, **changes), LENGTHS, page_size=page_size, stray=stray)


TWO = {"row_tiles": 2, "row_warps": 1, "keep_q": True}
TURNED = {"columns": True, "keys": 16}


@pytest.mark.parametrize(("changes", "page_size", "tiling"), [
    ({"seqlen_q": 8, "head_dim": 128}, 16, TWO), ({"seqlen_q": 5, "head_dim": 128}, None, {**TWO, "cluster": 4, "early": True}),
    ({"seqlen_q": 7, "head_dim": 80, "window": (200, None), "softcap": 5.0, "alibi": "batch", "sinks": True}, 33, {**TWO, "warps": 8}),
    ({"seqlen_q": 13}, 7, {**TWO, "row_warps": 2}), ({"seqlen_q": 13, "dtype": "float16"}, 48, {**TWO, "row_warps": 2, "stages": 2}),
    ({"seqlen_q": 1, "sinks": True}, 64, {"warps": 1, "blocks_per_sm": 8}),
    ({"seqlen_q": 5}, 64, {"stages": 3}), ({"seqlen_q": 5, "head_dim": 80}, 33, {"stages": 2, "warps": 2}),
    ({"seqlen_q": 9, "head_dim": 128}, None, {"stages": 2, "warps": 8}),
    ({"seqlen_q": 5, "dtype": "float32"}, 7, {"stages": 2, "cluster": 2}),
    ({}, 16, TURNED), ({"seqlen_q": 1, "head_dim": 128}, None, {**TURNED, "keys": 32, "warps": 8, "early": True}),
    ({"head_dim": 256}, 33, {**TURNED, "keep_q": True}),
    ({"seqlen_q": 4, "head_dim": 128, "dtype": "float16"}, 7, {**TURNED, "cluster": 4}),
    ({"head_dim": 48}, 16, {**TURNED, "keys": 64, "keep_q": True}),
    ({"seqlen_q": 5, "head_dim": 64}, 64, {**TURNED, "keys": 64, "row_warps": 1}),
    ({}, 704, {"one_page": True}), ({"head_dim": 128}, 704, {**TURNED, "one_page": True, "keep_q": True}),
    ({}, 704, {**TURNED, "cluster": 2, "warps": 3, "blocks_per_sm": 5, "overhead": 1, "early": True, "one_page": True}),
    ({"head_dim": 80, "window": (200, None), "softcap": 5.0, "alibi": "batch", "sinks": True}, 33, {**TURNED, "keys": 32}),
    ({}, 16, {"cluster": 4}), ({"seqlen_q": 3, "head_dim": 48}, 40, {"cluster": 16, "warps": 2, "overhead": 1})], ids=str)
def test_rings_and_clusters(changes: dict[str, Any], page_size: int | None, tiling: dict[str, Any]) -> None:
    check_cache(replace(CACHED, **changes), LENGTHS, page_size=page_size, tiling=tiling)


def test_lengths_that_are_no_lengths() -> None:
    """The host does not see them. The kernel reads no key outside of the cache."""
    for page_size in (None, 50):
        check_cache(CACHED, [-7, 2**31 - 1, 10**6, -2**31], page_size=page_size)


@pytest.mark.slow
def test_one_split_has_the_same_bits_in_any_batch() -> None:
    out, lse = check_cache(CACHED, LENGTHS, page_size=16, num_splits=1)
    for page_size in (None, 33):
        again = check_cache(CACHED, LENGTHS, page_size=page_size, num_splits=1)
        assert (out.view(np.uint16) == again[0].view(np.uint16)).all() and (lse == again[1]).all()
    shorter = check_cache(CACHED, [697, 5, 3, 1], page_size=16, num_splits=1)
    assert (out[::2].view(np.uint16) == shorter[0][::2].view(np.uint16)).all()


@requires_gpu
@pytest.mark.gpu
@CACHES
def test_lengths_and_pages_on_a_device(changes: dict[str, Any], page_size: int | None, stray: bool) -> None:
    case, kept, launcher = replace(CACHED, **changes), list[Any](), on_device(0)

    def placed(x: Any) -> View:
        kept.append(to_device(x))
        return convert.view(kept[-1], "test", "x")
    made = cache_call(case, placed, LENGTHS, page_size=page_size, append=True, stray=stray)
    with current(launcher.device):
        made.launch(launcher)
    judge_requests(case, LENGTHS, to_host(kept[-2]), to_host(kept[-1]), made.k, made.v)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 63, 64, 65, 1000, 4096, 2**20 + 1, 2**31 - 1])
def test_page_division(size: int) -> None:
    magic, shift = page_division(size)
    edges = [0, 1, size - 1, size, size + 1, 7 * size, 7 * size - 1, 2**31 - 1, 2**31 - 2]
    rows = np.array([*edges, *range(0, 2**31, 2**31 // 997)], np.uint64)
    rows = rows[rows < 2**31]
    assert magic < 2**32 and (rows * np.uint64(magic) >> np.uint64(shift) == rows // np.uint64(size)).all()


def test_what_has_no_kernel_for_caches() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"seqlen_k": 0}, "room for 0 keys"),
        ({"dtype": "float32", "head_dim": 132}, "over 128"), ({"head_dim": 100}, "16 bytes")]
    for changes, reason in refused:
        call, spec = Want(**{"seqlen_q": 4, "seqlen_k": 100, "num_heads_k": 4, **changes}).call()
        assert reason in str(launch_decode.refuses_cache(call, spec))


@pytest.mark.parametrize(("arch", "dtype", "dim", "rows", "paged"), [
    ("sm_90a", "bfloat16", 128, 4, False), ("sm_90a", "bfloat16", 128, 4, True), ("sm_90a", "bfloat16", 256, 64, True),
    ("sm_90a", "bfloat16", 128, 32, True), ("sm_90a", "float16", 120, 32, True), ("sm_90a", "bfloat16", 64, 32, False),
    ("sm_90a", "bfloat16", 64, 8, True), ("sm_90a", "float32", 128, 8, True), ("sm_80", "float32", 128, 64, True),
    ("sm_80", "float16", 64, 32, True), ("sm_120", "bfloat16", 96, 16, True)], ids=str)
def test_kernels_for_caches_do_not_spill(arch: str, dtype: str, dim: int, rows: int, paged: bool) -> None:
    call, spec = Want(dtype, dim, seqlen_q=rows // 4, seqlen_k=4096, num_heads=32, num_heads_k=8, window=(100, 5), softcap=True,
                      alibi="float32", sinks="float32", lse=True).call()
    spec = replace(spec, lengths=True, paged=paged)
    source, _ = launch_decode.forward_program(spec, launch_decode.chosen(spec, call.problem, KeyCache(), absent_device(arch)))
    assert compiler.complaints(compiler.build(source, arch)[1]) == []


@pytest.mark.parametrize(("arch", "dtype", "source", "dim", "rows"), [
    ("sm_90a", "bfloat16", "float8_e4m3fn", 128, 4), ("sm_90a", "float16", "float8_e4m3fn", 64, 64),
    ("sm_80", "bfloat16", "float8_e4m3fn", 128, 16), ("sm_120", "float16", "float8_e5m2", 256, 32),
    ("sm_90a", "bfloat16", "float8_e4m3fn", 256, 16), ("sm_90a", "bfloat16", "float8_e4m3fn", 128, 32),
    ("sm_90a", "float16", "float8_e5m2", 48, 32)], ids=str)
def test_kernels_for_eight_bit_caches_do_not_spill(arch: str, dtype: str, source: str, dim: int, rows: int) -> None:
    call, spec = Want(dtype, dim, seqlen_q=rows // 4, seqlen_k=4096, num_heads=32, num_heads_k=8, window=(100, 5), softcap=True,
                      alibi="float32", sinks="float32", lse=True).call()
    spec = replace(spec, lengths=True, paged=True, cache_dtype=source, out_dtype=dtype)
    config = launch_decode.chosen(spec, call.problem, KeyCache(), absent_device(arch))
    assert config.native == (arch != "sm_80")
    assert compiler.complaints(compiler.build(launch_decode.forward_program(spec, config)[0], arch)[1]) == []


@pytest.mark.parametrize(("arch", "source"), [("sm_90a", None), ("sm_80", None), ("sm_120", None), ("sm_90a", "float8_e4m3fn")], ids=str)
def test_latent_caches_do_not_spill(arch: str, source: str | None) -> None:
    """head_dim 576 with 512: slices of the values' columns."""
    width = decode_caches.slices_of(576, 512)[0][1]
    call, spec = Want("bfloat16", 576, width, seqlen_q=1, seqlen_k=4096, num_heads=128, num_heads_k=1, lse=True, window=(100, 5),
                      softcap=True).call()
    spec = replace(spec, lengths=True, paged=True, cache_dtype=source, out_dtype=source and "bfloat16")
    config = launch_decode.chosen(spec, call.problem, KeyCache(), absent_device(arch))
    source_of, _ = launch_decode.forward_program(spec, config)
    assert compiler.complaints(compiler.build(source_of, arch)[1]) == [] and source_of.make()[1] <= absent_device(arch).shared_memory
    assert sum(width for _, width in decode_caches.slices_of(576, 500)) == 500


def test_splits_of_unknown_lengths() -> None:
    splits = launch_decode.device_splits
    assert splits(8, 1000, 3, None) == 3 and splits(2048, 65536, 1, None) == 8 and splits(8, 1000, 3, 1) == 1
    assert splits(8, 2**30, 3, None) == MOST_SPLITS == splits(8, 1000, 3, 1000)
    assert splits(workspace.MOST_ARRIVALS + 1, 65536, 1, None) == 1


@pytest.mark.parametrize("changes", [
    {"seqlen_q": 17}, {"seqlen_k": 255}, {"head_dim": 264}, {"head_dim": 124}, {"head_dim_v": 512}, {"dropout": True}, {"packed": True}],
    ids=str)
def test_other_calls_are_not_split(changes: dict[str, object]) -> None:
    usual = {"seqlen_q": 4, "seqlen_k": 1000, "num_heads_k": 4, "head_dim": 128}
    for arch in ("sm_90a", "sm_80"):
        assert sources(*Want(**usual).call(), absent_device(arch))[0].key.startswith("forward_decode")
        call = Want(**{**usual, **changes}).call()
        if dict(gpu.reasons(call[0], absent_device("sm_80"), ("sm80",)))["sm80"] is not None:
            continue
        assert not any(source.key.startswith("forward_decode") for source in sources(*call, absent_device(arch)))


def test_more_rows_than_an_mma() -> None:
    """Up to 64 rows of a key head, where tiles of 64 rows would read K and V again or not fill the device."""
    def taken(**changes: int) -> bool:
        call, spec = Want(**{"seqlen_q": 32, "seqlen_k": 4096, "num_heads": 8, "num_heads_k": 8, "batch": 4, **changes}).call()
        return launch_decode.accepts(call, spec, absent_device("sm_90a"))
    assert taken() and taken(seqlen_q=64) and not taken(seqlen_q=65)
    assert not taken(batch=17)                                      # 136 tiles fill 132 multiprocessors
    assert taken(batch=17, seqlen_q=16)
    assert taken(batch=64, seqlen_q=8, num_heads=32) and taken(batch=64, seqlen_q=16, num_heads=32)
    assert not taken(batch=64, seqlen_q=17, num_heads=32)


def test_tilings() -> None:
    """What the table says: 16 to 64 registers for K of a step, and as many for V."""
    for dtype, dim, dim_v in itertools.product(("bfloat16", "float32"), range(16, 257, 16), (16, 128, 256)):
        if dtype == "float32" and max(dim, dim_v) > 128:
            continue
        for rows in (1, 16, 17, 32, 33, 64):
            call, spec = Want(dtype, dim, dim_v, seqlen_q=rows, seqlen_k=512, num_heads=1, batch=1).call()
            config = choose_decode(spec, call.problem)
            registers = config.keys * max(dim, dim_v) * (4 if dtype == "float32" else 2) / 128
            assert registers <= 64 and (registers > 16 or config.keys == 32), (dtype, dim, dim_v)
            assert config.exact and rows <= config.rows < max(2 * rows, 17) and config.key_warps * config.row_warps == config.warps


def test_rings_fit() -> None:
    """What the table says of shared memory is what kernels take, and two blocks of it fit a multiprocessor."""
    d, rings = absent_device("sm_90a"), 0
    for dtype, dim, rows, source in itertools.product(("bfloat16", "float32"), (64, 128, 256), (1, 17, 64), (None, "float8_e4m3fn")):
        if dtype == "float32" and (dim > 128 or source):
            continue
        call, spec = Want(dtype, dim, seqlen_q=rows, seqlen_k=4096, num_heads=8, num_heads_k=8, batch=16).call()
        spec = replace(spec, lengths=True, paged=True, cache_dtype=source, out_dtype=source and dtype)
        config = launch_decode.chosen(spec, call.problem, KeyCache(), d)
        said, taken = shared_bytes(spec, config), launch_decode.forward_program(spec, config)[0].make()[1]
        assert said - 512 <= taken <= said, (config, said, taken)
        if config.stages:
            rings += 1
            assert rows == 64 and dtype == "bfloat16" and not source and 2 * (said + 1024) <= d.shared_memory + 1024
    assert rings == 2                   # at head_dim 256 three slots a warp do not fit


def test_what_is_chosen_on_hopper() -> None:
    """(warps, cluster): few keys of few key heads are clusters, and others have one block a multiprocessor where that ends no later."""
    def tiling(batch: int, keys: int, heads_k: int = 8, cache: KeyCache | None = None, arch: str = "sm_90a", **more: Any) -> Any:
        sizes = {"seqlen_q": 1, "seqlen_k": keys, "num_heads": 4 * heads_k, "num_heads_k": heads_k, "batch": batch}
        call, spec = Want(**sizes, **more).call()
        config = launch_decode.chosen(spec, call.problem, cache, absent_device(arch))
        assert (config.blocks_per_sm, config.warps) in ((2, 4), (1, 8), (3, 4))
        assert config.early == (config.cluster > 1 or config.blocks_per_sm != 2)
        return config.warps, config.cluster
    for cache in (None, KeyCache()):
        assert [tiling(1, keys, cache=cache) for keys in (256, 1024, 2048, 4096)] == [(4, 8), (4, 8), (4, 8), (8, 1)]
        assert [tiling(n, 1024, cache=cache) for n in (4, 5, 16, 64)] == [(4, 8), (8, 1), (8, 1), (4, 1)]
        assert tiling(1, 8192, cache=cache) == tiling(1, 131072, cache=cache) == tiling(16, 8192, cache=cache) == (8, 1)
    assert tiling(64, 4096) == (4, 1)
    sizes = {"seqlen_q": 1, "seqlen_k": 1500, "num_heads": 20, "num_heads_k": 20, "batch": 16, "head_dim": 64}
    calls = [Want(**{**sizes, **more}).call() for more in (
        {}, {"batch": 17}, {"seqlen_q": 9}, {"batch": 13}, {"batch": 20}, {"head_dim": 80}, {"softcap": True}, {"dtype": "float32"},
        {"seqlen_q": 17})]
    found = [launch_decode.chosen(spec, call.problem, None, absent_device("sm_90a")) for call, spec in calls]
    blocks = [(config.blocks_per_sm, config.warps, config.cluster) for config in found]
    assert blocks[:3] == [(5, 3, 2), (3, 4, 1), (3, 4, 1)] and not {3, 5} & {n for n, *_ in blocks[3:]}     # all of 320 key heads at once
    for splits in (1, 4):
        assert tiling(1, 1024, cache=KeyCache(num_splits=splits)) == (4, 1)
    assert tiling(2, 16384, cache=KeyCache()) == (4, 1)             # planned
    for more, tiles in (({}, (2, 1)), ({"softcap": True, "alibi": "float32", "window": (100, 5)}, (2, 1)), ({"bias": "float32"}, (1, 2)),
                        ({"mask": True}, (1, 2)), ({"head_dim": 256}, (1, 2)), ({"dtype": "float32"}, (1, 2)), ({"seqlen_q": 4}, (1, 1)),
                        ({"seqlen_q": 9}, (1, 4))):
        call, spec = Want(**{"seqlen_q": 8, "seqlen_k": 8192, "num_heads": 32, "num_heads_k": 8, "batch": 16, **more}).call()
        config = launch_decode.chosen(spec, call.problem, None, absent_device("sm_90a"))
        assert (config.row_tiles, config.row_warps) == tiles and config.early == (config.warps == 8) == (tiles[1] == 1), more
        assert launch_decode.chosen(spec, call.problem, None, absent_device("sm_80")).row_tiles == 1
    assert tiling(1, 8192, dtype="float32", head_dim=64) == tiling(1, 1024, arch="sm_80") == tiling(1, 1024, arch="sm_120") == (4, 1)


def test_queries_are_columns() -> None:
    """(keys of a step, 0 if they are rows) of 8 query rows of a key head at most, on Hopper, with no more than what was measured."""
    def keys(arch: str = "sm_90a", cache: KeyCache | None = None, **changes: Any) -> int:
        sizes: dict[str, Any] = {"seqlen_q": 1, "seqlen_k": 8192, "num_heads": 32, "num_heads_k": 8, "batch": 16, "head_dim": 128}
        call, spec = Want(**{**sizes, **changes}).call()
        config = launch_decode.chosen(spec, call.problem, cache, absent_device(arch))
        assert not config.columns or config.rows == 8
        return config.keys if config.columns else 0
    planned: dict[str, Any] = {"cache": KeyCache(), "seqlen_k": 16384}
    assert keys() == keys(seqlen_q=2) == keys(head_dim=256) == keys(softcap=True, alibi="float32", window=(100, 5)) == 16
    assert keys(head_dim=64) == keys(**planned) == keys(**planned, head_dim=64) == 32 and keys(**planned, softcap=True) == 16
    assert keys(**planned, head_dim=256) == keys(batch=1, seqlen_k=1024) == 16
    others: tuple[dict[str, Any], ...] = (
        {"seqlen_q": 3}, {"arch": "sm_80"}, {"dtype": "float32"}, {"mask": True}, {"bias": "float32"}, {"head_dim": 256, "softcap": True},
        {"batch": 64, "seqlen_k": 1024}, {"batch": 64, "seqlen_k": 1024, "head_dim": 256}, {"cache": KeyCache(num_splits=4)})
    assert not any(keys(**changes) for changes in others)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 1000, 8192, 131072, 2**31 - 1])
def test_splits_cover_the_keys(keys: int) -> None:
    for tiling in (DecodeConfig(keys=8), DecodeConfig(keys=16, row_warps=4), DecodeConfig(keys=32)):
        step = tiling.keys * tiling.key_warps
        for planes in (1, 8, 100, 132, 133, 1000, 100_000):
            count, each = launch_decode.split_keys(planes, keys, tiling, 132)
            assert 1 <= count <= MOST_SPLITS and each % step == 0
            assert (count - 1) * each < keys <= count * each


def test_splits_fill_the_device() -> None:
    for tiling in (DecodeConfig(keys=16), DecodeConfig(keys=32)):
        slots = 132 * tiling.blocks_per_sm
        for planes in (1, 2, 8, 32, 100, 132):
            blocks = planes * launch_decode.split_keys(planes, 65536, tiling, 132)[0]
            assert blocks / (-(-blocks // slots) * slots) > (0.45 if planes == 1 else 0.9), planes      # of the last wave, too
        assert launch_decode.split_keys(5000, 300, tiling, 132)[0] == 1      # enough without


def test_counter_slots_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that each launch finds zero and leaves zero. Half of the slots are for
    graphs, and a slot is reused only after all others."""
    monkeypatch.setattr(workspace, "private_stream", lambda: 7)
    cleared = []
    monkeypatch.setattr(workspace, "driver", SimpleNamespace(
        cuMemAlloc=lambda size: (0, 4096), cuMemsetD8Async=lambda *where: (cleared.append(where) or 0,),
        cuStreamSynchronize=lambda stream: (0,)))
    zeros = workspace._Zeros(64, 8)
    assert cleared == [(4096, 0, 512, 7)]
    assert [zeros.take(False) for _ in range(5)] == [4096, 4160, 4224, 4288, 4096]
    assert [zeros.take(True) for _ in range(5)] == [4352, 4416, 4480, 4544, 4352]


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE[::7], ids=lambda case: case.name)
def test_same_bits_from_run_to_run(case: Case) -> None:
    args, kwargs = device_arguments(case.make())
    first = None
    for _ in range(20):
        out, lse = (to_host(x) for x in fastattn.attention(*args, **kwargs, return_lse=True))
        bits = out.view(np.uint16).tobytes() + lse.tobytes()
        first = first or bits
        assert bits == first


@requires_gpu
@pytest.mark.gpu
def test_streams_at_once_and_graphs() -> None:
    """Launches count their blocks in slots that later launches reuse; launches
    that run at the same time have different slots."""
    torch = pytest.importorskip("torch")

    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    q = torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 5000, 2, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    wanted, wanted_lse = fastattn.attention(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for n in range(400):
        with torch.cuda.stream(streams[n % 4]):
            results.append(fastattn.attention(q, k, v, return_lse=True))
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            results += [fastattn.attention(q, k, v, return_lse=True) for _ in range(3)]
    for n in range(40):
        with torch.cuda.stream(streams[n % 2]):
            graphs[n % 2].replay()
    torch.cuda.synchronize()
    for out, lse in results:
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
