"""score_mod, mask_mod and block_mask of the public functions against autograd of the same function and against built-in features."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_backward, attention_varlen, attention_varlen_backward, block_mask

from .tools import ENGINES, close

RNG = np.random.default_rng(0)
BATCH, ROWS, KEYS, HEADS, HEADS_K, DIM = 2, 13, 17, 4, 2, 8
Q = RNG.standard_normal((BATCH, ROWS, HEADS, DIM))
K, V = RNG.standard_normal((2, BATCH, KEYS, HEADS_K, DIM))
DOUT = RNG.standard_normal(Q.shape)
DLSE = RNG.standard_normal((BATCH, HEADS, ROWS))
SLOPES, TABLE, SINKS = RNG.uniform(0.1, 1, HEADS), RNG.standard_normal((HEADS, 9)), RNG.standard_normal(HEADS)
DOC = np.array([[0] * 6 + [1] * 11, [0] * 3 + [1] * 9 + [2] * 5], np.int32)
Mod = Callable[..., Any]


def relative(s: Any, b: Any, h: Any, q: Any, k: Any, table: Any) -> Any:
    return s + table[h, np.clip(q - k + 4, 0, 8)]


def learned_cap(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any, cap: Any) -> Any:
    return cap * np.tanh((s - slopes[h] * abs(q - k)) / cap)


def logarithm(s: Any, b: Any, h: Any, q: Any, k: Any, table: Any) -> Any:
    """-inf at some pairs, and a branch whose derivative is no number where it is not taken."""
    far = np.where(s > 0, np.log(s) * table[h, 0], s * table[b, 1])
    return np.where((q + k) % 5 == 0, -np.inf, far)


MODS: dict[str, tuple[Mod, tuple[Any, ...]]] = {
    "alibi": (lambda s, b, h, q, k, slopes: s - slopes[h] * abs(q - k), (SLOPES,)),
    "softcap": (lambda s, b, h, q, k: 3 * np.tanh(s / 3), ()),
    "relative": (relative, (TABLE,)),
    "learned cap": (learned_cap, (SLOPES, np.array(2.5))),
    "logarithm": (logarithm, (TABLE,)),
    "constant": (lambda s, b, h, q, k, table: table[h, k % 9], (TABLE,)),
}
MASKS: dict[str, Mod | None] = {
    "none": None, "causal": lambda b, h, q, k: q + 4 >= k, "document": lambda b, h, q, k: (DOC[b, q] == DOC[b, k]) & (h != 1),
    "nothing for some rows": lambda b, h, q, k: (q % 4 != 1) & (q >= k),
}


def in_torch(mod: Mod | None, mask: Mod | None, arrays: Any, **options: Any) -> Any:
    """out, lse, and the gradients by autograd in float64, of dense scores. Functions run on tensors of all pairs."""
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(x, requires_grad=True) for x in (Q, K, V, *arrays)]
    q, k, v, *held = tensors
    k_, v_ = (x.repeat_interleave(HEADS // HEADS_K, 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k_) / DIM**0.5
    if "softcap" in options:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    places = [torch.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(s.shape)]
    if mod is not None:
        s = mod(s, *places, *held).expand(s.shape)
    if "sinks" in options:
        sinks = torch.tensor(options["sinks"], requires_grad=True)
        tensors.append(sinks)
    seen = torch.ones(s.shape, dtype=torch.bool) if mask is None else mask(*places).expand(s.shape)
    s = torch.where(seen & ~torch.isneginf(s), s, torch.tensor(-1e30, dtype=torch.float64))
    total = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], 3) if "sinks" in options else s
    lse = torch.logsumexp(total, 3)
    alive = lse > -1e29
    p = torch.exp(s - lse[..., None]) * alive[..., None]
    out = torch.einsum("bhij,bjhd->bihd", p, v_)
    loss = (out * torch.tensor(DOUT)).sum() + (torch.where(alive, lse, 0) * torch.tensor(DLSE)).sum()
    lse_ = np.where(alive.numpy(), lse.detach().numpy(), -np.inf)
    return out.detach().numpy(), lse_, torch.autograd.grad(loss, tensors, allow_unused=True)


def torch_words(mod: Mod) -> Mod:
    """The same function for tensors: NumPy's where, clip, log and tanh are torch's."""
    import types

    torch = pytest.importorskip("torch")
    inf = float("inf")
    words = types.SimpleNamespace(
        where=lambda c, x, y: torch.where(c, torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)),
        clip=torch.clamp, log=lambda x: torch.log(torch.where(x > 0, x, 1.0)), tanh=torch.tanh, inf=inf)
    return types.FunctionType(mod.__code__, mod.__globals__ | {"np": words, "DOC": torch.tensor(DOC)}, closure=mod.__closure__)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODS)
def test_scores_against_autograd(engine: str, name: str) -> None:
    mod, arrays = MODS[name]
    if name == "logarithm" and engine != "reference":
        pytest.skip("0 * inf of the formula itself")
    out, lse = attention(Q, K, V, score_mod=mod, captured=arrays, return_lse=True, engine=engine)
    want, want_lse, grads = in_torch(torch_words(mod), None, arrays)
    close(out, want), close(lse, want_lse)
    got = attention_backward(DOUT, Q, K, V, out, lse, dlse=DLSE, score_mod=mod, captured=arrays, need_dcaptured=bool(arrays), engine=engine)
    for x, y in zip([*got[:3], *(got.dcaptured or ())], grads, strict=True):
        close(x, np.zeros(x.shape) if y is None else y.numpy())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("blocked", [False, True])
def test_masks_against_autograd(engine: str, name: str, blocked: bool) -> None:
    mask = MASKS[name]
    if mask is None:
        pytest.skip("it has no mask")
    given: dict[str, Any] = {"mask_mod": mask}
    if blocked:
        given = {"block_mask": block_mask(mask, BATCH, HEADS, ROWS, KEYS, block=(4, 8))}
    out, lse = attention(Q, K, V, return_lse=True, sinks=SINKS, engine=engine, **given)
    want, want_lse, grads = in_torch(None, torch_words(mask), (), sinks=SINKS)
    close(out, want), close(lse, want_lse)
    got = attention_backward(DOUT, Q, K, V, out, lse, dlse=DLSE, sinks=SINKS, engine=engine, **given)
    for x, y in zip((*got[:3], got.dsinks), grads, strict=True):
        close(x, y.numpy())


@pytest.mark.parametrize("engine", ENGINES)
def test_functions_work_beside_all_other_features(engine: str) -> None:
    bias, mask = RNG.standard_normal((1, HEADS, ROWS, KEYS)), RNG.random((BATCH, 1, ROWS, KEYS)) < 0.8
    more = {"softcap": 4.0, "bias": bias, "mask": mask, "sinks": SINKS, "dropout_p": 0.25, "seed": 3, "causal": True, "window": (9, 0)}
    distance = abs(np.arange(ROWS)[:, None] - np.arange(KEYS))

    def slope(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any) -> Any:
        return s - slopes[h] * abs(q - k)
    flex = {"score_mod": slope, "captured": (SLOPES,), "mask_mod": lambda b, h, q, k: q - k != 2}
    plain = more | {"bias": bias - SLOPES[:, None, None] * distance, "mask": mask & (np.arange(ROWS)[:, None] - np.arange(KEYS) != 2)}
    out, lse = attention(Q, K, V, return_lse=True, engine=engine, **more, **flex)
    want, want_lse = attention(Q, K, V, return_lse=True, engine="reference", **plain)
    close(out, want), close(lse, want_lse)
    got = attention_backward(DOUT, Q, K, V, out, lse, need_dbias=True, need_dcaptured=True, engine=engine, **more, **flex)
    grads = attention_backward(DOUT, Q, K, V, out, lse, need_dbias=True, engine="reference", **plain)
    for x, y in zip(got, grads, strict=True):
        close(x, y)
    close(got.dcaptured[0], -(attention_backward(DOUT, Q, K, V, out, lse, need_dbias=True, engine="reference", **plain).dbias
                              * distance).sum(axis=(0, 2, 3)))


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_calls_count_inside_each_sequence(engine: str) -> None:
    cu_q, cu_k = [0, 5, 5, 13], [0, 8, 9, 17]
    q, k, v, dout = Q[0], K[0], V[0], DOUT[0]
    table = RNG.standard_normal((3, 9))
    flex: dict[str, Any] = {"score_mod": lambda s, b, h, i, j, t: s + t[b, j] * h, "captured": (table,),
                            "mask_mod": lambda b, h, i, j: (i + j) % 3 != b}
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, engine=engine, **flex)
    got = attention_varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, need_dcaptured=True, engine=engine, **flex)
    dtable = np.zeros(table.shape)
    for b in range(3):
        rows, keys = np.s_[cu_q[b]:cu_q[b + 1]], np.s_[cu_k[b]:cu_k[b + 1]]
        one: dict[str, Any] = {"score_mod": lambda s, _, h, i, j, t, b=b: s + t[b, j] * h, "captured": (table,),
                               "mask_mod": lambda _, h, i, j, b=b: (i + j) % 3 != b, "engine": "reference"}
        x = q[None, rows], k[None, keys], v[None, keys]
        want, want_lse = attention(*x, return_lse=True, **one)
        grads = attention_backward(dout[None, rows], *x, want, want_lse, need_dcaptured=True, **one)
        close(out[rows], want[0]), close(lse[:, rows], want_lse[0])
        for a, c in zip((got.dq[rows], got.dk[keys], got.dv[keys]), grads, strict=False):
            close(a, c[0])
        dtable += grads.dcaptured[0]
    close(got.dcaptured[0], dtable)


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_of_an_array(engine: str) -> None:
    blocks = RNG.random((HEADS, 4, 3)) < 0.6
    seen = np.repeat(np.repeat(blocks, 4, 1), 6, 2)[:, :ROWS, :KEYS]
    mask = block_mask(MASKS["causal"], None, HEADS, ROWS, KEYS, blocks=blocks, block=(4, 6))
    want = attention(Q, K, V, mask=seen & (np.arange(ROWS)[:, None] + 4 >= np.arange(KEYS)), engine="reference")
    close(attention(Q, K, V, block_mask=mask, engine=engine), want)
    both = attention(Q, K, V, block_mask=mask, mask_mod=lambda b, h, q, k: k != h, engine=engine)
    heads, keys = np.arange(HEADS)[:, None, None], np.arange(KEYS)
    close(both, attention(Q, K, V, mask=seen & (np.arange(ROWS)[:, None] + 4 >= keys) & (keys != heads), engine="reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_plane_serves_all(engine: str) -> None:
    mask = block_mask(lambda b, h, q, k: (h == 0) & (b == 0) & (q >= k), None, None, ROWS, KEYS)
    assert np.array_equal(mask.tiles((ROWS, KEYS)), [[[[1]]]])
    close(attention(Q, K, V, block_mask=mask, engine=engine), attention(Q, K, V, causal="top_left", engine="reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_may_change(engine: str) -> None:
    for factor in (0.5, 0.75, 2.0):
        got = attention(Q, K, V, score_mod=lambda s, b, h, q, k: s * factor, engine=engine)      # noqa: B023
        close(got, attention(Q, K, V, softmax_scale=factor / DIM**0.5, engine="reference"))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_in_the_order_of_use(engine: str) -> None:
    first, second, index = np.ones(3), np.full((2, 2), 2.0), np.arange(4)

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any, x: Any, n: Any) -> Any:
        return s * second[b, 0] + first[index[h]] * x[h] * n
    out, lse = attention(Q, K, V, score_mod=mod, captured=(SLOPES, 2), return_lse=True, engine=engine)
    grads = attention_backward(DOUT, Q, K, V, out, lse, score_mod=mod, captured=(SLOPES, 2), need_dcaptured=True, engine=engine)
    assert [None if x is None else x.shape for x in grads.dcaptured] == [(4,), None, (2, 2), None, (3,)]
    assert not grads.dcaptured[2][:, 1].any() and len(grads) == 5
    dq, *_ = fastattn.attention_backward(DOUT, Q, K, V, out, lse, score_mod=mod, captured=(SLOPES, 2), engine=engine)
    close(dq, grads.dq)
