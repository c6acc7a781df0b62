"""The process that runs chat templates (`template_worker`), as this one sees it: what is sent, and what comes back."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmshrink_eval.engines.child import Ended, Kept, decode, encode
from llmshrink_eval.template_worker import OVERDUE

PATIENCE = 600.0
"""Seconds of a clock that an answer may take, whatever else the machine does."""
_AS_TEXT = (bytes, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)
"""What parquet holds and JSON doesn't. A template that writes such a value writes this of it."""


class TemplateFailed(Exception):
    """A template came upon something: what, in a few words. deliberate: its own `raise_exception`."""

    def __init__(self, words: str, *, deliberate: bool = False) -> None:
        super().__init__(words)
        self.deliberate = deliberate


class Unsendable(ValueError):
    """A conversation holds what JSON has no word for: what, in a few words."""


@dataclass(frozen=True)
class Question:
    """What a template is to write, and within which limits.

    special: names of special tokens, and the tokens. how: what else the template is given. date: that it writes,
    YYYY-MM-DD; None for today's. marks: whether what its ``{% generation %}`` encloses is told. seconds: of the
    processor. characters: of the text.
    """

    template: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    special: Mapping[str, str]
    seconds: float
    characters: int
    how: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    marks: bool = False

    def line(self) -> bytes:
        """As `template_worker` reads it. Raises Unsendable."""
        try:
            return encode({**vars(self), "messages": [dict(each) for each in self.messages]}, _plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsendable(" ".join(str(error).split())[:200]) from error


class TemplateProcess(Kept):
    """Kept, to be asked by any thread."""

    def __init__(self) -> None:
        super().__init__("llmshrink_eval.template_worker", "runs chat templates", final=(OVERDUE,))

    def ask(self, question: Question) -> tuple[str, list[tuple[int, int]]]:
        """(the text, what its marks enclose, from a character to another).

        Raises Unsendable, TemplateFailed, or EvalFailed where the process itself doesn't work.
        """
        overdue = f"TimeoutError: it didn't end within {question.seconds:g} s"
        try:
            answer = decode(self.answer(question.line(), PATIENCE))
        except TimeoutError as error:
            raise TemplateFailed(overdue) from error
        except Ended as error:
            words = overdue if error.number == OVERDUE else f"{error} ended the process that ran it"
            raise TemplateFailed(words) from error
        if "failed" in answer:
            raise TemplateFailed(answer["failed"], deliberate=answer["deliberate"])
        return answer["text"], [(int(start), int(end)) for start, end in answer["marks"]]


def _plain(value: Any) -> str:
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


PROCESS = TemplateProcess()
"""The one of this Python process."""
