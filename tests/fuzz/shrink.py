"""The smallest problem that is still wrong: features are taken away and sizes halved one at a time, as long as a complaint remains."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from .spec import Spec

PLAIN = {f.name: f.default for f in fields(Spec)}
# what only the caller's side decides comes first: it leaves the kernel as it is
HELD = ("memory", "repeats", "readonly", "numbers", "give_out", "layout", "return_lse", "threads", "stream")
SCORES = ("dropout_at", "dropout_heads", "diagonal", "out_dtype", "dropout_p", "offset", "dropout_seed", "alibi", "softcap", "mask", "bias",
          "sinks", "score_mod", "mask_mod", "block_mask", "window", "causal", "softmax_scale", "bias_values", "mask_density", "bias_dtype")
OTHERS = ("deterministic", "dlse", "need_dbias", "need_dcaptured", "backward", "beyond", "spare", "used_k", "hidden", "v_size", "values",
          "parts")
FEATURES = (*HELD, *OTHERS, *SCORES)
Move = Callable[[Spec], list[Spec]]


def _moves() -> Iterator[Move]:
    """Ways to make a Spec simpler; each gives Specs to try, best first."""
    for many in (FEATURES, HELD, OTHERS, SCORES):
        yield lambda spec, many=many: [replace(spec, **{name: PLAIN[name] for name in many})]  # type: ignore[misc]
    for one in FEATURES:
        yield lambda spec, one=one: [replace(spec, **{one: PLAIN[one]})]  # type: ignore[misc]
    yield _sequences
    yield _lengths
    yield lambda spec: [replace(spec, num_heads=spec.num_heads_k)]
    yield lambda spec: [replace(spec, num_heads=spec.num_heads // max(spec.num_heads_k, 1), num_heads_k=1)]
    for size in ("batch", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
        yield lambda spec, size=size: [replace(spec, **{size: n}) for n in _smaller(getattr(spec, size))]  # type: ignore[misc]


def _sequences(spec: Spec) -> list[Spec]:
    """One sequence of a packed problem alone, or one less, or a dense problem."""
    if spec.lengths_q is None:
        return []
    count = len(spec.lengths_q)
    if count == 1 and spec.used_k is None and spec.spare == (0, 0) and not isinstance(spec.diagonal, tuple):
        return [replace(spec, lengths_q=None, lengths_k=(), beyond=(0, 0), batch=1, seqlen_q=spec.lengths_q[0], seqlen_k=spec.lengths_k[0])]
    choices = [[n] for n in range(count)] + [[m for m in range(count) if m != n] for n in range(count)]

    def only(kept: list[int]) -> Spec:
        settings: dict[str, Any] = {name: tuple(getattr(spec, name)[n] for n in kept)
                                    for name in ("lengths_q", "lengths_k", "used_k", "diagonal") if isinstance(getattr(spec, name), tuple)}
        return replace(spec, **settings)
    return [only(kept) for kept in choices if len(kept) < count]


def _lengths(spec: Spec) -> list[Spec]:
    found = []
    for name in ("lengths_q", "lengths_k"):
        for n, length in enumerate(getattr(spec, name) or ()):
            for smaller in _smaller(length):
                settings: dict[str, Any] = {name: (*getattr(spec, name)[:n], smaller, *getattr(spec, name)[n + 1:])}
                found.append(replace(spec, **settings))
    return found


def _smaller(n: int) -> list[int]:
    return list(dict.fromkeys(m for m in (1, n // 4, n // 2, n - n // 8, *([n - 1] if n < 10 else ())) if 0 < m < n))


def _fitting(spec: Spec, old: Spec) -> Spec:
    """Shapes of bias and mask, windows and parts as the new lengths need them."""
    settings: dict[str, Any] = {}
    for name in ("bias", "mask"):
        shape = getattr(spec, name)
        if shape is not None:
            lead = 4 - len(shape)
            settings[name] = tuple(1 if n == 1 and m != 1 else full for n, m, full in
                                   zip(shape, old.full[lead:], spec.full[lead:], strict=True))
    if spec.dropout_p == 0:
        settings |= {"dropout_at": None, "dropout_heads": None}
    if spec.used_k is not None:
        settings["used_k"] = tuple(map(min, spec.used_k, spec.lengths_k))
    settings["need_dbias"] = spec.need_dbias and spec.bias is not None and spec.backward
    settings["dlse"], settings["parts"] = spec.dlse and spec.backward, tuple(min(cut, spec.seqlen_k) for cut in spec.parts)
    settings["deterministic"] = spec.deterministic and spec.backward
    settings["need_dcaptured"] = bool(spec.need_dcaptured and spec.backward and spec.score_mod)
    settings["block_mask"] = None if spec.mask_mod is None and spec.block_mask == "function" else spec.block_mask
    axes = dict.fromkeys(("q", "k", "v", "dout"), 3 if spec.packed else 4) | {"bias": len(spec.bias or ())}
    settings["repeats"] = tuple(entry for entry in spec.repeats if int(entry[-1]) < axes[entry[:-1]])
    return replace(spec, **settings)


def shrink(spec: Spec, wrong: Callable[[Spec], list[str]], seconds: float) -> tuple[Spec, list[str]]:
    """(smallest Spec found in that time, its complaints)."""
    end, found = time.monotonic() + seconds, wrong(spec)
    better = True
    while better:
        better = False
        for move in _moves():
            for variant in move(spec):
                if time.monotonic() > end:
                    return spec, found
                variant = _fitting(variant, spec)
                complaints = wrong(variant) if variant != spec else []
                if complaints:
                    spec, found, better = variant, complaints, True
                    break
    return spec, found
