"""`llmshrink generate`: a quick look at what a model says."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Literal

import typer

from llmshrink.cli.show import JsonFlag, show


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hub id (owner/name or owner/name@revision), a folder, or `demo`.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to say at most.")] = 64,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...; left out: the fastest that is there.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; left out: what this machine is fastest in.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; above: drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up so much.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put PROMPT into the chat template; left out: where there is one."),
    ] = None,
    bos: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            "--bos",
            help="Whether a prompt outside a chat template begins with BOS; auto: where family or tokenizer need it.",
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own Python here.")
    ] = False,
    json: JsonFlag = False,
) -> int:
    """Let MODEL go on from PROMPT, its weights packed in memory.

    The text goes to stdout as it comes; a line on stderr says how fast it was, and what it took.
    """
    from llmshrink import api

    if json:
        # The document says which device computed, and a program that reads stderr expects errors there.
        logging.getLogger("llmshrink_kernels").setLevel(logging.ERROR)
    said = api.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        bos=bos,
        trust_remote_code=trust_remote_code,
        on_text=None if json else lambda text: print(text, end="", flush=True),
    )
    if json:
        show(said, as_json=True)
    else:
        print(flush=True)
        print("\n".join(said.lines()), file=sys.stderr)
    return 0
