"""`llmshrink.quantize`, `llmshrink.prune` and `llmshrink.compress`: the twins of the verbs that write a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from llmshrink.api.publishing import and_push
from llmshrink.errors import LlmshrinkError, PathLike
from llmshrink.limits import check_numbers
from llmshrink.paths import expanded, output_folder

if TYPE_CHECKING:
    from llmshrink.distillation.report import DistillReport
    from llmshrink.run.asked import Options
    from llmshrink.run.progress import Progress
    from llmshrink.run.report import QuantizeReport


_KINDS: tuple[tuple[tuple[type, ...], str, tuple[str, ...]], ...] = (
    ((str, os.PathLike), "a path or a name", ("model", "output", "recipe", "calibration", "work_dir")),
    ((int,), "a whole number", ("samples", "seq_len", "batch_size", "seed", "serve_tp")),
    ((str,), "text", ("method", "kv_cache", "device", "dtype", "bos")),
    ((bool,), "True or False", ("asymmetric", "repair", "overwrite", "trust_remote_code", "strict", "verify")),
)
CHECKED_LATER = ("set", "max_shard_size", "progress", "bits", "group_size", "format", "push", "private", "yes")
LARGEST_SHARD = 2**63 - 1
"""Bytes: what a file system counts to."""
FORMATS = ("compressed-tensors", "llmshrink")
_NEEDED = ("model", "output", "recipe", "bos", "seed", "serve_tp", "overwrite", "trust_remote_code", "strict", "verify")


class RunSettings(TypedDict, total=False):
    """What all three take, as the command line has it; `quantize` shows the defaults."""

    calibration: PathLike | None
    samples: int | None
    seq_len: int | None
    bos: Literal["auto", "always", "never"]
    set: str | Sequence[str]
    device: str | None
    dtype: str | None
    batch_size: int | None
    seed: int
    work_dir: PathLike | None
    overwrite: bool
    max_shard_size: str | int
    trust_remote_code: bool
    serve_tp: int
    strict: bool
    verify: bool
    push: str | None
    private: bool
    yes: bool
    progress: Progress | None


class StoredSettings(RunSettings, total=False):
    """What those take that can prune."""

    format: Literal["compressed-tensors", "llmshrink"]


def quantize(
    model: PathLike,
    *,
    output: PathLike,
    recipe: PathLike = "gptq-w4a16",
    calibration: PathLike | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    bits: int | None = None,
    group_size: int | None = None,
    asymmetric: bool | None = None,
    method: str | None = None,
    kv_cache: str | None = None,
    set: str | Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    work_dir: PathLike | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False,
    serve_tp: int = 1,
    strict: bool = False,
    verify: bool = True,
    push: str | None = None,
    private: bool = False,
    yes: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a model into a checkpoint that transformers loads and vLLM serves.

    model: a Hub id (`id` or `id@revision`), a folder, or "demo". output: the folder to make; it appears only whole.
    recipe: a shipped name or a YAML file; bits, group_size, asymmetric, method, kv_cache ("fp8" or "none") and set
    ("steps.0.quantize.bits=3", or several such) change it. calibration: a text (.txt, .jsonl, .parquet), a `datasets`
    name, "demo", or None for the default mix; samples windows of seq_len tokens of it are used (256 x 2048, or the
    model's limit), each beginning with BOS where the family or the tokenizer needs it (bos: "auto"). push: the Hub's
    repository ("owner/name") that the result goes to at the end, as `llmshrink.push` does it; private and yes as there.
    A run that was killed goes on where it stood when it is called again. Returns the closing summary; its `ok` is False
    when the checkpoint didn't verify, and is no output then, or didn't get to the Hub. Raises LlmshrinkError for bad
    input.
    """
    flags = {
        "bits": bits,
        "group_size": group_size,
        "asymmetric": asymmetric,
        "method": method,
        "kv_cache": kv_cache,
    }
    return _run(
        "quantize",
        model,
        output,
        recipe,
        flags,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        bos=bos,
        set=set,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        seed=seed,
        work_dir=work_dir,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        serve_tp=serve_tp,
        strict=strict,
        verify=verify,
        push=push,
        private=private,
        yes=yes,
        progress=progress,
    )


def prune(
    model: PathLike,
    *,
    output: PathLike,
    recipe: PathLike = "alps-2of4",
    repair: bool | None = None,
    **settings: Unpack[StoredSettings],
) -> QuantizeReport:
    """Prune a model: half of its weights become zero, or blocks or channels go, and the others make that good.

    recipe: a shipped name or a YAML file that prunes and doesn't quantize; `depth-prune` and `width-prune` leave a
    plain smaller model. repair: least squares on what is kept, instead of the recipe's choice. format:
    "compressed-tensors" stores the zeros, in a checkpoint that everything loads; "llmshrink" leaves those of 2:4 out
    (docs/formats-sparse24.md). Everything else is as in `quantize`. Raises LlmshrinkError for bad input.
    """
    return _run("prune", model, output, recipe, {"repair": repair}, **settings)


def compress(
    model: PathLike,
    *,
    output: PathLike,
    recipe: PathLike,
    bits: int | None = None,
    group_size: int | None = None,
    asymmetric: bool | None = None,
    method: str | None = None,
    kv_cache: str | None = None,
    repair: bool | None = None,
    **settings: Unpack[StoredSettings],
) -> QuantizeReport | DistillReport | None:
    """Carry out any recipe: quantize, prune, or both in one visit of each weight; and teach the result, if it says so.

    Everything is as in `quantize` and `prune`, and the report of a recipe that ends with `distill` as in `distill`.
    Raises LlmshrinkError for bad input.
    """
    from llmshrink.recipe.read import load_recipe
    from llmshrink.run.progress import Silent
    from llmshrink.run.quantize import quantize as run

    flags = {
        "bits": bits,
        "group_size": group_size,
        "asymmetric": asymmetric,
        "method": method,
        "kv_cache": kv_cache,
        "repair": repair,
    }
    options = options_of("compress", model, output, recipe, flags, **settings)
    progress = settings.get("progress") or Silent()
    asked = load_recipe(options.recipe, flags=options.flags or {}, sets=options.sets)

    def carry_out() -> QuantizeReport | DistillReport | None:
        if asked.distill is None:
            return run(options, progress)
        from llmshrink.distillation.compress import compress as then_teach

        return then_teach(options, asked, progress)

    return and_push(
        carry_out,
        options.output,
        options.model,
        (options.calibration, options.work_dir),
        settings.get("push"),
        private=settings.get("private", False),
        yes=settings.get("yes", False),
        progress=progress,
    )


def _run(
    verb: Literal["quantize", "prune"],
    model: PathLike,
    output: PathLike,
    recipe: PathLike,
    flags: Mapping[str, object],
    **settings: Unpack[StoredSettings],
) -> QuantizeReport:
    from llmshrink.run.progress import Silent
    from llmshrink.run.quantize import quantize as run

    options = options_of(verb, model, output, recipe, flags, **settings)
    progress = settings.get("progress") or Silent()
    return and_push(
        lambda: run(options, progress),
        options.output,
        options.model,
        (options.calibration, options.work_dir),
        settings.get("push"),
        private=settings.get("private", False),
        yes=settings.get("yes", False),
        progress=progress,
    )


def options_of(
    verb: Literal["quantize", "prune", "compress"],
    model: PathLike,
    output: PathLike,
    recipe: PathLike,
    flags: Mapping[str, object],
    **settings: Unpack[StoredSettings],
) -> Options:
    """What a run is asked for, checked one by one. Raises LlmshrinkError."""
    from llmshrink.run.asked import Options

    typed = {name: value for name, value in {**settings, **flags}.items() if name not in CHECKED_LATER}
    check_types(model=model, output=output, recipe=recipe, **typed)
    check_format(settings.get("format", FORMATS[0]))
    check_numbers(settings)
    asymmetric = flags.get("asymmetric")
    changes = {name: value for name, value in flags.items() if name != "asymmetric"}
    changes["symmetric"] = None if asymmetric is None else not asymmetric
    calibration, work_dir = settings.get("calibration"), settings.get("work_dir")
    return Options(
        model=os.fspath(model),
        output=output_folder(output),
        verb=verb,
        recipe=os.fspath(recipe),
        calibration=None if calibration is None else os.fspath(calibration),
        samples=settings.get("samples"),
        seq_len=settings.get("seq_len"),
        bos=settings.get("bos", "auto"),
        flags=changes,
        sets=_assignments(settings.get("set", ())),
        device=settings.get("device"),
        dtype=settings.get("dtype"),
        batch_size=settings.get("batch_size"),
        seed=settings.get("seed", 0),
        work_dir=None if work_dir is None else expanded(work_dir),
        overwrite=settings.get("overwrite", False),
        max_shard_size=parse_size(settings.get("max_shard_size", "5GB")),
        trust_remote_code=settings.get("trust_remote_code", False),
        serve_tp=settings.get("serve_tp", 1),
        strict=settings.get("strict", False),
        verify=settings.get("verify", True),
        format=settings.get("format", "compressed-tensors"),
    )


def check_types(**given: object) -> None:
    """Raise LlmshrinkError for the first argument that is of another type than its name says; None is left out."""
    for name, value in given.items():
        types, wanted = next(kind for kind in _KINDS if name in kind[2])[:2]
        optional = name not in _NEEDED
        # To Python True is a whole number; to a user it isn't.
        if (value is None and optional) or (isinstance(value, types) and isinstance(value, bool) == (types == (bool,))):
            continue
        raise LlmshrinkError(f"{name}={value!r}: not {wanted}; pass one{' or None' if optional else ''}")


def check_format(format: object) -> None:
    """Raise LlmshrinkError for a format that there isn't."""
    if format not in FORMATS:
        raise LlmshrinkError(f"--format {format}: not a format; choose {' or '.join(FORMATS)}")


def _assignments(given: str | Sequence[str]) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given)
    wrong = next((each for each in found if not isinstance(each, str)), None)
    if wrong is not None:
        raise LlmshrinkError(f"set={wrong!r}: not text; pass for example 'steps.0.quantize.bits=3', or a list of such")
    return found


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number. Raises LlmshrinkError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise LlmshrinkError(f"--max-shard-size {text}: not a size; for example 5GB or 500MB")
    size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")
    if size > LARGEST_SHARD:
        raise LlmshrinkError(f"--max-shard-size {text!s:.40}: no file is as large; for example 5GB or 500MB")
    return int(size)
