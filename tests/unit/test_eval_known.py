"""A whole evaluation that was carried out before is found without its libraries, and only where nothing has changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_small import Heard, disturb
from llmshrink_eval.results import Results

import llmshrink
from llmshrink.evaluation import known, verbs
from llmshrink.evaluation.settings import Settings

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metadata:
  version: 3
"""
ROWS = [{"question": f"Eva took the {word}", "answer": 0, "choices": ["red key", "blue key"]} for word in "abcdef"]


FILES = ("text.txt", "tasks/colours.yaml", "rows.jsonl", "model/config.json", "model/llmshrink.json")
CODE = "as it is"
"""Whoever works on a checkout may save a file while its tests run."""


class Asked(Exception):
    """Somebody set out to measure."""


@pytest.fixture(scope="module")
def first(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An evaluation of a text and a task with data of its own, carried out once."""
    folder: Path = tmp_path_factory.mktemp("known")
    shutil.copytree(model_of("llama"), folder / "model")
    (folder / "text.txt").write_text(story.read_text()[:1500])
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks" / "colours.yaml").write_text(TASK.format(file=folder / "rows.jsonl"))
    asked = {
        "text": str(folder / "text.txt"), "window": 32, "tasks": "colours", "tasks_dir": folder / "tasks",
        "speed": "none", "cache": folder / "cache",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "_code", lambda: CODE)
        llmshrink.eval(folder / "model", output=folder / "report", **asked)
    return {"folder": folder, "asked": asked}


@pytest.fixture
def copied(first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same with a cache and a report of the test's own; whoever sets out to measure is stopped."""
    for name in ("cache", "report"):
        shutil.copytree(first["folder"] / name, tmp_path / name)

    def stop(*_: object, **__: object) -> None:
        raise Asked

    monkeypatch.setattr(verbs, "options_of", stop)
    monkeypatch.setattr(known, "_code", lambda: CODE)
    return {**first["asked"], "cache": tmp_path / "cache", "output": tmp_path / "report"}


def test_the_same_again_is_found_whole_and_said_to_be(
    first: dict[str, Any], copied: dict[str, Any], tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "report").rglob("*")}
    heard = Heard()
    found = llmshrink.eval(first["folder"] / "model", progress=heard, **copied)
    assert heard.parts == []
    assert heard.notes == [f"{first['folder'] / 'model'}: cost, text, tasks, generations from the cache"]
    assert found == Results.read(first["folder"] / "report" / "results.json")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "report").rglob("*")} == before


def test_another_folder_gets_the_same_report_with_its_own_command(
    first: dict[str, Any], copied: dict[str, Any]
) -> None:
    copied["output"] = copied["output"].with_name("another")
    found = llmshrink.eval(first["folder"] / "model", command="llmshrink eval ...", **copied)
    assert found == Results.read(copied["output"] / "results.json") and found.command == "llmshrink eval ..."
    assert found.models[0].cached == ("cost", "text", "tasks", "generations")
    samples = found.models[0].tasks["colours"].samples or ""
    assert (copied["output"] / samples).read_bytes() == (first["folder"] / "report" / samples).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"window": 33}, {"require": "token<1e9"}, {"seed": 1}, {"fresh": True}, {"limit": 2}, {"speed": "1"}],
    ids=str,
)
def test_another_question_is_measured(changes: dict[str, Any], first: dict[str, Any], copied: dict[str, Any]) -> None:
    with pytest.raises(Asked):
        llmshrink.eval(first["folder"] / "model", **{**copied, **changes})


def test_another_original_or_model_is_measured(first: dict[str, Any], copied: dict[str, Any], tmp_path: Path) -> None:
    folder = first["folder"] / "model"
    with pytest.raises(Asked):
        llmshrink.eval(folder, baseline=folder, **copied)
    with pytest.raises(Asked):
        llmshrink.eval(disturb(folder, tmp_path / "other", 0.01), **copied)


@pytest.mark.parametrize("what", FILES)
def test_a_changed_file_is_seen(what: str, first: dict[str, Any], copied: dict[str, Any]) -> None:
    file = first["folder"] / what
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes((before or b"{}") + b"\n")
        with pytest.raises(Asked):
            llmshrink.eval(first["folder"] / "model", **copied)
    finally:
        file.unlink() if before is None else file.write_bytes(before)
    llmshrink.eval(first["folder"] / "model", **copied)


@pytest.mark.parametrize("what", ["versions_of", "_machine", "_code"])
def test_another_version_machine_or_code_of_ours_is_seen(
    what: str, first: dict[str, Any], copied: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, what, lambda *_: {"other": "1"})
    with pytest.raises(Asked):
        llmshrink.eval(first["folder"] / "model", **copied)


def test_what_was_kept_and_is_torn_is_measured_again(first: dict[str, Any], copied: dict[str, Any]) -> None:
    (file,) = (copied["cache"] / "whole").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Asked):
        llmshrink.eval(first["folder"] / "model", **copied)


def test_our_codes_mark_is_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(
        Path(verbs.__file__).parents[1], tmp_path / "llmshrink", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(llmshrink, "__file__", str(tmp_path / "llmshrink" / "__init__.py"))
    before = known._code()
    for file, seen in (("formats/__init__.py", True), ("cli/eval.py", False)):
        path = tmp_path / "llmshrink" / file
        path.write_text(path.read_text() + "\n")
        assert (known._code() != before) == seen
        before = known._code()


def kept(**asked: Any) -> bool:
    """Whether an evaluation of this would be kept whole."""
    return looked(None, **asked)._key is not None


def looked(original: str | None, **asked: Any) -> known.Known:
    made = known.Known(original, ["demo"], Settings(**asked))
    made.look()
    return made


def test_what_a_first_run_keeps_a_second_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line: the first has imported torch when it takes note of everything, the second hasn't."""
    from eval_example import example
    from llmshrink_eval.outcome import Evaluation

    def begun() -> known.Known:
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "torch")
            return known.Known(None, ["demo"], Settings(text="demo", cache=tmp_path))

    monkeypatch.setattr(known, "_code", lambda: CODE)
    first = begun()
    assert first.find() is None and "torch" in sys.modules
    first.look()
    first.keep(Evaluation(example(), {}, {model.name: ("cost",) for model in example().models}, ()))
    assert begun().find() is not None
    # Whoever has torch in other hands asks another question.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert known.Known(None, ["demo"], Settings(text="demo", cache=tmp_path)).find() is None


def test_what_lies_on_the_hub_is_not_kept_whole(tmp_path: Path) -> None:
    here = {"cache": tmp_path}
    assert kept(text="demo", **here) and kept(tasks="demo", **here)
    assert not kept(text="wikitext:wikitext-2-raw-v1:test", **here)
    assert not kept(text=str(tmp_path / "nothing.txt"), **here)
    assert looked("owner/name", text="demo", **here)._key is None
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "a.yaml"
    task.write_text("include: common.yaml\ntask: a\n")
    assert kept(tasks="a", tasks_dir=tmp_path / "tasks", **here)
    task.write_text("include: ../common.yaml\ntask: a\n")
    assert not kept(tasks="a", tasks_dir=tmp_path / "tasks", **here)


def test_data_from_elsewhere_are_not_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eval_example import example
    from llmshrink_eval.outcome import Evaluation

    monkeypatch.setattr(known, "_code", lambda: CODE)
    parts = {model.name: ("cost",) for model in example().models}
    for tasks, files, whole in (("demo", None, True), ("arc_easy", None, False), ("arc_easy", (), True)):
        asked = {"tasks": tasks, "cache": tmp_path / tasks / str(files)}
        looked(None, **asked).keep(Evaluation(example(), {}, parts, files))
        assert (looked(None, **asked).find() is not None) == whole
