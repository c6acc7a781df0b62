"""Chat templates: the date that they write, and whose fault it is when one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import given
from hypothesis import given as given_of
from hypothesis import settings
from hypothesis import strategies as st
from llmshrink_eval import templates
from llmshrink_eval.templates import DATE, Refused, TemplateFault, chat_marks, chat_text

from llmshrink.calibration.text import Record
from llmshrink.calibration.tokens import TokenWindows, build_windows
from llmshrink.demo import tokenizer
from llmshrink.errors import CalibrationError, LlmshrinkError
from llmshrink.runtime.generate import encode as prompt_ids

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
DATED = "{{ strftime_now('%Y-%m-%d') }} " + PLAIN
TOOLED = "{% if tools %}TOOLS {% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + PLAIN
ADDING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}<|end|>{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
ONE_STEP = "{{ 3 ** 300000000 }}"
TALK = [{"role": "user", "content": "Once"}]
CALLS = [{"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}]
TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.fixture
def words() -> Any:
    return tokenizer.build(512)


def windows(words: Any, items: list[Any], template: Any = PLAIN, **more: Any) -> TokenWindows:
    words.chat_template = template
    shape: dict[str, Any] = {"samples": 1, "seq_len": 64, "held_out": 0, "seed": 0, **more}
    return build_windows(given(items), words, **shape)[0]


@pytest.mark.parametrize("mask", [False, True])
def test_the_date_is_the_same_every_day_and_recorded(mask: bool, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [*TALK, {"role": "assistant", "content": "there"}]
    found = windows(words, [talk], DATED, mask_prompts=mask)
    assert words.decode(found.input_ids[0]).startswith(f"{DATE} user: Once")
    assert found.reading.date == DATE
    assert windows(words, [talk], PLAIN).reading.date is None
    # Somebody who talks with the model now is told today's.
    words.chat_template = DATED
    assert DATE not in words.decode(prompt_ids(words, "Once", chat=True, name="m")[0])


def test_a_record_that_the_template_refuses_is_left_out(words: Any) -> None:
    for template in (ADDING, "{{ messages[0]['content'] + '' }} and more than that"):
        found = windows(words, [CALLS, TALK, CALLS, TALK], template, samples=2)
        assert len(found.input_ids) == 2
        left = found.reading.left_out
        assert (left.count, left.named[0].startswith("record 1 can't be written: the chat template refuses it (")) == (
            1 if left.read == 2 else 2,
            True,
        )
    assert found.reading.notes("given")[0].startswith("given: 2 of 4 records were left out: record 1 can't be written")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in %}", r"the model's chat template fails on any conversation \(.*; correct it"),
        ("{{ messages[0].content | unknown }}", r"fails on any conversation \(No filter named 'unknown'"),
        ("{{ messages[0].content + 1 }}", r"fails on any conversation \(TypeError: can only concatenate str"),
        ("   ", r"fails on any conversation \(it writes nothing\)"),
        ("{{ never() }}", r"fails on any conversation \('never' is undefined\)"),
        ("{{ 1 // 0 }}", r"fails on any conversation \(ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", r"fails on any conversation \(access to attribute '__class__'.* is unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails on any conversation \(RecursionError"),
        ("{{ 'a' * 10 ** 15 }}", r"fails on any conversation \(MemoryError"),
        (
            "{{ 'a' * 2000 }}",
            r"fails on any conversation \(OverflowError: it writes 2,000 characters, and 1,000 are",
        ),
        ("{{ 'a'.center(6000000000) }}", r"fails on any conversation \(MemoryError"),
        (ENDLESS, r"fails on any conversation \(TimeoutError: it didn't end within 0.2 s"),
        (ONE_STEP, r"fails on any conversation \(TimeoutError: it didn't end within 0.2 s"),
        (
            {"tool_use": PLAIN, "rag": PLAIN},
            "the model's tokenizer has chat templates named rag, tool_use and none named default",
        ),
    ],
)
def test_a_template_that_writes_nothing_is_the_models_fault(
    template: Any, says: str, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template in (ENDLESS, ONE_STEP):
        monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "MOST_CHARACTERS", 1000)
    with pytest.raises(
        CalibrationError, match=f"calibration data given has messages, and .*{says}.*or give text"
    ) as one:
        windows(words, [TALK], template)
    with pytest.raises(LlmshrinkError, match=says) as other:
        prompt_ids(words, "Once", chat=True, name="m")
    with pytest.raises(TemplateFault, match=says):
        chat_text(words, TALK)
    assert "\n" not in str(one.value) + str(other.value)


def test_a_conversation_on_which_a_template_never_ends_is_left_out(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    template = "{% if messages[0].content == 'Twice' %}" + ENDLESS + "{% endif %}" + PLAIN
    found = windows(words, [[{"role": "user", "content": "Twice"}], TALK], template)
    (named,) = found.reading.left_out.named
    assert named.startswith("record 1 can't be written: the chat template refuses it (TimeoutError: it didn't end")
    words.chat_template = template
    with pytest.raises(Refused, match="TimeoutError"):
        chat_marks(words, [{"role": "user", "content": "Twice"}])


PIECES = (
    *("messages", "messages[0]", "messages[0].content", "messages[9].role", "none", "1", "0", "'a'", "[]", "{}"),
    *("bos_token", "tools", "range(9)", "namespace(a=1)", "strftime_now('%d')", "strftime_now(1)", "cycler()"),
    *("'a'.center(6000000000)", "3 ** 300000000", "'a' * 3000000000", "('%9999999999d' % 1)"),
)
JOINS = (" + ", " * ", " / ", " % ", " ~ ", " in ", " < ", "[", ".", " ** ", " and ")


FRAMES = (
    "{{{{ {} }}}}",
    "{{{{ {} | tojson }}}}",
    "{{% set a = {} %}}",
    "{{% for m in {} %}}{{{{ m.a }}}}{{% endfor %}}",
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4),
    st.lists(st.sampled_from(JOINS), min_size=3, max_size=3),
    st.sampled_from(FRAMES),
)
def test_whatever_a_template_does_is_one_line(pieces: list[str], joins: list[str], frame: str) -> None:
    words = tokenizer.build(512)
    program = pieces[0] + "".join(join + piece for join, piece in zip(joins, pieces[1:], strict=False))
    words.chat_template = frame.format(program)
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "SECONDS", 0.2)
        try:
            chat_text(words, TALK)
        except (TemplateFault, Refused) as error:
            said = str(error)
    assert "\n" not in said


HALF = "it writes half of a surrogate pair, which is no character"
WRITES_HALF = "{{ messages[0].content }}{{ '\\ud800' }}"


def test_half_a_surrogate_pair_is_no_text_of_a_template(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words.chat_template = WRITES_HALF
    for run in (chat_text, chat_marks):
        with pytest.raises(TemplateFault, match=f"fails on any conversation .*{HALF}"):
            run(words, TALK)
    with pytest.raises(CalibrationError, match=HALF):
        windows(words, [TALK], WRITES_HALF)
    with pytest.raises(LlmshrinkError, match=f"{HALF}.*or give --no-chat"):
        prompt_ids(words, "Once", chat=True, name="m")
    # Of one conversation, it is that one's.
    words.chat_template = PLAIN + "{% if messages[0].content == 'Once' %}{{ '\\udfff' }}{% endif %}"
    with pytest.raises(Refused, match=HALF):
        chat_text(words, TALK)
    words.chat_template = "{{ raise_exception('no \\ud800') }}"
    with pytest.raises(Refused, match=r"no \\ud800"):
        chat_text(words, TALK)

    def own(*_: Any, **__: Any) -> str:
        return "\ud800"

    monkeypatch.setattr(type(words), "apply_chat_template", own)
    with pytest.raises(TemplateFault, match=HALF):
        chat_text(words, TALK)


def test_a_template_of_its_own_for_tools_is_taken(words: Any) -> None:
    record = Record(TALK, "line 1", tools=(TOOL,))
    found = windows(words, [record], {"tool_use": TOOLED})
    assert words.decode(found.input_ids[0]).startswith('TOOLS {"type": "function", "function": {"name": "look"}}user:')


def test_tools_are_written_or_said_to_be_left_out(words: Any) -> None:
    record = Record(TALK, "line 1", tools=(TOOL,))
    written, left = windows(words, [record], TOOLED), windows(words, [record], PLAIN)
    assert "TOOLS" in words.decode(written.input_ids[0]) and written.reading.notes("given") == []
    assert left.reading.notes("given") == ["given: the chat template writes no tools: those of 1 records are left out"]


def test_a_refusal_is_no_fault_of_the_template(words: Any) -> None:
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Refused, match=r"the chat template refuses it \(roles must alternate\)"):
        chat_text(words, TALK)


def test_conversations_that_teach_nothing_are_counted(words: Any) -> None:
    silent = [{"role": "user", "content": "Long ago"}]
    talk = [*TALK, {"role": "assistant", "content": "there"}]
    left = windows(words, [silent, [], talk], mask_prompts=True).reading.left_out
    assert (left.count, left.read) == (2, 3)
    assert left.named[0] == "record 1 has none of the assistant's tokens among its first 64"


def test_padding_is_an_id_that_every_model_has(words: Any) -> None:
    words.add_special_tokens({"pad_token": "[PAD]"})
    found = windows(words, [TALK])
    assert words.pad_token_id > int(found.input_ids.max())
    assert not found.mask[0, -1] and found.labels[0, ~found.mask[0]].sum() == 0


def test_of_a_huge_record_only_the_beginning_is_tokenized(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmshrink_eval.protocol import build_windows as eval_windows
    from llmshrink_eval.text import Text

    huge = "Once there was Mira. " * 400_000
    asked: list[int] = []
    kind = type(words)
    call = kind.__call__

    def listening(self: Any, text: str, **how: Any) -> Any:
        asked.append(len(text))
        return call(self, text, **how)

    monkeypatch.setattr(kind, "__call__", listening)
    words.chat_template = PLAIN
    talk = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": huge}]
    beginning = words(huge[:5000], add_special_tokens=False)["input_ids"]
    for items, mask in (([huge], False), ([talk], False), ([talk], True)):
        found = windows(words, items, samples=1, mask_prompts=mask)
        assert found.mask.all()
        if items == [huge]:
            assert found.input_ids[0].tolist() == beginning[:64]
    for protocol in ("gptq", "sliding"):
        read = eval_windows(Text("t", (huge,)), words, protocol=protocol, limit=64, window=32, max_tokens=64)
        assert read.input_ids[0].tolist() == beginning[:32]
        assert read.tokens == (62 if protocol == "gptq" else 63)
    assert max(asked) < 100_000


def test_a_jsonl_of_one_huge_record_is_calibrated_on(words: Any, tmp_path: Path) -> None:
    import json

    from llmshrink.calibration.text import load_documents

    path = tmp_path / "huge.jsonl"
    path.write_text(json.dumps({"text": "Once there was Mira. " * 200_000}))
    found, held_out = build_windows(load_documents(str(path)), words, samples=8, seq_len=64, held_out=2, seed=0)
    assert found.input_ids.shape == (8, 64) and len(held_out.input_ids) == 2
