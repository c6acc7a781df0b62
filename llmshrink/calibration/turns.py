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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from llmshrink_eval.prefix import characters_for, tokenize_beginning
from llmshrink_eval.template_worker import ASKS_DATE
from llmshrink_eval.templates import TemplateFault, chat_marks, chat_text, template_of

from llmshrink.calibration.records import Completion, Document, Messages, Record
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


def encode_beginning(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[Span] | None,
    name: str,
    wanted: int,
    *,
    special: bool,
) -> tuple[list[int], list[bool], bool]:
    """(the text's first `wanted` ids, whether each has a character within one of the spans, whether these are all).

    spans: None where every token counts. Of a long text only a prefix is tokenized.
    """

    def columns(prefix: str) -> tuple[list[Any], ...]:
        if spans is None:
            ids = encode(tokenizer, prefix, special=special)
            return ids, [True] * len(ids)
        return encode_spans(tokenizer, prefix, spans, name, special=special)

    found = tokenize_beginning(
        lambda length: (text[:length], length >= len(text)), columns, wanted, characters_for(wanted)
    )
    return found.columns[0], found.columns[1], found.complete


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


def encode_conversation(record: Record, writer: Writer, wanted: int, *, masked: bool) -> tuple[list[int], list[bool]]:
    """(the first `wanted` ids of a conversation, whether each is the assistant's; all are where nothing is masked).

    Raises CalibrationError where all of the data can't be used, `Refused` where this record can't.
    """
    document = record.document
    assert document is not None and not isinstance(document, str)
    prompt: list[Any] = list(document.prompt) if isinstance(document, Completion) else []
    rest = document.completion if isinstance(document, Completion) else document
    messages = [*prompt, *rest]
    if not messages:
        return [], []
    text, spans = writer.spans(messages, prompt) if masked else (writer(messages), None)
    # The template writes the special tokens itself.
    return encode_beginning(writer.tokenizer, text, spans, writer.name, wanted, special=False)[:2]


class Writer:
    """A tokenizer's chat template, for the data of a name and the tools of one record."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tokenizer, self.name, self._tools = tokenizer, name, tools
        try:
            self._template = template_of(tokenizer, tools)
        except TemplateFault as error:
            raise self._fault(error) from error

    @property
    def dated(self) -> bool:
        """Whether the template asks for the date."""
        return ASKS_DATE in self._template

    @property
    def writes_tools(self) -> bool:
        """Whether the template knows of tools."""
        return "tools" in self._template

    def __call__(self, messages: Messages, **how: Any) -> str:
        """The messages as the template writes them; nothing for none."""
        if not messages:
            return ""
        try:
            return chat_text(self.tokenizer, messages, tools=self._tools, **how)
        except TemplateFault as error:
            raise self._fault(error) from error

    def spans(self, messages: Messages, prompt: Messages) -> tuple[str, list[Span]]:
        """(the messages as written, what of it the assistant says after the prompt)."""
        if GENERATION.search(self._template):
            try:
                text, marks = chat_marks(self.tokenizer, messages, tools=self._tools)
            except TemplateFault as error:
                raise self._fault(error) from error
            after = len(self.beginning(text, prompt, prompts=True)) if prompt else 0
            return text, [(max(start, after), end) for start, end in marks if end > after]
        text = self(messages)
        turns = [n for n in range(len(prompt), len(messages)) if messages[n]["role"] == ASSISTANT]
        return text, [self.turn(text, messages, number) for number in turns]

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
                f"calibration data {self.name}: the chat template writes a turn otherwise when another follows, so "
                f"where the assistant's begin isn't known; mark them in the template ({{% generation %}}), or {NO_MASK}"
            )
        return found

    def _fault(self, error: TemplateFault) -> CalibrationError:
        return CalibrationError(f"calibration data {self.name} has messages, and {error}; or give text")
