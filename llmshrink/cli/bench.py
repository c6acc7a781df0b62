"""`llmshrink bench`: how fast the kernels are on the device at hand, beside others."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llmshrink.cli.show import JsonFlag, show_json

app = typer.Typer(help="Benchmarks that print ratios against peers and limits of the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `kernels` a verb of its own while it is the only one."""


@app.command("kernels")
def kernels(
    output: Annotated[str, typer.Option("-o", "--output", help="A folder for the results (JSON and a roofline).")],
    shapes: Annotated[
        str, typer.Option(help="Comma-separated: llama3-8b, llama3-70b, or KxN of your own (4096x14336).")
    ] = "llama3-8b,llama3-70b",
    rows: Annotated[str | None, typer.Option(help="Comma-separated rows of x; 1 to 4096 if left out.")] = None,
    only: Annotated[
        str | None, typer.Option(help='Comma-separated contenders ("llmshrink W4,cuBLAS"); all if left out.')
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Of x and y.")] = "bfloat16",
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64, 128 or 256.")] = 128,
    tune: Annotated[
        bool, typer.Option("--tune", help="First search the fastest configurations; they are kept in the user's cache.")
    ] = False,
    json: JsonFlag = False,
) -> int:
    """Time the matmul kernels and the solver's, each held to float64 first.

    Beside cuBLAS, PyTorch's int4 product, and gemlite and Humming if they are installed. Needs a CUDA device.
    """
    from llmshrink import api
    from llmshrink.errors import LlmshrinkError

    try:
        counts = None if rows is None else [int(part) for part in rows.split(",")]
    except ValueError:
        raise LlmshrinkError(f"--rows {rows}: comma-separated whole numbers are expected (1,16,256)") from None
    content = api.bench_kernels(
        output=output,
        shapes=[part.strip() for part in shapes.split(",")],
        rows=counts,
        only=None if only is None else [part.strip() for part in only.split(",")],
        dtype=dtype,
        group_size=group_size,
        tune=tune,
        say=None if json else lambda text: print(text, flush=True),
    )
    if json:
        show_json(content)
    else:
        print(f"results: {content['path']}")
    return 0
