"""The cache's promises: whole or absent, missed when anything changes, never trusted when damaged."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_small import Heard, Small, disturb, measured, small, spec, watched
from llmshrink_eval import cache as caches
from llmshrink_eval import prepare as preparing
from llmshrink_eval.cache import Cache, default_folder
from llmshrink_eval.errors import EvalError
from llmshrink_eval.evaluate import evaluate

KEY = {"model": "a", "size": [1, 2]}


@pytest.fixture
def here(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> Small:
    return small(model_of, story, tmp_path)


def test_what_is_kept_comes_back_under_its_key_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.get("cost", KEY) is None and not cache.root.exists()
    value = {"a": [1, 2.5, None, "\ud800"], "ü": True, "tiny": 1e-320}
    cache.put("cost", KEY, value)
    assert cache.get("cost", dict(reversed(KEY.items()))) == value
    assert cache.get("tasks", KEY) is None
    assert cache.get("cost", {**KEY, "size": [1, 3]}) is None
    cache.put("cost", KEY, 3)
    assert cache.get("cost", KEY) == 3
    assert [file.suffix for file in cache.root.rglob("*") if file.is_file()] == [".json"]


@pytest.mark.parametrize("damage", ["changed", "torn", "empty", "another key", "not json", "an older way"])
def test_an_entry_that_is_not_as_it_was_written_is_absent(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    cache.put("cost", KEY, {"seconds": 12.5})
    (file,) = tmp_path.rglob("*.json")
    text = file.read_text()
    if damage == "another key":
        cache.put("cost", {"model": "b"}, {"seconds": 1.0})
        (other,) = set(tmp_path.rglob("*.json")) - {file}
        shutil.copy(other, file)
    elif damage == "an older way":
        monkeypatch.setattr(caches, "VERSION", 0)
    else:
        changed = {"changed": text.replace("12.5", "12.6"), "torn": text[:-9], "empty": "", "not json": "[" + text}
        file.write_text(changed[damage])
    assert cache.get("cost", KEY) is None


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    for work in (lambda: cache.put("cost", KEY, 1), lambda: cache.folder("cost", KEY)):
        with pytest.raises(EvalError, match=r"file: can't be written: .*; choose another folder with --cache"):
            work()


def test_the_users_cache_folder_is_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "llmshrink" / "eval"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "llmshrink" / "eval"


ALL = {"cost", "read", "tasks", "generations"}
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"require": "token<9", "command": "another"}, set()),
    ({"window": 25}, {"read", "generations"}),
    ({"protocol": "sliding"}, {"read", "generations"}),
    ({"protocol": "sliding", "stride": 5}, {"read", "generations"}),
    ({"max_tokens": 120}, {"read", "generations"}),
    ({"batch_size": 2}, ALL),
    ({"limit": 3}, {"tasks"}),
    ({"limit": None, "sample": 3}, {"tasks"}),
    ({"num_fewshot": 1}, {"tasks"}),
    ({"seed": 1}, {"tasks"}),
    ({"tasks": ("demo_habits",)}, {"tasks"}),
    ({"speed": (2,)}, {"cost"}),
    ({"prompts": ("Eva",)}, {"generations"}),
    ({"fresh": True}, ALL),
]


@pytest.fixture(scope="module")
def warm(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A cache in which one evaluation has been kept."""
    made = small(model_of, story, tmp_path_factory.mktemp("warm"))
    evaluate(None, [spec(made.original)], made.options(speed=(1,)))
    return made


def work_of(here: Small, cache: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> set[str]:
    """What is done for an evaluation in a copy of its cache."""
    shutil.copytree(here.cache, cache)
    work = watched(monkeypatch)
    copied = dataclasses.replace(here, cache=cache)
    evaluate(None, [spec(here.original)], copied.options(**{"speed": (1,), **changes}))
    return {kind for kind, _ in work.done}


@pytest.mark.parametrize(("changes", "missed"), CHANGES, ids=[str(changes)[:40] for changes, _ in CHANGES])
def test_a_changed_setting_is_measured_anew_where_it_matters(
    changes: dict[str, Any], missed: set[str], warm: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work_of(warm, tmp_path / "cache", monkeypatch, **changes) == missed


@pytest.mark.parametrize(
    ("what", "missed"),
    [
        ("weights", ALL),
        ("tokenizer", ALL),
        ("text", {"read", "generations"}),
        ("items", {"tasks"}),
        ("task", {"tasks"}),
        ("versions", ALL),
        ("machine", {"cost"}),
    ],
)
def test_changed_data_is_measured_anew(
    what: str, missed: set[str], warm: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = warm
    if what in ("weights", "tokenizer"):
        folder = disturb(warm.original, tmp_path / "model", 0.0 if what == "tokenizer" else 1e-2)
        if what == "tokenizer":
            path = folder / "tokenizer_config.json"
            path.write_text(path.read_text() + "\n")
        changed = dataclasses.replace(warm, original=folder)
    elif what == "text":
        changed = dataclasses.replace(warm, text=warm.text[:-30] + "x" * 30)
    elif what in ("items", "task"):
        folder = shutil.copytree(warm.tasks_dir, tmp_path / "tasks")
        if what == "items":
            rows = (folder / "demo_facts.jsonl").read_text().splitlines(keepends=True)
            (folder / "demo_facts.jsonl").write_text("".join(rows[1:]))
        else:
            path = folder / "demo_facts.yaml"
            path.write_text(path.read_text().replace('target_delimiter: ""', 'target_delimiter: " "'))
        changed = dataclasses.replace(warm, tasks_dir=folder)
    elif what == "versions":
        monkeypatch.setattr(preparing, "versions_of", lambda engine: {"torch": "0.0"})
    else:
        monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert work_of(changed, tmp_path / "cache", monkeypatch) == missed


def test_a_copy_under_another_name_is_known(warm: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = shutil.copytree(warm.original, tmp_path / "renamed")
    assert work_of(dataclasses.replace(warm, original=copied), tmp_path / "cache", monkeypatch) == set()


@pytest.fixture(scope="module")
def compared(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kept comparison, a third model, and what is found of all three without any cache."""
    folder = tmp_path_factory.mktemp("compared")
    made = small(model_of, story, folder)
    near, third = (disturb(made.original, folder / name, 0.1, seed) for seed, name in enumerate(("near", "third")))
    evaluate(spec(made.original), [spec(near)], made.options(speed=(1,)))
    elsewhere = dataclasses.replace(made, cache=folder / "elsewhere")
    models = [spec(near), spec(third)]
    whole = evaluate(spec(made.original), models, elsewhere.options(speed=(1,)))
    return made, models, measured(whole.results)


ENTRIES = ("cost/*.json", "tasks/*.json", "generations/*.json", "reading/*/windows.jsonl", "digests/*.json")
BASELINE = ("header.json", "head.safetensors", "rows.bin", "done.jsonl")


DAMAGES = [
    *((pattern, "a byte in the middle") for pattern in ENTRIES),
    ("reading/*/windows.jsonl", "the last third gone"),
    *((f"reading/*/baseline/{name}", damage) for name in BASELINE for damage in ("a byte in the middle", "gone")),
    ("reading/*/baseline/rows.bin", "the last third gone"),
]


@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_a_damaged_file_is_measured_again(pattern: str, damage: str, compared: Any, tmp_path: Path) -> None:
    made, models, expected = compared
    cache = shutil.copytree(made.cache, tmp_path / "cache")
    files = list(cache.glob(pattern))
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        if damage == "gone":
            file.unlink()
        elif damage == "the last third gone":
            file.write_bytes(data[: len(data) * 2 // 3])
        else:
            data[len(data) // 2] ^= 0x10
            file.write_bytes(data)
    here = dataclasses.replace(made, cache=cache)
    heard = Heard()
    found = evaluate(spec(made.original), models, here.options(speed=(1,)), heard)
    assert measured(found.results) == expected
    if "baseline/rows" in pattern and damage == "a byte in the middle":
        assert "model: its pass over a text is damaged in the cache, and is made again" in heard.notes


@pytest.mark.parametrize("damage", [0.3, 0.8])
def test_answers_that_were_damaged_are_asked_again(
    damage: float, here: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink_eval import answers

    monkeypatch.setattr(answers, "STRETCH", 5)
    options = here.options(text=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, [spec(here.original)], options, Heard(stop=("tasks", 18)))
    (file,) = here.cache.rglob("answers.jsonl")
    data = bytearray(file.read_bytes())
    data[int(len(data) * damage)] ^= 0x01
    file.write_bytes(data)
    ended = evaluate(None, [spec(here.original)], options)
    elsewhere = dataclasses.replace(here, cache=tmp_path / "elsewhere").options(text=False)
    assert measured(ended.results) == measured(evaluate(None, [spec(here.original)], elsewhere).results)
