"""The child process: one measurement in a fresh interpreter. The job is JSON on stdin, the answer the last line of stdout.

Fresh, because thread pools, allocators and caches of an earlier measurement would change the next one.
"""
from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import ceilings, memory, rivals
from .arrays import TOLERANCE
from .case import Case
from .machine import OtherWork
from .timing import Budget, Spread, alternate, ratios, spread


@dataclass(frozen=True, slots=True)
class Pair:
    """One case of fastattn and one rival. Times in seconds.

    ratio: their time / ours in each round. agree: None if there is nothing to compare. others: processors that other
    processes kept busy meanwhile.
    """

    ours: Spread
    label: str
    rounds: int
    others: float | None
    theirs: Spread | None = None
    their_label: str = ""
    ratio: Spread | None = None
    agree: bool | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pair:
        spreads = {name: Spread(*data[name]) for name in ("ours", "theirs", "ratio") if data[name] is not None}
        return cls(**{**data, **spreads})


def difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Largest distance of two rows, relative to the size of that row or of a typical row, whichever is larger. NaN is infinite.

    TOLERANCE limits it.
    """
    size = np.linalg.norm(b, axis=-1)
    distance = np.linalg.norm(a - b, axis=-1) / np.maximum(size, np.sqrt(np.mean(size * size)) + 1e-30)
    return float(np.nan_to_num(distance, nan=np.inf).max())


def measure_pair(case: Case, rival: str | None, threads: int, budget: Budget, engine: str | None = None) -> Pair:
    """Time fastattn alone, or round robin with one rival after checking that both compute the same."""
    inputs = rivals.make_inputs(case)
    ours = rivals.make_fastattn(case, inputs, threads, engine)
    theirs = rivals.MAKERS[rival](case, inputs, threads) if rival else None
    agree = None
    if theirs and theirs.arrays and ours.arrays:
        both = zip(ours.arrays(ours.call()), theirs.arrays(theirs.call()), strict=True)
        agree = all(difference(a, b) <= TOLERANCE[case.dtype] for a, b in both)
    gc.collect()
    gc.disable()
    work = OtherWork()
    own, other = alternate(ours.call, theirs.call if theirs else None, budget)
    others = work.processors()
    gc.enable()
    pair = Pair(spread(own), ours.label, len(own), others)
    return pair if theirs is None else replace(pair, theirs=spread(other), their_label=theirs.label, ratio=ratios(other, own), agree=agree)


def run(job: dict[str, Any]) -> object:
    """A job's answer, ready for JSON."""
    if job["kind"] == "ceilings":
        return ceilings.measure(job["threads"])
    case = Case.from_json(job["case"])
    if job["kind"] == "memory":
        return memory.extra(case, job["rival"], job["threads"])
    return asdict(measure_pair(case, job["rival"], job["threads"], Budget(**job["budget"])))


if __name__ == "__main__":
    answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
