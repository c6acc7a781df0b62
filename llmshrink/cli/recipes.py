"""`llmshrink recipes`: which recipes come along, and what one of them says."""

from __future__ import annotations

from typing import Annotated

import typer

from llmshrink.cli.show import JsonFlag, show_json

app = typer.Typer(help="List the shipped recipes, or show one.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json: JsonFlag = False) -> None:
    """List the shipped recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    from llmshrink import api
    from llmshrink.recipe.read import unreadable

    found = {name: recipe.summary for name, recipe in api.recipes().items()}
    found |= {name: f"can't be read here: {why}" for name, why in unreadable().items()}
    found = dict(sorted(found.items()))
    if json:
        show_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    width = max(map(len, found))
    for name, summary in found.items():
        print(f"{name:{width}}  {summary}")


@app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or a YAML file.")],
    json: JsonFlag = False,
) -> None:
    """Print a recipe with every field, as YAML that `--recipe` reads."""
    from llmshrink.recipe.read import load_recipe, to_yaml

    recipe = load_recipe(name)
    if json:
        show_json(recipe.model_dump(mode="json"))
    else:
        print(to_yaml(recipe), end="")
