"""What `llmshrink eval` or `compare` found of a checkpoint, for its card: only of these very weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llmshrink.hub.client import HubError
from llmshrink.run.card import Evaluation, Figure

if TYPE_CHECKING:
    from llmshrink_eval.results import ModelResult, Results

RESULTS = "results.json"
THIS = "this checkpoint"


def evaluation_of(report: Path, folder: Path, original: str) -> Evaluation:
    """The part of `report` (a folder of `llmshrink eval`, or its results.json) that is about `folder`.

    original: what the original is called in the card. Raises HubError when the report has nothing of these weights.
    """
    from llmshrink_eval.cache import default_folder
    from llmshrink_eval.fingerprint import fingerprint_folder
    from llmshrink_eval.inert import escaped
    from llmshrink_eval.report.summary import findings
    from llmshrink_eval.report.table import markdown
    from llmshrink_eval.results import Results

    file = report / RESULTS if report.is_dir() else report
    try:
        results = Results.read(file)
    except (OSError, ValueError) as error:
        raise HubError(
            f"--report {report}: no {RESULTS} that can be read; give the folder of `llmshrink eval`"
        ) from error
    print_of = fingerprint_folder(folder, default_folder())
    found = next((model for model in results.models if model.fingerprint == print_of), None)
    if found is None:
        names = ", ".join(model.name for model in results.models)
        raise HubError(
            f"--report {report}: has nothing of these weights (it is about {names}); run llmshrink eval "
            f"{shlex.quote(str(folder))} --baseline THE-ORIGINAL -o REPORT and give that"
        )
    base = results.original if results.original is not found else None
    shown = [found.model_copy(update={"name": THIS, "path": THIS})]
    if base is not None:
        shown.insert(0, base.model_copy(update={"name": original, "path": original}))
    part = results.model_copy(update={"models": tuple(shown), "requirements": ()})
    said = [f"- {escaped(finding.text)}" for finding in findings(part) if finding.model in (THIS, None)]
    on = escaped(f"On {results.device}, with {found.engine} in {found.dtype}, seed {results.seed}.")
    return Evaluation((*markdown(part).rstrip().splitlines(), "", *said, "", on), tuple(_figures(results, found)))


def _figures(results: Results, model: ModelResult) -> list[Figure]:
    """The numbers of the Hub's `model-index`."""
    found = []
    if results.text is not None and model.perplexity is not None:
        found.append(Figure(results.text.name, "perplexity", "Perplexity", model.perplexity.token))
    if results.text is not None and model.divergence is not None:
        kl = model.divergence.kl_mean
        found.append(Figure(results.text.name, "kl_divergence", "KL from the original, nats/token", kl))
    for name, task in model.tasks.items():
        found.append(Figure(name, task.metric.partition(",")[0], f"Task {name}, {task.metric}", task.score))
    return found
