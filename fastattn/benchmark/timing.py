"""Paired timing, round robin in one process: A, B, A, B. A machine that changes its speed changes both."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[], object]
Timer = Callable[[Call], float]


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def spread(samples: list[float] | np.ndarray[Any, Any]) -> Spread:
    low, median, high = np.percentile(samples, (20, 50, 80))
    return Spread(float(median), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Budget:
    """At least `rounds` rounds and `seconds` seconds, of A and B together.

    `settle` seconds pass before each turn is measured. The threads of the other library may still spin after its call
    (OpenMP's and onnxruntime's do, for some milliseconds) and would take a core. A turn repeats its call for `turn`
    seconds, so that calls of microseconds are not one reading of the clock.
    """

    rounds: int = 7
    seconds: float = 2.0
    settle: float = 0.002
    turn: float = 0.002


def wall(call: Call) -> float:
    """Seconds of one call. The result is freed after the clock is read."""
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def alternate(first: Call, second: Call | None, budget: Budget, timer: Timer = wall) -> tuple[list[float], list[float]]:
    """Samples of both calls, round robin after a warm-up. Sample n of one belongs to sample n of the other."""
    calls = [first] if second is None else [first, second]
    seconds = [min(timer(call) for _ in range(3)) for call in calls]  # the first call compiles, allocates, starts threads
    samples: list[list[float]] = [[], []]
    end = time.perf_counter() + budget.seconds
    while len(samples[0]) < budget.rounds or time.perf_counter() < end:
        for call, one, kept in zip(calls, seconds, samples, strict=False):
            kept.append(turn(call, one, budget, timer))
    return samples[0], samples[1]


def turn(call: Call, seconds: float, budget: Budget, timer: Timer) -> float:
    """Median of one turn's calls. Short calls settle by running, long ones by busy waiting: a sleep lets the core's clock drop."""
    end = time.perf_counter() + budget.settle
    while time.perf_counter() < end:
        if seconds < budget.settle:
            call()
    repeats = max(1, min(1000, int(budget.turn / max(seconds, 1e-9))))
    return float(np.median([timer(call) for _ in range(repeats)]))


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Spread of the ratios of samples of the same round."""
    return spread(np.divide(numerator, denominator))


def rotate(turns: Sequence[Callable[[], float]], rounds: int, seconds: float, swing: bool = False) -> list[list[float]]:
    """Samples of each turn, round robin (a, b, c, a, b, c, ...), until `rounds` rounds and `seconds` have passed.

    A turn times some calls of one implementation and returns seconds per call. Sample n of each belongs to the same
    round. swing: every other round goes backwards (a, b, b, a, ...), so that none always comes after the same other.
    """
    samples: list[list[float]] = [[] for _ in turns]
    end = time.perf_counter() + seconds
    while turns and (len(samples[0]) < rounds or time.perf_counter() < end):
        backwards = swing and len(samples[0]) % 2 == 1
        for n in reversed(range(len(turns))) if backwards else range(len(turns)):
            samples[n].append(turns[n]())
    return samples
