"""What was asked of a run, and the part of it that can be judged before any file is opened.

`run.job` decides what becomes of it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from llmshrink_eval.beginning import Bos
from llmshrink_eval.refused import refused

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source
from llmshrink.errors import LlmshrinkError, OutputError, PathLike, RecipeError
from llmshrink.formats.stored import Format
from llmshrink.paths import expanded, holds
from llmshrink.recipe.schema import Recipe
from llmshrink.run.arithmetic import Arithmetic, automatic
from llmshrink.run.output import partial_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What a user asked for; the names are those of `llmshrink.quantize`. verb: which recipes it takes."""

    model: str
    output: Path
    verb: Literal["quantize", "prune", "compress"] = "quantize"
    recipe: str = "gptq-w4a16"
    calibration: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    bos: Bos = "auto"
    flags: Mapping[str, object] | None = None
    sets: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    seed: int = 0
    work_dir: Path | None = None
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000
    trust_remote_code: bool = False
    serve_tp: int = 1
    strict: bool = False
    verify: bool = True
    format: Format = "compressed-tensors"


def check_verb(verb: str, recipe: Recipe) -> None:
    """Raise RecipeError when a verb is given a recipe that does something else, or more."""
    prunes = recipe.prune is not None or recipe.structured
    steps = (("prune", prunes), ("quantize", recipe.quantize), ("distill", recipe.distill))
    does = [step for step, asked in steps if asked]
    if verb != "compress" and does != [verb]:
        proper = "compress" if len(does) > 1 else does[0]
        raise RecipeError([f"{recipe.name}: it would {' and '.join(does)}: use llmshrink {proper} for it"])


def check_apart(output: Path, reads: Iterable[tuple[str, PathLike | None]]) -> None:
    """Raise OutputError where OUT, which a run replaces as a whole under --overwrite, is or holds what it reads.

    reads: what it is called, and its path, where it is one: names of the Hub's are no paths.
    """
    for what, name in reads:
        path = None if name is None or name == "demo" else expanded(name)
        if path is None or not path.exists():
            continue
        for folder in (output, partial_folder(output)):
            if holds(folder, path):
                how = "is" if folder.samefile(path) else "holds"
                raise OutputError(f"output {folder} {how} {what} {name}, which is read; choose another folder with -o")


def check_work_dir(folder: Path | None) -> None:
    """Raise OutputError when activations couldn't be spilled to `folder`; what is made there to see goes at once."""
    if folder is None:
        return
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))  # permissions don't bind root, nor say that /proc takes no folder
    except OSError as error:
        raise OutputError(
            f"--work-dir {folder}: {place} isn't a folder that can be written to: {refused(error, 'name another')}"
        ) from error


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the first CUDA device, or the CPU. Raises LlmshrinkError when it isn't there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    last = torch.cuda.device_count() - 1 if device.type == "cuda" else 0
    if device.index is not None and device.index > last:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        found = torch.cuda.device_count()
        raise LlmshrinkError(
            f"--device {name}: not a device here (cpu, or one of {found} cuda devices); leave it out to choose"
        )
    return device


def pick_arithmetic(name: str | None, stored: torch.dtype, device: torch.device, *, int4: bool = False) -> Arithmetic:
    """What is computed in: as asked for, else as `arithmetic.automatic` decides. stored: the dtype of most weights."""
    if name is None or name == "auto":
        return automatic(dtype_name(stored), device.type, int4=int4)
    if name not in DTYPES:
        raise LlmshrinkError(f"--dtype {name}: choose one of {', '.join(DTYPES)}, or auto")
    return Arithmetic(name, "as asked for")


def dtype_name(dtype: torch.dtype) -> str:
    """As options and config.json spell it."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(index: CheckpointIndex) -> torch.dtype:
    """The dtype of most of the checkpoint's bytes."""
    sizes: dict[torch.dtype, int] = {}
    for key in index:
        entry = index.entry(key)
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def check_vocabulary(windows: TokenWindows, vocab_size: int, source: Source) -> None:
    """Raise LlmshrinkError when the tokenizer makes tokens that the model has no embedding for."""
    largest = int(windows.input_ids[windows.mask].max())
    if largest >= vocab_size:
        raise LlmshrinkError(
            f"{source.name}: its tokenizer makes token {largest}, its embedding has {vocab_size} rows; "
            "the tokenizer isn't this model's: copy the right one there"
        )
