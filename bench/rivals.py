"""The implementations on the CPU: each as a call on the same memory, in its own natural layout.

A library is imported only if it is measured, because a second thread pool in the process slows short calls of the
first.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import ceilings
from .arrays import Array, aligned, tensor
from .case import Case
from .machine import version
from .timing import wall


@dataclass(frozen=True, slots=True)
class Runner:
    """`call` is one public call, allocation included. `arrays` makes its result comparable.

    arrays(result) -> float32 [out] or [out, dq, dk, dv], each (batch, heads, seqlen, head_dim). None: nothing to
    compare.
    """

    call: Callable[[], Any]
    label: str
    arrays: Callable[[Any], list[Array]] | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, k, v, dout, (batch, heads, seqlen, head_dim). Random, because zeros would save power and touch no memory."""

    q: Array
    k: Array
    v: Array
    dout: Array


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    random = np.random.default_rng(seed)
    shapes = (case.shape_q, case.shape_k, case.shape_k, case.shape_q)
    return Inputs(*(aligned(random.standard_normal(shape, dtype=np.float32), case.dtype) for shape in shapes))


def make_fastattn(case: Case, x: Inputs, threads: int, engine: str | None = None) -> Runner:
    import fastattn

    if engine is None:
        fastattn.set_num_threads(threads)
    if case.page_size:
        return _with_caches(case, x, case.page_size)
    options: dict[str, Any] = {"causal": case.causal, "layout": "bhsd", "engine": engine}
    if case.window is not None:
        options["window"] = (case.window, 0 if case.causal else case.window)
    if case.softcap is not None:
        options["softcap"] = case.softcap
    if case.alibi:
        options["alibi_slopes"] = np.float32(2.0) ** (-8 * np.arange(1, case.num_heads + 1, dtype=np.float32) / case.num_heads)
    if case.dropout_p:
        options |= {"dropout_p": case.dropout_p, "seed": 1}
    if case.position:
        options["diagonal"] = case.shape_k[2] - case.seqlen

    def forward() -> list[Any]:
        return [fastattn.attention(x.q, x.k, x.v, **options)]

    def both() -> list[Any]:
        out, lse = fastattn.attention(x.q, x.k, x.v, return_lse=True, **options)
        grads = fastattn.attention_backward(x.dout, x.q, x.k, x.v, out, lse, **options)
        return [out, grads.dq, grads.dk, grads.dv]

    label = f"fastattn {fastattn.__version__}" + (f" ({engine})" if engine else "")
    return Runner(both if case.backward else forward, label, lambda result: [np.asarray(a, np.float32) for a in result])


def _with_caches(case: Case, x: Inputs, page_size: int) -> Runner:
    """A decoding step over caches in pages, which lie in random order; contiguous ones if page_size is 0."""
    import ml_dtypes

    import fastattn

    batch, heads, keys, _ = case.shape_k
    k, v = (np.ascontiguousarray(a.swapaxes(1, 2)) for a in (x.k, x.v))
    if case.cache_dtype:
        k, v = (a.astype(getattr(ml_dtypes, case.cache_dtype)) for a in (k, v))
    options: dict[str, Any] = {"cache_seqlens": np.full(batch, keys, np.int32)}
    if page_size:
        pages = batch * keys // page_size
        place = np.random.default_rng(0).permutation(pages)
        k, v = (a.reshape(pages, page_size, heads, -1)[np.argsort(place)] for a in (k, v))
        options["block_table"] = place.reshape(batch, -1).astype(np.int32)
    q = np.ascontiguousarray(x.q.swapaxes(1, 2))
    label = f"fastattn {fastattn.__version__}" + ("" if page_size else " (contiguous caches)")
    return Runner(lambda: fastattn.attention_with_kvcache(q, k, v, **options), label,
                  lambda out: [np.asarray(out, np.float32).swapaxes(1, 2)])


def make_torch(case: Case, x: Inputs, threads: int, fold: bool = False) -> Runner:
    """F.scaled_dot_product_attention and autograd.

    `fold`: the query rows of a GQA group as rows of one head. A user can write that by hand for decoding; it reads K
    and V once per group.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(threads)
    q, k, v, dout = (tensor(array) for array in (x.q, x.k, x.v, x.dout))
    grouped = case.shape_k[1] != case.num_heads

    if fold:
        folded = q.view(case.batch, case.shape_k[1], -1, case.head_dim)

        def forward() -> list[Any]:
            with torch.inference_mode():
                return [scaled_dot_product_attention(folded, k, v).view(q.shape)]
    else:
        def forward() -> list[Any]:
            with torch.inference_mode():
                return [scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)]

    def both() -> list[Any]:
        out = scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    if case.backward:
        for leaf in (q, k, v):
            leaf.requires_grad_()
    return Runner(both if case.backward else forward, f"torch {torch.__version__}", lambda result: [a.float().numpy() for a in result])


def make_onnxruntime(case: Case, x: Inputs, threads: int) -> Runner:
    """onnxruntime's two attention operators; the one that is faster on this case."""
    runners = [_onnx_attention(case, x, threads)]
    if case.shape_q == case.shape_k:
        runners.append(_onnx_multi_head(case, x, threads))
    return min(runners, key=lambda runner: min(wall(runner.call) for _ in range(4)))


def _onnx_attention(case: Case, x: Inputs, threads: int) -> Runner:
    """Attention of opset 23 on (batch, heads, seqlen, head_dim)."""
    session = _session("Attention", "", 23, {"is_causal": int(case.causal)}, (case.shape_q, case.shape_k, case.shape_k), threads)
    feeds = {"q": x.q, "k": x.k, "v": x.v}
    return Runner(lambda: session.run(None, feeds), f"onnxruntime {version('onnxruntime')} (Attention)", list)


def _onnx_multi_head(case: Case, x: Inputs, threads: int) -> Runner:
    """com.microsoft MultiHeadAttention on (batch, seqlen, heads * head_dim), its only layout. The copy to it is not timed."""
    batch, heads, seqlen, dim = case.shape_q
    shape = (batch, seqlen, heads * dim)
    attributes = {"num_heads": heads, "unidirectional": int(case.causal)}
    session = _session("MultiHeadAttention", "com.microsoft", 1, attributes, (shape, shape, shape), threads)
    feeds = {name: np.ascontiguousarray(array.swapaxes(1, 2)).reshape(shape) for name, array in (("q", x.q), ("k", x.k), ("v", x.v))}

    def arrays(result: list[Array]) -> list[Array]:
        return [result[0].reshape(batch, seqlen, heads, dim).swapaxes(1, 2)]

    return Runner(lambda: session.run(None, feeds), f"onnxruntime {version('onnxruntime')} (MultiHeadAttention)", arrays)


def _session(operator: str, domain: str, opset: int, attributes: dict[str, Any], shapes: tuple[tuple[int, ...], ...], threads: int) -> Any:
    """A float32 session of one node."""
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip("qkv", shapes, strict=True)]
    node = helper.make_node(operator, ["q", "k", "v"], ["out"], domain=domain, **attributes)
    graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid(domain, opset)] if domain else [])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Otherwise its threads spin for some 20 ms after each run and take a core from the next turn. Spinning within a run stays on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_fma_peak(case: Case, x: Inputs, threads: int) -> Runner:
    return Runner(ceilings.fma_call(case.flops, threads), "multiply-adds in registers, as many as the case has")


def make_memory_read(case: Case, x: Inputs, threads: int) -> Runner:
    return Runner(ceilings.read_call([x.k, x.v], threads), "reading K and V once")


def make_plain(case: Case, x: Inputs, threads: int) -> Runner:
    """fastattn without the features, to measure their cost."""
    return Runner(make_fastattn(case.plain, x, threads).call, "fastattn without the features")


MAKERS: dict[str, Callable[[Case, Inputs, int], Runner]] = {
    "torch": make_torch,
    "torch folded": lambda case, x, threads: make_torch(case, x, threads, fold=True),
    "onnxruntime": make_onnxruntime,
    "fma peak": make_fma_peak,
    "memory read": make_memory_read,
    "contiguous": lambda case, x, threads: _with_caches(case, x, 0),
    "plain": make_plain,
}
# What each needs besides fastattn: Python packages, or a compiler for the hardware probes.
PACKAGES: dict[str, tuple[str, ...]] = {"torch": ("torch",), "torch folded": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}


def missing(implementation: str) -> str | None:
    """Why an implementation cannot run here, or None."""
    absent = [package for package in PACKAGES.get(implementation, ()) if version(package) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return ceilings.missing_compiler() if implementation in ("fma peak", "memory read") else None
