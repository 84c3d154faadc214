"""attention_with_kvcache on the GPU: kernels run from their PTX, the caches' bits and results judged as those of the CPU engine are."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.arrays import convert
from fastattn.arrays.view import numpy_dtype
from fastattn.gpu.precompile import HERE, absent_device
from fastattn.gpu.rows.append_launch import append_source
from fastattn.gpu.runtime import compile as compiler
from tests.tools.caches import Call, Case
from tests.tools.devices import requires_gpu
from tests.tools.gpu.caches_8bit import EIGHT, PROMPTS, Eight, judge_eight
from tests.tools.gpu.calls import interpreted_serving, serving_call
from tests.tools.gpu.cases import on_device as to_device
from tests.tools.gpu.cases import to_host

Array = np.ndarray[Any, Any]
READ = [Case("decode", append=False, dtype="bfloat16", head_dim=64, rows=3, keys=(300, 0, 41), shared=1),
        Case("float32, contiguous", append=False, page_size=None),
        Case("rows of the cache", append=False, dtype="float16", page_size=None, batch_idx=True, rows=2, head_dim=128, keys=(700, 33)),
        Case("features", append=False, dtype="bfloat16", page_size=5, alibi="batch", sinks=True, layout="bhsd", rows=9, num_heads=8,
             options={"window": (60, None), "softcap": 9.0, "num_splits": 1})]
APPENDED = [
    Case("step", dtype="bfloat16"), Case("step float16, contiguous", dtype="float16", page_size=None, rows=2),
    Case("step float32", page_size=7, rows=3), Case("rows of the cache, appended", page_size=None, batch_idx=True, rows=4, dtype="float16"),
    Case("rotary halves", dtype="bfloat16", rotary=(32, False), rows=5), Case("rotary pairs", dtype="float16", rotary=(32, True), rows=2),
    Case("rotary of half the columns", dtype="bfloat16", rotary=(16, False), rotary_dtype="bfloat16", rows=3),
    Case("rotary of odd columns", dtype="float16", rotary=(6, False), rows=2), Case("rotary of one pair", rotary=(2, True)),
    Case("rotary float32", rotary=(32, False), rows=9), Case("rotary float32 pairs", rotary=(16, True), rows=2),
    Case("values of another size", dtype="bfloat16", head_dim=32, head_dim_v=64, rows=2, rotary=(8, False)),
    Case("prefill", dtype="bfloat16", rows=45, num_heads=8, rotary=(32, False)), Case("bhsd", dtype="float16", layout="bhsd", rows=5),
    Case("shared prefix", dtype="bfloat16", shared=2, keys=(33, 40, 64), rows=2),
    Case("more queries than keys", append=False, dtype="bfloat16", keys=(1, 0, 9), rows=12)]
PACKED = [
    Case("packed", dtype="bfloat16", rows=(5, 1, 30), spare=3), Case("packed, no row", dtype="float16", rows=(1, 0, 90), page_size=8),
    Case("packed, read", append=False, dtype="bfloat16", rows=(5, 1, 30), keys=(9, 0, 50)),
    Case("packed float32", rows=(2, 7, 1), page_size=None, rotary=(32, False)),
    Case("packed rotary", dtype="bfloat16", rows=(20, 1, 3), rotary=(16, True), num_heads=6, num_heads_k=2, spare=40),
    Case("packed features", dtype="bfloat16", rows=(4, 2, 18), alibi="batch", sinks=True, spare=5, num_heads=6, num_heads_k=2,
         options={"window": (40, 3), "causal": False, "softcap": 5.0})]


def judged(case: Case, arch: str = "sm_90a", **more: Any) -> Any:
    """Results against float64, caches bit for bit."""
    made = case.make()
    expected = made.caches_after()
    found = interpreted_serving(made, arch, **more)
    for name, got, right in (("k_cache", found.k_cache, expected[0]), ("v_cache", found.v_cache, expected[1])):
        assert got.tobytes() == right.tobytes(), f"{name}'s bits"
    made.judge(found.out, found.lse)
    return found


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_caches_are_read(case: Case) -> None:
    assert judged(case).kernels == ["forward_decode"]


@pytest.mark.parametrize("case", APPENDED, ids=lambda case: case.name)
def test_keys_and_values_are_appended(case: Case) -> None:
    found = judged(case, num_splits=2 if case.rows == 2 else None)
    assert found.kernels == ["append"] * case.append + ["forward_decode"]


def test_no_query_row() -> None:
    """Of arrays whose strides are 0, as those of an empty array may be."""
    case = Case("no query row", dtype="bfloat16", rows=0)
    assert not any(case.make().arrays[0].strides)
    judged(case)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_queries_are_packed(case: Case) -> None:
    judged(case)


# ---------------------------------------------------------------- lengths and tables that are none
def test_nothing_is_written_outside() -> None:
    """Lengths and table entries of any value: all that lies outside the cache stays as it is, and what is inside is defined."""
    made = Case("stray", dtype="bfloat16", keys=(20, 33, 7, 60), rows=3, rotary=(32, False)).make()
    wrong = np.array([-(2**31), 2**31 - 1, 78, -3], np.int32)
    table = made.options["block_table"].copy()
    table[3] = [2**31 - 1, -1, 10**6, -(2**31), *table[3, 4:]][:table.shape[1]]
    found = interpreted_serving(made, cache_seqlens=wrong, block_table=table)
    room, size = table.shape[1] * 16, 16
    k_cache, v_cache = made.arrays[1].copy(), made.arrays[2].copy()
    for b, given in enumerate(wrong):
        before = min(max(int(given), 0), room)
        for i in range(3):
            at = before + i
            page = int(table[b, at // size]) if at < room else -1
            if 0 <= page < len(k_cache):
                case = replace(made.case, keys=tuple(min(max(int(x), 0), room) for x in wrong))
                position = min(before + i, len(made.options["rotary_cos"]) - 1)
                one = Call(replace(case, keys=(position,) * 4), made.arrays, made.options, made.table)
                k_cache[page, at % size] = one.turned(made.arrays[3][b][i:i + 1], b)[0]
                v_cache[page, at % size] = made.arrays[4][b][i]
    assert found.k_cache.tobytes() == k_cache.tobytes() and found.v_cache.tobytes() == v_cache.tobytes()


@pytest.mark.parametrize("cu", [[0, 90, 2**31 - 1, 4], [-5, 3, 2, 1], [7, 7, 7, 7], [0, -(2**31), 30, 10**6]], ids=str)
def test_packed_lengths_that_are_none(cu: list[int]) -> None:
    made = Case("packed, stray", dtype="bfloat16", rows=(5, 1, 30), page_size=16).make()
    interpreted_serving(made, cu_seqlens_q=np.array(cu, np.int32))      # which finds accesses outside the arrays


# ---------------------------------------------------------------- bits
@pytest.mark.parametrize("case", [Case("bits", dtype="bfloat16", keys=(300, 3, 40), rows=(1, 60, 9), num_heads=8),
                                  Case("bits window", dtype="float16", keys=(300, 3, 40), rows=(8, 30, 25), options={"window": (60, 0)})],
                         ids=lambda case: case.name)
@pytest.mark.slow
def test_one_split_has_the_same_bits_in_any_batch(case: Case) -> None:
    """Alone or in a batch, packed or not, with any width of the table, in pages or not."""
    made = case.make()
    together = interpreted_serving(made, num_splits=1).out
    for b, n in enumerate(case.lengths):
        mine = [made.rows_of(x, b) for x in (made.arrays[0], *made.arrays[3:])]
        options = {name: x for name, x in made.options.items() if name == "window"}
        options |= {"cache_seqlens": made.options["cache_seqlens"][b:b + 1]}
        wide = np.concatenate([made.options["block_table"][b:b + 1], np.full((1, 5), -9, np.int32)], axis=1)
        alone = Call(replace(case, keys=case.keys[b:b + 1], rows=n), [mine[0][None], *made.arrays[1:3], mine[1][None], mine[2][None]],
                     options | {"block_table": wide}, made.table[b:b + 1])
        out = interpreted_serving(alone, num_splits=1).out[0]
        assert out.tobytes() == np.ascontiguousarray(made.rows_of(together, b)).tobytes()


# ---------------------------------------------------------------- 8 bits
@pytest.mark.parametrize("given", EIGHT, ids=str)
def test_eight_bit_caches(given: Eight) -> None:
    judge_eight(given, *interpreted_serving(given.make(), given.arch)[:4])


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("given", [*(given for given in EIGHT if given.arch == "sm_90a"), *PROMPTS], ids=str)
def test_eight_bit_caches_on_a_device(given: Eight) -> None:
    made = given.make()
    arrays = [None if x is None else to_device(x) for x in made.arrays]
    options = {name: to_device(x) if isinstance(x, np.ndarray) else x for name, x in made.options.items()}
    out, lse = fastattn.attention_with_kvcache(*arrays, **options, return_lse=True)
    caches = [np.asarray(x.view(torch_uint8()).cpu().numpy()).view(numpy_dtype(given.cache)) for x in arrays[1:3]]
    most_out, most_lse = PROMPTS.get(given, (None, 1e-6))
    judge_eight(given, to_host(out), to_host(lse), *caches, most_lse=most_lse, most_out=most_out)


def torch_uint8() -> Any:
    return pytest.importorskip("torch").uint8


# ---------------------------------------------------------------- latent caches
class Latent(NamedTuple):
    """One cache of 576 columns, whose first 512 are the values."""

    arrays: list[Any]
    options: dict[str, Any]
    exact: Array
    cache: Array


def latent(rows: int = 2, dtype: str = "bfloat16") -> Latent:
    draw = np.random.default_rng(0)
    kind = numpy_dtype(dtype)
    cache = draw.standard_normal((9, 16, 1, 576), np.float32).astype(kind)
    q, new = (draw.standard_normal((2, rows, n, 576), np.float32).astype(kind) for n in (20, 1))
    options = {"cache_seqlens": np.array([40, 7], np.int32), "block_table": draw.permutation(9)[:6].reshape(2, 3).astype(np.int32)}
    after = cache.copy()
    exact = fastattn.attention_with_kvcache(*(x.astype(np.float64) for x in (q, after, after[..., :512], new, new[..., :512])), **options)
    fastattn.attention_with_kvcache(q, after, after[..., :512], new, new[..., :512], **options)
    return Latent([q, cache, cache[..., :512], new, new[..., :512]], options, exact, after)


def near(out: Array, exact: Array) -> bool:
    return bool(np.linalg.norm(out.astype(np.float64) - exact) < 2.0**-8 * np.linalg.norm(exact))


def test_latent_cache() -> None:
    from tests.tools.gpu import interpreter

    made, memory = latent(), interpreter.Memory()
    placed = dict[int, Any]()

    def place(x: Any) -> Any:
        view = convert.view(x, "test", "x")
        if x.shape == made.arrays[2].shape:         # the values: in the keys' memory
            return replace(placed[view.ptr], shape=view.shape)
        placed[view.ptr] = memory.place(x, view)
        return placed[view.ptr]
    case = Case("latent", dtype="bfloat16", keys=(40, 7), rows=2, num_heads=20, num_heads_k=1, head_dim=576, head_dim_v=512)
    call = serving_call(Call(case, made.arrays, made.options, made.options["block_table"]), place)
    launcher = interpreter.Launcher(memory)
    gpu._launch(call, launcher, ("sm80",), 0)
    assert [key.split()[0] for key in launcher.launched] == ["append"] * 2 + ["forward_decode"] * 4
    assert memory.read(call.operands.k, made.cache.dtype).tobytes() == made.cache.tobytes()
    assert near(memory.read(call.out, made.cache.dtype), made.exact)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_latent_cache_on_a_device(rows: int) -> None:
    made = latent(rows)
    q, cache, _, new, _ = (to_device(x) for x in made.arrays)
    options = {name: to_device(x) for name, x in made.options.items()}
    out = fastattn.attention_with_kvcache(q, cache, cache[..., :512], new, new[..., :512], **options)
    assert to_host(cache).tobytes() == made.cache.tobytes() and near(to_host(out), made.exact)


# ---------------------------------------------------------------- what no kernel takes
@pytest.mark.parametrize(("changes", "reason"), [
    ({"dtype": "float64"}, "no kernel appends float64"), ({"dtype": "float64", "append": False}, "no products of float64"),
    ({"head_dim": 100}, "16 bytes"), ({"head_dim": 132, "dtype": "float32"}, "head_dim is 132")], ids=str)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    made = replace(READ[0], **{"append": True, **changes}).make()
    call = serving_call(made, lambda x: replace(convert.view(x, "test", "x"), device=HERE))
    with pytest.raises(fastattn.UnsupportedError, match=reason):
        gpu.choose(call, absent_device("sm_90a"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_compiled(arch: str) -> None:
    for arguments in (("bfloat16", "bfloat16", True, (False, "float32", True), True, True),
                      ("float16", "float8_e4m3fn", True, (True, "float16", False), False, True),
                      ("bfloat16", "float8_e5m2", False, (False, "bfloat16", False), True, False),
                      ("float32", "float32", True, None, False, False), ("float8_e4m3fn", "float8_e4m3fn", True, None, True, True)):
        assert compiler.complaints(compiler.build(append_source(*arguments), arch)[1]) == []


# ---------------------------------------------------------------- with a GPU
@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", READ + APPENDED + PACKED, ids=lambda case: case.name)
def test_on_a_device(case: Case) -> None:
    made = case.make()
    expected = made.caches_after()
    arrays = [None if x is None else to_device(x) for x in made.arrays]
    options = {name: to_device(x) if isinstance(x, np.ndarray) else x for name, x in made.options.items()}
    out, lse = fastattn.attention_with_kvcache(*arrays, **options, return_lse=True)
    for got, right in zip(arrays[1:3], expected, strict=True):
        assert to_host(got).tobytes() == right.tobytes()
    made.judge(to_host(out), to_host(lse))


@requires_gpu
@pytest.mark.gpu
def test_the_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTATTN_CHECK=1 finds the request whose length or table entry is wrong, before anything is written."""
    made = Case("checked", dtype="bfloat16", rows=2).make()
    for name, b, x, text in (("cache_seqlens", 1, 10**6, "cache_seqlens has 1000000 for request 1"),
                             ("block_table", 2, 10**6, "block_table has 1000000 for request 2, entry 0")):
        arrays = [None if x is None else to_device(x) for x in made.arrays]
        wrong = made.options[name].copy()
        wrong[b] = x
        options = {key: to_device(x) for key, x in {**made.options, name: wrong}.items()}
        monkeypatch.setenv("FASTATTN_CHECK", "1")
        with pytest.raises(ValueError, match=text):
            fastattn.attention_with_kvcache(*arrays, **options)
        assert to_host(arrays[1]).tobytes() == made.arrays[1].tobytes()
        monkeypatch.delenv("FASTATTN_CHECK")
        fastattn.attention_with_kvcache(*arrays, **options)
