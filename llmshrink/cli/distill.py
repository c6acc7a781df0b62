"""`llmshrink distill`: recover what compression lost, or teach a smaller student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag, show


def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The original: a Hub id, a folder, or `demo`.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.")],
    student: Annotated[
        str | None, typer.Argument(metavar="STUDENT", help="What was made of it, as a folder; or none, and:")
    ] = None,
    student_from: Annotated[
        str | None,
        typer.Option(
            metavar="depth=N,width=N", help="Cut the student from the teacher: blocks, FFN channels that stay."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A recipe of one distill step: a shipped one or a YAML file.")
    ] = "distill-recover",
    data: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .jsonl or .parquet, a `datasets` name, or `demo` (left out: the demo's own for `demo`, else "
            "a public mix)."
        ),
    ] = None,
    bos: runs.Begins = "auto",
    generated_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of text that the teacher writes, beside the data.")
    ] = None,
    mask_prompts: Annotated[
        bool | None,
        typer.Option(
            "--mask-prompts/--no-mask-prompts",
            help="Learn only what the assistant says in conversations and completions (left out: where there are any).",
        ),
    ] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Keep the teacher's outputs there, or find them there.")
    ] = None,
    teacher_cache_tokens: Annotated[
        int | None,
        typer.Option(metavar="K", help="Tokens that it keeps of every position, the rest as one (left out: 64)."),
    ] = None,
    teacher_quant: Annotated[
        Literal["nf4", "int8"] | None, typer.Option(help="Hold the teacher in so few bits (bitsandbytes).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer (600).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in a batch (8).")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window (1024, or the models' limit).")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the text's own cross-entropy in the loss (0).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both models' probabilities (1).")] = None,
    divergence: Annotated[
        Literal["forward_kl", "reverse_kl", "jsd"] | None, typer.Option(help="How they are compared (forward_kl).")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of jsd: the teacher's share of the mixture (0.5).")] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(help="Of the hidden states' distance from the teacher's, in the loss (0).")
    ] = None,
    train: Annotated[
        Literal["weights", "scales"] | None,
        typer.Option(help="What is trained; left out: scales of a quantized student, weights of any other."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of weights (left out: 0.77 over the width).")] = None,
    scale_lr: Annotated[float | None, typer.Option(help="Learning rate of scales, relative to each (0.01).")] = None,
    optim: Annotated[str, typer.Option(help="transformers' name of the optimizer.")] = "adamw_torch",
    warmup: Annotated[int, typer.Option(help="Steps until the learning rate is whole.")] = 20,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations (an eighth of all).")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Computed in: bfloat16 or float32; left out: what this machine is fastest in.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the models' own Python.")] = False,
    push: runs.Push = None,
    private: runs.Private = False,
    yes: runs.Yes = False,
    dry_run: runs.DryRun = False,
    json: JsonFlag = False,
) -> int:
    """Train STUDENT towards TEACHER and write it, in its own format, as OUT."""
    from llmshrink import api
    from llmshrink.api.publishing import check_publishing
    from llmshrink.run.progress import Shown

    settings: dict[str, Any] = {
        "student_from": student_from,
        "output": output,
        "recipe": recipe,
        "data": data,
        "bos": bos,
        "generated_tokens": generated_tokens,
        "teacher_cache": teacher_cache,
        "teacher_cache_tokens": teacher_cache_tokens,
        "teacher_quant": teacher_quant,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "seq_len": seq_len,
        "alpha": alpha,
        "temperature": temperature,
        "divergence": divergence,
        "beta": beta,
        "hidden_weight": hidden_weight,
        "mask_prompts": mask_prompts,
        "train": train,
        "lr": lr,
        "scale_lr": scale_lr,
        "optim": optim,
        "warmup": warmup,
        "eval_steps": eval_steps,
        "gradient_checkpointing": gradient_checkpointing,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        check_publishing(push, private=private, yes=yes)
        return runs.show_plan(api.plan_distill(teacher, student, **settings), json=json)
    with Shown(json=json) as progress:
        report = api.distill(teacher, student, push=push, private=private, yes=yes, progress=progress, **settings)
    if report is None:  # another process speaks
        return 0
    show(report, as_json=json)
    return 0 if report.ok else 1
