"""`python -m tests.fuzz`: see the package's docstring. Exit status 1 if any problem was wrong."""
from __future__ import annotations

import argparse
import os
import sys
import threading

from tests.tools.day import SEED

from . import run
from .draw import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random problems against a formula.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, help="how long (60, where --problems is not given)")
    parser.add_argument("--problems", type=int, help="how many")
    parser.add_argument("--seed", type=int, help="of the run; the date's by default")
    parser.add_argument("--one", metavar="SEED:INDEX", help="run this problem alone, in this process, and show it")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--levels", help="instruction-set levels, comma-separated; all that this machine has by default")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    seed = today() if given.seed is None else given.seed
    if given.worker:
        run.work(seed, given.device)
        return 0
    chosen = [""]
    if given.device == "cpu":
        from fastattn.cpu import levels  # here: the GPU's half works where the CPU engine is not compiled

        chosen = given.levels.split(",") if given.levels else levels.available()
    if given.one:
        return one(given.one, given.device, chosen)
    seconds = 60.0 if given.seconds is None and given.problems is None else given.seconds
    print(f"seed {seed}", flush=True)
    report = run.run(seed, given.device, chosen, problems=given.problems, seconds=seconds,
                     processes=given.processes, say=lambda line: print(line, flush=True))
    for finding in report.findings:
        print(run.show(finding, seed, given.device))
    for line in [*report.summary(), report.last_line()]:
        print(line)
    return 1 if report.findings else 0


def today() -> int:
    """The seed of the day, 20260131."""
    return int(os.environ.get("FASTATTN_FUZZ_SEED") or SEED)


def one(name: str, device: str, chosen: list[str]) -> int:
    """Problem SEED:INDEX, in a process of its own for each level."""
    seed, index = map(int, name.split(":"))
    print(draw(seed, index, device))
    wrong = 0
    for level in chosen:
        worker = run.Worker(seed, device, level)
        report = run.Report(seed, device)
        worker.give(f"{index} {index + 1}")
        run.hear(worker, index, index + 1, seed, device, report, threading.Lock(), None)
        worker.stop()
        wrong += len(report.findings)
        print(level or device, "right" if not report.findings else "")
        for finding in report.findings:
            print(run.show(finding, seed, device))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
