"""`llmshrink compress`: whatever a recipe says, in one run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag


@runs.with_settings
def compress(
    model: runs.Model,
    output: runs.Output,
    recipe: Annotated[str, typer.Option("--recipe", help="A shipped recipe (`llmshrink recipes`) or a YAML file.")],
    bits: runs.Bits = None,
    group_size: runs.GroupSize = None,
    asymmetric: runs.Asymmetric = None,
    method: runs.Method = None,
    kv_cache: runs.KvCacheAs = None,
    repair: runs.Repair = None,
    format: runs.StoredAs = "compressed-tensors",
    dry_run: runs.DryRun = False,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Carry out a recipe on MODEL, into OUT. A run that was stopped goes on when the same command is given again."""
    from llmshrink import api

    return runs.carry_out(
        api.compress,
        model,
        output=output,
        recipe=recipe,
        bits=bits,
        group_size=group_size,
        asymmetric=asymmetric,
        method=method,
        kv_cache=kv_cache,
        repair=repair,
        format=format,
        dry_run=dry_run,
        json=json,
        **settings,
    )
