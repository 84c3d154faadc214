"""The parent: hands the cases to children, writes each row as it comes, and starts a new child after a case that broke one.

Cases that share kernels share a child. Children compile in parallel, which is most of the time (25 s for each variant
of FlashAttention-4). They measure one at a time, while none compiles.
"""
from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from ..case import Case, Mode
from ..results import Row, RowFile, Where, make_row
from . import cases, table, workloads
from .worker import Budget

ROOT = Path(__file__).resolve().parents[2]
Length = Mode | Literal["workloads"]
Split = Callable[[Sequence[Case], int], list[list[Case]]]
BUDGETS: dict[Length, Budget] = {"quick": Budget(rounds=5, turn=0.010), "full": Budget(rounds=15, turn=0.020),
                                 "workloads": workloads.BUDGET}
MINUTES: dict[Length, float] = {"quick": 6.0, "full": 120.0, "workloads": workloads.MINUTES}
PATIENCE = 240.0  # seconds without an answer: the case hangs. The longest known answer is FA4's compilation of a backward.
COMMAND = (sys.executable, "-m", "bench.gpu.worker")


@dataclass(frozen=True, slots=True)
class Child:
    """One child's answers, as they come."""

    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]

    @classmethod
    def start(cls, job: dict[str, Any], log: IO[str]) -> Child:
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        assert process.stdin and process.stdout
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: IO[str]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended; its answers and its log say why
        return cls(process, lines)

    def listen(self, patience: float) -> Iterator[dict[str, Any]]:
        """Answers until the end. {"lost": reason} is the last one if the child broke."""
        while True:
            try:
                line = self.answers.get(timeout=patience)
            except queue.Empty:
                self.process.kill()
                self.process.wait()
                yield {"lost": f"no answer for {patience:.0f} s"}
                return
            if line is None:
                status = self.process.wait()
                yield {"lost": f"exit status {status}"}
                return
            answer = json.loads(line)
            yield answer
            if "end" in answer:
                self.process.wait()
                return


def run(chosen: Sequence[Case], mode: Length, path: Path, minutes: float | None = None, patience: float = PATIENCE,
        jobs: int | None = None, split: Split | None = None) -> list[Row]:
    """Measure, print a line for each case, and write the CSV row by row. The children's output goes to a .log file next to it.

    Parameters
    ----------
    chosen : sequence of Case
        The cases.
    mode : "quick", "full", "long" or "workloads"
        How many rounds.
    path : Path
        The CSV.
    minutes : float, optional
        Start no case after so many minutes.
    patience : float
        Seconds without an answer after which a child counts as lost.
    jobs : int, optional
        Children at once. Default: the number of processors, at most 16. With 1 nothing is compiled ahead.
    split : callable, optional
        (cases, jobs) -> the cases of each child. Default: `by_kernels`.

    Returns
    -------
    list of Row
    """
    until = time.time() + 60 * (minutes if minutes is not None else MINUTES[mode])
    jobs, rows = jobs or min(16, len(os.sched_getaffinity(0))), list[Row]()
    alone = [case for case in chosen if case.group == "host" or case.wall]      # measures host time, so no child may compile meanwhile
    shared = [case for case in chosen if case not in alone]
    with RowFile(path) as file, path.with_suffix(".log").open("w") as log, tempfile.NamedTemporaryFile() as lock:
        keeper = _Keeper(len(chosen), file, rows)
        job = {"budget": asdict(BUDGETS[mode]), "until": until, "lock": lock.name if jobs > 1 else None}
        parts = [shared] if jobs == 1 else split(shared, jobs) if split else list(by_kernels(shared))
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda part: _measure(part, job, keeper, log, patience), parts):
                pass
        _measure(alone, job | {"lock": None}, keeper, log, patience)
        for row in table.geometric_means(rows):
            keeper.keep([row])
    return rows


def by_kernels(chosen: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases in groups that use the same, or almost the same, kernels."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in chosen:
        key = (case.head_dim, case.causal) if case.group == "grid" else ()
        groups.setdefault((case.group, case.dtype, case.backward, *key), []).append(case)
    yield from groups.values()


class _Keeper:
    """Writes and counts the children's rows, one thread at a time."""

    def __init__(self, cases: int, file: RowFile, rows: list[Row]) -> None:
        self.cases, self.done, self.file, self.rows, self.lock = cases, 0, file, rows, threading.Lock()

    def keep(self, found: Sequence[Row], say: str = "") -> None:
        with self.lock:
            for row in found:
                self.rows.append(row)
                self.file.write(row)
            if say:
                self.done += 1
                print(f"[{self.done:3}/{self.cases}] {say}", flush=True)


def _measure(cases: Sequence[Case], job: dict[str, Any], keeper: _Keeper, log: IO[str], patience: float) -> None:
    """Measure all of `cases`, with as many children as it takes."""
    left = list(cases)
    while left:
        child = Child.start(job | {"cases": [asdict(case) for case in left]}, log)
        current = ""
        for answer in child.listen(patience):
            if "begin" in answer:
                current = answer["begin"]
            elif "say" in answer:
                print(answer["say"], flush=True)
            elif "rows" in answer:
                found = [Row(**row) for row in answer["rows"]]
                left = [case for case in left if case.name != current]
                keeper.keep(found, f"{answer['seconds']:5.1f} s  {table.brief(found)}")
                current = ""
            elif "lost" in answer:
                why = f"{answer['lost']}: {_last_line(Path(log.name))}"
                broken = next((case for case in left if case.name == current), None)
                if broken is None:  # not caused by a case: a new child would fail too
                    raise SystemExit(f"the benchmark's process ended ({why}); {len(keeper.rows)} rows are in {Path(log.name).parent}")
                print(f"{current}: the process was lost ({why})", flush=True)
                keeper.keep([_lost(broken, keeper.rows, why)], "lost")
                left.remove(broken)
                break
        else:
            break


def _lost(case: Case, rows: Sequence[Row], why: str) -> Row:
    """The row of a case that ended its process. It counts as wrong, whichever implementation caused it."""
    names = tuple(Where.__dataclass_fields__)
    where = Where(**{name: getattr(rows[0], name) for name in names}) if rows else Where("", "", "", 1, "", "", "")
    return replace(make_row(where, case, "fastattn", note=f"failed: {why}"), verdict="WRONG")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no message"


def check_device() -> None:
    """SystemExit, with the reason, if there is no device to measure on."""
    try:
        import torch
    except ImportError:
        raise SystemExit("bench gpu needs torch with CUDA, which is not installed; every other library is optional") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"bench gpu needs a CUDA device; torch {torch.__version__} finds none")


def choose(backward: bool, mode: Mode, only: str | None, skip: tuple[str, ...]) -> list[Case]:
    """The chosen cases, forward or backward. SystemExit if there are none."""
    everything = cases.backward_cases() if backward else cases.forward_cases()
    chosen = cases.select(everything, mode, only, skip)
    if not chosen:
        raise SystemExit(f"no case of mode {mode!r} has a name that matches {only!r}")
    return chosen
