"""`llmshrink convert`: a 2:4 checkpoint from one format to the other, exactly."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag, show


def convert(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that llmshrink wrote, pruned 2:4.")],
    output: runs.Output,
    format: Annotated[
        Literal["compressed-tensors", "llmshrink"],
        typer.Option("--format", help="A standard checkpoint, zeros and all; or 2:4 without its zeros."),
    ],
    overwrite: runs.Overwrite = False,
    dry_run: runs.DryRun = False,
    json: JsonFlag = False,
) -> int:
    """Store DIR as OUT in the other format. Every weight stays as it is, and the result is verified."""
    from llmshrink import api

    if dry_run:
        made = api.plan_convert(folder, output=output, format=format, overwrite=overwrite)
        return runs.show_plan(made, json=json)
    report = api.convert(folder, output=output, format=format, overwrite=overwrite)
    show(report, as_json=json)
    return 0 if report.ok else 1
