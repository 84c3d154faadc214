"""Attention over key and value caches on a CUDA device: `python -m bench decode`, `python -m bench paged`, `python -m bench fp8`.

decode      contiguous caches, all requests of one length: beside torch's SDPA and FlashAttention-4
paged       block tables: steps, ragged batches, speculative rows, prefill in chunks, latent caches, requests over one prompt, also
            each alone; beside FlashInfer
fp8         the same with 8-bit caches and bfloat16 queries; beside FlashInfer

Device time, medians of rounds in which all implementations take turns. Caches that would stay in the L2 cache have several copies, and
calls go round them. GB/s are those of the keys and values that are read, TFLOP/s those of two products. Lengths are on the device.
"""
from __future__ import annotations

import csv
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.benchmark import torch_calls
from fastattn.benchmark.events import Events, sets_of
from fastattn.benchmark.timing import rotate

MOST_BYTES = 48 << 30       # of all copies of the caches
COLUMNS = ("fastattn", "alone", "cuDNN", "flash", "FA4", "FlashInfer")
TOLERANCE = 2e-2            # largest difference to float32, relative to the largest number
TOLERANCE_8BIT = 8e-2       # of an 8-bit q, whose P has 8 bits, too: 3 % in the mean


@dataclass(frozen=True)
class Case:
    """A call: `lengths` are the keys of each request with those of the call. page 0: contiguous."""

    name: str
    lengths: tuple[int, ...]
    rows: int = 1
    heads: int = 32
    heads_k: int = 8
    dim: int = 128
    dim_v: int = 0              # dim when 0; of a latent cache its first columns
    page: int = 64
    eight: bool = False
    eight_q: bool = False       # the queries, too
    append: bool = False
    shared: int = 0             # the first so many keys of all requests are the same, in whole pages

    @property
    def keys(self) -> int:
        """Keys in the caches."""
        return self.shared + sum(n - self.shared for n in self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that a call has to read."""
        each = self.dim + (0 if self.dim_v else self.dim)
        return self.keys * self.heads_k * each * (1 if self.eight else 2)

    @property
    def flop(self) -> float:
        pairs = sum(self.rows * n - self.rows * (self.rows - 1) // 2 for n in self.lengths)
        return 2.0 * pairs * self.heads * (self.dim + (self.dim_v or self.dim))


def _steps(name: str, **more: Any) -> Iterator[Case]:
    for batch in (1, 16, 64, 256):
        for keys in (1024, 8192, 32768):
            case = Case(f"{name} {batch} x {keys}", (keys,) * batch, **more)
            if case.cache_bytes <= MOST_BYTES:
                yield case


def _others(name: str, **more: Any) -> Iterator[Case]:
    """One size of what else there is."""
    many, long = (8192,) * 16, (8192,) * 64
    yield Case(f"{name} head_dim 64", many, dim=64, **more)
    yield Case(f"{name} head_dim 96", many, dim=96, **more)
    yield Case(f"{name} head_dim 256", many, dim=256, **more)
    yield Case(f"{name} 128 over 8 heads", many, heads=128, **more)
    yield Case(f"{name} 8 speculative rows", many, rows=8, **more)
    yield Case(f"{name} 64 x 4 speculative rows", long, rows=4, **more)
    yield Case(f"{name} 1 x 131072", (131072,), **more)


def _prompts(name: str, **more: Any) -> Iterator[Case]:
    """Requests over one prompt, with keys of their own behind it."""
    for batch, prompt, own in ((16, 8192, 512), (64, 8192, 512), (64, 32768, 1024), (256, 8192, 256)):
        yield Case(f"{name} {batch} over {prompt} shared, {own} own", (prompt + own,) * batch, shared=prompt, **more)


def _pages(name: str, **more: Any) -> Iterator[Case]:
    yield Case(f"{name} ragged 1 x 65536, 255 x 512", (65536,) + (512,) * 255, **more)
    yield Case(f"{name} step with append", (8192,) * 64, append=True, **more)
    for batch, rows, keys in ((1, 8192, 8192), (16, 1024, 1024), (4, 2048, 8192), (1, 4096, 32768), (16, 512, 8192)):
        yield Case(f"{name} prefill {batch} x {rows} of {keys}", (keys,) * batch, rows=rows, **more)
        if more.get("eight"):
            yield Case(f"{name} prefill {batch} x {rows} of {keys}, 8-bit q", (keys,) * batch, rows=rows, eight_q=True, **more)
    for batch in (1, 16, 64):
        yield Case(f"{name} latent 576/512 {batch} x 8192", (8192,) * batch, heads=128, heads_k=1, dim=576, dim_v=512, **more)


def cases(group: str) -> list[Case]:
    """Those of "decode", "paged" or "fp8"."""
    if group == "decode":
        return [*_steps("contiguous", page=0), *_others("contiguous", page=0)]
    more = {"eight": group == "fp8"}
    return [*_steps("page 64", **more), *_steps("page 16", page=16, **more), *_others("page 64", **more), *_pages("page 64", **more),
            *_prompts("page 64", **more), *_prompts("page 16", page=16, **more)]


# ---------------------------------------------------------------- calls
class Inputs:
    """One copy of a case's arrays."""

    def __init__(self, case: Case, seed: int) -> None:
        import torch

        make = torch.Generator("cuda").manual_seed(seed)
        batch, size = len(case.lengths), case.page or max(case.lengths)
        needed, common = [-(-n // size) for n in case.lengths], case.shared // size
        pages = common + sum(n - common for n in needed)

        def cache(dim: int) -> Any:
            made = torch.empty(pages, size, case.heads_k, dim, device="cuda", dtype=torch.float8_e4m3fn if case.eight else torch.bfloat16)
            for first in range(0, pages, 4096):         # so that no float32 copy of all is made
                part = made[first:first + 4096]
                part.copy_(torch.randn(part.shape, device="cuda", generator=make))
            return made
        self.case = case
        self.k_cache = cache(case.dim)
        self.v_cache = self.k_cache[..., :case.dim_v] if case.dim_v else cache(case.dim)
        q = torch.randn(batch, case.rows, case.heads, case.dim, device="cuda", generator=make)
        self.q = q.to(torch.float8_e4m3fn if case.eight_q else torch.bfloat16)
        self.new = [torch.randn(batch, case.rows, case.heads_k, n, device="cuda", generator=make).bfloat16()
                    for n in (case.dim, case.dim_v or case.dim)] if case.append else [None, None]
        self.before = torch.tensor([n - case.rows * case.append for n in case.lengths], device="cuda", dtype=torch.int32)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
        table = torch.full((batch, max(needed)), -1, dtype=torch.int32)
        table[:, :common], first = order[:common], common
        for b, n in enumerate(needed):
            table[b, common:n] = order[first:first + n - common]
            first += n - common
        self.table, self.needed, self.order = table.cuda(), needed, order.cuda()

    def alone(self) -> Callable[[], Any]:
        """Each request reads the shared keys, too."""
        if not self.case.shared:
            raise NotImplementedError("no keys are shared")
        return self.fastattn(together=False)

    def fastattn(self, together: bool = True) -> Callable[[], Any]:
        import fastattn

        more: dict[str, Any] = {"block_table": self.table} if self.case.page else {"cache_batch_idx": self.table[:, 0].contiguous()}
        if self.case.shared and together:
            more["shared_prefix"] = self.case.shared
        return partial(fastattn.attention_with_kvcache, self.q, self.k_cache, self.v_cache, *self.new, cache_seqlens=self.before, **more)

    def contiguous(self) -> tuple[Any, Any]:
        """The keys and values of equally long requests, (batch, keys, heads, dim). Which request has which row matters to no time."""
        if self.case.page or self.case.eight or self.case.append:
            raise NotImplementedError("it reads no pages")
        return self.k_cache, self.v_cache

    def sdpa(self, backend: str) -> Callable[[], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        k, v = (x.transpose(1, 2) for x in self.contiguous())
        which = SDPBackend.CUDNN_ATTENTION if backend == "cuDNN" else SDPBackend.FLASH_ATTENTION
        if self.case.rows > 1:
            raise NotImplementedError("its causal mask is top-left")

        def call() -> Any:
            with sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(self.q.transpose(1, 2), k, v, enable_gqa=True)
        return call

    def fa4(self) -> Callable[[], Any]:
        if not importlib.util.find_spec("flash_attn"):
            raise NotImplementedError("not installed: flash_attn")
        k, v = self.contiguous()
        return partial(torch_calls.flash_attention_4(packed=False, causal=True), self.q, k, v)

    def flashinfer(self) -> Callable[[], Any]:
        if not importlib.util.find_spec("flashinfer"):
            raise NotImplementedError("not installed: flashinfer")
        import torch
        flashinfer = importlib.import_module("flashinfer")

        case = self.case
        if not case.page or case.dim_v or case.append:
            raise NotImplementedError("it is measured on pages of keys and values alone")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        if case.shared:
            return self._cascade(flashinfer, workspace)
        indptr = torch.tensor([0, *[sum(self.needed[:n + 1]) for n in range(len(self.needed))]], dtype=torch.int32)
        last = torch.tensor([n - (m - 1) * case.page for n, m in zip(case.lengths, self.needed, strict=True)], dtype=torch.int32)
        types = {"q_data_type": self.q.dtype, "kv_data_type": self.k_cache.dtype}
        if case.rows == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(indptr.cuda(), self.order, last.cuda(), case.heads, case.heads_k, case.dim, case.page, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            rows = torch.arange(len(case.lengths) + 1, dtype=torch.int32) * case.rows
            wrapper.plan(rows.cuda(), indptr.cuda(), self.order, last.cuda(), case.heads, case.heads_k, case.dim, case.page, causal=True,
                         **types)
        return partial(wrapper.run, self.q.flatten(0, 1), (self.k_cache, self.v_cache))

    def _cascade(self, flashinfer: Any, workspace: Any) -> Callable[[], Any]:
        """FlashInfer's cascade of two levels."""
        import torch

        case, batch, common = self.case, len(self.case.lengths), self.case.shared // self.case.page

        def whole(*numbers: int) -> Any:
            return torch.tensor(numbers, dtype=torch.int32, device="cuda")
        own = [n - common for n in self.needed]
        last = whole(*[n - (m - 1) * case.page for n, m in zip(case.lengths, self.needed, strict=True)])
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        wrapper.plan([whole(0, batch), torch.arange(batch + 1, dtype=torch.int32, device="cuda")],
                     [whole(0, common), whole(0, *[sum(own[:n + 1]) for n in range(batch)])], [self.order[:common], self.order[common:]],
                     [whole(case.page), last], case.heads, case.heads_k, case.dim, case.page, q_data_type=self.q.dtype)
        return partial(wrapper.run, self.q.flatten(0, 1), (self.k_cache, self.v_cache))

    def calls(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """What makes the call of each column."""
        return {"fastattn": self.fastattn, "alone": self.alone, "cuDNN": partial(self.sdpa, "cuDNN"), "flash": partial(self.sdpa, "flash"),
                "FA4": self.fa4, "FlashInfer": self.flashinfer}

    def error(self, out: Any) -> float:
        """The largest difference to float32 in the last row of the last request's last head."""
        case, b = self.case, len(self.case.lengths) - 1
        n = case.lengths[-1]
        pages = self.table[b, :self.needed[b]].long()
        k, v = (x[pages][:, :, -1].flatten(0, 1)[:n].float() for x in (self.k_cache, self.v_cache))
        p = (k @ self.q[b, -1, -1].float() / math.sqrt(case.dim)).softmax(0)
        want = p @ v
        return float((out[b, -1, -1].float() - want).abs().max() / want.abs().max())


# ---------------------------------------------------------------- measuring
@dataclass
class Row:
    """Microseconds, medians; `notes` say why a column is empty."""

    case: Case
    times: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error < (TOLERANCE_8BIT if self.case.eight_q else TOLERANCE)

    def cells(self) -> dict[str, Any]:
        found: dict[str, Any] = {"case": self.case.name, **{f"{name} us": self.times.get(name) for name in COLUMNS}}
        return found | {"GB/s": self.rate(self.case.cache_bytes, 1e-3), "TFLOP/s": self.rate(self.case.flop, 1e-6), "error": self.error,
                        "note": "; ".join(self.notes)}

    def rate(self, amount: float, unit: float) -> float | None:
        return amount / self.times["fastattn"] * unit if "fastattn" in self.times else None


def measure(case: Case, events: Events, rounds: int = 7, seconds: float = 0.02) -> Row:
    """One row. What fails is a note."""
    row, copies = Row(case), max(min(sets_of(case.cache_bytes, events.l2_bytes), MOST_BYTES // max(case.cache_bytes, 1)), 1)
    inputs = [Inputs(case, seed) for seed in range(copies)]
    turns = {}
    for column in COLUMNS:
        try:
            calls = [x.calls()[column]() for x in inputs]
            out = calls[0]()
            events.synchronize()
            if column == "fastattn":
                row.error = inputs[0].error(out)
            turns[column] = events.turn(calls, seconds)
        except Exception as error:          # of a rival that has no such call, or is not installed
            row.notes.append(f"{column}: {' '.join(str(error).split())[:160]}")
    samples = rotate(list(turns.values()), rounds, 0)
    row.times = {column: sorted(x)[len(x) // 2] * 1e6 for column, x in zip(turns, samples, strict=True)}
    return row


def run(group: str, only: str | None) -> Iterator[Row]:
    """The rows of the cases whose name contains the expression `only`."""
    events = Events()
    for case in cases(group):
        if only is None or re.search(only, case.name):
            yield measure(case, events)


# ---------------------------------------------------------------- the table
HEAD = (f"| case | {' | '.join(f'{name}, us' for name in COLUMNS)} | GB/s | TFLOP/s | best rival / ours | error |\n"
        f"|{'---|' * (len(COLUMNS) + 5)}")


def line(row: Row) -> str:
    """A row of the Markdown table, with a note below where fastattn has none."""
    def number(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"
    cells, rivals = row.cells(), [row.times[name] for name in COLUMNS[2:] if name in row.times]
    best = min(rivals) / row.times["fastattn"] if rivals and "fastattn" in row.times else None
    text = [row.case.name, *(number(row.times.get(name), 1) for name in COLUMNS), number(cells["GB/s"], 0), number(cells["TFLOP/s"], 0),
            number(best, 2), ("WRONG " if row.wrong else "") + ("" if row.error is None else f"{row.error:.1e}")]
    failed = [note for note in row.notes if note.startswith("fastattn")]
    return f"| {' | '.join(text)} |" + "".join(f"\n    {note}" for note in failed)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].cells()))
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)
