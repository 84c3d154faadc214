"""MLA's decode on Hopper: which calls its kernel takes, how kernels compile, that splits are merged; on a device its results.
What its roles do is in test_roles_latent.py."""
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
from fastattn.arrays.view import View
from fastattn.gpu.decode import launch as decode
from fastattn.gpu.precompile import Want, absent_device, sources
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import launch_latent
from fastattn.gpu.sm90.config_latent import LatentConfig, refuses_latent
from fastattn.gpu.spec import Call, Spec, make_spec
from tests.tools.devices import requires_gpu
from tests.tools.gpu import interpreter
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.gpu.roles_pages import requests

Array = np.ndarray[Any, Any]


def asked(lengths: tuple[int, ...] = (300, 20, 0), rows: int | list[int] = 2, page: int | None = 64, heads: int = 40, **more: Any) -> Call:
    return requests(list(lengths), rows, page, 576, heads=heads, head_dim_v=512, **more).call


def launched(call: Call, arch: str = "sm_90a") -> list[str]:
    with gpu.use("sm90", "sm80"):
        return [source.key.split()[0] for source in sources(call, make_spec(call.problem, call.operands, False), absent_device(arch))]


# ---------------------------------------------------------------- which calls
@pytest.mark.parametrize("call", [asked(), asked(rows=[3, 0, 1], spare=2), asked(page=None), asked(page=16), asked(page=48), asked(rows=16),
                                  asked(page=None, batch_idx=True), asked(heads=6, heads_k=2), asked(softcap=30.0), asked(causal=False),
                                  asked(cache_dtype="float8_e4m3fn"), asked(page=None, cache_dtype="float8_e5m2")],
                         ids=lambda call: f"{call.operands.k.dtype} {call.operands.k.shape}")
def test_what_is_taken(call: Call) -> None:
    assert launched(call)[0] == "latent_sm90"
    assert launched(call, "sm_120")[0] == "forward_decode"


def apart(call: Call) -> Call:
    return replace(call, operands=replace(call.operands, v=replace(call.operands.v, ptr=call.operands.v.ptr + 2 * 64)))


@pytest.mark.parametrize(("call", "reason"), [
    (apart(asked()), "the values are not the first columns of the keys"), (asked(window=(50, 0)), "it has no limit to the left"),
    (asked(page=32, cache_dtype="float8_e4m3fn"), "pages have 32 keys, which are boxes of 32 rows"),
    (asked(page=24), "pages have 24 keys, which are boxes of 8 rows"),
    (requests([70], 1, 64, 576, head_dim_v=448).call, "head_dim is 576 and head_dim_v 448, not 576 and 512")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_left_to_decode(call: Call, reason: str) -> None:
    assert reason in str(refuses_latent(call, make_spec(call.problem, call.operands, False)))
    assert launched(call)[0] == "forward_decode"


def test_the_choice_does_not_depend_on_the_batch() -> None:
    """With num_splits=1 a request has the same bits in any batch, with any width of its table: 16 divides the pages, or not."""
    for page, kernel in ((16, "latent_sm90"), (24, "forward_decode")):
        for lengths in ((5,), (500, 1000), (3,) * 40):
            assert launched(asked(lengths, 1, page))[0] == kernel


def test_splits_fill_the_device() -> None:
    """64 requests of 128 heads are 128 blocks; of fewer ones the keys are split."""
    for batch, splits in ((64, 1), (16, 4), (4, 16)):
        planes = 2 * batch
        assert decode.split_keys(planes, 8192, LatentConfig(), 132)[0] == splits


def test_arrays() -> None:
    """`attention` of few queries, where v is a view of k's first columns."""
    for rows, moved, kernel in ((1, 0, "latent_sm90"), (16, 0, "latent_sm90"), (17, 0, "forward_sm90"), (1, 128, "forward_sm90")):
        call, spec = Want("bfloat16", 576, 512, seqlen_q=rows, seqlen_k=4096, num_heads=128, num_heads_k=1, causal=True).call()
        o = call.operands
        v = replace(o.v, strides=o.k.strides, ptr=o.k.ptr + moved)
        call = replace(call, operands=replace(o, v=v))
        assert next(iter(sources(call, spec, absent_device("sm_90a")))).key.split()[0] == kernel


# ---------------------------------------------------------------- kernels
@pytest.mark.parametrize(("more", "config"), [
    ({"paged": True, "packed": True, "sinks": "float32"}, LatentConfig(box=16)),
    ({"right": True, "paged": True, "cache_dtype": "float8_e4m3fn", "out_dtype": "bfloat16"}, LatentConfig(whole=True))],
    ids=("packed", "8 bits"))
def test_kernels_do_not_spill(more: dict[str, Any], config: LatentConfig) -> None:
    spec = Spec("float16" if "packed" in more else "bfloat16", 576, 512, lengths=True, **more)
    for source, _ in (launch_latent.latent_program(spec, config), launch_latent.merge_program(spec, config.block_n, config.overhead)):
        assert compiler.complaints(compiler.build(source, "sm_90a")[1]) == []


def test_splits_are_merged() -> None:
    """Rows of 512 columns, of requests with several splits, one and none."""
    draw, memory, splits, rows = np.random.default_rng(0), interpreter.Memory(), 3, 64
    call = asked(page=None, dtype="float16")
    planes, spec = decode.units_of(call.problem, rows), replace(make_spec(call.problem, call.operands, True), lengths=True)
    parts = draw.standard_normal((splits, planes * rows, 512)).astype(np.float32)
    tops, totals = draw.uniform(-90, 90, (splits, planes * rows)).astype(np.float32), draw.uniform(1, 9, parts.shape[:2]).astype(np.float32)
    tops[1, ::5], totals[1, ::5], parts[1, ::5] = -np.inf, 0, 0         # rows whose keys of this split are all masked
    arrays = [parts, np.stack([tops, totals], axis=-1), np.zeros((3, 2, 40, 512), np.float16), np.zeros((3, 40, 2), np.float32),
              np.array([300, 20, 0], np.int32)]

    def place(x: Array) -> View:
        return memory.place(x, convert.view(x, "test", "x"))
    at_parts, at_rows, out, lse, used = map(place, arrays)
    call = replace(call, out=out, lse=lse, operands=replace(call.operands, seqused_k=used))
    source, arguments = launch_latent.merge_program(spec, 64, 1)
    own = 0, at_parts.ptr, at_rows.ptr, planes * rows, splits, 1, 8, *decode.lengths_of(call, False, rows)
    interpreter.Launcher(memory).load(source).launch(planes * 8, arguments.bound(call)(call, own), 0)
    scale, top = call.problem.score.softmax_scale, tops.max(axis=0)
    weights = np.exp((tops - top).astype(float) * scale)
    total = (weights * totals).sum(axis=0)
    wanted = ((weights[:, :, None] * parts).sum(axis=0) / total[:, None]).reshape(3, 128, 512)[0, :80].reshape(2, 40, 512)
    found, found_lse = memory.read(out, np.float16), memory.read(lse, np.float32)
    np.testing.assert_allclose(found[0].astype(float), wanted, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found_lse[0], (top * scale + np.log(total)).reshape(3, 128)[0, :80].reshape(2, 40).T, rtol=1e-5)
    assert not found[1:].any() and not found_lse[1:].any()      # of one split: the kernel before has stored them


# ---------------------------------------------------------------- with a GPU
class Latent:
    """A call over one cache of 576 columns, in host memory; behind the keys it has NaN."""

    def __init__(self, lengths: list[int], rows: int | list[int], page: int | None, heads: int, dtype: str = "bfloat16") -> None:
        import ml_dtypes

        draw, kind = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, dtype, dtype))
        size, batch = page or max(lengths), len(lengths)
        each = -(-max(lengths) // size)
        self.table = draw.permutation(batch * each).reshape(batch, each).astype(np.int32)
        self.cache = draw.standard_normal((batch * each, size, 1, 576), np.float32)
        for b, n in enumerate(lengths):
            for entry in range(each):
                self.cache[self.table[b, entry], min(max(n - entry * size, 0), size):] = np.nan
        self.cache = self.cache.astype(kind)
        lead = (sum(rows) + 3,) if isinstance(rows, list) else (batch, rows)
        self.q = draw.standard_normal((*lead, heads, 576), np.float32).astype(kind)
        self.options: dict[str, Any] = {"cache_seqlens": np.array(lengths, np.int32)}
        self.options |= {"block_table": self.table} if page else {"cache_batch_idx": self.table[:, 0].copy()}
        if isinstance(rows, list):
            self.options |= {"cu_seqlens_q": np.cumsum([0, *rows]).astype(np.int32), "max_seqlen_q": max(rows)}

    def run(self, place: Any = lambda x: x, **more: Any) -> Any:
        q, cache = place(self.q), place(self.cache)
        options = {name: place(x) if isinstance(x, np.ndarray) else x for name, x in self.options.items()}
        return fastattn.attention_with_kvcache(q, cache, cache[..., :512], return_lse=True, **options, **more)

    def exact(self, **more: Any) -> tuple[Array, Array]:
        wide = np.nan_to_num(self.cache.astype(np.float64))
        options = self.options | more
        out, lse = fastattn.attention_with_kvcache(self.q.astype(np.float64), wide, wide[..., :512], return_lse=True, **options)
        return out, lse


DEVICE = {"one split": (Latent, ([200, 64, 1, 2100], 1, 64, 128), {"num_splits": 1}), "splits": (Latent, ([3000, 37, 0], 1, 64, 128), {}),
          "pages of 16": (Latent, ([1000, 333], 1, 16, 128), {}), "pages of 256": (Latent, ([700, 333], 4, 256, 40), {}),
          "rows of the cache": (Latent, ([600, 333], 2, None, 16), {}), "packed": (Latent, ([900, 33, 0, 129], [3, 1, 0, 7], 64, 20), {}),
          "softcap, float16": (Latent, ([300, 70], 3, 32, 20, "float16"), {"softcap": 5.0}),
          "full": (Latent, ([300, 70], 3, 64, 20), {"causal": False}),
          "more rows than keys": (Latent, ([5, 70], 9, 64, 128), {})}


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE)
def test_on_a_device(name: str) -> None:
    make, arguments, more = DEVICE[name]
    made = make(*arguments)
    (out, lse), (exact, exact_lse) = made.run(on_device, **more), made.exact(**more)
    found, found_lse = to_host(out).astype(np.float64), to_host(lse)
    assert np.linalg.norm(found - exact) < 2.0**-7 * np.linalg.norm(exact)
    np.testing.assert_allclose(found_lse, exact_lse, rtol=1e-5, atol=1e-4)


@requires_gpu
@pytest.mark.gpu
def test_arrays_on_a_device() -> None:
    draw = np.random.default_rng(0)
    q, k = draw.standard_normal((3, 2, 40, 576), np.float32).astype(np.float16), draw.standard_normal((3, 333, 1, 576)).astype(np.float16)
    placed = on_device(k)
    out, lse = fastattn.attention(on_device(q), placed, placed[..., :512], causal=True, return_lse=True)
    exact, exact_lse = fastattn.attention(*(x.astype(np.float64) for x in (q, k, k[..., :512])), causal=True, return_lse=True)
    assert np.linalg.norm(to_host(out).astype(np.float64) - exact) < 2.0**-9 * np.linalg.norm(exact)
    np.testing.assert_allclose(to_host(lse), exact_lse, rtol=1e-5, atol=1e-4)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "rows", "page", "kind"), [
    ([300, 20, 0], 2, 64, "float8_e4m3fn"), ([3000, 130], 1, 128, "float8_e4m3fn"), ([150, 60], 3, None, "float8_e5m2")],
    ids=("pages", "plan", "rows"))
def test_8bit_caches_on_a_device(lengths: list[int], rows: int, page: int | None, kind: str) -> None:
    """Of 16-bit q, with scales, against the same numbers in float64."""
    torch = pytest.importorskip("torch")
    made = Latent(lengths, rows, page, 40)
    eight = torch.from_numpy(np.nan_to_num(made.cache.astype(np.float32))).to(getattr(torch, kind)).cuda()
    scales = {"k_scale": 0.75, "v_scale": on_device(np.array([1.5], np.float32))}
    options = {name: on_device(x) for name, x in made.options.items()}
    out, lse = fastattn.attention_with_kvcache(on_device(made.q), eight, eight[..., :512], return_lse=True, **options, **scales)
    wide = eight.float().cpu().numpy().astype(np.float64)
    exact, exact_lse = fastattn.attention_with_kvcache(made.q.astype(np.float64), wide * 0.75, (wide * 1.5)[..., :512], return_lse=True,
                                                       **made.options)
    assert np.linalg.norm(to_host(out).astype(np.float64) - exact) < 2.0**-7 * np.linalg.norm(exact)
    np.testing.assert_allclose(to_host(lse), exact_lse, rtol=1e-5, atol=1e-4)


@requires_gpu
@pytest.mark.gpu
def test_bits_on_a_device() -> None:
    """With num_splits=1 alone or in a batch, and a repeated call whose values move away from the keys."""
    made = Latent([700, 33, 2000], 1, 64, 128)
    together = to_host(made.run(on_device, num_splits=1)[0])
    for b in range(3):
        made_alone = Latent([700, 33, 2000], 1, 64, 128)
        made_alone.q = made_alone.q[b:b + 1]
        made_alone.options = {name: x[b:b + 1] for name, x in made_alone.options.items()}
        assert to_host(made_alone.run(on_device, num_splits=1)[0])[0].tobytes() == together[b].tobytes()
    whole = np.nan_to_num(made.cache.astype(np.float32)).astype(made.cache.dtype)
    q, cache, other = (on_device(x) for x in (made.q, whole, whole[::-1].copy()))
    options = {name: on_device(x) for name, x in made.options.items()}
    for values in (cache, cache, cache, other, cache):
        out = fastattn.attention_with_kvcache(q, cache, values[..., :512], **options)
        wide, of_values = (to_host(x).astype(np.float64) for x in (cache, values))
        exact = fastattn.attention_with_kvcache(made.q.astype(np.float64), wide, of_values[..., :512], **made.options)
        assert np.linalg.norm(to_host(out).astype(np.float64) - exact) < 2.0**-7 * np.linalg.norm(exact)
