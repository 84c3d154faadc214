"""fastattn.jax in programs that run on a GPU: named problems forward and backward, transformations, packed calls, score functions, errors.

Needs JAX with CUDA; without it these tests are skipped. What a program computes is held to float64 or to the same program on the host.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastattn  # noqa: E402
from fastattn.jax import attention, attention_varlen  # noqa: E402
from tests.tools.compare import Judge  # noqa: E402
from tests.tools.problems import BY_NAME  # noqa: E402

from .programs import CASES, results  # noqa: E402

pytestmark = pytest.mark.gpu
HALVES_AND_FLOATS = [name for name in CASES if BY_NAME[name].make().args[0].dtype != np.float64]
NEAR = {"float32": 2e-5, "bfloat16": 0.03}


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[Any]:
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX without CUDA")
    with jax.default_device(device), jax.default_matmul_precision("highest"):       # JAX's own float32 products are TF32 otherwise
        yield device


@pytest.mark.parametrize("name", HALVES_AND_FLOATS)
def test_named_problems(name: str) -> None:
    """Every array traced, in one jitted program: out, lse and all gradients against the reference."""
    inputs = BY_NAME[name].make()
    out, lse, grads = results(inputs)
    judge = Judge(inputs)
    judge.forward(out, lse)
    judge.backward(grads)


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def own(q: Any, k: Any, v: Any) -> Any:
    """JAX's own attention, causal, in float32."""
    return jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), is_causal=True).astype(q.dtype)


def ours(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v, causal=True)


def near(got: Any, want: Any, dtype: str) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape and np.abs(a - b).max() < NEAR[dtype] * np.abs(b).max()


def step(attend: Any, transform: Any) -> Any:
    """A jitted value_and_grad of a program over q, k and v."""
    def loss(*x: Any) -> Any:
        return (transform(attend)(*x).astype(jnp.float32) ** 2).mean()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def scanned(attend: Any) -> Any:
    """Four layers, each with the output of the one before as its queries."""
    def program(q: Any, k: Any, v: Any) -> Any:
        return jax.lax.scan(lambda x, _: (attend(x, k, v) + x, None), q, None, length=4)[0]
    return program


def mapped(attend: Any) -> Any:
    return lambda *x: jax.vmap(attend)(*(y[:, None] for y in x))


def sharded(attend: Any) -> Any:
    mesh = jax.sharding.Mesh(np.asarray(jax.devices("gpu")[:1]), ("batch",))
    part = jax.sharding.PartitionSpec("batch")
    return jax.shard_map(attend, mesh=mesh, in_specs=(part, part, part), out_specs=part)


TRANSFORMS = {"jit": lambda f: f, "scan": scanned, "vmap": mapped, "checkpoint": lambda f: scanned(jax.checkpoint(f)), "shard_map": sharded}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name: str, dtype: str) -> None:
    """Value and gradients beside JAX's own attention, five times: XLA uses its memory again."""
    x = [random(2, 200, heads, 64, seed=heads + i, dtype=dtype) for i, heads in enumerate((4, 2, 2))]
    program = step(ours, TRANSFORMS[name])
    got = [program(*x) for _ in range(5)]
    for once in got:
        near(once, step(own, TRANSFORMS[name])(*x), dtype)
    for leaf in zip(*map(jax.tree.leaves, got), strict=True):
        assert all(np.array_equal(leaf[0], other) for other in leaf[1:])


def test_results_stay_on_the_device_and_in_order(on_the_gpu: Any) -> None:
    """A program before and one behind the call, on XLA's stream: each sees what the one before wrote."""
    q, k, v = (random(4, 1024, 8, 64, seed=i, dtype="bfloat16") for i in range(3))

    @jax.jit
    def program(q: Any, k: Any, v: Any, scale: Any) -> Any:
        return (ours(q * scale, k, v).astype(jnp.float32) * 2).sum()
    found = [program(q, k, v, jnp.bfloat16(2.0**i)) for i in range(5)]          # enqueued one behind the other
    assert all(x.devices() == {on_the_gpu} for x in found)
    for i, x in enumerate(found):
        want = (own(q * jnp.bfloat16(2.0**i), k, v).astype(jnp.float32) * 2).sum()
        assert abs(float(x) - float(want)) < 0.06 * (4 * 1024 * 8 * 64) ** 0.5


def test_packed() -> None:
    """Traced lengths, which stay on the device; the same sequences one by one."""
    lengths = np.array([70, 0, 130], np.int32)
    cu = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    x = [random(200, heads, 64, seed=heads + i) for i, heads in enumerate((4, 2, 2))]

    def packed(q: Any, k: Any, v: Any, cu: Any) -> Any:
        return attention_varlen(q, k, v, cu, cu, max_seqlen_q=130, max_seqlen_k=130, causal=True)

    def parts(q: Any, k: Any, v: Any, cu: Any) -> Any:
        return jnp.concatenate([own(*(y[None, first:first + n] for y in (q, k, v)))[0] for first, n in ((0, 70), (70, 130))])

    def of(function: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *x: (function(*x) ** 2).mean(), (0, 1, 2)))(*x, cu)
    near(of(packed), of(parts), "float32")


def test_score_functions() -> None:
    """score_mod with a learned table and a mask_mod, value and gradients, beside the same program on the host."""
    x = [random(2, 150, 4, 32, seed=i) for i in range(3)]
    table = random(4, 299, seed=3)

    def loss(q: Any, k: Any, v: Any, table: Any) -> Any:
        return (attention(q, k, v, score_mod=lambda s, b, h, i, j, t: s + t[h, i - j + 149], captured=(table,),
                          mask_mod=lambda b, h, i, j: i >= j) ** 2).mean()
    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*x, table)
    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        want = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*(jax.device_put(y, host) for y in (*x, table)))
    near(got, want, "float32")


def test_dropout_repeats() -> None:
    """A seed in the program: the same elements are dropped each time, and as in the eager call."""
    q = random(2, 128, 4, 64, dtype="bfloat16")
    program = jax.jit(lambda q: attention(q, q, q, dropout_p=0.3, seed=7, offset=2))
    first = np.asarray(program(q), np.float32)
    np.testing.assert_array_equal(first, np.asarray(program(q), np.float32))
    np.testing.assert_array_equal(first, np.asarray(fastattn.attention(q, q, q, dropout_p=0.3, seed=7, offset=2), np.float32))


def test_errors_come_through() -> None:
    q = random(1, 16, 2, 64, dtype="bfloat16")
    with pytest.raises(jax.errors.JaxRuntimeError, match="seed is an array in device memory"):
        jax.block_until_ready(attention(q, q, q, dropout_p=0.5, seed=jnp.uint32(3)))
    near(jax.jit(ours)(q, q, q), jax.jit(own)(q, q, q), "bfloat16")            # the next call is right
    with pytest.raises(ValueError, match="head"):
        jax.jit(ours)(q, q[..., :32], q)
