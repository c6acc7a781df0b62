"""Checkpoints that transformers can't read, through our own reader: the same weights, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_eval.engines.cost_process import cost_process
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.options import ModelSpec, Running
from safetensors.torch import load_file
from sparse24 import write_pair

import llmshrink
from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.evaluation import loader
from llmshrink.evaluation.settings import Settings
from llmshrink.evaluation.verbs import spec_of

IDS = torch.arange(40)[None] + 3


@pytest.fixture(scope="module")
def packed(
    model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """bits -> a small checkpoint of so many."""
    folder = tmp_path_factory.mktemp("packed")

    def make(bits: int) -> Path:
        out = folder / f"w{bits}"
        if not out.exists():
            llmshrink.quantize(
                model_of("llama"), output=out, calibration=story, samples=4, seq_len=32, bits=bits, group_size=32
            )
        return out

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("bits", "needed"), [(2, True), (3, True), (4, False), (8, False)])
def test_our_reader_is_used_where_transformers_reads_other_bits(
    bits: int, needed: bool, packed: Callable[[int], Path]
) -> None:
    folder = packed(bits)
    assert (loader.packed(folder), loader.needed(folder)) == (True, needed)
    assert spec_of(str(folder), Settings()).loader is (loader.load if needed else None)
    # Streamed, every packed checkpoint comes through it: compressed-tensors decompresses a model whole.
    assert spec_of(str(folder), Settings(offload=True)).loader is loader.load


def test_other_tools_checkpoints_are_read_by_transformers(tmp_path: Path) -> None:
    """Which name classes: four bits, and inputs rounded by scales that were fixed beforehand."""
    packed = {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}
    rounded = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8, "type": "int"}}
    for form, group in (("pack-quantized", packed), ("int-quantized", {**rounded, "targets": ["Linear"]})):
        written = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": written}))
        assert loader.reader_of(tmp_path, offload=False) is None


def test_what_is_not_packed_is_left_alone(model_of: Callable[..., Path], tmp_path: Path) -> None:
    assert not loader.packed(model_of("llama")) and not loader.needed(model_of("llama"))
    assert not loader.packed(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not loader.needed(tmp_path)


def test_four_bits_are_the_same_by_our_reader_and_by_transformers(packed: Callable[[int], Path]) -> None:
    folder = packed(4)
    ours, theirs = load_model(folder, LoadOptions(), loader.load), load_model(folder, LoadOptions())
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert ours.dtype == torch.float32 and ours.config.use_cache
    assert not hasattr(ours.config, "quantization_config")


@pytest.mark.parametrize("bits", [2, 3])
def test_every_weight_is_the_readers(bits: int, packed: Callable[[int], Path]) -> None:
    folder = packed(bits)
    model = load_model(folder, LoadOptions(), loader.load)
    reader = Decompressed(folder, json.loads((folder / "config.json").read_text()), torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.read(name).float()), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_cpu_computes_in_float32_whatever_the_model_is_stored_in(
    offloaded: bool, packed: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = packed(3)
    options = LoadOptions(dtype=torch.bfloat16, offload=tmp_path / "offload" if offloaded else None)
    model = load_model(folder, options, loader.load)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(load_model(folder, LoadOptions(), loader.load)))


def test_streamed_it_says_the_same_to_the_bit(packed: Callable[[int], Path], tmp_path: Path) -> None:
    folder = packed(3)
    whole = logits(load_model(folder, LoadOptions(), loader.load))
    options = LoadOptions(offload=tmp_path / "offload")
    assert torch.equal(logits(load_model(folder, options, loader.load)), whole)


def test_the_model_streamed_before_leaves_nothing_behind(
    packed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards, where it had more of them, would be read after those of the second model."""
    options = LoadOptions(offload=tmp_path / "offload")
    monkeypatch.setattr(loader, "SHARD_BYTES", 20_000)
    load_model(packed(2), options, loader.load)
    many = len(list((tmp_path / "offload" / "dense").glob("*.safetensors")))
    monkeypatch.setattr(loader, "SHARD_BYTES", 100_000)
    second = load_model(packed(3), options, loader.load)
    assert len(list((tmp_path / "offload" / "dense").glob("*.safetensors"))) < many
    assert torch.equal(logits(second), logits(load_model(packed(3), LoadOptions(), loader.load)))


def test_a_dense_copy_is_a_checkpoint_that_transformers_reads(packed: Callable[[int], Path], tmp_path: Path) -> None:
    folder = packed(3)
    loader.write_dense(folder, tmp_path / "dense", torch.bfloat16)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    tensors = load_file(tmp_path / "dense" / "model-00000.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    found = logits(load_model(tmp_path / "dense", LoadOptions()))
    expected = logits(load_model(folder, LoadOptions(), loader.load))
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_errors_of_each_layer_come_from_the_compressor(packed: Callable[[int], Path]) -> None:
    recorded = json.loads((packed(3) / "llmshrink.json").read_text())["sites"]
    found = spec_of(str(packed(3)), Settings()).site_errors
    assert [(site.name, site.bits, site.error) for site in found] == [
        (site["name"], site["bits"], site["error"]) for site in recorded
    ]
    assert found


def test_our_own_format_is_known_wherever_a_model_is_loaded(model_of: Callable[..., Path], tmp_path: Path) -> None:
    pair = write_pair(model_of("llama"), tmp_path, bits=4, group_size=32, dtype=torch.bfloat16)
    spec = spec_of(str(pair.sparse), Settings())
    found = logits(load_model(spec.folder, LoadOptions(), spec.loader))
    expected = logits(load_model(pair.dense, LoadOptions()))
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    # The process that measures cost has not imported llmshrink, and would have run it with random numbers.
    assert cost_process().ask(spec, Running(), ())["peak_rss_bytes"] > 0
    with pytest.raises(EvalError, match="it may not know the compression, llmshrink"):
        cost_process().ask(ModelSpec("a model", pair.sparse), Running(), ())
