"""Size against quality: every compared model as a point, with its interval and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmshrink_eval.report import figure, inference, numbers
from llmshrink_eval.report.canvas import WIDE, Plot, both, drawn
from llmshrink_eval.report.figure import INK, MUTED, PAPER
from llmshrink_eval.report.inference import Interval
from llmshrink_eval.report.places import label_points
from llmshrink_eval.results import ModelResult, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Measure:
    """One way of telling quality. value: of a model, with its interval, or None; better: -1 where less is better."""

    title: str
    value: Callable[[ModelResult], Interval | None]
    better: int
    logarithmic: bool = False


def _plain(value: float | None, interval: Interval | None) -> Interval | None:
    """The interval, or the bare value where it has none."""
    if interval is None and value is not None and math.isfinite(value):
        return Interval(value, value, value)
    return interval


def _measures(results: Results) -> list[_Measure]:
    def perplexity(model: ModelResult) -> Interval | None:
        measured = model.perplexity
        return _plain(measured.token, inference.perplexity_shown(measured)) if measured else None

    def kl(model: ModelResult) -> Interval | None:
        measured = model.divergence
        positive = measured is not None and measured.kl_mean > 0
        return _plain(measured.kl_mean, inference.kl_interval(model)) if measured and positive else None

    def recovery(model: ModelResult) -> Interval | None:
        if model.role == "original" and any(other.recovery is not None for other in results.models):
            return Interval(1.0, 1.0, 1.0)
        return _plain(model.recovery, inference.recovery_interval(model))

    measures = [
        _Measure("KL, nats/token (lower is better)", kl, -1, logarithmic=True),
        _Measure("Perplexity (lower is better)", perplexity, -1),
        _Measure("Recovery over tasks (higher is better)", recovery, 1),
    ]
    with_size = [model for model in results.models if model.cost]
    return [measure for measure in measures if sum(measure.value(model) is not None for model in with_size) >= 2]


def quality(results: Results) -> Plot | None:
    """One panel for each measure of quality that at least two models of known size have; None without any."""
    measures = _measures(results)
    if not measures:
        return None
    count = len(measures)

    def paint(canvas: Figure, width: int) -> None:
        shape = (1, count) if width == WIDE else (count, 1)
        for axes, measure in zip(canvas.subplots(*shape, squeeze=False).flat, measures, strict=True):
            _paint(axes, results, measure)
        label_points(canvas)

    label = (
        "Size on disk against "
        + numbers.listed([measure.title.split(" (")[0] for measure in measures])
        + ", with the Pareto front; the numbers are in the table of models."
    )
    return both("quality", label, lambda width: 330 if width == WIDE else 270 * count, paint)


def _paint(axes: Axes, results: Results, measure: _Measure) -> None:
    indices = {one.model.name: one.index for one in drawn(results)}
    labels = inference.labels(results)
    points: list[tuple[float, float]] = []
    for model in results.models:
        value = measure.value(model)
        if value is None or model.cost is None:
            continue
        megabytes = model.cost.bytes_on_disk / 1e6
        points.append((megabytes, value.value))
        index = indices.get(model.name)
        colour = INK if index is None else figure.model_colour(index)
        axes.errorbar(
            megabytes,
            value.value,
            yerr=[[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]],
            fmt="o" if index is None else figure.marker(index),
            color=colour,
            markerfacecolor=PAPER if index is None else colour,
            markeredgecolor=INK if index is None else PAPER,
            markeredgewidth=1.8 if index is None else 1.0,
            markersize=9.0 if index is None else figure.marker_size(index, 9.0),
            ecolor=MUTED if index is None else colour,
            elinewidth=1.0 if index is None else 1.8,
            zorder=3,
        )
        if index is None:  # what the others' bars are to be held against
            axes.axhline(value.value, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(numbers.shortened(labels[model.name], 22), (megabytes, value.value), color=colour, size=12)
    front = pareto(points, measure.better)
    if len(front) > 1:
        # From model to model, not in steps: a step's edge runs through every beaten model as large as a better one. No
        # model lies inside the rectangle between two neighbours of the front, so this line meets none but the front's.
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    sizes = [size for size, _ in points]
    if max(sizes) / min(sizes) > 2:
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.35)
        figure.plain_log_axis(axes, "x")
    else:
        axes.margins(x=0.35)
    qualities = [quality for _, quality in points]
    # One ruined model must not press all others onto a line.
    if measure.logarithmic or (min(qualities) > 0 and max(qualities) / min(qualities) > 20):
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.autoscale_view()
        figure.plain_log_axis(axes, "y")
    else:
        axes.margins(y=0.2)
    axes.grid(axis="x", visible=False)
    axes.set_title(measure.title, color=MUTED, size=12.5)
    axes.set_xlabel("size on disk, MB")


def pareto(points: Iterable[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The (size, quality) that no other beats: none is at most as large and at least as good, and one of it strictly.

    Smallest first, each once: models that tie in both stand at one point, and neither beats the other. better: 1 where
    more quality is better, -1 where less is.
    """
    front: list[tuple[float, float]] = []
    for size, quality in sorted(set(points), key=lambda point: (point[0], -better * point[1])):
        if not front or better * quality > better * front[-1][1]:
            front.append((size, quality))
    return front
