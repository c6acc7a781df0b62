"""A matplotlib figure as an SVG that lives inside a page: small, the same every time, light and dark.

Colours are roles, not values: a figure is drawn in stand-ins that become the page's CSS variables, so that one drawing
follows the reader's colour scheme. Text stays text, in the page's font, and nothing in it is read as mathematics: names
come from users, and a `$` in one is a dollar. Identifiers are made unique to the page, namespaces are dropped (HTML
needs none, and without them the page holds no address at all), coordinates are rounded to a hundredth of a pixel.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_COLOURS = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# matplotlib's markers of one size differ in area: how much larger to draw each, to weigh the same to the eye.
_WEIGHTS = {"^": 1.2, "v": 1.2, "P": 1.15, "X": 1.1, "*": 1.45, "D": 0.9}
# Stand-ins: colours that no figure would use otherwise.
INK, MUTED, GRID, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_ROLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card"}
_ROLES.update({f"#0b000{index}": f"--model-{index}" for index in range(MODEL_COLOURS)})

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmshrink",
    "text.parse_math": False,
    "font.size": 12.5,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titlepad": 8,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 6.5,
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
}


def model_colour(index: int) -> str:
    """The stand-in for the colour of the index-th compressed model; the page repeats them after MODEL_COLOURS."""
    return f"#0b000{index % MODEL_COLOURS}"


def marker(index: int) -> str:
    """The marker that goes with it, so that colour alone never tells two models apart."""
    return MARKERS[(index + index // MODEL_COLOURS) % len(MARKERS)]


def marker_size(index: int, size: float) -> float:
    """The size in points at which that marker looks as large as a disc of `size`."""
    return size * _WEIGHTS.get(marker(index), 1.0)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's own matplotlibrc says, and then ours."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser draws the text, in fonts that have glyphs which matplotlib's own may lack.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def draw(identity: str, label: str, width: int, height: int, paint: Callable[[Figure], None]) -> str:
    """The SVG of a figure of width x height CSS pixels. identity: unique in the page; label: its alternative text."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")  # an SVG's unit is 1/72 inch
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)  # type: ignore[call-arg]
        paint(figure)
        written = StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(written.getvalue(), identity, label, width, height)


def _inline(document: str, identity: str, label: str, width: int, height: int) -> str:
    root = ElementTree.fromstring(document)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", document))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element.attrib, identity, used))
        element.tail = None
        if element.tag != "text":
            element.text = None
    root.attrib = {
        "role": "img",
        "aria-label": label,
        "viewBox": f"0 0 {width} {height}",
        "width": str(width),
        "height": str(height),
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: dict[str, str], identity: str, used: set[str]) -> Iterator[tuple[str, str]]:
    for qualified, value in attributes.items():
        name = qualified.rpartition("}")[2]
        if name == "id":
            if value in used:
                yield name, f"{identity}-{value}"
        elif name in ("d", "x", "y", "width", "height", "transform", "points"):
            short = re.sub(r"-?\d+\.\d{2,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
            if not short.startswith("rotate(-0 "):
                yield name, " ".join(short.split())
        elif name == "style":
            yield name, _themed(value)
        else:
            yield name, value.replace("url(#", f"url(#{identity}-").replace("#", f"#{identity}-", name == "href")


def _themed(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    return re.sub(r"#[0-9a-f]{6}", lambda match: f"var({_ROLES[match[0]]})" if match[0] in _ROLES else match[0], style)


def plain_log_axis(axes: Axes, which: str, ticks: int = 12) -> None:
    """A logarithmic axis whose ticks are plain numbers at 1, 2 and 5: matplotlib's own are mathematics.

    ticks: about as many at most; over many decades some are passed over.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    from llmshrink_eval.report import numbers

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    decades = high / low
    steps: tuple[float, ...] = (1.0,) if decades > 300 else (1.0, 3.0) if decades > 30 else (1.0, 2.0, 5.0)
    if decades < 12:
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, numbers.significant(value, 1))))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float, short: str) -> str:
    text = f"{value:g}"
    return short if "e" in text else text
