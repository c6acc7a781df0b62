"""`llmshrink verify`: does a compressed checkpoint, reloaded, still say what it said when it was made?"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llmshrink.cli.show import JsonFlag, show


def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that llmshrink wrote.")],
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(
            help="transformers: against the run's held-out logits; vllm: the real engine against transformers."
        ),
    ] = "transformers",
    json: JsonFlag = False,
) -> int:
    """Reload OUT and compare.

    Exits with 1, naming the worst prompt, when it is further off than the stated tolerance; and when weights, the
    record or the seal aren't what the run wrote, by their checksums, or weights were added. Other files that were
    changed or added since are named.
    """
    from llmshrink import api

    report = api.verify(out, engine=engine)
    show(report, as_json=json)
    return 0 if report.ok else 1
