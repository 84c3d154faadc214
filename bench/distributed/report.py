"""The table of rows, and the picture of a trace."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import ERROR_ROWS, Case, select
from .model import efficiency

HEAD = ("| case | ranks | forward ms | backward ms | host ms | tokens a second | of linear: forward, backward, both, in a row "
        "| model | GiB | rms error out, dq, dk, dv |\n|---|---|---|---|---|---|---|---|---|---|")
TIMES = ("forward", "backward", "step")


def lines(rows: list[dict[str, Any]], device: str) -> str:
    """Markdown. `of linear`: the time of one rank over the number of ranks times this one's; `model`: what model.py expects of both.
    Tokens are those of steps in a row.
    """
    known = {case.name: case for case in select("full", device, None) + select("quick", device, None)}
    measured = [row for row in rows if "one_step" in row and row["name"] in known]
    one = {_problem(known[row["name"]]): [row[f"one_{name}"] for name in TIMES] for row in measured}
    return "\n".join([HEAD, *[_line(row, known.get(row["name"]), _of_one(known.get(row["name"]), one, row)) for row in rows]])


def _problem(case: Case) -> Case:
    return replace(case, method="one", pieces=None, saved=False)


def _of_one(case: Case | None, one: dict[Case, list[float]], row: dict[str, Any]) -> list[float] | None:
    """Seconds of one rank; of a long sequence, which one rank is not asked for, those of a shorter one, grown with the square."""
    if "one_step" in row:
        return [row[f"one_{name}"] for name in TIMES]
    if case is None:
        return None
    shorter = one.get(replace(_problem(case), seqlen=min(case.seqlen, ERROR_ROWS)))
    grown = (case.seqlen / ERROR_ROWS) ** (1 if case.window else 2) if case.seqlen > ERROR_ROWS else 1.0
    return None if shorter is None else [x * grown for x in shorter]


def _line(row: dict[str, Any], case: Case | None, one: list[float] | None) -> str:
    if "note" in row:
        return f"| {row['name']} | {row['ranks']} | {row['note']} | | | | | | | |"
    forward, backward, step = [row[name] for name in TIMES]
    tokens = f"{case.seqlen / step:.3g}" if case else ""
    linear, model = "", None
    if one is not None:
        model = case and efficiency(case, row["ranks"], (one[0], one[1]))
        times = [(one[0], forward), (one[1], backward), (one[0] + one[1], forward + backward), (one[2], step)]
        linear = ", ".join(f"{100 * of_one / (row['ranks'] * mine):.0f} %" for of_one, mine in times)
    errors = ", ".join(f"{x:.1e}" for x in row.get("errors", {}).values())
    expected = "" if model is None else f"{100 * model:.0f} %"
    host = f"{1e3 * row['forward_host']:.2f}, {1e3 * row['backward_host']:.2f}"
    return (f"| {row['name']} | {row['ranks']} | {1e3 * forward:.2f} | {1e3 * backward:.2f} | {host} | {tokens} | {linear} "
            f"| {expected} | {row['gib']:.2f} | {errors} |")


def write(rows: list[dict[str, Any]], versions: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "rows": rows}) + "\n")


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    found = json.loads(path.read_text())
    return found["rows"], found["versions"]


def picture(rows: list[dict[str, Any]], path: Path) -> bool:
    """Calls and transfers of rank 0 over time, of the cases that have a trace. False without matplotlib or a trace."""
    traced = [row for row in rows if row.get("trace")]
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return False
    if not traced:
        return False
    figure, axes = plt.subplots(len(traced), 1, figsize=(9, 1.3 * len(traced) + 0.6), squeeze=False, layout="constrained")
    colours = {"forward": "#2a6fb0", "backward": "#7a4fa3", "transfer": "#d08a1d"}
    for axis, row in zip(axes[:, 0], traced, strict=True):
        for name, begin, end in row["trace"]:
            axis.barh(0 if name == "transfer" else 1, end - begin, left=begin, height=0.8, color=colours[name], edgecolor="white", lw=0.3)
        axis.set(yticks=(0, 1), yticklabels=("transfers", "attention"), title=f"{row['name']}, {row['ranks']} ranks", xlim=(0, None))
        axis.title.set_fontsize(9)
    axes[-1, 0].set_xlabel("ms on the device of rank 0: a forward, then a backward")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
