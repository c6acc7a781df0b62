"""Where the labels of points go: beside them, inside their axes, and over nothing that is drawn already."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# (dx, dy) in points and the alignments that make the label grow away from the point; the first that fits is taken.
_CANDIDATES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (8, 9, "left", "bottom"),
    (8, -9, "left", "top"),
    (-8, 9, "right", "bottom"),
    (-8, -9, "right", "top"),
    (0, 14, "center", "bottom"),
    (0, -14, "center", "top"),
    (8, 26, "left", "bottom"),
    (-8, 26, "right", "bottom"),
    (8, -26, "left", "top"),
    (-8, -26, "right", "top"),
)
# What a label's place costs beside the area (square points) that it hides: a thin line behind a label, which has a
# halo, matters less than a marker; and each candidate is a little worse than the one before it.
_LINE, _FURTHER = 0.8, 6.0


def label_points(figure: Figure) -> None:
    """Place every annotation of the figure; lays the figure out for good, so it comes last."""
    labels = [(axes, text) for axes in figure.axes for text in _annotations(axes)]
    for _, text in labels:
        text.set_in_layout(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        mine = [text for holder, text in labels if holder is axes]
        lines = _lines(axes)
        placed: list[Bbox] = []
        frame = axes.get_window_extent()
        for text in mine:
            # Wider around the others' markers than around its own: a label belongs to the marker that it is nearest to.
            markers = [_around(axes, other, 5 if other is text else 12) for other in mine]
            best: tuple[float, tuple[float, float, str, str]] | None = None
            for rank, candidate in enumerate(_CANDIDATES):
                _move(text, candidate)
                box = text.get_window_extent()
                hidden = math.fsum(_overlap(box, other) for other in (*markers, *placed))
                cost = 4 * _outside(box, frame) + hidden + _FURTHER * rank
                cost += _LINE * math.fsum(_overlap(box, line) for line in lines)
                if best is None or cost < best[0]:
                    best = cost, candidate
                if cost == 0:
                    break
            assert best is not None
            _move(text, best[1])
            placed.append(text.get_window_extent())


def _annotations(axes: Axes) -> list[Annotation]:
    from matplotlib.text import Annotation

    return [child for child in axes.get_children() if isinstance(child, Annotation)]


def _move(text: Annotation, candidate: tuple[float, float, str, str]) -> None:
    dx, dy, horizontal, vertical = candidate
    text.set_anncoords("offset points")
    text.set_position((dx, dy))
    text.set(ha=horizontal, va=vertical)


def _around(axes: Axes, text: Annotation, reach: float) -> Bbox:
    """A box around the marker that a label belongs to, so far in each direction, in display units."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(text.xy)
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)


def _lines(axes: Axes) -> list[Bbox]:
    """Small boxes along every line and error bar, in display units."""
    import numpy as np
    from matplotlib.collections import LineCollection
    from matplotlib.transforms import Bbox

    drawn = [line.get_transform().transform(np.asarray(line.get_xydata())) for line in axes.lines]
    bars = [part for bars in axes.collections if isinstance(bars, LineCollection) for part in bars.get_segments()]
    drawn += [axes.transData.transform(np.asarray(part)) for part in bars]
    boxes = []
    for points in drawn:
        for start, end in pairwise(points):
            steps = max(1, round(float(np.hypot(*(end - start))) / 6))
            for share in np.linspace(0, 1, steps + 1):
                x, y = start + share * (end - start)
                boxes.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _overlap(box: Bbox, other: Bbox) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    return box.width * box.height - _overlap(box, frame)
