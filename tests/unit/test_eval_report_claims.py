"""What the page, its plots and its table claim: paired where models are compared, and nothing of too few items."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from eval_example import example
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval.report import figure, inference, plots, quality
from llmshrink_eval.report.canvas import drawn
from llmshrink_eval.report.quality import pareto
from llmshrink_eval.report.table import change_cell, markdown
from llmshrink_eval.report.write import render
from llmshrink_eval.results import ModelResult, Results


@pytest.fixture(scope="module")
def rich() -> Results:
    return example()


def text_of(page: str) -> str:
    """What a page says, tags and styles left out."""
    said = re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(said.replace("&#39;", "'").split())


def test_a_compressed_model_s_perplexity_is_told_by_what_is_paired(rich: Results) -> None:
    perplexity = rich.models[2].perplexity
    assert perplexity is not None
    reach = 1.966 * 0.00210575  # Student's t over 400 windows times excess_stderr, in nats/token
    shown = inference.perplexity_shown(perplexity)
    assert shown is not None
    assert (shown.value, shown.low, shown.high) == pytest.approx(
        [perplexity.token * math.exp(end) for end in (0, -reach, reach)], rel=1e-4
    )
    wild = perplexity.model_copy(update={"stderr": 0.5})  # how hard the windows are
    assert inference.perplexity_shown(wild) == shown
    assert change_cell(rich.models[2].model_copy(update={"perplexity": wild})) == change_cell(rich.models[2])
    own = perplexity.model_copy(update={"excess_nats": None, "excess_stderr": None})
    assert inference.perplexity_shown(own) == inference.perplexity_interval(perplexity)


@pytest.mark.parametrize(
    ("excess", "stderr", "said"),
    [
        (-0.01, 0.001, "−1.0 % (−1.2 to −0.8)"),
        (0.0, 0.0, "identical"),
        (0.02, None, "+2.02 %"),
        (5.0, 0.01, "×148 (146 to 151)"),
    ],
)
def test_a_change_of_any_size_is_told(rich: Results, excess: float, stderr: float | None, said: str) -> None:
    perplexity = rich.models[1].perplexity
    assert perplexity is not None
    changed = perplexity.model_copy(update={"excess_nats": excess, "excess_stderr": stderr})
    assert change_cell(rich.models[1].model_copy(update={"perplexity": changed})) == said


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(4.0, 0.05), (4.0, 0.03), (3.0, 0.16), (5.0, 0.04), (9.0, 0.0)]
    assert pareto(points, -1) == [(3.0, 0.16), (4.0, 0.03), (9.0, 0.0)]
    assert pareto([(3.0, 0.9), (4.0, 0.8), (5.0, 0.95)], 1) == [(3.0, 0.9), (5.0, 0.95)]
    assert pareto([(1.0, 2.0), (1.0, 2.0)], 1) == [(1.0, 2.0)]


grid_points = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(points=grid_points, better=st.sampled_from([1, -1]))
def test_the_front_and_the_line_through_it_hold_no_beaten_model(points: list[tuple[int, int]], better: int) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        as_good = one[0] <= other[0] and better * one[1] >= better * other[1]
        return as_good and one != other

    beaten = {point for point in points if any(beats(other, point) for other in points)}
    front = pareto(points, better)
    assert set(front) == set(points) - beaten
    assert front == sorted(set(front))
    for (x0, y0), (x1, y1) in pairwise(front):
        for x, y in beaten:
            assert not x0 <= x <= x1 or (x - x0) * (y1 - y0) != (y - y0) * (x1 - x0), (x, y)


def test_the_drawn_line_joins_the_models_of_the_front_and_no_other(rich: Results) -> None:
    from matplotlib.figure import Figure

    sizes = [model.cost.bytes_on_disk / 1e6 for model in rich.models if model.cost]
    assert sizes[1] == sizes[2]  # RTN and GPTQ at four bits
    for measure in quality._measures(rich):
        axes = Figure().subplots()
        quality._paint(axes, rich, measure)
        (line,) = [line for line in axes.lines if line.get_color() == figure.MUTED and len(set(line.get_ydata())) > 1]
        ends = {model.name: measure.value(model) for model in rich.models}
        drawn = [name for name, size in zip(ends, sizes, strict=True) if on(line.get_xydata(), size, ends[name])]
        assert "runs/wiki7m-rtn-w4" not in drawn
        assert len(drawn) == len(line.get_xydata()) >= 2


def on(corners: Any, size: float, value: inference.Interval | None) -> bool:
    """Whether a model stands where the line has a corner."""
    return value is not None and any(tuple(corner) == (size, value.value) for corner in corners)


def few(model: ModelResult, name: str, items: int, **changes: Any) -> ModelResult:
    """The model with so few items of that task."""
    task = model.tasks[name].model_copy(update={"items": items, **changes})
    return model.model_copy(update={"tasks": {**model.tasks, name: task}})


def test_a_task_of_two_items_is_said_to_be_too_small_everywhere() -> None:
    small = example(models=1, tasks=2, sites=1)
    small = small.model_copy(update={"models": tuple(few(model, "arc_easy", 2, score=1.0) for model in small.models)})
    text = text_of(render(small, {}))
    assert "too few items to say" in text
    assert "Too few items to say on arc_easy (2 items)" in text
    assert "arc_easy (2 items)" in text
    assert "Fewer than 6 items are too few" in text
    assert "100.0 % (2 items) |" in markdown(small)
    assert "Fewer than 6 items are too few to compare models by." in markdown(small)
    assert "too few" not in markdown(example(models=1, tasks=2))


def test_a_perfect_score_does_not_look_certain() -> None:
    perfect = example(models=1, tasks=1)
    models = tuple(few(model, "arc_easy", 200, score=1.0, stderr=0.0) for model in perfect.models)
    assert "| 100.0 % (≥ 98.2) |" in markdown(perfect.model_copy(update={"models": models}))


def test_a_recovery_without_a_bound_can_be_drawn() -> None:
    results = example(models=1, tasks=2, sites=1)
    model = results.models[1]
    versus = model.tasks["arc_easy"].versus_original
    assert versus is not None
    open_ended = few(
        model, "arc_easy", 8, versus_original=versus.model_copy(update={"recovery_low": None, "recovery_high": None})
    )
    interval = inference.task_recovery(open_ended.tasks["arc_easy"].versus_original)
    assert interval is not None
    assert (interval.low, interval.high) == (0.0, math.inf)
    found = render(results.model_copy(update={"models": (results.models[0], open_ended)}), {})
    drawn = "".join(re.findall(r"<svg.*?</svg>", found, re.DOTALL))
    assert not re.search(r"\b(inf|nan)\b", drawn)
    assert "of the original's score, mean over 2 tasks; no interval." in found.replace("&#39;", "'").replace(
        "\xa0", " "
    )


def test_a_histogram_shows_where_positions_are_and_all_of_the_damage() -> None:
    results = example(models=1, tasks=0)
    model = results.models[1]
    assert model.divergence is not None
    counts = (1, 0, 3, 50_000, 49_995, 0, 1, 0)  # below a thousandth: the first three
    divergence = model.divergence.model_copy(
        update={"histogram_edges": tuple(10.0 ** (place - 6) for place in range(9)), "histogram_counts": counts}
    )
    changed = model.model_copy(update={"divergence": divergence})
    shown = drawn(results.model_copy(update={"models": (results.models[0], changed)}))
    assert plots._occupied(shown) == (10.0**-3, 10.0**1)


def test_worst_contexts_beyond_the_third_are_folded() -> None:
    results = example(models=1, tasks=0)
    model = results.models[1]
    assert model.divergence is not None
    many = model.divergence.model_copy(update={"worst": (model.divergence.worst * 4)[:10]})
    models = (results.models[0], model.model_copy(update={"divergence": many}))
    page = render(results.model_copy(update={"models": models}), {})
    shown, _, folded = page.partition("7 more places")
    assert (shown.count('class="context"'), folded.count('class="context"')) == (3, 7)
    assert page.count("<details") == page.count("</details>")
    assert "more place" not in render(results, {})
