"""Calls that another library records or transforms: what it would drop or record
wrongly is refused with a reason, the rest is accepted."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import flash_attn, sdpa, vllm

torch = pytest.importorskip("torch")
Q = torch.ones(1, 4, 2, 8)
FORWARD_AD = torch.autograd.forward_ad


def attend(q: Any) -> Any:
    return fastattn.attention(q, Q, Q)


def _refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)) as caught:
        call()
    assert str(caught.value).startswith("attention") and str(caught.value).endswith(".")


def test_tangents() -> None:
    text = "carries a forward-mode tangent (torch.autograd.forward_ad), which fastattn would drop; expected an array in memory of its own"
    with FORWARD_AD.dual_level():
        dual = FORWARD_AD.make_dual(Q, Q)
        _refused(lambda: fastattn.attention(dual, Q, Q), f"q {text}")
        _refused(lambda: fastattn.attention(Q.numpy(), Q, dual), f"v {text}")
        _refused(lambda: fastattn.attention(Q, Q, Q, bias=FORWARD_AD.make_dual(torch.ones(4, 4), torch.ones(4, 4))), f"bias {text}")
        _refused(lambda: fastattn.attention(Q, Q, Q, softmax_scale=FORWARD_AD.make_dual(torch.tensor(1.0), torch.tensor(1.0))),
                 "softmax_scale carries a forward-mode tangent")
        assert torch.equal(attend(Q), Q)                    # without a tangent


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    text = "q is used under ProxyTorchDispatchMode" if mode == "real" else "q is a FakeTensor"
    _refused(lambda: make_fx(attend, tracing_mode=mode)(Q), text)


def test_other_modes_are_harmless() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert torch.equal(attend(Q), Q)


def test_tensors_that_stand_for_others() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = torch.ones(1, 4, 2, 8)
        _refused(lambda: attend(fake), "q is a FakeTensor, a shape without memory")
    _refused(lambda: attend(mode.from_tensor(Q)), "q is a FakeTensor")
    _refused(lambda: attend(Q.to("meta")), "q is on torch's meta device, where arrays have no memory")
    _refused(lambda: fastattn.attention(Q, Q.to("meta"), Q), "k is on torch's meta device")
    _refused(lambda: torch.jit.trace(attend, Q), "q is recorded by torch.jit.trace, which cannot record what fastattn does")
    _refused(lambda: torch.vmap(attend)(Q[None]), "q is a tensor inside torch.vmap; expected an array in memory of its own; fastattn.torch")
    for transform in (torch.func.grad, torch.func.functionalize, lambda f: lambda q: torch.func.jvp(f, (q,), (q,))):
        with pytest.raises(TypeError, match=r"attention\(\): q (is a tensor inside torch\.func|\(Tensor\) cannot be exported)"):
            transform(lambda q: attend(q).sum())(Q)
    _refused(lambda: torch.func.grad(lambda q: attend(q).sum())(Q), "q is a tensor inside torch.func (grad, vjp, jvp or functionalize)")
    with pytest.raises(TypeError, match=r"softmax_scale is a tensor inside torch\.vmap"):
        torch.vmap(lambda scale: fastattn.attention(Q, Q, Q, softmax_scale=scale))(torch.ones(3))


def test_jax_tracers_are_named() -> None:
    """Classes with the names and modules of JAX's tracers."""
    tracer = type("Tracer", (), {"__module__": "jax._src.core"})
    traced = type("DynamicJaxprTracer", (tracer,), {"__module__": "jax._src.interpreters.partial_eval", "shape": (1, 4, 2, 8)})()
    for call in (lambda: fastattn.attention(traced, traced, traced), lambda: fastattn.attention(Q, traced, Q)):
        _refused(call, "is a JAX tracer, which stands for an array inside jit, grad, vmap or scan")
    scalar = type("DynamicJaxprTracer", (tracer,), {"__module__": "jax._src.interpreters.partial_eval", "shape": ()})()
    _refused(lambda: fastattn.attention(Q, Q, Q, softcap=scalar), "softcap is a JAX tracer")


def test_parameters_without_a_graph_are_accepted() -> None:
    parameter = torch.nn.Parameter(Q.clone())
    text = "q requires grad, which fastattn would drop from the graph; expected a tensor without grad; " \
        "fastattn.torch.attention has gradients, and q.detach() drops them"
    _refused(lambda: attend(parameter), text)
    features = {"sinks": torch.nn.Parameter(torch.ones(2)), "bias": torch.nn.Parameter(torch.zeros(4, 4)),
                "alibi_slopes": torch.nn.Parameter(torch.ones(2))}
    plain = fastattn.attention(Q, Q, Q, **{name: x.detach() for name, x in features.items()})
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            out, lse = fastattn.attention(parameter, parameter, parameter, return_lse=True)
            assert torch.equal(out, Q) and not out.requires_grad
            assert torch.allclose(fastattn.attention_backward(Q, parameter, Q, Q, out, lse).dv, Q)
            assert torch.equal(flash_attn.flash_attn_func(parameter, Q, Q), Q)
            assert torch.equal(fastattn.attention(Q, Q, Q, **features), plain)
    for name in features:
        _refused(lambda name=name: fastattn.attention(Q, Q, Q, **{name: features[name]}), f"{name} requires grad")
    _refused(lambda: attend(parameter), text)


def test_out_raises_torchs_version() -> None:
    out = torch.empty_like(Q)
    version = out._version
    assert fastattn.attention(Q, Q, Q, out=out) is out and out._version == version + 1
    packed, cu = Q[0], torch.tensor([0, 4])
    fastattn.attention_varlen(packed, packed, packed, cu, cu, out=out[0])
    assert out._version == version + 2                      # a view shares its base's
    with pytest.raises(ValueError, match="out has shape"):
        fastattn.attention(Q, Q, Q, out=out[:, :2])
    assert out._version == version + 2
    half = Q.half()
    for scale in ({}, {"k_descale": 1.0, "v_descale": 1.0}):            # written by the kernel, and by torch
        o, k = torch.empty_like(half), half.to(torch.float8_e4m3fn) if scale else half
        before = o._version
        vllm.triton_attention_rocm(half, k, k, o, vllm.MetaData(layout="bshd", **scale))
        assert o._version > before
    weight = torch.ones(1, 4, 2, 8, requires_grad=True)
    saved = (weight * out).sum()
    fastattn.attention(Q, Q, Q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    with torch.inference_mode():
        inside = torch.empty_like(Q)
        assert torch.equal(fastattn.attention(Q, Q, Q, out=inside), Q)


def test_compat_refuses_the_same() -> None:
    with pytest.raises(TypeError, match=r"scaled_dot_product_attention\(\): query is a tensor inside torch\.vmap"):
        torch.vmap(lambda q: sdpa.scaled_dot_product_attention(q, q, q))(Q)


def test_a_repeated_call_on_a_device_is_not_replayed_while_torch_records() -> None:
    from fastattn.arrays.libraries import _torch

    read = _torch(torch).quick
    on_device = type("T", (), {"is_cuda": True, "get_device": lambda self: 0})()
    with FORWARD_AD.dual_level():
        assert read is not None and read.stream(on_device) == 0
    assert np.isfinite(attend(Q).numpy()).all()
