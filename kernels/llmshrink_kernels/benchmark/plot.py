"""The roofline of a result file: TFLOP/s over the number of rows, under what the device's two ceilings allow.

matplotlib is imported here alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmshrink_kernels.benchmark.problem import Ceilings, Shape, floor

COLUMNS = 2


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the rows of a result file, one panel a shape, into a PNG or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = content["rows"]
    shapes = list(dict.fromkeys((row["shape"], row["inputs"], row["outputs"]) for row in rows))
    lines = -(-len(shapes) // COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 4.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    names = list(dict.fromkeys(row["contender"] for row in rows if row["microseconds"]))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for panel, shape in zip(panels, shapes, strict=False):
        _panel(panel, Shape(*shape), [row for row in rows if row["shape"] == shape[0]], content, colours)
    for panel in panels[len(shapes) :]:
        panel.set_axis_off()
    figure.suptitle(
        f"{content['device']}, {content['dtype']}, groups of {content['group_size']}; {content['date'][:10]}"
    )
    figure.savefig(path, dpi=110)


def _panel(
    panel: Any, shape: Shape, rows: list[dict[str, Any]], content: dict[str, Any], colours: dict[str, str]
) -> None:
    limits = Ceilings(**content["ceilings"])
    counts = sorted({row["rows"] for row in rows})
    work = {count: 2 * count * shape.inputs * shape.outputs / 1e12 for count in counts}
    for bits, group, style, label in ((4, content["group_size"], "--", "roof, 4 bits"), (16, 0, ":", "roof, 16 bits")):
        roof = [work[count] / floor(shape, count, bits, group, limits) for count in counts]
        panel.plot(counts, roof, style, color="0.4", label=label)
    for name, colour in colours.items():
        timed = [row for row in rows if row["contender"] == name and row["microseconds"]]
        points = [row["rows"] for row in timed]
        speeds = [work[row["rows"]] / (row["microseconds"] * 1e-6) for row in timed]
        panel.plot(points, speeds, marker="o", markersize=3, color=colour, label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.set_title(f"{shape.name}: K {shape.inputs}, N {shape.outputs}")
    panel.set_xlabel("rows of x (M)")
    panel.set_ylabel("TFLOP/s")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
