"""The report's plots: what to draw of the results. How a figure becomes part of the page is `figure`'s.

Each is drawn twice, for a wide page and for a telephone: text that is scaled down with its figure can't be read.
A plot of which nothing was measured doesn't exist.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmshrink_eval.report import figure, inference, numbers
from llmshrink_eval.report.canvas import WIDE, Drawn, Plot, both, drawn
from llmshrink_eval.report.figure import GRID, INK, MUTED, PAPER
from llmshrink_eval.report.inference import Interval
from llmshrink_eval.report.quality import quality
from llmshrink_eval.report.sites import Panel, panels
from llmshrink_eval.report.table import task_names
from llmshrink_eval.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AT_MOST_PANELS = 12
_TRACE = 0.1
"""Percent of positions: bins with fewer are left out at the harmless end."""


def all_plots(results: Results) -> dict[str, Plot]:
    """Name -> plot, for those of which there is something to draw."""
    makers = {"quality": quality, "recovery": _recovery, "histogram": _histogram, "sites": _sites}
    made = {name: make(results) for name, make in makers.items()}
    return {name: plot for name, plot in made.items() if plot is not None}


# Recovery per task


def _recovery(results: Results) -> Plot | None:
    shown = drawn(results)
    rows: list[tuple[str, list[tuple[Drawn, Interval]]]] = []
    for name in task_names(results):
        values = [(one, _of_task(one, name)) for one in shown]
        rows.append((_row_label(results, name), [(one, value) for one, value in values if value is not None]))
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    means = [(one, inference.recovery_interval(one.model)) for one in shown]
    if len(rows) > 1:
        rows.append(("mean", [(one, value) for one, value in means if value is not None]))
    step = max(44, 14 * len(shown) + 20)

    def paint(canvas: Figure, width: int) -> None:
        _paint_recovery(canvas.subplots(), rows, len(shown), width)

    label = (
        f"Recovery of the original's score with 95 % intervals, {numbers.plural(len(rows), 'row')}, "
        f"{numbers.plural(len(shown), 'model')}; the numbers are in the table that follows."
    )
    return both("recovery", label, lambda width: 60 + (step + (width != WIDE) * 14) * len(rows), paint)


def _row_label(results: Results, name: str) -> str:
    """The task's name; with its number of items where those are too few to say anything by."""
    items = min(model.tasks[name].items for model in results.models if name in model.tasks)
    return name if items >= inference.FEWEST_ITEMS else f"{name} ({numbers.plural(items, 'item')})"


def _of_task(one: Drawn, name: str) -> Interval | None:
    task = one.model.tasks.get(name)
    return inference.task_recovery(task.versus_original) if task else None


def _paint_recovery(axes: Axes, rows: list[tuple[str, list[tuple[Drawn, Interval]]]], models: int, width: int) -> None:
    ends = [end for _, values in rows for _, value in values for end in (value.low, value.high, value.value)]
    # A task whose original score is near zero has an interval of any length: it must not squeeze all others.
    low, high = max(0.0, min(*ends, 0.99)), min(2.0, max(*ends, 1.01))
    beyond = 100 * (high + 1)  # where a bar without a bound is drawn to: out of sight
    pad = 0.04 * (high - low)
    axes.set_xlim(100 * (low - pad), 100 * (high + pad))
    axes.axvline(100, color=INK, linewidth=1.3, zorder=1)
    spread = 0.6 if width == WIDE else 0.46
    for row, (name, values) in enumerate(rows):
        middle = row if width == WIDE else row + 0.12
        for one, value in values:
            offset = 0.0 if models == 1 else spread * (one.index / (models - 1) - 0.5)
            reach = [[100 * max(0.0, value.value - value.low)], [min(beyond, 100 * max(0.0, value.high - value.value))]]
            axes.errorbar(
                100 * value.value,
                middle + offset,
                xerr=reach,
                fmt=one.marker,
                color=one.colour,
                markeredgecolor=PAPER,
                markersize=figure.marker_size(one.index, 8.5),
                elinewidth=2.4,
                zorder=3,
            )
        if row:
            axes.axhline(row - 0.5, color=GRID, linewidth=1)
        if width != WIDE:
            axes.annotate(
                numbers.shortened(name, 40),
                (0, row - 0.47),
                xycoords=("axes fraction", "data"),
                va="top",
                color=INK,
                weight="bold" if name == "mean" else "normal",
            )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if width == WIDE:
        axes.set_yticks(range(len(rows)), [numbers.shortened(name, 34) for name, _ in rows], color=INK)
        if rows[-1][0] == "mean":
            axes.get_yticklabels()[-1].set_fontweight("bold")
    else:
        axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("% of the original's score")


# How the divergence is spread


def _histogram(results: Results) -> Plot | None:
    shown = [one for one in drawn(results) if one.model.divergence and sum(one.model.divergence.histogram_counts)]
    if not shown:
        return None

    def paint(canvas: Figure, width: int) -> None:
        axes = canvas.subplots()
        for rank, one in enumerate(shown):
            divergence = one.model.divergence
            assert divergence is not None
            shares, edges = _spread(one), list(divergence.histogram_edges)
            if len(shown) <= 3:  # more would only be mud
                axes.stairs(shares, edges, fill=True, color=one.colour, alpha=0.10)
            axes.stairs(shares, edges, color=one.colour, linewidth=1.8)
            if divergence.kl_mean > 0:
                axes.axvline(divergence.kl_mean, color=one.colour, linewidth=1.4, linestyle=(0, (3, 3)))
                axes.plot(
                    divergence.kl_mean,
                    0.965 - 0.055 * rank,  # means can be close together
                    marker=one.marker,
                    color=one.colour,
                    markeredgecolor=PAPER,
                    transform=axes.get_xaxis_transform(),
                    markersize=figure.marker_size(one.index, 8.5),
                )
        axes.set_xscale("log")
        axes.set_xlim(*_occupied(shown))
        axes.set_ylim(0, axes.get_ylim()[1] * (1.08 + 0.06 * min(len(shown), 6)))
        figure.plain_log_axis(axes, "x", 12 if width == WIDE else 5)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("KL at one position, nats")
        axes.set_title("% of positions", color=MUTED, size=12.5)

    label = f"Histogram of KL per position for {numbers.listed([one.label for one in shown])}, on a logarithmic axis."
    return both("histogram", label, lambda width: 330 if width == WIDE else 280, paint)


def _spread(one: Drawn) -> list[float]:
    """Percent of the positions in each bin."""
    counts = one.model.divergence.histogram_counts if one.model.divergence else ()
    return [100 * counted / sum(counts) for counted in counts]


def _occupied(shown: list[Drawn]) -> tuple[float, float]:
    """From the first bin with a thousandth of any model's positions to the last that isn't empty: damage is there."""
    lows, highs = [], []
    for one in shown:
        assert one.model.divergence is not None
        edges, shares = one.model.divergence.histogram_edges, _spread(one)
        trace = min(_TRACE, max(shares))
        lows.append(min(low for low, share in zip(edges[:-1], shares, strict=True) if share >= trace))
        highs.append(max(high for high, share in zip(edges[1:], shares, strict=True) if share > 0))
    return min(lows), max(highs)


# Error of each layer


def _sites(results: Results) -> Plot | None:
    shown = drawn(results)
    found = panels([one.model.site_errors for one in shown])[:_AT_MOST_PANELS]
    if not found:
        return None

    def grid(width: int) -> tuple[int, int]:
        columns = min(len(found), 4 if width == WIDE else 2)
        return math.ceil(len(found) / columns), columns

    def paint(canvas: Figure, width: int) -> None:
        rows, columns = grid(width)
        cells = list(canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, panel in zip(cells, found, strict=False):
            _paint_panel(axes, panel, shown)
        figure.plain_log_axis(cells[0], "y")
        for axes in cells[len(found) :]:
            axes.set_visible(False)
        for place, axes in enumerate(cells[: len(found)]):
            below = place + columns < len(found)
            axes.tick_params(labelbottom=not below)
            if not below:
                axes.set_xlabel(found[0].axis)

    label = (
        f"Relative squared output error of the compressed layers, one panel for each of {len(found)} kinds of layer, "
        "on a logarithmic axis; the numbers are in the table that follows."
    )
    return both("sites", label, lambda width: grid(width)[0] * (190 if width == WIDE else 160) + 30, paint)


def _paint_panel(axes: Axes, panel: Panel, shown: list[Drawn]) -> None:
    from matplotlib.ticker import MaxNLocator

    for one, points in zip(shown, panel.models, strict=True):
        if points:
            places, errors = zip(*points, strict=True)
            dots = one.marker if len(points) <= 16 else None
            axes.plot(
                places,
                errors,
                color=one.colour,
                marker=dots,
                linewidth=1.6,
                markersize=figure.marker_size(one.index, 6.0),
                markeredgecolor=PAPER,
                markeredgewidth=0.6,
            )
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_title(numbers.shortened(panel.kind, 24))
