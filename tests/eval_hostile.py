"""The example evaluation with every text that a user, a model or a data set brings made hostile."""

from __future__ import annotations

from typing import Any

from eval_example import example
from llmshrink_eval.results import Generation, ModelResult, Results, SiteError

EVIL = "</script></style><img src=x onerror=alert(1)>'\"&amp;{{7*7}}$\\frac{1}{0}$|`x`\x1b[31m\x00\ud800 漢字"


def hostile() -> Results:
    """Still a valid evaluation: numbers are as they were."""
    results = example(tasks=3, sites=2)
    return results.model_copy(
        update={
            "models": tuple(_evil(model, index) for index, model in enumerate(results.models)),
            "requirements": tuple(
                requirement.model_copy(update={"model": f"{EVIL}{1 + index // 2}", "condition": EVIL})
                for index, requirement in enumerate(results.requirements)
            ),
            "command": EVIL,
            "settings": {EVIL: [EVIL]},
            "versions": {EVIL: EVIL},
            "device": EVIL,
            "text": results.text and results.text.model_copy(update={"name": EVIL}),
        }
    )


def hostile_samples(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Rows for the flipped items of every task, hostile in names and values."""
    items = {item for model in results.models for task in model.tasks.values() for item in _flipped(task)}
    rows = [{"doc_id": item, EVIL.replace("\ud800", ""): EVIL.replace("\ud800", "")} for item in sorted(items)]
    return {task.samples: rows for model in results.models for task in model.tasks.values() if task.samples}


def _flipped(task: Any) -> tuple[int, ...]:
    return task.versus_original.flipped if task.versus_original else ()


def _evil(model: ModelResult, index: int) -> ModelResult:
    divergence = model.divergence
    if divergence is not None:
        worst = tuple(
            place.model_copy(
                update={
                    "text": EVIL,
                    "actual": EVIL,
                    "original_top": ((EVIL, 0.5), ("b", float("nan"))),
                    "compressed_top": ((EVIL, 7.0),),
                }
            )
            for place in divergence.worst
        )
        divergence = divergence.model_copy(update={"worst": worst})
    return model.model_copy(
        update={
            "name": f"{EVIL}{index}",
            "path": EVIL,
            "engine": EVIL,
            "dtype": EVIL,
            "fingerprint": EVIL,
            "divergence": divergence,
            "tasks": {f"{EVIL}{name}": task.model_copy(update={"metric": EVIL}) for name, task in model.tasks.items()},
            "generations": (Generation(prompt=EVIL, text=EVIL),),
            "site_errors": tuple(
                SiteError(name=f"{site.name}{EVIL}", bits=site.bits, error=site.error) for site in model.site_errors
            ),
        }
    )
