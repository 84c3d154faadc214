"""GPU rows as text: TFLOP/s and ratios, a line a case on the terminal, by sequence length in the README and docs/benchmarks.md."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..results import Row
from ..table import aligned, by_case, pipes
from .cases import GEOMETRIC_MEAN

RIVALS = ("cuDNN", "FA4", "flash", "efficient", "varlen_attn", "sdpa", "plain")
SHORT = {"float16": "fp16", "bfloat16": "bf16", "forward": "fwd", "backward": "bwd"}
NAMES = {"cuDNN": "cuDNN", "FA4": "FlashAttention-4", "flash": "FlashAttention-2 of torch", "efficient": "memory-efficient kernel of torch",
         "varlen_attn": "varlen_attn of torch", "sdpa": "SDPA of torch"}
SHOWN = ("gqa", "window", "packed", "dropout", "bias", "decode", "host")      # groups of the README's second table



def rate(row: Row | None) -> str:
    """TFLOP/s. GB/s for decode, microseconds until the call returns for host, extra MB for memory."""
    if row is None or (row.median_ms is None and row.measure != "memory"):
        return ""
    if row.verdict == "WRONG":
        return "WRONG"
    if row.measure == "memory":
        return row.text
    if row.group == "host":
        return f"{(row.median_ms or 0) * 1e3:.1f} us"
    if row.gigabytes is not None:
        return f"{row.gigabytes:.0f} GB/s"
    return f"{(row.gflops or 0) / 1e3:.0f}"


def best(found: Mapping[str, Row]) -> Row | None:
    """The row whose ratio represents a case: one with a bar and a value, else that of the fastest rival. Wrong results do not count."""
    rows = [row for row in found.values() if row.implementation != "fastattn"]
    barred = [row for row in rows if row.needs]
    own = found.get("fastattn")
    if own is not None and own.measure in ("host", "memory"):
        return own
    right = [row for row in rows if row.value is not None and row.verdict != "WRONG"]
    return min([row for row in right if row.needs] or right, key=lambda row: row.value or 0.0, default=barred[0] if barred else None)


def shown(found: Mapping[str, Row]) -> list[Row]:
    """The rows whose ratios and bars are printed: those with a bar, except the error's, else the one that represents the case."""
    barred = [row for row in found.values() if row.needs and not row.needs.endswith("error")]
    return barred or [row for row in (best(found),) if row]


def verdict(found: Mapping[str, Row]) -> str:
    """The verdict of a case over its rows: WRONG, FAILED (ours did not run), MISS, "not measured" or pass."""
    verdicts = {row.verdict for row in found.values()}
    barred = [row for row in found.values() if row.needs]
    word = next((word for word in ("WRONG", "MISS") if word in verdicts), "")
    own = found.get("fastattn")
    if word != "WRONG" and own is not None and own.note.startswith("failed"):
        return "FAILED"
    return word or ("pass" if barred and all(row.verdict for row in barred) else "not measured" if barred else "")


def label(row: Row) -> str:
    """fwd bf16 grid causal (4,16,4096,128)"""
    if row.case.endswith(f", {row.passes}") or f", {row.passes} with " in row.case:      # a workload has a name
        return row.case
    return " ".join([SHORT.get(row.passes, row.passes), SHORT.get(row.dtype, row.dtype), row.group, row.features, row.shape]).strip()


def brief(rows: Sequence[Row]) -> str:
    """The progress line of a case."""
    rates = ", ".join(f"{row.implementation} {rate(row) or row.note}" for row in rows if "|" not in row.implementation)
    return f"{label(rows[0])}: {rates}"


def console(rows: Iterable[Row]) -> str:
    """One line per case: our rate, each rival's, the ratios with a bar, our error over the yardstick's, the verdict."""
    cases = by_case(rows)
    present = [name for name in RIVALS if any(name in found and rate(found[name]) for found in cases.values())]
    lines = [("case (TFLOP/s)", "ours", *present, "ratio", "needs", "error", "")]
    for found in cases.values():
        first = next(iter(found.values()))
        own = found.get("fastattn")
        if first.group == "summary":
            lines.append((first.case, "", *("" for _ in present), first.text, first.needs, "", first.verdict))
            continue
        stand = shown(found)
        failed = own.note[:28] if own is not None and own.median_ms is None and own.measure != "memory" else ""
        error = own.text if own is not None and own.measure == "error" and own.verdict != "WRONG" else ""
        lines.append((label(first), rate(own) or failed, *(rate(found.get(name)) for name in present),
                      " ".join(row.text or "?" for row in stand), " ".join(row.needs for row in stand), error.removesuffix(" error"),
                      verdict(found)))
    return aligned(lines)


def notes(rows: Sequence[Row]) -> str:
    """Why a rival is missing or failed: each reason once, with its count and first case."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.note and (row.median_ms is None or row.verdict == "WRONG") and row.note != "not measured":
            reasons.setdefault((row.implementation, row.note), []).append(row)
    return "\n".join(f"{name}: {note} ({len(found)}x, first {label(found[0])})" for (name, note), found in reasons.items())


def closing(rows: Sequence[Row]) -> str:
    """The number of cases with each verdict."""
    verdicts = {name: verdict(found) for name, found in by_case(rows).items()}
    counts = {word: sum(v == word for v in verdicts.values()) for word in ("pass", "MISS", "WRONG", "FAILED", "not measured")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def geometric_means(rows: Sequence[Row]) -> list[Row]:
    """One row per pass: the geometric mean of the grid's ratios to the best rival. Judged only if every cell was."""
    summary = []
    for passes in dict.fromkeys(row.passes for row in rows):
        grid = [row for row in rows if row.passes == passes and row.group == "grid" and "|" in row.implementation and row.value]
        if not grid:
            continue
        mean = math.exp(sum(math.log(row.value) for row in grid if row.value) / len(grid))
        whole = all(row.verdict for row in grid)
        summary.append(replace(
            grid[0], case=f"geometric mean {SHORT[passes]} over {len(grid)} cells of the grid", group="summary", dtype="", features="",
            shape="", label="", rounds=0, median_ms=None, p20_ms=None, p80_ms=None, gflops=None, fastattn_ms=None, measure="speedup",
            value=mean, value_p20=None, value_p80=None, needs=f">= {GEOMETRIC_MEAN:.2f}x",
            verdict=("pass" if mean >= GEOMETRIC_MEAN else "MISS") if whole else "", note="", error=None, lse_error=None, clock_mhz=None))
    return summary


# ---------------------------------------------------------------- pages
def markdown(rows: Sequence[Row]) -> str:
    """All cases as docs/benchmarks.md has them: the machine; the grid with a column per sequence length; the rest, one line per case."""
    rest = [found for found in by_case(rows).values() if next(iter(found.values())).group != "grid"]
    present = [name for name in RIVALS if any(name in found and rate(found[name]) for found in rest)]
    lines = [("case (batch, heads, seqlen, head_dim)", "fastattn", *present, "ratio"), *(_line(found, present) for found in rest)]
    return "\n\n".join([
        machine(rows[0]), GRID, _grid(rows),
        "TFLOP/s over the pairs that are computed, GB/s of K and V for decode, microseconds until the call returns for host. `plain` is "
        "fastattn without the feature, and its ratio a cost per pair.", pipes(lines)])


def summary(rows: Sequence[Row]) -> str:
    """The README's part of it: the grid in bfloat16, and other calls beside the fastest library that has them."""
    cases = by_case(row for row in rows if row.group in SHOWN)
    lines = [("", "dtype", "what", "(batch, heads, seqlen, head_dim)", "fastattn", "the fastest other", "ratio")]
    for found in cases.values():
        own = found.get("fastattn")
        others = [row for row in found.values() if row.implementation in NAMES and row.value and row.verdict != "WRONG"]
        if own is not None and rate(own) and others:
            other = min(others, key=lambda row: row.value or 0.0)
            what = own.features if own.group in own.features else own.group if own.features == "full" else f"{own.group}, {own.features}"
            lines.append((own.passes, own.dtype, what, own.shape, rate(own), f"{rate(other)} ({NAMES[other.implementation]})", other.text))
    return "\n\n".join([
        machine(rows[0]), GRID, _grid(row for row in rows if row.dtype == "bfloat16"),
        "Other calls. TFLOP/s; for decode GB/s of K and V; for host the time until a call returns.", pipes(lines)])


GRID = ("TFLOP/s of fastattn by sequence length, and in brackets its speed relative to the faster of cuDNN and FlashAttention-4: above 1 "
        "fastattn is faster. 16384 tokens in each call, heads x head_dim = 2048. A backward counts 2.5 forwards.")


def _line(found: Mapping[str, Row], present: Sequence[str]) -> tuple[str, ...]:
    first = next(iter(found.values()))
    if first.group == "summary":
        return first.case, "", *("" for _ in present), first.text
    return (label(first), rate(found.get("fastattn")), *(rate(found.get(name)) for name in present),
            ", ".join(row.text for row in shown(found) if row.text))


def _grid(rows: Iterable[Row]) -> str:
    """Lines (pass, dtype, head_dim, mask), columns sequence lengths."""
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for found in by_case(row for row in rows if row.group == "grid").values():
        first = next(iter(found.values()))
        seqlen, head_dim = first.shape.strip("()").split(",")[2:4]
        ratio = next((row for row in found.values() if "|" in row.implementation and row.value), None)
        text = rate(found.get("fastattn")) + (f" ({ratio.value:.2f})" if ratio and ratio.value else "")
        cells.setdefault((first.passes, first.dtype, head_dim, first.features), {})[int(seqlen)] = text
    def order(key: tuple[str, ...]) -> tuple[object, ...]:      # children finish in any order
        passes, dtype, head_dim, features = key
        return passes != "forward", dtype != "bfloat16", int(head_dim), features != "full"
    cells = dict(sorted(cells.items(), key=lambda item: order(item[0])))
    seqlens = sorted({seqlen for line in cells.values() for seqlen in line})
    header = ("", "dtype", "head_dim", "mask", *map(str, seqlens))
    return pipes([header, *((*key, *(line.get(seqlen, "") for seqlen in seqlens)) for key, line in cells.items())])


def machine(row: Row) -> str:
    """When, where and with what a row was measured."""
    clock = f"; {row.clock_mhz} MHz under load" if row.clock_mhz else ""
    return (f"Measured {row.date} on one {row.machine}{clock} ({row.ceilings}); Python {row.python}, {row.versions}. Medians of device "
            "time, round robin, public calls with their allocations.")
