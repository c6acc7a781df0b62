"""All verbs under one name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmshrink import __version__
from llmshrink.cli import (
    bench,
    compare,
    compress,
    convert,
    distill,
    doctor,
    eval,
    generate,
    inspect,
    plan,
    prune,
    push,
    quantize,
    recipes,
    serve,
    verify,
)

app = typer.Typer(
    name="llmshrink",
    help="Make a Hugging Face language model smaller, prove what that cost, and leave a checkpoint that vLLM serves.",
    context_settings={"help_option_names": ["-h", "--help"]},
    # Rich would draw boxes around the help, and take 0.15 s to do it.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llmshrink {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("quantize")(quantize.quantize)
app.command("prune")(prune.prune)
app.command("compress")(compress.compress)
app.command("plan")(plan.plan)
app.command("convert")(convert.convert)
app.command("distill")(distill.distill)
app.command("eval")(eval.eval)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("push")(push.push)
app.command("serve", context_settings=serve.SETTINGS)(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")


def command() -> Any:
    """The parser of the whole command line."""
    return typer.main.get_command(app)
