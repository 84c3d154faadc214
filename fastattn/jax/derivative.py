"""The gradients of a call: one jax.custom_vjp around the forward and the backward of the engines.

JAX says which operands are differentiated and which results are used. So dbias is computed only if somebody wants it,
and an operand without a gradient is refused instead of getting zeros.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from . import flex
from .call import Arrays, alike, bind
from .record import Record

_ALWAYS, _OPTIONAL = ("q", "k", "v"), ("bias", "sinks")


def _attend(record: Record, arrays: Arrays) -> Arrays:
    return bind(record, arrays)


def _forward(record: Record, primals: Any) -> tuple[Arrays, tuple[Arrays, Any]]:
    differentiated = {name for name, x in primals.items() if x.perturbed}
    for name in differentiated.difference(_ALWAYS, _optional(record)):
        of, hint = flex.shown(name), "jax.lax.stop_gradient(" + (name if name == flex.shown(name) else "it") + ") works."
        raise TypeError(f"{record.call}(): {of} is differentiated; expected a constant, because fastattn has no gradient of it; {hint}")
    arrays = {name: x.value for name, x in primals.items()}
    found = bind(replace(record, results=("out", "lse")), arrays)
    return {name: found[name] for name in record.results}, ({**arrays, **found}, _mark(record, differentiated))


def _optional(record: Record) -> tuple[str, ...]:
    """Operands that may have a gradient; those of score_mod together, because the engines compute all or none."""
    return (*_OPTIONAL, *flex.differentiable(record.flex))


def _mark(record: Record, differentiated: set[str]) -> Any:
    """An array of at most 7 bytes whose length says which optional gradients are wanted, for the backward, which JAX does not tell.

    Shapes are the one static thing that JAX keeps for each linearization. The structure of what a forward saves, where a
    static value could lie, is kept once for all linearizations of a jitted function: the last one traced would count.
    """
    wanted = [name in differentiated for name in _OPTIONAL] + [not differentiated.isdisjoint(flex.differentiable(record.flex))]
    return jnp.zeros(sum(1 << i for i, x in enumerate(wanted) if x), jnp.int8)


def _backward(record: Record, saved: tuple[Arrays, Any], cotangents: Arrays) -> tuple[Arrays]:
    (arrays, mark), used = saved, {name: x for name, x in cotangents.items() if not _is_zero(x)}
    wanted = [name for i, name in enumerate(_OPTIONAL) if mark.shape[0] >> i & 1]
    if mark.shape[0] >> len(_OPTIONAL) & 1:
        wanted += flex.differentiable(record.flex)
    given = {**arrays, "dout": used["out"] if "out" in used else jnp.zeros(arrays["out"].shape, arrays["out"].dtype)}
    if "lse" in used:
        given["dlse"] = used["lse"]
    gradients = tuple("d" + name for name in (*_ALWAYS, *wanted))
    found = bind(replace(record, call=f"{record.call}_backward", operands=tuple(given), results=gradients), given)
    return ({name: found.get("d" + name) for name in record.operands},)         # None: no gradient


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


_differentiable = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


def fastattn(record: Record, arrays: Arrays) -> Any:
    operands, _ = alike(list(arrays.values()))
    return _differentiable(record, dict(zip(arrays, operands, strict=True)))


attend = jax.jit(fastattn, static_argnums=0)        # so an eager call is traced once, and shard_map takes it outside jit
