"""As user.py, with JAX's arrays."""
from __future__ import annotations

from typing import assert_type

from jax import Array

from fastattn import attention, attention_backward


def arrays(q: Array) -> None:
    assert_type(attention(q, q, q, window=(128, 0)), Array)
    assert_type(attention(q, q, q, return_lse=True), tuple[Array, Array])
    assert_type(attention_backward(q, q, q, q, q, q).dv, Array)
