"""Engines of other packages for tests: torch's kernels, reached through
DLPack, and one that only records that it ran."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastattn import Grads, UnsupportedError, register_engine, registry
from fastattn.arrays.view import View
from fastattn.problem import Operands, Problem
from fastattn.registry import Registration


class Sdpa:
    """torch's fused kernels of one device, reached through DLPack. They know dense problems with as many key heads as query heads."""

    def __init__(self) -> None:
        self.torch: Any = pytest.importorskip("torch")
        self.aten, self.calls = self.torch.ops.aten, list[str]()

    def supports(self, p: Problem) -> str | None:
        s, missing = p.score, "torch's kernel has no "
        for there, what in ((p.packed, "packed sequences"), (p.dropout, "dropout of ours"), (s.softcap, "softcap"), (s.alibi, "ALiBi"),
                            (s.sinks, "sinks"), (s.mask, "boolean mask"), (p.group > 1, "shared key heads"),
                            (p.head_dim != p.head_dim_v, "head_dim_v of its own"), (p.mask.left is not None, "window"),
                            (p.mask.right not in (None, 0), "window"),
                            (p.mask.right == 0 and p.seqlen_q != p.seqlen_k and not p.mask.top_left, "bottom-right diagonal"),
                            (0 in (p.batch, p.num_heads, p.seqlen_q, p.seqlen_k), "empty problems")):
            if there:
                return missing + what
        return None

    def heads_first(self, *views: View) -> list[Any]:
        for x in views:
            if any(stride < 0 for stride in x.strides) or x.strides[-1] != x.itemsize:
                raise UnsupportedError("torch's kernel wants rows in one piece, and no negative strides")
        return [self.torch.from_dlpack(x).transpose(1, 2) for x in views]

    def bias(self, o: Operands) -> Any:
        return None if o.bias is None else self.torch.from_dlpack(o.bias)

    def kernel(self, q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
        return self.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)

    def gradients(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bias: Any, causal: bool, scale: float) -> Any:
        backward = self.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)

    def on(self, stream: int | None) -> contextlib.AbstractContextManager[Any]:
        assert stream is None
        return contextlib.nullcontext()

    def forward(self, p: Problem, o: Operands, out: View, lse: View | None, stream: int | None) -> None:
        with self.on(stream):
            q, k, v, place = self.heads_first(o.q, o.k, o.v, out)
            result, sums = self.kernel(q, k, v, self.bias(o), p.mask.right == 0, p.score.softmax_scale)[:2]
            place.copy_(result)
            if lse is not None:
                self.torch.from_dlpack(lse).copy_(sums.view(p.lse_shape))
        self.calls.append("forward")

    def backward(self, p: Problem, o: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads,
                 stream: int | None, deterministic: bool) -> None:
        if dlse is not None or grads.dbias is not None:
            raise UnsupportedError("torch's kernel has no gradient of bias, nor of lse.")
        with self.on(stream):
            places = self.heads_first(grads.dq, grads.dk, grads.dv)
            arrays = self.heads_first(dout, o.q, o.k, o.v, out)
            for place, x in zip(places, self.gradients(*arrays, self.torch.from_dlpack(lse), self.bias(o), p.mask.right == 0,
                                                       p.score.softmax_scale), strict=True):
                place.copy_(x)
        self.calls.append("backward")


class Cudnn(Sdpa):
    """cuDNN's attention, by way of torch."""

    def supports(self, p: Problem) -> str | None:
        if p.dtype not in ("float16", "bfloat16") or p.head_dim % 8 or p.head_dim > 128:
            return f"cuDNN has no {p.dtype} of head_dim {p.head_dim}"
        return super().supports(p)

    def kernel(self, q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
        return self.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=scale)

    def gradients(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bias: Any, causal: bool, scale: float) -> Any:
        if bias is not None:
            raise UnsupportedError("cuDNN's gradients beside a bias are not asked for here")
        state = self.torch.zeros((), dtype=self.torch.int64, device=q.device)
        return self.aten._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse[..., None], state, state, None, None, None,
                                                                      q.shape[2], k.shape[2], 0.0, causal, scale=scale)

    def on(self, stream: int | None) -> contextlib.AbstractContextManager[Any]:
        assert stream is not None
        cuda = self.torch.cuda
        return cuda.stream(cuda.default_stream() if stream == 1 else cuda.ExternalStream(stream))  # type: ignore[no-any-return]


class Noter:
    """An engine that records its name when it runs, or refuses for a given reason."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, refusal: str | None = None) -> None:
        self.name, self.refusal = name, refusal

    def supports(self, problem: Problem) -> str | None:
        return self.refusal

    def forward(self, problem: Problem, operands: Operands, out: View, lse: View | None, stream: int | None) -> None:
        self.log.append(self.name)

    def registered(self, device: str = "cpu") -> Registration:
        return register_engine(self.name, self.forward, None, self.supports, device)


@contextlib.contextmanager
def nothing_left() -> Iterator[list[str]]:
    """The names of the Noters that ran. Every engine registered inside must be gone at the end."""
    before = registry._registered, registry._active
    Noter.log.clear()
    yield Noter.log
    assert (registry._registered, registry._active) == before


@contextlib.contextmanager
def torch_on_the_cpu() -> Iterator[Sdpa]:
    """Registered as "torch"."""
    engine = Sdpa()
    with register_engine("torch", engine.forward, engine.backward, engine.supports, device="cpu"):
        yield engine
