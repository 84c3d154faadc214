"""The twelve functions of examples/twelve_attentions.py: forward and all gradients against float64 autograd, and what they must see."""
from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn import attention, attention_backward
from fastattn.flex.evaluate import evaluate
from fastattn.flex.trace import traced

from .tools import ENGINES, close

pytest.importorskip("matplotlib").use("Agg")
torch = pytest.importorskip("torch")
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "twelve_attentions.py"))
KINDS, SEQLEN, HEADS = SCRIPT["KINDS"], SCRIPT["SEQLEN"], SCRIPT["HEADS"]
Q, K, V, DOUT = np.random.default_rng(0).standard_normal((4, 1, SEQLEN, HEADS, 8))
I, J = np.arange(SEQLEN)[:, None], np.arange(SEQLEN)            # noqa: E741


def seen() -> dict[str, Any]:
    """What rows attend, (heads, rows, keys), by formulas of their own."""
    causal, far, head = I >= J, I - J, np.arange(HEADS)[:, None, None]
    of, line, column = SCRIPT["document_of"], I // 8, I % 8
    near = (abs(line - (J // 8)) <= 2) & (abs(column - J % 8) <= 2)
    tree = np.zeros((SEQLEN, SEQLEN), bool)
    for n in range(SEQLEN):
        m = n
        while tree[n, m] != 1:
            tree[n, m], m = True, max((m - 1) // 2, 0)
    return {"causal": causal, "sliding": causal & (far < 16), "dilated": causal & (far < 32) & (far % (head + 1) == 0),
            "document": causal & (of[:, None] == of), "prefix": causal | (J < 24), "tree": tree, "natten": near, "swin": near | True,
            "alibi": causal, "t5": causal, "softcap": near | True, "gemma": causal & (far < 16)}


def scored(name: str, s: Any, held: list[Any]) -> Any:
    """The scores, by torch's words."""
    far, h = torch.tensor(I - J), torch.arange(HEADS)[:, None, None]
    if name == "alibi":
        return s - held[0][:, None, None] * far.abs()
    if name == "t5":
        return s + held[0][h, torch.tensor(SCRIPT["buckets"])[far.clamp(0, SEQLEN - 1)].long()]
    if name == "swin":
        line, column = torch.tensor(I // 8 - J // 8 + 7), torch.tensor(I % 8 - J % 8 + 7)
        return s + held[0][h, line, column]
    cap = {"softcap": 2.0, "gemma": 50.0}.get(name)
    return s if cap is None else cap * torch.tanh(s / cap)


def test_there_are_twelve() -> None:
    assert len(KINDS) == 12 and KINDS.keys() == seen().keys()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KINDS)
def test_against_autograd(engine: str, name: str) -> None:
    kind = KINDS[name]._asdict()
    captured = tuple([x.astype(np.float64) for x in kind.pop("captured")])
    out, lse = attention(Q, K, V, return_lse=True, engine=engine, captured=captured, **kind)
    got = attention_backward(DOUT, Q, K, V, out, lse, engine=engine, captured=captured, need_dcaptured=bool(captured), **kind)
    q, k, v, *held = tensors = [torch.tensor(x, requires_grad=True) for x in (Q, K, V, *captured)]
    s = scored(name, torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5, held)
    p = torch.where(torch.tensor(seen()[name]), s, -float("inf")).softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", p, v)
    close(out, want.detach().numpy())
    of = [x for x in got.dcaptured or () if x is not None][:len(held)]
    for x, y in zip((*got[:3], *of), torch.autograd.grad(want, tensors, torch.tensor(DOUT)), strict=True):
        close(x, y.numpy(), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_masks_are_the_formulas(name: str) -> None:
    if KINDS[name].mask_mod is None:
        assert seen()[name].all()
        return
    t = traced("attention", "mask_mod", KINDS[name].mask_mod, (), True)
    at = {"batch": np.int32(0), "head": np.arange(HEADS, dtype=np.int32)[:, None, None], "q": I.astype(np.int32), "k": J.astype(np.int32)}
    got = np.broadcast_to(evaluate(t.program, at, t.arrays, t.numbers)[0], (HEADS, SEQLEN, SEQLEN))
    assert np.array_equal(got, np.broadcast_to(seen()[name], got.shape))
