"""`python -m bench decode|paged|fp8` without a device: the cases, what a row says, and that a wrong number is said to be one."""
from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from bench import __main__ as command
from bench import serve


@pytest.mark.parametrize("group", ["decode", "paged", "fp8"])
def test_cases(group: str) -> None:
    cases = serve.cases(group)
    assert len({case.name for case in cases}) == len(cases) > 15
    for case in cases:
        assert 0 < case.cache_bytes <= serve.MOST_BYTES and case.eight == (group == "fp8") and bool(case.page) == (group != "decode")
        assert all(n >= case.rows for n in case.lengths) and case.heads % case.heads_k == 0


def test_amounts() -> None:
    case = serve.Case("one", (1000,), heads=8, heads_k=2, dim=64)
    assert case.cache_bytes == 1000 * 2 * (64 + 64) * 2 and case.flop == 2 * 1000 * 8 * 128
    shared = serve.Case("shared", (1000, 900), heads=8, heads_k=2, dim=64, shared=512)
    assert shared.cache_bytes == (512 + 488 + 388) * 2 * (64 + 64) * 2 and shared.flop == 2 * 1900 * 8 * 128
    latent = serve.Case("latent", (10,), heads=128, heads_k=1, dim=576, dim_v=512, eight=True, rows=2)
    assert latent.cache_bytes == 10 * 576 and latent.flop == 2 * 19 * 128 * (576 + 512)


def rows_of(group: str, only: str | None) -> Iterator[serve.Row]:
    yield serve.Row(serve.cases(group)[0], {"fastattn": 10.0, "cuDNN": 12.0, "flash": 11.0}, 1e-3, ["FA4: not installed: flash_attn"])
    yield serve.Row(serve.cases(group)[1], {}, 0.5, ["fastattn: it failed"])


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(serve, "run", rows_of)
    path = tmp_path / "paged.csv"
    with pytest.raises(SystemExit, match="WRONG"):
        command.main(["paged", "--csv", str(path)])
    printed = capsys.readouterr().out
    assert "| page 64 1 x 1024 | 10.0 |  | 12.0 | 11.0 |  |  | 419 | 2 | 1.10 | 1.0e-03 |" in printed
    assert "WRONG 5.0e-01 |\n    fastattn: it failed" in printed and "FA4: not" not in printed
    first, second = csv.DictReader(path.open())
    assert first["note"] == "FA4: not installed: flash_attn" and float(first["GB/s"]) > 400 and second["GB/s"] == ""
    command.main(["fp8", "--list"])
    assert capsys.readouterr().out.split("\n")[0] == "page 64 1 x 1024"
