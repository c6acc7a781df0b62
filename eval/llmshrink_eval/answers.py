"""A model's answers to the requests of tasks, kept as they come, so that an interrupted run goes on where it stopped.

lm-eval hands a model all requests of a kind at once and gets all answers at the end, which may be hours later. Here the
model gets them in stretches of STRETCH, and each finished stretch becomes a line of a file. The stretches are the same
whether or not a run is interrupted, and so are the batches in them and every digit of the answers. A line counts only
for the very requests that it was written for.

Sampled answers are drawn from one stream of random numbers, which can't be entered in the middle: where a request of a
kind samples, that kind is asked as lm-eval would, and kept only by whoever keeps the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmshrink_eval.records import CheckedLines

STRETCH = 512
"""Requests: many batches, so that sorting them by length still saves padding, and minutes of a large model's work."""
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def kept_answers(file: Path) -> int:
    """How many answers an interrupted run has left in this file."""
    return sum(len(line["answers"]) for line in CheckedLines(file).read())


class KeptAnswers:
    """Stands for an `lm_eval.api.model.LM`.

    told: called with the number of answers that were there before. heard: what the model has warned of so far, to which
    is added what it had warned of when it gave those.
    """

    def __init__(self, lm: Any, file: Path, told: Callable[[int], None], heard: list[str]) -> None:
        self._lm, self._told, self._heard = lm, told, heard
        self._lines = CheckedLines(file)
        self._known = {(line["kind"], line["start"]): line for line in self._lines.read()}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._lm, name)
        return partial(self._answered, name, found) if name in KINDS else found

    def _answered(self, kind: str, ask: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        if kind == "generate_until" and any(request.args[1].get("do_sample") for request in requests):
            return ask(requests)
        answers: list[Any] = []
        for start in range(0, len(requests), STRETCH):
            stretch = requests[start : start + STRETCH]
            digest = _digest(stretch)
            known = self._known.get((kind, start))
            if known is not None and known["requests"] == digest:
                answers += map(_as_given, known["answers"])
                self._heard += known["heard"]
                self._told(len(stretch))
                continue
            before = len(self._heard)
            found = ask(stretch)
            line = {"requests": digest, "answers": found, "heard": self._heard[before:]}
            self._lines.append([{"kind": kind, "start": start, **line}])
            answers += found
        return answers


def _digest(requests: Sequence[Any]) -> str:
    said = json.dumps([request.args for request in requests], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _as_given(answer: Any) -> Any:
    """JSON has no tuples: (log-probability, whether greedy)."""
    return tuple(answer) if isinstance(answer, list) else answer
