"""`llmshrink.eval` and `llmshrink.compare`: the twins of the verbs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

from llmshrink.errors import LlmshrinkError, PathLike
from llmshrink.paths import output_folder

if TYPE_CHECKING:
    from llmshrink_eval.progress import Progress
    from llmshrink_eval.results import Results


class EvalSettings(TypedDict, total=False):
    """The options that both share, as the command line has them; `evaluation.settings.Settings` holds the defaults."""

    text: str | None
    bos: Literal["auto", "always", "never"]
    protocol: Literal["gptq", "sliding"]
    window: int | None
    stride: int | None
    max_tokens: int | None
    tasks: str | Sequence[str] | None
    tasks_dir: PathLike | None
    limit: int | None
    sample: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    engine: Literal["transformers", "vllm"]
    device: str | None
    dtype: str | None
    batch_size: int | None
    offload: bool
    speed: str | Sequence[int] | None
    prompts: Sequence[str] | None
    require: str | None
    seed: int
    cache: PathLike | None
    fresh: bool
    trust_remote_code: bool


def eval(
    model: PathLike,
    *,
    output: PathLike,
    baseline: PathLike | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **settings: Unpack[EvalSettings],
) -> Results:
    """Measure a model, against `baseline` where one is given, and write the report into the folder `output`.

    model, baseline: a Hub id (`id` or `id@revision`), a folder, or "demo". text: a .txt, .jsonl or .parquet file, a
    `datasets` name ("wikitext:wikitext-2-raw-v1:test") or "demo". bos: whether what models read begins with BOS
    ("auto": where the family or the tokenizer needs it). tasks: names of lm-eval's tasks, or "demo".
    Returns what results.json holds; its `requirements` say which conditions of `require` are met. Raises LlmshrinkError
    or llmshrink_eval's EvalError for bad input, EvalFailed when what was measured is no measurement (NaN logits).
    """
    return _evaluate(baseline, [model], output, settings, command, progress)


def compare(
    original: PathLike,
    *models: PathLike,
    output: PathLike,
    command: str | None = None,
    progress: Progress | None = None,
    **settings: Unpack[EvalSettings],
) -> Results:
    """Measure several compressed forms of one model beside it, and write one report over all of them.

    Arguments and errors as in `eval`.
    """
    if not models:
        raise LlmshrinkError("nothing to compare with the original: name at least one compressed model")
    return _evaluate(original, models, output, settings, command, progress)


def _evaluate(
    original: PathLike | None,
    models: Sequence[PathLike],
    output: PathLike,
    settings: EvalSettings,
    command: str | None,
    progress: Progress | None,
) -> Results:
    from llmshrink.evaluation.settings import Settings
    from llmshrink.evaluation.verbs import evaluate

    return evaluate(
        None if original is None else os.fspath(original),
        [os.fspath(model) for model in models],
        output_folder(output),
        Settings(**settings),
        command=command,
        progress=progress,
    )
