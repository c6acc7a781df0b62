"""Runs chat templates, which come with a model, in a process that they can't leave, fill or hold up.

`python -m llmshrink_eval.template_worker` answers each line of its standard input, written by `template_process`, with
one on its standard output, until the input ends. Both are JSON objects. A question has template, messages, tools (or
null), special (token names and tokens), how (what else the template is given), date (that it writes, or null: today's),
marks (whether `{% generation %}` is told), seconds and characters (the limits). An answer has text and marks
([[start, end], ...] in characters), or failed (in a few words) and deliberate (whether by `raise_exception`).

Memory is bounded by the system, and so is time: of the processor, which a busy machine doesn't shorten. Whatever a
template does in one step of C, as a power of a huge number, the signal ends the process. An orphan ends too, at the end
of its input or by that signal. (PR_SET_PDEATHSIG would end it with the thread that started it.)
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from llmshrink_eval.engines.child import bound_memory, decode, encode
from llmshrink_eval.leftout import LONE_SURROGATE

MEMORY = 2 << 30
"""Bytes that a template may take, beyond what this process has when it starts."""
OVERDUE = signal.SIGPROF
"""What ends the process after the seconds that it has for a question: setitimer(2) sends it, and it is fatal."""
LONGEST = 200
"""Characters of what an error says."""
ASKS_DATE = "strftime_now"
"""The function by which a template asks for the date."""


def dated(date: str) -> dict[str, Any]:
    """What a template is given so that its date is another than today's. date: YYYY-MM-DD."""
    return {ASKS_DATE: lambda format: datetime.fromisoformat(date).strftime(format)}


def in_words(error: Exception) -> str:
    """What a template came upon, on one line."""
    import jinja2

    # A template may say anything, and what it says is written into records.
    said = " ".join(str(error).encode(errors="backslashreplace").decode().split())[:LONGEST] or type(error).__name__
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"


def is_deliberate(error: Exception) -> bool:
    """Whether the template raised it by its `raise_exception`."""
    import jinja2

    return type(error) is jinja2.TemplateError


def check_text(text: str, most: int) -> None:
    """Raise OverflowError for a text of more characters, ValueError for one that no tokenizer takes."""
    if len(text) > most:
        raise OverflowError(f"it writes {len(text):,} characters, and {most:,} are the most")
    if not text.isascii() and LONE_SURROGATE.search(text):
        raise ValueError("it writes half of a surrogate pair, which is no character")


def main() -> None:
    """Import, then answer until the input ends."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    def written(question: dict[str, Any]) -> dict[str, Any]:
        date = question["date"]
        rendered: Any = render_jinja_template(
            conversations=[question["messages"]],
            tools=question["tools"],
            chat_template=question["template"],
            return_assistant_tokens_mask=question["marks"],
            **{**question["special"], **({} if date is None else dated(date)), **question["how"]},
        )
        (text,), marks = rendered
        check_text(text, question["characters"])
        return {"text": text, "marks": marks[0] if question["marks"] else []}

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bound_memory(MEMORY)
    for line in sys.stdin.buffer:
        try:
            question = decode(line)
            signal.setitimer(signal.ITIMER_PROF, question["seconds"])
            answer = encode(written(question))
        except Exception as error:  # whatever the template's program comes upon
            answer = encode({"failed": in_words(error), "deliberate": is_deliberate(error)})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        left = memoryview(answer)
        try:
            while left:
                left = left[os.write(out, left) :]
        except BrokenPipeError:  # nobody reads any more
            return


if __name__ == "__main__":
    main()
