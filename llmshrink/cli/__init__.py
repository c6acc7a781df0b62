"""The command line: parse, call the Python twin, print. Each verb is a file; this one is the frame around them.

Exit codes: 0 done; 1 ran and fell short; 2 bad input, one line for each fault alone on stderr; 130 interrupted and 143
terminated, with the line that goes on. Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

# What explains an error is here before there is one: none can be imported when no more files may be opened.
from llmshrink_eval.errors import EvalError, EvalFailed, panicked, raised_by_model

from llmshrink.cli.stopping import (
    INTERRUPTED,
    PROGRAM,
    Signals,
    leave_with,
    reader_left,
    say_last,
    say_stopped,
    usage_error,
)
from llmshrink.cli.system import is_refusal, refusal
from llmshrink.errors import LlmshrinkError, RecipeError


def main() -> None:
    """The entry point of the installed command: runs on sys.argv and exits with the code."""
    from llmshrink.cli.surroundings import open_closed_streams, speak_utf8

    open_closed_streams()
    speak_utf8()
    code = run(sys.argv[1:])
    leave_with(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line (without the program's name); returns the exit code. Never raises for bad input."""
    _hush_libraries()
    with Signals() as signals:
        try:
            result = _carry_out(arguments)
            # The parser makes 130 of a KeyboardInterrupt; no verb of ours returns it.
            if result != INTERRUPTED:
                return result
            signals.ignore()
            return say_stopped(arguments, signals.exit_code or INTERRUPTED)
        except BaseException as error:
            if not isinstance(error, Exception | KeyboardInterrupt) and panicked(error) is None:
                raise
            signals.ignore()
            # A library that was being imported may have swallowed the interrupt, and failed of what it left half-done.
            code = (
                _explain(error, arguments) if signals.exit_code is None else say_stopped(arguments, signals.exit_code)
            )
            if code is None:
                raise
            return code


def _carry_out(arguments: Sequence[str]) -> int:
    from llmshrink.cli.app import command
    from llmshrink.cli.surroundings import settle

    settle()

    # obj: what a verb finds as the root's `obj`, the command line as it was given.
    result = command().main(list(arguments), prog_name=PROGRAM, standalone_mode=False, obj=tuple(arguments))
    sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _explain(error: BaseException, arguments: Sequence[str]) -> int | None:
    """Say what a user did, or what befell the run, and return the exit code; None for what only a bug can do."""
    import typer

    if isinstance(error, RecipeError):
        return _refuse(*error.faults)
    if isinstance(error, LlmshrinkError | EvalError):
        return _refuse(str(error))
    if isinstance(error, EvalFailed):
        _refuse(str(error))
        return 1
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return say_stopped(arguments, INTERRUPTED)
    if isinstance(error, BrokenPipeError) and reader_left():
        return 1
    if isinstance(error, OSError) and is_refusal(error):
        line, code = refusal(error, arguments)
        _refuse(line)
        return code
    if isinstance(error, usage_error()):
        return _refuse(_usage_line(error))
    said = panicked(error) or raised_by_model(error)
    return None if said is None else _refuse(said)


def _refuse(*lines: str) -> int:
    for line in lines:
        say_last(f"{PROGRAM}: error: {' '.join(line.split())}")
    return 2


def _usage_line(error: BaseException) -> str:
    format_message = getattr(error, "format_message", None)
    message = str(format_message() if format_message else error).strip().rstrip(".")
    message = message.replace("Value error, ", "").replace("Input should be", "should be").partition(", unable to")[0]
    value = _refused_value(error)
    if value is not None and repr(value) not in message:
        message = message.replace("': ", f"': {value!r} ", 1)
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", PROGRAM)
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"


def _refused_value(error: BaseException) -> object:
    """What was given for an option, where the parser's own message only says what should have been."""
    cause = error.__cause__ or error.__context__
    faults = getattr(cause, "errors", None)
    found = faults() if callable(faults) else []
    return found[0].get("input") if found else None


def _hush_libraries() -> None:
    """Keep other libraries' chatter off stderr, where an error stands alone; the user's own settings win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
