"""The operators behind fastattn.torch, in each of torch's machines: opcheck, torch.compile, torch.export, make_fx, fake and
meta tensors, torch.func, and CUDA graphs."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastattn  # noqa: E402
from fastattn.torch import attention, attention_varlen, operators  # noqa: E402


def draw(seqlen: int = 9, dtype: Any = torch.float32, grad: bool = True, device: str = "cpu") -> list[Any]:
    return [torch.randn(2, seqlen, heads, 8, dtype=dtype, device=device, requires_grad=grad) for heads in (4, 2, 2)]


def arguments(q: Any, k: Any, v: Any, **given: Any) -> operators.Arguments:
    """An operator's arguments, with the defaults of a public call."""
    empty = dict.fromkeys(operators.Arguments._fields)
    usual = {"causal": "", "dropout_p": 0.0, "offset": 0, "layout": "bshd", "deterministic": False, "q": q, "k": k, "v": v}
    return operators.Arguments(**(empty | usual | given))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)  # type: ignore[no-any-return]


def same_in_both(function: Callable[..., Any], fast: Callable[..., Any], inputs: list[Any], **keywords: Any) -> None:
    """Results and gradients of a function and of its compiled form are the same bits."""
    want, got = function(*inputs, **keywords), fast(*inputs, **keywords)
    weight = torch.randn_like(want)
    assert torch.equal(got, want) and got.stride() == want.stride()
    for a, b in zip(*[torch.autograd.grad((x * weight).sum(), inputs) for x in (got, want)], strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


# ---------------------------------------------------------------- the rules
def variants() -> dict[str, Any]:
    bias, sinks = torch.randn(4, 9, 9, requires_grad=True), torch.randn(4, requires_grad=True)
    cu = torch.tensor([0, 7, 18])
    return {
        "plain": arguments(*draw()),
        "features": arguments(*draw(), bias=bias, sinks=sinks, mask=torch.rand(2, 1, 9, 9) > 0.3, alibi_slopes=torch.rand(4),
                              causal="top_left", window_left=5, softcap=3.0, dropout_p=0.3, seed=torch.tensor(5), offset=2),
        "heads first": arguments(*[x.detach().transpose(1, 2).requires_grad_() for x in draw()], layout="bhsd", causal="bottom_right"),
        "bfloat16": arguments(*draw(dtype=torch.bfloat16)),
        "packed": arguments(*[x.detach().flatten(0, 1).requires_grad_() for x in draw()], cu_seqlens_q=cu, cu_seqlens_k=cu,
                            seqused_k=torch.tensor([3, 11]), layout="thd", max_seqlen_q=11)
    }


@pytest.mark.parametrize("name", ["plain", "features", "heads first", "bfloat16", "packed"])
def test_opcheck(name: str) -> None:
    """torch's own checks of an operator's schema, autograd registration, fake rule, and all of it under AOTAutograd."""
    a = variants()[name]
    torch.library.opcheck(operators.forward, tuple(a))
    plain = a._replace(**{field: x.detach() for field, x in a._asdict().items() if isinstance(x, torch.Tensor)})
    out, lse = operators.forward(*plain)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(operators.backward, (torch.randn_like(out), dlse, out, lse, plain.bias is not None, *plain))


@pytest.mark.parametrize("name", ["plain", "features", "heads first", "bfloat16", "packed"])
def test_fake_results_are_like_real_ones(name: str) -> None:
    """Shape, dtype and strides, whatever the strides of the inputs."""
    a = variants()[name]
    a = a._replace(**{field: x.detach() for field, x in a._asdict().items() if isinstance(x, torch.Tensor)})
    a = a._replace(q=a.q.flip(0), k=a.k.expand(a.k.shape), v=torch.cat((a.v, a.v), -1)[..., ::2])
    out, lse = operators.forward(*a)
    real = (out, lse, *operators.backward(out.transpose(0, 1).contiguous().transpose(0, 1), None, out, lse, a.bias is not None, *a))
    with FakeTensorMode() as mode:
        b = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in a]
        fake_out, fake_lse = operators.forward(*b)
        fake = (fake_out, fake_lse, *operators.backward(fake_out, None, fake_out, fake_lse, a.bias is not None, *b))
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


def test_every_rule_is_registered() -> None:
    """Those of CUDA too, which no machine without a GPU calls."""
    for name, keys in ((operators.FORWARD, ("AutocastCPU", "AutocastCUDA")), (operators.BACKWARD, ())):
        for key in (*keys, "CompositeExplicitAutograd", "Meta", "Autograd", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has no rule for {key}"


def test_shapes_without_memory() -> None:
    for layout, out_shape in (("bshd", (2, 9, 4, 8)), ("bhsd", (2, 4, 9, 8))):
        meta = draw(device="meta")
        inputs = [x.transpose(1, 2) for x in meta] if layout == "bhsd" else meta
        out, lse = attention(*inputs, return_lse=True, layout=layout)
        assert (out.shape, out.device.type, lse.shape, lse.dtype) == (out_shape, "meta", (2, 4, 9), torch.float32)
        out.sum().backward()
        assert meta[1].grad.shape == (2, 9, 2, 8)
    with pytest.raises(ValueError, match=r"attention\(\): k has 3 heads; expected a divisor of q's num_heads = 4"):
        attention(torch.empty(1, 2, 4, 8, device="meta"), *[torch.empty(1, 2, 3, 8, device="meta")] * 2)


# ---------------------------------------------------------------- compile, export, record
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    """One graph; the same bits as eager; one more compilation covers all lengths, another one all seeds."""
    def function(q: Any, k: Any, v: Any, seed: int = 3, offset: int = 0, left: int = 9, scale: float = 0.5) -> Any:
        out = attention(q * 1.0, k, v, causal=True, window=(left, None), softmax_scale=scale, dropout_p=0.5, seed=seed, offset=offset)
        return out * 2.0
    fast = compiled(function, backend)
    for seqlen in (9, 16, 23, 31):
        same_in_both(function, fast, draw(seqlen))
    assert counters["stats"]["unique_graphs"] == 2
    for seed in (5, 6, 7, -3, 2**62):
        same_in_both(function, fast, draw(31), seed=seed)
    assert counters["stats"]["unique_graphs"] <= 4
    if backend == "aot_eager":
        for n in range(4):
            same_in_both(function, fast, draw(31), offset=n)
            same_in_both(function, fast, draw(31), left=n)
            same_in_both(function, fast, draw(31), scale=0.5 + n)


def test_compile_with_everything() -> None:
    mask, slopes = torch.rand(9, 9) > 0.3, torch.rand(4)

    def function(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        out, lse = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias=bias, sinks=sinks, mask=mask,
                             alibi_slopes=slopes, softcap=2.0, layout="bhsd", return_lse=True)
        return out * lse[..., None]
    inputs = [*draw(), torch.randn(4, 9, 9, requires_grad=True), torch.randn(4, requires_grad=True)]
    same_in_both(function, compiled(function), inputs)


def test_compile_packed() -> None:
    """New lengths of the same number of sequences, and of another number, need no new graph after the second."""
    def function(q: Any, k: Any, v: Any, cu: Any) -> Any:
        return attention_varlen(q * 1.0, k, v, cu, cu, causal=True)
    fast = compiled(function)
    for lengths in ([0, 3, 9], [0, 4, 9], [0, 3, 5, 12], [0, 1, 2, 3, 15]):
        inputs = [x.detach()[0].requires_grad_() for x in draw(lengths[-1])]
        same_in_both(function, fast, inputs, cu=torch.tensor(lengths))
    assert counters["stats"]["unique_graphs"] == 2


def test_compile_draws_new_masks() -> None:
    """Without a seed each call of a compiled function draws one; its backward uses the same."""
    fast = compiled(lambda q, k, v: attention(q, k, v, dropout_p=0.5))
    q, k, v = draw(dtype=torch.float64)
    torch.manual_seed(3)
    first, second = fast(q, k, v), fast(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(fast(q, k, v), first) and not torch.equal(first, second)
    seed = torch.tensor(11)
    given = compiled(lambda q, k, v, seed: attention(q, k, v, dropout_p=0.5, seed=seed))
    assert torch.equal(given(q, k, v, seed), attention(q, k, v, dropout_p=0.5, seed=11))
    assert torch.equal(given(q, k, v, seed + 1), attention(q, k, v, dropout_p=0.5, seed=12))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_dropout_is_one_mask(checkpointed: bool) -> None:
    """The gradient of a compiled function with dropout is that of its own forward: compared with a difference."""
    def block(q: Any, k: Any, v: Any) -> Any:
        return attention(q * 1.0, k, v, dropout_p=0.5).sin()
    fast = compiled(lambda *x: (checkpoint(block, *x, use_reentrant=False) if checkpointed else block(*x)).sum())
    inputs, step = draw(dtype=torch.float64), 1e-6
    direction = [torch.randn_like(x) for x in inputs]

    def value(scale: float) -> Any:
        torch.manual_seed(4)
        return fast(*[x + scale * d for x, d in zip(inputs, direction, strict=True)])
    grads = torch.autograd.grad(value(0.0), inputs)
    along = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    assert abs(float((value(step) - value(-step)).detach()) / (2 * step) - along) < 1e-5 * abs(along) + 1e-6


def test_compile_under_autocast() -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, causal=True)
    inputs = draw()
    same_in_both(function, compiled(function), inputs)
    assert function(*inputs).dtype == torch.bfloat16


def test_a_wrong_call_is_an_error_of_the_compiler() -> None:
    q, k, v = draw()
    with pytest.raises(Exception, match=r"k has 3 heads; expected a divisor of q's num_heads = 4"):
        compiled(attention, dynamic=False)(q, torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8))
    with pytest.raises(Exception, match=r"seed is 2\*\*63 or more"):
        compiled(lambda q, k, v: attention(q, k, v, dropout_p=0.5, seed=2**63))(q, k, v)


def test_plain_calls_end_the_graph_once() -> None:
    """fastattn.attention itself is left alone by the compiler, which names fastattn.torch."""
    q, k, v = draw(grad=False)
    fastattn.attention(q, k, v)

    def function(q: Any) -> Any:
        return fastattn.attention(q * 2, k, v).sin()
    assert torch.equal(torch.compile(function, backend="eager")(q), function(q))
    assert sum(counters["graph_break"].values()) == 1 and counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"fastattn\.torch\.attention can be compiled"):
        compiled(function)(q)


class Module(torch.nn.Module):
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    length = torch.export.Dim("length")
    program = torch.export.export(Module(), tuple(draw(grad=False)), strict=strict, dynamic_shapes=({1: length},) * 3)
    assert "fastattn.attention" in str(program)
    for exported in (program, program.run_decompositions()):
        inputs = draw(30)
        assert torch.equal(exported.module()(*inputs), Module()(*inputs))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    inputs = draw(grad=False)
    graph = make_fx(Module(), tracing_mode=mode)(*inputs)
    assert "fastattn.attention" in graph.code
    inputs = draw(20, grad=False) if mode == "symbolic" else draw(grad=False)
    assert torch.equal(graph(*inputs), Module()(*inputs))

    def gradient(q: Any, k: Any, v: Any) -> Any:
        return torch.autograd.grad(attention(q, k, v).square().sum(), q)[0]
    graph = make_fx(gradient, tracing_mode=mode)(*draw())
    assert "fastattn.attention_backward" in graph.code
    inputs = draw()
    assert torch.equal(graph(*inputs), gradient(*inputs))


def test_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))
    with Mode():
        attention(*draw()).sum().backward()
    assert "fastattn.attention.default" in seen and "fastattn.attention_backward.default" in seen


# ---------------------------------------------------------------- torch.func
def test_vmap() -> None:
    """Over any argument, of dense and packed calls."""
    stacked = [torch.stack([x, 2 * x, -x], dim=1) for x in draw(grad=False)]
    biases = torch.randn(3, 4, 9, 9)

    def one(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return attention(q, k, v, bias=bias, causal=True)
    got = torch.vmap(one, in_dims=(1, 1, 1, 0))(*stacked, biases)
    want = [one(*[x[:, n] for x in stacked], biases[n]) for n in range(3)]
    assert torch.equal(got, torch.stack(want))
    assert torch.equal(torch.compile(torch.vmap(one, in_dims=(1, 1, 1, 0)), fullgraph=True, backend="aot_eager")(*stacked, biases), got)
    q, k, v = (x[:, 0] for x in stacked)
    assert torch.equal(torch.vmap(lambda bias: one(q, k, v, bias))(biases)[1], one(q, k, v, biases[1]))
    cu = torch.tensor([[0, 2, 9], [0, 5, 9]])
    packed = torch.vmap(lambda cu: attention_varlen(q[0], k[0], v[0], cu, cu))(cu)
    assert torch.equal(packed[1], attention_varlen(q[0], k[0], v[0], cu[1], cu[1]))


def test_gradients_inside_torch_func() -> None:
    q, k, v = draw(grad=False)
    sinks = torch.randn(3, 4)

    def loss(q: Any, sinks: Any) -> Any:
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        return (out.square().sum() + lse.sin().sum())

    def eager(q: Any, sinks: Any) -> Any:
        q, sinks = q.clone().requires_grad_(), sinks.clone().requires_grad_()
        return torch.autograd.grad(loss(q, sinks), (q, sinks))
    want = [eager(q, sinks[n]) for n in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(torch.func.grad(loss, argnums=(0, 1))(q, sinks[0]), want[0], strict=True))
    each = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(q, sinks)
    for n in range(3):
        assert torch.equal(each[0][n], want[n][0]) and torch.equal(each[1][n], want[n][1])
    rows = torch.func.jacrev(lambda q: attention(q, k, v)[0, 0, 0])(q)
    out = attention(q.requires_grad_(), k, v)[0, 0, 0]
    for n in range(8):
        assert torch.equal(rows[n], torch.autograd.grad(out[n], q, retain_graph=True)[0])


def test_dropout_under_vmap_follows_torchs_randomness() -> None:
    stacked = [torch.stack([x, x]) for x in draw(grad=False)]

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(*stacked)
    same = torch.vmap(call, randomness="same")(*stacked)
    different = torch.vmap(call, randomness="different")(*stacked)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_vmap_is_one_call_where_entries_can_be_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with in_dims anywhere and an argument that all entries share."""
    q, k, v = (torch.randn(2, 3, *x.shape[1:]).movedim(1, 2) for x in draw(grad=False))      # (batch, seqlen, entries, heads, dim)
    bias, shared = torch.randn(1, 4, 1, 9), v[:, :, 0]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, bias=bias, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), causal=True).square().sum()
    want = [torch.func.grad(loss, argnums=(0, 1, 2))(q[:, :, n], k[:, :, n], shared) for n in range(3)]
    calls: list[str] = []
    for name in ("attention", "attention_backward"):
        own = getattr(fastattn, name)
        monkeypatch.setattr(fastattn, name, lambda *a, own=own, name=name, **keywords: calls.append(name) or own(*a, **keywords))
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(2, 2, None))(q, k, shared)
    assert calls == ["attention", "attention_backward"]
    for n in range(3):
        assert all(torch.equal(a[n], b) for a, b in zip(got, want[n], strict=True))
    calls.clear()
    torch.vmap(loss, in_dims=(2, 2, None))(q, k, shared)
    torch.vmap(lambda q, sinks: attention(q, shared[:, :, :2], shared[:, :, :2], sinks=sinks))(q.movedim(2, 0), torch.randn(3, 4))
    assert calls == ["attention"] * 4
    rows = torch.randn(2, 1, 1, 9)                          # shared by the entries, but not by the batch
    for name, x in (("bias", rows), ("mask", rows > -1), ("alibi_slopes", torch.rand(2, 4))):
        got = torch.vmap(lambda q, given=(name, x): attention(q, shared[:, :, :2], shared[:, :, :2], **dict([given])), in_dims=2)(q)
        assert torch.equal(got[2], attention(q[:, :, 2], shared[:, :, :2], shared[:, :, :2], **{name: x}))


# ---------------------------------------------------------------- CUDA
@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch built for it")
    return "cuda"


@pytest.mark.gpu
def test_opcheck_on_a_device(cuda: str) -> None:
    torch.library.opcheck(operators.forward, tuple(arguments(*draw(dtype=torch.bfloat16, device=cuda), causal="bottom_right")))


@pytest.mark.gpu
def test_cuda_graphs_replay_forward_and_backward(cuda: str) -> None:
    inputs = draw(64, torch.bfloat16, device=cuda)
    dout = torch.randn(2, 64, 4, 8, dtype=torch.bfloat16, device=cuda)

    def step() -> tuple[Any, ...]:
        out = attention(*inputs, causal=True)
        return (out, *torch.autograd.grad(out, inputs, dout))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                           # kernels are compiled before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(results, step(), strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_on_a_device(cuda: str, mode: str) -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return attention(q * 1.0, k, v, causal=True).sin()
    fast = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(3):
        inputs = draw(64, torch.bfloat16, device=cuda)
        got, want = fast(*inputs), function(*inputs)
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
        grads = [torch.autograd.grad(x.float().square().sum(), inputs) for x in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_autocast_on_a_device(cuda: str) -> None:
    inputs = draw(64, device=cuda)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(*inputs)
    assert out.dtype == torch.bfloat16 and torch.autograd.grad(out.float().sum(), inputs)[2].dtype == torch.float32
