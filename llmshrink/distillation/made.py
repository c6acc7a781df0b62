"""The student that a run makes itself, in a folder beside its output, before it teaches it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from llmshrink_eval.bounded import read_json

from llmshrink.errors import LlmshrinkError
from llmshrink.run.asked import Options
from llmshrink.run.job import prepare
from llmshrink.run.output import RECORD, beside, check_output, partial_folder
from llmshrink.run.progress import Progress
from llmshrink.run.quantize import quantize
from llmshrink.run.report import QuantizeReport


def student_folder(output: Path) -> Path:
    """Where a student lies until it is taught."""
    return beside(output, ".student")


def check_room_for(output: Path, *, overwrite: bool) -> None:
    """Raise OutputError where the taught student couldn't be put in the end, unless a run into it has begun."""
    if not partial_folder(Path(os.path.abspath(output))).exists():
        check_output(output, overwrite=overwrite)


def made(options: Options, progress: Progress) -> QuantizeReport | None:
    """Carry the options out, or find that an earlier run did: then None. A run that was stopped goes on."""
    record = options.output / RECORD
    if record.is_file():
        try:
            there = read_json(record)["identity"]
        except (OSError, ValueError, KeyError, TypeError):  # a damaged record is no student's: it is made again
            there = None
        if there == json.loads(json.dumps(prepare(options).identity())):
            progress.note(f"student     {options.output} is there, from an earlier run of this command")
            return None
    report = quantize(replace(options, overwrite=True), progress)
    if not report.ok:
        raise LlmshrinkError(f"{options.output}: doesn't read back as it was computed; check the disk and run again")
    return report


def remove(output: Path) -> None:
    """Remove the student of a run that is done."""
    shutil.rmtree(student_folder(output))
