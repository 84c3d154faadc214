"""Each implementation as a call on the same numbers. A library is imported where it is measured, and nowhere else."""
from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import torch_calls
from .arrays import Array, aligned, tensor
from .machine import version
from .shape import Shape

Results = dict[str, Array]
GRADIENTS = ("dq", "dk", "dv")
# the largest scores that an implementation that stores them may have: float32, and their softmax
MOST_SCORES = {"cpu": 2 << 30, "cuda": 16 << 30}


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k, v, dout as NumPy arrays, (batch, seqlen, num_heads, head_dim)."""

    q: Array
    k: Array
    v: Array
    dout: Array


@dataclass(frozen=True, slots=True)
class Runner:
    """`call` is one public call, allocation included. `results` gives its result names and NumPy arrays: out, or dq, dk, dv.

    wait: where the device's events do not see the work, a function that waits for a result of `call`.
    """

    call: Callable[[], Any]
    label: str
    results: Callable[[Any], Results]
    wait: Callable[[Any], Any] | None = None


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Normal random numbers, the same in every run. Zeros would save power, and touch no memory."""
    draw = np.random.default_rng(seed)
    return Inputs(*(aligned(draw.standard_normal(size, np.float32), shape.dtype) for size in (shape.q, shape.k, shape.v, shape.out)))


def named(shape: Shape, result: Any, array: Callable[[Any], Array]) -> Results:
    return dict(zip(GRADIENTS, map(array, result), strict=False)) if shape.backward else {"out": array(result)}


# ---------------------------------------------------------------- fastattn
def make_fastattn(shape: Shape, x: Inputs, device: str) -> Runner:
    import fastattn

    q, k, v, dout = (_torch(a, device) for a in (x.q, x.k, x.v, x.dout)) if device == "cuda" else (x.q, x.k, x.v, x.dout)
    attend: Any = fastattn.attention
    array = _from_torch if device == "cuda" else np.asarray
    label = f"fastattn {fastattn.__version__}"
    if not shape.backward:
        return Runner(lambda: attend(q, k, v, causal=shape.causal), label, lambda out: named(shape, out, array))
    out, lse = attend(q, k, v, causal=shape.causal, return_lse=True)
    return Runner(lambda: fastattn.attention_backward(dout, q, k, v, out, lse, causal=shape.causal), label,
                  lambda grads: named(shape, grads[:3], array))


# ---------------------------------------------------------------- the others
def _torch(array: Array, device: str) -> Any:
    return tensor(array).to(device)


def _from_torch(x: Any) -> Array:
    return np.asarray(x.detach().float().cpu() if x.element_size() < 4 else x.detach().cpu())


def _on_torch(shape: Shape, x: Inputs, device: str, attend: torch_calls.Attend, label: str) -> Runner:
    q, k, v, dout = (_torch(a, device) for a in (x.q, x.k, x.v, x.dout))
    call = torch_calls.gradients_alone(attend, (q, k, v), None, dout) if shape.backward else torch_calls.forward_alone(attend, q, k, v)
    return Runner(call, label, lambda result: named(shape, result, _from_torch))


def _refuse_top_left(shape: Shape, name: str) -> None:
    if shape.masked and shape.seqlen_q != shape.seqlen_k:
        raise NotImplementedError(f"{name}'s causal diagonal is top-left")


def _refuse_stored_scores(shape: Shape, device: str, name: str) -> None:
    size = 2 * 4 * shape.batch * shape.num_heads * shape.seqlen_q * shape.seqlen_k
    if size > MOST_SCORES[device]:
        raise NotImplementedError(f"{name} would store {size / 1e9:.0f} GB of scores")


def _make_sdpa(shape: Shape, x: Inputs, device: str, backend: str) -> Runner:
    _refuse_top_left(shape, "SDPA")
    if backend == "math":
        _refuse_stored_scores(shape, device, "it")
    attend = torch_calls.sdpa(backend, causal=shape.masked, grouped=shape.num_heads != shape.num_heads_k)
    return _on_torch(shape, x, device, attend, f"torch {version('torch')} {backend}")


def _make_flash_attn(shape: Shape, x: Inputs, device: str) -> Runner:
    return _on_torch(shape, x, device, torch_calls.flash_attention_2(causal=shape.causal), f"flash_attn {version('flash_attn')}")


def _make_fa4(shape: Shape, x: Inputs, device: str) -> Runner:
    attend = torch_calls.flash_attention_4(causal=shape.causal)
    return _on_torch(shape, x, device, attend, f"FlashAttention-4 {_distribution('flash-attn-4')}")


def _make_xformers(shape: Shape, x: Inputs, device: str) -> Runner:
    return _on_torch(shape, x, device, torch_calls.xformers(shape.masked), f"xformers {version('xformers')}")


def _make_jax(shape: Shape, x: Inputs, device: str, implementation: str) -> Runner:
    """jax.nn.dot_product_attention under jit; the gradients alone by the pullback of jax.vjp."""
    _refuse_top_left(shape, "jax.nn")
    if implementation == "xla":
        _refuse_stored_scores(shape, device, "it")
    if shape.head_dim != shape.head_dim_v:
        raise NotImplementedError("jax.nn has one head_dim")
    jax = importlib.import_module("jax")
    if shape.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    place = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    q, k, v, dout = (jax.device_put(a, place) for a in (x.q, x.k, x.v, x.dout))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=shape.masked, implementation=implementation)

    if shape.backward:
        _, pullback = jax.vjp(attend, q, k, v)
        arguments: tuple[Any, ...] = (pullback, dout)
        function = jax.jit(lambda pull, g: pull(g))
    else:
        function, arguments = jax.jit(attend), (q, k, v)
    on_cpu = device == "cpu"

    def call() -> Any:
        result = function(*arguments)
        return jax.block_until_ready(result) if on_cpu else result
    return Runner(call, f"jax {version('jax')} {implementation}", lambda result: named(shape, result, np.asarray),
                  None if on_cpu else jax.block_until_ready)


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True, slots=True)
class Rival:
    """How another implementation is made, the module that it needs, and where it runs."""

    make: Callable[[Shape, Inputs, str], Runner]
    module: str
    devices: tuple[str, ...] = ("cuda",)

    def missing(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is None
        except ModuleNotFoundError:         # the package that the module is in
            return True


def _sdpa(backend: str, *devices: str) -> Rival:
    return Rival(lambda shape, x, device: _make_sdpa(shape, x, device, backend), "torch", devices)


def _jax(implementation: str, *devices: str) -> Rival:
    return Rival(lambda shape, x, device: _make_jax(shape, x, device, implementation), "jax", devices)


RIVALS: dict[str, Rival] = {
    "torch cuDNN": _sdpa("cuDNN", "cuda"),
    "torch flash": _sdpa("flash", "cpu", "cuda"),
    "torch efficient": _sdpa("efficient", "cuda"),
    "torch math": _sdpa("math", "cpu", "cuda"),
    "flash_attn": Rival(_make_flash_attn, "flash_attn.flash_attn_interface"),
    "FlashAttention-4": Rival(_make_fa4, "flash_attn.cute"),
    "xformers": Rival(_make_xformers, "xformers"),
    "jax.nn": _jax("xla", "cpu", "cuda"),
    "jax.nn cuDNN": _jax("cudnn", "cuda"),
}
