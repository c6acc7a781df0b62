"""What a run can't work with is refused from the model's folder, before any work, with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmshrink.checkpoint import preflight
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source
from llmshrink.errors import OutputError, SourceError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 256,
}  # fmt: skip


def folder(path: Path, config: object = LLAMA, *, tokenizer: bool = True) -> Source:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tokenizer:
        (path / "tokenizer.json").write_text("{}")
    return Source("model", path, None, "folder")


def refused(source: Source, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        preflight.load_config(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_causal_model_passes(tmp_path: Path) -> None:
    source = folder(tmp_path)
    preflight.check_source(source)
    assert preflight.model_limit(preflight.load_config(source)) == 256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM isn't a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "isn't a causal language model"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel isn't a causal language model"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
            "has an encoder",
        ),
        ({"architectures": None, "model_type": None}, "isn't a transformers model"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"already quantized (gptq, 4); start from the original",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "already quantized (fp8)"),
        ({"model_type": "newest"}, "config.json has model_type 'newest', which transformers"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], and has to be text"),
        ({"model_type": None}, "config.json names no model_type"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', and has to be a whole number from 1 to 1,048,576"),
        ({"model_type": "newest", "auto_map": {"AutoConfig": "code.Config"}}, "--trust-remote-code"),
    ],
)
def test_what_the_config_gives_away_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    merged = {name: value for name, value in {**LLAMA, **change}.items() if value is not None}
    assert says in refused(folder(tmp_path, merged))


def test_code_that_transformers_does_not_need_is_no_reason_to_refuse(tmp_path: Path) -> None:
    preflight.check_source(folder(tmp_path, {**LLAMA, "auto_map": {"AutoModelForCausalLM": "code.Model"}}))


def test_an_encoder_decoder_model_that_transformers_omits_to_mark_is_refused(tmp_path: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    assert "isn't a causal language model" in refused(folder(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "says"), [("{", "can't be read as JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "JSON")]
)
def test_a_broken_config_is_named(tmp_path: Path, text: str, says: str) -> None:
    line = refused(folder(tmp_path, text))
    assert says in line and str(tmp_path / "config.json") in line


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(Source("model", tmp_path, None, "folder"))


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    assert "no tokenizer" in refused(folder(tmp_path, tokenizer=False))


def test_a_broken_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="its tokenizer can't be read") as caught:
        preflight.load_tokenizer(folder(tmp_path))
    line = str(caught.value)
    assert "\n" not in line and "..." not in line
    assert line.endswith("; copy the tokenizer's files of the original model again")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_matrix_of_codes_is_refused_by_name_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"fine.weight": torch.ones(2, 2, dtype=torch.float64), "up.weight": torch.ones(2, 2).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = Source("model", tmp_path, None, "folder")
    with CheckpointIndex.open(tmp_path) as index:
        preflight.check_dtypes(source, index, ["fine.weight"])
        with pytest.raises(SourceError, match=f"already quantized: up.weight is stored as {str(dtype)[6:]}"):
            preflight.check_dtypes(source, index, ["fine.weight", "up.weight"])


def test_a_disk_without_room_is_named_with_the_bytes_needed(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    out = tmp_path / "not" / "there" / "yet"
    preflight.check_room(out, 1)
    with pytest.raises(
        OutputError, match=rf"{out}: no space left for the output: {2 * free:,} bytes needed, [\d,]+ free"
    ):
        preflight.check_room(out, 2 * free)


def test_wiki7m_passes(wiki7m: Path) -> None:
    source = Source("wiki7m", wiki7m, None, "folder")
    assert preflight.model_limit(preflight.load_config(source)) == 512
    assert preflight.load_tokenizer(source)("the")["input_ids"]
