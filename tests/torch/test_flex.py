"""fastattn.torch with functions: gradients of q, k, v and of all tensors that score_mod reads, against torch's own."""
from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastattn  # noqa: E402
from fastattn.torch import attention, attention_varlen  # noqa: E402

SHAPE = (2, 9, 4, 8)


def draw(*shape: int, **options: Any) -> Any:
    return torch.randn(*(shape or SHAPE), dtype=torch.float64, requires_grad=True, **options)


def formula(q: Any, k: Any, v: Any, bias: Any, seen: Any) -> Any:
    s = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1]**0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", torch.where(seen, s, -float("inf")).softmax(-1), v)


class Slopes(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.rand(4, dtype=torch.float64))

    def score(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s - torch.exp(self.slopes[h]) * (q - k).abs()


def same(got: Any, want: Any) -> None:
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)


def test_gradients_of_captured_and_of_closures() -> None:
    torch.manual_seed(0)
    q, k, v, table, module = draw(), draw(), draw(), draw(4, 9), Slopes()
    i = torch.arange(9)

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any, table: Any) -> Any:
        return module.score(s, b, h, q, k) + table[h, torch.abs(q - k)]
    got = attention(q, k, v, score_mod=mod, captured=(table,), mask_mod=lambda b, h, q, k: q >= k, engine="reference")
    far = (i[:, None] - i).abs()
    want = formula(q, k, v, table[:, far] - torch.exp(module.slopes)[:, None, None] * far, i[:, None] >= i)
    same(got, want)
    inputs = (q, k, v, table, module.slopes)
    dout = torch.randn_like(got)
    for x, y in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True):
        same(x, y)


class Layer(torch.nn.Module):  # type: ignore[misc]
    """A module with much that the function does not name: other layers, hooks, and a method that it calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.others = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(50)])
        self.inner, self.width = Slopes(), width
        self.list = torch.nn.ParameterList([torch.zeros(4, dtype=torch.float64)])
        self.register_buffer("offset", torch.arange(4, dtype=torch.float64))

    @property
    def far(self) -> int:
        return self.width * 2

    def shift(self, h: Any) -> Any:
        return self.offset[h] * 0.1 + self.list[0][h]

    def forward(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.inner.score(s, b, h, q, k) + torch.where(q - k > self.far, self.shift(h), 0.0)


def test_a_large_module_gives_what_its_function_names() -> None:
    from fastattn.flex.trace import traced

    for width in (1, 2, 3):
        layer = Layer(width)
        for function in (layer, layer.forward, lambda s, b, h, q, k, layer=layer: layer(s, b, h, q, k)):
            t = traced("attention", "score_mod", function)
            assert [x is y for x, y in zip(t.arrays, (layer.inner.slopes, layer.offset, layer.list[0]), strict=True)] == [True] * 3
            out = attention(*(x.detach() for x in (draw(), draw(), draw())), score_mod=function, engine="reference")
            out.sum().backward()
            assert layer.inner.slopes.grad.abs().max() > 0
        assert t.numbers in ((), (width,))


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_calls_it_outside_of_its_graph() -> None:
    q, k, v, module = draw(), draw(), draw(), Slopes()

    def step(q: Any, k: Any, v: Any) -> Any:
        return attention(2 * q, k, v, score_mod=module.score, engine="reference") * 3
    out = torch.compile(step, backend="eager")(q, k, v)
    same(out, step(q, k, v))
    same(torch.autograd.grad(out.sum(), [module.slopes])[0], torch.autograd.grad(step(q, k, v).sum(), [module.slopes])[0])


FRESH = """
import sys
import torch
from fastattn.torch import attention
table = torch.randn(9, requires_grad=True)
q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))

def step(q, k, v):
    return attention(2 * q, k, v, score_mod=lambda s, b, h, i, j: s + table[j], causal=True, engine="reference") * 3
want = step(q, k, v)
want.sum().backward()
assert table.grad is not None and "torch._dynamo" not in sys.modules, "calls that nobody compiles do without the compiler"
assert torch.allclose(torch.compile(step, backend="eager")(q, k, v), want)
try:
    torch.compile(lambda q, k, v: step(q, k, v) + 1, backend="eager", fullgraph=True)(q, k, v)
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_torchs_compiler_is_imported_by_those_who_use_it() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH], check=True, capture_output=True, text=True, timeout=300)
    assert "fastattn traces score_mod and mask_mod itself" in done.stdout


def test_only_what_is_asked_and_lse() -> None:
    q, k, v, table = draw(), draw().detach(), draw().detach(), draw(9)
    out, lse = attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[k], return_lse=True, engine="reference")
    (out.sum() + lse.sum()).backward()
    want = torch.logsumexp(torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5 + table, 3)
    lse_grad, = torch.autograd.grad(want.sum(), [table])
    assert q.grad is not None and table.grad.shape == table.shape
    alone = attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[k], return_lse=True, engine="reference")[1]
    same(torch.autograd.grad(alone.sum(), [table])[0], lse_grad)
    with torch.no_grad():
        assert not attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[k], engine="reference").requires_grad


def test_the_backward_uses_what_the_forward_traced() -> None:
    q, k, v = draw(), draw(), draw()
    factor = [0.5]

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * factor[0]
    out = attention(q, k, v, score_mod=mod, engine="reference")
    factor[0] = 2.0
    dq, = torch.autograd.grad(out.sum(), [q])
    want, = torch.autograd.grad(attention(q, k, v, softmax_scale=0.5 / 8**0.5, engine="reference").sum(), [q])
    same(dq, want)


def test_packed_sinks_and_blocks() -> None:
    q, k, v, sinks, table = draw(9, 4, 8), draw(9, 4, 8), draw(9, 4, 8), draw(4), draw(2, 9)
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    mask = fastattn.block_mask(lambda b, h, q, k: q >= k, None, None, 5, 5)
    out = attention_varlen(q, k, v, lengths, lengths, sinks=sinks, score_mod=lambda s, b, h, q, k, t: s + t[b, k], captured=(table,),
                           block_mask=mask, engine="reference")
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, sinks, table])
    bias = torch.stack([torch.nn.functional.pad(row[:5], (0, 0)).expand(5, 5) for row in table])[:, None]
    plain = attention_varlen(q, k, v, lengths, lengths, sinks=sinks, bias=bias.detach().requires_grad_(), causal=True, engine="reference")
    same(out, plain)
    for x, y in zip(grads[:4], torch.autograd.grad(plain.square().sum(), [q, k, v, sinks]), strict=True):
        same(x, y)
    assert not grads[4][:, 5:].any() and grads[4][:, :5].any()


def test_autocast_and_compile() -> None:
    q, k, v, table = (draw(*shape).detach().float().requires_grad_() for shape in (SHAPE, SHAPE, SHAPE, (9,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[k], engine="reference")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and table.grad.dtype == torch.float32


def test_errors() -> None:
    q, k, v = draw(), draw(), draw()
    with pytest.raises(TypeError, match=r"score_mod is inside torch.func.* loss.backward\(\)"):
        torch.func.grad(lambda q: attention(q, k, v, score_mod=lambda s, b, h, q, k: s, engine="reference").sum())(q.detach())
    with pytest.raises(TypeError, match=r"alibi_slopes requires grad.* score_mod="):
        attention(q, k, v, alibi_slopes=draw(4), mask_mod=lambda b, h, q, k: q >= k, engine="reference")
    table = draw(9)
    with pytest.raises(TypeError, match=r"table in score_mod requires grad"):
        fastattn.attention(q.detach(), k.detach(), v.detach(), score_mod=lambda s, b, h, q, k: s + table[k], engine="reference")
