"""`python -m bench paired OLD_TREE`: is a cell of the benchmark slower in this tree than in an older one?

Each tree has its own process (paired_worker.py) with the same cases and inputs. They measure a cell round robin, old
and new, then new and old, so that a machine that changes its speed changes both. A cell's ratio, new / old, is the
median over the rounds. Two processes of the same code differ a little too, because of where their memory lies. So a
cell over the bar is measured again in new processes, and all its rounds count.
"""
from __future__ import annotations

import csv
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from . import cpu, machine
from .case import Case, Mode
from .gpu import run as gpu
from .paired_worker import START
from .text import aligned
from .timing import Budget, Spread, ratios, spread

ROOT = Path(__file__).resolve().parent.parent
BARS = {"cpu": 0.02, "gpu": 0.01}           # how much slower a cell may be
BUDGETS = {"cpu": Budget(rounds=10, seconds=1.5), "gpu": Budget(rounds=12, seconds=0.5)}
AGAIN = 2                                   # further pairs of processes for a cell over the bar
PATIENCE = 300.0                            # seconds without an answer: a call that hangs
NAMES = "old", "new"


@dataclass(slots=True)
class Cell:
    """One case: samples of both trees in seconds, round by round, or a note why there are none."""

    case: Case
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def ratio(self) -> Spread | None:
        """new / old."""
        return ratios(self.new, self.old) if self.new else None

    def over(self, bar: float) -> bool:
        return self.ratio is not None and self.ratio.median > 1 + bar


class LostError(Exception):
    """A worker has ended or does not answer."""


class Worker:
    """A process with the fastattn of one tree. paired_worker.py lists its orders."""

    def __init__(self, name: str, tree: Path, job: dict[str, Any]) -> None:
        threads = {} if job["gpu"] else dict.fromkeys(cpu.THREADS, str(job["threads"]))
        self.name = name
        self.process = subprocess.Popen([sys.executable, "-c", START, str(ROOT), str(tree)], env=os.environ | threads, cwd=tree,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.answers, self.said = self.process.stdin, queue.Queue[str | None](), list[str]()
        self.readers = [threading.Thread(target=read, args=(stream, keep), daemon=True)
                        for stream, keep in ((self.process.stdout, self.answers.put), (self.process.stderr, self._hear))]
        for reader in self.readers:
            reader.start()
        self._send(job)

    def _hear(self, line: str | None) -> None:
        if line and line.strip():
            self.said[:] = [line.strip()[:200]]     # the last line says why a process ended

    def _send(self, order: dict[str, Any]) -> None:
        try:
            self.stdin.write(json.dumps(order) + "\n")
            self.stdin.flush()
        except BrokenPipeError:
            pass        # the process ended; the next answer reports it

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Send an order and return the answer. LostError if there is none."""
        self._send({"do": do} | more)
        try:
            line = self.answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise LostError(f"{self.name}: no answer for {PATIENCE:.0f} s") from None
        if line is None:
            status = self.process.wait()
            self.readers[1].join()
            raise LostError(f"{self.name}: exit status {status}: {' '.join(self.said) or 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def read(stream: IO[str], keep: Callable[[str | None], None]) -> None:
    for line in stream:
        keep(line)
    keep(None)


class Pair:
    """A worker for each tree, started by the first measurement."""

    def __init__(self, trees: Sequence[Path], job: dict[str, Any], budget: Budget) -> None:
        self.trees, self.job, self.budget = trees, job, budget
        self.workers: list[Worker] = []

    def measure(self, cell: Cell) -> None:
        """Add a cell's rounds, or its note. A lost process costs one cell."""
        try:
            if not self.workers:
                self.workers = [Worker(name, tree, self.job) for name, tree in zip(NAMES, self.trees, strict=True)]
            for worker in self.workers:
                why = worker.ask("prepare", case=asdict(cell.case)).get("failed")
                if why:
                    cell.note = f"{worker.name}: {why}"
                    return
            self._rounds(cell)
        except LostError as error:
            cell.note = str(error)
            self.close()

    def _rounds(self, cell: Cell) -> None:
        end, rounds = time.perf_counter() + self.budget.seconds, 0
        both = list(zip(self.workers, (cell.old, cell.new), strict=True))
        while rounds < self.budget.rounds or time.perf_counter() < end:
            found = {}
            for worker, _ in reversed(both) if rounds % 2 else both:
                answer = worker.ask("turn")
                if "failed" in answer:
                    cell.note = f"{worker.name}: {answer['failed']}"
                    return
                found[worker.name] = answer["seconds"]
            for worker, samples in both:
                samples.append(found[worker.name])
            rounds += 1

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []


def compile_all(trees: Sequence[Path], job: dict[str, Any], cases: Sequence[Case], jobs: int) -> None:
    """Compile the kernels of both trees into the cache, in parallel processes. Failures show up when the case is measured."""
    def compile_part(part: tuple[Path, list[Case]]) -> None:
        worker = Worker("compiler", part[0], job)
        try:
            worker.ask("compile", cases=[asdict(case) for case in part[1]])
        except LostError as error:
            print(error, flush=True)
        finally:
            worker.close()
    parts = [(tree, group) for group in gpu.by_kernels(cases) for tree in trees]
    with ThreadPoolExecutor(jobs) as pool:
        for done, _ in enumerate(pool.map(compile_part, parts), 1):
            print(f"compiled {done}/{len(parts)}", flush=True)


def run(trees: Sequence[Path], cases: Sequence[Case], on: str, threads: int | None = None, budget: Budget | None = None,
        engine: str | None = None) -> list[Cell]:
    """Measure every case in both trees, on "cpu" or "gpu", and print a line for each. `engine` serves tests without compiled engines."""
    job = {"gpu": on == "gpu", "threads": threads or machine.available_threads(), "engine": engine}
    cells = [Cell(replace(case, against=(), bars=())) for case in cases]
    if on == "gpu":
        compile_all(trees, job, [cell.case for cell in cells], min(16, machine.available_threads()))
    left = cells
    for attempt in range(1 + AGAIN):
        pair = Pair(trees, job, budget or BUDGETS[on])
        try:
            for number, cell in enumerate(left, 1):
                pair.measure(cell)
                print(f"[{number:3}/{len(left)}]{' again' if attempt else ''} {cell.case.name}: {_brief(cell)}", flush=True)
        finally:
            pair.close()
        left = [cell for cell in left if cell.over(BARS[on]) and not cell.note]
        if not left:
            break
    return cells


def _brief(cell: Cell) -> str:
    ratio = cell.ratio
    text = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" if ratio else ""
    return " ".join(part for part in (text, cell.note) if part)


# ---------------------------------------------------------------- what is printed and kept
def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that could not be measured first, then the worst ratios."""
    return sorted(cells, key=lambda cell: -math.inf if cell.note or not cell.ratio else -cell.ratio.median)


def table(cells: Sequence[Cell], bar: float) -> str:
    """The cells, and in the last line how many are over the bar."""
    lines = [("cell", "old ms", "new ms", "new/old", "p20", "p80", "")]
    for cell in ordered(cells):
        ratio = cell.ratio
        if ratio and not cell.note:
            numbers = [f"{spread(samples).median * 1e3:.4g}" for samples in (cell.old, cell.new)] + [f"{number:.3f}" for number in ratio]
            lines.append((cell.case.name, *numbers, f"OVER {1 + bar:.2f}" if cell.over(bar) else ""))
        else:
            lines.append((cell.case.name, "", "", "", "", "", cell.note))
    return f"{aligned(lines)}\n\n{closing(cells, bar)}"


def closing(cells: Sequence[Cell], bar: float) -> str:
    found = [cell.ratio.median for cell in cells if cell.ratio and not cell.note]
    mean = f"geometric mean {math.exp(sum(map(math.log, found)) / len(found)):.4f}, worst {max(found):.3f}" if found else "nothing measured"
    failed = len(cells) - len(found)
    return (f"{len(found)} cells: new / old {mean}; {sum(cell.over(bar) for cell in cells)} over {1 + bar:.2f}"
            f"{f'; {failed} not measured' if failed else ''}")


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """One line per cell, in the table's order. Times in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("case", "rounds", "old_ms", "new_ms", "ratio", "ratio_p20", "ratio_p80", "note"))
        for cell in ordered(cells):
            numbers: list[object] = [""] * 5
            if cell.ratio:
                numbers = [f"{number:.6g}" for number in (spread(cell.old).median * 1e3, spread(cell.new).median * 1e3, *cell.ratio)]
            writer.writerow((cell.case.name, len(cell.new), *numbers, cell.note))


def select(on: str, mode: Mode, only: str | None, backward: bool = False) -> list[Case]:
    """Cases whose name matches `only`; on a GPU the default is the grid. Cases that measure memory are left out."""
    named = cpu.select(mode, only) if on == "cpu" else gpu.choose(backward, mode, "^grid " if only is None else only, ())
    chosen = [case for case in named if case.group != "memory"]
    if not chosen:
        raise SystemExit(f"no case of mode {mode!r} has a name that matches {only!r}")
    return chosen


def tree(path: Path) -> Path:
    """The absolute path of a folder that contains the package. SystemExit if it does not."""
    if not (path / "fastattn" / "__init__.py").is_file():
        raise SystemExit(f"{path} has no fastattn/__init__.py; expected a tree of the repository, as `git worktree add OLD_TREE REVISION` "
                         "makes; for the CPU run `python setup.py build_ext --inplace` there, too")
    return path.resolve()
