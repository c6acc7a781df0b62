"""Writes the report: everything is rendered before anything is written, and each file appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from llmshrink_eval.report import inference, numbers, scores, sites, table, view
from llmshrink_eval.report.canvas import drawn
from llmshrink_eval.report.plots import all_plots
from llmshrink_eval.results import Results

_TEMPLATES = Path(__file__).with_name("templates")


def write_report(results: Results, folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """table.md, report.html and the files of samples, into a folder that is made if need be.

    samples: path inside the folder (`Task.samples`) -> one row for each item, written as JSON lines. Rows with a
    "doc_id" let the page show flipped items. Raises ValueError for a path that leaves the folder.
    """
    files = {"table.md": table.markdown(results), "report.html": render(results, samples)}
    for name, rows in samples.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"samples path {name!r} leaves the report's folder")
        files[name] = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    unfinished: list[tuple[Path, Path]] = []
    try:
        for name, text in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            unfinished.append((part, target))
            # A lone surrogate, as byte-level tokens can decode to, has no UTF-8.
            part.write_text(text, encoding="utf-8", errors="replace")
        for part, target in unfinished:
            part.replace(target)
    finally:
        for part, _ in unfinished:
            part.unlink(missing_ok=True)


def render(results: Results, samples: Mapping[str, list[dict[str, Any]]]) -> str:
    """report.html as text: one file, the same for the same results, that asks for nothing outside itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=numbers.count,
        fixed=numbers.fixed,
        percent=numbers.percent,
        plural=numbers.plural,
        seconds=numbers.seconds,
        significant=numbers.significant,
        size=numbers.size,
        short=numbers.shortened,
        general=numbers.general,
        tail=view.tail,
        visible=view.visible,
        bar=view.bar,
        unbroken=_unbroken,
        json=lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True, default=str),
    )
    general, by_model = view.findings_by_model(results)
    plots = {
        name: {"wide": Markup(plot.wide), "narrow": Markup(plot.narrow)} for name, plot in all_plots(results).items()
    }
    return environment.get_template("report.html.j2").render(
        results=results,
        original=results.original,
        compressed=[one.model for one in drawn(results)],
        title=view.title(results),
        verdict=view.verdict(results),
        general=general,
        by_model=by_model,
        plots=plots,
        swatches=view.swatches(results),
        tasks=table.task_names(results),
        comparisons={model.name: {one.name: one for one in inference.comparisons(model)} for model in results.models},
        flips=view.flips(results, samples),
        measured=view.measured(results),
        speeds=view.speeds(results),
        side_by_side=view.side_by_side(results),
        sites=sites.rows([one.model for one in drawn(results)]),
        cells=table,
        any_few=any(inference.too_few(task) for model in results.models for task in model.tasks.values()),
        fewest_items=inference.FEWEST_ITEMS,
        perplexity_decimals=table.perplexity_decimals(results),
        scores=scores,
    )


def _unbroken(text: str) -> str:
    """A number and its percent sign stay on one line."""
    return text.replace(" %", "\u00a0%")
