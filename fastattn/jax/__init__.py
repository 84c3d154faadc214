"""fastattn inside JAX's programs: `attention` and `attention_varlen` under jit, grad, vmap, scan, remat and shard_map.

    import jax
    from fastattn.jax import attention

    @jax.jit
    def loss(q, k, v):
        return attention(q, k, v, causal=True).sum()

    dq, dk, dv = jax.grad(loss, (0, 1, 2))(q, k, v)

The functions compute nothing themselves. How a call flows, file by file:

    api.py          signatures and documentation; arrays, numbers and options are told apart
    problems.py     the shapes alone -> a Problem: all checks, while JAX traces
    record.py       the call but for its arrays, as text in the compiled program
    derivative.py   jax.custom_vjp: forward, backward, and which gradients are wanted
    call.py         jax.ffi.ffi_call, and its rule for vmap
    handler.py      XLA calls back: its buffers -> Views -> the engine, in place, on XLA's stream
    ffi.py          XLA's C structures, as ctypes

Importing this package imports JAX, and registers the handlers with it. `import fastattn` does neither.
"""
from __future__ import annotations

from .api import attention, attention_varlen
from .handler import register

__all__ = ["attention", "attention_varlen"]

register()
