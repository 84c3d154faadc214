"""Numbers: named problems against the reference, and bit for bit those of the eager functions; jax.nn.dot_product_attention; which
gradients are made."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastattn  # noqa: E402
import fastattn.jax  # noqa: E402
from fastattn.jax import handler  # noqa: E402
from fastattn.jax.record import Record  # noqa: E402
from tests.tools.compare import Judge  # noqa: E402
from tests.tools.problems import BY_NAME  # noqa: E402

from .programs import CASES, results  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_named_problems(name: str) -> None:
    inputs = BY_NAME[name].make()
    with jax.enable_x64(True):
        out, lse, grads = results(inputs)
    judge = Judge(inputs)
    judge.forward(out, lse)
    judge.backward(grads)
    eager = inputs.forward("cpu")
    np.testing.assert_array_equal(out, eager[0])
    np.testing.assert_array_equal(lse, eager[1])


def random(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize(("dtype", "jit"), [("float32", False), ("float32", True), ("bfloat16", True), ("float16", True)])
def test_jax_nn(dtype: str, jit: bool) -> None:
    """The function of JAX itself, on the same numbers in float32: forward and gradients, eagerly and jitted."""
    q, k, v = random(2, 24, 4, 32, dtype=dtype), random(2, 24, 2, 32, seed=1, dtype=dtype), random(2, 24, 2, 32, seed=2, dtype=dtype)
    bias, weight = random(4, 24, 24, seed=3, dtype=dtype), random(2, 24, 4, 32, seed=4)

    def ours(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return fastattn.jax.attention(q, k, v, bias=bias, causal=True)

    def own(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v, bias[None])), is_causal=True)

    def of(function: Any, jit: bool) -> Any:
        def loss(*x: Any) -> Any:
            out = function(*x)
            return jnp.vdot(weight, out.astype(jnp.float32)), out
        found = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        (_, out), gradients = (jax.jit(found) if jit else found)(q, k, v, bias)
        return out, *gradients
    for got, want in zip(of(ours, jit), of(own, True), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
        assert error < {"float32": 3e-6, "bfloat16": 0.02, "float16": 3e-3}[dtype] * float(jnp.abs(want).max())


def test_what_the_page_says_of_jax_nn() -> None:
    """docs/jax.md: the options of jax.nn.dot_product_attention, and their names here."""
    q, k, v = random(2, 9, 4, 8), random(2, 14, 2, 8, seed=1), random(2, 14, 2, 8, seed=2)
    own = jax.nn.dot_product_attention
    pairs = [(fastattn.jax.attention(q, k, v, causal="top_left"), own(q, k, v, is_causal=True)),
             (fastattn.jax.attention(q, k, v, softmax_scale=0.3), own(q, k, v, scale=0.3)),
             (fastattn.jax.attention(q, k, v, causal="top_left", window=(3, None)), own(q, k, v, is_causal=True, local_window_size=(3, 0))),
             (fastattn.jax.attention(q, k[:, :9], v[:, :9], window=(2, 1)), own(q, k[:, :9], v[:, :9], local_window_size=(2, 1)))]
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=2e-6)
    keys = jnp.zeros((2, 1, 1, 14), bool)
    assert not fastattn.jax.attention(q, k, v, mask=keys).any()
    np.testing.assert_allclose(own(q, k, v, mask=keys)[0, 0, 0], v[0, :, 0].mean(axis=0), atol=1e-6)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Record, dict[str, Any], dict[str, Any]]]:
    """What the handler is called with: record, operands, results."""
    found: list[tuple[Record, dict[str, Any], dict[str, Any]]] = []
    run = handler.run

    def noted(r: Record, operands: Any, results: Any, stream: Any) -> None:
        found.append((r, operands, results))
        run(r, operands, results, stream)
    monkeypatch.setattr(handler, "run", noted)
    return found


def test_results_are_written_in_place(calls: list[Any]) -> None:
    """The engine reads JAX's array and writes the very memory of the result that JAX hands out."""
    q = jax.block_until_ready(random(1, 32, 2, 16))
    out, lse = jax.block_until_ready(fastattn.jax.attention(q, q, q, return_lse=True))
    (_, operands, results), = calls
    assert operands["q"].ptr == operands["k"].ptr == q.unsafe_buffer_pointer()
    assert results["out"].ptr == out.unsafe_buffer_pointer() and results["lse"].ptr == lse.unsafe_buffer_pointer()
    _, pull = jax.vjp(lambda *x: fastattn.jax.attention(*x), q, q, q)
    grads = jax.block_until_ready(pull(q))
    assert [calls[-1][2][name].ptr for name in ("dq", "dk", "dv")] == [x.unsafe_buffer_pointer() for x in grads]


def test_only_wanted_results_are_computed(calls: list[Any]) -> None:
    q, bias, sinks = random(1, 8, 2, 4), random(8, 8, seed=1), random(2, seed=2)

    def loss(q: Any, bias: Any, sinks: Any) -> Any:
        return fastattn.jax.attention(q, q, q, bias=bias, sinks=sinks).sum()

    def lse_loss(q: Any) -> Any:
        return fastattn.jax.attention(q, q, q, return_lse=True)[1].sum()

    def made(function: Any, *arguments: Any) -> list[tuple[str, ...]]:
        calls.clear()
        jax.block_until_ready(function(*arguments))
        return [r.results for r, _, _ in calls]
    qkv = "dq", "dk", "dv"
    assert made(loss, q, bias, sinks) == [("out",)]
    for transform in (lambda f: f, jax.jit):                # in any order: what one call wanted must not decide for the next
        for _ in range(2):
            assert made(transform(jax.grad(loss)), q, bias, sinks) == [("out", "lse"), qkv]
            assert made(transform(jax.grad(loss, 1)), q, bias, sinks) == [("out", "lse"), (*qkv, "dbias")]
            assert made(transform(jax.grad(loss, (0, 2))), q, bias, sinks) == [("out", "lse"), (*qkv, "dsinks")]
            assert made(transform(jax.grad(loss, (1, 2))), q, bias, sinks) == [("out", "lse"), (*qkv, "dbias", "dsinks")]
    assert made(jax.grad(lse_loss), q) == [("out", "lse"), qkv] and "dlse" in calls[-1][1]
    assert made(jax.grad(loss), q, bias, sinks)[1] == qkv and "dlse" not in calls[-1][1]


def test_what_is_differentiated_is_told_apart_in_one_process() -> None:
    """JAX keeps traces of a jitted function: those of a constant bias must not serve one that is differentiated."""
    q, bias = random(1, 5, 2, 8), random(5, 5, seed=1)

    def loss(q: Any, bias: Any) -> Any:
        return (fastattn.jax.attention(q, q, q, bias=bias) ** 2).sum()

    def constant(q: Any, bias: Any) -> Any:
        return loss(q, jax.lax.stop_gradient(bias))

    def mapped(f: Any) -> Any:
        return lambda q, bias: jax.vmap(f)(q[None], bias[None]).sum()
    want = jax.grad(loss, (0, 1))(q, bias)
    assert float(jnp.abs(want[1]).max()) > 0.1
    constants = constant, mapped(constant)
    for f in (constants[1], mapped(loss), *constants, loss, constants[1], loss, mapped(loss)):
        got = jax.grad(f, (0, 1))(q, bias)
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        if f in constants:
            assert not got[1].any()
        else:
            np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_seed_and_offset_are_arrays_or_numbers() -> None:
    x = np.asarray(random(2, 16, 2, 8))

    @jax.jit
    def step(q: Any, seed: Any, offset: Any) -> Any:
        return fastattn.jax.attention(q, q, q, dropout_p=0.3, seed=seed, offset=offset)

    def want(seed: int, offset: int) -> Any:
        return fastattn.attention(x, x, x, dropout_p=0.3, seed=seed, offset=offset)
    for seed, offset in ((0, 0), (7, 1), (2**32 - 1, 2**31)):
        np.testing.assert_array_equal(step(x, jnp.uint32(seed), jnp.uint32(offset)), want(seed, offset))
        mixed = fastattn.jax.attention(x, x, x, dropout_p=0.3, seed=seed, offset=jnp.uint32(offset))
        np.testing.assert_array_equal(mixed, want(seed, offset))
    np.testing.assert_array_equal(step(x, jnp.int32(-1), jnp.int32(3)), want(-1, 3))
    big = 0x1234_5678_9ABC_DEF0
    np.testing.assert_array_equal(fastattn.jax.attention(x, x, x, dropout_p=0.3, seed=big), want(big, 0))
    assert step._cache_size() == 2                          # of (u)int32: another number is no other program
    gradient = jax.jit(jax.grad(lambda q, seed: fastattn.jax.attention(q, q, q, dropout_p=0.3, seed=seed).sum()))
    eager = fastattn.attention(x, x, x, dropout_p=0.3, seed=5, return_lse=True)
    dq, dk, dv, _, _ = fastattn.attention_backward(np.ones_like(x), x, x, x, *eager, dropout_p=0.3, seed=5)
    np.testing.assert_allclose(gradient(x, jnp.uint32(5)), dq + dk + dv, atol=1e-6)


def test_lengths_that_are_traced_or_known() -> None:
    q, k, v = random(9, 2, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)
    want = fastattn.attention_varlen(*map(np.asarray, (q, k, v)), [0, 4, 9], [0, 4, 9], causal=True)
    for lengths in ([0, 4, 9], np.array([0, 4, 9]), jnp.array([0, 4, 9])):
        np.testing.assert_array_equal(fastattn.jax.attention_varlen(q, k, v, lengths, lengths, causal=True), want)
    traced = jax.jit(lambda lengths: fastattn.jax.attention_varlen(q, k, v, lengths, lengths, causal=True))
    np.testing.assert_array_equal(traced(jnp.array([0, 4, 9])), want)
    np.testing.assert_array_equal(traced(jnp.array([0, 9, 9])), fastattn.attention_varlen(*map(np.asarray, (q, k, v)), [0, 9, 9], [0, 9, 9],
                                                                                         causal=True))


def test_engines(calls: list[Any]) -> None:
    """engine= counts, and use_engine while the call is traced, wherever and whenever the program runs."""
    q, ran = random(1, 8, 2, 4), []

    def forward(problem: Any, operands: Any, out: Any, lse: Any, stream: Any) -> None:
        ran.append(problem.call)
        out.numpy()[...] = 7
    with fastattn.register_engine("sevens", forward, None, lambda problem: None, "cpu"):
        assert (fastattn.jax.attention(q, q, q, engine="sevens") == 7).all() and len(ran) == 1
        traced = jax.jit(lambda q: fastattn.jax.attention(q, q, q))
        with fastattn.use_engine("sevens"):
            assert (fastattn.jax.attention(q, q, q) == 7).all() and (traced(q) == 7).all() and len(ran) == 3
        assert (traced(q) == 7).all() and len(ran) == 4                             # traced inside, run outside
        assert (fastattn.jax.attention(q, q, q) != 7).all() and len(ran) == 4       # another program
        with fastattn.use_engine("sevens"):
            assert (fastattn.jax.attention(q, q, q, engine="reference") != 7).all() and len(ran) == 4
    assert [(r.engine, r.engines) for r, _, _ in calls] == [("sevens", None), *[(None, ("sevens",))] * 3, (None, None), ("reference", None)]


def test_seeds_without_dropout_are_no_operands(calls: list[Any]) -> None:
    """They change nothing, so they are no part of the program, which CUDA would refuse with an array."""
    q = random(1, 8, 2, 4)
    for seed in (None, 3, jnp.uint32(5)):
        fastattn.jax.attention(q, q, q, seed=seed, offset=0 if seed is None else seed).block_until_ready()
    assert len({r for r, _, _ in calls}) == 1 and calls[0][0].operands == ("q", "k", "v")
