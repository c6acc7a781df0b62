"""A model's name becomes a pinned folder, or one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from llmshrink.checkpoint.source import Source, resolve
from llmshrink.errors import SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(model: str, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(model, **options)
    line = str(caught.value)
    assert "\n" not in line and model.partition("@")[0] in line
    return line


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "./my-model", str(tmp_path / "my-model")):
        assert resolve(name) == Source(name, tmp_path / "my-model", None, "folder")


def test_demo_is_the_embedded_model_and_a_folder_of_that_name_is_dot_slash_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    embedded = resolve("demo")
    assert (embedded.name, embedded.kind, embedded.revision) == ("demo", "demo", None)
    assert embedded.folder != tmp_path / "demo"
    assert resolve("./demo") == Source("./demo", tmp_path / "demo", None, "folder")


@pytest.mark.parametrize(
    "name", ["./nothing", "../nothing", "/nothing", "~/nothing", "a/b/c", "nothing/", "two words", "a--b/c", "", "a\\b"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_the_network(name: str) -> None:
    assert "no such folder, and not a Hub id" in refused(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "a file, not a model's folder" in refused(str(tmp_path / "model.gguf"))


def test_two_revisions_are_refused() -> None:
    assert "revision one, and revision=two" in refused("owner/name@one", revision="two")


class Hub:
    """A stand-in for the Hub's client that remembers how it was called."""

    def __init__(self, folder: Path) -> None:
        self.snapshot = folder / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (self.snapshot / "model.safetensors").touch()
        self.files = ["config.json", "model.safetensors"]
        self.info_error: Exception | None = None
        self.download_error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.patterns: list[Any] = []

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
        self.calls.append(("info", name, revision))
        if self.info_error:
            raise self.info_error
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, name: str, *, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        self.calls.append(("download", name, revision, local_files_only))
        self.patterns.append(patterns["allow_patterns"])
        if self.download_error:
            raise self.download_error
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def answer(kind: type[Exception], status: int) -> Exception:
    """One of the client's errors, with what it must never show: an address and a token."""
    response = SimpleNamespace(
        status_code=status, headers={"authorization": "Bearer hf_secret"}, request=None, url="https://hub"
    )
    error = kind.__new__(kind)
    error.args = ("401 for https://hub/api?token=hf_secret",)
    error.response = response  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(("name", "asked"), [("owner/name", None), ("owner/name@v1.0", "v1.0"), ("gpt", None)])
def test_a_hub_model_is_pinned_to_a_commit_before_it_is_downloaded(hub: Hub, name: str, asked: str | None) -> None:
    bare = name.partition("@")[0]
    assert resolve(name) == Source(bare, hub.snapshot, COMMIT, "hub")
    downloads = [("download", bare, COMMIT, False)] * 2  # what is small, and then the weights
    assert hub.calls == [("info", bare, asked), *downloads]


def test_pickles_never_come_down_and_python_only_when_it_is_trusted(hub: Hub) -> None:
    resolve("owner/name")
    resolve("owner/name", trust_remote_code=True)
    small, weights, trusted, _ = hub.patterns
    assert "*.py" not in small and "*.py" in trusted and weights == ["model.safetensors"]
    assert not any(kind in pattern or pattern == "*" for pattern in trusted for kind in ("bin", "safetensors"))


def test_a_repository_of_pickles_is_refused_before_a_download(hub: Hub) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    assert "only pickle weights (pytorch_model.bin)" in refused("owner/name")
    hub.files = ["config.json"]
    assert "no safetensors" in refused("owner/name")
    assert [call[0] for call in hub.calls] == ["info", "info"]


def test_a_repository_with_an_adapter_alone_is_named_before_a_download(hub: Hub) -> None:
    hub.files = ["adapter_model.safetensors", "tokenizer.json"]
    assert "an adapter (LoRA or alike, adapter_model.safetensors)" in refused("owner/name")
    hub.files.append("adapter_config.json")
    said = refused("owner/name")
    assert "an adapter (LoRA or alike, adapter_config.json)" in said and "from_pretrained('owner/name').merge_" in said
    assert [call[0] for call in hub.calls] == ["info", "info"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (answer(errors.GatedRepoError, 403), "accept its terms at huggingface.co/owner/name"),
        (answer(errors.RepositoryNotFoundError, 404), "no such model on the Hub"),
        (answer(errors.RevisionNotFoundError, 404), "has no revision v2"),
        (answer(errors.HfHubHTTPError, 500), "the download failed"),
        (ValueError("https://hub?token=hf_secret"), r"the download failed (ValueError)"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_way_out_and_without_a_token(
    hub: Hub, error: Exception, says: str
) -> None:
    hub.info_error = error
    line = refused("owner/name@v2")
    assert says in line and "hf_secret" not in line and "https" not in line


def test_a_full_disk_is_said(hub: Hub) -> None:
    hub.download_error = OSError(28, "No space left on device")
    assert "the download stopped: No space left on device" in refused("owner/name")


@pytest.mark.parametrize("unreachable", [ConnectionError("down"), "the client's"])
def test_without_the_network_the_cache_serves(hub: Hub, unreachable: Exception | str) -> None:
    client_error = errors.HfHubHTTPError.__bases__[0]
    hub.info_error = client_error("down") if isinstance(unreachable, str) else unreachable
    assert resolve("owner/name") == Source("owner/name", hub.snapshot, COMMIT, "hub")
    assert hub.calls[-1] == ("download", "owner/name", None, True)


def test_without_the_network_and_the_cache_other_ways_are_offered(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.download_error = errors.LocalEntryNotFoundError("outgoing traffic has been disabled")
    line = refused("owner/name")
    assert "the Hub can't be reached" in line and "`demo`" in line
    assert [call[0] for call in hub.calls] == ["download"]
