"""Chat templates: a model's own program that writes a conversation as text, and whose fault it is when it fails.

A template comes with the model, and a conversation with the data; either may be at fault. It's the template's where it
can't be compiled, where the one that is needed isn't there, or where it fails on the plainest conversation; else it's
the conversation's, as where its roles don't alternate.

A template is run in a process of its own (`template_process`), since it may never end, write without end, or end the
process: it has `SECONDS`, `MOST_CHARACTERS`, and the memory that `template_worker` states. A tokenizer whose class
writes conversations by code of its own, as one of `--trust-remote-code` or Mistral's does, is asked in this process:
that code isn't a template, and was trusted when the tokenizer was made.

Some templates write today's date. What is calibrated or measured today must be the same tomorrow, so the date is
`DATE`, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmshrink_eval.template_process import PROCESS, Question, TemplateFailed, Unsendable
from llmshrink_eval.template_worker import ASKS_DATE, check_text, dated, in_words, is_deliberate

SECONDS = 10.0
"""Of the processor, that a template may take for one conversation; usual ones take a thousandth of a second."""
MOST_CHARACTERS = 64_000_000
"""That it may write."""
DATE = "2026-01-01"
PLAINEST = ({"role": "user", "content": "Hello."},)


class TemplateFault(ValueError):
    """The model's template can't be used, in one line."""


class Refused(ValueError):
    """The template refuses this conversation, in a few words."""


def template_of(tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """The source of the template that writes conversations, with tools or without. Raises TemplateFault."""
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))
    except Exception as error:  # a tokenizer may bring code of its own
        named = getattr(tokenizer, "chat_template", None)
        if isinstance(named, dict):
            raise TemplateFault(
                f"the model's tokenizer has chat templates named {', '.join(sorted(named))} and none named default, "
                "which is the one for plain conversations; call one of them that in the tokenizer's files"
            ) from error
        if not named:
            raise TemplateFault("the model's tokenizer has no chat template") from error
        raise TemplateFault(f"the model's chat template can't be read ({in_words(error)}); correct it") from error


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    today: bool = False,
    **how: Any,
) -> str:
    """A conversation as the template writes it. today: with today's date instead of `DATE`. how: what
    `apply_chat_template` takes. Raises TemplateFault or Refused."""
    return _written(tokenizer, messages, tools, None if today else DATE, how)[0]


def chat_marks(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """(the text, what of it the template's ``{% generation %}`` marks enclose, from a character to another).

    Raises TemplateFault or Refused.
    """
    return _written(tokenizer, messages, tools, DATE, {}, marks=True)


def _written(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    date: str | None,
    how: Mapping[str, Any],
    *,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    template = template_of(tokenizer, tools)

    def run(conversation: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        found = rendered(conversation)
        if not found[0].strip():
            raise TemplateFailed("it writes nothing")
        return found

    def rendered(conversation: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        if not marks and _has_code_of_its_own(tokenizer):
            return _by_its_code(tokenizer, template, conversation, tools, date, how), []
        special = tokenizer.special_tokens_map
        given = list(tools) if tools else None
        return PROCESS.ask(
            Question(template, conversation, given, special, SECONDS, MOST_CHARACTERS, how, date, marks=marks)
        )

    try:
        return run(messages)
    except Unsendable as error:
        raise Refused(f"it holds what no chat template is given ({error})") from error
    except TemplateFailed as error:
        if not error.deliberate:
            try:
                run(PLAINEST)
            except TemplateFailed as plain:
                if not plain.deliberate:
                    raise TemplateFault(
                        f"the model's chat template fails on any conversation ({plain}); correct it in the "
                        "tokenizer's files (chat_template.jinja, or chat_template in tokenizer_config.json)"
                    ) from error
        raise Refused(f"the chat template refuses it ({error})") from error


def _has_code_of_its_own(tokenizer: Any) -> bool:
    """Whether its class writes conversations otherwise than transformers' tokenizers do."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _by_its_code(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    date: str | None,
    how: Mapping[str, Any],
) -> str:
    given = {**(dated(date) if date is not None and ASKS_DATE in template else {}), **how}
    try:
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=list(tools) if tools else None, tokenize=False, **given
            )
        )
        check_text(text, MOST_CHARACTERS)
    except Exception as error:  # whatever that code comes upon
        raise TemplateFailed(in_words(error), deliberate=is_deliberate(error)) from error
    return text
