"""An adapter, or a clone without its large files, is told by name in every verb, with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmshrink
from llmshrink.checkpoint.source import resolve
from llmshrink.cli import run
from llmshrink.errors import SourceError

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)


def verbs(folder: Path, tmp_path: Path, story: Path) -> list[list[str]]:
    out, text = str(tmp_path / "out"), str(story)
    return [
        ["quantize", str(folder), "-o", out, "--calibration", text],
        ["prune", str(folder), "-o", out, "--calibration", text, "--recipe", "sparsegpt-2of4"],
        ["eval", str(folder), "--text", text, "-o", str(tmp_path / "report")],
        ["compare", str(folder), str(folder), "--text", text, "-o", str(tmp_path / "report")],
        ["plan", str(folder), "--calibration", text],
        ["inspect", str(folder)],
        ["verify", str(folder)],
        ["convert", str(folder), "-o", out, "--format", "llmshrink"],
        ["generate", str(folder), "Once"],
        ["distill", str(folder), str(folder), "-o", out, "--data", text],
        ["push", str(folder), "user/name", "--dry-run"],
        ["serve", str(folder), "--dry-run"],
    ]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    assert run(words) == 2, words
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, (words, lines)
    return lines[0]


def test_an_adapter_is_named_with_the_way_out(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(model_of("llama") / "tokenizer.json", folder)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for words in verbs(folder, tmp_path, story):
        said = refused(capsys, words)
        assert "an adapter (LoRA or alike, adapter_config.json) of meta-llama/Llama-3.1-8B, not a whole model" in said
        assert "merge_and_unload().save_pretrained('merged')" in said
    (folder / "adapter_config.json").write_text("[]")
    assert "of another model, not a whole model" in refused(capsys, ["inspect", str(folder)])
    (folder / "adapter_config.json").unlink()
    said = refused(capsys, ["generate", str(folder), "Once"])
    assert "an adapter (LoRA or alike, adapter_model.safetensors) of another model, not a whole model; copy its" in said
    assert "adapter_config.json there, which says of which model it is, and merge it into its base first" in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named_with_the_way_out(
    name: str, model_of: Callable[..., Path], story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "clone"))
    (folder / name).write_text(POINTER)
    for words in verbs(folder, tmp_path, story):
        said = refused(capsys, words)
        assert f"{name} is a Git LFS pointer" in said
        assert f"run `git lfs pull` in {folder}" in said


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "LICENSES/MIT.txt", "additional_chat_templates/tools.jinja", "chat_template.jinja"]
)
def test_a_pointer_in_the_place_of_a_side_file_is_named_before_the_work(
    name: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "clone"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(POINTER)
    with pytest.raises(SourceError, match=f"{name} is a Git LFS pointer.* run `git lfs pull` in {folder}, and then"):
        resolve(str(folder))


def test_pointers_of_shards_are_counted(
    model_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "clone"))
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": dict(zip("abc", shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        (folder / shard).write_text(POINTER)
    assert f"{shards[0]} (and 2 more) is a Git LFS pointer" in refused(capsys, ["inspect", str(folder)])


def test_a_whole_model_with_an_adapter_or_unread_pointers_beside_it_is_a_model(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "merged"))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(POINTER)
    (folder / "model.gguf").write_text(POINTER)
    report = llmshrink.quantize(
        folder, output=tmp_path / "out", calibration=story, samples=8, seq_len=32, group_size=32
    )
    assert report.ok
    assert set(report.left_behind.names) == {"adapter_config.json", "adapter_model.safetensors", "model.gguf"}
