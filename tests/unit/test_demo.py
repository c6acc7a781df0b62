from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest

from llmshrink.demo import language, lexicon, model_folder, tokenizer, windows

NAMED = re.compile(r" (\w+) the (\w+)[,.]?")


def _independent_nats(story: str) -> float:
    """-ln p of a story, by counting its sentences: written from the rules, sharing nothing with the generator."""
    head, *sentences = re.findall(r"[^.?]+(?:\.|\?[^.]+\.)", story.rstrip("\n"))
    assert head.split(" there were")[0] in ("Once", "Long ago", "Last spring", "One winter")
    people = dict(NAMED.findall(head.replace(" and", ",")))
    assert len(people) == 3
    nats = math.log(4) + sum(math.log(24 - i) + 3 * math.log(16 - i) + math.log(12) for i in range(3))
    for sentence in sentences[:3]:
        assert re.fullmatch(r" \w+ lived in the \w+ and had the \w+ \w+\.", sentence)
    for sentence in sentences[3:]:
        if sentence == " The end.":
            nats -= math.log(3 / 15 * 2 / 5)
        elif sentence.startswith((" Where", " Who", " What")):
            nats -= math.log(1 / 15 / 3 / (1 if sentence.startswith(" What") else 2))
        else:
            nats -= math.log(3 / 15 / 5 if sentence.startswith(" The") else 3 / 15)
            nats += math.log(5) + math.log(16)
            for verb, options in ((" walked to", 16), (" gave", 2), (" met", 2), (" felt", 16)):
                nats += math.log(options) if verb in sentence else 0.0
    return nats


def test_the_log_probability_is_that_of_an_independent_parser() -> None:
    rng = random.Random(5)
    for _ in range(200):
        story = language.story(rng)
        assert sum(story.surprisal) == pytest.approx(_independent_nats(story.text), rel=1e-9)


def test_a_text_is_uniquely_decodable() -> None:
    rng = random.Random(6)
    told = [language.story(rng) for _ in range(50)]
    assert language.follow("".join(story.text for story in told)) == told


def test_a_contradiction_is_not_in_the_language() -> None:
    rng = random.Random(7)
    text = next(t for t in (language.story(rng).text for _ in itertools.count()) if " went home to the " in t)
    home = re.search(r" went home to the (\w+)", text)
    assert home is not None
    other = next(place for place in lexicon.PLACES if place != home.group(1))
    lie = text[: home.start(1)] + other + text[home.end(1) :]
    with pytest.raises(ValueError, match="expected one of"):
        language.follow(lie)
    right, words = language.words_until_false("", lie)
    assert right == len(language.WORD.findall(text[: home.start(1) - 1])) < words


def test_options_of_a_choice_begin_with_different_words() -> None:
    lists = (lexicon.NAMES, lexicon.TRADES, lexicon.PLACES, lexicon.THINGS, lexicon.COLOURS, lexicon.MOODS)
    lists += (lexicon.MANNERS,)
    assert [len(words) for words in lists] == [24, 16, 16, 16, 12, 16, 16]
    assert all(len(set(words)) == len(words) for words in lists)
    assert not set(lexicon.NAMES) & {"The", "Where", "Who", "What"}


def test_the_mean_surprisal_is_the_entropy_rate() -> None:
    rate, error = language.entropy_rate(1500, seed=1)
    assert 0 < error < 0.02
    rng = random.Random(8)
    told = [language.story(rng) for _ in range(1500)]
    sampled = sum(sum(story.surprisal) for story in told) / sum(len(story.words) for story in told)
    assert sampled == pytest.approx(rate, abs=6 * error)


def test_text_has_whole_stories_of_at_least_the_length_asked_for() -> None:
    text = language.text(1, 10_000)
    assert 10_000 <= len(text) < 20_000
    assert text.endswith("The end.\n")
    assert text == language.text(1, 10_000) != language.text(2, 10_000)


def test_facts_have_one_true_option() -> None:
    for asked in language.facts(3, 200):
        assert len(set(asked.options)) == 3
        for index, option in enumerate(asked.options):
            right, words = language.words_until_false(asked.context, asked.question + option)
            assert (right == words) == (index == asked.answer)


def test_every_word_is_one_token_and_any_text_survives() -> None:
    words = tokenizer.build(512)
    assert len(words) <= tokenizer.VOCABULARY_SIZE
    text = language.text(4, 30_000)
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert [words.decode([index]) for index in ids] == language.WORD.findall(text)
    for other in ("Héllo  wörld\n\t12", "once upon", language.text(1, 500)):
        assert words.decode(words(other)["input_ids"]) == other
    assert words("x<|end|>")["input_ids"][-1] == tokenizer.END_ID == words.eos_token_id


def test_the_shipped_model_is_small_and_its_dimensions_fit_every_kernel() -> None:
    config = json.loads((model_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    assert config["head_dim"] in (32, 64, 80)
    dimensions = [config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")]
    dimensions += [number * config["head_dim"] for number in heads]
    assert all(dimension % 128 == 0 for dimension in dimensions)
    assert sum(file.stat().st_size for file in model_folder().iterdir()) <= 3_000_000


def test_the_shipped_tokenizer_is_the_one_that_is_built() -> None:
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(model_folder())
    assert shipped.backend_tokenizer.to_str() == tokenizer.build(512).backend_tokenizer.to_str()
    assert shipped.eos_token_id == tokenizer.END_ID


def test_the_shipped_model_is_within_a_tenth_of_the_entropy_bound() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    loss, bound = windows.loss_and_bound(model, seed=123_456_789, windows=32, length=256)
    assert bound < loss < 1.1 * bound


def test_the_shipped_model_tells_a_true_story(capsys: pytest.CaptureFixture[str]) -> None:
    from llmshrink.demo import say

    beginning, told = say.continue_story(model_folder(), seed=0)
    assert beginning.startswith(("Once", "Long", "Last", "One"))
    assert len(told) > 20
    assert "true to the story's facts" in say.verdict(beginning, told)


def test_say_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.demo import say

    monkeypatch.setattr("sys.argv", ["say", str(tmp_path)])
    assert say.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
