"""`llmshrink.distill`: a student taught by the model that it was made from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from llmshrink.api.publishing import and_push
from llmshrink.errors import PathLike, RecipeError
from llmshrink.paths import expanded, output_folder

if TYPE_CHECKING:
    from llmshrink.distillation.job import Options
    from llmshrink.distillation.report import DistillReport
    from llmshrink.run.progress import Progress

RECIPE = "distill-recover"


class DistillSettings(TypedDict, total=False):
    """What a distill step of a recipe says too; None is what the recipe says."""

    steps: int | None
    batch_size: int | None
    generated_tokens: int | None
    alpha: float | None
    temperature: float | None
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None
    beta: float | None
    hidden_weight: float | None
    mask_prompts: bool | None
    train: Literal["weights", "scales"] | None
    lr: float | None
    scale_lr: float | None


class RunSettings(DistillSettings, total=False):
    """And what is this run's own."""

    student_from: str | None
    teacher_cache_tokens: int | None
    bos: Literal["auto", "always", "never"]
    accumulate: int
    seq_len: int | None
    optim: str
    warmup: int
    eval_steps: int | None
    teacher_quant: Literal["nf4", "int8"] | None
    gradient_checkpointing: bool
    device: str | None
    dtype: str | None
    seed: int
    overwrite: bool
    trust_remote_code: bool


def distill(
    teacher: PathLike,
    student: PathLike | None = None,
    *,
    output: PathLike,
    recipe: PathLike = RECIPE,
    data: PathLike | None = None,
    teacher_cache: PathLike | None = None,
    push: str | None = None,
    private: bool = False,
    yes: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[RunSettings],
) -> DistillReport | None:
    """Train `student` towards `teacher` on `data`, and write it in its own format as `output`.

    recipe: a shipped name or a YAML file of one step, `distill`; settings change it (what they do:
    docs/distillation.md). push, private, yes: as in `llmshrink.quantize`. Under a launcher such as torchrun every
    process calls it, and the first has the report; the others get None. Raises LlmshrinkError for bad input.
    """
    from llmshrink.distillation.run import distill as run
    from llmshrink.run.progress import Silent

    options = options_of(
        teacher, student, output=output, recipe=recipe, data=data, teacher_cache=teacher_cache, **settings
    )
    shown = progress or Silent()
    return and_push(
        lambda: run(options, shown),
        options.output,
        str(teacher if student is None else student),
        (teacher, data, teacher_cache),
        push,
        private=private,
        yes=yes,
        progress=shown,
    )


def options_of(
    teacher: PathLike,
    student: PathLike | None,
    *,
    output: PathLike,
    recipe: PathLike,
    data: PathLike | None,
    teacher_cache: PathLike | None,
    **settings: Unpack[RunSettings],
) -> Options:
    """What a distillation is asked for: the recipe's step, and what is set beside it."""
    from llmshrink.distillation.job import Options
    from llmshrink.recipe.read import load_recipe

    step = load_recipe(recipe)
    if step.distill is None or len(step.steps) > 1:
        raise RecipeError([f"{step.name}: it doesn't distill alone: use llmshrink compress for it"])
    given = {name: value for name, value in settings.items() if value is not None}
    fields: dict[str, object] = {**step.distill.model_dump(), **given}
    return Options(
        teacher=os.fspath(teacher),
        student=None if student is None else os.fspath(student),
        output=output_folder(output),
        data=None if data is None else os.fspath(data),
        teacher_cache=None if teacher_cache is None else expanded(teacher_cache),
        **fields,  # type: ignore[arg-type]
    )
