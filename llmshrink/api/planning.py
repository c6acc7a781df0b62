"""`llmshrink.plan`: what a run would need and yield."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from llmshrink.api.checkpoints import _folder as checkpoint_folder
from llmshrink.api.distillation import RECIPE, RunSettings
from llmshrink.api.distillation import options_of as options_of_distill
from llmshrink.api.runs import StoredSettings, check_format, check_types, options_of
from llmshrink.errors import PathLike
from llmshrink.paths import output_folder

if TYPE_CHECKING:
    from llmshrink.planning.report import Plan

NOWHERE = "llmshrink-output"
"""Stands for an output that isn't named: in the folder at hand, whose disk is then the one that is looked at."""


def plan(
    model: PathLike,
    *,
    recipe: PathLike = "gptq-w4a16",
    output: PathLike | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    asymmetric: bool | None = None,
    method: str | None = None,
    kv_cache: str | None = None,
    repair: bool | None = None,
    verb: Literal["quantize", "prune", "compress"] = "compress",
    measured: bool = True,
    **settings: Unpack[StoredSettings],
) -> Plan:
    """What `quantize`, `prune` or `compress` with these settings needs and yields, before anything is done or written.

    verb: the one whose recipes are taken; compress takes any. measured: time one block, for `seconds`. Everything else
    is as in `compress`. Raises LlmshrinkError for bad input, as the run would.
    """
    from llmshrink.planning.plan import plan as made

    flags = {
        "bits": bits,
        "group_size": group_size,
        "asymmetric": asymmetric,
        "method": method,
        "kv_cache": kv_cache,
        "repair": repair,
    }
    options = options_of(verb, model, NOWHERE if output is None else output, recipe, flags, **settings)
    return made(options, measured=measured)


def plan_distill(
    teacher: PathLike,
    student: PathLike | None = None,
    *,
    output: PathLike,
    recipe: PathLike = RECIPE,
    data: PathLike | None = None,
    teacher_cache: PathLike | None = None,
    **settings: Unpack[RunSettings],
) -> Plan:
    """What `distill` with these settings needs and yields: a step of it is made and measured, and nothing written."""
    from llmshrink.planning.students import plan as made

    return made(
        options_of_distill(
            teacher, student, output=output, recipe=recipe, data=data, teacher_cache=teacher_cache, **settings
        )
    )


def plan_convert(
    path: PathLike,
    *,
    output: PathLike,
    format: Literal["compressed-tensors", "llmshrink"],
    overwrite: bool = False,
) -> Plan:
    """What `convert` with these settings needs and yields; the weights are read once, and nothing is written."""
    check_types(output=output, overwrite=overwrite)
    check_format(format)
    from llmshrink.planning.converting import plan as made

    return made(checkpoint_folder(path), output_folder(output), format, overwrite=overwrite)
