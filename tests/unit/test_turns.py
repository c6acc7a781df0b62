"""Which tokens are the assistant's, in every kind of record and template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import given

from llmshrink.calibration.text import Completion, Document
from llmshrink.calibration.tokens import TokenWindows, build_windows
from llmshrink.demo import tokenizer
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
PROMPTED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}(thought) {% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [said("user", "Once there"), said("assistant", "was Mira."), said("user", "Long ago"), said("assistant", "Once")]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return tokenizer.build(512)


def windows(words: Any, items: list[Any], mask: bool | None = True, **more: Any) -> TokenWindows:
    found: list[Document] = items
    shape: dict[str, Any] = {"samples": 1, "seq_len": 64, "held_out": 0, "seed": 0, **more}
    return build_windows(given(found), words, mask_prompts=mask, **shape)[0]


def heard(words: Any, found: TokenWindows, row: int = 0) -> list[str]:
    """The runs of tokens that count, without the space that a first word's token begins with."""
    assert found.said is not None
    runs: list[list[int]] = []
    for number, token in enumerate(found.input_ids[row].tolist()):
        if found.said[row, number] and number and found.said[row, number - 1] and runs:
            runs[-1].append(token)
        elif found.said[row, number]:
            runs.append([token])
    return [words.decode(run).strip() for run in runs]


@pytest.mark.parametrize("template", [PLAIN, PROMPTED, MARKED])
def test_the_assistants_turns_count_and_nothing_else_does(template: str, words: PreTrainedTokenizerFast) -> None:
    words.chat_template = template
    found = windows(words, [TALK])
    assert heard(words, found) == ["was Mira.<|end|>", "Once<|end|>"]
    assert not (found.said & ~found.mask).any()  # type: ignore[operator]
    assert torch.equal(found.input_ids, windows(words, [TALK], mask=False).input_ids)
    assert found.tokens > int(found.labels.sum()) == int(found.said.sum())  # type: ignore[union-attr]


@pytest.mark.parametrize("template", [PLAIN, PROMPTED, MARKED])
def test_of_a_completion_only_its_own_turns_count(template: str, words: PreTrainedTokenizerFast) -> None:
    words.chat_template = template
    assert heard(words, windows(words, [Completion(TALK[:3], TALK[3:])])) == ["Once<|end|>"]
    assert heard(words, windows(words, [Completion(TALK[:1], TALK[1:])])) == ["was Mira.<|end|>", "Once<|end|>"]


def test_a_conversation_may_begin_with_the_assistant(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = PLAIN
    assert heard(words, windows(words, [TALK[1:]])) == ["was Mira.<|end|>", "Once<|end|>"]


def test_packed_prompts_count_nowhere_and_windows_of_nothing_else_are_left_out(words: PreTrainedTokenizerFast) -> None:
    pairs = [Completion("Once there was ", "Mira."), Completion("Long ago " * 12, "there was"), Completion("Once", "")]
    whole = windows(words, pairs, mask=False, samples=5, seq_len=8, fewer=True)
    found = windows(words, pairs, samples=5, seq_len=8, fewer=True)
    assert found.said is not None
    assert len(found.input_ids) < len(whole.input_ids) and found.labels.any(1).all()
    assert heard(words, found)[0] == "Mira.<|end|>"
    text = "".join(heard(words, found, row)[0] for row in range(1, len(found.input_ids)))
    assert "Long" not in text and "there was<|end|>".endswith(text[-8:])


def test_a_completion_without_a_mask_is_a_text(words: PreTrainedTokenizerFast) -> None:
    shape: dict[str, Any] = {"mask": False, "seq_len": 8, "fewer": True}
    pair = windows(words, [Completion("Once there was ", "Mira there")] * 4, **shape)
    text = windows(words, ["Once there was Mira there"] * 4, **shape)
    assert pair.fingerprint == text.fingerprint and pair.said is None


def test_the_default_masks_what_has_turns_and_the_fingerprint_says_so(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = PLAIN
    assert windows(words, ["Once there was Mira"] * 9, mask=None, seq_len=8).said is None
    masked, whole, default = (windows(words, [TALK], mask=mask) for mask in (True, False, None))
    assert masked.fingerprint == default.fingerprint != whole.fingerprint
    assert whole.said is None


@pytest.mark.parametrize(
    ("items", "template", "says"),
    [
        (["Once"], PLAIN, "--mask-prompts: calibration data given has no turns"),
        (
            [Completion("Once", "there"), "text"],
            PLAIN,
            "1 of 2 records was left out: record 2 is a text among others that are each a prompt with its completion",
        ),
        ([TALK], FORGETFUL, "writes a turn otherwise .* --no-mask-prompts"),
        ([TALK[:1]], PLAIN, "in none of its 1 windows of 64 tokens is a token the assistant's"),
        ([Completion("Once there was " * 40, "x")], PLAIN, r"in none of its 1 windows of 64 tokens .* --seq-len"),
        ([], PLAIN, "is empty"),
    ],
)
def test_what_cannot_be_masked_is_refused(
    items: list[Any], template: str, says: str, words: PreTrainedTokenizerFast
) -> None:
    words.chat_template = template
    with pytest.raises(CalibrationError, match=says) as caught:
        windows(words, items)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_knows_no_places_is_refused(
    words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(words), "is_fast", False)
    for items, template in (([Completion("Once", "there")], PLAIN), ([TALK], MARKED), ([TALK], PLAIN)):
        words.chat_template = template
        with pytest.raises(CalibrationError, match="doesn't say where its tokens lie"):
            windows(words, items)
