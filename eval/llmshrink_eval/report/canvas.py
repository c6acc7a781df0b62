"""What all plots share: a plot is drawn at two widths, and a model looks the same in each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmshrink_eval.report import figure, inference
from llmshrink_eval.results import ModelResult, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 1040, 340


@dataclass(frozen=True)
class Plot:
    """One plot at both widths, as inline SVG."""

    wide: str
    narrow: str


@dataclass(frozen=True)
class Drawn:
    """A compressed model as it is drawn everywhere in the report. index: its place among the compressed ones."""

    model: ModelResult
    label: str
    index: int

    @property
    def colour(self) -> str:
        """Stand-in for its colour."""
        return figure.model_colour(self.index)

    @property
    def marker(self) -> str:
        """Its matplotlib marker."""
        return figure.marker(self.index)


def drawn(results: Results) -> list[Drawn]:
    """The compressed models in their order."""
    labels = inference.labels(results)
    compressed = [model for model in results.models if model.role == "compressed"]
    return [Drawn(model, labels[model.name], index) for index, model in enumerate(compressed)]


def both(name: str, label: str, height: Callable[[int], int], paint: Callable[[Figure, int], None]) -> Plot:
    """A plot of a height that depends on its width. name: unique in the page; label: its alternative text."""

    def at(width: int) -> str:
        return figure.draw(f"{name}-{width}", label, width, height(width), lambda canvas: paint(canvas, width))

    return Plot(wide=at(WIDE), narrow=at(NARROW))
