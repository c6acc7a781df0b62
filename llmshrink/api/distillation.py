"""`llmshrink.distill`: a student taught by the model that it was made from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink.errors import PathLike

if TYPE_CHECKING:
    from llmshrink.distillation.report import DistillReport
    from llmshrink.run.progress import Progress


def distill(
    teacher: PathLike,
    student: PathLike | None = None,
    *,
    output: PathLike,
    data: PathLike | None = None,
    teacher_cache: PathLike | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> DistillReport | None:
    """Train `student` towards `teacher` on `data`, and write it in its own format as `output`.

    Under a launcher such as torchrun every process calls it, and the first has the report; the others get None.
    """
    from llmshrink.distillation.job import Options
    from llmshrink.distillation.run import distill as run
    from llmshrink.run.progress import Silent

    options = Options(
        teacher=os.fspath(teacher),
        student=None if student is None else os.fspath(student),
        output=Path(output),
        data=None if data is None else os.fspath(data),
        teacher_cache=None if teacher_cache is None else Path(teacher_cache),
        **settings,
    )
    return run(options, progress or Silent())
