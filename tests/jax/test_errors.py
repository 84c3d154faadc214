"""Wrong calls: fastattn's own errors, while JAX traces; and what plain `fastattn.attention` says to a tracer."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastattn  # noqa: E402
from fastattn.jax import attention, attention_varlen  # noqa: E402

Q = np.ones((2, 16, 4, 8), np.float32)
P = np.ones((9, 4, 8), np.float32)
CU = [0, 4, 9]
# keywords of fastattn that are not here: XLA allocates, and chooses the stream; 8-bit operands have no gradients
MISSING = {"out", "stream", "q_scale", "k_scale", "v_scale", "out_dtype", "out_scale", "diagonal", "dropout_at", "dropout_heads"}
WRONG: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda q: attention(q, Q[:, :, :3], Q[:, :, :3]), ValueError,
     "attention(): k has 3 heads; expected a divisor of q's num_heads = 4; num_heads_k = 2"),
    (lambda q: attention(q, Q.astype("float16"), Q), TypeError,
     "attention(): k has dtype float16; expected q's dtype, float32; k.astype(q.dtype) works"),
    (lambda q: attention(q.astype("int32"), Q, Q), TypeError,
     "attention(): q has dtype int32; expected float32 or float64 or float16 or bfloat16"),
    (lambda q: attention(q, Q, Q, mask=jnp.ones((16, 16))), TypeError, "attention(): mask has dtype float32; expected bool"),
    (lambda q: attention(q, Q, Q, bias=jnp.ones((3, 16, 16))), ValueError,
     "attention(): bias has shape (3, 16, 16); expected a shape that broadcasts"),
    (lambda q: attention(q, Q, Q, dropout_p=0.5), ValueError,
     "attention(): seed is None; expected a 64-bit integer, because dropout_p = 0.5"),
    (lambda q: attention(q, Q, Q, dropout_p=0.5, seed=jax.random.key(0)), TypeError,
     "attention(): seed has dtype key<fry>; expected an int, or an array"),
    (lambda q: attention(q, Q, Q, dropout_p=0.5, seed=jnp.ones(2, jnp.uint32)), ValueError,
     "attention(): seed has shape (2,); expected one number"),
    (lambda q: attention(q, Q, Q, dropout_p=0.5, seed=q[0, 0, 0, 0]), TypeError,
     "attention(): seed has dtype float32; expected an int, or an array of int32"),
    (lambda q: attention(q, Q, Q, softmax_scale=q[0, 0, 0, 0]), TypeError,
     "attention(): softmax_scale is a JAX tracer; expected a number, because it is"),
    (lambda q: attention(q, Q, Q, window=(q[0, 0, 0, 0], 1)), TypeError, "attention(): window is a JAX tracer; expected a number"),
    (lambda q: attention(q, Q, Q, window=(-1, 1)), ValueError, "attention(): window is -1; expected an integer in [0, 2147483647]"),
    (lambda q: attention(q, Q, Q, causal="left"), ValueError,
     "attention(): causal is 'left'; expected False, True, 'bottom_right' or 'top_left'"),
    (lambda q: attention(q, Q, Q, layout="sbhd"), ValueError, "attention(): layout is 'sbhd'; expected 'bshd' or 'bhsd'"),
    (lambda q: attention(q, Q, Q, engine="sm70"), ValueError, "attention(): engine is 'sm70'; expected None or one of"),
    (lambda q: attention(q, "k", Q), TypeError,
     "attention(): k is a str; expected an array of JAX or NumPy; jax.numpy.asarray(k) makes one"),
    (lambda q: attention(q, None, Q), TypeError, "attention(): k is a NoneType; expected an array of JAX or NumPy"),
    (lambda q: attention_varlen(q[0, :9], P, P, CU, None), TypeError, "attention_varlen(): cu_seqlens_k is a NoneType; expected an array"),
    (lambda q: attention(q, Q, Q, bias=[1.0]), TypeError, "attention(): bias is a list; expected an array of JAX or NumPy"),
    (lambda q: attention(q, Q, Q, sinks=[1.0, "x", 2.0, 3.0]), TypeError, "attention(): sinks is"),
    (lambda q: attention(q, Q, Q, out=q), TypeError,
     "attention(): out is no keyword of it in fastattn.jax, because XLA allocates the results."),
    (lambda q: attention(q, Q, Q, mask_mod=lambda b, h, i, j: jnp.where(i >= j, True, False)), TypeError,
     "attention(): mask_mod calls a function of jax.numpy or jax.nn"),
    (lambda q: attention(q, Q, Q, captured=(q,)), ValueError, "attention(): captured has 1 arrays without score_mod"),
    (lambda q: attention(q, Q, Q, stream=0), TypeError,
     "attention(): stream is no keyword of it in fastattn.jax, because XLA chooses the stream."),
    (lambda q: attention(q, Q, Q, dropout_heads=3), TypeError,
     "attention(): dropout_heads is no keyword of it in fastattn.jax, because a call that JAX differentiates is a problem by itself"),
    (lambda q: attention(q, Q, Q, is_causal=True), TypeError, "attention(): is_causal is no keyword of it; here it is causal="),
    (lambda q: attention(q, Q, Q, True), TypeError, "attention(): 4 positional arguments are given; expected 3, q, k, v"),
    (lambda q: attention(q[0], Q, Q), ValueError, "attention(): q has 3 axes, shape (16, 4, 8); expected 4 axes"),
    (lambda q: attention_varlen(q[0, :9], P, P, CU, [0, 9]), ValueError,
     "attention_varlen(): cu_seqlens_k describes 1 sequences; expected as many"),
    (lambda q: attention_varlen(q[0, :9], P, P, [0, 5, 4], CU), ValueError,
     "attention_varlen(): cu_seqlens_q starts [0, 5, 4], entry 2 is 4"),
    (lambda q: attention_varlen(q[0, :9], P, P, CU, CU, max_seqlen_q=4), ValueError,
     "attention_varlen(): max_seqlen_q is 4; expected at least the"),
    (lambda q: attention_varlen(q[0, :9], P, P, CU, CU, seqused_k=[5, 1]), ValueError,
     "attention_varlen(): seqused_k has 5 for sequence 0"),
    (lambda q: attention_varlen(q[0, :9], P, P, jnp.ones(3), CU), TypeError,
     "attention_varlen(): cu_seqlens_q has dtype float32; expected int32 or int64"),
    (lambda q: attention_varlen(q[0, :9], P, P, CU, CU, layout="bshd"), ValueError, "attention_varlen(): layout is 'bshd'; expected 'thd'"),
    (lambda q: attention_varlen(q, P, P, CU, CU), ValueError, "attention_varlen(): q has 4 axes"),
]


@pytest.mark.parametrize(("call", "kind", "text"), WRONG, ids=[text[:60] for _, _, text in WRONG])
def test_wrong_calls_are_refused_while_jax_traces(call: Callable[[Any], Any], kind: type[Exception], text: str) -> None:
    ways: list[Callable[[Any], Any]] = [jax.jit(call), lambda q: jax.eval_shape(call, q), jax.grad(lambda q: call(q).sum())]
    if "tracer" not in text:
        ways.append(call)
    for way in ways:
        with pytest.raises(kind, match=re.escape(text)) as caught:
            way(jnp.asarray(Q))
        assert type(caught.value) is kind


def test_the_order_of_axes_is_told() -> None:
    with pytest.raises(ValueError, match="k has 16 heads") as caught:
        attention(Q[:, :5], Q, Q, layout="bhsd")
    assert caught.value.__notes__ == ["Shapes in this message are in the order (batch, seqlen, num_heads, head_dim)."]


def test_no_engine_takes_the_call() -> None:
    with (fastattn.register_engine("picky", lambda *_: None, None, lambda problem: "it is picky", "cpu"),
          pytest.raises(jax.errors.JaxRuntimeError, match=r"UNIMPLEMENTED: attention\(\): no engine takes this call: picky: it is picky")):
        jax.block_until_ready(attention(Q, Q, Q, engine="picky"))


def test_plain_fastattn_names_this_package() -> None:
    def plain(q: Any) -> Any:
        return fastattn.attention(q, Q, Q)
    text = ("attention(): q is a JAX tracer, which stands for an array inside jit, grad, vmap or scan; expected an array; "
            "attention and attention_varlen of fastattn.jax take tracers.")
    for transformed in (jax.jit(plain), jax.grad(lambda q: plain(q).sum()), jax.vmap(lambda q: plain(q[None]))):
        with pytest.raises(TypeError, match=re.escape(text)):
            transformed(jnp.asarray(Q))


@pytest.mark.parametrize("function", [attention, attention_varlen])
def test_docstrings(function: Any) -> None:
    """Every parameter is documented, and the example runs."""
    import doctest
    import inspect

    text = (inspect.getdoc(function) or "").partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    described = [name.strip() for line in text.splitlines() if line[0] != " " for name in line.partition(" :")[0].split(",")]
    assert sorted(described) == sorted(inspect.signature(function).parameters)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(recurse=False).find(function, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False) == (0, function.__doc__.count('>>>'))


def test_keywords_are_those_of_fastattn() -> None:
    """No keyword is forgotten: a new one of fastattn is added here, or listed as missing with its reason in docs/jax.md."""
    import inspect

    for ours, plain in ((attention, fastattn.attention), (attention_varlen, fastattn.attention_varlen)):
        a, b = (inspect.signature(f).parameters for f in (ours, plain))
        assert set(b) - set(a) == MISSING and set(a) - set(b) == {"deterministic"}
        assert {name: x.default for name, x in a.items() if name in b} == {name: x.default for name, x in b.items() if name in a}


def test_8_bit_operands_are_refused() -> None:
    eight = jnp.asarray(Q).astype(jnp.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"q has dtype float8_e4m3fn; .*8-bit operands have no backward"):
        attention(eight, eight, eight)
