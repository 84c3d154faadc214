"""A child of `python -m fastattn check`: the calls of one engine against the reference. A JSON list of Results on stdout.

The engine is "cpu", whose instruction set FASTATTN_ISA names, or a kernel family, or "decode".
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import fastattn
from fastattn import reference, tolerance
from fastattn.registry import Registration
from fastattn.tolerance import Array, distance, norm

NAIVE = "fastattn-check-naive"


@dataclass(frozen=True, slots=True)
class Call:
    """A causal call with shared key heads. Sizes are no multiples of a tile's, so that edges are checked too."""

    dtype: str
    seqlen_q: int = 150
    seqlen_k: int = 200
    num_heads: int = 2
    head_dim: int = 64
    backward: bool = True

    def __str__(self) -> str:
        return f"{self.dtype} {self.seqlen_q}x{self.seqlen_k}"


@dataclass(frozen=True, slots=True)
class Result:
    """One direction of a call: its worst tensor, that one's error and the largest that is right, both relative. note: why there is none.

    failed: the engine should have run and did not.
    """

    call: str
    direction: str
    tensor: str = ""
    error: float = 0.0
    allowed: float = 0.0
    note: str = ""
    failed: bool = False

    @property
    def right(self) -> bool:
        return not self.failed and self.error <= self.allowed


# what is called on each engine. bfloat16 takes other instructions than float32 on CPUs, and needs tensor cores' kernels on GPUs
CALLS: dict[str, tuple[Call, ...]] = {
    "cpu": (Call("float32"), Call("bfloat16")),
    "simt": (Call("float32"),),
    "sm80": (Call("bfloat16"),),
    "sm90": (Call("bfloat16"),),
    "decode": (Call("bfloat16", seqlen_q=1, seqlen_k=600, backward=False),),
}


def inputs(call: Call) -> tuple[Array, Array, Array, Array]:
    """q, k, v and dout, the same in every process."""
    from fastattn.arrays.view import numpy_dtype

    draw = np.random.default_rng(0)
    shapes = [(1, call.seqlen_q, call.num_heads, call.head_dim), *[(1, call.seqlen_k, 1, call.head_dim)] * 2,
              (1, call.seqlen_q, call.num_heads, call.head_dim)]
    q, k, v, dout = (draw.standard_normal(shape, np.float32).astype(numpy_dtype(call.dtype)) for shape in shapes)
    return q, k, v, dout


def run(engine: str) -> Iterator[Result]:
    """The results of all calls of an engine."""
    for call in CALLS[engine]:
        try:
            yield from judged(call, *(on_host(call) if engine == "cpu" else on_device(call, engine)))
        except fastattn.UnsupportedError as error:
            yield Result(str(call), "forward", note="; ".join(error.reasons.values()))
        except Exception as error:      # whatever the engine raises is the result
            yield Result(str(call), "call", note=f"{type(error).__name__}: {error}".splitlines()[0], failed=True)


def on_host(call: Call) -> tuple[list[Array], list[Array]]:
    """out and lse, and the gradients, of the CPU engine."""
    q, k, v, dout = inputs(call)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, engine="cpu")
    return [out, lse], list(fastattn.attention_backward(dout, q, k, v, out, lse, causal=True, engine="cpu")[:3])


def on_device(call: Call, engine: str) -> tuple[list[Array], list[Array]]:
    """The same on CUDA device 0, in memory of our own, so that no other library is needed."""
    from fastattn.arrays import streams
    from fastattn.arrays.device_array import DeviceArray
    from fastattn.arrays.streams import LEGACY, Stream

    def to_device(x: Array) -> DeviceArray:
        made, host = DeviceArray(x.shape, x.dtype.name, Stream(LEGACY, 0)), np.ascontiguousarray(x)
        with streams.on_device(0):
            streams.check(streams.driver().cuMemcpyHtoD(made.view().ptr, host.ctypes.data, host.nbytes), "cuMemcpyHtoD")
        return made

    def to_host(x: DeviceArray, like: Array) -> Array:
        host = np.empty(x.shape, like.dtype)
        with streams.on_device(0):
            streams.check(streams.driver().cuMemcpyDtoH(host.ctypes.data, x.view().ptr, host.nbytes), "cuMemcpyDtoH")
        return host

    host = inputs(call)
    q, k, v, dout = map(to_device, host)
    attend: Any = fastattn.attention
    options: dict[str, Any] = {"causal": True, "engine": "gpu" if engine == "decode" else engine}
    if engine == "decode":
        kernels = fastattn.explain(attend, q, k, v, **options).kernels
        if not any(kernel.startswith("forward_decode") for kernel in kernels):
            raise fastattn.UnsupportedError("", {"decode": f"this device runs the call with {', '.join(kernels)}"})
    out, lse = attend(q, k, v, return_lse=True, **options)
    found = [to_host(out, host[0]), to_host(lse, np.empty(0, np.float32))]
    if not call.backward:
        return found, []
    grads = fastattn.attention_backward(dout, q, k, v, out, lse, **options)
    return found, [to_host(x, host[0]) for x in grads[:3]]


def naive_engine() -> Registration:
    """The naive rival as an engine for host memory, as a context manager."""
    def forward(problem: Any, operands: Any, out: Any, lse: Any, stream: Any) -> None:
        reference.forward(problem, operands, out, lse, tolerance.naive_precision(problem.dtype))

    def backward(problem: Any, operands: Any, dout: Any, out: Any, lse: Any, dlse: Any, grads: Any, *_: Any) -> None:
        reference.backward(problem, operands, dout, out, lse, dlse, grads, tolerance.naive_precision(problem.dtype))
    return fastattn.register_engine(NAIVE, forward, backward, lambda problem: None, "cpu")


def judged(call: Call, forward: list[Array], backward: list[Array]) -> list[Result]:
    """The worst tensor of each direction."""
    given = inputs(call)
    q, k, v, dout = (x.astype(np.float64) for x in given)
    exact: Any = {"causal": True, "engine": "reference"}
    rival: Any = {"causal": True, "engine": NAIVE}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **exact)
    with naive_engine():
        naive_out, naive_lse = fastattn.attention(*given[:3], return_lse=True, **rival)
        naive = fastattn.attention_backward(given[3], *given[:3], naive_out, naive_lse, **rival)
    finite = float(np.sqrt(np.isfinite(lse).sum()))     # a score's rounding is absolute: q.k may cancel
    worst = [_worst(call, "forward", [_judge("out", forward[0], out, naive_out, call.dtype, norm(out)),
                                      _judge("lse", forward[1], lse, naive_lse, "float32", norm(lse) + finite)])]
    if backward:
        grads = fastattn.attention_backward(dout, q, k, v, out, lse, **exact)
        terms = fastattn.attention_backward(dout, q, k, v, np.zeros_like(out), lse, **exact)    # what gradients are differences of
        tensors = zip(("dq", "dk", "dv"), backward, grads[:3], naive[:3], terms[:3], strict=True)
        worst.append(_worst(call, "backward", [_judge(name, got, right, other, call.dtype, norm(right) + norm(term))
                                               for name, got, right, other, term in tensors]))
    return worst


def _judge(name: str, got: Array, exact: Array, naive: Array, dtype: str, size: float) -> Result:
    """Errors relative to the exact tensor's norm. Its call and direction are filled in by _worst."""
    whole = norm(exact)
    limit = tolerance.allowed(distance(naive, exact), dtype, size)
    return Result("", "", name, distance(got, exact) / whole, limit / whole)


def _worst(call: Call, direction: str, results: list[Result]) -> Result:
    return replace(max(results, key=lambda result: result.error / result.allowed), call=str(call), direction=direction)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")     # compilers may print on stdout
    os.dup2(2, 1)
    print(json.dumps([asdict(result) for result in run(sys.argv[1])]), file=answers, flush=True)


if __name__ == "__main__":
    main()
