"""`llmshrink compare`: several compressed forms of one model, in one report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmshrink.cli.settings import Output, with_settings
from llmshrink.cli.show import JsonFlag
from llmshrink.cli.watch import command_line, show_results, watching


@with_settings
def compare(
    context: typer.Context,
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="The model that was compressed.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Its compressed forms.")],
    output: Output,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Measure ORIGINAL and every MODEL on the same text and tasks, and write one REPORT over all of them."""
    from llmshrink import api

    with watching(json=json) as progress:
        results = api.compare(
            original, *models, output=output, command=command_line(context), progress=progress, **settings
        )
    return show_results(results, output, as_json=json)
