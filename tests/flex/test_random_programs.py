"""200 random functions, forward and all gradients, against float64 autograd of the same function."""
from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from fastattn import attention, attention_backward, block_mask
from fastattn.flex.evaluate import evaluate
from fastattn.flex.lower import lower
from fastattn.flex.trace import traced

from .programs import BATCH, HEADS, KEYS, NUMPY, ROWS, SHAPES, Tree, draw, names, run, shown, torch_words
from .tools import ENGINES, close

torch = pytest.importorskip("torch")
DIM, COUNT = 4, 200 * int(os.environ.get("FASTATTN_FUZZ", "1"))


def score_mod(tree: Tree, arrays: dict[str, Any]) -> Any:
    """The tree as a user's function, which closes over its arrays."""
    return lambda score, b, h, q, k: run(tree, NUMPY, {"score": score, "b": b, "h": h, "q": q, "k": k}, arrays)


def mask_mod(tree: Tree) -> Any:
    return lambda b, h, q, k: run(tree, NUMPY, {"b": b, "h": h, "q": q, "k": k}, {})


def in_torch(score: Tree, mask: Tree, inputs: list[Any], arrays: dict[str, Any], dout: Any, dlse: Any) -> Any:
    """(out, lse, gradients of inputs and of the arrays by name)."""
    q, k, v = tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    held = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    s = torch.einsum("bihd,bjhd->bhij", q, k) / DIM**0.5
    axes = [torch.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(s.shape)]
    places = dict(zip("bhqk", axes, strict=True))
    s = run(score, torch_words(torch), places | {"score": s}, held).expand(s.shape)
    seen = run(mask, torch_words(torch), places, {}).expand(s.shape)
    s = torch.where(seen, s, -1e30)
    lse, alive = torch.logsumexp(s, 3), seen.any(3)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(s - lse[..., None]) * seen, v)
    loss = (out * torch.tensor(dout)).sum() + (torch.where(alive, lse, 0) * torch.tensor(dlse)).sum()
    loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*tensors, *held.values())]
    return out.detach().numpy(), np.where(alive, lse.detach().numpy(), -np.inf), [x.numpy() for x in grads]


@pytest.mark.parametrize("first", range(0, COUNT, 20))
@pytest.mark.parametrize("engine", ENGINES)
def test_against_autograd(engine: str, first: int) -> None:
    for seed in range(first, first + 20):
        rng = np.random.default_rng([2026, seed])
        score, mask = draw(rng)
        arrays = {name: rng.uniform(0.3, 1.5, SHAPES[name]) for name in sorted(names(score))}
        inputs = [rng.standard_normal((BATCH, n, HEADS, DIM)) for n in (ROWS, KEYS, KEYS)]
        dout, dlse = rng.standard_normal(inputs[0].shape), rng.standard_normal((BATCH, HEADS, ROWS))
        flex: dict[str, Any] = {"score_mod": score_mod(score, arrays), "mask_mod": mask_mod(mask), "engine": engine}
        if seed % 2:
            flex["block_mask"] = block_mask(flex.pop("mask_mod"), BATCH, HEADS, ROWS, KEYS, block=(2, 4))
        t = traced("attention", "score_mod", flex["score_mod"])
        try:
            out, lse = attention(*inputs, return_lse=True, **flex)
            want, want_lse, grads = in_torch(score, mask, inputs, arrays, dout, dlse)
            close(out, want), close(lse, want_lse)
            got = attention_backward(dout, *inputs, out, lse, dlse=dlse, need_dcaptured=bool(t.arrays), **flex)
            of = {id(x): g for x, g in zip(t.arrays, got.dcaptured or (), strict=True)}
            for x, y in zip((*got[:3], *[of[id(x)] for x in arrays.values()]), grads, strict=True):
                assert np.isfinite(x).all()
                close(x, y, 1e-9)
        except Exception as error:
            error.add_note(f"seed {seed}: {shown(score)} where {shown(mask)}")
            raise


def test_lowered_and_in_numpy() -> None:
    """The program, its lowered forms and the function itself on NumPy's arrays agree."""
    for seed in range(COUNT):
        rng = np.random.default_rng([2026, seed])
        tree = draw(rng).score
        arrays = {name: rng.uniform(0.3, 1.5, SHAPES[name]) for name in sorted(names(tree))}
        t = traced("attention", "score_mod", score_mod(tree, arrays))
        s = rng.standard_normal((BATCH, HEADS, ROWS, KEYS))
        at = dict(zip(("batch", "head", "q", "k"), np.ogrid[:BATCH, :HEADS, :ROWS, :KEYS], strict=True))
        places = {name: x.astype(np.int32) for name, x in at.items()} | {"score": s}
        want = evaluate(t.program, places, t.arrays, t.numbers)[0]
        for low in (lower(t.program, raw=False), lower(t.program, raw=False, exact=True)):
            assert np.allclose(evaluate(low, places, t.arrays, t.numbers)[0], want, rtol=1e-7, atol=1e-7), (seed, shown(tree))
