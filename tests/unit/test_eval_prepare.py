"""What is refused before a model is loaded, each in one line that says what to do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_oracle import a_text
from eval_small import Small, small, spec
from llmshrink_eval.errors import EvalError
from llmshrink_eval.options import Options, Running, Scoring
from llmshrink_eval.prepare import prepare, refuse
from llmshrink_eval.used import settings_used


@pytest.fixture
def here(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> Small:
    return small(model_of, story, tmp_path)


TEXT = Scoring(a_text(["some words"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(), r"nothing to measure: give --text or --tasks"),
        (Options(scoring=Scoring(window=9), tasks=("a",)), r"--window, .* are about a text: give --text too"),
        (Options(scoring=TEXT, sample=3), r"--sample, .* are about tasks: give --tasks too"),
        (Options(tasks=("a",), sample=0), r"--sample 0: at least 1"),
        (Options(tasks=("a",), limit=2, sample=3), r"--limit 2 and --sample 3: the first items or drawn ones"),
        (Options(scoring=TEXT, limit=3), r"--limit, .* are about tasks: give --tasks too"),
        (Options(scoring=TEXT, num_fewshot=0), r"--num-fewshot .* are about tasks"),
        (Options(scoring=TEXT, apply_chat_template=True), r"--apply-chat-template are about tasks"),
        (Options(scoring=TEXT, tasks_dir=(Path("here"),)), r"--tasks-dir, .* are about tasks"),
        (Options(tasks=("a",), limit=0), r"--limit 0: at least 1"),
        (Options(tasks=("a",), num_fewshot=-1), r"--num-fewshot -1: at least 0"),
        (Options(scoring=TEXT, running=Running(batch_size=0)), r"--batch-size 0: at least 1"),
        (Options(scoring=TEXT, speed=(1, 0)), r"--speed 0: at least 1"),
        (Options(scoring=TEXT, seed=-1), r"--seed -1: at least 0"),
        (Options(scoring=dataclasses.replace(TEXT, protocol="gptp")), r"--protocol gptp: gptq or sliding"),  # type: ignore[arg-type]
        (Options(scoring=TEXT, running=Running(engine="tgi")), r"--engine tgi: transformers or vllm"),  # type: ignore[arg-type]
        (Options(scoring=TEXT, prompts=("Eva", " ")), r"--prompt ' ': not the beginning of a text"),
        (Options(scoring=TEXT, prompts=("\udcff",)), r"--prompt '\\udcff': not the beginning"),
        (Options(scoring=TEXT, require=""), r"--require: an empty condition"),
        (Options(scoring=TEXT, require="recovery>=0.98"), r"'recovery>=0.98' needs tasks \(--tasks\) and an original"),
        (Options(scoring=TEXT, require="kl<=1"), r"'kl<=1' needs an original \(--baseline\)"),
        (Options(scoring=TEXT, require="klx<=1"), r"unknown name 'klx' in 'klx<=1': did you mean 'kl'\?"),
        (Options(scoring=TEXT, require="token=<1"), r"did you mean '<='"),
        (Options(scoring=TEXT, require="token"), r"'token' is no condition"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_without_a_model(options: Options, says: str) -> None:
    with pytest.raises(EvalError, match=says) as caught:
        refuse(options, baseline=False)
    assert "\n" not in str(caught.value)


def test_recovery_with_tasks_and_an_original_is_fine() -> None:
    (condition,) = refuse(Options(tasks=("a",), require="recovery>=0.98"), baseline=True)
    assert condition.text == "recovery>=0.98"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 129}, r"--window 129: between 2 and the model's limit of 128 tokens"),
        ({"stride": 24, "protocol": "sliding"}, r"--stride 24: between 1 and 23, less than the window of 24"),
        ({"stride": 5}, r"--stride 5: gptq's windows don't overlap"),
        (
            {"max_tokens": 20},
            r"^--max-tokens 20: less than one window of 24 tokens; ask for 24 or more, or take a smaller --window$",
        ),
        ({"max_tokens": 10**7}, r"--max-tokens 10,000,000: a text has \d+ tokens; ask for fewer"),
        ({"tasks": ("demo_fact",)}, r"task demo_fact: unknown; did you mean demo_facts"),
        ({"tasks": ("demo_facts",), "tasks_dir": (Path("nowhere"),)}, r"nowhere: no such folder of tasks"),
        ({"apply_chat_template": True}, r"--apply-chat-template: the tokenizer of model has no chat template"),
    ],
)
def test_what_the_model_or_the_data_do_not_allow_is_refused(changes: dict[str, Any], says: str, here: Small) -> None:
    with pytest.raises(EvalError, match=says):
        prepare(None, [spec(here.original)], here.options(**changes))


def test_a_folder_of_tasks_without_a_task_is_refused(here: Small, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EvalError, match=r"empty: holds no task \(no \.yaml file\)"):
        prepare(None, [spec(here.original)], here.options(tasks_dir=(empty,)))


def _with_tokenizer(here: Small, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    made = shutil.copytree(here.original, folder)
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    change(tokenizer)
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    return made


def test_models_of_other_tokens_are_refused_with_the_first_that_differs(here: Small, tmp_path: Path) -> None:
    def rename(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["zebra"] = vocabulary.pop(next(token for token, index in vocabulary.items() if index == 100))

    other = _with_tokenizer(here, tmp_path / "other", rename)
    with pytest.raises(
        EvalError, match=r"model and other have different tokenizers \(\d+ tokens against \d+, first diff"
    ):
        prepare(spec(here.original), [spec(other)], here.options())


def test_models_that_cut_words_in_another_way_are_refused(here: Small, tmp_path: Path) -> None:
    def lower(tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = {"type": "Lowercase"}

    other = _with_tokenizer(here, tmp_path / "other", lower)
    with pytest.raises(
        EvalError, match=r"different tokenizers \(the same tokens, but .* is cut into them in another way"
    ):
        prepare(spec(here.original), [spec(other)], here.options())


def test_models_of_other_vocabularies_are_refused(here: Small, model_of: Callable[..., Path]) -> None:
    padded = model_of("llama", vocab_size=576)
    with pytest.raises(EvalError, match=r"model and padded have vocabularies of \d+ and 576 in their config.json"):
        prepare(spec(here.original), [spec(padded, "padded")], here.options())
    cut = model_of("llama", vocab_size=64)
    with pytest.raises(
        EvalError, match=r"cut: its tokenizer gives token \d+, and its config.json has a vocabulary of 64"
    ):
        prepare(None, [spec(cut, "cut")], here.options())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"odd: no config.json there; name a model's folder"),
        ("{", r"odd/config.json: can't be read as JSON: it isn't JSON"),
        ('{"model_type": "nonesuch"}', r"odd/config.json: transformers can't read it: .*nonesuch"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(config: str | None, says: str, here: Small, tmp_path: Path) -> None:
    odd = shutil.copytree(here.original, tmp_path / "odd")
    (odd / "config.json").unlink()
    if config is not None:
        (odd / "config.json").write_text(config)
    with pytest.raises(EvalError, match=says) as caught:
        prepare(None, [spec(odd)], here.options())
    assert "\n" not in str(caught.value)


def test_a_broken_tokenizer_is_one_line(here: Small, tmp_path: Path) -> None:
    def spoil(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"] = {"type": "none such"}

    with pytest.raises(EvalError, match=r"other: its tokenizer can't be loaded"):
        prepare(None, [spec(_with_tokenizer(here, tmp_path / "other", spoil))], here.options())


def test_who_is_the_original(here: Small, tmp_path: Path) -> None:
    packed = shutil.copytree(here.original, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    rounded = shutil.copytree(here.original, tmp_path / "rounded")
    (rounded / "llmshrink.json").write_text("{}")
    alone = [
        prepare(None, [spec(folder)], here.options()).subjects[0].role for folder in (here.original, packed, rounded)
    ]
    assert alone == ["original", "compressed", "compressed"]
    subjects = prepare(spec(packed), [spec(here.original)], here.options()).subjects
    assert [subject.role for subject in subjects] == ["original", "compressed"]


def test_names_and_the_slugs_of_files_stay_apart(here: Small) -> None:
    names = ["runs/a b", "runs/a-b", "runs/a b", "..", "ü"]
    subjects = prepare(None, [spec(here.original, name) for name in names], here.options(tasks=())).subjects
    assert [subject.spec.name for subject in subjects] == ["runs/a b", "runs/a-b", "runs/a b (2)", "..", "ü"]
    slugs = [subject.slug for subject in subjects]
    assert len(set(slugs)) == len(slugs)
    assert all(slug and "/" not in slug and not slug.startswith(".") for slug in slugs)


def test_what_is_used_is_known(here: Small) -> None:
    options = here.options(batch_size=3, num_fewshot=1)
    prepared = prepare(None, [spec(here.original)], options)
    assert {"python", "torch", "transformers", "lm_eval", "llmshrink"} <= prepared.versions.keys()
    used = prepared.text_used
    assert used is not None and prepared.windows is not None
    assert (used.window, used.tokens) == (24, prepared.windows.tokens)
    assert prepared.prompts and all(here.text.count(prompt) for prompt in prepared.prompts)


def test_settings_are_what_was_used_and_nothing_is_left_open(here: Small, tmp_path: Path) -> None:
    kept = shutil.copytree(here.tasks_dir, here.cache / "tasks of the caller")
    options = here.options(
        protocol="sliding",
        tasks_dir=(here.tasks_dir, kept),
        tasks=("demo_facts", "demo_cloze"),
        offload=tmp_path / "x9",
    )
    prepared = prepare(None, [spec(here.original)], options)
    found = settings_used(options, prepared, {"model": "float32"})
    assert found["scoring"] == {"protocol": "sliding", "window": 24, "stride": 12, "max_tokens": None}
    assert found["running"] == {
        "engine": "transformers", "device": "cpu", "dtype": {"model": "float32"}, "offload": True,
        "batch_size": {"text": 4096 // 24, "tasks": 32}, "trust_remote_code": False, "bos": False,
    }  # fmt: skip
    assert found["num_fewshot"] == {"demo_facts": 0, "demo_cloze": 0}
    assert found["tasks_dir"] == [str(here.tasks_dir)] and here.tasks_dir.is_absolute()
    assert found["prompts"] == list(prepared.prompts) != []
    assert found["limit"] == 6 and not {"cache", "command", "text"} & found.keys()
    assert "x9" not in json.dumps(found)
    asked = here.options(num_fewshot=2, batch_size=3, window=None, max_tokens=200, tasks=("demo_facts",))
    found = settings_used(asked, prepare(None, [spec(here.original)], asked), {})
    assert found["num_fewshot"] == {"demo_facts": 2}
    assert found["scoring"] == {"protocol": "gptq", "window": 128, "stride": 128, "max_tokens": 200}
    assert isinstance(found["running"], dict) and found["running"]["batch_size"] == {"text": 3, "tasks": 3}


def test_settings_are_those_that_the_engine_takes(here: Small) -> None:
    """The batch sizes that are written down are the ones that the passes and lm-eval get."""
    from llmshrink_eval.model import LoadOptions, load_model
    from llmshrink_eval.passes import default_batch_size
    from llmshrink_eval.tasks import fitting_batch_size

    prepared = prepare(None, [spec(here.original)], here.options())
    assert prepared.windows is not None
    assert prepared.batch_size == {
        "text": default_batch_size(prepared.windows.input_ids.shape[1]),
        "tasks": fitting_batch_size(load_model(here.original, LoadOptions()).config),
    }


def test_a_task_folder_named_from_here_is_written_down_whole(here: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.tasks_dir.parent)
    options = here.options(text=False, tasks_dir=(Path(here.tasks_dir.name),))
    found = settings_used(options, prepare(None, [spec(here.original)], options), {})
    assert found["tasks_dir"] == [str(here.tasks_dir)] and found["scoring"] is None


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"limit": 5}, True),
        ({"limit": None, "sample": 5}, True),
        ({"num_fewshot": 1}, True),
        ({"tasks_dir": "copied"}, False),
        ({"tasks_dir": "edited"}, True),
    ],
)
def test_the_tasks_fingerprint_is_of_their_content(
    change: dict[str, Any], other: bool, here: Small, tmp_path: Path
) -> None:
    def fingerprint(**changes: Any) -> str:
        data = prepare(None, [spec(here.original)], here.options(text=False, **changes)).task_data
        assert data is not None
        return data.fingerprint

    if "tasks_dir" in change:
        folder = shutil.copytree(here.tasks_dir, tmp_path / "elsewhere")
        for file in folder.glob("*.yaml"):
            file.write_text(file.read_text().replace(str(here.tasks_dir), str(folder)))
        if change["tasks_dir"] == "edited":
            rows = (folder / "demo_facts.jsonl").read_text()
            (folder / "demo_facts.jsonl").write_text(rows.replace("a", "e", 1))
        change = {"tasks_dir": (folder,)}
    assert (fingerprint(**change) != fingerprint()) == other
