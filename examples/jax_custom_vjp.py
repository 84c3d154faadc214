"""fastattn under jax.grad: one jax.custom_vjp around `attention` and `attention_backward`.

    python jax_custom_vjp.py        # compares results and gradients with jax.nn.dot_product_attention, eagerly, under jit and vmap

Called eagerly, fastattn reads JAX's arrays in place, on the CPU or a GPU, and its results are JAX's. While jit, vmap or
scan trace, there are no arrays to read. On the CPU `jax.pure_callback` then calls fastattn when the compiled program
runs. On a GPU a callback would copy everything to the host, so tracing is refused there; it would need a kernel
registered with jax.ffi.

A callback on the CPU may wait for ever for arguments that JAX computes asynchronously (jax-ml/jax issues 24255, 25861).
Call jax.config.update("jax_cpu_enable_async_dispatch", False) first, as `main` does.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastattn import attention, attention_backward

Arrays = dict[str, Any]         # the array arguments of fastattn by their names
Options = tuple[tuple[str, Any], ...]
NUMBERS = ("seed", "offset")    # may be arrays, so that a compiled step drops other elements each time it runs


# ---------------------------------------------------------------- the adapter
def attend(q: Any, k: Any, v: Any, *, bias: Any = None, sinks: Any = None, mask: Any = None, alibi_slopes: Any = None,
           seed: Any = None, offset: Any = 0, need_dbias: bool = True, return_lse: bool = False, **options: Any) -> Any:
    """`attention` with gradients for q, k, v, bias and sinks. need_dbias=False makes bias a constant.

    Other keywords are fastattn's, except `out` and `stream`; they are static under jit. seed and offset are static
    too if they are ints. An int has 64 bits; JAX's arrays have 32 by default.
    """
    options["need_dbias"] = need_dbias and bias is not None
    arrays = {"bias": bias, "sinks": sinks, "mask": mask, "alibi_slopes": alibi_slopes}
    for name, number in zip(NUMBERS, (seed, offset), strict=True):
        (options if number is None or isinstance(number, int) else arrays)[name] = number
    out, lse = _attend(tuple(options.items()), q, k, v, {name: x for name, x in arrays.items() if x is not None})
    return (out, lse) if return_lse else out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Options, q: Any, k: Any, v: Any, more: Arrays) -> Any:
    options = dict(static)
    del options["need_dbias"]
    batch, seqlen, heads = q.shape[:3] if options.get("layout") != "bhsd" else (q.shape[0], q.shape[2], q.shape[1])
    shapes = (jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
              jax.ShapeDtypeStruct((batch, heads, seqlen), jnp.promote_types(q.dtype, jnp.float32)))
    return _call(partial(attention, return_lse=True, **options), shapes, {"q": q, "k": k, "v": v, **more})


def _forward(static: Options, q: Any, k: Any, v: Any, more: Arrays) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    out, lse = _attend(static, q, k, v, more)
    return (out, lse), (q, k, v, more, out, lse)


def _backward(static: Options, saved: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    q, k, v, more, out, lse = saved
    options, (dout, dlse) = dict(static), cotangents                    # zeros for an unused result
    wanted = (q, k, v, more["bias"] if options["need_dbias"] else None, more.get("sinks"))
    shapes = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted]
    dq, dk, dv, dbias, dsinks = _call(partial(_gradients, **options), shapes,
                                      {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse, **more})
    found = {"bias": dbias, "sinks": dsinks}
    return dq, dk, dv, {name: found.get(name) for name in more}         # None: no gradient


_attend.defvjp(_forward, _backward)


def _gradients(**arguments: Any) -> list[Any]:
    return list(attention_backward(**arguments))            # a list like the shapes: pure_callback compares containers


def _call(function: Callable[..., Any], shapes: Any, arrays: Arrays) -> Any:
    """function(**arrays): now, or, if one of them is being traced, when the traced program runs."""
    def with_numbers(arrays: Arrays) -> Any:
        return function(**{name: int(x) if name in NUMBERS else x for name, x in arrays.items()})

    def on_host(arrays: Arrays) -> Any:                     # NumPy's, because a callback that uses JAX can deadlock
        return with_numbers({name: np.asarray(x) for name, x in arrays.items()})

    if not any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
        return with_numbers(arrays)
    if jax.default_backend() != "cpu":
        raise NotImplementedError("fastattn cannot be traced for a GPU: call it outside of jit, vmap and scan")
    return jax.pure_callback(on_host, shapes, arrays, vmap_method="sequential")


# ---------------------------------------------------------------- compared with JAX's own
def own(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> tuple[Any, Any]:
    """What `attend` with causal=True and return_lse=True should return, by JAX alone.

    A sink is one more key, whose score is the sink and whose value is 0.
    """
    batch, seqlen, heads, dim = q.shape
    zero = jnp.zeros((batch, 1, *k.shape[2:]), k.dtype)
    k, v = jnp.concatenate((k, zero), axis=1), jnp.concatenate((v, zero), axis=1)
    sink = jnp.broadcast_to(sinks[:, None, None], (heads, seqlen, 1))
    bias = jnp.concatenate((jnp.where(jnp.tri(seqlen, dtype=bool), bias, -jnp.inf), sink), axis=2)[None]
    scores = jnp.einsum("bihd,bjhd->bhij", q, jnp.repeat(k, heads // k.shape[2], axis=2)) * dim**-0.5 + bias
    return jax.nn.dot_product_attention(q, k, v, bias), jax.nn.logsumexp(scores, axis=3)


def compare() -> dict[str, float]:
    """Largest error of any result or gradient, for each way to call `attend`, relative to the largest value of `own`."""
    rng = np.random.default_rng(0)
    shapes = ((2, 48, 4, 32), (2, 48, 2, 32), (2, 48, 2, 32), (4, 48, 48), (4,), (2, 48, 4, 32), (2, 4, 48))
    q, k, v, bias, sinks, *weights = (jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes)

    def ours(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        return attend(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True)

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        """The two results, and the gradients of a weighted sum of them."""
        def loss(*x: Any) -> Any:
            results = function(*x)
            return sum(jnp.vdot(weight, result) for weight, result in zip(weights, results, strict=True)), results

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)

    def mapped(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
        """Mapped over the batch: one sequence per call."""
        one = jax.vmap(lambda q, k, v: ours(q[None], k[None], v[None], bias, sinks))
        return jax.tree.map(lambda x: x[:, 0], one(q, k, v))

    ways: dict[str, Callable[..., Any]] = {"own": jax.jit(of(own)), "eager": of(ours)}
    if jax.default_backend() == "cpu":
        ways |= {"jit": jax.jit(of(ours)), "jit and vmap": jax.jit(of(mapped))}
    found = {name: [np.asarray(x) for x in jax.tree.leaves(way(q, k, v, bias, sinks))] for name, way in ways.items()}
    want = found.pop("own")
    return {name: max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)) for name, got in found.items()}


def main() -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name, error in compare().items():
        print(f"{name:12} {error:.1e} from jax.nn.dot_product_attention")


if __name__ == "__main__":
    main()
