"""What stops an evaluation, as types.

EvalError is bad input: one line that names the value, the limit and the way out; the command line exits with 2.
EvalFailed is a measurement that ran and can't be trusted (NaN logits, an engine that died): it exits with 1.
"""

from __future__ import annotations

import sys
import traceback


class EvalError(ValueError):
    """Bad input: str(error) is one line that a user can act on."""


class EvalFailed(RuntimeError):
    """It ran, and what came out is no measurement: str(error) is one line that says what and where."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library raised, on one line of at most `limit` characters; never empty."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):  # whose message is the key alone
        text = f"it knows no {text}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def panicked(error: BaseException) -> str | None:
    """One line for what Rust's tokenizers library gave up at, which is no Exception of Python's; None for else."""
    if type(error).__module__ != "pyo3_runtime":
        return None
    return (
        f"the tokenizers library can't go on with the model's tokenizer.json ({one_line(error)}); correct it, or "
        "download the file again"
    )


GENERATION = "transformers.generation."


def raised_by_model(error: BaseException) -> str | None:
    """One line for what the code of a model's own class raised, in transformers or in its repository, or what lets it
    generate by its generation_config.json; None for else.

    It is the model's where the innermost code outside torch and Python's own library is: an error in what somebody
    calls from within a model's forward isn't.
    """
    if not isinstance(error, Exception):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(str(frame.f_globals.get("__name__", "")), frame) for frame in frames]
    own = [(name, frame) for name, frame in names if name.partition(".")[0] not in ("torch", *sys.stdlib_module_names)]
    if not own or not own[-1][0].startswith(("transformers.models.", "transformers_modules.", GENERATION)):
        return None
    name, frame = own[-1]
    said = " ".join(str(error).split()).rstrip(".")[:300]
    if name.startswith(GENERATION):
        return (
            f"transformers' own code ({name}, line {frame.f_lineno}) can't generate: {type(error).__name__}: {said}; "
            "the model's generation_config.json or its weights aren't fit for it: correct or download them again"
        )
    return (
        f"the model's own code ({name}, line {frame.f_lineno}) fails: {type(error).__name__}: {said}; its config.json "
        "and its weights don't belong together, or this transformers doesn't suit it: correct or download it again"
    )
