"""A child process: measures the cases of a job (JSON on stdin) and answers line by line in JSON on stdout.

    {"begin": case name}, then {"rows": [...]} for it. These tell the parent which case crashed or hung.
    {"say": text} in between; {"waiting": seconds} while others measure.

A job's kernels are compiled first, in parallel with other children. From then on the child has the device for itself,
by a lock on a file. For each case every implementation runs once (errors against float64), then all are timed round
robin.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from ..case import Case, Measure
from ..events import sets_of
from ..results import Row, Where, make_row
from ..timing import Spread, ratios, rotate, spread
from . import check, ladder, rivals
from .check import Errors, Reference
from .rivals import Inputs, Runner

# for every implementation: rounding gives a tenth of it, a wrong mask or scale far more, and so does TF32 for float32
ERROR_LIMIT = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
HOST_CALLS, WALL_CALLS = 200, 50


@dataclass(frozen=True, slots=True)
class Budget:
    """The number of rounds. In each of them every implementation has `turn` seconds on the device."""

    rounds: int
    turn: float


@dataclass(slots=True)
class Entry:
    """One implementation in one case: a note why it does not run, or its runner, errors and samples in seconds."""

    note: str = ""
    runner: Runner | None = None
    errors: Errors = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    clock_mhz: int | None = None

    @property
    def time(self) -> Spread | None:
        return spread(self.samples) if self.samples else None

    def error(self) -> float | None:
        """The worst error, without lse. NaN if one is NaN."""
        values = [value for name, value in self.errors.items() if name != "lse"]
        return math.nan if any(map(math.isnan, values)) else max(values, default=None)


@dataclass(frozen=True, slots=True)
class Bench:
    """One run. `engine` serves tests without a GPU."""

    device: Any
    where: Where
    budget: Budget
    engine: str | None = None

    def rows(self, case: Case) -> Iterator[Row]:
        """The rows of one case: fastattn, each rival, and the best of the rivals that a bar names together."""
        if case.group == "memory":
            yield self._memory(case)
            return
        x = rivals.make_inputs(case, self.device.name)
        reference = None if case.group == "host" else Reference(case, x)
        entries = {name: self._entry(case, x, name, reference) for name in ("fastattn", *case.against)}
        yardstick, measure_stick = self._yardstick(case, x, entries, reference)
        del reference
        self.device.release()
        (self._time_host if case.group == "host" or case.wall else self._time)(case, x, entries)
        yield self._own(case, entries["fastattn"], yardstick, measure_stick)
        yield from (self._rival(case, name, entries["fastattn"], entry) for name, entry in entries.items() if name != "fastattn")
        yield from (self._best(case, bar.against, entries) for bar in case.bars if "|" in bar.against)

    def _make(self, case: Case, x: Inputs, name: str) -> Runner:
        return make_runner(case, x, name, self.engine)

    def _entry(self, case: Case, x: Inputs, name: str, reference: Reference | None) -> Entry:
        """The first call, into poisoned memory, and its errors. A failure becomes a note."""
        why = rivals.missing(name)
        if why:
            return Entry(note=why)
        try:
            runner = self._make(case, x, name)
            self.device.poison(x.q, x.q[..., 0].float())  # sizes of out and lse
            found = runner.checked() if runner.checked else runner.named(runner.call())
            if name == "plain" or reference is None or (case.dropout_p and name != "fastattn"):  # a rival's dropout drops other elements
                return Entry(runner=runner)
            return Entry(runner=runner, errors=reference.errors(found))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            self.device.synchronize()  # raises again if the device is lost; then this process must end
            return Entry(note=f"{'no' if isinstance(error, NotImplementedError) else 'failed'}: {text}")

    def _yardstick(self, case: Case, x: Inputs, entries: dict[str, Entry], reference: Reference | None) -> tuple[Errors, str]:
        """The errors that ours are compared with, and their origin: torch's flash backend if it can run the case."""
        if reference is None:
            return {}, ""
        for name in ("flash", "varlen_attn"):
            plain = replace(case, deterministic=False)  # flash supports it, but torch sets it globally
            entry = entries.get(name) or (self._entry(plain, x, name, reference) if name == "flash" else Entry())
            if entry.errors:
                return entry.errors, name
        return reference.emulated_errors(), "an emulated 16-bit kernel"

    def _time(self, case: Case, x: Inputs, entries: dict[str, Entry]) -> None:
        """Time all round robin, over several sets of inputs if one would stay in the cache."""
        present = {name: entry for name, entry in entries.items() if entry.runner}
        more = more_inputs(case, self.device)
        turns: list[Callable[[], float]] = []
        for name, entry in present.items():
            assert entry.runner
            calls = [entry.runner.call, *(self._make(case, other, name).call for other in more)]
            turns.append(self.device.turn(calls, self.budget.turn))
        rotate(turns, 1, 0.0)
        for entry, samples in zip(present.values(), rotate(turns, self.budget.rounds, 0.0), strict=True):
            assert entry.runner
            entry.samples = samples
            entry.clock_mhz = self.device.clock_mhz(entry.runner.call)

    def _time_host(self, case: Case, x: Inputs, entries: dict[str, Entry]) -> None:
        """The host's time until a call returns; of a `wall` case from call to call, until the device has done all."""
        present = [entry for entry in entries.values() if entry.runner]
        calls = WALL_CALLS if case.wall else HOST_CALLS
        turns = [lambda call=entry.runner.call: self.device.host_seconds([call], calls, finish=case.wall)
                 for entry in present if entry.runner]
        rotate(turns, 1, 0.0)
        for entry, samples in zip(present, rotate(turns, self.budget.rounds, 0.0), strict=True):
            entry.samples = samples

    def _own(self, case: Case, entry: Entry, yardstick: Errors, whose: str) -> Row:
        time_, measure, value, agree, note = entry.time, "time", None, None, entry.note
        if case.group == "host":
            measure, value = "host", time_ and time_.scaled(1e6)
        elif entry.runner:
            ratio, agree = check.ratio(entry.errors, yardstick), right(entry, case)
            if ratio is not None:
                measure, value = "error", Spread(ratio, ratio, ratio)
                agree = agree and all(bar.met(ratio) for bar in case.bars if bar.measure == "error")
                note = f"error against that of {whose}"
            if agree is False:
                note = "; ".join([", ".join(f"{name} {error:.2g}" for name, error in entry.errors.items()), note])
        return self._row(case, "fastattn", entry, entry, measure, value, agree, note)  # type: ignore[arg-type]

    def _rival(self, case: Case, name: str, ours: Entry, entry: Entry) -> Row:
        measure: Measure = "speedup"
        value = ratios(entry.samples, ours.samples) if entry.samples and ours.samples else None
        if name == "plain" and value:
            measure, per_pair = "cost", case.plain.pairs / case.pairs
            value = Spread(per_pair / value.median, per_pair / value.high, per_pair / value.low)
        return self._row(case, name, ours, entry, measure, value, None if not entry.errors else right(entry, case), entry.note)

    def _best(self, case: Case, names: str, entries: dict[str, Entry]) -> Row:
        """The fastest of several whose results are right. If one was not tried (not installed, left out) there is a value but no
        verdict."""
        members = {name: entries.get(name, Entry(note="left out")) for name in names.split("|")}
        timed = {name: entry for name, entry in members.items() if entry.samples and right(entry, case)}
        if not timed:
            return make_row(self.where, case, names, note="not measured")
        name = min(timed, key=lambda name: spread(timed[name].samples).median)
        row = replace(self._rival(case, name, entries["fastattn"], replace(timed[name], errors={})), implementation=names)
        bar = next(bar for bar in case.bars if bar.against == names)
        absent = [name for name, entry in members.items() if entry.note.startswith(("not installed", "left out"))]
        verdict = "" if absent or row.value is None else "pass" if bar.met(row.value) else "MISS"
        absent += [f"{name}, which is wrong" for name, entry in members.items() if not right(entry, case)]
        note = f"without {', '.join(absent)}" if absent else ""
        return replace(row, needs=str(bar), verdict=verdict, label=f"{name}: {row.label}", note=note)

    def _memory(self, case: Case) -> Row:
        x = rivals.make_inputs(case, self.device.name)
        try:
            runner = self._make(case, x, "fastattn")
            runner.call()
            value = self.device.extra_megabytes(runner.call)
        except Exception as error:
            self.device.synchronize()
            return make_row(self.where, case, "fastattn", note=f"failed: {type(error).__name__}: {error}".splitlines()[0])
        return make_row(self.where, case, "fastattn", measure="memory", value=Spread(value, value, value), label=runner.label)

    def _row(self, case: Case, name: str, ours: Entry, entry: Entry, measure: Measure, value: Spread | None, agree: bool | None,
             note: str) -> Row:
        own, time_ = ours.time, entry.time
        gigabytes = case.kv_bytes / time_.median / 1e9 if time_ and case.few_queries else None
        return make_row(self.where, case, name, time=time_, measure=measure, value=value, agree=agree, note=note, rounds=len(entry.samples),
                        label=entry.runner.label if entry.runner else "", fastattn_ms=own and own.median * 1e3, error=entry.error(),
                        lse_error=entry.errors.get("lse"), gigabytes=gigabytes, clock_mhz=entry.clock_mhz)


def make_runner(case: Case, x: Inputs, name: str, engine: str | None = None) -> Runner:
    if name == "fastattn":
        return rivals.make_fastattn(case, x, engine)
    if name in ladder.FORCED:
        return rivals.make_fastattn(ladder.forced(case, name), x, engine)
    return rivals.make_plain(case, x, engine) if name == "plain" else rivals.MAKERS[name](case, x, name)


def more_inputs(case: Case, device: Any) -> list[Inputs]:
    """More sets of inputs, if one would stay in the cache."""
    sets = sets_of(rivals.input_bytes(case), device.l2_bytes)
    return [rivals.make_inputs(case, device.name, number) for number in range(1, sets)]


def compile_ahead(case: Case, device: Any) -> None:
    """Call every implementation of a case once, so that its kernels are compiled. Failures are reported when it is measured."""
    if case.group == "memory":      # too large to run next to others
        return
    x = rivals.make_inputs(case, device.name)
    for name in ("fastattn", *case.against):
        if not rivals.missing(name):
            with contextlib.suppress(Exception):
                make_runner(case, x, name).call()
    del x
    device.release()


def right(entry: Entry, case: Case) -> bool:
    """Whether every error is as small as rounding errors. NaN is not."""
    limits = {"lse": check.LSE_LIMIT}
    return all(error <= limits.get(name, ERROR_LIMIT[case.dtype]) for name, error in entry.errors.items())


def has_backward(device: str) -> str | None:
    """None, or why attention_backward does not run on this device."""
    tiny = Case("probe", 1, 1, 64, 64, dtype="bfloat16", backward=True, alone=True)
    try:
        rivals.make_fastattn(tiny, rivals.make_inputs(tiny, device)).call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def run(job: dict[str, Any], say: Callable[[dict[str, Any]], None], device: Any) -> None:
    """Measure every case of the job that begins before job["until"] (seconds since 1970). Answers go through `say`."""
    cases = [Case.from_json(case) for case in job["cases"]]
    why = has_backward(device.name) if any(case.alone for case in cases) else None
    if why:
        say({"say": f"the backward cases are left out: {why}"})
        cases = [case for case in cases if not case.alone]
    with open(job["lock"], "w") if job.get("lock") else contextlib.nullcontext() as lock:
        if lock is not None:
            wait(lock, fcntl.LOCK_SH, say)
            for case in cases:
                compile_ahead(case, device)
            wait(lock, fcntl.LOCK_EX, say)
        bench = Bench(device, device.where(), Budget(**job["budget"]))      # where() measures too
        for number, case in enumerate(cases):
            if time.time() > job["until"]:
                say({"say": f"out of time: {len(cases) - number} cases not run, from {case.name}"})
                break
            say({"begin": case.name})
            start = time.perf_counter()
            rows = [asdict(row) for row in bench.rows(case)]
            device.release()
            say({"rows": rows, "seconds": time.perf_counter() - start})
    say({"end": True})


def wait(lock: IO[str], kind: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Acquire a lock on the file, shared or exclusive.

    LOCK_SH waits until no other child measures. LOCK_EX also waits until none compiles, which runs kernels and so
    disturbs. The system releases a lock when its child ends, however it ends.
    """
    start = said = time.perf_counter()
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
        if time.perf_counter() - said > 20:
            said = time.perf_counter()
            say({"waiting": said - start})


def main() -> None:
    # Answers have a descriptor of their own, because compilers may print on stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Let FA4 cache its kernels, so that a restarted child does not compile them again.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from .device import Device

    run(json.load(sys.stdin), lambda answer: print(json.dumps(answer), file=answers), Device())


if __name__ == "__main__":
    main()
