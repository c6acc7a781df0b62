"""What can be known at the start fails there: no name, config, record or card of an output stops a run at its end."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import contents, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import llmshrink
from llmshrink.checkpoint import beside
from llmshrink.checkpoint.beside import belongs, side_files
from llmshrink.cli import run
from llmshrink.distillation import run as distilling
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError, SourceError
from llmshrink.run import convert as converting
from llmshrink.run import disk
from llmshrink.run import quantize as runs
from llmshrink.run.rehearse import config_bytes, rehearse

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32}
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_steps": 2, "warmup": 1}
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.text("a\ud800\udfff", max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text("ab.\ud800", max_size=3), each, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(VALUES)
def test_what_is_found_unwritable_is_just_what_cannot_be_written(value: Any) -> None:
    try:
        disk.json_text(value).encode()
    except ValueError:
        assert disk.unwritable(value) is not None
    else:
        assert disk.unwritable(value) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": {"b": [1, NaN]}}', "a.b[1] is nan"),
        ('{"a": Infinity}', "a is inf"),
        ('{"a": 1e999}', "a is inf"),
        ('{"a": -1e999}', "a is -inf"),
        ('{"a": "\\ud800"}', "a has half of a character ('\\ud800')"),
        ('{"\\udfff": 1}', "it has a name with half of a character ('\\udfff')"),
    ],
)
def test_a_config_that_cannot_be_written_again_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError) as raised:
        config_bytes(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/config.json: {says}")
    assert str(raised.value).endswith("which no JSON file can say; correct it, or download it again")


def test_a_config_that_is_nested_too_deep_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 500 + "]" * 500 + "}")
    with pytest.raises(SourceError, match=r"config\.json: can't be read as JSON; download or copy it again"):
        config_bytes(tmp_path)


@pytest.mark.parametrize("text", ["{", "1" * 5000, "[" * 100_000])
def test_a_config_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config.json: can't be read as JSON"):
        config_bytes(tmp_path)


# Each verb, for each thing that its end writes.


@pytest.fixture(scope="module")
def sparse(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "sparse"
    llmshrink.prune(model_of("llama"), output=out, recipe="magnitude-2of4", calibration=story, **SMALL)
    return out


@pytest.fixture
def verbs(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Path], Any]]:
    """Each verb with a source; none may come to its work."""

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr(runs, "_Run", never)
    monkeypatch.setattr(distilling, "_teachers", never)
    monkeypatch.setattr(converting, "_write_file", never)
    out = {"output": tmp_path / "out"}
    return {
        "quantize": lambda source: llmshrink.quantize(source, **out, calibration=story, group_size=32, **SMALL),
        "prune": lambda source: llmshrink.prune(source, **out, calibration=story, **SMALL),
        "compress": lambda source: llmshrink.compress(
            source, **out, recipe="sparsegpt-2of4-gptq-w4a16", calibration=story, group_size=32, **SMALL
        ),
        "distill": lambda source: llmshrink.distill(source, source, **out, data=story, **SHORT),
        "convert": lambda source: llmshrink.convert(source, **out, format="llmshrink"),
    }


VERBS = ("quantize", "prune", "compress", "distill", "convert")


def _spoil_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "note": {"of": [1, math.nan]}}))


def _spoil_name(source: Path) -> None:
    with open(os.fsencode(source) + b"/\xff.tiktoken", "wb") as file:
        file.write(b"x")


def _spoil_link(source: Path) -> None:
    (source / "merges.txt").symlink_to("/etc/hostname")


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "config": (_spoil_config, r"config.json: note.of\[1\] is nan, which no JSON file can say; correct it"),
    "name": (
        _spoil_name,
        "\ufffd.tiktoken: its name isn't UTF-8, .*; rename the file if it is the model's, else remove",
    ),
    "link": (_spoil_link, "merges.txt is a link to /etc/hostname, out of the model's folder"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("verb", VERBS)
def test_what_the_end_could_not_write_stops_the_start(
    verb: str, spoilt: str, verbs: dict[str, Callable[[Path], Any]], sparse: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sparse, source) if verb == "convert" else make_model(source)
    spoil, says = SPOILT[spoilt]
    spoil(source)
    with pytest.raises(LlmshrinkError, match=says):
        verbs[verb](source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("verb", "place", "value", "says"),
    [
        ("convert", "quality", math.inf, "kl_mean is inf"),  # a distillation has a quality of its own
        *(
            (verb, *spoilt)
            for verb in ("distill", "convert")
            for spoilt in (
                ("model", "\ud800", "model has half of a character"),
                ("notes", ["fine", "\udc80"], r"notes\[1\] has half"),
                ("calibration", "\ud800", "name has half"),
                ("left_out", {"\ud800": "why"}, "left_out has a name"),
            )
        ),
    ],
)
def test_a_record_that_could_not_be_written_again_stops_the_start(
    verb: str, place: str, value: Any, says: str, verbs: dict[str, Callable[[Path], Any]], sparse: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sparse, tmp_path / "source"))
    record = json.loads((source / "llmshrink.json").read_text())
    inner = {"quality": "kl_mean", "calibration": "name"}.get(place)
    record |= {place: value if inner is None else {**record[place], inner: value}}
    (source / "llmshrink.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match=f"^{source}: the result's llmshrink.json couldn't be written: .*{says}"):
        verbs[verb](source)


@pytest.mark.parametrize("verb", ["distill", "convert"])
def test_a_recipe_that_the_card_could_not_tell_stops_the_start(
    verb: str, verbs: dict[str, Callable[[Path], Any]], sparse: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sparse, tmp_path / "source"))
    (source / "recipe.yaml").write_text("steps: [")
    with pytest.raises(CheckpointError, match=f"^{source}: recipe.yaml: isn't the recipe of a run"):
        verbs[verb](source)


@pytest.mark.parametrize(
    "head",
    ['license: "\\ud800"', "license: other\nlicense_name: !!int ''", "license: [[x]]", "license: 2001-99-99", "- x"],
)  # fmt: skip
def test_no_front_matter_of_a_source_stops_an_end(head: str, story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "README.md").write_text(f"---\n{head}\n---\n# a model\n")
    record = {"sites": [], "model": "m", "recipe": "r", "notes": [], "revision": None, "held_out": "t"}
    identity = {
        "device": "cpu",
        "instructions": "i",
        "threads": 1,
        "versions": {"llmshrink": "1"},
        "format": "compressed-tensors",
    }
    calibration = {"tokens": 1, "name": "t"}
    quality = {
        "ppl_before": 1.0,
        "ppl_after": 1.0,
        "kl_mean": 0.0,
        "kl_stderr": 0.0,
        "top1_agreement": 1.0,
        "tokens": 1,
    }
    more = {"identity": identity, "calibration": calibration, "quality": quality, "bytes_before": 1}
    rehearse({**record, **more}, source, None)


# The run itself, through every odd name at once.


def test_a_run_ends_whatever_its_texts_and_files_are_called(tmp_path: Path, story: Path) -> None:
    source = make_model(tmp_path / "<b>*mo`del*|\n[x](y)")
    long = "a" * (255 - len(".tiktoken")) + ".tiktoken"
    for name in (long, "日本.tiktoken", "a b$.jinja", "chat_template.jinja"):
        (source / name).write_text("x")
    (source / "README.md").write_text(
        '---\nlicense: "Their \\ud800 <b>own</b>"\nlicense_link: javascript:x\n---\n# it\n'
    )
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/st\xff|ory.txt"))
    text.write_text(story.read_text())
    out = tmp_path / "out"
    assert llmshrink.quantize(source, output=out, calibration=text, group_size=32, **SMALL).ok
    record = json.loads((out / "llmshrink.json").read_text())
    assert record["calibration"]["name"] == "st\ufffd|ory.txt"
    assert {long, "日本.tiktoken", "chat_template.jinja", "SOURCE_README.md"} <= set(record["files"])
    card = (out / "README.md").read_text()
    assert card.count("\n# ") == 1 and "license: other" in card and "javascript" not in card
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match and yaml.safe_load(match[1])["license_name"] == "Their \ufffd <b>own</b>"


def test_side_files_are_those_of_the_start(tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source")
    (source / "LICENSE").write_text("as it was")
    solve = runs._Run._solve

    def change(self: Any, *arguments: Any) -> None:
        (source / "LICENSE").unlink(missing_ok=True)
        (source / "NOTICE").write_text("new")
        (source / "config.json").write_text("{}")
        solve(self, *arguments)

    monkeypatch.setattr(runs._Run, "_solve", change)
    out = tmp_path / "out"
    assert llmshrink.quantize(source, output=out, calibration=story, group_size=32, **SMALL).ok
    assert (out / "LICENSE").read_text() == "as it was" and not (out / "NOTICE").exists()


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "tokenizer_config.json"])
def test_side_files_that_changed_before_a_run_goes_on_stop_it_by_name(
    name: str, tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is new, one that is gone, and one that makes the same tokens."""
    source, out = make_model(tmp_path / "source"), tmp_path / "out"
    (source / "LICENSE").write_text("as it was")
    how: dict[str, Any] = {"output": out, "calibration": story, "group_size": 32, **SMALL}

    def stop(self: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs._Run, "_solve", stop)
        with pytest.raises(KeyboardInterrupt):
            llmshrink.quantize(source, **how)
    before = (source / name).read_text() if (source / name).exists() else None
    if name == "LICENSE":
        (source / name).unlink()
    else:
        (source / name).write_text((before or "") + "\n")
    with pytest.raises(
        OutputError, match=rf"out\.partial holds an unfinished run that began with another {name} in the"
    ):
        llmshrink.quantize(source, **how)
    if before is None:
        (source / name).unlink()
    else:
        (source / name).write_text(before)
    assert llmshrink.quantize(source, **how).ok
    assert (out / "LICENSE").read_text() == "as it was" and not (out / "NOTICE").exists()


@pytest.mark.parametrize("verb", ["convert", "distill"])
def test_the_end_of_another_verb_carries_what_lay_there_at_the_start(
    verb: str, sparse: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(sparse, tmp_path / "source"))
    before = contents(source)
    where, name = (converting, "_write_file") if verb == "convert" else (distilling, "train")
    work = getattr(where, name)

    def change(*arguments: Any, **named: Any) -> Any:
        (source / "tokenizer.json").unlink(missing_ok=True)
        return work(*arguments, **named)

    monkeypatch.setattr(where, name, change)
    out = tmp_path / "out"
    if verb == "convert":
        assert llmshrink.convert(source, output=out, format="llmshrink").ok
    else:
        assert llmshrink.distill(source, source, output=out, data=story, **SHORT).ok
    assert contents(out)["tokenizer.json"] == before["tokenizer.json"]
    assert contents(out)["recipe.yaml"] == before["recipe.yaml"]


# Side files, alone.


def test_a_name_that_is_no_text_belongs_to_no_model() -> None:
    for name in (b"\xff.tiktoken", b"LICENSE\xfe", b"a\xffchat_template.jinja"):
        assert not belongs(os.fsdecode(name))


def test_a_strange_name_that_is_not_the_model_s_is_no_matter(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.log", "wb"):
        pass
    assert list(side_files(tmp_path)) == []


def test_a_side_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merges.txt").write_text("x")

    class Closed(type(tmp_path)):  # type: ignore[misc]
        def open(self, *_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(beside, "_candidates", lambda source: [Closed(tmp_path / "merges.txt")])
    with pytest.raises(CheckpointError, match=r"merges.txt: can't be read: Permission denied; let this user read it"):
        list(side_files(tmp_path))


def test_the_command_says_it_in_a_line(
    model_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(model_of("llama"), tmp_path / "source"))
    _spoil_config(source)
    assert run(["quantize", str(source), "-o", str(tmp_path / "out"), "--calibration", "demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmshrink: error: {source}/config.json: note.of[1] is nan")
