"""compat on CUDA tensors against the originals: torch's SDPA backends, torch's
varlen_attn and FlashAttention-4, where they are installed.

Outputs and gradients may have twice the original's error against float64, plus the rounding of the result.

    python -m pytest tests/compat/test_gpu.py
"""
from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import aten, flash_attn
from fastattn.compat.sdpa import scaled_dot_product_attention, scaled_dot_product_attention_backward
from fastattn.compat.varlen import AuxRequest, varlen_attn, varlen_attn_backward
from tests.tools.devices import requires_gpu

pytestmark = requires_gpu
DEVICE = "cuda"
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
LENGTHS = (300, 17, 0, 513, 1, 96)


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch without CUDA")
    return module


def draw(torch: Any, dtype: str, *shapes: tuple[int, ...]) -> list[Any]:
    generator = torch.Generator(DEVICE).manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, device=DEVICE).to(getattr(torch, dtype)) for shape in shapes]


def differentiate(torch: Any, function: Callable[..., Any], inputs: list[Any], dout: Any) -> list[Any]:
    """out and the gradients of the inputs by torch's autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def plain(torch: Any, q: Any, k: Any, v: Any, visible: Any = None, bias: Any = 0.0) -> Any:
    """Attention of (..., heads, L, E) by its formula, in the inputs' dtype; every row attends to some key."""
    group = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def band(torch: Any, L: int, S: int, left: int, right: int, shift: int = 0) -> Any:
    i, j = torch.arange(L, device=DEVICE)[:, None] + shift, torch.arange(S, device=DEVICE)
    return (j >= i - left if left >= 0 else True) & (j <= i + right if right >= 0 else j >= 0)


def hold(got: list[Any], exact: list[Any], rival: list[Any], who: str) -> None:
    for name, g, e, r in zip(("out", "dq", "dk", "dv", "dbias"), got, exact, rival, strict=False):
        assert g.shape == e.shape and g.dtype == r.dtype, f"{name}: {g.shape}, {g.dtype}"
        ours, theirs = (float((x.double() - e).norm()) for x in (g, r))
        allowed = 2 * theirs + EPS[str(g.dtype).removeprefix("torch.")] * float(e.norm())
        assert ours <= allowed, f"{name}: error {ours:.3e}, {who} has {theirs:.3e}, allowed {allowed:.3e}"


# ---------------------------------------------------------------- scaled_dot_product_attention
SDPA: dict[str, dict[str, Any]] = {             # (batch, heads, heads_k, L, S, E)
    "full": {"shape": (2, 4, 4, 300, 300, 64)},
    "full fp16 128": {"shape": (2, 4, 4, 257, 511, 128), "dtype": "float16"},
    "causal": {"shape": (2, 4, 4, 300, 300, 64), "is_causal": True},
    "causal top-left": {"shape": (2, 4, 4, 300, 170, 64), "is_causal": True},
    "causal 256": {"shape": (1, 2, 2, 300, 300, 256), "is_causal": True, "dtype": "float16"},
    "head_dim 61": {"shape": (2, 3, 3, 130, 190, 61)},
    "gqa": {"shape": (2, 8, 2, 260, 260, 128), "is_causal": True, "enable_gqa": True},
    "bool mask": {"shape": (2, 4, 4, 136, 200, 64), "mask": "bool"},
    "float mask": {"shape": (2, 4, 4, 136, 200, 64), "mask": "float", "dtype": "float16"},
    "scale": {"shape": (2, 4, 4, 136, 200, 64), "scale": 0.2},
}


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_against_each_backend(torch: Any, name: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    options = dict(SDPA[name])
    (batch, heads, heads_k, L, S, E), dtype, kind = options.pop("shape"), options.pop("dtype", "bfloat16"), options.pop("mask", None)
    q, k, v, dout, bias = draw(torch, dtype, (batch, heads, L, E), (batch, heads_k, S, E), (batch, heads_k, S, E), (batch, heads, L, E),
                               (batch, heads, L, S))
    inputs, mask = [q, k, v], None
    if kind == "bool":
        mask = bias > -0.5
        mask[..., 0] = True
    elif kind == "float":
        inputs.append(bias)
    visible = band(torch, L, S, -1, 0) if options.get("is_causal") else mask
    scale = options.get("scale")

    def formula(q: Any, k: Any, v: Any, bias: Any = 0.0) -> Any:
        return plain(torch, q if scale is None else q * (scale * E**0.5), k, v, visible, bias)
    exact = differentiate(torch, formula, [x.double() for x in inputs], dout.double())
    attn_mask = bias if kind == "float" else mask
    out, lse = scaled_dot_product_attention(q, k, v, attn_mask, return_lse=True, **options)
    grads = scaled_dot_product_attention_backward(dout, q, k, v, out, lse, attn_mask, **options)
    got, ran = [out, *[x for x in grads if x is not None]], []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        def rival(q: Any, k: Any, v: Any, bias: Any = mask, backend: Any = backend) -> Any:
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, **options)
        try:
            theirs = differentiate(torch, rival, inputs, dout)
        except (RuntimeError, NotImplementedError):         # this backend does not take it, or has no such gradient
            continue
        ran.append(backend)
        hold(got, exact, theirs, str(backend))
    if not ran:
        pytest.skip("none of torch's fused backends takes this")


def test_leading_axes_that_broadcast(torch: Any) -> None:
    q, k, v = draw(torch, "float16", (2, 3, 4, 70, 64), (1, 3, 4, 90, 64), (4, 90, 64))
    mask, dout = draw(torch, "float16", (2, 1, 1, 70, 90), (2, 3, 4, 70, 64))
    exact = differentiate(torch, lambda *x: plain(torch, *x[:3], None, x[3]), [x.double() for x in (q, k, v, mask)], dout.double())
    rival = differentiate(torch, lambda *x: plain(torch, *x[:3], None, x[3]), [q, k, v, mask], dout)
    out, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    hold([out, *scaled_dot_product_attention_backward(dout, q, k, v, out, lse, mask)], exact, rival, "the formula in float16")


# ---------------------------------------------------------------- packed
def exact_packed(torch: Any, q: Any, k: Any, v: Any, dout: Any, left: int, right: int) -> list[Any]:
    """The formula in float64 for each of LENGTHS, packed (total, heads, head_dim)."""
    parts = [differentiate(torch, lambda *x: plain(torch, *x, visible=band(torch, x[0].shape[1], x[0].shape[1], left, right)),
                           [x.double().transpose(0, 1) for x in tensors], d.double().transpose(0, 1))
             for *tensors, d in zip(*(torch.split(x, LENGTHS) for x in (q, k, v, dout)), strict=True)]
    return [torch.cat([part.transpose(0, 1) for part in x]) for x in zip(*parts, strict=True)]


def packed_inputs(torch: Any, dtype: str, heads: int, heads_k: int, dim: int) -> tuple[list[Any], Any, Any]:
    total = sum(LENGTHS)
    q, k, v, dout = draw(torch, dtype, (total, heads, dim), (total, heads_k, dim), (total, heads_k, dim), (total, heads, dim))
    cu = torch.from_numpy(np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)).to(DEVICE)
    return [q, k, v], dout, cu


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (64, 0)], ids=str)
def test_varlen_against_torchs(torch: Any, window: tuple[int, int]) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    inputs, dout, cu = packed_inputs(torch, "bfloat16", 4, 4, 128)
    longest = max(LENGTHS)
    exact = exact_packed(torch, *inputs, dout, *window)
    out, lse = varlen_attn(*inputs, cu, cu, longest, longest, return_aux=AuxRequest(lse=True), window_size=window)
    grads = varlen_attn_backward(dout, *inputs, out, lse, cu, cu, longest, longest, window_size=window)
    if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
        extra: dict[str, Any] = {"window_size": window}
    elif window[0] == -1:
        extra = {"is_causal": window[1] == 0}
    else:
        pytest.skip("this torch's varlen_attn has no window")
    rival = differentiate(torch, lambda *x: varlen.varlen_attn(*x, cu, cu, longest, longest, **extra), inputs, dout)
    hold([out, *grads], exact, rival, "varlen_attn")
    own_lse = varlen.varlen_attn(*inputs, cu, cu, longest, longest, return_aux=varlen.AuxRequest(lse=True), **extra)[1]
    torch.testing.assert_close(lse, own_lse if own_lse.shape == lse.shape else own_lse.T, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- FlashAttention-4
def flash4() -> Any:
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        pytest.skip("flash-attn-4 is not installed")
    return importlib.import_module("flash_attn.cute")


@pytest.mark.parametrize("case", [{}, {"causal": True}, {"causal": True, "window_size": (128, 0)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("lengths", [(400, 400), (200, 400)], ids=str)
def test_dense_against_flash_attention_4(torch: Any, case: dict[str, Any], lengths: tuple[int, int]) -> None:
    cute, (L, S) = flash4(), lengths
    q, k, v, dout = draw(torch, "bfloat16", (2, L, 8, 128), (2, S, 2, 128), (2, S, 2, 128), (2, L, 8, 128))
    left, right = case.get("window_size", (-1, 0 if case else -1))

    def formula(*x: Any) -> Any:
        return plain(torch, *(t.transpose(1, 2) for t in x), visible=band(torch, L, S, left, right, S - L)).transpose(1, 2)
    exact = differentiate(torch, formula, [q.double(), k.double(), v.double()], dout.double())
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **case)
    grads = flash_attn.flash_attn_backward(dout, q, k, v, out, lse, **case)
    hold([out, *grads], exact, differentiate(torch, lambda *x: cute.flash_attn_func(*x, **case), [q, k, v], dout), "FlashAttention-4")


@pytest.mark.parametrize("causal", [False, True])
def test_packed_against_flash_attention_4(torch: Any, causal: bool) -> None:
    cute = flash4()
    inputs, dout, cu = packed_inputs(torch, "bfloat16", 8, 2, 128)
    longest = max(LENGTHS)
    out, lse, _ = flash_attn.flash_attn_varlen_func(*inputs, cu, cu, longest, longest, causal=causal, return_attn_probs=True)
    grads = flash_attn.flash_attn_varlen_backward(dout, *inputs, out, lse, cu, cu, longest, longest, causal=causal)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, "causal": causal}
    rival = differentiate(torch, lambda *x: cute.flash_attn_varlen_func(*x, **packed), inputs, dout)
    hold([out, *grads], exact_packed(torch, *inputs, dout, -1, 0 if causal else -1), rival, "FlashAttention-4")


# ---------------------------------------------------------------- what the originals lack
def test_dropout_and_encoded_softmax_are_the_cpus(torch: Any) -> None:
    q, k, v = draw(torch, "float32", (2, 4, 70, 32), (2, 2, 300, 32), (2, 2, 300, 32))
    on_device = aten.scaled_dot_product_flash_attention(q, k, v, 0.3, True, True, seed=5)
    on_host = aten.scaled_dot_product_flash_attention(*(x.cpu().numpy() for x in (q, k, v)), 0.3, True, True, seed=5)
    torch.testing.assert_close(on_device.out.cpu(), torch.from_numpy(on_host.out), rtol=1e-3, atol=1e-3)
    encoded = on_device.debug_attn_mask
    assert encoded.device.type == DEVICE
    np.testing.assert_array_equal(torch.signbit(encoded).cpu(), ~aten.dropout_mask(2, 4, 70, 300, dropout_p=0.3, seed=5))
    torch.testing.assert_close(encoded.cpu(), torch.from_numpy(on_host.debug_attn_mask), rtol=1e-3, atol=1e-3)
    packed, _, cu = packed_inputs(torch, "float16", 4, 2, 64)
    longest = max(LENGTHS)
    _, _, probabilities = flash_attn.flash_attn_varlen_func(*packed, cu, cu, longest, longest, 0.3, return_attn_probs=True, seed=5)
    assert probabilities.shape == (len(LENGTHS), 4, longest, longest)
    rows = torch.tensor(LENGTHS, device=DEVICE)[:, None, None] > torch.arange(longest, device=DEVICE)
    torch.testing.assert_close(probabilities.abs().float().sum(dim=3), rows.expand(-1, 4, -1).float(), rtol=0, atol=1e-2)


def test_a_batch_above_65535_with_dropout(torch: Any) -> None:
    q, k, v = draw(torch, "float32", (70_001, 1, 2, 8), (70_001, 1, 3, 8), (70_001, 1, 3, 8))
    r = aten.scaled_dot_product_efficient_attention(q, k, v, None, True, 0.4)
    keep = torch.from_numpy(aten.dropout_mask(70_001, 1, 2, 3, dropout_p=0.4, seed=r.philox_seed)).to(DEVICE)
    P = torch.softmax(q.double() @ k.double().transpose(2, 3) / 8**0.5, dim=-1) * keep / (1 - round(0.4 * 65536) / 65536)
    torch.testing.assert_close(r.out.double(), P @ v.double(), rtol=1e-3, atol=1e-3)
    grads = aten.scaled_dot_product_efficient_attention_backward(q, q, k, v, None, r.out, r.logsumexp, r.philox_seed, r.philox_offset, 0.4,
                                                                 [True, True, True, False])
    torch.testing.assert_close(grads[2].double(), P.transpose(2, 3) @ q.double(), rtol=1e-3, atol=1e-3)


def test_a_bias_of_more_than_2_to_the_31_elements(torch: Any) -> None:
    n = 46_400
    bias = torch.zeros((n, n), dtype=torch.float16, device=DEVICE)
    bias[-1, -3:] = torch.tensor([0.0, 5.0, -3.0])
    q, v = (torch.zeros((1, 1, n, 16), dtype=torch.float16, device=DEVICE) for _ in range(2))
    v[0, 0, -3:] = torch.eye(3, 16)
    out = fastattn.attention(q, q, v, bias=bias, window=(2, 0), layout="bhsd")
    torch.testing.assert_close(out[0, 0, -1, :3].float().cpu(), torch.softmax(torch.tensor([0.0, 5.0, -3.0]), 0), rtol=0, atol=1e-3)
