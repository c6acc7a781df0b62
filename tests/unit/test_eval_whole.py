"""A model is loaded wholly, and as its index says, whoever loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.weightfiles import INDEX_FILE, strays
from safetensors.torch import load_file, save_file

import llmshrink
from llmshrink.errors import LlmshrinkError

NEEDED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sharded(model_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model in two shards, with an index."""
    source, folder = model_of("llama"), tmp_path / "sharded"
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"m{number}.safetensors", {"format": "pt"})
    index = {name: f"m{number}.safetensors" for number, part in enumerate((names[::2], names[1::2])) for name in part}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def change(folder: Path, file: str, act: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / file)
    act(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


def by_eval(folder: Path) -> Any:
    return load_model(folder, LoadOptions())


def streamed(folder: Path) -> Any:
    from llmshrink_eval.model import _places

    class Read:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {name: load_file(file)[key] for name, (file, key) in _places(folder).items()}

    return Read()


@pytest.mark.parametrize("load", [llmshrink.load, by_eval, streamed])
def test_of_two_of_one_name_the_one_that_the_index_means_is_loaded(
    load: Callable[[Path], Any], sharded: Path, model_of: Callable[..., Path]
) -> None:
    first = load_file(sharded / "m0.safetensors")
    change(sharded, "m1.safetensors", lambda it: it.update({name: torch.randn_like(first[name]) for name in first}))
    assert strays(sharded).doubled.keys() == first.keys() and not strays(sharded).unindexed
    found, meant = weights(load(sharded)), load_file(model_of("llama") / "model.safetensors")
    assert meant.keys() <= found.keys() | {"lm_head.weight"}
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in meant.items() if name in found)


@pytest.mark.parametrize("load", [llmshrink.load, by_eval])
def test_a_tensor_that_is_in_no_file_is_never_random(load: Callable[[Path], Any], sharded: Path) -> None:
    place = json.loads((sharded / INDEX_FILE).read_text())["weight_map"][NEEDED]
    change(sharded, place, lambda it: it.pop(NEEDED))
    with pytest.raises((EvalError, LlmshrinkError), match=rf"{NEEDED} in it; is the checkpoint whole") as caught:
        load(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [llmshrink.load, by_eval])
def test_a_tensor_that_the_index_doesnt_name_isnt_the_models(load: Callable[[Path], Any], sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    place = index["weight_map"].pop(NEEDED)
    change(sharded, place, lambda it: it.update(junk=torch.full((3,), float("nan"))))
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert strays(sharded).unindexed == {NEEDED, "junk"}
    with pytest.raises((EvalError, LlmshrinkError), match=rf"{NEEDED} in it; a file has it, and .*index.json doesn't"):
        load(sharded)
    index["weight_map"][NEEDED] = place
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert load(sharded) is not None


def test_a_single_file_has_no_strays(model_of: Callable[..., Path]) -> None:
    assert not strays(model_of("llama")).doubled and not strays(model_of("llama")).unindexed


@pytest.mark.parametrize("load", [llmshrink.load, by_eval])
def test_a_tensor_of_another_shape_than_its_config_is_named(load: Callable[[Path], Any], sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    says = r"layers\.0\.self_attn\.k_proj\.weight is \[32, 64\] in its file, and config\.json makes it \[16, 64\]"
    with pytest.raises((EvalError, LlmshrinkError), match=says):
        load(sharded)


@pytest.mark.parametrize("metadata", [{"metadata": {}}, {"metadata": None}, {}])
@pytest.mark.parametrize("load", [llmshrink.load, by_eval, streamed])
def test_an_index_may_name_a_file_that_nobody_needs_and_have_no_metadata(
    load: Callable[[Path], Any], metadata: dict[str, Any], sharded: Path, model_of: Callable[..., Path]
) -> None:
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    index = {**metadata, "weight_map": {**weight_map, "vision.weight": "gone.safetensors"}}
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    found, meant = weights(load(sharded)), load_file(model_of("llama") / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in meant.items() if name in found)
    assert len(found) >= len(meant) - 1
    assert json.loads((sharded / INDEX_FILE).read_text()) == index


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("load", [llmshrink.load, by_eval])
def test_a_missing_file_that_the_model_needs_is_named_with_the_tensor(
    load: Callable[[Path], Any], prefix: str, sharded: Path
) -> None:
    """prefix: what the checkpoint's names lack, as those of a base model do."""
    for file in ("m0.safetensors", "m1.safetensors"):
        bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(sharded / file).items()}
        save_file(bare, sharded / file, {"format": "pt"})
    named = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    index = {"weight_map": {name.removeprefix(prefix): file for name, file in named.items()}}
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    (sharded / "m1.safetensors").unlink()
    says = (
        r"m1\.safetensors: missing, though model\.safetensors\.index\.json names it for \S+weight; download or copy it"
    )
    with pytest.raises((EvalError, LlmshrinkError), match=says):
        load(sharded)


@pytest.mark.parametrize("load", [llmshrink.load, by_eval])
def test_an_empty_quantization_config_is_none(load: Callable[[Path], Any], sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert NEEDED in load(sharded).state_dict()
