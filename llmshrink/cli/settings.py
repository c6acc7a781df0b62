"""The options that `eval` and `compare` share, declared once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llmshrink.cli.sharing import sharing

Output = Annotated[
    str, typer.Option("--output", "-o", metavar="REPORT", help="The folder for results.json, table.md, report.html.")
]
Text = Annotated[
    str | None,
    typer.Option(
        help="A .txt (one document), .jsonl or .parquet file, a `datasets` name as wikitext:wikitext-2-raw-v1:test, or"
        " `demo`."
    ),
]
Begins = Annotated[
    Literal["auto", "always", "never"],
    typer.Option("--bos", help="Whether each window begins with BOS; auto: where family or tokenizer need it."),
]
Protocol = Annotated[
    Literal["gptq", "sliding"],
    typer.Option(help="gptq: windows that don't overlap, as in the paper; sliding: each token once, more context."),
]
Window = Annotated[int | None, typer.Option(min=2, help="Tokens in a window (2048, or the model's limit).")]
Stride = Annotated[int | None, typer.Option(min=1, help="sliding: tokens from window to window (half a window).")]
MaxTokens = Annotated[int | None, typer.Option(min=2, help="Read no more of the text than its first so many tokens.")]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks of lm-eval by name, comma-separated; `demo` for those of the demo language.")
]
TasksDir = Annotated[
    str | None, typer.Option(help="A folder with tasks of your own, in lm-eval's YAML. Python that they name is run.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task (its first ones); left out: all.")]
Sample = Annotated[int | None, typer.Option(min=1, help="Items of each task, drawn from all by --seed.")]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples in the prompt, instead of the task's own number.")
]
ChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Ask as in a chat.")]
Engine = Annotated[Literal["transformers", "vllm"], typer.Option(help="What runs the model; vllm in its own process.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; left out: the fastest that is there.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (the model's own on a GPU; a CPU takes float32).")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences in a forward; left out: chosen by their length.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Stream the weights from disk, a layer at a time: little memory, more time.")
]
Speed = Annotated[
    str | None, typer.Option(metavar="SIZES", help="Batch sizes to time prefill and decode at (1,8); or `none`.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Show what each model says to this. Repeatable; else the text's.")
]
Require = Annotated[
    str | None, typer.Option(help="Conditions, as 'recovery>=0.98,kl<=0.02': exit code 1 when one isn't met.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the bootstrap, of few-shot examples and of --sample.")]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="FOLDER", help="Where measurements are kept and found again (~/.cache/llmshrink/eval)."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure everything anew, whatever the cache holds.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own Python here.")
]


def settings(
    text: Text = None,
    bos: Begins = "auto",
    protocol: Protocol = "gptq",
    window: Window = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    sample: Sample = None,
    num_fewshot: NumFewshot = None,
    apply_chat_template: ChatTemplate = False,
    engine: Engine = "transformers",
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    offload: Offload = False,
    speed: Speed = None,
    prompts: Prompts = None,
    require: Require = None,
    seed: Seed = 0,
    cache: CacheFolder = None,
    fresh: Fresh = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Never called: its signature is what `with_settings` gives a verb."""


with_settings = sharing(settings)
