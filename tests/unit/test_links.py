"""Links in a model's folder: no byte from outside, or of a name that is no model's, gets into an output or is sent."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError, LlmshrinkError
from llmshrink.hub.folder import contents
from llmshrink.run.finish import copy_side_files
from llmshrink.run.rehearse import config_bytes
from llmshrink.run.verify import read_record

PRIVATE = b'{"private": 1}'
OUTSIDE = ("private.txt", "merges.txt", "private/a.jinja", ".git/annex/objects/key", "blobs/1")
INSIDE = ("id_rsa", "notes.txt", "train.py", "private/a.jinja", "LICENSES/key.pem", ".git/config")
PUBLIC = ("vocab.json", "merges.txt", "LICENSE", "additional_chat_templates/tool.jinja")
STORED = (".git/annex/objects/x1/key", ".git/lfs/objects/ab/abc")
NAMED = (
    *("config.json", "merges.txt", "vocab.txt", "README.md", "LICENSE", "hop", "tokenizer.json", "private.d"),
    *("additional_chat_templates", "LICENSES", "additional_chat_templates/a.jinja", "LICENSES/MIT.txt"),
)


def tree(root: Path) -> Path:
    """A model's folder, whose own files say public, beside what is private."""
    for place, names, text in (
        (root, OUTSIDE, PRIVATE),
        (root / "model", INSIDE, PRIVATE),
        (root / "model", PUBLIC, b'{"public": 1}'),
        (root / "model", STORED, b'{"stored": 1}'),
    ):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(text)
    (root / "model" / "config.json").write_bytes(b'{"public": 1}')
    return root / "model"


TARGETS = (
    *(f"{up}{name}" for name in OUTSIDE for up in ("../", "../../")),
    *(f"{up}{name}" for name in (*INSIDE, *PUBLIC, *STORED, *NAMED) for up in ("", "../", "../model/")),
    *("..", "private", "../private", ".git", "/etc/hostname"),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(links=st.lists(st.tuples(st.sampled_from(NAMED), st.sampled_from(TARGETS)), min_size=1, max_size=4))
def test_no_byte_that_isnt_the_models_comes_into_an_output(
    links: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("links")
    model, out = tree(root), root / "out"
    out.mkdir()
    for name, target in links:
        path = model / name
        if os.path.lexists(path) and not path.is_dir():
            path.unlink()
        if path.parent.is_dir() and not os.path.lexists(path):
            path.symlink_to(target)
    found = []
    for copy in (lambda: copy_side_files(model, out), lambda: found.append(config_bytes(model))):
        with suppress(CheckpointError):
            copy()
    found += [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert set(found) <= {b'{"public": 1}', b'{"stored": 1}'}
    shutil.rmtree(root)


@pytest.mark.parametrize("name", ["merges.txt", "additional_chat_templates/a.jinja", "LICENSE"])
def test_a_file_of_the_folder_under_another_name_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = tree(tmp_path)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(model / "id_rsa")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a link to .*id_rsa, whose name is no model's"):
        copy_side_files(model, tmp_path / "out")


@pytest.mark.parametrize("stored", STORED)
def test_the_contents_of_a_clone_are_followed(stored: str, tmp_path: Path) -> None:
    model = tree(tmp_path)
    for name in ("tokenizer.model", "config.json"):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(stored)
    (tmp_path / "out").mkdir()
    copy_side_files(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == config_bytes(model) == b'{"stored": 1}'
    assert not (tmp_path / "out" / "tokenizer.model").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_config_and_weights_from_outside_are_refused(
    name: str, tmp_path: Path, story: Path, model_of: Callable[..., Path]
) -> None:
    model = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    (model / name).rename(tmp_path / "elsewhere.safetensors")
    (model / name).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(LlmshrinkError, match=rf"{name} is a link to .*elsewhere\.safetensors, out of the model's"):
        llmshrink.quantize(model, output=tmp_path / "out", calibration=story, samples=8, seq_len=32, group_size=32)
    assert not (tmp_path / "out").exists()
    (model / name).unlink()
    (tmp_path / "elsewhere.safetensors").rename(model / ("weights-1.safetensors"))
    (model / name).symlink_to("weights-1.safetensors")
    if name == "config.json":  # whose place no other name takes
        with pytest.raises(CheckpointError, match="whose name is no model's"):
            config_bytes(model)
    else:
        with CheckpointIndex.open(model) as index:
            assert len(index) > 0


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sent") / "out"
    llmshrink.quantize(model_of("llama"), output=place, calibration=story, samples=8, seq_len=32, group_size=32)
    return place


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_nothing_that_a_link_leads_to_is_sent(
    data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Even where the bytes are those that were there."""
    root = tmp_path_factory.mktemp("push")
    out = Path(shutil.copytree(made, root / "out"))
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from([*names, "LICENSE", "extra.json"]))
    place = data.draw(st.sampled_from([root, out]))
    far = place / data.draw(st.sampled_from(["id_rsa", "merges.txt"]))
    if (out / name).exists() and data.draw(st.booleans()):
        (out / name).rename(far)
    else:
        far.write_bytes(PRIVATE)
        (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(far)
    if name in names:
        with pytest.raises(LlmshrinkError, match=rf"{re.escape(name)} is a link to {re.escape(str(far))}"):
            contents(out, read_record(out))
    else:
        sent = contents(out, read_record(out)).items
        assert name not in {item.path for item in sent} and PRIVATE not in [item.data() for item in sent]
    shutil.rmtree(root)
