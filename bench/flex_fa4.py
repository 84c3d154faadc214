"""FlashAttention-4's calls of `bench flex`: what it has itself where it has it, else a score_mod or a mask_mod in its own words.

Its functions get vectors of one or two scores of a thread in the terms of CuTe's Python, and are compiled with the kernel. It skips the
blocks that a table of blocks says are empty, which it makes of a mask_mod once, before the call.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .gpu import rivals

BLOCK = 128, 128            # rows and keys, as its forward has them on Hopper at head_dim 128


@dataclass(frozen=True)
class Numbers:
    """What the functions of a sequence length are made of."""

    heads: int
    window: int
    prefix: int
    side: int
    cap: float
    far: int
    table: Any
    document: Any


def missing(device: str) -> str | None:
    """Why it does not run here, or None."""
    return rivals.missing("FA4") if device == "cuda" else "it needs a CUDA device"


def call(kind: str, backward: bool, q: Any, k: Any, v: Any, n: Numbers) -> Callable[[], Any]:
    """The call of a kind; NotImplementedError where it has no gradient that torch's and ours have."""
    from flash_attn.cute.interface import flash_attn_func

    attend: Callable[..., Any] = partial(flash_attn_func, q, k, v)
    own = {"causal": {"causal": True}, "softcap": {"causal": True, "softcap": n.cap}, "sliding": {"window_size": (n.window - 1, 0)}}
    if kind in own:
        options: dict[str, Any] = own[kind]
    elif backward:
        raise NotImplementedError("its gradients of functions are functions of their own")
    elif kind in ("ALiBi", "learned table"):
        options = {"causal": True, "score_mod": _alibi(n.heads) if kind == "ALiBi" else _table(n.far)}
        options |= {"aux_tensors": [n.table.detach()]} if kind == "learned table" else {}
    else:
        options = _masked(kind, q, k, n)
    return lambda: _first(attend(**options))


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _alibi(heads: int) -> Any:
    import cutlass.cute as cute
    from cutlass import Float32

    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        slope = cute.math.exp2((head + 1).to(Float32) * (-8.0 / heads))
        return score - slope * (q_idx - kv_idx).to(Float32)         # under a causal mask no distance that counts is negative
    return score_mod


def _table(far: int) -> Any:
    import cutlass.cute as cute
    from cutlass import Float32

    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        apart = q_idx[0] - kv_idx[0]
        place = cute.make_rmem_tensor(1, Float32)
        place[0] = aux_tensors[0][head[0], min(max(apart, 0), far)]
        return score + place.load()
    return score_mod


def _masked(kind: str, q: Any, k: Any, n: Numbers) -> dict[str, Any]:
    """Its mask_mod, and the blocks that are seen."""
    from flash_attn.cute.compute_block_sparsity import compute_block_sparsity

    mask_mod = {"document": _document, "prefix-LM": partial(_prefix, n.prefix), "NATTEN 13 x 13": partial(_neighbours, n.side)}[kind]()
    aux = [n.document] if kind == "document" else None
    blocks = compute_block_sparsity(*BLOCK, 1, 1, q.shape[1], k.shape[1], mask_mod, aux, q.device)
    return {"mask_mod": mask_mod, "aux_tensors": aux, "block_sparse_tensors": blocks}


def _document() -> Any:
    import cutlass.cute as cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        of = aux_tensors[0]
        row, key = scalar_to_ssa(of[q_idx[0]], of.element_type), scalar_to_ssa(of[kv_idx[0]], of.element_type)
        return (row == key) & (q_idx >= kv_idx)
    return mask_mod


def _prefix(prefix: int) -> Any:
    import cutlass.cute as cute

    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return (q_idx >= kv_idx) | (kv_idx < prefix)
    return mask_mod


def _neighbours(side: int) -> Any:
    import cutlass.cute as cute

    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        down, across = q_idx // side - kv_idx // side, q_idx % side - kv_idx % side
        return (down <= 6) & (down >= -6) & (across <= 6) & (across >= -6)
    return mask_mod
