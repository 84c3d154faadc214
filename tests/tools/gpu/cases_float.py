"""Named float32 cases of the GPU engine's tests."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.tools.problems import Case


def float_cases() -> Iterator[Case]:
    """float32 on Hopper: head sizes over 128, where Q is split in registers, and keys that are split among multiprocessors."""
    base = Case("float", "float32", seqlen_q=200, seqlen_k=330, head_dim=512, causal=True, batch=1)
    for dim, dim_v in ((132, 132), (160, 96), (192, 256), (256, 256), (320, 320), (512, 512), (576, 512), (448, 392), (64, 512), (300, 40)):
        yield replace(base, name=f"float_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v)
        yield replace(base, name=f"float_full_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, causal=False, seqlen_q=65)
    features: dict[str, dict[str, Any]] = {
        "gqa": {"num_heads": 4, "num_heads_k": 2}, "window": {"window": (33, 70), "causal": False}, "softcap": {"softcap": 5.0},
        "alibi": {"alibi": "batch"}, "bias": {"bias": (1, 2, 200, 330)}, "mask": {"mask": (1, 1, 200, 330)}, "sinks": {"sinks": True},
        "dropout": {"dropout_p": 0.2}, "more_queries": {"seqlen_q": 330, "seqlen_k": 100}, "one_key": {"seqlen_k": 1},
        "huge": {"softmax_scale": 40.0}, "bhsd": {"layout": "bhsd"}, "transposed": {"memory": "transposed"},
        "mask_bias": {"bias": (1, 2, 200, 330), "mask": (1, 1, 200, 330)}}
    for (name, settings), dim in itertools.product(features.items(), (128, 256, 512)):
        yield replace(base, name=f"float_{name}_{dim}", **{**settings, "head_dim": dim})
    packed = replace(base, lengths_q=(130, 0, 65, 1, 64), lengths_k=(130, 40, 200, 70, 0), num_heads=4, num_heads_k=2)
    for dim, dim_v in ((128, 128), (256, 256), (512, 512), (576, 512)):
        yield replace(packed, name=f"float_packed_{dim}_{dim_v}", head_dim=dim, head_dim_v=dim_v, used_k=(100, 40, 0, 1, 0), spare=7)
    for heads, batch in ((1, 1), (2, 1), (1, 3)):       # four, four and two splits
        yield replace(base, name=f"float_split_{heads}_{batch}", causal=False, seqlen_q=100, seqlen_k=2048, num_heads=heads, batch=batch,
                      head_dim=320)
