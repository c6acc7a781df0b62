"""`llmshrink eval`: what a model is worth, and what compression cost it, in one report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmshrink.cli.settings import Output, with_settings
from llmshrink.cli.show import JsonFlag
from llmshrink.cli.watch import command_line, show_results, watching


@with_settings
def eval(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hub id (owner/name or owner/name@revision), a folder, or `demo`.")
    ],
    output: Output,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The model to compare with, token by token and item by item."),
    ] = None,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Measure MODEL, against ORIGINAL where one is given, and write REPORT.

    A run that was interrupted goes on when the same command is given again; what was measured before comes from the
    cache, and is said to.
    """
    from llmshrink import api

    with watching(json=json) as progress:
        results = api.eval(
            model, output=output, baseline=baseline, command=command_line(context), progress=progress, **settings
        )
    return show_results(results, output, as_json=json)
