"""Rows as text: the table on the terminal, and those of the README and docs/benchmarks.md between their markers."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .results import BUSY, Row
from .text import aligned

# How a value against something other than a rival library reads.
PHRASES = {"fma peak": "of FMA peak", "memory read": "of memory speed", "plain": "plain, per scored pair", "torch folded": "torch folded"}
LIBRARIES = ("torch", "onnxruntime")
# The README's shapes: a short and a long one of each kind, the short ones where a call's fixed cost shows.
SHOWN = ("(1,8,512,64)", "(1,8,4096,128)", "(1,32,1,128) over 8192x8", "(1,12,32,32)", "(1,8,128,64)")


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """case -> implementation -> row, in the order of the rows."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.implementation] = row
    return cases


def milliseconds(row: Row | None) -> str:
    """Three digits: 0.0123, 4.50, 1230."""
    if row is None or row.median_ms is None:
        return ""
    return f"{row.median_ms:#.3g}".rstrip(".") if row.median_ms < 999.5 else f"{row.median_ms:.0f}"


def console(rows: Iterable[Row]) -> str:
    """One line per case: our time, speed against each library with its 20 to 80 % spread, ceilings, requirement, verdict."""
    lines: list[tuple[str, ...]] = [("case", "ms", *LIBRARIES, "also", "needs", "")]
    for case, found in by_case(rows).items():
        also = [_also(row) for row in found.values() if _beside(row)]
        barred = [row for row in found.values() if row.needs]
        needs = "; ".join(row.needs if row.measure != "ceiling" else f"{row.needs} {PHRASES[row.implementation]}" for row in barred)
        verdicts = {row.verdict for row in found.values()} - {""}
        verdict = next((word for word in ("WRONG", "MISS", "pass") if word in verdicts), "")
        if verdict in ("pass", "") and not all(row.verdict for row in barred):
            verdict = "not measured"
        lines.append((case, milliseconds(found.get("fastattn")), *(_cell(found.get(name)) for name in LIBRARIES),
                      ", ".join(filter(None, also)), needs, verdict))
    return aligned(lines)


def _cell(row: Row | None) -> str:
    if row is None or row.measure == "memory":
        return ""
    if row.value is None:
        return row.note.partition(":")[0]
    return f"{row.text} ({row.value_p20:.2f}-{row.value_p80:.2f})"


def _beside(row: Row) -> bool:
    """Whether a row has no column of its own."""
    return row.implementation not in LIBRARIES or row.measure == "memory"


def _also(row: Row) -> str:
    if row.value is None:
        return f"{row.implementation} {row.note}" if row.note else ""
    if row.measure == "memory":
        return f"{row.implementation} {row.text} extra"
    return f"{row.text} {PHRASES.get(row.implementation, row.implementation)}"


def warning(rows: Iterable[Row]) -> str:
    """A sentence if other processes were at work during the measurement, else nothing."""
    worst = max((row.others or 0.0 for row in rows), default=0.0)
    return busy(worst) if worst > BUSY else ""


def busy(processors: float) -> str:
    return f"WARNING: other processes kept up to {processors:.1f} processors busy; these numbers mean little."


def markdown(rows: Iterable[Row]) -> str:
    """All cases as docs/benchmarks.md has them: the machine; times; what is no comparison with a library."""
    rows = list(rows)
    return "\n\n".join(filter(None, (_machine_line(rows[0]), _times(rows), _rest(rows))))


def summary(rows: Iterable[Row]) -> str:
    """The README's part of it: float32 and bfloat16 at a few shapes."""
    rows = list(rows)
    return f"{_machine_line(rows[0])}\n\n{_times([row for row in rows if row.shape in SHOWN and row.dtype != 'float16'])}"


def _times(rows: Iterable[Row]) -> str:
    """One line per pass, dtype and shape, with full and causal next to each other. Empty if there is no such case."""
    pivot: dict[tuple[str, ...], dict[str, Mapping[str, Row]]] = {}
    for found in by_case(rows).values():
        first = next(iter(found.values()))
        if first.group not in ("features", "memory"):
            pivot.setdefault((first.passes, first.dtype, first.shape), {})[first.features] = found
    header = ("", "dtype", "shape", "full ms", "torch", "onnxruntime", "causal ms", "torch", "onnxruntime")
    body = [(*key, *_columns(kinds.get("full", {})), *_columns(kinds.get("causal", {}))) for key, kinds in pivot.items()]
    return (body and ("Times of fastattn, and how many times as long each library takes: above 1 fastattn is faster. Shapes are (batch, "
                     f"heads, seqlen, head_dim); \"over 8192x8\" is 8192 keys of 8 heads.\n\n{pipes([header, *body])}")) or ""


def _rest(rows: Iterable[Row]) -> str:
    """Ceilings of the hardware, costs of features, memory. Empty if there is no such case."""
    also = {case: [_also(row) for row in found.values() if _beside(row) and row.value is not None] for case, found in by_case(rows).items()}
    lines = [(case, ", ".join(texts)) for case, texts in also.items() if texts]
    return pipes([("case", "fastattn"), *lines]) if lines else ""


def _columns(found: Mapping[str, Row]) -> tuple[str, ...]:
    """Our time, and the speed against each library."""
    return milliseconds(found.get("fastattn")), *(found[name].text if name in found else "" for name in LIBRARIES)


def _machine_line(row: Row) -> str:
    return (f"Measured {row.date} on {row.machine}, {row.threads} threads ({row.ceilings}); instruction set {row.instruction_set}, "
            f"Python {row.python}, {row.versions}. Medians, round robin, public calls with their allocations.")


def pipes(lines: Sequence[Sequence[str]]) -> str:
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(lines[0]), *texts[1:]])


def update_readme(path: Path, name: str, text: str) -> None:
    """Put text between <!-- bench:name:begin --> and <!-- bench:name:end -->. ValueError unless both markers occur once."""
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    old = path.read_text()
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    new, count = re.subn(pattern, lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path.name} has the markers {begin} and {end} {count} times; expected once")
    path.write_text(new)
