"""BOS at the start of every window: who gets it, that nobody gets two, and that no token of the text is lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import given, with_bos
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from llmshrink_eval.beginning import LACKING, Beginning, beginning_of
from llmshrink_eval.errors import EvalError
from llmshrink_eval.protocol import build_windows as eval_windows
from llmshrink_eval.tasks import _tokenizer_of_tasks, bos_of_tasks
from llmshrink_eval.text import Text

from llmshrink.calibration.packing import begun
from llmshrink.calibration.tokens import TokenWindows, build_windows
from llmshrink.calibration.turns import encode
from llmshrink.demo import language, tokenizer
from llmshrink.errors import CalibrationError, LlmshrinkError
from llmshrink.model.families import FAMILIES
from llmshrink.runtime.generate import encode as prompt_ids

PUTS = with_bos()
HAS = with_bos(puts=False)
BOS = PUTS.bos_token_id
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"


def windows(items: list[Any], using: Any = PUTS, **more: Any) -> tuple[TokenWindows, TokenWindows]:
    shape: dict[str, Any] = {"samples": 3, "seq_len": 8, "held_out": 2, "seed": 0, **more}
    return build_windows(given(items, single=shape.pop("single", False)), using, **shape)


@pytest.mark.parametrize(
    ("using", "model_type", "asked", "put"),
    [
        (PUTS, "llama", "auto", True),
        (HAS, "llama", "auto", False),
        (HAS, None, "auto", False),
        (HAS, "gemma3_text", "auto", True),
        (HAS, "llama", "always", True),
        (PUTS, "gemma", "never", False),
        (tokenizer.build(512), "gemma", "auto", False),
    ],
)
def test_family_and_tokenizer_decide_and_a_user_over_them(using: Any, model_type: Any, asked: Any, put: bool) -> None:
    found = beginning_of(using, model_type, asked)
    assert found.put is put
    assert found.opening == ((using.bos_token_id,) if put else ())
    assert found.lacking is (using.bos_token_id is None)


def test_every_gemma_of_the_table_needs_it_and_no_other_family() -> None:
    needing = {name for name in FAMILIES if beginning_of(HAS, name).put}
    assert needing == {"gemma", "gemma2", "gemma3_text"}


def test_a_bos_that_there_is_not_is_one_line() -> None:
    plain: Any = tokenizer.build(512)
    says = "--bos always: the tokenizer has no BOS token; leave the option out"
    with pytest.raises(CalibrationError, match=says):
        windows(["Once there was Mira"] * 20, plain, bos="always")
    with pytest.raises(EvalError, match=says):
        eval_windows(Text("t", ("Once there",)), plain, protocol="gptq", limit=8, bos="always")
    with pytest.raises(CalibrationError, match="--bos often: choose one of auto, always, never"):
        windows(["Once there was Mira"] * 20, bos="often")


@pytest.mark.parametrize("single", [True, False])
def test_every_window_begins_with_it_and_is_no_longer(single: bool) -> None:
    text = language.text(1, 3000)
    calibration, held_out = windows([text], single=single)
    ids = torch.cat([calibration.input_ids, held_out.input_ids])
    assert ids.shape == (5, 8) and (ids[:, 0] == BOS).all() and calibration.reading.bos
    content = encode(PUTS, text, special=False)[: 5 * 7]
    assert ids[:, 1:].flatten().tolist() == content
    plain, _ = windows([text], single=single, bos="never")
    assert plain.input_ids.flatten().tolist() == encode(PUTS, text, special=False)[: 3 * 8]
    assert not plain.reading.bos and plain.fingerprint != calibration.fingerprint


def test_a_document_that_begins_a_window_has_one_bos() -> None:
    # "Once there" and its end fill a window of four with BOS: the next begins with the next document's own.
    found, _ = windows(["Once there", "Once was", "Long ago"], samples=3, seq_len=4, held_out=0)
    rows = [PUTS.decode(row) for row in found.input_ids]
    assert rows == ["<|begin|>Once there<|end|>", "<|begin|>Once was<|end|>", "<|begin|>Long ago<|end|>"]


@drawn(st.lists(st.integers(0, 3), max_size=60), st.integers(2, 9), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_laying_out_loses_no_token(ids: list[int], seq_len: int, wanted: int) -> None:
    bos = 3
    laid, marks = begun(ids, [True] * len(ids), seq_len, (bos,), 10_000)
    assert all(token == bos for token in laid[::seq_len])
    put = [place for place, mark in enumerate(marks) if not mark]
    assert [token for place, token in enumerate(laid) if place not in put] == ids
    assert all(place % seq_len == 0 for place in put)
    assert begun(ids, [True] * len(ids), seq_len, (bos,), wanted)[0] == laid[:wanted]
    assert begun(ids, [True] * len(ids), seq_len, (), wanted)[0] == ids[:wanted]


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    for asked in ("auto", "always"):
        found, _ = windows(["<|begin|>Once there was Mira"], samples=1, seq_len=4, held_out=0, bos=asked)
        assert PUTS.decode(found.input_ids[0]) == "<|begin|>Once there was"
    read = eval_windows(Text("t", ("<|begin|>Once there was Mira",)), PUTS, protocol="sliding", limit=16)
    assert PUTS.decode(read.input_ids[0]) == "<|begin|>Once there was Mira"
    assert read.tokens == 4
    # What a text itself says stays, whoever puts BOS before others.
    left, _ = windows(["<|begin|>Once there was Mira"], samples=1, seq_len=4, held_out=0, bos="never")
    assert PUTS.decode(left.input_ids[0]) == "<|begin|>Once there was"
    assert (
        prompt_ids(PUTS, "<|begin|>Once", chat=False, name="m")[0].tolist()[:2]
        == prompt_ids(PUTS, "Once", chat=False, name="m")[0].tolist()
    )


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")])
def test_a_conversation_begins_with_one_whether_or_not_the_template_writes_it(template: str) -> None:
    made = with_bos()
    made.chat_template = template
    talk = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "there"}]
    for masked in (False, True):
        found, _ = windows([talk], made, samples=1, held_out=0, seq_len=24, mask_prompts=masked)
        read = found.input_ids[0][found.mask[0]]
        assert made.decode(read) == "<|begin|>user: Once<|end|>assistant: there<|end|>"
        assert masked is (found.said is not None)
        if found.said is not None:
            assert made.decode(found.input_ids[0][found.said[0]]).strip() == "there<|end|>"


def test_evaluation_scores_every_token_of_the_text() -> None:
    text = "".join(language.text(1, 3000).split("\n"))
    content = PUTS(text, add_special_tokens=False)["input_ids"]
    read = eval_windows(Text("t", (text,)), PUTS, protocol="gptq", limit=64, window=16)
    count = len(content) // 15
    assert read.bos and len(read) == count and (read.input_ids[:, 0] == BOS).all()
    assert read.input_ids[:, 1:].flatten().tolist() == content[: count * 15]
    assert read.tokens == count * 15 and not read.scored[:, 0].any()
    sliding = eval_windows(Text("t", (text,)), PUTS, protocol="sliding", limit=64, window=16, stride=4)
    assert (sliding.input_ids[:, 0] == BOS).all() and sliding.tokens == len(content)
    assert sliding.bytes == len(text.encode()) and sliding.words == len(text.split())
    scored = [row[mark].tolist() for row, mark in zip(sliding.input_ids, sliding.scored, strict=True)]
    assert [token for row in scored for token in row] == content


@pytest.mark.parametrize("protocol", ["gptq", "sliding"])
def test_a_model_without_bos_reads_what_it_read_before(protocol: Any) -> None:
    text = Text("t", (language.text(1, 2000), language.text(2, 500)))
    asked: dict[str, Any] = {"protocol": protocol, "limit": 64, "window": 16}
    plain = eval_windows(text, tokenizer.build(512), **asked)
    assert plain.fingerprint == eval_windows(text, HAS, **asked).fingerprint
    assert eval_windows(text, PUTS, bos="never", **asked).fingerprint == plain.fingerprint
    assert eval_windows(text, HAS, model_type="gemma2", **asked).fingerprint != plain.fingerprint


def test_as_many_whole_windows_as_were_asked_for() -> None:
    text = Text("t", (language.text(1, 6000),))
    for using in (PUTS, HAS):
        assert len(eval_windows(text, using, protocol="gptq", limit=64, window=16, max_tokens=320)) == 20


def test_tasks_are_told_where_the_tokenizer_does_otherwise() -> None:
    assert bos_of_tasks(PUTS, "llama", "auto") is None
    assert bos_of_tasks(HAS, "llama", "auto") is None
    assert bos_of_tasks(HAS, "gemma", "auto") is True
    assert bos_of_tasks(PUTS, "gemma", "never") is False


def test_the_tokenizer_of_tasks_puts_bos_and_pads_with_what_the_model_has() -> None:
    from transformers import LlamaConfig

    made = _tokenizer_of_tasks(HAS, LlamaConfig(vocab_size=len(HAS)), True)
    assert made("Once")["input_ids"] == [BOS, *HAS("Once")["input_ids"]]
    assert HAS("Once")["input_ids"][0] != BOS
    padding = with_bos()
    padding.add_special_tokens({"pad_token": "[PAD]"})
    vocabulary = padding.pad_token_id
    made = _tokenizer_of_tasks(padding, LlamaConfig(vocab_size=vocabulary), None)
    assert made.pad_token_id == padding.eos_token_id < vocabulary == padding.pad_token_id


def test_the_ids_of_a_text_keep_their_own_when_nothing_is_put() -> None:
    assert Beginning((3,), put=False, added=False).of([3, 3, 1]) == [3, 3, 1]
    assert Beginning((3,), put=False, added=True).of([3, 3, 1]) == [3, 1]
    assert Beginning((3,), put=True, added=True).of([3, 3, 1]) == [3, 1]
    assert Beginning((3,), put=True, added=False).of([]) == [3]
    assert Beginning().of([1]) == [1]
    assert Beginning((3, 4), put=True, added=True).of([3, 4, 3, 4, 3, 1]) == [3, 4, 3, 1]
    assert Beginning((3, 4), put=False, added=True).of([3, 4, 3, 4, 1]) == [3, 4, 1]


# Several marks, none of which the tokenizer calls BOS, as GLM's.

TWO = ("[gMASK]", "<sop>")


def glm() -> Any:
    """The demo's tokenizer, which puts two marks before every text."""
    from tokenizers.processors import TemplateProcessing

    made: Any = tokenizer.build(512)
    made.add_special_tokens({"additional_special_tokens": list(TWO)})
    marks = list(zip(TWO, made.convert_tokens_to_ids(list(TWO)), strict=True))
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{TWO[0]} {TWO[1]} $A", pair=None, special_tokens=marks
    )
    return made


def test_every_window_begins_with_all_marks_that_the_tokenizer_puts() -> None:
    made = glm()
    marks = made.convert_tokens_to_ids(list(TWO))
    text = "".join(language.text(1, 3000).split("\n"))
    content = made(text, add_special_tokens=False)["input_ids"]
    for single in (True, False):
        found = torch.cat([part.input_ids for part in windows([text], made, single=single)])
        assert (found[:, :2] == torch.tensor(marks)).all()
        assert [part.reading.bos for part in windows([text], made, single=single)] == [True, True]
        assert found[:, 2:].flatten().tolist() == content[: 5 * 6]
    never, _ = windows([text], made, bos="never")
    assert never.input_ids.flatten().tolist() == content[: 3 * 8]
    read = eval_windows(Text("t", (text,)), made, protocol="gptq", limit=64, window=16)
    count = len(content) // 14
    assert read.bos and len(read) == count and (read.input_ids[:, :2] == torch.tensor(marks)).all()
    assert read.input_ids[:, 2:].flatten().tolist() == content[: count * 14]
    assert read.tokens == count * 14 and not read.scored[:, :2].any()
    sliding = eval_windows(Text("t", (text,)), made, protocol="sliding", limit=64, window=16, stride=14)
    scored = [row[mark].tolist() for row, mark in zip(sliding.input_ids, sliding.scored, strict=True)]
    assert [token for row in scored for token in row] == content
    assert (sliding.input_ids[:, :2] == torch.tensor(marks)).all() and sliding.bytes == len(text.encode())
    assert prompt_ids(made, "Once", chat=False, name="m")[0].tolist() == [*marks, *encode(made, "Once", special=False)]


@drawn(st.lists(st.sampled_from([(1,), (2,), (8, 9)]), max_size=30), st.integers(3, 9))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_marks_are_neither_doubled_nor_cut(parts: list[tuple[int, ...]], seq_len: int) -> None:
    ids = [token for part in parts for token in part]
    laid, _ = begun(ids, [True] * len(ids), seq_len, (8, 9), 10_000)
    rows = [laid[start : start + seq_len] for start in range(0, len(laid), seq_len)]
    assert all(row[:2] == [8, 9] and (len(row) < 3 or row[2] != 9) for row in rows)
    assert [token for token in laid if token < 8] == [token for token in ids if token < 8]


def test_windows_that_marks_would_fill_are_refused_in_a_line() -> None:
    text = language.text(1, 3000)
    with pytest.raises(CalibrationError, match=r"--seq-len 2: every window begins with the 2 marks .* at least 3"):
        windows([text], glm(), seq_len=2)
    asked: dict[str, Any] = {"limit": 64}
    with pytest.raises(EvalError, match="--window 2: it begins with BOS, of 2 marks; at least 3"):
        eval_windows(Text("t", (text,)), glm(), protocol="gptq", window=2, **asked)
    with pytest.raises(EvalError, match="--stride 15: at most 14, since each window begins with BOS, of 2 marks"):
        eval_windows(Text("t", (text,)), glm(), protocol="sliding", window=16, stride=15, **asked)


def test_a_family_that_needs_bos_without_one_is_told_of_unless_it_is_meant() -> None:
    plain: Any = tokenizer.build(512)
    text = [language.text(1, 3000)]
    found, _ = windows(text, plain, model_type="gemma2")
    assert found.reading.notes("t") == [f"t: {LACKING}"] and not found.reading.bos
    assert "bos_token" in LACKING and "--bos never" in LACKING
    assert windows(text, plain, model_type="gemma2", bos="never")[0].reading.notes("t") == []
    assert windows(text, plain, model_type="llama")[0].reading.notes("t") == []
    assert windows(text, HAS, model_type="gemma2")[0].reading.notes("t") == []
    read = eval_windows(Text("t", tuple(text)), plain, protocol="gptq", limit=64, model_type="gemma2")
    assert read.lacks_bos and not read.bos


def test_a_prompt_begins_as_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    def ids(using: Any, **more: Any) -> list[int]:
        found: list[int] = prompt_ids(using, "Once", chat=False, name="m", **more)[0].tolist()
        return found

    bare = encode(HAS, "Once", special=False)
    assert ids(HAS) == ids(PUTS, bos="never") == bare
    assert ids(HAS, bos="always") == ids(PUTS) == [BOS, *bare]
    plain: Any = tokenizer.build(512)
    with pytest.raises(LlmshrinkError, match="--bos always: the tokenizer has no BOS token"):
        ids(plain, bos="always")
    assert not caplog.messages
    ids(plain, model_type="gemma")
    assert caplog.messages == [f"m: the prompt is {LACKING}"]
