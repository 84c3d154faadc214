"""As user.py, with JAX's arrays."""
from __future__ import annotations

from typing import assert_type

from jax import Array

import fastattn.jax
from fastattn import attention, attention_backward


def arrays(q: Array) -> None:
    assert_type(attention(q, q, q, window=(128, 0)), Array)
    assert_type(attention(q, q, q, return_lse=True), tuple[Array, Array])
    assert_type(attention_backward(q, q, q, q, q, q).dv, Array)


def under_jit(q: Array, seed: Array) -> None:
    assert_type(fastattn.jax.attention(q, q, q, dropout_p=0.1, seed=seed), Array)
    assert_type(fastattn.jax.attention(q, q, q, return_lse=True), tuple[Array, Array])
    assert_type(fastattn.jax.attention_varlen(q, q, q, [0, 3], [0, 3], return_lse=True), tuple[Array, Array])
