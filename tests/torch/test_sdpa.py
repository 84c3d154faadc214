"""fastattn.torch.sdpa against torch's own scaled_dot_product_attention: results, gradients, compiled; and putting it in
torch's place."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from fastattn import UnsupportedError  # noqa: E402
from fastattn.torch import sdpa  # noqa: E402

TORCHS = functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def torchs_own_comes_back() -> Iterator[None]:
    yield
    assert functional.scaled_dot_product_attention is TORCHS and not sdpa._replaced


SHAPES = {"four axes": ((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 6)), "grouped": ((2, 4, 9, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
          "three axes": ((4, 9, 8), (4, 7, 8), (4, 7, 6)), "two axes": ((9, 8), (7, 8), (7, 6)),
          "five axes": ((3, 2, 4, 9, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8)),
          "broadcast": ((3, 2, 4, 9, 8), (1, 2, 4, 7, 8), (3, 1, 1, 7, 6))}
MASKS = {"none": None, "causal": None, "two axes": (9, 7), "heads": (4, 9, 7), "batch": (2, 1, 1, 7)}


CASES = [(name, mask, boolean) for name, shapes in SHAPES.items() for mask, shape in MASKS.items() for boolean in (False, True)
         if (not boolean if shape is None else len(shape) <= len(shapes[0]))]


@pytest.mark.parametrize(("name", "mask", "boolean"), CASES)
def test_it_is_torchs(name: str, mask: str, boolean: bool) -> None:
    """Results and gradients, of a float mask too. All but broadcast leading axes are compiled whole."""
    shapes, options = SHAPES[name], {"is_causal": mask == "causal", "enable_gqa": name == "grouped"}
    shape = MASKS[mask]
    inputs = [torch.randn(s, requires_grad=True) for s in shapes]
    if shape is not None:
        inputs.append(torch.rand(shape) > 0.3 if boolean else torch.randn(shape, requires_grad=True))
    wanted = inputs[:3] if boolean else inputs
    want, got = TORCHS(*inputs, **options), sdpa.scaled_dot_product_attention(*inputs, **options)
    weight = torch.randn_like(want)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    grads = [torch.autograd.grad((x * weight).sum(), wanted) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)
    if name != "broadcast" and mask == ("two axes" if boolean else "causal"):
        torch._dynamo.reset()
        fast = torch.compile(sdpa.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(fast(*inputs, **options), got)


def test_autocast_and_dropout() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa.scaled_dot_product_attention(q, k, v).dtype == TORCHS(q, k, v).dtype == torch.bfloat16
    torch.manual_seed(3)
    first = sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)


def test_errors_have_torchs_names() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention\(\): attn_mask is given beside is_causal=True"):
        sdpa.scaled_dot_product_attention(q, k, v, torch.ones(9, 9), is_causal=True)
    with pytest.raises(ValueError, match=r"key has shape .* enable_gqa=True lets groups"):
        sdpa.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(TypeError, match=r"scaled_dot_product_attention\(\): key has dtype float64; expected query's dtype, float32"):
        sdpa.scaled_dot_product_attention(q, k.double(), v)


# ---------------------------------------------------------------- in torch's place
def model() -> Any:
    return torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def test_a_model_runs_on_it_and_torchs_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of an nn.TransformerEncoderLayer, eager and compiled."""
    layer, x, calls = model(), torch.randn(2, 5, 16), []
    own = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    want = copy.deepcopy(layer)
    want(x).square().sum().backward()
    assert not calls
    with sdpa.replaced():
        layer(x).square().sum().backward()
    assert calls == [1]
    for a, b in zip(layer.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    with sdpa.replaced():
        torch._dynamo.reset()
        fast = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(fast, want(x), atol=1e-5, rtol=1e-4)
        graph = torch.export.export(layer, (x,)).graph
    assert "fastattn.attention" in str(graph)


def test_installing_nests_and_is_undone() -> None:
    sdpa.install()
    assert functional.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    with sdpa.replaced(unsupported="torch"):
        assert functional.scaled_dot_product_attention not in (sdpa.scaled_dot_product_attention, TORCHS)
    assert functional.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), sdpa.replaced():
        _ = 1 / 0
    functional.scaled_dot_product_attention = len
    with pytest.raises(RuntimeError, match=r"uninstall\(\): .* is <built-in function len>"):
        sdpa.uninstall()
    functional.scaled_dot_product_attention = sdpa.scaled_dot_product_attention
    sdpa.uninstall()
    with pytest.raises(RuntimeError, match="nothing is installed"):
        sdpa.uninstall()
    with pytest.raises(ValueError, match="unsupported is 'ignore'; expected 'raise' or 'torch'"):
        sdpa.install(unsupported="ignore")


def unsupported() -> list[tuple[tuple[Any, ...], str]]:
    q = torch.randn(1, 2, 3, 8)
    wide = torch.randn(1, 2, 3, 600)
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)], layout=torch.jagged).transpose(1, 2)
    return [((wide, wide, q), "query has head_dim 600"), ((nested, nested, nested), "query is nested"),
            ((q.double(), q.double(), q.double(), torch.zeros(3, 3, dtype=torch.float16)), "attn_mask has dtype torch.float16")]


def test_unsupported_calls_raise_or_are_torchs() -> None:
    for (q, k, v, *mask), why in unsupported():
        assert sdpa.why_not(q, k, v, *mask) == why
        with sdpa.replaced(), pytest.raises((ValueError, TypeError, UnsupportedError, RuntimeError, NotImplementedError)):
            functional.scaled_dot_product_attention(q, k, v, *mask)
        if not mask:
            with sdpa.replaced(unsupported="torch"):
                got = functional.scaled_dot_product_attention(q, k, v)
            assert got.shape == TORCHS(q, k, v).shape
    q = torch.randn(1, 2, 3, 8)
    assert sdpa.why_not(q, q, q) is None
    with sdpa.replaced(unsupported="torch"), sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(lambda q: functional.scaled_dot_product_attention(q, q, q), (q,), (q,))
        assert tangent.shape == out.shape
        with pytest.raises(ValueError, match="key has"):    # wrong, not unsupported
            functional.scaled_dot_product_attention(q, q[:, :, :, :4], q)
