"""The PNG: TFLOP/s over the sequence length, one panel for each pass, dtype, head_dim and mask of the grid."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..results import Row

COLOURS = {"fastattn": "#1f77b4", "cuDNN": "#2ca02c", "FA4": "#ff7f0e", "flash": "#b0b0b0"}


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Write the plot. False if nothing of the grid was measured, or without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.group == "grid" and row.implementation in COLOURS and row.gflops and row.verdict != "WRONG":
            seqlen, head_dim = row.shape.strip("()").split(",")[2:4]
            lines = panels.setdefault((row.passes, row.dtype, head_dim, row.features), {})
            lines.setdefault(row.implementation, {})[int(seqlen)] = row.gflops / 1e3
    if not panels:
        return False
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(4 * columns, 3 * height), squeeze=False, layout="constrained")
    for axis, (key, lines) in zip(axes.flat, panels.items(), strict=False):
        passes, dtype, head_dim, features = key
        for name in (name for name in COLOURS if name in lines):
            points = sorted(lines[name].items())
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[name], label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{passes}, {dtype}, head_dim {head_dim}, {features}", fontsize=8)
        axis.set_ylabel("TFLOP/s", fontsize=7)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"Attention on one {rows[0].machine}, 16384 tokens, over seqlen, {rows[0].date}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
