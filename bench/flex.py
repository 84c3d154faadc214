"""Score and mask functions beside the built-in forms of the same attention and torch's flex_attention. `python -m bench flex`.

Columns: fastattn without functions, with the built-in form (ALiBi slopes, a window, ...), with functions, flex_attention, compiled,
and FlashAttention-4 where it is installed (flex_fa4.py). All of a case take turns in one process. A mask is a block_mask, made before;
`made` is a call that makes it. The first call of a function, which compiles, is timed alone. A backward is that of torch's graph, with
gradients of captured tensors, which FlashAttention-4 has not.
"""
from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.benchmark.events import Events
from fastattn.benchmark.timing import Budget, rotate, turn, wall

from . import flex_fa4

SHAPE = (4, 4096, 16, 128)          # (batch, seqlen, num_heads, head_dim)
QUICK = (1, 1024, 4, 64)
WINDOW, FAR, CAP, DOCUMENTS = 1024, 511, 30.0, 12
# of flex_attention's backward, where its own choice asks for more shared memory than there is
SMALLER_BLOCKS = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_stages": 1}
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-5}        # largest difference to the formula, relative to the largest number
COLUMNS = ("plain", "built in", "functions", "made", "flex_attention", "FA4")


@dataclass(frozen=True)
class Kind:
    """One kind of attention: its functions, in torch's words, and the keywords of its built-in form, if there is one."""

    name: str
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    built_in: dict[str, Any] | None = None
    captured: tuple[Any, ...] = ()
    block: int = 128            # of block_mask: below 128 for masks of short pieces
    numbers: Any = None         # what FlashAttention-4's functions are made of


@dataclass
class Row:
    """Microseconds, medians; None where it is not measured, and `note` says why."""

    kind: str
    passes: str
    dtype: str
    shape: str
    times: dict[str, float | None] = field(default_factory=dict)
    first_call: float | None = None         # seconds
    error: float | None = None
    note: str = ""

    def cells(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "times"}
        return found | {f"{name} us": self.times.get(name) for name in COLUMNS}


def kinds(seqlen: int, heads: int, device: Any) -> list[Kind]:
    """The kinds of one sequence length, with their tensors on a device."""
    import torch

    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device, requires_grad=True)
    table = torch.zeros(heads, FAR + 1, device=device).normal_().requires_grad_()
    ends = torch.linspace(0, seqlen, DOCUMENTS + 1).long()[1:-1]
    document = torch.bucketize(torch.arange(seqlen), ends, right=True).int().to(device)
    side = math.isqrt(seqlen)
    window, prefix = min(WINDOW, seqlen // 4), seqlen // 4

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def neighbours(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q // side - k // side).abs() <= 6) & ((q % side - k % side).abs() <= 6)
    top_left: dict[str, Any] = {"causal": "top_left"}
    found = [
        Kind("causal", None, causal, top_left),
        Kind("ALiBi", lambda s, b, h, q, k, m: s - m[h] * (q - k).abs(), causal, top_left | {"alibi_slopes": slopes.detach()}, (slopes,)),
        Kind("softcap", lambda s, b, h, q, k: CAP * torch.tanh(s / CAP), causal, top_left | {"softcap": CAP}),
        Kind("learned table", lambda s, b, h, q, k, t: s + t[h, (q - k).abs().clamp(max=FAR)], causal, None, (table,)),
        Kind("sliding", None, lambda b, h, q, k: (q >= k) & (q - k < window), top_left | {"window": (window - 1, 0)}),
        Kind("document", None, lambda b, h, q, k: (document[q] == document[k]) & (q >= k), block=64),
        Kind("prefix-LM", None, lambda b, h, q, k: (q >= k) | (k < prefix)),
        Kind("NATTEN 13 x 13", None, neighbours),
    ]
    numbers = flex_fa4.Numbers(heads, window, prefix, side, CAP, FAR, table, document)
    return [replace(kind, numbers=numbers) for kind in found]


# ---------------------------------------------------------------- calls
@dataclass
class Case:
    """A kind at a shape: tensors, and calls by the name of their column."""

    kind: Kind
    shape: tuple[int, int, int, int]
    dtype: str
    device: str
    backward: bool
    engine: str | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        batch, seqlen, heads, dim = self.shape
        torch.manual_seed(0)
        self.q, self.k, self.v, self.dout = (torch.randn(batch, seqlen, heads, dim, device=self.device).to(getattr(torch, self.dtype))
                                             for _ in range(4))
        if self.backward:
            for x in (self.q, self.k, self.v):
                x.requires_grad_()

    def attend(self, **keywords: Any) -> Any:
        from fastattn.torch import attention

        return attention(self.q, self.k, self.v, engine=self.engine, **keywords)

    def forwards(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What gives out, by column."""
        import fastattn

        kind, (_, seqlen, _, _) = self.kind, self.shape
        yield "plain", self.attend
        if kind.built_in is not None:
            yield "built in", partial(self.attend, **kind.built_in)
        score = {"score_mod": kind.score_mod, "captured": kind.captured}
        make = partial(fastattn.block_mask, kind.mask_mod, None, None, seqlen, seqlen, block=kind.block)
        yield "functions", partial(self.attend, **score, block_mask=make())
        if not self.backward:
            yield "made", lambda: self.attend(**score, block_mask=make())
        if flex_fa4.missing(self.device) is None:
            yield "FA4", self._flash_attention_4()
        yield "flex_attention", self._flex_attention()

    def _flex_attention(self) -> Callable[[], Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        kind, seqlen = self.kind, self.shape[1]
        mask = create_block_mask(kind.mask_mod, None, None, seqlen, seqlen, device=self.device)
        held = kind.captured if self.backward else [x.detach() for x in kind.captured]        # on CPUs it takes none with gradients
        score = kind.score_mod and (lambda s, b, h, q, k: kind.score_mod(s, b, h, q, k, *held))  # type: ignore[misc]
        compiled, arguments = torch.compile(flex_attention, dynamic=False), [x.transpose(1, 2) for x in (self.q, self.k, self.v)]

        def call(**options: Any) -> Any:
            return compiled(*arguments, score_mod=score, block_mask=mask, **options).transpose(1, 2)
        if self.backward:
            try:
                self.timed("flex_attention", call)()
            except Exception as error:
                if "out of resource" not in str(error):
                    raise
                self.notes.append("flex_attention: smaller blocks, as its own take too much shared memory")
                return partial(call, kernel_options=SMALLER_BLOCKS)
        return call

    def _flash_attention_4(self) -> Callable[[], Any]:
        made = list[Callable[[], Any]]()

        def call() -> Any:
            if not made:
                made.append(flex_fa4.call(self.kind.name, self.backward, self.q, self.k, self.v, self.kind.numbers))
            return made[0]()
        return call

    def timed(self, column: str, forward: Callable[[], Any]) -> Callable[[], Any]:
        """The call that is timed: the forward, or the backward of one forward."""
        if not self.backward:
            return forward
        import torch

        out = forward()
        held = [] if column in ("plain", "built in", "FA4") else [x for x in self.kind.captured if x.requires_grad]
        return partial(torch.autograd.grad, out, [self.q, self.k, self.v, *held], self.dout, retain_graph=True)

    def error(self, out: Any) -> float:
        """The largest difference to the formula in float32 of the last head of the last entry, relative to its largest number."""
        import torch

        batch, seqlen, heads, dim = self.shape
        with torch.no_grad():
            q, k, v = (x[-1, :, -1].float() for x in (self.q, self.k, self.v))
            last = [torch.full((), n - 1, device=self.device) for n in (batch, heads)]
            rows = torch.arange(seqlen, device=self.device)
            at = *last, rows[:, None], rows
            s = q @ k.T / math.sqrt(dim)
            if self.kind.score_mod is not None:
                s = self.kind.score_mod(s, *at, *self.kind.captured)
            assert self.kind.mask_mod is not None
            want = torch.where(self.kind.mask_mod(*at), s, -math.inf).softmax(-1) @ v
            return float((out[-1, :, -1].float() - want).abs().max() / want.abs().max())


# ---------------------------------------------------------------- measuring
def measure(case: Case, events: Events | None, rounds: int, seconds: float) -> Row:
    """One row. What fails is a note; what is wrong too."""
    row = Row(case.kind.name, "backward" if case.backward else "forward", case.dtype, "x".join(map(str, case.shape)))
    calls: dict[str, Callable[[], Any]] = {}
    notes = case.notes
    for column, forward in _forwards(case):
        try:
            start = time.perf_counter()
            out = forward()
            if events is not None:
                events.synchronize()
            if column == "functions":
                row.first_call, row.error = time.perf_counter() - start, case.error(out)
                if row.error > TOLERANCE[case.dtype]:
                    notes.append(f"WRONG by {row.error:.1e}")
            elif column == "FA4" and (error := case.error(out)) > TOLERANCE[case.dtype]:
                notes.append(f"FA4 is WRONG by {error:.1e}")
            call = case.timed(column, forward)
            call()                                          # what fails here leaves the others their turns
            calls[column] = call
        except Exception as error:
            notes.append(f"{column}: {' '.join(str(error).split())[:160]}")
    if events is not None:
        turns = [events.turn([call], seconds / 10) for call in calls.values()]
        samples = rotate(turns, rounds, 0)
    else:
        budget = Budget(settle=0.0)
        samples = rotate([partial(turn, call, wall(call), budget, wall) for call in calls.values()], rounds, 0)
    row.times = {column: sorted(x)[len(x) // 2] * 1e6 for column, x in zip(calls, samples, strict=True)}
    row.note = "; ".join(notes)
    return row


def _forwards(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        yield from case.forwards()
    except Exception as error:                              # flex_attention where it does not compile
        case.notes.append(f"flex_attention: {' '.join(str(error).split())[:160]}")


def run(device: str, shape: tuple[int, int, int, int], dtype: str, backward: bool, only: str | None, engine: str | None = None,
        rounds: int = 7, seconds: float = 0.05) -> Iterator[Row]:
    """The rows of the kinds whose name contains the expression `only`."""
    events = Events() if device == "cuda" else None
    for kind in kinds(shape[1], shape[2], device):
        if only is None or re.search(only, kind.name):
            yield measure(Case(kind, shape, dtype, device, backward, engine), events, rounds, seconds)


# ---------------------------------------------------------------- the table
_RATIOS = ("of built in", "of flex_attention", "first call, s", "error")
HEAD = f"| kind | {' | '.join(f'{name}, us' for name in COLUMNS)} | {' | '.join(_RATIOS)} |\n|{'---|' * (1 + len(COLUMNS) + len(_RATIOS))}"


def line(row: Row) -> str:
    """A row of the Markdown table, with a note below where there is one."""
    def number(x: float | None, digits: int = 0) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    def ratio(other: str) -> str:
        a, b = row.times.get("functions"), row.times.get(other)
        return "" if a is None or b is None else f"{a / b:.2f}"
    cells = [row.kind, *(number(row.times.get(name)) for name in COLUMNS), ratio("built in"), ratio("flex_attention"),
             number(row.first_call, 2), "" if row.error is None else f"{row.error:.1e}"]
    return f"| {' | '.join(cells)} |" + (f"\n    {row.kind}: {row.note}" if row.note else "")


def page_table(path: Path) -> list[str]:
    """Lines of the table of kept results in docs/howto/functions.md."""
    with path.open() as file:
        rows = {(row["passes"], row["kind"]): row for row in csv.DictReader(file)}

    def cells(passes: str, kind: str) -> list[str]:
        row = rows[passes, kind]
        times = [row[f"{name} us"] for name in ("built in", "functions", "flex_attention")]
        return [*times, f"{float(times[2]) / float(times[1]):.2f}"]
    head = " | ".join(f"{passes}: {name}" for passes in ("forward", "backward")
                      for name in ("built in", "function", "flex_attention", "times its speed"))
    lines = [f"| kind | {head} |", f"|{'---|' * 9}"]
    return lines + [f"| {kind} | {' | '.join((*cells('forward', kind), *cells('backward', kind)))} |" for passes, kind in rows
                    if passes == "forward"]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].cells()))
        writer.writeheader()
        writer.writerows(row.cells() for row in rows)


