"""The verbs `eval` and `compare`: one set of options, defaults and names, from the command line to the evaluation."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_example import example
from eval_small import spoil
from llmshrink_eval.options import Options
from llmshrink_eval.results import Results

import llmshrink
from llmshrink import api
from llmshrink.api.evaluate import EvalSettings
from llmshrink.cli import run
from llmshrink.cli.settings import settings as declared
from llmshrink.errors import LlmshrinkError
from llmshrink.evaluation import verbs
from llmshrink.evaluation.settings import Settings
from llmshrink.evaluation.verbs import check_report_folder, options_of

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}
FLAGS = (
    "--text notes.txt --protocol sliding --window 64 --stride 16 --max-tokens 1000 --tasks a,b --tasks-dir mine "
    "--limit 5 --sample 4 --num-fewshot 2 --apply-chat-template --engine vllm --device cuda:1 --dtype float16 "
    "--batch-size 3 --bos never "
    "--offload --speed 1,4 --prompt one --prompt two --require kl<=1 --seed 7 --cache kept --fresh --trust-remote-code"
)
GIVEN: dict[str, Any] = {
    "text": "notes.txt", "protocol": "sliding", "window": 64, "stride": 16, "max_tokens": 1000, "tasks": "a,b",
    "tasks_dir": "mine", "limit": 5, "sample": 4, "num_fewshot": 2, "apply_chat_template": True, "engine": "vllm",
    "device": "cuda:1", "dtype": "float16", "batch_size": 3, "offload": True, "speed": "1,4",
    "require": "kl<=1", "seed": 7, "cache": "kept", "fresh": True, "trust_remote_code": True,
    "bos": "never",
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the twins hand to the evaluation, which isn't run."""
    found: dict[str, Any] = {}

    def evaluate(original: str | None, models: list[str], output: Path, settings: Settings, **more: Any) -> Results:
        found.update(original=original, models=models, output=output, settings=settings, **more)
        return example()

    monkeypatch.setattr(verbs, "evaluate", evaluate)
    return found


def test_defaults_are_the_same_on_the_command_line_and_in_python(asked: dict[str, Any]) -> None:
    on_the_line = {name: each.default for name, each in inspect.signature(declared).parameters.items()}
    assert on_the_line == DEFAULTS
    assert typing.get_type_hints(EvalSettings).keys() == DEFAULTS.keys()
    for call in (lambda: run(["eval", "demo", "-o", "out"]), lambda: llmshrink.eval("demo", output="out")):
        call()
        assert asked["settings"] == Settings()
        assert (asked["original"], asked["models"], asked["output"]) == (None, ["demo"], Path("out"))
    for call in (
        lambda: run(["compare", "a", "b", "c", "-o", "out"]),
        lambda: llmshrink.compare("a", "b", "c", output="out"),
    ):
        call()
        assert asked["settings"] == Settings()
        assert (asked["original"], asked["models"], asked["output"]) == ("a", ["b", "c"], Path("out"))


def test_settings_that_options_hold_too_have_the_same_defaults(tmp_path: Path) -> None:
    made = options_of(Settings(), tmp_path, command=None)
    plain = Options(speed=(1, 8))
    same = dataclasses.replace(made, running=plain.running, cache=plain.cache)
    assert same == plain
    assert dataclasses.replace(made.running, device="cpu") == plain.running


@pytest.mark.parametrize("verb", ["eval demo", "compare demo other"])
def test_every_flag_reaches_the_evaluation(verb: str, asked: dict[str, Any]) -> None:
    assert run([*verb.split(), "-o", "out", *FLAGS.split()]) == 1  # the example fails its own conditions
    found = dataclasses.asdict(asked["settings"])
    assert tuple(found.pop("prompts")) == ("one", "two")
    assert found == GIVEN
    assert found.keys() | {"prompts"} == DEFAULTS.keys()


def test_the_baseline_is_the_original(asked: dict[str, Any]) -> None:
    run(["eval", "small", "--baseline", "large", "-o", "out"])
    assert (asked["original"], asked["models"]) == ("large", ["small"])
    assert asked["command"] == "llmshrink eval small --baseline large -o out"


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_help_names_every_option_and_no_other(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([verb, "--help"])
    named = set(re.findall(r"--([a-z-]+)", re.sub(r"`[^`]*`", "", capsys.readouterr().out)))
    renamed = {"prompts": "prompt"}
    expected = {renamed.get(name, name).replace("_", "-") for name in DEFAULTS} | {"output", "json", "help"}
    assert named == (expected | {"baseline"} if verb == "eval" else expected)


def test_json_is_the_results_file_and_nothing_else(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "demo", "-o", "out", "--json"]) == 1
    out, err = capsys.readouterr()
    assert Results.model_validate_json(out) == example()
    assert json.loads(out)["models"][0]["role"] == "original"
    failed = [each for each in example().requirements if not each.passed]
    assert err.count("isn't met: ") == len(failed) > 0


def test_conditions_that_failed_are_named_with_their_model_and_value(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "a", "b", "-o", "out"]) == 1
    out, err = capsys.readouterr()
    for each in example().requirements:
        line = f"llmshrink: {each.model}: {each.condition} isn't met: {each.value:.6g}\n"
        assert (line in err) != each.passed
    assert out.endswith(f"report      {Path('out') / 'report.html'}\n")


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(LlmshrinkError, match="nothing to compare with the original"):
        llmshrink.compare("demo", output="out")
    assert run(["compare", "demo", "-o", "out"]) == 2


def test_the_twins_are_the_packages_own() -> None:
    assert llmshrink.eval is api.eval and llmshrink.compare is api.compare


# Folders for the report.


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"notes.txt": "mine"}, r"out holds notes.txt and no report of llmshrink's; choose an empty or a new folder"),
        ({"results.json": "{}"}, r"results.json is there and no report of llmshrink's"),
        ({"results.json": '{"schema_version": "x"}'}, r"results.json is there and no report of llmshrink's"),
        ({"results.json": "[1"}, r"results.json is there and no report of llmshrink's"),
        ({"config.json": "{}", "report.html": ""}, r"out holds config.json and no report"),
    ],
)
def test_a_folder_of_somebody_elses_is_refused(there: dict[str, str], says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in there.items():
        (out / name).write_text(text)
    with pytest.raises(LlmshrinkError, match=says):
        check_report_folder(out)
    assert {file.name: file.read_text() for file in out.iterdir()} == there


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmshrinkError, match=r"choose another folder with -o|name a folder for the report with -o"):
        check_report_folder(tmp_path / name)


def test_new_and_empty_folders_and_reports_even_half_written_are_fine(tmp_path: Path) -> None:
    check_report_folder(tmp_path / "new" / "newer")
    check_report_folder(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "report.html.part").write_text("")
    check_report_folder(tmp_path)
    example().write(tmp_path / "results.json")
    (tmp_path / "notes.txt").write_text("kept")
    check_report_folder(tmp_path)
    assert not (tmp_path / "new").exists()


# What a name stands for.


@pytest.mark.parametrize("tasks", ["demo", "demo_facts", ["demo_cloze", " demo_habits "], "other,demo_*"])
def test_the_demos_tasks_are_found_by_any_of_their_names(tasks: str | list[str], tmp_path: Path) -> None:
    options = options_of(Settings(tasks=tasks, cache=tmp_path), tmp_path, command=None)
    assert options.tasks_dir == (tmp_path / "demo-tasks",)
    assert (tmp_path / "demo-tasks" / "demo_facts.yaml").is_file()
    assert all(name == name.strip() for name in options.tasks)


def test_the_demos_tasks_are_made_whole_again_and_else_left_alone(tmp_path: Path) -> None:
    settings = Settings(tasks="demo", cache=tmp_path)
    options_of(settings, tmp_path, command=None)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "demo-tasks").iterdir()}
    torn = tmp_path / "demo-tasks" / "demo_facts.jsonl"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:100])
    options_of(settings, tmp_path, command=None)
    assert torn.read_bytes() == whole
    assert all(file.stat().st_mtime_ns == time for file, time in files.items() if file != torn)
    assert {path.name for path in tmp_path.iterdir()} == {"demo-tasks"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 8)),
        ({"speed": "none"}, ()),
        ({"speed": "2, 4"}, (2, 4)),
        ({"speed": [3]}, (3,)),
        ({"offload": True}, ()),
    ],
)
def test_batch_sizes_to_time(settings: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    assert options_of(Settings(**settings), tmp_path, command=None).speed == expected


@pytest.mark.parametrize("speed", ["x", "0", "1,,2", "-1"])
def test_what_is_no_batch_size_is_refused(speed: str, tmp_path: Path) -> None:
    with pytest.raises(LlmshrinkError, match=f"--speed {speed}: "):
        options_of(Settings(speed=speed), tmp_path, command=None)


def test_the_demos_text_is_one_document_that_was_never_trained_on(tmp_path: Path) -> None:
    text = options_of(Settings(text="demo"), tmp_path, command=None).scoring.text
    assert text is not None and len(text.documents) == 1
    assert verbs.DEMO_CHARACTERS <= len(text.documents[0]) < verbs.DEMO_CHARACTERS + 5000


# Through the verb, on a tiny model.


def evaluated(*arguments: str | int | Path) -> int:
    return run([*map(str, arguments), "--speed", "none"])


def test_bad_input_is_refused_before_anything_is_written(
    model_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("llama")
    capsys.readouterr()  # of who made it
    records = tmp_path / "records.jsonl"
    records.write_text('{"text": 3}\n')
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": ""}\n{"text": "half \\ud83d"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for text, says in (
        (records, "holds no text (none of 1 records can be used: line 1 has text that is a int, not a string)"),
        (half, "holds no text (1 of 2 records was left out: line 2 text has half of a surrogate pair"),
        (empty, "holds no text"),
        (tmp_path / "none.parquet", "no such file"),
    ):
        assert evaluated("eval", model, "--text", text, "-o", tmp_path / "out", "--cache", tmp_path / "c") == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("llmshrink: error: ") and err.count("\n") == 1 and says in err
    assert evaluated("eval", tmp_path / "none", "--text", "demo", "-o", tmp_path / "out") == 2
    assert "no such folder, and not a Hub id" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()


def test_nan_stops_with_exit_code_1_and_leaves_no_report(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoil(model_of("llama"), tmp_path / "broken")
    common: tuple[str | int | Path, ...] = (
        "--text",
        story,
        "--window",
        32,
        "--max-tokens",
        256,
        "--cache",
        tmp_path / "cache",
        "-o",
        tmp_path / "out",
    )
    assert evaluated("compare", model_of("llama"), broken, *common) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"llmshrink: error: {broken}: NaN or infinite logits in window 0 of 8, from its token \d+", error)
    assert not (tmp_path / "out").exists()
    # What was measured of the original is kept.
    assert evaluated("compare", model_of("llama"), broken, *common) == 1
    assert "text, generations from the cache" in capsys.readouterr().err


def test_python_and_the_command_line_find_the_same(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"text": str(story), "window": 32, "max_tokens": 256, "speed": "none", "cache": tmp_path / "cache"}
    results = llmshrink.eval(model_of("llama"), output=tmp_path / "a", **arguments)  # type: ignore[arg-type]
    assert Results.read(tmp_path / "a" / "results.json") == results
    assert evaluated(
        "eval", model_of("llama"), "--text", story, "--window", 32, "--max-tokens", 256, "--cache", tmp_path / "cache",
        "-o", tmp_path / "b", "--json",
    ) == 0  # fmt: skip
    out, err = capsys.readouterr()
    made = Results.model_validate_json(out)
    assert made.models[0].perplexity == results.models[0].perplexity
    assert made == Results.read(tmp_path / "b" / "results.json")
    assert err.endswith("text, generations from the cache\n")


@pytest.mark.filterwarnings("error:You are calling .generate:UserWarning")
def test_streamed_it_is_timed_and_goes_on_from_a_prompt_where_that_is_asked(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    asked = {"text": str(story), "window": 32, "max_tokens": 64, "cache": tmp_path / "cache", "fresh": True}
    more = {"speed": "2", "prompts": ["Once upon"]}
    streamed, whole = (
        llmshrink.eval(model_of("llama"), output=tmp_path / str(offload), offload=offload, **more, **asked).models[0]  # type: ignore[arg-type]
        for offload in (True, False)
    )
    assert streamed.generations == whole.generations and len(streamed.generations) == 1
    assert streamed.perplexity == whole.perplexity
    for model in (streamed, whole):
        assert model.cost is not None and [speed.batch_size for speed in model.cost.speed] == [2]
        assert all(speed.decode_tokens_per_second > 0 for speed in model.cost.speed)
    # Neither is done of itself: each token reads the whole model again.
    left = llmshrink.eval(model_of("llama"), output=tmp_path / "left", offload=True, **asked).models[0]  # type: ignore[arg-type]
    assert left.cost is not None and left.cost.speed == () and left.generations == ()
