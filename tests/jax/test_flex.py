"""fastattn.jax with functions: jit, gradients of captured arrays and of closures, vmap, against JAX's own formula."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from fastattn import block_mask  # noqa: E402
from fastattn.jax import attention, attention_varlen  # noqa: E402

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(x) for x in RNG.standard_normal((3, 2, 9, 4, 8), np.float32))
TABLE, SLOPES = jnp.asarray(RNG.standard_normal((4, 9), np.float32)), jnp.asarray(RNG.uniform(0.1, 1, 4).astype(np.float32))
ROWS, KEYS = jnp.arange(9)[:, None], jnp.arange(9)
FAR = jnp.abs(ROWS - KEYS)


def formula(q: Any, k: Any, v: Any, table: Any, slopes: Any) -> Any:
    s = jnp.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    s = 5 * jnp.tanh((s + table[:, FAR] - slopes[:, None, None] * FAR) / 5)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(ROWS >= KEYS, s, -jnp.inf)), v)


def ours(q: Any, k: Any, v: Any, table: Any, slopes: Any, **options: Any) -> Any:
    def mod(s: Any, b: Any, h: Any, i: Any, j: Any, slopes: Any) -> Any:
        return 5 * np.tanh((s + table[h, abs(i - j)] - slopes[h] * abs(i - j)) / 5)         # table is a tracer of the closure
    return attention(q, k, v, score_mod=mod, captured=(slopes,), engine="reference",
                     **options or {"mask_mod": lambda b, h, i, j: i >= j})


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=3e-5)


def test_forward_and_gradients() -> None:
    arguments = Q, K, V, TABLE, SLOPES
    close(ours(*arguments), formula(*arguments))
    close(jax.jit(ours)(*arguments), formula(*arguments))
    weights = jnp.asarray(RNG.standard_normal(Q.shape, np.float32))
    for which in ((0, 1, 2, 3, 4), (3,), (0,)):
        got, want = (jax.jit(jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), which))(*arguments) for f in (ours, formula))
        for x, y in zip(got, want, strict=True):
            close(x, y)


def test_vmap_and_blocks() -> None:
    q, tables = jnp.stack([Q, 2 * Q]), jnp.stack([TABLE, -TABLE])
    got, want = (jax.vmap(f, (0, None, None, 0, None))(q, K, V, tables, SLOPES) for f in (ours, formula))
    close(got, want)
    mask = block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, blocks=np.ones((3, 3), bool), block=3)
    close(jax.jit(lambda *a: ours(*a, block_mask=mask))(Q, K, V, TABLE, SLOPES), formula(Q, K, V, TABLE, SLOPES))
    summed = jax.grad(lambda t: jax.vmap(ours, (0, None, None, None, None))(q, K, V, t, SLOPES).sum())(TABLE)
    close(summed, sum(jax.grad(lambda t, x=x: ours(x, K, V, t, SLOPES).sum())(TABLE) for x in q))


def test_packed_and_numbers() -> None:
    lengths, table = jnp.asarray([0, 4, 9], jnp.int32), jnp.asarray(RNG.standard_normal((2, 9), np.float32))

    def packed(table: Any, factor: float) -> Any:
        return attention_varlen(Q[0], K[0], V[0], lengths, lengths, score_mod=lambda s, b, h, i, j: s + factor * table[b, j],
                                engine="reference")
    for factor in (1.0, 2.0, 3.0):
        bias = factor * table[:, None, None, :9]
        close(packed(table, factor), attention_varlen(Q[0], K[0], V[0], lengths, lengths, bias=jnp.broadcast_to(bias, (2, 1, 9, 9)),
                                                      max_seqlen_q=9, max_seqlen_k=9, engine="reference"))
    grads = jax.grad(lambda t: (packed(t, 2.0) ** 2).sum())(table)
    assert np.abs(grads[:, :4]).max() > 0 and not grads[0, 4:].any()


def test_arrays_of_masks_have_no_gradient() -> None:
    with pytest.raises(TypeError, match="an array of mask_mod is differentiated"):
        jax.grad(lambda t: attention(Q, K, V, mask_mod=lambda b, h, i, j: t[h, j] > 0, engine="reference").sum())(TABLE)
