"""Prompts over paged caches beside `attention` on whole arrays, in one run: `python -m tests.tools.gpu.prefill_times [--dim 128]`.

TFLOP/s, causal, bfloat16, 32 query and 8 key heads, of requests with so many rows and keys; pages are shuffled. `packed`: queries of all
requests in one array. `8 bits`: caches of e4m3, contiguous and in pages of 64;
`8-bit q`: beside the latter. The last column is the slowest of all 16-bit pages, as a part of `attention`. Medians of rounds in which all
take turns.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.tools.gpu.variants_8bit import seconds

HEADS, HEADS_K = 32, 8
SHAPES = ((1, 8192, 8192), (16, 1024, 1024), (4, 2048, 8192), (1, 4096, 32768), (16, 512, 8192), (16, 128, 8192))    # requests, rows, keys


def calls_of(batch: int, rows: int, keys: int, dim: int, sizes: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    import torch

    import fastattn
    q, k, v = (torch.randn(batch, n, heads, dim, device="cuda", dtype=torch.bfloat16)
               for n, heads in ((rows, HEADS), (keys, HEADS_K), (keys, HEADS_K)))
    lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
    cu = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * rows
    wanted = fastattn.attention(q, k, v, causal=True)
    calls: dict[str, Callable[[], Any]] = {"attention": partial(fastattn.attention, q, k, v, causal=True)}
    calls["rows"] = partial(fastattn.attention_with_kvcache, q, k, v, cache_seqlens=lengths)
    for size in sizes:
        table = torch.randperm(batch * keys // size, device="cuda", dtype=torch.int32).reshape(batch, -1)
        pages = [torch.empty(batch * keys // size, size, HEADS_K, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for page, x in zip(pages, (k, v), strict=True):
            page[table.flatten().long()] = x.reshape(-1, size, HEADS_K, dim)
        calls[f"{size}"] = partial(fastattn.attention_with_kvcache, q, *pages, cache_seqlens=lengths, block_table=table)
        if size == 64 and len(sizes) > 1:
            calls["packed 64"] = partial(fastattn.attention_with_kvcache, q.flatten(0, 1), *pages, cache_seqlens=lengths, block_table=table,
                                         cu_seqlens_q=cu, max_seqlen_q=rows)
    k8, v8 = (x.to(torch.float8_e4m3fn) for x in (k, v))
    calls["8 bits"] = partial(fastattn.attention_with_kvcache, q, k8, v8, cache_seqlens=lengths)
    table = torch.randperm(batch * keys // 64, device="cuda", dtype=torch.int32).reshape(batch, -1)
    pages8 = [torch.empty(batch * keys // 64, 64, HEADS_K, dim, device="cuda", dtype=torch.float8_e4m3fn) for _ in range(2)]
    for page, x in zip(pages8, (k8, v8), strict=True):
        page.view(torch.uint8)[table.flatten().long()] = x.view(torch.uint8).reshape(-1, 64, HEADS_K, dim)
    calls["8 bits, 64"] = partial(fastattn.attention_with_kvcache, q, *pages8, cache_seqlens=lengths, block_table=table)
    q8 = q.to(torch.float8_e4m3fn)
    calls["8-bit q"] = partial(fastattn.attention_with_kvcache, q8, *pages8, cache_seqlens=lengths, block_table=table)
    wanted8, narrow = (fastattn.attention(x, k8.bfloat16(), v8.bfloat16(), causal=True) for x in (q, q8.bfloat16()))
    right = dict[str, Callable[[], Any]]()
    for name, call in calls.items():
        exact = (narrow if name == "8-bit q" else wanted8 if name.startswith("8 bits") else wanted).float()
        error = (call().reshape(exact.shape).float() - exact).norm() / exact.norm()
        if error < (4e-2 if name == "8-bit q" else 1e-2):
            right[name] = call
        else:
            print(f"{name}: wrong, {error}", flush=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="keys of a page")
    parser.add_argument("--compile", action="store_true", help="only run the first calls, which compiles their kernels")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    sizes = tuple(given.pages)
    for batch, rows, keys in SHAPES:
        calls = calls_of(batch, rows, keys, given.dim, sizes)
        if given.compile:
            return
        found = seconds(calls, given.rounds)
        flops = 4 * batch * HEADS * given.dim * rows * (keys - (rows - 1) / 2)
        if rows == SHAPES[0][1] and keys == SHAPES[0][2]:
            print(f"{'':22}" + "".join(f"{name:>11}" for name in found))
        text = "".join(f"{flops / s / 1e12:11.0f}" for s in found.values())
        slowest = max(found.get(str(n), 1.0) for n in sizes)
        print(f"{batch:3} x {rows:5} of {keys:6}  {text}  {found['attention'] / slowest:.2f}", flush=True)


if __name__ == "__main__":
    main()
