from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest

from llmshrink.demo import language, lexicon, model_folder, tokenizer, windows, world

SENTENCES = {
    "walked": r" (\w+) walked to the (\w+) (\w+) and found the (\w+ \w+)\.",
    "visited": r" (\w+) visited (\w+) in the (\w+) (\w+)\.",
    "gave": r" (\w+) gave (\w+) the (\w+ \w+) (\w+)\.",
    "went": r" (\w+) felt (\w+) and went home to the (\w+) (\w+)\.",
    "lived": r" (\w+) lived in the (\w+)\.",
    "loved": r" (\w+) loved the (\w+ \w+)\.",
    "Where": r" Where did (\w+) live\? In the (\w+)\.",
    "What": r" What did (\w+) love\? The (\w+ \w+)\.",
    "Who": r" Who was the (\w+) in the (\w+)\? (\w+)\.",
    "end": r" The end\.\n",
}


def _independent_probability(story: str) -> float:
    """p of a story, by its sentences: written from the rules, sharing the world with the generator and no code."""
    opening = re.match(r"(?:Once|Long ago|Last spring|One winter) there was (\w+) the (\w+)\.", story)
    assert opening is not None
    last = world.PEOPLE[opening[1]]
    assert opening[2] == last.trade
    p, position = 1 / 4 / 48, opening.end()
    opens, predicates = sum(world.CIRCLE_WEIGHTS) + 6 + 3 * 3, 20
    verbs = {"walked": 5, "visited": 4, "gave": 4, "went": 3, "lived": 2, "loved": 2}

    def other(named: str, of: world.Person) -> float:
        rank = of.circle.index(named)
        assert rank > 0
        return world.CIRCLE_WEIGHTS[rank] / sum(world.CIRCLE_WEIGHTS[1:])

    def manner(word: str, verb: str) -> float:
        return world.MANNER_WEIGHTS[world.MANNERS_OF[verb].index(word)] / sum(world.MANNER_WEIGHTS)

    while position < len(story):
        kind, found = next((k, m) for k, r in SENTENCES.items() if (m := re.compile(r).match(story, position)))
        position = found.end()
        if kind == "end":
            p *= 6 / opens
        elif kind == "Who":
            trade, home, name = found.groups()
            p *= 3 / opens / 24 / 2
            last = world.PEOPLE[name]
            assert (last.trade, last.home) == (trade, home)
        elif kind in ("Where", "What"):
            p *= 3 / opens * other(found[1], last)
            last = world.PEOPLE[found[1]]
            assert found[2] == (last.home if kind == "Where" else last.treasure)
        else:
            p *= world.CIRCLE_WEIGHTS[last.circle.index(found[1])] / opens * verbs[kind] / predicates
            subject = last = world.PEOPLE[found[1]]
            if kind == "walked":
                place = subject.haunts.index(found[2])
                assert subject.finds[place] == found[4]
                p *= world.HAUNT_WEIGHTS[place] / sum(world.HAUNT_WEIGHTS) * manner(found[3], kind)
            elif kind in ("visited", "gave"):
                last = world.PEOPLE[found[2]]
                gift = subject.gifts[subject.circle.index(last.name)]
                assert found[3] == (last.home if kind == "visited" else gift)
                p *= other(last.name, subject) * manner(found[4], kind)
            elif kind == "went":
                assert found[3] == subject.home
                rank = subject.moods.index(found[2])
                p *= world.MOOD_WEIGHTS[rank] / sum(world.MOOD_WEIGHTS) * manner(found[4], kind)
            else:
                assert found[2] == (subject.home if kind == "lived" else subject.treasure)
    return p


def test_the_log_probability_is_that_of_an_independent_parser() -> None:
    rng = random.Random(5)
    for story in (one for one in (language.story(rng) for _ in range(400)) if len(one.words) < 500):
        assert math.exp(-sum(story.surprisal)) == pytest.approx(_independent_probability(story.text), rel=1e-9)


def test_a_text_is_uniquely_decodable() -> None:
    rng = random.Random(6)
    told = [language.story(rng) for _ in range(50)]
    assert language.follow("".join(story.text for story in told)) == told


def test_a_contradiction_is_not_in_the_language() -> None:
    rng = random.Random(7)
    text = next(t for t in (language.story(rng).text for _ in itertools.count()) if " lived in the " in t)
    home = re.search(r" lived in the (\w+)", text)
    assert home is not None
    other = next(place for place in lexicon.PLACES if place != home.group(1))
    lie = text[: home.start(1)] + other + text[home.end(1) :]
    with pytest.raises(ValueError, match="expected one of"):
        language.follow(lie)
    right, words = language.words_until_false("", lie)
    assert right == len(language.WORD.findall(text[: home.start(1) - 1])) < words


def test_options_of_a_choice_begin_with_different_words() -> None:
    people = list(world.PEOPLE.values())
    lists = [lexicon.NAMES, lexicon.TRADES, lexicon.PLACES, *world.MANNERS_OF.values()]
    lists += [words for person in people for words in (person.circle, person.haunts, person.moods)]
    assert all(len(set(words)) == len(words) for words in lists)
    assert not set(lexicon.NAMES) & {"The", "Where", "Who", "What"}


def test_the_world_is_complete_and_never_changes() -> None:
    people = list(world.PEOPLE.values())
    assert len({(person.trade, person.home) for person in people}) == len(people) == 48
    assert all(sum(other.trade == person.trade for other in people) == 2 for person in people)
    assert all(sum(other.home == person.home for other in people) == 2 for person in people)
    assert len({person.treasure for person in people}) == 48
    for person in people:
        assert person.circle[0] == person.name
        assert len(person.circle) == len(person.gifts) == len(world.CIRCLE_WEIGHTS)
        assert len(person.haunts) == len(person.finds) == len(world.HAUNT_WEIGHTS)
        assert len(person.moods) == len(world.MOOD_WEIGHTS)
    drawn = hashlib.sha256(repr((people, world.MANNERS_OF)).encode()).hexdigest()
    assert drawn[:16] == "a26dcd8834c2908f"


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
        assert len(set(asked.options)) == language.OPTIONS
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


def test_the_shipped_model_tells_a_true_story() -> None:
    from llmshrink.demo import say

    beginning, told = say.continue_story(model_folder(), seed=0)
    assert beginning.startswith(("Once", "Long", "Last", "One"))
    assert len(told) > 20
    assert "true to the facts" in say.verdict(beginning, told)


def test_say_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.demo import say

    monkeypatch.setattr("sys.argv", ["say", str(tmp_path)])
    assert say.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


def test_say_tells_which_library_reads_three_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.demo import say

    def fail(folder: Path, seed: int) -> tuple[str, str]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("sys.argv", ["say", str(tmp_path)])
    monkeypatch.setattr(say, "continue_story", fail)
    assert say.main() == 2
    assert "need compressed-tensors >= 0.18" in capsys.readouterr().err
