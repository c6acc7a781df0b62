"""generation_config.json: what of it is followed, by `generate` and by evaluations; whatever it says, no traceback."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from llmshrink_eval.engines.transformers import TransformersEngine
from llmshrink_eval.errors import raised_by_model
from llmshrink_eval.generation import FOLLOWED, NO_MATTER, follow
from llmshrink_eval.options import ModelSpec, Running
from transformers import GenerationConfig, PretrainedConfig

import llmshrink
from llmshrink.checkpoint.preflight import load_tokenizer
from llmshrink.checkpoint.source import resolve
from llmshrink.cli import run
from llmshrink.runtime.generate import Generation

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture
def say(model: Path) -> Any:
    def say(settings: dict[str, Any], **more: Any) -> Generation:
        (model / "generation_config.json").write_text(json.dumps(settings))
        return llmshrink.generate(str(model), PROMPT, **{"max_new_tokens": 12, "device": "cpu", **more})

    return say


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [said for record in caplog.records if "followed" in (said := record.getMessage())]


NOT_FOLLOWED: dict[str, Any] = {
    "token_healing": True,
    "dola_layers": "low",
    "constraints": [1],
    "watermarking_config": {"bias": 2.0},
    "sequence_bias": [[[10**8], 1.0]],
    "bad_words_ids": [[10**8]],
    "suppress_tokens": [10**8],
    "is_assistant": True,
    "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 3,
    "guidance_scale": 2.0,
    "force_words_ids": [[1]],
    "max_time": 0.0,
    "forced_eos_token_id": [5],
    "exponential_decay_length_penalty": [1, 2.0],
}
UNHEARD: dict[str, Any] = {
    "prefill_chunk_size": -1,
    "cache_implementation": "static",
    "num_beams": 1000,
    "output_scores": True,
    "stop_strings": None,
    "chat_format": "chatml",
}


def test_what_is_not_followed_changes_nothing_and_is_said(say: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = say({"eos_token_id": 0})
    assert say({"eos_token_id": 0, **UNHEARD}).text == plain.text and not lines(caplog)
    assert say({"eos_token_id": 0, **NOT_FOLLOWED}).text == plain.text
    (line,) = lines(caplog)
    assert line.endswith(f"generation_config.json sets {', '.join(sorted(NOT_FOLLOWED))}, which isn't followed here")


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_no_one_of_them_does_anything(name: str, say: Any) -> None:
    assert say({name: NOT_FOLLOWED[name]}, max_new_tokens=2).new_tokens == 2


def test_a_text_ends_with_a_stop_string(say: Any, model: Path) -> None:
    whole = say({})
    words = load_tokenizer(resolve(str(model)))
    new = words(PROMPT + whole.text).input_ids[-whole.new_tokens :]
    assert len(new) == whole.new_tokens == 12
    stop = words.decode(new[:7])[-3:]
    for given in (stop, ["never said", stop]):
        ended = say({"stop_strings": given})
        assert ended.new_tokens < 12 and whole.text.startswith(ended.text) and stop in ended.text
        assert whole.text.index(stop) + len(stop) <= len(ended.text)
    assert say({"stop_strings": ["never said"]}).text == whole.text
    # The prompt doesn't end it.
    assert say({"stop_strings": PROMPT}).text == whole.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"stop_strings": [""]},
            "stop_strings is [''], and has to be text, or up to 64 texts, of 1 to 1,000 characters",
        ),
        ({"stop_strings": ["x"] * 65}, "and has to be text, or up to 64 texts"),
        ({"stop_strings": "x" * 1001}, "and has to be text, or up to 64 texts"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size is 'x', and has to be a whole number from 0"),
        ({"watermarking_config": {"x": 1}}, "generation_config.json: transformers can't use it (Watermarking"),
        ({"to_dict": 1}, "generation_config.json"),
        ({"repetition_penalty": 0}, "the model's generation_config.json or its weights aren't fit for it"),
        ({"update": 1, "validate": 2}, "generation_config.json"),
    ],
)
def test_what_it_cant_be_is_one_line(
    settings: dict[str, Any], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "generation_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert run(["generate", str(model), PROMPT, "--max-new-tokens", "2", "--device", "cpu"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmshrink: error: ")]
    assert len(said) == 1 and says in said[0] and len(said[0]) < 800


@pytest.mark.parametrize("settings", [{"stop_strings": 5}, {"stop_strings": ["x", 3]}, {"no_repeat_ngram_size": "x"}])
def test_config_json_in_its_place_is_held_to_the_same(
    settings: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, folder := tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    capsys.readouterr()
    assert run(["generate", str(folder), PROMPT, "--max-new-tokens", "2", "--device", "cpu"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmshrink: error: ")]
    ((name, _),) = settings.items()
    assert f"{folder}: of its settings for generation {name} is " in said


def test_evaluations_follow_the_same(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = load_tokenizer(resolve(str(model)))

    def said(settings: dict[str, Any]) -> list[dict[str, Any]]:
        (model / "generation_config.json").write_text(json.dumps(settings))
        engine = TransformersEngine(ModelSpec("m", model), Running(device="cpu"), words)
        return engine.generations([PROMPT])

    plain = said({})
    assert said({"stop_strings": plain[0]["text"][:3], "num_beams": 3, "token_healing": True}) == plain
    (line,) = lines(caplog)
    assert line == f"{model}: generation_config.json sets token_healing, which isn't followed here"


def test_only_fields_of_transformers_are_put_back() -> None:
    class Model:
        config: Any = PretrainedConfig()
        generation_config = GenerationConfig(top_k=7, max_length=9, chat_format="x", guidance_scale=2.0)

    made, before = Model(), Model.generation_config
    follow(made)
    after: Any = made.generation_config
    assert (after.top_k, after.max_length, after.chat_format, after.guidance_scale) == (7, 9, "x", None)
    assert before.guidance_scale == 2.0  # whoever else holds it
    assert {*FOLLOWED, *NO_MATTER} <= vars(GenerationConfig()).keys() and not {*FOLLOWED} & {*NO_MATTER}


def test_no_rate_without_a_time(say: Any) -> None:
    found = say({})
    assert found.decode_rate > 0
    assert replace(found, decode_seconds=0.0).decode_rate is None
    assert replace(found, decode_seconds=0.0).lines()[0].startswith("12 tokens, decode -, ")


def test_what_transformers_raises_as_it_generates_is_the_models(model: Path) -> None:
    (model / "generation_config.json").write_text("{}")
    loaded = llmshrink.load(str(model), device="cpu")
    with pytest.raises(ValueError) as caught:
        loaded.generate(torch.tensor([[1]]), max_new_tokens=2, repetition_penalty=0.0)
    assert "transformers' own code (transformers.generation." in str(raised_by_model(caught.value))
