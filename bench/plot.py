"""The PNG: speed against torch as grouped bars, one panel for each pass and dtype."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .results import Row
from .table import by_case

COLOURS = {"fastattn": "#1f77b4", "onnxruntime": "#b0b0b0"}


def plot(rows: Iterable[Row], path: Path) -> bool:
    """Write the plot. False without a comparison with torch, or without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Mapping[str, Row]]] = {}
    for found in by_case(rows).values():
        torch = found.get("torch")
        if torch and torch.measure == "speedup" and torch.value and torch.verdict != "WRONG":
            panels.setdefault(f"{torch.group}, {torch.passes}, {torch.dtype}", []).append(found)
    if not panels:
        return False
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7 * columns, 3 * lines), squeeze=False, layout="constrained")
    for axis, (title, cases) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, cases)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    first = next(iter(panels.values()))[0]["torch"]
    figure.suptitle(f"Speed against torch (1 = torch), {first.machine}, {first.threads} threads, {first.date}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _panel(axis: Any, title: str, cases: list[Mapping[str, Row]]) -> None:
    """Bars of fastattn with their spread, bars of onnxruntime, a line at torch, and a mark at each requirement."""
    paired = any("onnxruntime" in found for found in cases)
    width, shift = (0.4, 0.2) if paired else (0.6, 0.0)
    for n, found in enumerate(cases):
        torch, onnx = found["torch"], found.get("onnxruntime")
        assert torch.value is not None and torch.value_p20 is not None and torch.value_p80 is not None
        spread = [[torch.value - torch.value_p20], [torch.value_p80 - torch.value]]
        axis.bar(n - shift, torch.value, width, yerr=spread, capsize=2, color=COLOURS["fastattn"], label="fastattn" if n == 0 else None)
        if onnx and onnx.value:  # their ratio to torch follows from ours to both
            axis.bar(n + shift, torch.value / onnx.value, width, color=COLOURS["onnxruntime"], label="onnxruntime" if n == 0 else None)
        if torch.needs:
            needed = float(torch.needs.split()[-1].rstrip("x"))
            label = "needed" if n == 0 else None
            axis.hlines(needed, n - shift - width / 2, n - shift + width / 2, color="#d62728", linewidth=2, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [f"{found['torch'].shape}\n{found['torch'].features}" for found in cases]
    axis.set_xticks(range(len(cases)), labels, fontsize=7, rotation=30 if len(cases) > 4 else 0)
    axis.set_xlim(-0.7, max(len(cases), 2) - 0.3)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("times torch", fontsize=8)
