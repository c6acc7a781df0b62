"""A recipe whose last step is `distill`: the model is compressed, and then teaches what came of it."""

from __future__ import annotations

from dataclasses import replace

from llmshrink.checkpoint.source import resolve
from llmshrink.distillation.asked import check_places
from llmshrink.distillation.job import Options
from llmshrink.distillation.made import check_room_for, made, remove, student_folder
from llmshrink.distillation.report import DistillReport
from llmshrink.distillation.room import check_memory
from llmshrink.distillation.run import distill
from llmshrink.errors import RecipeError
from llmshrink.recipe.schema import Recipe
from llmshrink.run import asked
from llmshrink.run.progress import Progress


def compress(options: asked.Options, recipe: Recipe, progress: Progress) -> DistillReport | None:
    """Carry out `recipe`, which the options name: every step into a folder beside the output, the last one into it.

    A run that was stopped goes on in the step where it stood. Raises RecipeError for a recipe that makes no student.
    """
    assert recipe.distill is not None, recipe
    if len(recipe.steps) == 1:
        raise RecipeError(
            [f"{recipe.name}: it only distills: llmshrink distill TEACHER STUDENT --recipe {options.recipe}"]
        )
    student = student_folder(options.output)
    teaching = Options(
        teacher=options.model,
        student=str(student),
        output=options.output,
        recipe=recipe.name,
        data=options.calibration,
        seq_len=options.seq_len,
        bos=options.bos,
        device=options.device,
        seed=options.seed,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
        **recipe.distill.model_dump(),
    )
    check_places(teaching)
    check_room_for(options.output, overwrite=options.overwrite)
    original = resolve(options.model, trust_remote_code=options.trust_remote_code, stream=True)
    check_memory(original, None if recipe.structured else original, device=options.device, quant=None)
    made(replace(options, output=student), progress)
    report = distill(teaching, progress)
    if report is not None and report.ok:
        remove(options.output)
    return report
