"""fastattn.torch.attention and attention_varlen: results and gradients against torch alone in float64, the way without
a graph, dropout, checkpointing, autocast, and what is refused."""
from __future__ import annotations

import inspect
import timeit
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastattn  # noqa: E402
from fastattn import dropout_mask  # noqa: E402
from fastattn.dispatch import backward_again  # noqa: E402
from fastattn.torch import attention, attention_varlen  # noqa: E402
from fastattn.torch import autograd as recorded  # noqa: E402

Tensor = torch.Tensor


def draw(batch: int = 2, seqlen_q: int = 9, seqlen_k: int = 9, heads: int = 4, heads_k: int = 2, dim: int = 8, dim_v: int = 8,
         dtype: Any = torch.float32, grad: bool = True) -> list[Any]:
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_k, heads_k, dim), (batch, seqlen_k, heads_k, dim_v))
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def formula(q: Any, k: Any, v: Any, *, causal: bool = False, window: Any = (None, None), softcap: float | None = None,
            alibi_slopes: Any = None, bias: Any = None, mask: Any = None, sinks: Any = None, keep: Any = None,
            dropout_p: float = 0.0) -> tuple[Any, Any]:
    """(out, lse) by torch alone, in float64, layout "bshd". `keep` is a dropout mask."""
    group, rows, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3]**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)             # of a key from the diagonal
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double().reshape(-1, q.shape[1], 1, 1) * distance.abs()
    scores = scores if bias is None else scores + bias.double()
    allowed = torch.ones(rows, keys, dtype=torch.bool) if mask is None else mask
    allowed = allowed & (distance <= 0) if causal else allowed
    left, right = window
    allowed = allowed if left is None else allowed & (distance >= -left)
    allowed = allowed if right is None else allowed & (distance <= right)
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(3)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    weights = (scores - lse[..., None]).exp()
    weights = weights if keep is None else weights * keep / (1 - round(dropout_p * 65536) / 65536)
    return (weights @ v).transpose(1, 2), lse


def near(got: Any, want: Any, text: str = "") -> None:
    want = want.detach()
    scale = float(want.abs().max())
    assert float((got.detach().double() - want).abs().max()) < 5e-6 * max(scale, 1.0), text


def same_gradients(call: Any, exact: Any, inputs: list[Any]) -> None:
    """`call` and `exact` of inputs give (out, lse); the results and the gradients of a loss of both agree."""
    got, want = call(*inputs), exact(*inputs)
    weights = [torch.randn_like(x) for x in want]
    near(got[0], want[0])
    near(got[1], want[1])
    grads = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(results, weights, strict=True)), inputs) for results in (got, want)]
    for n, (a, b) in enumerate(zip(*grads, strict=True)):
        near(a, b, f"gradient of input {n}")
        assert a.dtype == inputs[n].dtype and a.shape == inputs[n].shape


# ---------------------------------------------------------------- results and gradients
FEATURES: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (3, 1)}, {"softcap": 2.0}, {"mask": True, "alibi_slopes": True},
                                  {"layout": "bhsd", "causal": True}, {"dropout_p": 0.3, "seed": 2**63 + 5, "offset": 7}]


@pytest.mark.parametrize("options", FEATURES, ids=str)
def test_gradients_are_those_of_the_formula(options: dict[str, Any]) -> None:
    """q, k, v, bias and sinks, through out and lse."""
    options = dict(options)
    if options.get("mask"):
        options |= {"mask": torch.rand(2, 1, 9, 9) > 0.3, "alibi_slopes": torch.rand(4)}
    exact = dict(options)
    if "seed" in options:
        del exact["seed"], exact["offset"]
        exact["keep"] = torch.from_numpy(dropout_mask(2, 4, 9, 9, **options))
    layout = exact.pop("layout", "bshd")
    inputs = [*draw(), torch.randn(1, 4, 9, 9, requires_grad=True), torch.randn(4, requires_grad=True)]

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        if layout == "bhsd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
        return (out.transpose(1, 2) if layout == "bhsd" else out), lse
    same_gradients(call, lambda q, k, v, bias, sinks: formula(q, k, v, bias=bias, sinks=sinks, **exact), inputs)


def test_packed_gradients() -> None:
    """Two sequences, of 4 and 5 rows, and a key of no sequence."""
    inputs = [x.detach().flatten(0, 1)[:n].clone().requires_grad_() for x, n in zip(draw(1, 12, 12), (9, 10, 10), strict=True)]
    lengths_q, lengths_k = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 4, 9])
    slopes = torch.rand(2, 4)

    def exact(q: Any, k: Any, v: Any) -> Any:
        parts = [formula(q[None, a:b], k[None, a:b], v[None, a:b], causal=True, alibi_slopes=slopes[n])
                 for n, (a, b) in enumerate(((0, 4), (4, 9)))]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    for used in (None, torch.tensor([4, 5])):
        same_gradients(lambda q, k, v, used=used: attention_varlen(q, k, v, lengths_q, lengths_k, causal=True, alibi_slopes=slopes,
                                                                   seqused_k=used, max_seqlen_q=5, return_lse=True), exact, inputs)
    out = attention_varlen(*inputs, [0, 4, 9], [0, 4, 9], causal=True)          # lists, as fastattn takes them
    assert torch.equal(out, attention_varlen(*inputs, lengths_q, lengths_k, causal=True))


def test_gradcheck() -> None:
    q, k, v = draw(1, 3, 4, 2, 1, 3, 2, torch.float64)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)            # broadcasts over the batch and the rows
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    call: Any = lambda *x: attention(*x[:3], bias=x[3], sinks=x[4], window=(2, None), return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))
    assert torch.autograd.gradcheck(lambda *x: call(*x)[1], (q, k, v, bias, sinks))      # out unused


def test_batched_gradients() -> None:
    """torch.autograd's own vectorized Jacobian, of a graph that was recorded outside of any transform."""
    q, k, v = draw(1, 3, 4, dtype=torch.float64)

    def call(q: Any) -> Any:
        return attention(q, k, v).sum((0, 1, 2))
    plain, batched = (torch.autograd.functional.jacobian(call, q, vectorize=vectorize) for vectorize in (False, True))
    assert torch.equal(plain, batched)


@pytest.mark.parametrize("needed", range(5))
def test_one_input_alone_requires_grad(needed: int) -> None:
    q, k, v = draw(grad=False)
    inputs = [q, k, v, torch.randn(4, 9, 9), torch.randn(4)]
    inputs[needed].requires_grad_()
    out = attention(*inputs[:3], bias=inputs[3], sinks=inputs[4])
    want, _ = formula(*inputs[:3], bias=inputs[3], sinks=inputs[4])
    weight = torch.randn_like(want)
    near(*[torch.autograd.grad((x * weight).sum(), inputs[needed])[0] for x in (out, want)])


# ---------------------------------------------------------------- without a graph
def test_without_a_graph_it_is_fastattns_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, no operator, no autograd.Function; parameters count as tensors where grad mode is off."""
    q, k, v = draw()
    plain = [x.detach() for x in (q, k, v)]
    want, lse = fastattn.attention(*plain, causal=True, return_lse=True)
    packed = fastattn.attention_varlen(*[x[0] for x in plain], [0, 9], [0, 9])
    for name in ("attend", "attend_plain"):                 # a call of one would be a TypeError
        monkeypatch.setattr(f"fastattn.torch.functions.{name}", None)
    got = attention(*plain, causal=True, return_lse=True)
    assert torch.equal(got[0], want) and torch.equal(got[1], lse) and not got[0].requires_grad
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(attention(torch.nn.Parameter(q), k, v, causal=True), want)
            assert torch.equal(attention_varlen(q[0], k[0], v[0], [0, 9], [0, 9]), packed)
    mixed = attention(plain[0], plain[1].numpy(), plain[2].numpy(), causal=True)
    assert torch.equal(mixed, want)                         # arrays of other libraries too
    with pytest.raises(TypeError, match="NoneType"):
        attention(q, k, v)


def test_the_way_without_a_graph_costs_3_us() -> None:
    """Where an empty call of Python takes 40 ns or less; as much longer as that on a machine that is slow or busy. The best of many rounds,
    round robin."""
    q, k, v = draw(1, 1, 1, 1, 1, grad=False)
    calls = [lambda: None, lambda: fastattn.attention(q, k, v, causal=True), lambda: attention(q, k, v, causal=True)]
    for _ in range(5):
        rounds = [[timeit.timeit(call, number=50) / 50 * 1e6 for call in calls] for _ in range(100)]
        empty, plain, ours = (min(column) for column in zip(*rounds, strict=True))
        if ours - plain < max(3.0, 3.0 * empty / 0.04):
            return
    pytest.fail(f"{ours:.1f} us instead of {plain:.1f} us; an empty call takes {empty:.3f} us")


def test_keywords_are_those_of_fastattn() -> None:
    for ours, theirs in ((attention, fastattn.attention), (attention_varlen, fastattn.attention_varlen)):
        here, there = (inspect.signature(function).parameters for function in (ours, theirs))
        missing = ("out", "stream", "q_scale", "k_scale", "v_scale", "out_dtype", "out_scale", "diagonal", "dropout_at", "dropout_heads")
        shared = [name for name in there if name not in missing]
        assert list(here) == [*shared[:-1], "deterministic", "engine"]
        assert all(p.default == there[name].default for name, p in here.items() if name != "deterministic")
        assert all(p.kind == there[name].kind for name, p in here.items() if name != "deterministic")


# ---------------------------------------------------------------- dropout
def test_dropout_draws_its_seed_from_torchs_generator() -> None:
    for inputs in (draw(), draw(grad=False)):
        torch.manual_seed(7)
        first, second = attention(*inputs, dropout_p=0.5), attention(*inputs, dropout_p=0.5)
        torch.manual_seed(7)
        assert torch.equal(attention(*inputs, dropout_p=0.5), first) and not torch.equal(first, second)
        torch.manual_seed(7)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
        assert torch.equal(attention(*inputs, dropout_p=0.5, seed=seed), first)
        assert torch.equal(attention(*inputs, dropout_p=0.5, seed=int(seed)), first)
        torch.manual_seed(7)
        attention(*inputs)                                  # without dropout nothing is drawn
        assert torch.equal(attention(*inputs, dropout_p=0.5), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_mask(reentrant: bool) -> None:
    inputs = draw()

    def block(q: Any, k: Any, v: Any) -> Any:
        return attention(q * 1.0, k, v, dropout_p=0.5).sin()
    torch.manual_seed(3)
    want = block(*inputs)
    grads = torch.autograd.grad(want.sum(), inputs)
    torch.manual_seed(3)
    got = checkpoint(block, *inputs, use_reentrant=reentrant)
    torch.rand(5)                                           # the generator has moved on when the block is recomputed
    got.sum().backward()
    assert torch.equal(got, want) and all(torch.equal(x.grad, g) for x, g in zip(inputs, grads, strict=True))


# ---------------------------------------------------------------- autocast
def test_autocast() -> None:
    """q, k and v as torch's own attention has them; a float32 bias stays; gradients come in the inputs' dtypes."""
    inputs = [*draw(), torch.randn(4, 9, 9, requires_grad=True), torch.randn(4, requires_grad=True)]

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        return attention(q, k, v, bias=bias, sinks=sinks, causal=True)
    halves = [x.detach().bfloat16() for x in inputs[:3]]
    want = call(*halves, *[x.detach() for x in inputs[3:]])
    with torch.autocast("cpu", torch.bfloat16):
        got = call(*inputs)
        heads_first = [x.transpose(1, 2) for x in inputs[:3]]
        torchs = torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True)
        mixed = attention(halves[0], *inputs[1:3])
        with torch.no_grad():
            plain = call(*inputs)
        assert attention(*[x.double() for x in inputs[:3]]).dtype == torch.float64
        assert attention(*halves, bias=torch.randn(4, 9, 9).half()).dtype == torch.bfloat16
        packed = attention_varlen(*[x[0] for x in inputs[:3]], [0, 9], [0, 9])
    assert got.dtype == torchs.dtype == mixed.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(plain, want)
    grads = torch.autograd.grad(got.float().square().sum(), inputs)
    assert all(g.dtype == torch.float32 and float(g.abs().max()) > 0 for g in grads)


# ---------------------------------------------------------------- what is refused
def test_second_derivatives_are_refused() -> None:
    q, k, v = draw()
    dq, = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    assert torch.equal(dq, torch.autograd.grad(attention(q, k, v).square().sum(), q)[0])
    with pytest.raises(RuntimeError, match=r"attention\(\): its gradient is differentiated once more; expected first derivatives only"):
        dq.sum().backward()
    with pytest.raises(RuntimeError, match="differentiated once more"):
        torch.func.jacrev(torch.func.jacrev(lambda q: attention(q, k.detach(), v.detach()).square().sum()))(q.detach())


def test_forward_mode_is_refused() -> None:
    q, k, v = draw(grad=False)
    text = r"attention\(\): a tensor carries a forward-mode tangent .* expected none"
    for transform in (lambda: torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,)),
                      lambda: torch.func.hessian(lambda q: attention(q, k, v).square().sum())(q)):
        with pytest.raises(NotImplementedError, match=text):
            transform()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(TypeError, match="carries a forward-mode tangent"):
            attention(dual, k, v)
        with pytest.raises(NotImplementedError, match=text):
            attention(dual, k.clone().requires_grad_(), v)
        assert attention(q, k.clone().requires_grad_(), v).requires_grad


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"out": 1}, TypeError, "out is no keyword of fastattn.torch.attention, because the result's graph needs memory of its own"),
    ({"stream": 1}, TypeError, "stream is no keyword of fastattn.torch.attention"),
    ({"diagonal": 3}, TypeError, "diagonal is no keyword of fastattn.torch.attention, because a call that torch"),
    ({"out_dtype": "float32"}, TypeError, "out_dtype is no keyword of fastattn.torch.attention, because autograd wants gradients in"),
    ({"is_causal": True}, TypeError, "is_causal is no keyword of it; here it is causal="),
    ({"layout": "thd"}, ValueError, "layout is 'thd'; expected 'bshd' or 'bhsd'"),
    ({"causal": "left"}, ValueError, "causal is 'left'; expected False, True"),
    ({"window": 3}, ValueError, "window is 3; expected a pair"),
    ({"softmax_scale": "a"}, TypeError, "softmax_scale is 'a'; expected a finite number"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p is 2.0; expected a probability"),
    ({"dropout_p": 0.5, "seed": 1.5}, TypeError, "seed is 1.5; expected an integer"),
    ({"dropout_p": 0.5, "seed": 2**64}, ValueError, "seed is"),
    ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, TypeError, "seed is tensor(1.); expected an integer"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, TypeError, "alibi_slopes requires grad"),
    ({"bias": np.zeros((9, 9), np.float32)}, TypeError, "bias is ndarray; expected a torch.Tensor"),
    ({"mask": torch.ones(9, 9)}, TypeError, "mask has dtype float32; expected bool"),
    ({"engine": "cuda"}, ValueError, "engine")
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=lambda x: str(x)[:30] if isinstance(x, dict) else None)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        attention(*draw(), **options)
    assert str(caught.value).startswith("attention()") and text in str(caught.value)


def test_options_are_values() -> None:
    inputs = draw()
    want = attention(*inputs, causal=True, softmax_scale=0.5, window=(3, None))
    assert torch.equal(attention(*inputs, causal=np.bool_(True), softmax_scale=np.float32(0.5), window=[torch.tensor(3), None]), want)


def test_dtypes_of_one_call_differ() -> None:
    q, k, v = draw()
    with pytest.raises(TypeError, match=r"k has dtype float32; expected q's dtype, bfloat16; k\.to\(q\.dtype\) works"):
        attention(q.bfloat16(), k, v)


def test_saved_tensors_do_not_outlive_their_values() -> None:
    """As with torch's own operators: an input that is written to between forward and backward is an error."""
    q, k, v = draw()
    scaled = q * 1.0
    out = attention(scaled, k, v)
    scaled.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_deterministic_is_read_when_the_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def backward(call: str, engine: Any, options: Any, layout: str, deterministic: bool, *more: Any, **keywords: Any) -> Any:
        seen.append(deterministic)
        return backward_again(call, engine, options, layout, deterministic, *more, **keywords)
    monkeypatch.setattr("fastattn.torch.autograd.backward_again", backward)
    attention(*draw(), deterministic=True).sum().backward()
    attention(*draw()).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        out = attention(*draw())
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert seen == [True, False, True]


def test_eager_training_does_not_take_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "forward", None)
    monkeypatch.setattr(recorded, "backward", None)
    attention(*draw()).sum().backward()


def test_8_bit_operands_have_no_graph() -> None:
    q = torch.randn(1, 16, 2, 8, requires_grad=True)
    eight = torch.randn(1, 16, 2, 8).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^attention\(\): k has dtype float8_e4m3fn; expected 16 bits or more, .*no backward"):
        attention(q, eight, eight)
    with pytest.raises(TypeError, match=r"^attention\(\): q has dtype float8_e4m3fn"):
        torch.compile(lambda x: attention(x, x, x), backend="eager")(eight)
    assert attention(eight, eight, eight).dtype == torch.bfloat16         # outside graphs it is fastattn.attention
