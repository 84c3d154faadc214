"""Busy processors, and torch's operators between calls.

Four processes take turns: fastattn and torch's SDPA, each alone in its process, and each with torch's operators (a matrix product and a
GELU) before every call. A process each, because threads of two libraries in one process disturb each other. Every round measures all four
on processors that do nothing else, and again while one process a processor computes for ever.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import NamedTuple

import numpy as np

from .case import Case
from .cpu import BASE, ROOT, SHORT, SMALL, THREADS

LOOP = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass"
TURN = 0.08             # seconds; a scheduler's tick is 0.004
IMPLEMENTATIONS = "fastattn", "torch"


class Place(NamedTuple):
    """Where a call is measured."""

    beside: bool        # torch's operators run between the calls
    busy: bool          # other processes want the processors

    def __str__(self) -> str:
        return f"{'beside torch' if self.beside else 'alone'}, {'busy' if self.busy else 'idle'}"


PLACES = tuple(Place(beside, busy) for beside in (False, True) for busy in (False, True))


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a call: the medians, over the rounds, of the median and of the mean of a turn."""

    median: float
    mean: float


Found = dict[tuple[str, Place], Times]


def cases() -> list[Case]:
    """Forward, and forward with backward."""
    return [*(Case("busy", *shape, backward=backward) for shape in (SMALL, BASE) for backward in (False, True)),
            *(Case("busy", *shape) for shape in SHORT[:4])]


class Worker:
    """One of the four processes."""

    def __init__(self, implementation: str, beside: bool, threads: int) -> None:
        command = [sys.executable, "-m", "bench.busy_worker", implementation, str(int(beside)), str(threads)]
        environment = os.environ | dict.fromkeys(THREADS, str(threads))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def turn(self, case: Case, seconds: float = TURN) -> Times:
        """Times of one turn. The first one of a case makes its arrays."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"case": asdict(case), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of the benchmark ended; its error is above")
        return Times(*json.loads(line))

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Others:
    """Processes that compute for ever, and stand still outside `working`."""

    def __init__(self, count: int) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._send(signal.SIGCONT)
        time.sleep(TURN / 2)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, what: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(what)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def measure(case: Case, workers: dict[tuple[str, bool], Worker], others: Others, seconds: float) -> Found:
    """Rounds of turns for so many seconds, three at least."""
    samples: dict[tuple[str, Place], list[Times]] = {}
    for worker in workers.values():
        worker.turn(case, 0)
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 3:
        rounds += 1
        for busy in (False, True):
            with others.working() if busy else contextlib.nullcontext():
                for (implementation, beside), worker in workers.items():
                    samples.setdefault((implementation, Place(beside, busy)), []).append(worker.turn(case))
    return {key: Times(*(float(np.median(column)) for column in zip(*map(astuple, found), strict=True))) for key, found in samples.items()}


def run(chosen: list[Case], threads: int, processes: int, seconds: float) -> Iterator[tuple[Case, Found]]:
    """Measure the cases, one after another.

    Parameters
    ----------
    chosen : list of Case
        Some of `cases()`.
    threads : int
        Threads of each library.
    processes : int
        How many other processes compute.
    seconds : float
        For each case.

    Yields
    ------
    tuple
        The case and its times, by implementation and place.
    """
    workers = {(name, beside): Worker(name, beside, threads) for beside in (False, True) for name in IMPLEMENTATIONS}
    others = Others(processes)
    try:
        for case in chosen:
            yield case, measure(case, workers, others, seconds)
    finally:
        others.end()
        for worker in workers.values():
            worker.end()


HEAD = ("| case | where | fastattn ms | mean | torch ms | mean | times as fast as torch | times as long as alone and idle |\n"
        "|---|---|---|---|---|---|---|---|")


def lines(case: Case, found: Found) -> str:
    """The rows of a case in a Markdown table."""
    alone, rows = found["fastattn", PLACES[0]].median, []
    for place in PLACES:
        ours, theirs = (found[name, place] for name in IMPLEMENTATIONS)
        times = " | ".join(f"{x:.3g}" for x in (ours.median, ours.mean, theirs.median, theirs.mean))
        rows.append(f"| {case.passes} {case.shape} | {place} | {times} | {theirs.median / ours.median:.2f} | {ours.median / alone:.2f} |")
    return "\n".join(rows)
