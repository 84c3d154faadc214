"""The child process: fastattn and one other implementation on one shape, in turns. JSON on stdin; the last line of
stdout is the answer.

Fresh, because thread pools, allocators and caches of one library would change the times of the next, and because a
library that crashes then costs one line of the table.
"""
from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .exact import Exact
from .implementations import RIVALS, Runner, make_fastattn, make_inputs
from .machine import OtherWork
from .shape import Shape
from .timing import Budget, rotate, turn, wall

ROUNDS = {"cpu": 3, "cuda": 7}      # at least
TURN = {"cpu": 0.005, "cuda": 0.02}     # seconds of a turn, of many calls if they are short


@dataclass(frozen=True, slots=True)
class Measured:
    """One implementation: seconds of a call, round by round, and its largest relative error. note: why there are none."""

    label: str = ""
    samples: tuple[float, ...] = ()
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """fastattn and the other one. others: processors that other processes kept busy meanwhile."""

    ours: Measured
    theirs: Measured | None
    others: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pair:
        ours, theirs = (x and Measured(**{**x, "samples": tuple(x["samples"])}) for x in (data["ours"], data["theirs"]))
        return cls(ours, theirs, data["others"])


class Clock:
    """Turns by the wall clock, or on a CUDA device by events."""

    def __init__(self, device: str, shape: Shape) -> None:
        self.device, self.events, self.sets = device, None, 1
        if device == "cuda":
            from .events import Events, sets_of

            self.events = Events()
            self.sets = sets_of(shape.input_bytes, self.events.l2_bytes)

    def turn(self, runners: list[Runner]) -> Callable[[], float]:
        """Warm up; return a function that measures one turn in seconds per call."""
        calls, wait = [runner.call for runner in runners], runners[0].wait
        if self.events is not None and wait is None:
            return self.events.turn(calls, TURN["cuda"])

        def timed(call: Callable[[], Any]) -> float:
            return wall(call if wait is None else lambda: wait(call()))
        seconds, end = [timed(calls[0])], time.perf_counter() + 1.0     # the first call compiles, allocates, starts threads
        while len(seconds) < 3 and time.perf_counter() < end:
            seconds.append(timed(calls[0]))
        if wait is None:
            return lambda: turn(calls[0], min(seconds), Budget(turn=TURN["cpu"]), wall)
        repeats = max(1, int(TURN["cuda"] / max(min(seconds), 1e-6)))

        def many() -> float:
            start = time.perf_counter()
            for n in range(repeats):
                result = calls[n % len(calls)]()
            wait(result)
            return (time.perf_counter() - start) / repeats
        return many


def measure(shape: Shape, device: str, rival: str | None, exact: Exact, seconds: float) -> Pair:
    """Errors first, then both in turns (A B, B A) for about `seconds`."""
    clock = Clock(device, shape)
    inputs = [make_inputs(shape, seed) for seed in range(clock.sets)]
    makers = [make_fastattn] + ([RIVALS[rival].make] if rival else [])
    found: list[Measured] = []
    runners: list[list[Runner]] = []
    for maker in makers:
        try:
            made = [maker(shape, x, device) for x in inputs]
            error = exact.error(shape, made[0].results(made[0].call()))
        except Exception as reason:        # whatever a library raises is the result
            refused = isinstance(reason, NotImplementedError)
            text = f"no: {reason}" if refused else f"failed: {type(reason).__name__}: {reason}"
            found.append(Measured(note=text.splitlines()[0][:200]))
        else:
            found.append(Measured(made[0].label, (), error))
            runners.append(made)
    turns = [clock.turn(made) for made in runners] if not found[0].note else []
    gc.collect()
    gc.disable()
    work = OtherWork()
    samples = rotate(turns, ROUNDS[device], seconds, swing=True)
    others = work.processors()
    timed = iter(samples)
    done = [one if one.note or not turns else Measured(one.label, tuple(next(timed)), one.error) for one in found]
    return Pair(done[0], done[1] if rival else None, others)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)       # libraries and compilers may print on stdout
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    pair = measure(Shape(**job["shape"]), job["device"], job["rival"], Exact.load(Path(job["exact"])), job["seconds"])
    print(json.dumps(asdict(pair)), file=answers)


if __name__ == "__main__":
    main()
