"""fastattn.torch on a GPU: gradients, torch.compile, CUDA graphs, autocast, SDPA replaced in a model."""
from __future__ import annotations

import contextlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fastattn.torch import attention, attention_varlen, sdpa  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def draw(*shape: int, dtype: Any = None, grad: bool = True) -> Any:
    return torch.randn(shape, dtype=dtype or torch.bfloat16, device="cuda", requires_grad=grad)


def exact(q: Any, k: Any, v: Any, causal: bool = True) -> Any:
    """torch alone in float64, layout "bshd", as many queries as keys."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[3]**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(3) @ v.repeat_interleave(group, 1)).transpose(1, 2)


def near(got: Any, want: Any, bound: float) -> None:
    assert float((got.double() - want.double()).norm() / want.double().norm()) < bound


def with_grads(call: Any, inputs: list[Any], weights: Any) -> list[Any]:
    out = call(*inputs)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(dtype: Any, compiled: bool) -> None:
    inputs = [draw(2, 200, heads, 64, dtype=dtype) for heads in (4, 2, 2)]
    weights = torch.randn(2, 200, 4, 64, device="cuda")
    call = torch.compile(attention, fullgraph=True) if compiled else attention
    got, want = with_grads(lambda *x: call(*x, causal=True), inputs, weights), with_grads(exact, inputs, weights)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and a.is_cuda
        near(a, b, 1e-5 if dtype == torch.float32 else 0.01)


def test_packed() -> None:
    lengths = [70, 0, 130]
    cu = torch.tensor([0, 70, 70, 200], dtype=torch.int32, device="cuda")
    q, k, v = (draw(200, 4, 64) for _ in range(3))
    weights = torch.randn(200, 4, 64, device="cuda")
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    got = with_grads(lambda *x: attention_varlen(*x, cu, cu, causal=True, **longest), [q, k, v], weights)

    def parts(*x: Any) -> Any:
        return torch.cat([exact(*(y[None, first:first + n] for y in x))[0] for first, n in ((0, 70), (70, 130))])
    for a, b in zip(got, with_grads(parts, [q, k, v], weights), strict=True):
        near(a, b, 0.01)


def test_a_captured_training_step_follows_its_inputs() -> None:
    """Forward and backward in one CUDA graph; replays see what the inputs hold then."""
    inputs = [draw(2, 256, 4, 64) for _ in range(3)]
    weights = torch.randn(2, 256, 4, 64, device="cuda")

    def step() -> list[Any]:
        return with_grads(lambda *x: attention(*x, causal=True), inputs, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        with torch.no_grad():
            for x in inputs:
                x.normal_()
        graph.replay()
        for a, b in zip(results, with_grads(exact, inputs, weights), strict=True):
            near(a, b, 0.01)


def test_autocast_and_a_model() -> None:
    """A layer of torch that calls scaled_dot_product_attention, in autocast, with ours in its place."""
    layer = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, device="cuda")
    x = draw(2, 100, 128, dtype=torch.float32)
    results = []
    for where in (contextlib.nullcontext(), sdpa.replaced()):
        with where, torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        near(a, b, 0.02)


def test_the_gradient_of_a_bias_without_axes() -> None:
    q, bias = draw(1, 70, 2, 64), draw()
    got = with_grads(lambda q, bias: attention(q, q, q, bias=bias), [q, bias], torch.randn(1, 70, 2, 64, device="cuda"))
    # a constant changes no softmax: what is left of each of the 140 rows is the rounding of out, here about 1e-2
    assert got[2].shape == () and float(got[2].abs()) < 1
