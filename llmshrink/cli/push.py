"""`llmshrink push`: a finished folder to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from llmshrink.cli.show import JsonFlag, show


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that llmshrink wrote.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; it is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees a repository made now.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="The branch to commit to.")] = "main",
    report: Annotated[
        str | None,
        typer.Option(metavar="REPORT", help="The folder of `llmshrink eval` on DIR, for the model card."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and list what would go; send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Publish what would otherwise be asked about.")] = False,
    json: JsonFlag = False,
) -> int:
    """Publish DIR as OWNER/NAME on the Hub, in one commit. What was interrupted goes on with the same command."""
    from llmshrink import api
    from llmshrink.run.progress import Shown

    with Shown(json=json) as progress:
        found = api.push(
            folder, name, private=private, revision=revision, report=report, dry_run=dry_run, yes=yes, progress=progress
        )
    show(found, as_json=json)
    return 0 if found.ok else 1
