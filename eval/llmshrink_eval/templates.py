"""Chat templates: a model's own program that writes a conversation as text, and whose fault it is when it fails.

A template comes with the model, and a conversation with the data; either may be at fault. It's the template's where it
can't be compiled, where the one that is needed isn't there, or where it fails on the plainest conversation; else it's
the conversation's, as where its roles don't alternate.

A template may also never end, or write without end: it has `SECONDS`, and `MOST_CHARACTERS`.

Some templates write today's date. What is calibrated or measured today must be the same tomorrow, so the date is
`DATE`, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from llmshrink_eval.overtime import at_most

SECONDS = 10.0
"""That a template may take for one conversation; usual ones take a thousandth of a second."""
MOST_CHARACTERS = 64_000_000
"""That it may write."""
DATE = "2026-01-01"
PLAINEST = ({"role": "user", "content": "Hello."},)
ASKS_DATE = "strftime_now"
"""The function by which a template asks for the date."""


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
        raise TemplateFault(f"the model's chat template can't be read ({_words(error)}); correct it") from error


def date_arguments(template: str) -> dict[str, Any]:
    """What a template is given so that its date is `DATE`; nothing for one that doesn't ask."""
    return {ASKS_DATE: _fixed_date} if ASKS_DATE in template else {}


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
    template = template_of(tokenizer, tools)
    given = how if today else date_arguments(template) | how
    try:
        return _written(tokenizer, messages, tools, given)
    except Exception as error:  # whatever the template's program comes upon
        raise whose_fault(tokenizer, error, tools=tools, **given) from error


def chat_marks(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """(the text, what of it the template's ``{% generation %}`` marks enclose, from a character to another).

    Raises TemplateFault or Refused.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_of(tokenizer, tools)
    dated = date_arguments(template)
    try:
        with at_most(SECONDS):
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **dated},
            )
        text = _bounded(str(rendered[0][0]))
    except Exception as error:  # as in chat_text
        raise whose_fault(tokenizer, error, tools=tools, **dated) from error
    return text, [(int(start), int(end)) for start, end in rendered[1][0]]


def whose_fault(
    tokenizer: Any, error: Exception, *, tools: Sequence[Any] | None = None, **how: Any
) -> TemplateFault | Refused:
    """What is to be raised for an exception of the template."""
    import jinja2

    deliberate = type(error) is jinja2.TemplateError  # its own raise_exception
    if not deliberate:
        try:
            _written(tokenizer, PLAINEST, tools, how)
        except Exception as plain:  # as in chat_text
            if type(plain) is not jinja2.TemplateError:
                return TemplateFault(
                    f"the model's chat template fails on any conversation ({_words(plain)}); correct it in the "
                    "tokenizer's files (chat_template.jinja, or chat_template in tokenizer_config.json)"
                )
    return Refused(f"the chat template refuses it ({_words(error)})")


def _written(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, how: Mapping[str, Any]
) -> str:
    with at_most(SECONDS):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=list(tools) if tools else None, tokenize=False, **how
        )
    return _bounded(str(text))


def _bounded(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise OverflowError(f"it writes {len(text):,} characters, and {MOST_CHARACTERS:,} are the most")
    return text


def _fixed_date(format: str) -> str:
    return datetime.fromisoformat(DATE).strftime(format)


def _words(error: BaseException) -> str:
    import jinja2

    said = " ".join(str(error).split())[:200] or type(error).__name__
    return said if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {said}"
