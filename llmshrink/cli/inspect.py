"""`llmshrink inspect`: what is in a compressed checkpoint, site by site."""

from __future__ import annotations

from typing import Annotated

import typer

from llmshrink.cli.show import JsonFlag, show


def inspect(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that llmshrink wrote.")],
    json: JsonFlag = False,
) -> int:
    """Show what became of each weight.

    Each site's bits, group, bytes and error, and the effective bits of a weight.
    """
    from llmshrink import api

    show(api.inspect(out), as_json=json)
    return 0
