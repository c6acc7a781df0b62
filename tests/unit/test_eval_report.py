"""The report as files: whole, self-contained, escaped, the same every time, and without what was not measured."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from eval_example import example, samples_of
from eval_hostile import EVIL, hostile, hostile_samples
from llmshrink_eval.inert import escaped
from llmshrink_eval.report import numbers, sites, write_report
from llmshrink_eval.report.table import markdown
from llmshrink_eval.report.write import render
from llmshrink_eval.results import ModelResult, Results

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Reads a page as a browser's tokenizer does; complains of tags that don't match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def rich() -> Results:
    return example()


@pytest.fixture(scope="module")
def page(rich: Results) -> str:
    return render(rich, samples_of(rich))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time, and some tests are about everything else."""
    monkeypatch.setattr("llmshrink_eval.report.write.all_plots", lambda results: {})


def bare(model: ModelResult, **changes: Any) -> ModelResult:
    nothing = {
        "perplexity": None,
        "divergence": None,
        "tasks": {},
        "cost": None,
        "recovery": None,
        "site_errors": (),
        "generations": (),
    }
    return model.model_copy(update={**nothing, **changes})


def test_the_page_has_every_section(page: str) -> None:
    found = [attributes.get("id") for attributes in Reader(page).all("section")]
    assert found == [
        *("summary", "requirements", "models", "quality", "tasks", "flips"),
        *("divergence", "worst", "sites", "generations", "cost", "method"),
    ]


def test_the_page_asks_for_nothing_outside_itself(page: str) -> None:
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
    assert "://" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_page_can_be_read_without_seeing_it(page: str) -> None:
    reader = Reader(page)
    assert len(reader.all("caption")) == len(reader.all("table")) > 8
    assert len(reader.all("svg")) == 8
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 40 for svg in reader.all("svg"))
    assert all("aria-label" in box for box in reader.all("div") if box.get("class") == "scroll")
    assert all(header.get("scope") for header in reader.all("th"))
    identities = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    used = {attributes["href"][1:] for _, attributes in reader.tags if attributes.get("href", "").startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(identities)


def test_numbers_stand_in_the_page_with_their_intervals(page: str) -> None:
    text = " ".join("".join(Reader(page).text).split())
    for part in (
        "0.0291 ± 0.0010",
        "97.9 to 99.9",
        "+2.9 % (2.4 to 3.3)",
        "89.4 %",
        "−5.8 to −2.2",
        "285 / 191",
        "3.91 MB",
    ):
        assert part in text


def test_flipped_items_are_shown_from_the_samples(rich: Results, page: str) -> None:
    paired = rich.models[1].tasks["demo_facts"].versus_original
    assert paired is not None
    assert f"item {paired.flipped[0]}" in page
    assert "the red door → <mark>the blue door</mark>" in page
    assert "the blue door → <mark>the red door</mark>" in page


@pytest.mark.usefixtures("undrawn")
def test_without_samples_flipped_items_are_numbers(rich: Results) -> None:
    found = render(rich, {})
    assert '<section id="flips"' in found
    assert "the blue door" not in found


@pytest.mark.parametrize("missing", ["perplexity", "divergence", "tasks", "cost", "site_errors", "generations"])
def test_what_was_not_measured_leaves_no_empty_section(missing: str) -> None:
    rich = example(models=2, tasks=2, sites=2)
    empty: Any = {} if missing == "tasks" else () if missing in ("site_errors", "generations") else None
    update = {missing: empty} | ({"recovery": None} if missing == "tasks" else {})
    results = rich.model_copy(
        update={"models": tuple(model.model_copy(update=update) for model in rich.models), "requirements": ()}
    )
    found = render(results, {})
    gone = {"divergence": ["divergence", "worst"], "tasks": ["tasks", "flips"], "site_errors": ["sites"]}
    gone["generations"] = ["generations"]
    for section in gone.get(missing, []):
        assert f'<section id="{section}"' not in found
        assert f'href="#{section}"' not in found
    if missing == "cost":
        assert "Cost was not measured." in found
    for svg in re.findall(r"<svg.*?</svg>", found, re.DOTALL):
        assert svg.count("<path") > 5
    assert markdown(results)


def test_nothing_measured_is_said_and_draws_nothing(rich: Results) -> None:
    results = rich.model_copy(
        update={"models": tuple(bare(model) for model in rich.models), "requirements": (), "text": None}
    )
    found = render(results, {})
    assert "<svg" not in found
    assert "Nothing was measured." in found
    assert "no perplexity and no divergence" in found


def test_a_single_model_without_an_original_is_reported(rich: Results) -> None:
    model = rich.models[2]
    tasks = {name: task.model_copy(update={"versus_original": None}) for name, task in model.tasks.items()}
    alone = model.model_copy(update={"tasks": tasks, "recovery": None, "divergence": None})
    found = render(rich.model_copy(update={"models": (alone,), "requirements": ()}), {})
    assert "Evaluation of wiki7m-gptq-w4" in found
    assert "not compared" in found


def test_texts_from_outside_are_only_ever_text(tmp_path: Path) -> None:
    results = hostile()
    write_report(results, tmp_path / "report", hostile_samples(results))
    found = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    reader = Reader(found)
    assert not {tag for tag, _ in reader.tags} & {"img", "script"}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "{{7*7}}" in found  # as it came: no template either
    drawn = "".join(re.findall(r"<svg.*?</svg>", found, re.DOTALL))
    assert "&lt;/script" in drawn
    assert "$" in drawn  # no mathematics was made of it
    for style in re.findall(r'style="width: ([^"]*)"', found):
        assert re.fullmatch(r"\d+(\.\d+)?%", style)


def test_a_markdown_cell_is_only_ever_text() -> None:
    assert escaped("a|b\n*c* <d> `e` [f](g) $h$") == r"a\|b \*c\* \<d\> \`e\` \[f\](g) \$h\$"
    lines = markdown(hostile()).splitlines()
    columns = len(re.findall(r"(?<!\\)\|", lines[0]))
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines[:6]] == [columns] * 6
    assert not re.search(r"(?<!\\)[<$`]", "\n".join(lines))
    assert EVIL[:9] not in "\n".join(lines)


def test_the_table_has_intervals_and_a_dash_for_what_is_not_there(rich: Results) -> None:
    lines = markdown(rich).splitlines()
    columns = (
        "Model | Size | Bits/weight | Perplexity | Perplexity change | KL, nats/token | Same first choice | Recovery"
    )
    assert lines[0].startswith(f"| {columns} |")
    assert lines[2].startswith("| wiki7m | 14.7 MB | 16.00 | 30.3 (29.1 to 31.6) | – | – | – | – | 65.2 ± 1.9 % |")
    assert "| 31.2 | +2.9 % (2.4 to 3.3) | 0.0291 ± 0.0010 | 89.4 % | 98.9 % (97.9 to 99.9) |" in lines[4]
    assert "a compressed model's is that of its change from the original" in lines[-1]


def test_the_same_results_give_the_same_bytes(rich: Results, page: str) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 31  # what a user has set must not show
    try:
        assert render(rich, samples_of(rich)) == page
        assert matplotlib.rcParams["font.size"] == 31
    finally:
        matplotlib.rcdefaults()


def test_a_ruined_model_can_be_reported() -> None:
    results = example(models=1, tasks=2, sites=1)
    model = results.models[1]
    assert model.perplexity is not None
    assert model.divergence is not None
    perplexity = {"nats_per_token": 90.0, "token": math.exp(90), "excess_nats": 86.6, "excess_stderr": 3.0}
    ruined = {
        "perplexity": model.perplexity.model_copy(update=perplexity),
        "divergence": model.divergence.model_copy(update={"kl_mean": 84.0, "kl_stderr": 2.0, "top1_agreement": 0.0}),
        "recovery": 0.0,
    }
    results = results.model_copy(update={"models": (results.models[0], model.model_copy(update=ruined))})
    found = render(results, {})
    assert "1.22e39" in found
    assert "Perplexity 4.1e37 times the original&#39;s (95\u00a0% interval 1.1e35 to 1.5e40 times)." in found
    assert "| 1.22e39 | ×4.1e37 (1.1e35 to 1.5e40) |" in markdown(results)


@pytest.mark.slow
def test_a_large_report_stays_small() -> None:
    results = example(models=5, sites=29)
    tasks = {f"{name}{turn}": task for turn in range(2) for name, task in results.models[1].tasks.items()}
    models = tuple(model.model_copy(update={"tasks": tasks}) for model in results.models)
    assert len(results.models[1].site_errors) > 200
    assert len(render(results.model_copy(update={"models": models}), samples_of(results)).encode()) < 2_000_000


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_fails_leaves_the_one_before(
    tmp_path: Path, rich: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("before")
    real, calls = Path.write_text, []

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(rich, tmp_path, samples_of(rich))
    assert (tmp_path / "report.html").read_text() == "before"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["report.html"]


@pytest.mark.usefixtures("undrawn")
def test_samples_are_written_where_the_results_say(tmp_path: Path, rich: Results) -> None:
    samples = samples_of(rich)
    write_report(rich, tmp_path, samples)
    for model in rich.models:
        for task in model.tasks.values():
            assert task.samples is not None
            lines = (tmp_path / task.samples).read_text(encoding="utf-8").splitlines()
            assert [json.loads(line) for line in lines] == samples[task.samples]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown(rich)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("path", ["../elsewhere.jsonl", "/tmp/elsewhere.jsonl"])
def test_samples_stay_inside_the_report(tmp_path: Path, rich: Results, path: str) -> None:
    with pytest.raises(ValueError, match="leaves the report's folder"):
        write_report(rich, tmp_path / "report", {path: []})
    assert not (tmp_path / "report").exists()


def test_a_layer_s_name_is_a_place() -> None:
    assert sites.place("model.layers.3.self_attn.q_proj.weight") == (3, "self_attn.q_proj")
    assert sites.place("model.layers.3.mlp.experts.17.up_proj") == (3, "mlp.experts.*.up_proj")
    assert sites.place("lm_head") == (None, "lm_head")


@pytest.mark.parametrize("pattern", ["lm_head_{}", "h.{}.mlp.experts.{}.up", "layers.{}"])
def test_layers_of_any_names_have_a_panel(rich: Results, pattern: str) -> None:
    errors = [
        site.model_copy(update={"name": pattern.format(index // 4, index % 4)})
        for index, site in enumerate(rich.models[1].site_errors[:16])
    ]
    panels = sites.panels([errors, errors[:8]])
    assert [len(panel.models) for panel in panels] == [2] * len(panels) != []
    assert sum(len(panel.models[0]) for panel in panels) == (4 if "experts" in pattern else 16)


def test_numbers_are_written_as_people_read_them() -> None:
    assert [numbers.size(count) for count in (0, 999, 1000, 999_600, 3_910_000, 14_680_064_000)] == [
        *("0 bytes", "999 bytes", "1.00 kB", "1.00 MB", "3.91 MB", "14.7 GB"),
    ]
    assert numbers.fixed(-0.04, 1) == "0.0"
    assert numbers.fixed(-1234.5, 1) == "−1,234.5"
    assert numbers.significant(2.04e-7, 2) == "2.0e−7"
    assert numbers.fixed(float("nan"), 2) == numbers.size(None) == "–"
    assert [numbers.seconds(value) for value in (0.4213, 12.0, 200.0, 7300.0)] == [
        "0.42 s",
        "12 s",
        "3 min 20 s",
        "2 h 1 min",
    ]
    assert numbers.listed(["a", "b", "c"]) == "a, b and c"
    assert numbers.listed(["a", "b", "c"], 2) == "a, b and 1 more"


def test_colours_can_be_told_from_what_they_stand_on(page: str) -> None:
    """WCAG 2.1: 4.5 : 1 for text, in both schemes; model colours are text too, in labels."""
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        pairs = [(name, "card") for name in colours if name.startswith("model-")]
        pairs += [(name, paper) for name in ("ink", "muted", "link") for paper in ("card", "page", "soft")]
        pairs += [(name, f"{name}-soft") for name in ("good", "bad")] + [("ink", "mark"), ("caution", "card")]
        for text, paper in pairs:
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
