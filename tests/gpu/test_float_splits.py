"""Wide float32 heads with few tiles of query rows: the keys are split among batch entries, or heads (sm90/launch_float.py).

A launch of such a call without a GPU: the PTX of the kernels that write the parts of K and V, and that merge the splits. What is between
them is NumPy's: the forward on tensor cores, from the parts that its tensor maps name to the addresses that its arguments name.
"""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import attention, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import View, contiguous
from fastattn.gpu.precompile import HERE
from fastattn.gpu.runtime.compile import Source
from fastattn.gpu.runtime.device import device
from fastattn.gpu.sm90.launch_float import prepare_float, splits_of
from fastattn.gpu.spec import Call, make_spec
from fastattn.problem import Operands, make_problem
from tests.tools.devices import requires_gpu
from tests.tools.gpu import interpreter
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.problems import NUMPY

Array, SCALE = np.ndarray[Any, Any], 0.125


class Launcher(interpreter.Launcher):
    """The forward is NumPy's. `splits`: of the keys, of its last launch."""

    boxes: tuple[View, ...] = ()
    splits = 0

    def tensor_maps(self, boxes: tuple[tuple[View, int], ...], captured: bool, forms: tuple[int, ...] | None = None) -> list[int]:
        self.boxes = tuple([x for x, _ in boxes])
        return [0] * len(boxes)

    def load(self, source: Source) -> Any:
        if source.key.split()[0] != "forward_sm90_float":
            return super().load(source)
        names = [name for name, _ in source.fields]

        def launch(grid: int, values: list[Any], stream: int) -> None:
            self.launched.append(source.key)
            self.forward(SimpleNamespace(**dict(zip(names, values, strict=True))), source.key)
        return SimpleNamespace(launch=launch)

    def whole(self, parts: View, dim: int) -> Array:
        """The sums of K's or V's parts, (batch, heads, keys, dim), in float64."""
        x = self.memory.read(parts, NUMPY["bfloat16"]).astype(np.float64)
        return x.reshape(*x.shape[:3], 3, -1).sum(3)[..., :dim].swapaxes(1, 2)

    def forward(self, a: Any, key: str) -> None:
        """Each of the call's batch entries and heads alone; float32 where the kernel's are."""
        shape, q_strides = (a.batch, a.seqlen_q, a.num_heads), (a.q_batch, a.q_row, a.q_head, a.q_dim)
        q = self.memory.read(View(a.q, (*shape, a.head_dim), q_strides, "float32", HERE), np.float32)
        k, v = (self.whole(x, dim) for x, dim in zip(self.boxes, (a.head_dim, a.head_dim_v), strict=True))
        assert k.shape[2] == v.shape[2] == a.seqlen_k
        scores = (q.swapaxes(1, 2).astype(np.float64) @ k.repeat(a.group, 1).swapaxes(2, 3)).astype(np.float32)
        top = scores.max(3, keepdims=True)
        p = np.exp2((scores - top).astype(np.float64) * np.float64(np.float32(a.log2_scale)))
        partial, total = key.split(" | ")[1].split().count("partial"), p.sum(3, keepdims=True)
        out = p @ v.repeat(a.group, 1)
        rows = [top, total] if partial else [top * np.float32(a.softmax_scale) + np.log(total)]
        strides = a.out_batch, a.out_row, a.out_head, a.out_dim
        self.write(View(a.out, (*shape, a.head_dim_v), strides, "float32", HERE), (out if partial else out / total).swapaxes(1, 2))
        for n, x in enumerate(rows):
            self.write(View(a.lse + 4 * n * top.size, x.shape, contiguous(x.shape, 4), "float32", HERE), x)
        self.splits = k.shape[0] * k.shape[1]

    def write(self, to: View, x: Array) -> None:
        low, high = (at - interpreter.BASE for at in to.bytes_range())
        assert self.memory.valid[low:high].all(), "access outside the arrays"
        flat = self.memory.bytes[low:high].view(x.dtype if x.itemsize == 2 else np.float32)
        np.lib.stride_tricks.as_strided(flat, x.shape, to.strides)[...] = x


def launched(arrays: list[Array], scale: float, return_lse: bool) -> tuple[Array, Array, Launcher]:
    """out and lse (batch, heads, rows) of a call. arrays: q, k, v (batch, rows, heads, dim)."""
    memory = interpreter.Memory()
    q, k, v = (memory.place(x, convert.view(x, "test", "x")) for x in arrays)
    problem, o = make_problem("test", Operands(q, k, v), packed=False, softmax_scale=scale)
    empty = [np.full(shape, np.nan, np.float32) for shape in (problem.out_shape, problem.lse_shape)]
    out, lse = (memory.place(x, convert.view(x, "test", "x")) for x in empty)
    call, launcher = Call(problem, o, out, lse if return_lse else None), Launcher(memory)
    prepare_float(call, make_spec(problem, o, return_lse), launcher)(call, 0)
    return memory.read(out, np.float32), memory.read(lse, np.float32), launcher


def reference(arrays: list[Array], scale: float) -> tuple[Array, Array]:
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in arrays)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat(group, 1).swapaxes(2, 3) * np.float64(np.float32(scale))
    top = scores.max(3, keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(3, keepdims=True)
    return (p @ v.repeat(group, 1) / total).swapaxes(1, 2), (top + np.log(total))[..., 0]


# (batch, rows, keys, heads, heads of k, head_dim, head_dim_v), splits. Rows of 66 float32 are not aligned, so that no producer splits them
SHAPES = {"batch": ((1, 3, 1536, 4, 2, 132, 132), 3), "heads": ((2, 2, 1024, 1, 1, 40, 70), 2), "narrow": ((1, 2, 1900, 8, 1, 66, 128), 2),
          "many": ((1, 1, 512 * 9, 1, 1, 5, 3), 9)}
SIZES = [1.0, 1e4, 1e8, 1e30]


def arrays_of(name: str, size: float) -> list[Array]:
    """q, k, v. Of large scores several of a row are the largest one, not as many in each split. How much a split counts is then in no bit
    of an lse."""
    (batch, rows, keys, heads, heads_k, dim, dim_v), _ = SHAPES[name]
    draw = np.random.default_rng(keys)
    q, k, v = (draw.standard_normal(shape).astype(np.float32)
               for shape in ((batch, rows, heads, dim), (batch, keys, heads_k, dim), (batch, keys, heads_k, dim_v)))
    if size > 1:
        for x in (q, k):
            hot = draw.integers(0, 3, x.shape[:-1])[..., None] == np.arange(dim)
            x[...] = np.where(hot, draw.choice([1.0, 2.0, -1.0], x.shape), 0) * 2.0 ** round(np.log2(size) / 2)
        k[:, keys // 3:] = np.where(draw.random((batch, keys - keys // 3, heads_k, 1)) < 0.9, 0, k[:, keys // 3:])
    return [q, k, v]


def close(out: Array, lse: Array, arrays: list[Array]) -> None:
    expected, expected_lse = reference(arrays, SCALE)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=3e-7, atol=3e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_results_of_splits_are_merged(name: str, size: float) -> None:
    arrays = arrays_of(name, size)
    out, lse, launcher = launched(arrays, SCALE, return_lse=True)
    close(out, lse, arrays)
    batch, heads = SHAPES[name][0][0], SHAPES[name][0][4]
    assert launcher.splits == SHAPES[name][1] * batch * heads


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_scores_of_any_size_on_a_gpu(name: str, size: float) -> None:
    if device(0).arch != "sm_90a":
        pytest.skip("not on Hopper")
    arrays = arrays_of(name, size)
    with gpu.use("sm90"):
        out, lse = attention(*map(on_device, arrays), softmax_scale=SCALE, return_lse=True)
    close(to_host(out), to_host(lse), arrays)


def test_a_split_without_weight() -> None:
    """It is not read: what it holds may be NaN. No lse is stored where none is asked for."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, n, 1, 132)).astype(np.float32) for n in (2, 1024, 1024))
    q[...], k[:, 512:] = 1, -1e3
    v[:, 512:] = np.nan
    out, lse, launcher = launched([q, k, v], 1.0, return_lse=False)
    np.testing.assert_allclose(out, reference([q, k[:, :512], v[:, :512]], 1.0)[0], rtol=1e-5, atol=3e-6)
    assert np.isnan(lse).all() and launcher.launched[-1].startswith("merge_sm90_float")


@pytest.mark.parametrize(("shape", "options", "expected"), [
    ((1, 4096, 4096, 1, 512), {}, 2), ((1, 4096, 4097, 1, 512), {}, 1), ((1, 4096, 4096, 1, 512), {"causal": True}, 1),
    ((2, 64, 2048, 3, 512), {}, 1), ((1, 1, 2**20, 1, 512), {}, 128), ((3, 64, 1024, 1, 512), {}, 2), ((1, 16384, 16384, 1, 512), {}, 1)])
def test_how_many(shape: tuple[int, int, int, int, int], options: dict[str, Any], expected: int) -> None:
    """As many as keep all multiprocessors busy, of 512 keys at least, all alike; not of a masked call."""
    batch, rows, keys, heads, dim = shape
    row = 4 * heads * dim
    q, k = (View(0, (batch, n, heads, dim), (n * row, row, 4 * dim, 4), "float32", ("cpu", 0)) for n in (rows, keys))
    problem, o = make_problem("test", Operands(q, k, k), packed=False, **options)
    assert splits_of(problem, make_spec(problem, o, False), batch * heads * -(-rows // 64), 132) == expected
