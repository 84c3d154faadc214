"""One attention call inside a traced program: an XLA custom call, and what vmap makes of it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import problems
from .handler import TARGET
from .record import Record

Arrays = dict[str, Any]         # JAX's arrays and tracers, by the names that a Record lists
_BROADCAST = ("bias", "mask")


def bind(record: Record, arrays: Arrays) -> Arrays:
    """The results of a call, by the names that the record lists. JAX can batch it, and derivative.py differentiates it."""
    call = jax.custom_jvp(lambda arrays: _batchable(record, arrays))

    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(f"{record.call}(): a derivative of its derivative is wanted; expected gradients of first order, by reverse mode "
                        "(jax.grad, jax.vjp); jax.nn.dot_product_attention has the others.")
    call.defjvp(refuse)
    return call(arrays)  # type: ignore[no-any-return]


def _batchable(record: Record, arrays: Arrays) -> Any:
    call = jax.custom_batching.custom_vmap(lambda arrays: _custom_call(record, arrays))

    def rule(size: int, mapped: Any, arrays: Arrays) -> tuple[Arrays, dict[str, bool]]:
        of = mapped[0]                      # of the one argument
        together = fold(record, size, of, arrays)
        found = one_by_one(record, of, arrays) if together is None else unfold(size, of, arrays, bind(record, together))
        return found, dict.fromkeys(record.results, True)
    call.def_vmap(rule)
    return call(arrays)


def _custom_call(record: Record, arrays: Arrays) -> Arrays:
    operands, kind = alike([arrays[name] for name in record.operands])
    shapes = [jax.ShapeDtypeStruct(shape, dtype, **kind) for shape, dtype in _results(record, arrays)]
    found = jax.ffi.ffi_call(TARGET, shapes)(*operands, record=record.text())
    return dict(zip(record.results, found, strict=True))


def _results(record: Record, arrays: Arrays) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each result."""
    p = problems.traced_problem(record, arrays)
    out = p.out_shape
    if record.layout == "bhsd":
        out = (out[0], out[2], out[1], out[3])
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"out": (out, arrays["q"].dtype), "lse": (p.lse_shape, jnp.dtype(p.lse_dtype))}
    of = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias", "dsinks": "sinks"}
    sources = {name: arrays[of.get(name, name[1:])] for name in record.results if name not in shapes}
    return [shapes[name] if name in shapes else (sources[name].shape, sources[name].dtype) for name in record.results]


def alike(operands: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Operands that vary over the same mesh axes of an enclosing shard_map, and how to say so of a result.

    A gradient of an operand that is the same on all devices is then summed over them, by JAX.
    """
    varying = [_mesh_axes(x) for x in operands]
    axes = frozenset[Any]().union(*varying)
    if not axes:
        return operands, {}
    same = [jax.lax.pcast(x, tuple(sorted(axes - of)), to="varying") for x, of in zip(operands, varying, strict=True)]
    here = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
    aval = jax.typeof(same[0])
    return same, {"sharding": here, **({"manual_axis_type": aval.manual_axis_type} if _NAMED else {"vma": aval.vma})}


_NAMED = hasattr(jax.sharding, "ManualAxisType")        # JAX 0.10; before, a set of axes


def _mesh_axes(x: Any) -> frozenset[Any]:
    aval = jax.typeof(x)
    return aval.manual_axis_type.varying if _NAMED else aval.vma  # type: ignore[no-any-return]


# ---------------------------------------------------------------- vmap
def fold(record: Record, size: int, mapped: Mapping[str, bool], arrays: Arrays) -> Arrays | None:
    """The arrays of one call whose batch is the mapped axis times the batch; None where one call cannot do it.

    That is: packed sequences; dropout and functions, which depend on the position in the batch; sinks, and a bias or mask of
    one batch entry, that each element of the mapped axis has for itself.
    """
    if record.packed or record.flex is not None or record.options.dropout_p or mapped.get("sinks") or "dsinks" in record.results:
        return None
    batch = arrays["q"].shape[int(mapped["q"])]
    folded = {}
    for name, x in arrays.items():
        lead = int(mapped[name])
        if name in _BROADCAST:
            x = _four_axes(x, lead)
            entries = x.shape[lead]
            shared = entries == 1 and not lead and not (name == "bias" and "dbias" in record.results)
            if not shared and entries != batch:
                return None
        else:
            shared = name == "sinks" or (name == "alibi_slopes" and x.ndim == 1)
            if name == "alibi_slopes" and lead and x.ndim == 2:         # the same for the batch of one call
                x = jnp.broadcast_to(x[:, None], (size, batch, x.shape[1]))
        if not shared:
            x = x if lead else jnp.broadcast_to(x, (size, *x.shape))
            x = x.reshape(size * batch, *x.shape[2:])
        folded[name] = x
    return folded


def unfold(size: int, mapped: Mapping[str, bool], arrays: Arrays, results: Arrays) -> Arrays:
    """The results of a folded call, with the mapped axis in front again."""
    def one(name: str) -> tuple[int, ...]:
        """The shape of an operand of one call."""
        return tuple(arrays[name].shape[1 if mapped[name] else 0:])
    return {name: x.reshape(size, *(one("bias") if name == "dbias" else (one("q")[0], *x.shape[1:]))) for name, x in results.items()}


def one_by_one(record: Record, mapped: Mapping[str, bool], arrays: Arrays) -> Arrays:
    """The results of one call for each element of the mapped axis, one after the other."""
    shared = {name: x for name, x in arrays.items() if not mapped[name]}
    each = {name: x for name, x in arrays.items() if mapped[name]}
    return jax.lax.map(lambda element: bind(record, shared | element), each)  # type: ignore[no-any-return]


def _four_axes(x: Any, lead: int) -> Any:
    """x with ones inserted behind its first `lead` axes, so that four follow them."""
    return x.reshape(*x.shape[:lead], *(1,) * (4 + lead - x.ndim), *x.shape[lead:])
