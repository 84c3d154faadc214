"""The CPU benchmark: its cases, and the run that turns them into rows."""
from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import machine, rivals
from .case import Bar, Case, Measure, Mode
from .results import BUSY, Row, Where, make_row
from .table import milliseconds
from .timing import Budget, Spread
from .worker import Pair

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900  # seconds for one child
TRIES = 3  # measurements of a pair if other processes are at work
MODES: dict[Mode, tuple[Mode, ...]] = {"quick": ("quick",), "full": ("quick", "full"), "long": ("quick", "full", "long")}
BUDGETS: dict[Mode, Budget] = {"quick": Budget(rounds=5, seconds=0.6), "full": Budget(), "long": Budget()}
PACKAGES = ("numpy", "torch", "onnxruntime")
# Each sets the size of one thread pool: OpenMP of fastattn and torch, NumPy's BLAS, torch's BLAS.
THREADS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"

# (batch, num_heads, seqlen, head_dim)
SMALL, BASE, BATCHED, WIDE = (1, 8, 512, 64), (1, 8, 2048, 64), (4, 16, 1024, 64), (1, 8, 4096, 128)
LONG, SHORT = (1, 8, 16384, 64), ((1, 4, 16, 32), (1, 12, 32, 32), (8, 12, 32, 32), (1, 8, 64, 64), (1, 8, 128, 64), (2, 8, 256, 64))

# Required speedup against torch: (passes, dtype) -> (full, causal) by shape.
FORWARD, BACKWARD = False, True
SPEEDUP: dict[tuple[bool, str], dict[tuple[int, ...], tuple[float, float]]] = {
    (FORWARD, "float32"): {BASE: (1.1, 1.4), BATCHED: (1.1, 1.4), WIDE: (1.1, 1.2)},
    (BACKWARD, "float32"): {BASE: (1.25, 1.5), BATCHED: (1.25, 1.5), WIDE: (1.2, 1.3)},
    (FORWARD, "bfloat16"): dict.fromkeys((SMALL, BASE, BATCHED, WIDE), (2.0, 2.0)),
    (BACKWARD, "bfloat16"): dict.fromkeys((SMALL, BASE, BATCHED, WIDE), (1.8, 1.8)),
    (FORWARD, "float16"): dict.fromkeys((SMALL, BASE, BATCHED, WIDE), (2.0, 2.0)),
}
DECODE_SPEEDUP = {"float32": 4.0, "bfloat16": 10.0}
PAGED_COST = 1.1
FMA_FRACTION, FEATURES_COST, DROPOUT_COST, POSITION_COST, EXTRA_MEGABYTES = 0.7, 1.6, 1.5, 1.05, 64.0


def cases() -> list[Case]:
    """Every case, in the order in which they run."""
    return [*_dense(), *_decode(), *_paged(), *_features(), *_memory(), *_short(), *_long()]


def _dense() -> Iterator[Case]:
    for dtype, backward, shape, causal in itertools.product(("float32", "bfloat16", "float16"), (FORWARD, BACKWARD),
                                                            (SMALL, BASE, BATCHED, WIDE), (False, True)):
        against, bars = ["torch"], []
        needs = SPEEDUP.get((backward, dtype), {}).get(shape)
        if needs:
            bars.append(Bar("torch", "speedup", needs[causal]))
        if dtype == "float32" and not backward:
            against += ["onnxruntime", "fma peak"]
            if shape == BASE and not causal:
                bars.append(Bar("fma peak", "ceiling", FMA_FRACTION))
        yield Case("dense", *shape, dtype=dtype, causal=causal, backward=backward, against=tuple(against), bars=tuple(bars),
                   mode="quick" if shape == BASE and dtype != "float16" else "full")


def _decode() -> Iterator[Case]:
    """One query row over 8192 keys. "torch folded" is a careful user's own code for GQA in torch; it has no bar."""
    for dtype, heads_k in itertools.product(("float32", "bfloat16"), (32, 8)):
        against = ["torch"] + ["torch folded"] * (heads_k != 32) + ["onnxruntime"] * (dtype == "float32") + ["memory read"]
        yield Case("decode", 1, 32, 1, 128, dtype=dtype, num_heads_k=heads_k, seqlen_k=8192, against=tuple(against),
                   bars=(Bar("torch", "speedup", DECODE_SPEEDUP[dtype]),), mode="quick")


def _paged() -> Iterator[Case]:
    """A decoding step over caches in pages, against the same step over contiguous ones."""
    for (batch, keys), (dtype, cache_dtype) in itertools.product(((1, 8192), (8, 1024)), (("float32", ""), ("bfloat16", ""),
                                                                                          ("bfloat16", "float8_e4m3fn"))):
        yield Case("paged", batch, 32, 1, 128, dtype=dtype, num_heads_k=8, seqlen_k=keys, page_size=16, cache_dtype=cache_dtype,
                   against=("contiguous",), bars=(Bar("contiguous", "cost", PAGED_COST),), mode="quick" if batch == 1 else "full")


def _features() -> Iterator[Case]:
    """fastattn against itself without the feature. Times are per scored pair, because a window leaves fewer pairs."""
    for backward in (FORWARD, BACKWARD):
        yield Case("features", *BASE, causal=True, window=511, softcap=30.0, alibi=True, backward=backward, against=("plain",),
                   bars=(Bar("plain", "cost", FEATURES_COST),), mode="quick")
        yield Case("features", *BASE, causal=True, position=True, backward=backward, against=("plain",),
                   bars=(Bar("plain", "cost", POSITION_COST),), mode="quick")
        yield Case("features", *BASE, dropout_p=0.1, backward=backward, against=("plain",),
                   bars=(Bar("plain", "cost", DROPOUT_COST),), mode="quick")


def _memory() -> Iterator[Case]:
    for backward in (FORWARD, BACKWARD):
        yield Case("memory", *LONG, backward=backward, against=("torch",), bars=(Bar("fastattn", "memory", EXTRA_MEGABYTES),))


def _short() -> Iterator[Case]:
    for shape in SHORT:
        yield Case("short", *shape, against=("torch", "onnxruntime"))


def _long() -> Iterator[Case]:
    for dtype, causal in itertools.product(("float32", "bfloat16"), (False, True)):
        yield Case("long", *LONG, dtype=dtype, causal=causal, against=("torch",), mode="long")


@dataclass(frozen=True, slots=True)
class Runs:
    """The settings of one run, which every child gets."""

    where: Where
    budget: Budget
    threads: int

    def rows(self, case: Case) -> Iterator[Row]:
        """The rows of one case: fastattn first, then each rival. One that is absent or fails has a note and stops nothing."""
        if case.group == "memory":
            yield from (self._memory(case, implementation) for implementation in ("fastattn", *case.against))
            return
        absent = {rival: rivals.missing(rival) for rival in case.against}
        pairs: list[tuple[str, Pair | str]] = []
        present: list[str | None] = [rival for rival in case.against if not absent[rival]]
        for rival in present or [None]:
            pairs.append((rival or "", self._pair(case, rival)))
        own = next((pair for _, pair in pairs if isinstance(pair, Pair)), None)
        if own:
            yield make_row(self.where, case, "fastattn", time=own.ours, label=own.label, rounds=own.rounds, others=own.others,
                           fastattn_ms=own.ours.median * 1e3)
        yield from (make_row(self.where, case, rival, note=why) for rival, why in absent.items() if why)
        yield from (self._compared(case, rival, pair) for rival, pair in pairs if rival or isinstance(pair, str))

    def _pair(self, case: Case, rival: str | None) -> Pair | str:
        """The quietest of up to TRIES measurements. On a machine without other work the first one counts."""
        quietest: Pair | None = None
        for _ in range(TRIES):
            answer = self._child({"kind": "pair", "case": asdict(case), "rival": rival, "budget": asdict(self.budget)})
            if isinstance(answer, str):
                return answer
            pair = Pair.from_json(answer)
            if quietest is None or (pair.others or 0.0) < (quietest.others or 0.0):
                quietest = pair
            if (quietest.others or 0.0) <= BUSY:
                break
        assert quietest
        return quietest

    def _compared(self, case: Case, rival: str, pair: Pair | str) -> Row:
        if isinstance(pair, str):
            return make_row(self.where, case, rival or "fastattn", note=pair)
        assert pair.ratio and pair.theirs
        measure: Measure = "speedup"
        value = pair.ratio
        if rival == "plain":
            measure = "cost"
            per_pair = case.plain.pairs / case.pairs
            value = Spread(per_pair / value.median, per_pair / value.high, per_pair / value.low)
        elif rival == "contiguous":
            measure, value = "cost", Spread(1 / value.median, 1 / value.high, 1 / value.low)
        elif rival in ("fma peak", "memory read"):
            measure = "ceiling"
        return make_row(self.where, case, rival, time=pair.theirs, measure=measure, value=value, agree=pair.agree,
                        label=pair.their_label, rounds=pair.rounds, others=pair.others, fastattn_ms=pair.ours.median * 1e3)

    def _memory(self, case: Case, implementation: str) -> Row:
        answer: Any = rivals.missing(implementation) or self._child({"kind": "memory", "case": asdict(case), "rival": implementation})
        if isinstance(answer, str):
            return make_row(self.where, case, implementation, note=answer)
        time, value = (Spread(x, x, x) for x in (answer["seconds"], answer["megabytes"]))
        return make_row(self.where, case, implementation, time=time, measure="memory", value=value, label=answer["label"], rounds=1)

    def _child(self, job: dict[str, Any]) -> Any:
        """A worker's answer, or the last line of its error output."""
        return child({**job, "threads": self.threads}, self.threads)


def child(job: dict[str, Any], threads: int) -> Any:
    """Run worker.py on a job. Its answer, or "failed: ..." as a string."""
    counts = dict.fromkeys(THREADS, str(threads))
    try:
        done = subprocess.run([sys.executable, "-m", f"{__package__}.worker"], input=json.dumps(job), env=os.environ | counts,
                              cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"failed: over {TIMEOUT} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def where(threads: int) -> Where:
    """This machine, with its ceilings measured now."""
    try:
        from fastattn import cpu

        instruction_set = cpu.instruction_set()
    except ImportError as error:
        raise SystemExit(f"fastattn's CPU engine cannot be loaded ({error}); `pip install -e .` builds it") from None
    found = child({"kind": "ceilings", "threads": threads}, threads)
    text = found if isinstance(found, str) else ", ".join(f"{name} {value:.0f} {unit}" for name, (value, unit) in found.items())
    versions = ", ".join(f"{package} {machine.version(package) or 'not installed'}" for package in PACKAGES)
    return Where(machine.today(), machine.cpu_model(), instruction_set, threads, platform.python_version(), versions, text)


def select(mode: Mode, only: str | None) -> list[Case]:
    """Cases of a mode whose name contains the regular expression `only`."""
    return [case for case in cases() if case.mode in MODES[mode] and (only is None or re.search(only, case.name))]


def run(mode: Mode = "full", only: str | None = None, threads: int | None = None) -> list[Row]:
    """Measure and return the rows, and print a line for each case.

    Parameters
    ----------
    mode : "quick", "full" or "long"
        Which cases, and how many rounds.
    only : str, optional
        A regular expression that a case's name must contain.
    threads : int, optional
        Threads of every library. Default: the processors this process may use.
    """
    threads = threads or machine.available_threads()
    chosen = select(mode, only)
    if not chosen:
        raise SystemExit(f"no case of mode {mode!r} has a name that matches {only!r}")
    runs, rows = Runs(where(threads), replace(BUDGETS[mode]), threads), []
    for number, case in enumerate(chosen, 1):
        new = list(runs.rows(case))
        rows += new
        print(f"[{number:2}/{len(chosen)}] {case.name}: {', '.join(_brief(row) for row in new)}", flush=True)
    return rows


def _brief(row: Row) -> str:
    time = f" {milliseconds(row)} ms" if row.median_ms else ""
    return f"{row.implementation}{time}{f' ({row.text})' if row.text else ''}{f' {row.note}' if row.note else ''}"
