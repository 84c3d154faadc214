"""Rows of `python -m bench workloads` as text and as a picture: each workload beside its fastest rival, and geometric means.

A ratio is the fastest rival's time over ours: above 1 fastattn is faster. Rivals whose result is wrong do not count.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..plot import LOOKS, pyplot, save
from ..results import Row
from ..table import aligned, by_case, pipes
from . import table, workloads

RIVALS = ("cuDNN", "flash", "efficient", "math", "FA4", "varlen_attn")
PASSES = ("forward", "backward")
INTRO = ("TFLOP/s over the pairs that are visited (tiles that a mask leaves empty are not), GB/s of K and V for decode, microseconds "
         "from call to call for small calls. A backward counts 2.5 forwards where V's head_dim is that of K. The ratio is the fastest "
         "rival's time over fastattn's: above 1 fastattn is faster. An empty cell: that library does not run the case; the reasons "
         "stand below.")


class Mean(NamedTuple):
    """The geometric mean of some cases' ratios, how many they are, and the worst of them with its case."""

    value: float
    count: int
    worst: float
    case: str

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.count}), worst {self.worst:.2f}: {self.case}"


def fastest(found: Mapping[str, Row]) -> Row | None:
    """The row of the fastest rival that is right, None if there is none or fastattn has no right result."""
    own = found.get("fastattn")
    if own is None or own.median_ms is None or own.verdict == "WRONG":
        return None
    rivals = [row for row in found.values() if row.implementation != "fastattn" and row.value is not None and row.verdict != "WRONG"]
    return min(rivals, key=lambda row: row.value or 0.0, default=None)


def mean(rows: Iterable[Row], passes: str, group: str | None = None) -> Mean | None:
    """Over all cases of a pass, or those of one group. None if none of them has a ratio."""
    rivals = [fastest(found) for found in by_case(row for row in rows if row.passes == passes and group in (None, row.group)).values()]
    ratios = [(row.value, row.case) for row in rivals if row is not None and row.value]
    if not ratios:
        return None
    return Mean(math.exp(sum(math.log(value) for value, _ in ratios) / len(ratios)), len(ratios), *min(ratios))


def rate(row: Row | None) -> str:
    """As in table.rate; microseconds for small calls."""
    if row is not None and row.group == "small" and row.median_ms is not None and row.verdict != "WRONG":
        return f"{row.median_ms * 1e3:.1f} us"
    return table.rate(row)


def ratio(found: Mapping[str, Row]) -> str:
    row = fastest(found)
    return "" if row is None or row.value is None else f"{row.value:.2f} ({row.implementation})"


def ordered(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows by case in the order of the list of workloads: children finish in any order."""
    order = {case.name: n for n, case in enumerate(workloads.choose(None))}
    found = by_case(rows)
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def _lines(cases: Mapping[str, Mapping[str, Row]], present: Sequence[str]) -> list[tuple[str, ...]]:
    lines = []
    for name, found in cases.items():
        first = next(iter(found.values()))
        own = rate(found.get("fastattn")) or first.note
        what = f"{first.dtype} {first.features} {first.shape}"
        lines.append((name, what, own, *(rate(found.get(rival)) for rival in present), ratio(found)))
    return lines


def _present(rows: Sequence[Row]) -> list[str]:
    return [name for name in RIVALS if any(row.implementation == name and rate(row) for row in rows)]


def console(rows: Sequence[Row]) -> str:
    """One line per case, then the means."""
    present = _present(rows)
    lines = [("workload", "what", "fastattn", *present, "ratio"), *_lines(ordered(rows), present)]
    return f"{aligned(lines)}\n\n{closing(rows)}"


def closing(rows: Sequence[Row]) -> str:
    """The means of both passes, and the cases without a ratio."""
    means = [f"{passes}: geometric mean {found}" for passes in PASSES if (found := mean(rows, passes))]
    without = [f"{name} ({next(iter(found.values())).note or 'no rival'})" for name, found in ordered(rows).items()
               if fastest(found) is None]
    return "\n".join([*means, *([f"without a ratio: {', '.join(without)}"] if without else [])])


def markdown(rows: Sequence[Row]) -> str:
    """The section of docs/benchmarks.md: the means of each group, a table for each group with sources, and why cells are empty."""
    cases, present = ordered(rows), _present(rows)
    sources = {work.name: work.source for work in workloads.workloads()}
    means = [("ratio to the fastest rival: mean (cases), worst", *PASSES)]
    for group in (None, *workloads.GROUPS):
        found = [mean(rows, passes, group) for passes in PASSES]
        if any(found):
            means.append((workloads.GROUPS[group] if group else "all", *(str(one or "") for one in found)))
    parts = [table.machine(rows[0]), INTRO, pipes(means)]
    for group, words in workloads.GROUPS.items():
        chosen = {name: found for name, found in cases.items() if next(iter(found.values())).group == group}
        if chosen:
            lines = [("workload", "what", "fastattn", *present, "ratio"), *_lines(chosen, present)]
            parts += [f"**{words[0].upper()}{words[1:]}**", pipes(lines)]
            named = dict.fromkeys(name for name in sources if any(case.startswith(f"{name}, ") for case in chosen))
            parts.append("\n".join(f"- {name}: {sources[name]}" for name in named))
    reasons = table.notes(rows)
    return "\n\n".join([*parts, *(["Why cells are empty:", "\n".join(f"- {line}" for line in reasons.splitlines())] if reasons else [])])


def plot(rows: Sequence[Row], path: Path) -> bool:
    """A panel for each pass: the ratio to the fastest rival as bars, with its spread. False without a ratio, or without matplotlib."""
    draw = pyplot()
    bars = {passes: [(name, row) for name, found in ordered(rows).items() if (row := fastest(found)) and row.passes == passes]
            for passes in PASSES}
    bars = {passes: found for passes, found in bars.items() if found}
    if draw is None or not bars:
        return False
    height = 1 + 0.2 * max(map(len, bars.values()))
    figure, axes = draw.subplots(1, len(bars), figsize=(8.5 * len(bars), height), squeeze=False, layout="constrained")
    for axis, (passes, found) in zip(axes[0], bars.items(), strict=True):
        values = [row.value or 0.0 for _, row in found]
        low = [max(0.0, value - (row.value_p20 or value)) for value, (_, row) in zip(values, found, strict=True)]
        high = [max(0.0, (row.value_p80 or value) - value) for value, (_, row) in zip(values, found, strict=True)]
        axis.barh(range(len(found)), values, xerr=[low, high], color=LOOKS["fastattn"].colour, height=0.7)
        axis.axvline(1, color="black", linewidth=0.8)
        labels = [f"{name.replace(f', {passes}', '')} ({row.implementation})" for name, row in found]
        axis.set_yticks(range(len(found)), labels, fontsize=7)
        axis.set_ylim(len(found) - 0.4, -0.6)
        axis.set_title(passes, fontsize=10, loc="left")
        axis.set_xlabel("speed of fastattn, the fastest rival (in brackets) = 1; higher is better", fontsize=8)
    figure.suptitle(f"Attention of published models on one {rows[0].machine.split(' (')[0]}, {rows[0].date}", fontsize=11)
    save(figure, path)
    draw.close(figure)
    return True
