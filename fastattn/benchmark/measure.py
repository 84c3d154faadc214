"""The parent: one child process for each implementation beside fastattn -> rows."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .arrays import TOLERANCE
from .exact import exact
from .implementations import RIVALS, make_inputs
from .pair import Measured, Pair
from .shape import Shape
from .timing import Spread, ratios, spread

PATIENCE = 600.0        # seconds for a child: FlashAttention-4 compiles for half a minute, a large problem on a CPU takes minutes
BUSY = 0.1              # processors that others keep busy; above, times mean little
# a child keeps to its device, and JAX does not take the whole memory of one that it shares with fastattn
ENVIRONMENT = {"cpu": {"JAX_PLATFORMS": "cpu"}, "cuda": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. time: seconds of a call. ratio: its time over fastattn's in the same rounds. error: see Exact.error."""

    name: str
    label: str
    time: Spread | None = None
    ratio: Spread | None = None
    error: float | None = None
    note: str = ""

    def wrong(self, shape: Shape) -> bool:
        return self.error is not None and not self.error <= TOLERANCE[shape.dtype]


@dataclass(frozen=True, slots=True)
class Table:
    """All rows, fastattn first. precision: of the result that errors are taken of. others: processors that were busy with other work."""

    shape: Shape
    device: str
    rows: list[Row]
    absent: list[str]
    precision: str
    others: float


def installed(device: str) -> tuple[list[str], list[str]]:
    """Rivals that run on the device: those that are installed, and those that are not."""
    here = {name: rival for name, rival in RIVALS.items() if device in rival.devices}
    return [name for name, rival in here.items() if not rival.missing()], [name for name, rival in here.items() if rival.missing()]


def measure(shape: Shape, device: str, seconds: float, say: Callable[[str], None]) -> Table:
    """Measure the shape. `say` hears what is about to be measured."""
    present, absent = installed(device)
    say("exact result")
    right = exact(shape, make_inputs(shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "exact.npz")
        right.save(path)
        pairs = dict(_pairs(shape, device, present, path, seconds, say))
    ours = [pair.ours for pair in pairs.values() if isinstance(pair, Pair)]
    rows = [_own(ours, pairs), *(_row(name, pair) for name, pair in pairs.items() if name)]
    others = max((pair.others or 0.0 for pair in pairs.values() if isinstance(pair, Pair)), default=0.0)
    return Table(shape, device, rows, absent, right.precision, others)


def _pairs(shape: Shape, device: str, rivals: list[str], path: Path, seconds: float,
           say: Callable[[str], None]) -> Iterator[tuple[str, Pair | str]]:
    """Each rival's pair, or why there is none. fastattn alone, named "", where no pair has its time."""
    timed = False
    for name in rivals:
        say(name)
        pair = _child(shape, device, name, path, seconds)
        timed = timed or (isinstance(pair, Pair) and bool(pair.ours.samples))
        yield name, pair
    if not timed:
        say("fastattn")
        yield "", _child(shape, device, None, path, seconds)


def _child(shape: Shape, device: str, rival: str | None, path: Path, seconds: float) -> Pair | str:
    job = {"shape": asdict(shape), "device": device, "rival": rival, "exact": str(path), "seconds": seconds}
    command = [sys.executable, "-m", f"{__package__}.pair"]
    try:
        done = subprocess.run(command, input=json.dumps(job), env=os.environ | ENVIRONMENT[device], capture_output=True, text=True,
                              timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"failed: no answer for {PATIENCE:.0f} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1][:200]}"
    return Pair.from_json(json.loads(done.stdout.splitlines()[-1]))


def _own(measured: list[Measured], pairs: dict[str, Pair | str]) -> Row:
    """fastattn's row: its samples of all pairs together."""
    samples = [sample for one in measured for sample in one.samples]
    if not samples:
        note = next((one.note for one in measured if one.note), next((why for why in pairs.values() if isinstance(why, str)), ""))
        return Row("fastattn", "", note=note)
    timed = next(one for one in measured if one.samples)
    return Row("fastattn", timed.label, spread(samples), None, timed.error)


def _row(name: str, pair: Pair | str) -> Row:
    if isinstance(pair, str):
        return Row(name, "", note=pair)
    theirs = pair.theirs
    assert theirs is not None
    if not theirs.samples:
        return Row(name, theirs.label, error=theirs.error, note=theirs.note)
    return Row(name, theirs.label, spread(list(theirs.samples)), ratios(list(theirs.samples), list(pair.ours.samples)), theirs.error)
