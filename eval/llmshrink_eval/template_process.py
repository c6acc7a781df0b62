"""The process that runs chat templates (`template_worker`), as this one sees it: started at first use, kept, started
again where a template ended it, and gone with this one."""

from __future__ import annotations

import atexit
import datetime
import decimal
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmshrink_eval.engines.child import Answering
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.template_worker import OVERDUE, decode, encode

PATIENCE = 600.0
"""Seconds of a clock that an answer may take, whatever else the machine does."""
ATTEMPTS = 2
"""What ended the process may have been somebody else, who is out of memory; and may have been the template."""
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


class TemplateProcess:
    """Asked by any thread, one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Answering | None = None

    def ask(self, question: Question) -> tuple[str, list[tuple[int, int]]]:
        """(the text, what its marks enclose, from a character to another).

        Raises Unsendable, TemplateFailed, or EvalFailed where the process itself doesn't work.
        """
        line = question.line()
        with self._lock:
            try:
                said = self._answer(line, question.seconds)
            except BaseException:  # interrupted: nobody will read what is being written
                self._end()
                raise
        answer = decode(said)
        if "failed" in answer:
            raise TemplateFailed(answer["failed"], deliberate=answer["deliberate"])
        return answer["text"], [(int(start), int(end)) for start, end in answer["marks"]]

    def close(self) -> None:
        """End it; the next question starts it again."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a fork: the process is the parent's, whose threads aren't here to let go of the lock."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.forget()
            self._worker = None

    def _answer(self, line: bytes, seconds: float) -> bytes:
        overdue = f"TimeoutError: it didn't end within {seconds:g} s"
        ended_by = ""
        for _ in range(ATTEMPTS):
            worker = self._started()
            try:
                said = worker.ask(line, PATIENCE)
            except TimeoutError:
                raise TemplateFailed(overdue) from None
            if said is not None:
                return said
            status = worker.wait()
            if status == -OVERDUE:
                raise TemplateFailed(overdue)
            if status >= 0:
                raise EvalFailed(f"the process that runs chat templates ended with status {status}: {worker.last()}")
            ended_by = signal.Signals(-status).name
        raise TemplateFailed(f"{ended_by} ended the process that ran it")

    def _started(self) -> Answering:
        if self._worker is None or self._worker.ended:
            self._end()
            self._worker = Answering("llmshrink_eval.template_worker")
        return self._worker

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def _plain(value: Any) -> str:
    if isinstance(value, _AS_TEXT):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")


PROCESS = TemplateProcess()
"""The one of this Python process."""
atexit.register(PROCESS.close)
os.register_at_fork(after_in_child=PROCESS.forget)
