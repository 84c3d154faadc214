"""score_mod, mask_mod and block_mask on a GPU: every family against the reference in float64.

`pytest -m gpu tests/gpu/test_flex_device.py` runs all of it.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from tests.tools.compare import close_captured
from tests.tools.gpu.cases import families_here, on_device, to_host, using
from tests.tools.gpu.flex import MASKS, SCORES, Mod
from tests.tools.problems import NUMPY

pytestmark = [requires_gpu, pytest.mark.gpu]
Array = np.ndarray[Any, Any]
HOW_NEAR = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 3e-5}


def made(mod: Mod | None, batch: int, heads: int, keys: int, seed: int) -> list[Array]:
    """The arrays of a function: documents and prefixes, conditions, tables."""
    draw, found = np.random.default_rng(seed), list[Array]()
    for dtype, shape in () if mod is None else mod.shapes(batch, heads, keys):
        if dtype == "int32":
            x = np.sort(draw.integers(0, 6, shape), -1) if len(shape) > 1 else draw.integers(0, keys, shape)
            found.append(x.astype(np.int32))
        elif dtype == "bool":
            found.append(draw.random(shape) < 0.5)
        else:
            found.append((draw.standard_normal(shape) * 0.3).astype(NUMPY[dtype]))
    return found


def bound(mask: Mod | None, arrays: list[Any]) -> Callable[..., Any] | None:
    """The mask_mod that closes over its arrays."""
    if mask is None:
        return None
    function = mask.function
    return lambda b, h, q, k: function(b, h, q, k, *arrays)


def near(got: Array, want: Array, dtype: str, what: str) -> None:
    got, want = got.astype(np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(got), finite), what
    error = np.abs(got[finite] - want[finite]).max(initial=0) / max(1.0, np.abs(want[finite]).max(initial=0))
    assert error <= HOW_NEAR[dtype], (what, error)


def compare(family: str, score: str | None, mask: str | None, dtype: str, dim: int, lengths: Any, *, blocks: Any = None,
            **options: Any) -> None:
    """Forward and backward. lengths: (rows, keys), or lists of both of packed sequences."""
    packed = isinstance(lengths[0], list)
    rows, keys = (sum(lengths[0]), sum(lengths[1])) if packed else lengths
    longest, batch, heads, heads_k = max(lengths[1]) if packed else keys, len(lengths[0]) if packed else 2, 4, 2
    draw = np.random.default_rng(dim)
    lead = () if packed else (batch,)
    q, k, v, dout = (draw.standard_normal((*lead, n, h, dim)).astype(NUMPY[dtype])
                     for n, h in ((rows, heads), (keys, heads_k), (keys, heads_k), (rows, heads)))
    of_score, of_mask = SCORES.get(score or ""), MASKS.get(mask or "")
    captured, held = made(of_score, batch, heads, longest, 1), made(of_mask, batch, heads, longest, 2)
    cu = [np.cumsum([0, *n]).astype(np.int32) for n in lengths] if packed else []
    forward, backward = (fastattn.attention_varlen, fastattn.attention_varlen_backward) if packed else (
        fastattn.attention, fastattn.attention_backward)
    score_mod = None if of_score is None else of_score.function

    def of(arrays: list[Any], seen: list[Any], block: Any) -> dict[str, Any]:
        functions = {"score_mod": score_mod, "mask_mod": bound(of_mask, seen), "block_mask": block}
        return {name: x for name, x in functions.items() if x is not None} | ({"captured": tuple(arrays)} if arrays else {}) | options
    block_shape = None if blocks is None else (rows, keys)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    host_block = None if block_shape is None else fastattn.block_mask(None, None, heads, rows, keys, blocks=blocks, block=64)
    own = of([x.astype(np.float64) for x in captured], held, host_block)
    want, want_lse = forward(*wide[:3], *cu, **own, return_lse=True, engine="reference")
    asked = {"need_dcaptured": True} if captured else {}
    wanted = backward(wide[3], *wide[:3], want, want_lse, *cu, **own, engine="reference")
    there, lengths_there = [on_device(x) for x in (q, k, v, dout)], [on_device(x) for x in cu]
    most = {"max_seqlen_q": max(lengths[0]), "max_seqlen_k": longest} if packed else {}
    block = None if block_shape is None else fastattn.block_mask(None, None, heads, rows, keys, blocks=on_device(blocks), block=64)
    own = of([on_device(x) for x in captured], [on_device(x) for x in held], block) | most
    try:
        with using(family):
            out, lse = forward(*there[:3], *lengths_there, **own, return_lse=True)
    except fastattn.UnsupportedError as error:
        assert dtype == "float32" and family != "simt", error
        pytest.skip(str(error))
    try:
        with using(family):
            grads = backward(there[3], *there[:3], out, lse, *lengths_there, **own, **asked)
    except fastattn.UnsupportedError as error:      # what a family refuses another one runs
        assert family != "simt", error
        grads = backward(there[3], *there[:3], out, lse, *lengths_there, **own, **asked)
    near(to_host(out), want, dtype, "out")
    near(to_host(lse), want_lse, "float32" if dtype == "float32" else "float16", "lse")
    for name, got, x in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        near(to_host(got), x, dtype, name)
    if captured:
        close_captured(tuple([to_host(x) for x in grads.dcaptured]), backward, (q, k, v, dout), tuple(captured),
                       (to_host(out), to_host(lse)), tuple(cu), **of([], held, host_block))


FAMILIES = families_here()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", SCORES)
def test_scores(family: str, score: str) -> None:
    compare(family, score, None, "bfloat16", 128, (300, 500), causal=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(family: str, mask: str) -> None:
    compare(family, None, mask, "float16", 64, (700, 700))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("score", "mask"), [("alibi", "document"), ("softcap", "sliding"), ("relative", "prefix"),
                                             ("gated", "local_global")])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_both(family: str, score: str, mask: str, dim: int) -> None:
    compare(family, score, mask, "bfloat16", dim, (333, 1200))


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str) -> None:
    compare(family, "softcap", "document", "float32", 64, (150, 300))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("score", "mask"), [("relative", None), (None, "document"), ("softcap", "causal")])
def test_packed(family: str, score: str | None, mask: str | None) -> None:
    compare(family, score, mask, "bfloat16", 128, ([130, 0, 64, 301], [130, 40, 500, 301]))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_built_in_features(family: str) -> None:
    blocks = np.random.default_rng(3).random((1, 4, 5, 8)) < 0.3
    compare(family, "relative", "causal", "bfloat16", 128, (300, 500), blocks=blocks, window=(400, 100), dropout_p=0.2, seed=7)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_no_pair(family: str) -> None:
    """No sequence, but rows and keys of none: problem 5909 of the fuzzer's seed 4002 read blocks at address 0. The same without keys."""
    draw = np.random.default_rng(1)
    q, k = on_device(draw.standard_normal((3, 6, 96)).astype(np.float16)), on_device(draw.standard_normal((5, 3, 96)).astype(np.float16))
    cu, used = on_device(np.zeros(1, np.int32)), on_device(np.zeros(0, np.int32))
    block = fastattn.block_mask(None, None, 6, 0, 0, blocks=on_device(np.ones((1, 6, 0, 0), bool)), block=(24, 40))
    options = {"causal": True, "score_mod": lambda s, b, h, i, j: np.maximum(s, 0), "block_mask": block, "dropout_p": 0.05, "seed": 1}
    with using(family):
        out, lse = fastattn.attention_varlen(q, k, k, cu, cu, seqused_k=used, max_seqlen_q=0, max_seqlen_k=0, return_lse=True,
                                             bias=on_device(np.zeros((1, 0), np.float16)), **options)
    assert not to_host(out).any() and np.isneginf(to_host(lse)).all()
    rows = on_device(draw.standard_normal((2, 4, 6, 96)).astype(np.float16))
    block = fastattn.block_mask(None, 2, 6, 4, 0, blocks=on_device(np.ones((2, 6, 1, 0), bool)), block=(24, 40))
    none = on_device(np.zeros((2, 0, 3, 96), np.float16))
    out, lse = fastattn.attention(rows, none, none, block_mask=block, return_lse=True)
    assert not to_host(out).any() and np.isneginf(to_host(lse)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_diagonals_of_no_sequence(family: str) -> None:
    """A packed call without sequences: its spare rows have no diagonal to read."""
    q = on_device(np.ones((3, 2, 64), np.float16))
    cu, none = on_device(np.zeros(1, np.int32)), on_device(np.zeros(0, np.int32))
    with using(family):
        out, lse = fastattn.attention_varlen(q, q, q, cu, cu, max_seqlen_q=0, max_seqlen_k=0, causal=True, diagonal=none, return_lse=True)
    assert not to_host(out).any() and np.isneginf(to_host(lse)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_long_lines_of_tiles(family: str) -> None:
    """More than 32 tiles in a line, most of them empty."""
    compare(family, None, "sliding", "bfloat16", 64, (5000, 5000))


@pytest.mark.parametrize("block", [64, 128])
def test_a_block_mask_is_used_again(block: int) -> None:
    """The same mask in calls of other lengths; of small blocks, for which Hopper has smaller tiles."""
    mask = fastattn.block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, block=block)
    draw = np.random.default_rng(1)
    for rows in (256, 300, 256):
        q = draw.standard_normal((1, rows, 2, 64)).astype(np.float16)
        got = fastattn.attention(*(on_device(q) for _ in range(3)), block_mask=mask)
        near(to_host(got), fastattn.attention(*([q.astype(np.float64)] * 3), causal=True, engine="reference"), "float16", "out")


@pytest.mark.parametrize("dim", [40, 64, 128])
def test_fine_masks(dim: int) -> None:
    """Documents in small tiles, forward and backward, with a score that is no longer scaled and rows that see nothing."""
    draw = np.random.default_rng(dim)
    q, k, v, dout = (draw.standard_normal((2, n, 4, dim)).astype(np.float16) for n in (1000, 1100, 1100, 1000))
    doc = np.repeat(np.arange(20, dtype=np.int32), 55)

    def options(doc: Any) -> dict[str, Any]:
        mask = fastattn.block_mask(lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j) & (i % 7 != 3), None, None, 1000, 1100, block=64)
        return {"score_mod": lambda s, b, h, i, j: 20 * np.tanh(s / 20) - 0.01 * abs(i - j), "block_mask": mask}
    here = [on_device(x) for x in (q, k, v, dout)]
    out, lse = fastattn.attention(*here[:3], return_lse=True, **options(on_device(doc)))
    grads = fastattn.attention_backward(here[3], *here[:3], out, lse, **options(on_device(doc)))
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    want, want_lse = fastattn.attention(*wide[:3], return_lse=True, engine="reference", **options(doc))
    near(to_host(out), want, "float16", "out")
    near(to_host(lse), want_lse, "float16", "lse")
    wanted = fastattn.attention_backward(wide[3], *wide[:3], want, want_lse, engine="reference", **options(doc))
    for name, got, x in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        near(to_host(got), x, "float16", name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_gradients_of_captured_arrays(dtype: str) -> None:
    """Many blocks add to each element: the same bits each time, and those of the reference but for rounding."""
    draw = np.random.default_rng(4)
    q, k, v, dout = (draw.standard_normal((2, n, 4, 64)).astype(NUMPY[dtype]) for n in (600, 700, 700, 600))
    table = (draw.standard_normal((4, 64)) * 0.1).astype(np.float32)
    flex: dict[str, Any] = {"score_mod": SCORES["relative"].function, "causal": True}
    here = [on_device(x) for x in (dout, q, k, v)]
    out, lse = fastattn.attention(*here[1:], captured=(on_device(table),), return_lse=True, **flex)
    found = [to_host(fastattn.attention_backward(*here, out, lse, captured=(on_device(table),), need_dcaptured=True, deterministic=True,
                                                 **flex).dcaptured[0]) for _ in range(3)]
    assert all(np.array_equal(x, found[0]) for x in found)
    close_captured((found[0],), fastattn.attention_backward, (q, k, v, dout), (table,), (to_host(out), to_host(lse)), **flex)


@pytest.mark.parametrize("score", ["alibi", "relative", None])
def test_few_queries_by_split_keys(score: str | None) -> None:
    """Rows of several heads in one block."""
    compare("sm80", score, "document", "bfloat16", 128, (2, 3000))
    compare("sm80", score, "prefix", "float16", 64, (1, 5000))
