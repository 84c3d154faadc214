"""Rows: what was measured, where, and whether it is enough. CSV and back."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from .case import TEXT, Case, Measure
from .timing import Spread

# Busy processors above which a measurement is not trusted: half a processor doubles the time of a call on two.
BUSY = 0.1


@dataclass(frozen=True, slots=True)
class Where:
    """The machine and its software. Repeated in every row, so that a row means something alone."""

    date: str
    machine: str
    instruction_set: str
    threads: int
    python: str
    versions: str
    ceilings: str


@dataclass(frozen=True, slots=True)
class Row(Where):
    """One case by one implementation, and where it was measured.

    rounds: number of samples. others: processors that other processes kept busy meanwhile.
    median_ms, p20_ms, p80_ms: its time. fastattn_ms: ours in the same process, round robin.
    value, value_p20, value_p80: `measure` of fastattn against it (see Bar), from the ratios of each round.
    verdict: pass, MISS, WRONG (the results differ) or empty.
    error, lse_error: against float64, relative (Frobenius norms).
    gigabytes: GB/s of K and V, decode only. clock_mhz: the processor's clock under load.
    """

    case: str
    group: str
    passes: str
    dtype: str
    features: str
    shape: str
    implementation: str
    label: str = ""
    rounds: int = 0
    others: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gflops: float | None = None
    fastattn_ms: float | None = None
    measure: str = "time"
    value: float | None = None
    value_p20: float | None = None
    value_p80: float | None = None
    needs: str = ""
    verdict: str = ""
    note: str = ""
    error: float | None = None
    lse_error: float | None = None
    gigabytes: float | None = None
    clock_mhz: int | None = None

    @property
    def text(self) -> str:
        """The value as people write it: 1.38x, 71%, 12 MB. WRONG in place of the speed of a wrong result."""
        return "" if self.value is None else self.verdict if self.verdict == "WRONG" else TEXT[self.measure].format(self.value)


def make_row(where: Where, case: Case, implementation: str, *, time: Spread | None = None, measure: Measure = "time",
             value: Spread | None = None, agree: bool | None = None, **other: Any) -> Row:
    """A row, judged against its bar if the case has one. Times in seconds."""
    bar = next((bar for bar in case.bars if bar.against == implementation), None)
    verdict = "" if bar is None or value is None else "pass" if bar.met(value.median) else "MISS"
    ms = None if time is None else time.scaled(1e3)
    return Row(**{f.name: getattr(where, f.name) for f in fields(Where)}, case=case.name, group=case.group, passes=case.passes,
               dtype=case.dtype, features="+".join(case.features) or "full", shape=case.shape, implementation=implementation,
               median_ms=ms and ms.median, p20_ms=ms and ms.low, p80_ms=ms and ms.high,
               gflops=time and case.flops / time.median / 1e9, measure=measure, value=value and value.median,
               value_p20=value and value.low, value_p80=value and value.high, needs=str(bar or ""),
               verdict="WRONG" if agree is False else verdict, **other)


class RowFile:
    """A CSV that grows row by row. Each row is flushed, so a run that is stopped keeps its rows."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._names = [f.name for f in fields(Row)]
        self._writer.writerow(self._names)

    def write(self, row: Row) -> None:
        cells = (getattr(row, name) for name in self._names)
        self._writer.writerow(["" if cell is None else f"{cell:.5g}" if isinstance(cell, float) else cell for cell in cells])
        self._file.flush()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with RowFile(path) as file:
        for row in rows:
            file.write(row)


def read_csv(path: Path) -> list[Row]:
    kinds = get_type_hints(Row)

    def parse(name: str, text: str) -> Any:
        if kinds[name] in (int, str):
            return kinds[name](text)
        return None if not text else int(text) if kinds[name] == int | None else float(text)

    with path.open(newline="") as file:
        return [Row(**{name: parse(name, text) for name, text in line.items()}) for line in csv.DictReader(file)]
