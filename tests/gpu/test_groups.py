"""A GQA backward whose query heads have tiles of their own: what its kernels are given, the sum of their parts, when it is chosen.

Without a GPU the reference stands for the kernels that write the parts.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu
from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import Grads, gpu, reference
from fastattn.arrays import convert
from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want
from fastattn.gpu.sm90 import launch
from fastattn.gpu.sm90.config import choose_backward, worth_parts
from fastattn.gpu.spec import BackwardCall, make_backward_spec
from fastattn.problem import Operands, make_problem
from tests.tools.gpu.emulator import Memory, emulated

Array = np.ndarray[Any, Any]


def view(x: Array) -> Any:
    return convert.view(x, "test", "x")


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("dtype", "dim", "dim_v"), [("float16", 24, 40), ("bfloat16", 64, 64), ("float16", 20, 12)])
def test_parts(dtype: str, dim: int, dim_v: int, with_dlse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, heads before rows in memory, rows that are no multiples of 16 bytes."""
    draw, group, heads_k, rows, keys = np.random.default_rng(0), 3, 2, 37, 29
    heads = group * heads_k

    def random(*shape: int, kind: Any = None) -> Array:
        return draw.standard_normal(shape).astype(kind or NUMPY[dtype])
    q, dout = random(1, heads, rows, dim).swapaxes(1, 2), random(1, rows, heads, dim_v)
    k, v = random(1, keys, heads_k, dim), random(1, heads_k, keys, dim_v).swapaxes(1, 2)
    exact = [x.astype(np.float64) for x in (q, k, v)]
    out, lse = fastattn.attention(*exact, causal=True, return_lse=True, engine="reference")
    dlse = random(1, heads, rows, kind=np.float32) if with_dlse else None
    wanted = fastattn.attention_backward(dout.astype(np.float64), *exact, out, lse, causal=True, engine="reference",
                                         dlse=None if dlse is None else dlse.astype(np.float64))
    out, lse = out.astype(NUMPY[dtype]), lse.astype(np.float32)
    grads = [np.full(x.shape, np.nan, NUMPY[dtype]) for x in (q, k, v)]
    problem, o = make_problem("test", Operands(view(q), view(k), view(v)), packed=False, causal=True)
    call = BackwardCall(problem, o, view(dout), view(out), view(lse), None if dlse is None else view(dlse),
                        Grads(*[view(x) for x in grads]), False)
    spec, memory, seen = make_backward_spec(call), Memory(), []
    for x in call.views:
        memory.allow(x)

    def backward(c: BackwardCall, inner: Any, launcher: Any, stream: int) -> None:
        """The reference, and numbers in the columns that no result has."""
        assert inner.group_parts and c.problem.group == 1 and c.problem.batch == group
        part_k, part_v = (x.numpy() for x in c.grads[1:3])
        dk, dv = (np.zeros((group, keys, heads_k, n), np.float32) for n in (dim, dim_v))
        assert part_k.shape == part_v.shape == (group, keys, heads_k, -(-max(dim, dim_v) // 16) * 16)
        reference.backward(c.problem, c.operands, c.dout, c.out, c.lse, c.dlse, Grads(c.grads.dq, view(dk), view(dv)))
        part_k[..., :dim], part_v[..., :dim_v] = dk, dv
        seen.append(c)
    monkeypatch.setattr(launch, "backward", backward)
    with emulated(memory) as machine:
        launch._backward_in_parts(call, spec, choose_backward(spec), machine.launcher("sm_90a"), 0)
    assert len(seen) == 1 and [key.split()[0] for key in machine.launched] == ["sum_groups"]
    assert ("whole" in machine.launched[0]) == (dim % 8 == 0 and dim_v % 8 == 0)
    for x, y in zip(grads, wanted[:3], strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=2e-2, atol=4e-2 if dtype == "bfloat16" else 1e-2)


def keys_of(**settings: Any) -> list[str]:
    usual: dict[str, Any] = {"causal": True, "batch": 1, "num_heads": 32, "num_heads_k": 8, "seqlen_q": 1024}
    want = Want("float16", 128, lse=False, backward=True, **usual | settings)
    return [source.key for source in precompile.sources(*want.call(), precompile.absent_device("sm_90a"))]


def test_when() -> None:
    names = [key.split()[0] for key in keys_of()]
    assert names == ["preprocess", "backward_sm90", "round_dq", "sum_groups"] and " group_parts " in keys_of()[1]
    for settings in ({"batch": 2}, {"num_heads_k": 32}, {"seqlen_q": 16}, {"seqlen_q": 8192}, {"deterministic": True}, {"packed": True},
                     {"softcap": True}, {"mask": True}, {"dropout": True}, {"sinks": "float32"}, {"alibi": "float32"}, {"bias": "float16"}):
        assert not any("sum_groups" in key or " group_parts " in key for key in keys_of(**settings)), settings


def test_parts_are_bounded() -> None:
    """Their memory is at most 256 MB, however few tiles there are."""
    call, spec = Want("float16", 128, lse=False, backward=True, batch=1, num_heads=64, num_heads_k=1, seqlen_q=1 << 16).call()
    assert gpu.choose(call, precompile.absent_device("sm_90a")) is gpu.family("sm90")
    assert not worth_parts(spec, choose_backward(spec), 1, 64, 1 << 16, 1 << 16, 132)
    assert worth_parts(spec, choose_backward(spec), 1, 64, 1 << 11, 1 << 11, 132)


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "heads", "heads_k", "rows", "keys", "dim", "options"), [
    ("float16", 32, 8, 1024, 1024, 128, {"causal": True}), ("bfloat16", 32, 1, 500, 777, 64, {}),
    ("float16", 8, 2, 1000, 900, 72, {"causal": True}), ("bfloat16", 16, 4, 2048, 1100, 128, {"window": (300, 0)})], ids=str)
def test_numbers(dtype: str, heads: int, heads_k: int, rows: int, keys: int, dim: int, options: dict[str, Any]) -> None:
    """Against float64, and not worse than the same call by the kernels without parts."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))
    q, k, v, dout = random(1, rows, heads, dim), random(1, keys, heads_k, dim), random(1, keys, heads_k, dim), random(1, rows, heads, dim)
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    exact = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = fastattn.attention(*exact, return_lse=True, **options)
    wanted = fastattn.attention_backward(dout.double(), *exact, exact_out, exact_lse, **options)

    def errors() -> list[float]:
        for _ in range(4):
            grads = fastattn.attention_backward(dout, q, k, v, out, lse, **options)
        return [float((x.double() - y).abs().max()) for x, y in zip(grads[:3], wanted[:3], strict=True)]
    with_parts = errors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_in_parts", lambda *_: False)
        patch.setattr(gpu, "_recordings", {})
        patch.setattr(fastattn.repeat, "_known", {})
        without = errors()
    assert all(x <= 1.5 * y + 1e-4 for x, y in zip(with_parts, without, strict=True)), (with_parts, without)
