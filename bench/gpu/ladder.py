"""The rungs of the reading course (docs/course/): one problem, computed by each kernel family in turn. `python -m bench ladder`.

    unfused     three torch calls, S and P in memory
    math        the same behind torch's SDPA, its math backend
    simt        fastattn on plain threads
    sm80        fastattn on tensor cores fed by ordinary warps
    sm90        fastattn's Hopper kernels; for one query, its kernel of few queries. These are the rows named `fastattn`

All rungs and the rivals of a case are measured round robin in one process, by worker.py. So the steps between rungs are ratios
inside one run. The course's table is made of bench/results/ladder.csv, and while that does not exist of the same problems in gpu.csv and
gpu-backward.csv, where rungs that `bench gpu` does not measure are missing.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..case import Case, Mode
from ..results import Row, read_csv
from ..table import pipes
from .cases import ERROR, select

FAMILY = "sm90"             # of the rows named fastattn
FORCED = ("simt", "sm80")   # rungs that are fastattn with another family
RUNGS = ("unfused", "math", *FORCED, FAMILY)
RIVALS = ("flash", "cuDNN", "FA4")
WHAT = {"unfused": "S and P in memory", "math": "torch's math backend", "simt": "tiles, online softmax", "sm80": "tensor cores, cp.async",
        "sm90": "wgmma, TMA, warp roles", "flash": "torch's FlashAttention-2", "cuDNN": "torch's cuDNN backend", "FA4": "FlashAttention-4"}
MISSING = "not measured yet"
BATCH, WIDTH, SEQLEN = 4, 2048, 4096        # as bench gpu's "sm80" cases, so that their rows can stand in
DECODE_BATCH, DECODE_KEYS = 16, 8192


# ---------------------------------------------------------------- what is measured
def cases() -> list[Case]:
    """Forward, backward, and one query over many keys."""
    against = ("unfused", "math", *FORCED, *RIVALS)
    found = [Case("ladder", BATCH, WIDTH // head_dim, SEQLEN, head_dim, dtype="float16", causal=causal, backward=backward, alone=backward,
                  kernels=FAMILY, against=against, bars=(ERROR,), mode="quick")
             for backward, head_dim, causal in itertools.product((False, True), (64, 128), (False, True))]
    return [*found, Case("ladder", DECODE_BATCH, 32, 1, 128, dtype="bfloat16", num_heads_k=8, seqlen_k=DECODE_KEYS, kernels=FAMILY,
                         against=("unfused", "simt", *RIVALS), bars=(ERROR,), mode="quick")]


def choose(mode: Mode, only: str | None, skip: tuple[str, ...]) -> list[Case]:
    """The chosen cases. SystemExit if there are none."""
    chosen = select(cases(), mode, only, skip)
    if not chosen:
        raise SystemExit(f"no case of the ladder has a name that matches {only!r}")
    return chosen


def forced(case: Case, name: str) -> Case:
    """The case on the rung `name`, a kernel family."""
    return replace(case, kernels=name)


def make_unfused(case: Case, q: Any) -> Callable[..., Any]:
    """attend(q, k, v, bias) as a textbook has it: S = Q K^T, softmax, P V, each a call whose result is in memory.

    q: its device, for the mask, which is made once and not timed.
    """
    import torch

    _, heads, seqlen, head_dim = case.shape_q
    _, heads_k, keys, _ = case.shape_k
    hidden = torch.ones(seqlen, keys, dtype=torch.bool, device=q.device).triu(keys - seqlen + 1) if case.causal else None

    def by_head(x: Any, repeat: int = 1) -> Any:
        return x.transpose(1, 2).repeat_interleave(repeat, 1) if repeat > 1 else x.transpose(1, 2)

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        q, k, v = by_head(q), by_head(k, heads // heads_k), by_head(v, heads // heads_k)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(head_dim)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2)
    return attend


# ---------------------------------------------------------------- the course's table
def rows_of(folder: Path) -> list[Row]:
    """The rows of ladder.csv, or those that gpu.csv and gpu-backward.csv have of the same problems, under the rungs' names."""
    own = folder / "ladder.csv"
    if own.is_file():
        return read(own)
    return [found for name in ("gpu.csv", "gpu-backward.csv") for row in read_csv(folder / name) for found in stand_in(row)]


def read(path: Path) -> list[Row]:
    """The rows of a CSV of the ladder."""
    return [named(row) for row in read_csv(path)]


def named(row: Row) -> Row:
    return replace(row, implementation=FAMILY) if row.implementation == "fastattn" else row


def stand_in(row: Row) -> Iterator[Row]:
    """A row of `bench gpu` as one of the ladder, if it is of one of the ladder's problems."""
    same = {(case.passes, case.dtype, "+".join(case.features) or "full", case.shape) for case in cases()}
    if (row.passes, row.dtype, row.features, row.shape) not in same:
        return
    if row.group == "sm80":
        yield replace(row, implementation="sm80" if row.implementation == "fastattn" else row.implementation)
    elif row.group in ("grid", "decode") and row.implementation in ("fastattn", *RIVALS):
        yield named(row)


def rate(row: Row | None) -> str:
    """TFLOP/s; for one query GB/s of K and V. A failure is its note, a wrong result says so."""
    if row is None or row.median_ms is None:
        return MISSING if row is None or not row.note else row.note.partition(":")[0]
    if row.verdict == "WRONG":
        return "WRONG"
    return f"{row.gigabytes:.0f}" if row.gigabytes is not None else f"{(row.gflops or 0) / 1e3:.0f}"


def markdown(rows: Sequence[Row]) -> str:
    """Three tables: forward, backward and decode, with a line for each rung and rival."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:        # flash was measured with sm80 and with the grid: the first counts, so that it is the neighbour of sm80
        found.setdefault((row.passes, row.features, row.shape, row.implementation), row)
    parts = [_machine(rows)]
    for passes in ("forward", "backward"):
        columns = [case for case in cases() if case.passes == passes and case.seqlen > 1]
        header = (f"{passes}, TFLOP/s", "what it adds", *(f"{case.head_dim} {'causal' if case.causal else 'full'}" for case in columns))
        parts.append(pipes([header, *_lines(found, columns)]))
    [decode] = [case for case in cases() if case.seqlen == 1]
    parts.append(pipes([("one query, GB/s", "what it is", f"{decode.batch} x {decode.shape_k[2]} keys"), *_lines(found, [decode])]))
    return "\n\n".join(parts)


def _lines(found: dict[tuple[str, str, str, str], Row], columns: Sequence[Case]) -> Iterator[tuple[str, ...]]:
    for name in (*RUNGS, *RIVALS):
        if all(name == FAMILY or name in case.against for case in columns):
            rates = [rate(found.get((case.passes, "+".join(case.features) or "full", case.shape, name))) for case in columns]
            yield name, WHAT[name] if columns[0].seqlen > 1 or name != FAMILY else "the kernel of few queries", *rates


def _machine(rows: Sequence[Row]) -> str:
    if not rows:
        return f"Nothing was measured: every number is {MISSING}."
    first = rows[0]
    where = ("one run of `python -m bench ladder`, all rungs round robin" if first.group == "ladder" else
             "runs of `python -m bench gpu`; ratios between rows of different cases are not those of one round robin")
    return (f"float16, (batch, seqlen) = ({BATCH}, {SEQLEN}), heads x head_dim = {WIDTH}; a column is head_dim and mask. A backward "
            "counts 2.5 forwards. One query is bfloat16, 32 query heads over 8 key heads, head_dim 128. "
            f"{first.machine}, {first.date}: {where}. "
            f"\"{MISSING}\": `python -m bench ladder` prints it on a GPU.")
