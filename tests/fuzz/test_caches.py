"""Random calls with key and value caches, with the seed of the day, on the instruction set in use."""
from __future__ import annotations

import os

import pytest

from tests.fuzz import caches
from tests.fuzz.__main__ import today
from tests.tools.processes import run

COUNT = int(120 * float(os.environ.get("FASTATTN_FUZZ", "1")))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_calls_of_the_day() -> None:
    """In a process of their own, which ends where a call reads past an array."""
    seed, level = today(), os.environ.get("FASTATTN_ISA")
    print(f"FASTATTN_FUZZ_SEED={seed}")
    code = f"import sys; from tests.fuzz import caches; sys.argv[1:] = ['--calls', '{COUNT}', '--seed', '{seed}']; sys.exit(caches.main())"
    done = run(code, **({"FASTATTN_ISA": level} if level else {}))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([line for line in lines[:-1] if not line.startswith("at ")] + lines[-1:]) + done.stderr[-3000:]


def test_draws_cover_the_features() -> None:
    drawn = [caches.draw(1, n)[0] for n in range(200)]
    for name in ("packed", "append", "batch_idx", "shared", "rotary", "strided", "alibi", "sinks", "page_size", "options"):
        count = sum(bool(getattr(case, name)) for case in drawn)
        assert 3 < count < 200, name


def test_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rotation by the next position."""
    from fastattn import caches as host

    rotated = host.rotated
    numbers = [n for n in range(60) if caches.draw(1, n)[0].rotary and sum(caches.draw(1, n)[0].lengths)][:3]
    monkeypatch.setattr(host, "rotated", lambda x, positions, *rest: rotated(x, positions + 1, *rest))
    assert numbers and all("bits" in (caches.run(1, n) or "") for n in numbers)
