"""Conversations as tokens, and which of those tokens the assistant said.

A student that is to answer needn't learn to write what it is asked. What counts as the assistant's is, in this order,

- what a chat template encloses in ``{% generation %}`` marks;
- of a template without marks: from the end of the text that the template writes for the messages before, with its
  generation prompt, to the end of the turn, its end mark included, white space after that not. Both must be beginnings
  of the whole conversation as the template writes it, or it is refused: some templates write an earlier turn otherwise
  once another follows. A template that knows no generation prompt has the turn begin with its content;
- of a prompt and its completion: the completion, and the end-of-text token after it; of a completion that is a
  conversation, the assistant's turns in it.

A token counts if any of its characters does. That needs a tokenizer that knows where its tokens lie in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from llmshrink.calibration.text import Completion, Document, Messages
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""From a character to another, which isn't in it."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
NO_MASK = "count all of it with --no-mask-prompts"


def is_conversation(document: Document) -> bool:
    """Whether a chat template writes it."""
    return not isinstance(document.prompt if isinstance(document, Completion) else document, str)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Token ids of a text. special: with the marks that the tokenizer puts around a document."""
    encoded = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], name: str, *, special: bool
) -> tuple[list[int], list[bool]]:
    """(ids as `encode` gives them, whether each has a character within one of the spans)."""
    if not tokenizer.is_fast:
        raise CalibrationError(
            f"calibration data {name} has prompts, and this tokenizer doesn't say where its tokens lie in a text; "
            f"{NO_MASK}"
        )
    encoded = tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    counted = [any(start < last and first < end for first, last in spans) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), counted


def encode_conversation(
    document: Messages | Completion, tokenizer: PreTrainedTokenizerBase, name: str, *, masked: bool
) -> tuple[list[int], list[bool]]:
    """(ids, whether each is the assistant's; all are where nothing is masked). Raises CalibrationError."""
    prompt: list[Any] = list(document.prompt) if isinstance(document, Completion) else []
    rest = document.completion if isinstance(document, Completion) else document
    writer = _Writer(tokenizer, name)
    messages = [*prompt, *rest]
    # The template writes the special tokens itself.
    text = writer(messages)
    if not masked:
        ids = encode(tokenizer, text, special=False)
        return ids, [True] * len(ids)
    if GENERATION.search(tokenizer.get_chat_template()):
        ids, counted = writer.marked(messages)
        if prompt:
            after = [(len(writer.beginning(text, prompt, prompts=True)), len(text))]
            within = encode_spans(tokenizer, text, after, name, special=False)[1]
            counted = [both and one for both, one in zip(within, counted, strict=True)]
        return ids, counted
    spans = [
        writer.turn(text, messages, number)
        for number in range(len(prompt), len(messages))
        if messages[number]["role"] == ASSISTANT
    ]
    return encode_spans(tokenizer, text, spans, name, special=False)


class _Writer:
    """A tokenizer's chat template, for the data of a name."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name

    def __call__(self, messages: Messages, **how: Any) -> str:
        """The messages as the template writes them; nothing for none."""
        return str(self._apply(messages, tokenize=False, **how)) if messages else ""

    def marked(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """(ids, whether they are within the template's own marks)."""
        encode_spans(self._tokenizer, "", [], self._name, special=False)
        found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    def turn(self, text: str, messages: Messages, number: int) -> Span:
        """Where in `text`, which is all messages, one of them is."""
        before = messages[:number]
        plain = self(before)
        start = len(self.beginning(text, before, prompts=True)) if before else 0
        end = len(self.beginning(text, messages[: number + 1], prompts=False).rstrip())
        content = messages[number].get("content")
        if start == len(plain) and isinstance(content, str):  # no generation prompt
            start = max(start, text.find(content.strip(), start, end))
        return start, end

    def beginning(self, text: str, messages: Messages, *, prompts: bool) -> str:
        """The first messages as written alone. Raises CalibrationError where `text` doesn't begin so."""
        found = self(messages, add_generation_prompt=prompts)
        if not text.startswith(found):
            raise CalibrationError(
                f"calibration data {self._name}: the chat template writes a turn otherwise when another follows, so "
                f"where the assistant's begin isn't known; mark them in the template ({{% generation %}}), or {NO_MASK}"
            )
        return found

    def _apply(self, messages: Messages, **how: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template([dict(message) for message in messages], **how)
        except TemplateError as error:
            raise CalibrationError(
                f"calibration data {self._name}: the chat template refuses a conversation ({error}); remove it"
            ) from error
