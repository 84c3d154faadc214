"""The CPU's PNG: speed against torch as bars, one panel for each group, pass and dtype. What all pictures share."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .results import Row
from .table import by_case


class Look(NamedTuple):
    """How a library is drawn. Colours of Okabe and Ito, which colour-blind readers tell apart; the marker says it in grey, too."""

    label: str
    colour: str
    marker: str
    line: str = "-"


LOOKS = {
    "fastattn": Look("fastattn", "#0072B2", "o"),
    "cuDNN": Look("cuDNN (through torch)", "#E69F00", "s", "--"),
    "FA4": Look("FlashAttention-4", "#009E73", "^", "-."),
    "flash": Look("FlashAttention-2 (through torch)", "#999999", "D", ":"),
    "onnxruntime": Look("onnxruntime", "#CCCCCC", "s"),
}


def pyplot() -> ModuleType | None:
    """matplotlib.pyplot that draws into files, or None without matplotlib. Text in an SVG is drawn as outlines, so that
    it looks the same everywhere, and the same rows give the same bytes."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastattn", "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure with one legend below all panels, and close it."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    figure.clear()


def plot(rows: Iterable[Row], path: Path) -> bool:
    """Write the CPU's picture. False without a comparison with torch, or without matplotlib."""
    draw = pyplot()
    panels: dict[str, list[Mapping[str, Row]]] = {}
    for found in by_case(rows).values():
        torch = found.get("torch")
        if torch and torch.measure == "speedup" and torch.value and torch.verdict != "WRONG":
            panels.setdefault(f"{torch.group}, {torch.passes}, {torch.dtype}", []).append(found)
    if draw is None or not panels:
        return False
    columns = 2 if len(panels) > 1 else 1
    lines = [list(panels.items())[n:n + columns] for n in range(0, len(panels), columns)]
    heights = [1 + max(len(cases) for _, cases in line) for line in lines]
    figure, axes = draw.subplots(len(lines), columns, figsize=(6.5 * columns, 1 + 0.34 * sum(heights)), squeeze=False, layout="constrained",
                                 height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    most = max(found["torch"].value_p80 or 0.0 for cases in panels.values() for found in cases)
    for line_axes, line in zip(axes, lines, strict=True):
        for axis, (title, cases) in zip(line_axes, line, strict=False):
            axis.set_axis_on()
            _panel(axis, title, cases)
            axis.set_xlim(0, 1.03 * most)                   # one scale, so that bars of different panels can be compared
    first = next(iter(panels.values()))[0]["torch"]
    figure.suptitle(f"Speed beside torch on a CPU. {first.machine}, {first.threads} threads, {first.date}", fontsize=11)
    save(figure, path)
    draw.close(figure)
    return True


def _panel(axis: Any, title: str, cases: list[Mapping[str, Row]]) -> None:
    """A bar of fastattn with its spread for each case, one of onnxruntime, and a line at torch."""
    paired = any("onnxruntime" in found for found in cases)
    width, shift = (0.4, 0.2) if paired else (0.6, 0.0)
    for n, found in enumerate(cases):
        torch, onnx = found["torch"], found.get("onnxruntime")
        assert torch.value is not None and torch.value_p20 is not None and torch.value_p80 is not None
        spread = [[torch.value - torch.value_p20], [torch.value_p80 - torch.value]]
        own, other = LOOKS["fastattn"], LOOKS["onnxruntime"]
        axis.barh(n - shift, torch.value, width, xerr=spread, capsize=2, color=own.colour, label=own.label if n == 0 else None)
        if onnx and onnx.value:  # their ratio to torch follows from ours to both
            axis.barh(n + shift, torch.value / onnx.value, width, color=other.colour, hatch="///", edgecolor="#777777",
                      label=other.label if n == 0 else None)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(cases)), [f"{found['torch'].shape} {found['torch'].features}" for found in cases], fontsize=8)
    axis.set_ylim(len(cases) - 0.4, -0.6)                   # the first case on top
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("speed, torch = 1; higher is better", fontsize=8)
