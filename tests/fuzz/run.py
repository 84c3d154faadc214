"""Processes that draw, run and judge problems; what crashes or hangs one is a finding too.

A worker reads "first last" from its input and writes a line before each problem and one for what is wrong. It is the unit of failure: the
problem that it was at when it ended by a signal, or said nothing for TIMEOUT seconds, is wrong, and a new one goes on behind it. One that
says nothing is asked where it is, before it is killed.
"""
from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .draw import PER_KERNEL, draw, kernel
from .shrink import shrink
from .spec import Spec

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.fuzz"]
TIMEOUT = {"cpu": 60.0, "cuda": 180.0}
SHRUNK = 3                                      # findings of a worker that are made smaller, for so many seconds each
SHRINKING = {"cpu": 4.0, "cuda": 25.0}
ANSWER = 2.0                                    # seconds in which a worker that hangs tells where
FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
PIECE = 200                                     # problems that a worker is given at once on the host


@dataclass
class Finding:
    index: int
    level: str
    spec: str
    complaints: list[str]
    crashed: bool = False
    smallest: str = ""
    at_smallest: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a run did. `refused`: problems that no engine, or not the forced one, takes."""

    seed: int
    device: str
    count: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)      # on a GPU: by family
    reasons: Counter[str] = field(default_factory=Counter)      # why problems were refused
    broken: bool = False                                        # workers cannot start

    def summary(self) -> list[str]:
        """What kernels ran and what was refused, a line each."""
        kernels = ", ".join(f"{count} of {family}" for family, count in self.kernels.most_common())
        return [f"kernels: {kernels}"] * bool(kernels) + [f"refused {count}: {reason}" for reason, count in self.reasons.most_common(8)]

    def last_line(self) -> str:
        return (f"{self.count} problems in {self.seconds:.0f} s, {self.refused} refused, {len(self.findings)} wrong "
                f"(--device {self.device} --seed {self.seed})")


# ---------------------------------------------------------------- in a worker
def answer_where(file: Any) -> None:
    """From now on SIGUSR1 writes the stacks of all threads to the file, whatever the process waits for."""
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)


def work(seed: int, device: str) -> None:
    """Reads pieces of the run until its input ends."""
    import warnings

    from . import judge
    from .device import Device, make_device
    from .judge import Refused, complaints

    warnings.simplefilter("ignore")             # numbers that overflow are what is drawn
    shown = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer_where(shown)
    there: Device = make_device(device)
    shrunk = 0

    def say(**what: Any) -> None:
        shown.write(json.dumps(what) + "\n")

    def wrong(spec: Spec) -> list[str]:
        try:
            return complaints(spec, there) if there.healthy() else []
        except Refused:
            return []
    with judge.poisoned_results():
        say(ready=True)
        for line in sys.stdin:
            if line.startswith("{"):            # a Spec that crashed, made smaller
                say(at=0)
                say(wrong=0, spec="", complaints=wrong(Spec.of(line)))
                say(done=1)
                continue
            first, last = map(int, line.split())
            refusals = 0
            for index in range(first, last):
                say(at=index)
                spec = draw(seed, index, device)
                try:
                    found = complaints(spec, there)
                except Refused as reason:
                    refusals += 1
                    say(refused=index, reason=str(reason))
                    if device == "cuda" and refusals == 3 == index - first + 1:
                        say(skipped=last - index - 1)       # the whole kernel
                        break
                    continue
                if found:
                    say(wrong=index, spec=str(spec), complaints=found[:4])
                    if shrunk < SHRUNK and there.healthy():
                        shrunk += 1
                        smallest, at_smallest = shrink(spec, wrong, SHRINKING[device])
                        say(smallest=index, spec=str(smallest), complaints=at_smallest[:4])
                    if not there.healthy():
                        os._exit(3)
            say(done=last)


# ---------------------------------------------------------------- the run
class Worker:
    """A process, and a queue of what it says; None when it has ended."""

    def __init__(self, seed: int, device: str, level: str) -> None:
        self.level = level
        # memory that nothing has written holds 0x7F: huge numbers
        environment = os.environ | {"MALLOC_PERTURB_": "128", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "2" if level else "1"}
        if level:
            environment["FASTATTN_ISA"] = level
        self.process = subprocess.Popen([*COMMAND, "--worker", "--seed", str(seed), "--device", device], cwd=ROOT, env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def give(self, what: str) -> None:
        """"first last", or a Spec as JSON."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):              # it ended: what it says tells
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()

    def where(self) -> list[str]:
        """Where each thread of a worker that hangs is, a line each, the innermost call first. Nothing if it does not answer."""
        self.process.send_signal(signal.SIGUSR1)
        threads = list[list[str]]()
        with contextlib.suppress(queue.Empty):
            while (line := self.lines.get(timeout=ANSWER)) is not None:
                if line.lower().startswith(("thread 0x", "current thread 0x")):
                    threads.append([])
                elif threads and (frame := FRAME.search(line)):
                    threads[-1].append(f"{frame[3]} ({Path(frame[1]).name}:{frame[2]})")
        return ["in " + " < ".join(frames) for frames in threads if frames]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def pieces(levels: list[str], device: str, problems: int | None, processes: int) -> Iterator[tuple[str, int, int]]:
    """(level, first, last) of what workers are given, without end where `problems` is None. Round robin; on a GPU a piece is a kernel."""
    size = PER_KERNEL if device == "cuda" else PIECE
    if device == "cpu" and problems is not None:
        size = max(1, min(PIECE, -(-problems // (len(levels) * processes))))
    first, n = 0, 0
    while problems is None or first < problems:
        last = first + size if problems is None else min(first + size, problems)
        yield levels[n % len(levels)], first, last
        first, n = last, n + 1


def run(seed: int, device: str, levels: list[str], *, problems: int | None = None, seconds: float | None = None, processes: int = 2,
        say: Any = print) -> Report:
    """Run that many problems, or for that many seconds."""
    with kernel_cache(device):
        return _run(seed, device, levels, problems, seconds, processes, say)


@contextmanager
def kernel_cache(device: str) -> Iterator[None]:
    """Inside, workers compile kernels for each other into a folder of this run's, unless FASTATTN_CACHE names one."""
    if device == "cpu" or "FASTATTN_CACHE" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fastattn_fuzz_") as folder:
        os.environ["FASTATTN_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["FASTATTN_CACHE"]


def _run(seed: int, device: str, levels: list[str], problems: int | None, seconds: float | None, processes: int, say: Any) -> Report:
    report, lock, start = Report(seed, device), threading.Lock(), time.monotonic()
    end = None if seconds is None else start + seconds
    # a GPU's families refuse some: those do not count
    todo = pieces(levels, device, None if device == "cuda" else problems, processes)
    shown, told = [start], 0

    def over() -> bool:
        late = end is not None and time.monotonic() > end
        return late or report.broken or (device == "cuda" and problems is not None and report.count >= problems)

    def slot() -> None:
        nonlocal told
        workers = dict[str, Worker]()          # one for each level
        while True:
            with lock:
                piece = None if over() else next(todo, None)
            if piece is None:
                break
            level, first, last = piece
            if device == "cuda":
                report.kernels[kernel(seed, first // PER_KERNEL)["family"]] += 1
            while first < last:
                if level not in workers:
                    workers[level] = Worker(seed, device, level)
                workers[level].give(f"{first} {last}")
                first = hear(workers[level], first, last, seed, device, report, lock, end)
                if workers[level].process.poll() is not None:
                    del workers[level]
                if over():
                    break
            with lock:
                for finding in report.findings[told:]:      # now, because a run that is stopped has no end
                    say(show(finding, seed, device))
                told = len(report.findings)
                if time.monotonic() - shown[0] > 30:
                    shown[0] = time.monotonic()
                    say(f"{report.count} problems, {len(report.findings)} wrong")
        for worker in workers.values():
            worker.stop()
    slots = [threading.Thread(target=slot) for _ in range(processes)]
    for one in slots:
        one.start()
    for one in slots:
        one.join()
    for finding in [one for one in report.findings if one.crashed][:2]:
        _shrink_crash(finding, seed, device)
    report.seconds = time.monotonic() - start
    report.findings.sort(key=lambda f: f.index)
    return report


def hear(worker: Worker, first: int, last: int, seed: int, device: str, report: Report, lock: Any, end: float | None) -> int:
    """Hears a worker to the end of its piece; the index to go on at, below `last` where it has to be replaced."""
    at, finding = None, None
    while True:
        try:
            line = worker.lines.get(timeout=TIMEOUT[device])
        except queue.Empty:
            line, hung, where = None, True, worker.where()
        else:
            hung, where = False, []
        what = {} if line is None else json.loads(line)
        with lock:
            if line is None:
                worker.stop()
                if at is None:
                    report.broken = True
                    how = f"a worker ended before its first problem, status {worker.process.returncode}"
                    report.findings.append(Finding(first, worker.level, "", [how]))
                    return last
                if finding is None or finding.index != at:              # else it died while its problem was made smaller
                    how = f"hangs for {TIMEOUT[device]:.0f} s" if hung else f"ended its process, status {worker.process.returncode}"
                    report.findings.append(Finding(at, worker.level, str(draw(seed, at, device)), [how, *where], True))
                return int(at) + 1
            if "at" in what:
                at = what["at"]
                report.count += 1
            elif "refused" in what:
                report.refused += 1
                report.count -= 1
                report.reasons[what["reason"][-160:]] += 1
            elif "wrong" in what:
                finding = Finding(what["wrong"], worker.level, what["spec"], what["complaints"])
                report.findings.append(finding)
            elif "smallest" in what and finding is not None:
                finding.smallest, finding.at_smallest = what["spec"], what["complaints"]
            elif "done" in what:
                return last
        if end is not None and time.monotonic() > end and "at" in what:
            report.count -= 1
            worker.stop()
            return last


def _shrink_crash(finding: Finding, seed: int, device: str) -> None:
    """Makes a problem smaller that ends its process: each Spec in a process of its own."""
    def wrong(spec: Spec) -> list[str]:
        worker, report = Worker(seed, device, finding.level), Report(seed, device)
        worker.give(spec.json())
        hear(worker, 0, 1, seed, device, report, threading.Lock(), None)
        worker.stop()
        return report.findings[0].complaints if report.findings and report.findings[0].crashed else []
    spec, finding.at_smallest = shrink(draw(seed, finding.index, device), wrong, 60)
    finding.smallest = str(spec)


def show(finding: Finding, seed: int, device: str) -> str:
    """A finding as text: the command that runs it again, and a line for found.py."""
    lines = [f"WRONG --device {device} --one {seed}:{finding.index} {finding.level and '--levels ' + finding.level}"]
    lines += [f"    {complaint}" for complaint in finding.complaints]
    lines.append(f"    {finding.spec}")
    if finding.smallest:
        lines += ["  smallest, a line for tests/fuzz/found.py:", f"    {finding.smallest},"]
        lines += [f"      {complaint}" for complaint in finding.at_smallest]
    return "\n".join(lines)
