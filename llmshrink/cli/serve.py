"""`llmshrink serve`: a checkpoint behind vLLM's HTTP server, after a check that it can be."""

from __future__ import annotations

from typing import Annotated

import typer

from llmshrink.cli.stopping import say_last

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that aren't ours are vLLM's."""


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint's folder.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let other machines ask, by --host, without an --api-key.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, say what would be started, and start nothing.")
    ] = False,
) -> int:
    """Serve DIR with vLLM, its OpenAI-compatible API on --host and --port.

    First checks that this vLLM can serve it on this device, and says why not otherwise (exit code 2). Further options
    are vLLM's own and follow DIR: llmshrink serve DIR --max-model-len 4096 --dtype float16. Ctrl-C stops the server; a
    second one kills it. The exit code is the server's.
    """
    from llmshrink import api
    from llmshrink.errors import LlmshrinkError

    if checkpoint.startswith("-"):
        raise LlmshrinkError(f"{checkpoint}: the checkpoint's folder comes first, then vLLM's options")

    def say(line: str) -> None:
        print(line, flush=True)

    status = api.serve(
        checkpoint,
        host=host,
        port=port,
        options=context.args,
        allow_anonymous=allow_anonymous,
        dry_run=dry_run,
        say=say,
    )
    if status:
        say_last(f"llmshrink: vLLM ended with exit code {status}")
    return status
