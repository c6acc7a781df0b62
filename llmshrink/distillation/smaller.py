"""`--student-from depth=4,width=512`: a smaller student, cut from the teacher by the pruning recipes.

It is made by the runs that `llmshrink prune --recipe depth-prune` and `width-prune` are, on the text that the student
is then taught with, in a folder beside the output that goes when the output is there.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.beginning import Bos

from llmshrink.distillation.made import made, student_folder
from llmshrink.errors import LlmshrinkError
from llmshrink.model.families import family_of
from llmshrink.run.asked import Options
from llmshrink.run.progress import Progress

SAMPLES = 128


@dataclass(frozen=True)
class Smaller:
    """depth: blocks that stay; width: channels of the FFN that stay. None: as many as the teacher's."""

    depth: int | None
    width: int | None

    @classmethod
    def of(cls, text: str) -> Smaller:
        """From "depth=4", "width=512" or both with a comma. Raises LlmshrinkError."""
        found: dict[str, int] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(depth|width)\s*=\s*([1-9]\d*)\s*", part)
            if match is None or match[1] in found:
                raise LlmshrinkError(
                    f"--student-from {text}: not depth=N (blocks that stay), width=N (FFN channels that stay) or both "
                    "with a comma"
                )
            found[match[1]] = int(match[2])
        return cls(found.get("depth"), found.get("width"))

    def recipes(self, config: Any) -> list[tuple[str, str]]:
        """(recipe, its setting) of each run, for a teacher's config. Raises LlmshrinkError for a number it hasn't."""
        text = config.get_text_config()
        found = []
        for name, wanted, field in (
            ("depth", self.depth, "num_hidden_layers"),
            ("width", self.width, family_of(text.model_type).channels_field),
        ):
            has = getattr(text, field, None)
            if wanted is None:
                continue
            if not isinstance(has, int) or not 0 < wanted < has:
                raise LlmshrinkError(
                    f"--student-from {name}={wanted}: the teacher has {has}; give 1 to {(has or 1) - 1}"
                )
            setting = f"steps.0.depth.drop={has - wanted}" if name == "depth" else f"steps.0.width.channels={wanted}"
            found.append((f"{name}-prune", setting))
        return found


def make_student(
    smaller: Smaller, config: Any, teacher: str, output: Path, *, data: str | None, samples: int, seq_len: int,
    seed: int, bos: Bos, device: str | None, trust_remote_code: bool, progress: Progress,
) -> None:  # fmt: skip
    """Cut the teacher, into the folder of `output`'s student. samples: windows that the text has; SAMPLES are read."""
    model, folders = teacher, []
    runs = smaller.recipes(config)
    for number, (recipe, setting) in enumerate(runs):
        target = student_folder(output)
        folders.append(target if number == len(runs) - 1 else target.with_name(target.name + "-1"))
        progress.note(f"student     {recipe} {setting}")
        options = Options(
            model=model, output=folders[-1], verb="prune", recipe=recipe, sets=(setting,), calibration=data,
            samples=min(samples, SAMPLES), seq_len=seq_len, seed=seed, bos=bos, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        made(options, progress)
        model = str(folders[-1])
    for folder in folders[:-1]:
        shutil.rmtree(folder)
