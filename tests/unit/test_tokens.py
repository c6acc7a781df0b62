from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import given
from llmshrink_eval.prefix import MARGIN_TOKENS

from llmshrink.calibration.text import Document, Documents, Record
from llmshrink.calibration.tokens import build_windows, window_shape
from llmshrink.demo import language, tokenizer
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return tokenizer.build(512)


def _documents(items: list[Document], *, single: bool = False) -> Documents:
    found: Documents = given(items, single=single)
    return found


def _merging_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE with real merges, trained on the demo language, so that where a prefix is cut changes its last tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([language.text(0, 20_000)], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_document_has_the_tokens_of_the_whole_though_only_its_beginning_is_read() -> None:
    merging = _merging_tokenizer()
    whole = language.text(1, 300_000)
    expected = merging(whole, add_special_tokens=False)["input_ids"]
    read = 0

    def pieces(_seed: int) -> Iterator[Record]:
        nonlocal read
        rest = whole
        rng = random.Random(0)
        while rest:
            size = rng.randrange(1, 5000)
            read += len(rest[:size])
            yield Record(rest[:size])
            rest = rest[size:]

    for samples, seq_len in ((1, 1), (3, 7), (16, 256), (40, 512)):
        read = 0
        calibration, held_out = build_windows(
            Documents("d", pieces, single=True), merging, samples=samples, seq_len=seq_len, held_out=2, seed=0
        )
        found = torch.cat([calibration.input_ids, held_out.input_ids]).flatten().tolist()
        assert found == expected[: (samples + 2) * seq_len]
        characters = len(merging.decode(found))
        assert read < 1.2 * characters + 8 * MARGIN_TOKENS + 40_000
    assert calibration.input_ids.dtype == torch.int64
    assert calibration.mask.dtype == torch.bool
    assert calibration.mask.all()


def test_a_document_that_ends_inside_the_probe_gives_all_its_tokens(words: PreTrainedTokenizerFast) -> None:
    text = language.text(2, 3000)
    number = len(words(text, add_special_tokens=False)["input_ids"])
    calibration, held_out = build_windows(
        _documents([text], single=True), words, samples=1, seq_len=number, held_out=1, seed=0
    )
    assert calibration.tokens == number
    assert "again" in held_out.name
    assert torch.equal(held_out.input_ids, calibration.input_ids)


def test_held_out_windows_are_fewer_rather_than_seen(words: PreTrainedTokenizerFast) -> None:
    text = language.text(2, 3000)
    calibration, held_out = build_windows(
        _documents([text], single=True), words, samples=4, seq_len=100, held_out=100, seed=0
    )
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert held_out.input_ids.flatten().tolist() == ids[400 : len(ids) // 100 * 100]
    assert held_out.name == calibration.name


def test_documents_are_packed_with_the_end_mark_between(words: PreTrainedTokenizerFast) -> None:
    calibration, _ = build_windows(
        _documents(["Once there", "   ", "Once was", "Long ago"]), words, samples=2, seq_len=4, held_out=0, seed=0
    )
    assert [words.decode(row) for row in calibration.input_ids] == ["Once there<|end|>Once", " was<|end|>Long ago"]


def test_conversations_are_padded_and_padding_never_counts(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = TEMPLATE
    talks: list[Document] = [
        [{"role": "user", "content": "Once"}],
        [{"role": "user", "content": "Once there was"}, {"role": "assistant", "content": "Mira" * 9}],
        [{"role": "user", "content": "Long ago"}],
    ]
    calibration, held_out = build_windows(_documents(talks), words, samples=2, seq_len=24, held_out=1, seed=0)
    lengths = calibration.mask.sum(dim=1).tolist()
    assert lengths[1] == 24
    assert words.decode(calibration.input_ids[0][: lengths[0]]) == "user: Once<|end|>"
    assert not calibration.mask[0, lengths[0] :].any()
    assert calibration.tokens == sum(lengths)
    assert words.decode(held_out.input_ids[0][held_out.mask[0]]) == "user: Long ago<|end|>"


@pytest.mark.parametrize(
    ("items", "single", "says"),
    [
        ([], True, r"is empty or white space: 0 tokens, 4 x 8 = 32 are needed"),
        ([" \n" * 500], True, r"is empty or white space: 0 tokens, 4 x 8 = 32 are needed"),
        ([[]], False, r"its conversations have 0 tokens, 4 conversations of up to 8 tokens \(at most 32\) are needed"),
        ([""], True, "is empty"),
        (["   "], False, "is empty"),
        ([" there was"] * 10, True, r"has \d+ tokens, 4 x 8 = 32 are needed; give more text, or --samples \d"),
        (["Once"], True, r"has 1 tokens, 4 x 8 = 32 are needed; give more text$"),
        (["Once there"], True, r"has 2 tokens, 4 x 8 = 32 are needed; .* --samples 1 --seq-len 2$"),
        (
            [[{"role": "user", "content": "Once"}]] * 3,
            False,
            r"has 24 tokens in 3 conversations, 4 conversations of up to 8 tokens .* --samples 3",
        ),
        (
            [[{"role": "user", "content": "x"}], "text"],
            False,
            "1 of 2 records was left out: record 2 is a text among others that are each a conversation",
        ),
        (
            ["text", [{"role": "user", "content": "x"}]],
            False,
            "1 of 2 records was left out: record 2 is a conversation among others that are each a text",
        ),
    ],
)
def test_too_little_is_refused_with_both_numbers(
    words: PreTrainedTokenizerFast, items: list[Document], single: bool, says: str
) -> None:
    words.chat_template = TEMPLATE
    with pytest.raises(CalibrationError, match=says):
        build_windows(_documents(items, single=single), words, samples=4, seq_len=8, held_out=1, seed=0)


@pytest.mark.parametrize("place", [0, 1, 17, 39])
@pytest.mark.parametrize("odd", ["text", "conversation"])
def test_one_of_another_kind_is_left_out_and_counted_wherever_it_stands(
    words: PreTrainedTokenizerFast, place: int, odd: str
) -> None:
    words.chat_template = TEMPLATE
    talk: Document = [{"role": "user", "content": "Once there was Mira"}]
    text: Document = "Once there was Mira there was"
    items = [talk if odd == "text" else text] * 40
    shape: dict[str, Any] = {"samples": 8 if odd == "conversation" else 36, "seq_len": 8, "held_out": 1, "seed": 0}
    plain, _ = build_windows(_documents(items), words, **shape)
    other = text if odd == "text" else talk
    mixed, _ = build_windows(_documents([*items[:place], other, *items[place:]]), words, **shape)
    assert torch.equal(plain.input_ids, mixed.input_ids)
    left = mixed.reading.left_out
    if place < (39 if odd == "text" else 8):  # else there was enough before it
        assert left.count == 1 and left.named[0].startswith(f"record {place + 1} is a {odd} among others")


def test_conversations_need_a_chat_template(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match="no chat template"):
        build_windows(_documents([[{"role": "user", "content": "x"}]]), words, samples=1, seq_len=8, held_out=0, seed=0)


def test_a_conversation_that_the_template_refuses_is_one_line(words: PreTrainedTokenizerFast) -> None:
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        CalibrationError,
        match=r"none of 1 records can be used: record 1 can't be written: .* refuses it \(roles must alternate\)",
    ):
        build_windows(_documents([[{"role": "user", "content": "x"}]]), words, samples=1, seq_len=8, held_out=0, seed=0)


def test_the_fingerprint_is_of_ids_mask_and_tokenizer(words: PreTrainedTokenizerFast) -> None:
    def fingerprint(text: str, using: PreTrainedTokenizerFast, seq_len: int = 16) -> str:
        documents = _documents([text], single=True)
        shape = {"samples": 64 // seq_len, "seq_len": seq_len}
        return build_windows(documents, using, **shape, held_out=0, seed=0)[0].fingerprint

    text = language.text(3, 3000)
    prints = {fingerprint(text, words), fingerprint(language.text(4, 3000), words), fingerprint(text, words, 32)}
    other = tokenizer.build(512)
    other.add_tokens(["entirely"])
    prints.add(fingerprint(text, other))
    assert len(prints) == 4
    assert fingerprint(text, words) == fingerprint(text, tokenizer.build(512))


def test_defaults_follow_the_models_limit() -> None:
    assert window_shape(None, None, limit=131072) == (256, 2048)
    assert window_shape(None, None, limit=512) == (256, 512)
    assert window_shape(8, 100, limit=None) == (8, 100)
    for samples, seq_len, says in ((0, 8, "--samples 0"), (1, 0, "--seq-len 0"), (1, 513, "limit is 512")):
        with pytest.raises(CalibrationError, match=says):
            window_shape(samples, seq_len, limit=512)
