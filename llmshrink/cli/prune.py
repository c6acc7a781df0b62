"""`llmshrink prune`: a model in; out the same one with zeros in it, or with fewer blocks or channels."""

from __future__ import annotations

from typing import Any

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag


@runs.with_settings
def prune(
    model: runs.Model,
    output: runs.Output,
    recipe: runs.RecipeName = "alps-2of4",
    repair: runs.Repair = None,
    format: runs.StoredAs = "compressed-tensors",
    dry_run: runs.DryRun = False,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Prune MODEL's weights, widths or blocks into OUT. A run that was stopped goes on with the same command."""
    from llmshrink import api

    return runs.carry_out(
        api.prune,
        model,
        output=output,
        recipe=recipe,
        repair=repair,
        format=format,
        dry_run=dry_run,
        json=json,
        **settings,
    )
