"""Everything here runs on JAX's CPU device, on machines with a GPU too; tests that want the GPU say so."""
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # on a GPU JAX would take three quarters of the memory


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        yield
