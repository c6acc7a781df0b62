"""`llmshrink plan`: what a run needs of this machine and yields, before it starts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag


@runs.with_settings
def plan(
    model: runs.Model,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT", help="Where the run would write; else to this disk.")
    ] = None,
    recipe: runs.RecipeName = "gptq-w4a16",
    bits: runs.Bits = None,
    group_size: runs.GroupSize = None,
    asymmetric: runs.Asymmetric = None,
    method: runs.Method = None,
    kv_cache: runs.KvCacheAs = None,
    repair: runs.Repair = None,
    format: runs.StoredAs = "compressed-tensors",
    measured: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure one block, to tell how long the run takes.")
    ] = True,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Say what a recipe needs for MODEL (memory, disk, time) and what comes out. Exit code 1: it doesn't fit here."""
    from llmshrink import api

    made = api.plan(
        model, output=output, recipe=recipe, bits=bits, group_size=group_size, asymmetric=asymmetric, method=method,
        kv_cache=kv_cache, repair=repair, format=format, measured=measured,
        set=tuple(settings.pop("set_") or ()), **settings,
    )  # fmt: skip
    return runs.show_plan(made, json=json)
