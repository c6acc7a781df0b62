"""A model read from the Hub: pinned, only what is needed, shards as they arrive, offline from the cache.

Against a server that speaks the Hub's API on 127.0.0.1.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import contents
from hub_server import READER, TOKEN, HubServer, use

from llmshrink.checkpoint.index import INDEX_FILE, CheckpointIndex
from llmshrink.checkpoint.source import resolve
from llmshrink.cli import run
from llmshrink.errors import CheckpointError, SourceError

SMALL = ("--samples", "8", "--seq-len", "32", "--group-size", "32")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use(server, monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def sharded(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in three shards, with what a run has no use for beside them."""
    from transformers import AutoModelForCausalLM

    source = model_of("llama")
    folder = tmp_path_factory.mktemp("hub") / "model"
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(folder, max_shard_size="60KB")
    for file in source.iterdir():
        if not file.name.startswith("model") and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "training.safetensors").write_bytes(b"of no use")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def shards_asked(hub: HubServer) -> list[str]:
    return [request.path for request in hub.asked("GET", "/cdn/") if request.range is None]


def test_what_can_be_refused_is_refused_before_weights_come(hub: HubServer, sharded: Path) -> None:
    commit = hub.publish("owner/name", sharded)
    source = resolve("owner/name", stream=True)
    assert (source.name, source.revision, source.kind) == ("owner/name", commit, "hub")
    with CheckpointIndex.open(source.folder, source.arriving) as index, CheckpointIndex.open(sharded) as local:
        assert [index.entry(key).shape for key in index] == [local.entry(key).shape for key in local]
        assert shards_asked(hub) == [] and not list(source.folder.glob("*.safetensors"))
        assert index.verify_blobs() == 0
        for key in reversed(index.keys()):
            assert torch.equal(index.read(key), local.read(key))
    assert len(shards_asked(hub)) == len(list(sharded.glob("model-*.safetensors")))
    assert not any(request.authorized for request in hub.log if request.path.startswith("/cdn/"))
    there = {path.name for path in source.folder.iterdir()}
    assert not there & {"pytorch_model.bin", "training.safetensors"}


def test_a_run_from_the_hub_is_the_run_from_the_folder(
    hub: HubServer, sharded: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a connection breaks in the middle of a shard, and again from the cache without the Hub."""
    commit = hub.publish("owner/name", sharded)
    hub.publish("owner/name", sharded, branch="v2")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)  # what it goes on by
    hub.fail("GET", "/cdn/", cut=10, skip=1)  # while headers are asked for
    hub.fail("GET", "/cdn/", cut=1000, skip=5)  # while shards arrive
    arguments = ("--calibration", str(story), *SMALL)
    assert run(["quantize", "owner/name@main", "-o", str(tmp_path / "hub"), *arguments]) == 0
    assert run(["quantize", str(sharded), "-o", str(tmp_path / "local"), *arguments]) == 0
    weights = [
        {file: sha for file, sha in contents(tmp_path / each).items() if file.endswith(".safetensors")}
        for each in ("hub", "local")
    ]
    assert weights[0] == weights[1]
    record = json.loads((tmp_path / "hub" / "llmshrink.json").read_text())
    assert (record["model"], record["revision"]) == ("owner/name", commit)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert all(
        f"{line}\n" in card for line in ("base_model: owner/name", "base_model_relation: quantized", "license: mit")
    )
    assert any(request.range and not request.range.startswith("bytes=0-") for request in hub.asked("GET", "/cdn/"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    assert resolve("owner/name").revision == commit and len(hub.log) == asked
    next(resolve("owner/name").folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(SourceError, match=r"owner/name: the Hub can't be reached, .* lacks 1 of its 5 .*\(model-"):
        resolve("owner/name")


def test_a_file_that_the_repository_hasnt_is_missed_by_who_needs_it(
    hub: HubServer, sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["vision.weight"] = "gone.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    hub.publish("owner/name", folder)
    source = resolve("owner/name", stream=True)
    with CheckpointIndex.open(source.folder, source.arriving) as opened:
        assert opened.absent == {"vision.weight": "gone.safetensors"}
        with CheckpointIndex.open(sharded) as local:
            assert opened.fingerprint() == local.fingerprint()
    assert resolve("owner/name").folder == source.folder
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    hub.publish("owner/none", folder)
    with pytest.raises(SourceError, match=r"owner/none: the repository has no gone\.safetensors, where its weights"):
        resolve("owner/none", stream=True)


def test_a_shard_that_is_not_what_was_promised_is_refused(hub: HubServer, sharded: Path) -> None:
    hub.publish("owner/name", sharded)
    source = resolve("owner/name", stream=True)
    index = CheckpointIndex.open(source.folder, source.arriving)
    for sha, data in hub.blobs.items():
        hub.blobs[sha] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CheckpointError, match="the Hub promised"):
        index.read(index.keys()[0])


@pytest.mark.parametrize(
    ("token", "kind", "says"),
    [
        (None, "gated", r"gated: no token is at hand: accept its terms at 127\.0\.0\.1:\d+/owner/name, then log in"),
        (READER, "gated", r"gated: the token at hand has no access: accept its terms at 127\.0\.0\.1"),
        (None, "private", r"no such model on the Hub \(or a private one: log in"),
        ("hf_" + "X" * 34, "private", "no such model on the Hub|doesn't know the token"),
        (TOKEN, "absent", "no such model on the Hub"),
        (TOKEN, "revision", "has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_next_step(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, token: str | None, kind: str, says: str,
) -> None:  # fmt: skip
    if kind != "absent":
        hub.publish("owner/name", sharded, private=kind == "private", gated=kind == "gated")
    use(hub, monkeypatch, tmp_path / "home", token=token)
    name = "owner/name@v9" if kind == "revision" else "owner/name"
    assert run(["quantize", name, "-o", str(tmp_path / "out"), "--calibration", "demo"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "hf_" not in err.replace("hf auth", "")
    assert re.search(says, err), err
    assert shards_asked(hub) == [] and not (tmp_path / "out").exists()
