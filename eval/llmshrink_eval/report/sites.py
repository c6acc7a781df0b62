"""Names of layers as places: `model.layers.3.self_attn.q_proj` is the kind `self_attn.q_proj` in block 3."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llmshrink_eval.results import ModelResult, SiteError


@dataclass(frozen=True)
class Panel:
    """The errors of one kind of layer. models: for each model its (block, error), by block. axis: what the first is."""

    kind: str
    axis: str
    models: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class SiteRow:
    """One layer through all models; None where a model left it as it is."""

    name: str
    cells: tuple[SiteError | None, ...]


def place(name: str) -> tuple[int | None, str]:
    """The block's number and the kind; further numbers, as of experts, become `*`. No number: (None, name)."""
    parts = name.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return None, ".".join(parts)
    return int(parts[first]), ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def panels(models: Sequence[Sequence[SiteError]]) -> list[Panel]:
    """One for each kind that any model has errors of, in the order of the layers.

    Several layers of a kind in one block (experts) count as their mean. Errors of 0 can't stand on a logarithmic axis.
    """
    gathered: dict[str, list[dict[int, list[float]]]] = {}
    numbered = False
    for index, sites in enumerate(models):
        for order, site in enumerate(sites):
            if site.error is None or not site.error > 0:
                continue
            block, kind = place(site.name)
            numbered = numbered or block is not None
            kind = kind if block is not None else "other layers"
            per_model = gathered.setdefault(kind, [defaultdict(list) for _ in models])
            per_model[index][order if block is None else block].append(site.error)
    last = [kind.rsplit(".", 1)[-1] for kind in gathered]
    return [
        Panel(
            short if last.count(short) == 1 else kind,
            "block" if numbered else "layer",
            tuple(tuple((at, sum(errors) / len(errors)) for at, errors in sorted(one.items())) for one in per_model),
        )
        for (kind, per_model), short in zip(gathered.items(), last, strict=True)
    ]


def rows(models: Sequence[ModelResult]) -> list[SiteRow]:
    """Every layer that any of the models names, in order."""
    by_name = [{site.name: site for site in model.site_errors} for model in models]
    names = dict.fromkeys(name for sites in by_name for name in sites)
    return [SiteRow(name, tuple(sites.get(name) for sites in by_name)) for name in names]
