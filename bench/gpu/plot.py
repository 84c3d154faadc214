"""The GPU's pictures: TFLOP/s over the sequence length. All panels of the grid, and the four that the README shows."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..plot import LOOKS, pyplot, save
from ..results import Row

Lines = Mapping[str, Mapping[int, float]]       # library -> sequence length -> TFLOP/s
ORDER = ("fastattn", "cuDNN", "FA4", "flash")


class Panel(NamedTuple):
    """What the cells of a panel have in common. Panels sort by their fields: backward beside forward, head_dim downwards."""

    dtype: str
    head_dim: int
    passes: str
    features: str

    @property
    def place(self) -> tuple[bool, int, bool, bool]:
        return self.dtype != "bfloat16", self.head_dim, self.passes != "forward", self.features != "full"


def panels(rows: Iterable[Row]) -> dict[Panel, Lines]:
    """The grid by panel, in the order in which panels are drawn. Wrong results are left out."""
    found: dict[Panel, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.group == "grid" and row.implementation in ORDER and row.gflops and row.verdict != "WRONG":
            seqlen, head_dim = map(int, row.shape.strip("()").split(",")[2:4])
            lines = found.setdefault(Panel(row.dtype, head_dim, row.passes, row.features), {})
            lines.setdefault(row.implementation, {})[seqlen] = row.gflops / 1e3
    return {panel: found[panel] for panel in sorted(found, key=lambda panel: panel.place)}


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Write all panels: one line of them for each dtype and head_dim. False if nothing of the grid was measured, or without matplotlib."""
    found = panels(rows)
    columns = sorted({(panel.passes != "forward", panel.features != "full", panel.passes, panel.features) for panel in found})
    lines = list(dict.fromkeys((panel.dtype, panel.head_dim) for panel in found))
    places = {panel: (lines.index(panel[:2]), [key[2:] for key in columns].index(panel[2:])) for panel in found}
    titles = {panel: f"{panel.passes}, {panel.features}\n{panel.dtype}, head_dim {panel.head_dim}" for panel in found}
    return bool(found) and _draw(rows[0], found, places, titles, path)


def headline(rows: Sequence[Row], path: Path) -> bool:
    """Write the README's four panels: head_dim 64 and 128, forward and backward, bfloat16 under a causal mask. False if one of them
    is missing, or without matplotlib."""
    wanted = [Panel("bfloat16", head_dim, passes, "causal") for head_dim in (64, 128) for passes in ("forward", "backward")]
    found = panels(rows)
    if not all(panel in found for panel in wanted):
        return False
    shown = {panel: {name: line for name, line in found[panel].items() if name != "flash"} for panel in wanted}
    places = {panel: divmod(n, 2) for n, panel in enumerate(wanted)}
    titles = {panel: f"{panel.passes}, head_dim {panel.head_dim}" for panel in wanted}
    return _draw(rows[0], shown, places, titles, path, "bfloat16, causal. ")


def _draw(first: Row, found: Mapping[Panel, Lines], places: Mapping[Panel, tuple[int, int]], titles: Mapping[Panel, str], path: Path,
          what: str = "") -> bool:
    """Panels at their places, all with one scale, so that heights can be compared."""
    draw = pyplot()
    if draw is None:
        return False
    height, width = (1 + max(place[axis] for place in places.values()) for axis in (0, 1))
    figure, axes = draw.subplots(height, width, figsize=(1 + 3.1 * width, 0.7 + 2.3 * height), squeeze=False, layout="constrained")
    top = max(rate for lines in found.values() for line in lines.values() for rate in line.values())
    for axis in axes.flat:
        axis.set_axis_off()
    for panel, place in places.items():
        _panel(axes[place], titles[panel], found[panel], 1.05 * top)
    for line in axes:
        line[0].set_ylabel("TFLOP/s, higher is better", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length", fontsize=9)
    figure.suptitle(f"{what}Attention on one {first.machine.split(' (')[0]}, 16384 tokens in each call, {first.date}", fontsize=11)
    save(figure, path)
    draw.close(figure)
    return True


def _panel(axis: Any, title: str, lines: Lines, top: float) -> None:
    axis.set_axis_on()
    for name in (name for name in ORDER if name in lines):
        look = LOOKS[name]
        axis.plot(*zip(*sorted(lines[name].items()), strict=True), marker=look.marker, markersize=4.5, color=look.colour,
                  linestyle=look.line, label=look.label)
    lengths = sorted({seqlen for line in lines.values() for seqlen in line})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(0, top)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10)
